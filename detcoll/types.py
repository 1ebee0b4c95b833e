"""Names that every room shares: reduce operations and element types."""

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

    @classmethod
    def parse(cls, value: str | ReduceOp) -> ReduceOp:
        """Return the operation that ``value`` names, in any case.

        Raises
        ------
        UsageError
            If no operation has that name.
        """
        if isinstance(value, ReduceOp):
            return value
        try:
            return cls(value.lower())
        except (ValueError, AttributeError):
            names = ", ".join(op.value for op in cls)
            raise UsageError(f"op={value!r} is not a reduce operation; expected one of {names}") from None


BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
FLOAT16: np.dtype[Any] = np.dtype(np.float16)

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        "float16", "float32", "float64",
        "int8", "int16", "int32", "int64",
        "uint8", "uint16", "uint32", "uint64",
    )
} | {"bfloat16": BFLOAT16}  # fmt: skip
"""Element types that can be reduced, by the name that torch and NumPy share."""


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


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Tell whether ``dtype`` is one of the integer types."""
    return dtype.kind in "iu"


def is_half(dtype: np.dtype[Any]) -> bool:
    """Tell whether ``dtype`` is a 16-bit float, which folds in float32."""
    return dtype in (FLOAT16, BFLOAT16)


def accumulation_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which elements of ``dtype`` are folded: float32 for 16-bit floats, else itself."""
    return np.dtype(np.float32) if is_half(dtype) else dtype
