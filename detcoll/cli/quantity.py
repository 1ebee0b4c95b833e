"""How options take a number, with a unit or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

Quantity = Annotated[str, Parameter(allow_leading_hyphen=True)]
"""A number and a unit. One below zero is taken as a value too, and then refused as what it is."""


def _whole(type_: Any, tokens: Sequence[Token]) -> int:
    """Return a whole number; cyclopts itself rounds "2.5"."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from None


Whole = Annotated[int, Parameter(converter=_whole)]
"""A whole number, which nothing is rounded to."""
