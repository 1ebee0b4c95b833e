"""How options take a number with a unit."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

Quantity = Annotated[str, Parameter(allow_leading_hyphen=True)]
"""A number and a unit. One below zero is taken as a value too, and then refused as what it is."""
