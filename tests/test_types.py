"""Reduce operations and element types, and the names they go by."""

from __future__ import annotations

import numpy as np
import pytest

from detcoll.errors import UsageError
from detcoll.types import BFLOAT16, DTYPES, FLOAT16, ReduceOp, accumulation_dtype, is_half, is_integer, parse_dtype


@pytest.mark.parametrize("op", ReduceOp)
def test_operations_are_found_by_name_in_any_case(op):
    assert ReduceOp.parse(op) is op
    assert ReduceOp.parse(op.value) is op
    assert ReduceOp.parse(op.value.upper()) is op


@pytest.mark.parametrize("value", ["band", "", None, 3, b"sum", np.add, sum])
def test_what_is_no_operation_is_refused(value):
    with pytest.raises(UsageError, match="is not a reduce operation; expected one of sum, avg, min, max, prod"):
        ReduceOp.parse(value)


@pytest.mark.parametrize("name", DTYPES)
def test_types_are_found_by_name_and_by_what_numpy_takes(name):
    dtype = DTYPES[name]
    assert dtype.name == name
    for value in (name, dtype, dtype.type):
        assert parse_dtype(value) is dtype or parse_dtype(value) == dtype


@pytest.mark.parametrize(
    "value", ["bool", bool, "complex64", "float8_e4m3fn", ">f4", "S3", object, "f4,f4", "no such", {}, 3.5]
)
def test_types_that_cannot_be_reduced_are_refused(value):
    with pytest.raises(UsageError, match=r"is not supported; expected one of float16, .*bfloat16 in native byte order"):
        parse_dtype(value)


def test_kinds_of_types():
    halves = {name for name, dtype in DTYPES.items() if is_half(dtype)}
    integers = {name for name, dtype in DTYPES.items() if is_integer(dtype)}
    assert halves == {"float16", "bfloat16"}
    assert integers == {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
    assert set(DTYPES) - halves - integers == {"float32", "float64"}


def test_halves_accumulate_in_float32_and_the_rest_in_themselves():
    for dtype in DTYPES.values():
        expected = np.dtype(np.float32) if dtype in (FLOAT16, BFLOAT16) else dtype
        assert accumulation_dtype(dtype) == expected
