"""Reduce operations and element types, and the names they go by."""

from __future__ import annotations

import numpy as np
import pytest

from detcoll.errors import UsageError
from detcoll.types import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    ReduceOp,
    accumulation_dtype,
    check_op,
    is_complex,
    is_float,
    is_half,
    is_integer,
    operators_of,
    parse_dtype,
    real_dtype,
)


@pytest.mark.parametrize("op", ReduceOp)
def test_operations_are_found_by_name_in_any_case(op):
    assert ReduceOp.parse(op) is op
    assert ReduceOp.parse(op.value) is op
    assert ReduceOp.parse(op.value.upper()) is op


@pytest.mark.parametrize("value", ["land", "", None, 3, b"sum", np.add, sum])
def test_what_is_no_operation_is_refused(value):
    with pytest.raises(UsageError, match="reduce operation; expected one of sum, avg, min, max, prod, band, bor, bxor"):
        ReduceOp.parse(value)


@pytest.mark.parametrize("name", DTYPES)
def test_types_are_found_by_name_and_by_what_numpy_takes(name):
    dtype = DTYPES[name]
    assert dtype.name == name
    for value in (name, dtype, dtype.type):
        assert parse_dtype(value) is dtype or parse_dtype(value) == dtype


@pytest.mark.parametrize(
    "value",
    ["complex32", np.longdouble, np.clongdouble, "float8_e4m3fn", ">f4", "S3", object, "f4,f4", "no such", {}, 3.5],
)
def test_types_that_cannot_be_reduced_are_refused(value):
    with pytest.raises(UsageError, match=r"is not supported; expected one of float16, .*bfloat16 in native byte order"):
        parse_dtype(value)


def test_kinds_of_types():
    halves = {name for name, dtype in DTYPES.items() if is_half(dtype)}
    integers = {name for name, dtype in DTYPES.items() if is_integer(dtype)}
    assert halves == {"float16", "bfloat16"}
    assert integers == {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
    floats = {name for name, dtype in DTYPES.items() if is_float(dtype)}
    assert floats - halves == {"float32", "float64"}
    assert {name for name, dtype in DTYPES.items() if is_complex(dtype)} == {"complex64", "complex128"}
    assert set(DTYPES) - floats - integers == {"bool", "complex64", "complex128"}
    assert [real_dtype(DTYPES[name]).name for name in ("complex64", "complex128", "int8")] == [
        "float32", "float64", "int8",
    ]  # fmt: skip


BITWISE = {"band", "bor", "bxor"}
OPERATORS = {
    "bool": {"min", "max"} | BITWISE,
    "complex64": {"sum", "avg", "prod"},
    "complex128": {"sum", "avg", "prod"},
    **{name: {"sum", "avg", "min", "max", "prod"} for name in ("float16", "bfloat16", "float32", "float64")},
    **{f"{sign}int{bits}": {"sum", "min", "max", "prod"} | BITWISE for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_has_its_operations_and_refuses_the_others(name):
    dtype = DTYPES[name]
    assert {op.value for op in operators_of(dtype)} == OPERATORS[name]
    for op in ReduceOp:
        if op.value in OPERATORS[name]:
            check_op(op, dtype)
        else:
            with pytest.raises(UsageError, match=f"^op='{op.value}' of {name} is not defined; expected one of .*"):
                check_op(op, dtype)


@pytest.mark.parametrize(
    ("name", "op", "words"),
    [
        ("bool", "sum", r"one of min, max, band, bor, bxor\. Count with x\.astype\(numpy\.uint8\), or use max for any"),
        ("bool", "avg", "Count with"),
        ("uint8", "avg", r"one of sum, min, max, prod, band, bor, bxor\. Use sum and divide, or average x\.astype"),
        ("bfloat16", "bxor", r"one of sum, avg, min, max, prod\. Pass the bits as integers, such as x\.view"),
        ("complex64", "band", "Pass the bits as integers"),
        ("complex128", "min", r"one of sum, avg, prod\. Complex numbers have no order; reduce x\.real, x\.imag or abs"),
    ],
)
def test_what_a_type_does_not_have_is_refused_with_a_hint(name, op, words):
    with pytest.raises(UsageError, match=words):
        check_op(ReduceOp(op), DTYPES[name])


@pytest.mark.parametrize("dtype", [np.dtype(np.longdouble), np.dtype(">f4"), np.dtype("S3")], ids=str)
def test_types_that_cannot_be_reduced_have_no_operations(dtype):
    for ask in (operators_of, lambda dtype: check_op(ReduceOp.SUM, dtype)):
        with pytest.raises(UsageError, match="is not supported; expected one of float16"):
            ask(dtype)


def test_halves_accumulate_in_float32_and_the_rest_in_themselves():
    for dtype in DTYPES.values():
        expected = np.dtype(np.float32) if dtype in (FLOAT16, BFLOAT16) else dtype
        assert accumulation_dtype(dtype) == expected
