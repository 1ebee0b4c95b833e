"""Names that every room shares: reduce operations, element types, and which operations a type has."""

from __future__ import annotations

from enum import Enum
from typing import Any

import ml_dtypes
import numpy as np

from detcoll.errors import UsageError


class ReduceOp(Enum):
    """A reduction over ranks, named as in torch.distributed."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PROD = "prod"
    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"

    __hash__ = object.__hash__  # in C; each call looks several things up by its operation

    @classmethod
    def parse(cls, value: object) -> ReduceOp:
        """Return the operation that ``value`` names, in any case.

        Raises
        ------
        UsageError
            If no operation has that name.
        """
        if isinstance(value, ReduceOp):
            return value
        known = _OPERATIONS.get(value) if isinstance(value, str) else None
        if known is not None:
            return known
        try:
            return cls(str(value).lower())
        except ValueError:
            names = ", ".join(op.value for op in cls)
            raise UsageError(f"op={value!r} is not a reduce operation; expected one of {names}") from None


_OPERATIONS = {op.value: op for op in ReduceOp}
"""By name: to look one up in the class takes five times as long."""

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
FLOAT16: np.dtype[Any] = np.dtype(np.float16)

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        "float16", "float32", "float64",
        "int8", "int16", "int32", "int64",
        "uint8", "uint16", "uint32", "uint64",
        "bool", "complex64", "complex128",
    )
} | {"bfloat16": BFLOAT16}  # fmt: skip
"""Element types that can be reduced, by the name that torch and NumPy share."""

_EXTREMA = frozenset({ReduceOp.MIN, ReduceOp.MAX})
_BITWISE = frozenset({ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR})
_SUM_AND_PRODUCT = frozenset({ReduceOp.SUM, ReduceOp.PROD})
_BY_KIND = {
    "b": _EXTREMA | _BITWISE,
    "i": _SUM_AND_PRODUCT | _EXTREMA | _BITWISE,
    "u": _SUM_AND_PRODUCT | _EXTREMA | _BITWISE,
    "f": _SUM_AND_PRODUCT | _EXTREMA | {ReduceOp.AVG},
    "V": _SUM_AND_PRODUCT | _EXTREMA | {ReduceOp.AVG},  # bfloat16
    "c": _SUM_AND_PRODUCT | {ReduceOp.AVG},
}
_OPERATORS: dict[np.dtype[Any], frozenset[ReduceOp]] = {dtype: _BY_KIND[dtype.kind] for dtype in DTYPES.values()}


def parse_dtype(value: object) -> np.dtype[Any]:
    """Return the supported element type that ``value`` (a name or anything NumPy takes) means.

    Raises
    ------
    UsageError
        If the type is not one of `DTYPES` in native byte order.
    """
    if isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    try:
        dtype: np.dtype[Any] | None = np.dtype(value)  # type: ignore[call-overload]
    except TypeError:
        dtype = None
    if dtype is not None and dtype.isnative and dtype in DTYPES.values():
        return dtype
    raise UsageError(f"dtype={value!s} is not supported; expected one of {', '.join(DTYPES)} in native byte order")


def operators_of(dtype: np.dtype[Any]) -> frozenset[ReduceOp]:
    """Return the operations that reduce elements of ``dtype``, which is one of `DTYPES`.

    Of bool, ``min`` and ``band`` are and, ``max`` and ``bor`` are or, ``bxor`` is exclusive or. Complex numbers have no
    order, integers no average, and floats and complex numbers no bits to combine.
    """
    return _OPERATORS[parse_dtype(dtype)]


def check_op(op: ReduceOp, dtype: np.dtype[Any]) -> None:
    """Refuse an operation that elements of ``dtype`` do not have.

    Raises
    ------
    UsageError
        If `operators_of` does not name it, with what to use instead; also if ``dtype`` is not one of `DTYPES`.
    """
    if op in _OPERATORS.get(dtype, ()):
        return
    known = operators_of(dtype)
    names = ", ".join(each.value for each in ReduceOp if each in known)
    raise UsageError(f"op={op.value!r} of {dtype} is not defined; expected one of {names}. {_hint(op, dtype)}")


def _hint(op: ReduceOp, dtype: np.dtype[Any]) -> str:
    """Return what to use instead of an operation that ``dtype`` does not have."""
    if dtype.kind == "b":
        return "Count with x.astype(numpy.uint8), or use max for any and min for all"
    if dtype.kind in "iu":
        return "Use sum and divide, or average x.astype(numpy.float64)"
    if op in _BITWISE:
        return "Pass the bits as integers, such as x.view(numpy.uint8)"
    return "Complex numbers have no order; reduce x.real, x.imag or abs(x)"


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Tell whether ``dtype`` is one of the integer types; bool is none."""
    return dtype.kind in "iu"


def is_complex(dtype: np.dtype[Any]) -> bool:
    """Tell whether ``dtype`` is one of the complex types."""
    return dtype.kind == "c"


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether ``dtype`` is one of the float types, 16-bit ones included."""
    return dtype.kind == "f" or dtype == BFLOAT16


def real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of the two parts of a complex ``dtype``; other types as they are."""
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype


def is_half(dtype: np.dtype[Any]) -> bool:
    """Tell whether ``dtype`` is a 16-bit float, which folds in float32."""
    return dtype in (FLOAT16, BFLOAT16)


def accumulation_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which elements of ``dtype`` are folded: float32 for 16-bit floats, else itself."""
    return np.dtype(np.float32) if is_half(dtype) else dtype
