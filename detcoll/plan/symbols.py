"""Expressions: what an element of an array is made of.

They are interned, so that equal ones have one number:

- a leaf is what a rank contributed
- an open fold, in ACCUMULATOR, is not rounded yet: a further fold continues it as its first input, which makes one
  fold of both
- a closed fold, in OUT or PARTIAL, is rounded; a fold of it is another level
- a final fold is closed, and an average has divided there; nothing may be folded with it, only copies made
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from detcoll.errors import PlanError

UNWRITTEN = -1
"""The number of what nothing has written."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A leaf (``rank``), or a fold of ``parts`` (numbers of expressions) from the left."""

    rank: int = -1
    parts: tuple[int, ...] = ()
    open: bool = False
    final: bool = False
    ranks: int = field(default=1, compare=False)
    """How many contributions it holds."""


@dataclass(slots=True)
class Symbols:
    """All expressions of one check, each under its number."""

    known: list[Expression] = field(default_factory=list)
    numbers: dict[Expression, int] = field(default_factory=dict)

    def leaf(self, rank: int) -> int:
        """Return the number of what ``rank`` contributed."""
        return self._intern(Expression(rank=rank))

    def fold(self, parts: Sequence[int], *, open_: bool = False, final: bool = False) -> int:
        """Return the number of a fold of ``parts``.

        Raises
        ------
        PlanError
            If a part is finished already, or is an open fold that is not the first.
        """
        if open_ and final:
            raise PlanError("a final fold must round: its target may not be ACCUMULATOR")
        if len(parts) == 1 and self.known[parts[0]].final and not (open_ or final):
            return parts[0]
        for place, part in enumerate(parts):
            if self.known[part].final:
                raise PlanError(f"input {place} is finished already: {self.show(part)}")
            if self.known[part].open and place:
                raise PlanError(f"input {place} is an open fold, which only the first may be: {self.show(part)}")
        first = self.known[parts[0]]
        flat = (*first.parts, *parts[1:]) if first.open else tuple(parts)
        if len(flat) == 1 and not open_ and not final:
            return flat[0]
        return self._intern(Expression(-1, flat, open_, final, sum(self.known[part].ranks for part in flat)))

    def ranks_in(self, number: int) -> list[int]:
        """Return the ranks whose contributions an expression holds, in fold order."""
        expression = self.known[number]
        if not expression.parts:
            return [expression.rank]
        return [rank for part in expression.parts for rank in self.ranks_in(part)]

    def show(self, number: int) -> str:
        """Return an expression as people write it: ``final((0 1) (2 3))``."""
        if number == UNWRITTEN:
            return "nothing"
        expression = self.known[number]
        if not expression.parts:
            return str(expression.rank)
        kind = "final" if expression.final else "open" if expression.open else ""
        return f"{kind}({' '.join(self.show(part) for part in expression.parts)})"

    def _intern(self, expression: Expression) -> int:
        number = self.numbers.setdefault(expression, len(self.known))
        if number == len(self.known):
            self.known.append(expression)
        return number
