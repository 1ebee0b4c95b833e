"""Symbolic execution: what every element of every buffer is made of.

An element's value is an expression and the number of the element it speaks of. Expressions are interned, so that equal
ones have one number and arrays of numbers stand for arrays of values:

- a leaf is what a rank contributed
- an open fold, in ACCUMULATOR, is not rounded yet: a further fold continues it as its first input, which makes one
  fold of both
- a closed fold, in USER or PARTIAL, is rounded; a fold of it is another level
- a final fold is closed, and an average has divided there; nothing may be folded with it, only copies made
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import PlanError
from detcoll.plan.ir import Buffer, Collective, Kind, Plan
from detcoll.topology import Topology

UNWRITTEN = -1


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


@dataclass(slots=True)
class Values:
    """A run of elements: the number of each one's expression, and of the element it speaks of."""

    expressions: NDArray[np.int64]
    elements: NDArray[np.int64]

    @classmethod
    def unwritten(cls, length: int) -> Values:
        """Return ``length`` elements that nothing wrote."""
        return cls(np.full(length, UNWRITTEN, dtype=np.int64), np.full(length, UNWRITTEN, dtype=np.int64))

    def part(self, offset: int, length: int) -> Values:
        """Return a copy of ``length`` elements at ``offset``."""
        span = slice(offset, offset + length)
        return Values(self.expressions[span].copy(), self.elements[span].copy())

    def put(self, offset: int, values: Values) -> None:
        """Write ``values`` at ``offset``."""
        span = slice(offset, offset + len(values.elements))
        self.expressions[span], self.elements[span] = values.expressions, values.elements


class Execution:
    """Buffers of all ranks while steps run one by one.

    Parameters
    ----------
    plans : sequence of Plan
        By rank.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = plans
        self.symbols = Symbols()
        self._buffers: list[dict[int, Values]] = []
        self._lent: dict[tuple[int, int], Values] = {}
        self._sent: dict[tuple[int, int], Values] = {}
        for plan in plans:
            user = Values.unwritten(plan.collective.count)
            user.expressions[:] = self.symbols.leaf(plan.rank)
            user.elements[:] = np.arange(plan.collective.count)
            self._buffers.append(
                {
                    Buffer.USER: user,
                    Buffer.PARTIAL: Values.unwritten(plan.partial_elems),
                    Buffer.ACCUMULATOR: Values.unwritten(plan.accumulator_elems),
                }
            )

    def send(self, rank: int, step: int) -> None:
        """Take what SEND ``step`` of ``rank`` reads."""
        row = self.plans[rank].steps[step]
        values = self._buffers[rank][int(row["buffer"])].part(int(row["offset"]), int(row["length"]))
        self._written(values, 0)
        self._sent[rank, step] = values

    def recv(self, rank: int, step: int, sender: tuple[int, int]) -> None:
        """Put what ``sender`` sent where RECV ``step`` of ``rank`` wants it."""
        row = self.plans[rank].steps[step]
        values = self._sent.pop(sender)
        if row["buffer"] == Buffer.LENT:
            self._lent[rank, step] = values
        else:
            self._buffers[rank][int(row["buffer"])].put(int(row["offset"]), values)

    def fold(self, rank: int, step: int) -> None:
        """Fold what FOLD ``step`` of ``rank`` reads into its target."""
        plan = self.plans[rank]
        row = plan.steps[step]
        length = int(row["length"])
        inputs = []
        for place, (buffer, offset) in enumerate(plan.inputs_of(step)):
            if buffer == Buffer.LENT:
                values = self._lent.pop((rank, offset))
            else:
                values = self._buffers[rank][buffer].part(offset, length)
            self._written(values, place)
            inputs.append(values)
        for place, values in enumerate(inputs[1:], start=1):
            if not np.array_equal(values.elements, inputs[0].elements):
                raise PlanError(f"input {place} holds other elements of the array than input 0")
        columns, where = np.unique(np.stack([v.expressions for v in inputs]), axis=1, return_inverse=True)
        open_, final = row["buffer"] == Buffer.ACCUMULATOR, bool(row["final"])
        folded = np.array([self.symbols.fold(column.tolist(), open_=open_, final=final) for column in columns.T])
        for place, (ranks, numbers) in enumerate(zip(plan.ranks_of(step), columns, strict=True)):
            self._weighted(numbers, place, ranks)
        values = Values(folded[where.reshape(-1)], inputs[0].elements)
        self._buffers[rank][int(row["buffer"])].put(int(row["offset"]), values)

    def check_result(self, topology: Topology) -> None:
        """Prove that every rank's array holds the promised result.

        Raises
        ------
        PlanError
            With the first rank and element that do not, what is there, and what was promised.
        """
        for rank, plan in enumerate(self.plans):
            promised = promise(self.symbols, plan.collective, topology)
            user = self._buffers[rank][Buffer.USER]
            wrong = (user.expressions != promised) | (user.elements != np.arange(plan.collective.count))
            if wrong.any():
                element = int(np.argmax(wrong))
                raise PlanError(
                    f"rank {rank} ends with {self.symbols.show(int(user.expressions[element]))} of element "
                    f"{int(user.elements[element])} in element {element}; promised is {self.symbols.show(promised)}"
                )

    def _written(self, values: Values, place: int) -> None:
        if len(values.expressions) and values.expressions.min() == UNWRITTEN:
            raise PlanError(f"input {place} reads scratch that nothing has written")

    def _weighted(self, numbers: NDArray[np.int64], place: int, ranks: int) -> None:
        for number in numbers.tolist():
            if self.symbols.known[number].ranks != ranks:
                raise PlanError(f"input {place} counts as {ranks} ranks; it is {self.symbols.show(number)}")


def promise(symbols: Symbols, collective: Collective, topology: Topology) -> int:
    """Return the expression that every element of every rank must end with.

    Ranks fold in rank order inside a site, sites in site order; the last fold is final. A broadcast ends with the
    root's contribution.
    """
    if collective.kind == "broadcast":
        return symbols.leaf(collective.root)
    if topology.size == 1:
        return symbols.leaf(0)
    level = [[symbols.leaf(rank) for rank in site.ranks] for site in topology.sites]
    if len(level) == 1:
        return symbols.fold(level[0], final=True)
    return symbols.fold([symbols.fold(site) for site in level], final=True)


def run(
    execution: Execution, events: Sequence[tuple[int, int]], partners: dict[tuple[int, int], tuple[int, int]]
) -> None:
    """Run the steps named by ``events`` (rank, step), an order in which each finds what it waits for."""
    for rank, step in events:
        kind = Kind(execution.plans[rank].steps["kind"][step])
        try:
            if kind is Kind.SEND:
                execution.send(rank, step)
            elif kind is Kind.RECV:
                execution.recv(rank, step, partners[rank, step])
            else:
                execution.fold(rank, step)
        except PlanError as error:
            raise PlanError(f"{describe(execution.plans[rank], step)}: {error}") from error


def describe(plan: Plan, step: int) -> str:
    """Return a step as errors name it: rank, number, kind, peer and tag."""
    row = plan.steps[step]
    kind = Kind(row["kind"])
    if kind is Kind.FOLD:
        return f"rank {plan.rank}, step {step} (FOLD)"
    way = "to" if kind is Kind.SEND else "from"
    return f"rank {plan.rank}, step {step} ({kind.name} {way} rank {int(row['peer'])}, tag {int(row['tag'])})"
