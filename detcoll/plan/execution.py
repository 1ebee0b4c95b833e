"""Symbolic execution: runs the steps of all ranks on what elements are made of instead of on numbers.

An element's value is an expression (`detcoll.plan.symbols`) and the number of the element it speaks of, so that arrays
of numbers stand for arrays of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import PlanError
from detcoll.plan.collectives import Run, declaration_of
from detcoll.plan.ir import Buffer, Kind, Plan
from detcoll.plan.symbols import UNWRITTEN, Symbols
from detcoll.topology import Topology


@dataclass(slots=True)
class Values:
    """A run of elements: the number of each one's expression, and of the element it speaks of."""

    expressions: NDArray[np.int64]
    elements: NDArray[np.int64]

    @classmethod
    def unwritten(cls, length: int) -> Values:
        """Return ``length`` elements that nothing wrote."""
        return cls(np.full(length, UNWRITTEN, dtype=np.int64), np.full(length, UNWRITTEN, dtype=np.int64))

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Values:
        """Return the elements of ``runs``, one run after another."""
        made = cls.unwritten(sum(run.length for run in runs))
        begin = 0
        for run in runs:
            made.expressions[begin : begin + run.length] = run.expression
            made.elements[begin : begin + run.length] = np.arange(run.element, run.element + run.length)
            begin += run.length
        return made

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
    topology : Topology
        What they were compiled for.
    """

    def __init__(self, plans: Sequence[Plan], topology: Topology) -> None:
        self.plans, self.topology = plans, topology
        self.symbols = Symbols()
        self._buffers: list[dict[int, Values]] = []
        self._lent: dict[tuple[int, int], Values] = {}
        self._sent: dict[tuple[int, int], Values] = {}
        for plan in plans:
            declared = declaration_of(plan.collective.kind)
            given = Values.of(declared.before(self.symbols, plan.collective, topology, plan.rank))
            result = given if declared.has_one_array else Values.unwritten(plan.out_elems)
            on_host: dict[int, Values] = {
                Buffer.IN: Values.unwritten(plan.in_elems) if plan.device_in else given,
                Buffer.OUT: Values.unwritten(plan.out_elems) if plan.device_out else result,
            }
            self._buffers.append(
                {
                    **on_host,
                    Buffer.DEVICE_IN: given,
                    Buffer.DEVICE_OUT: result,
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

    def check_result(self) -> None:
        """Prove that every rank's array holds what the declaration of its collective promises.

        Raises
        ------
        PlanError
            With the first rank and element that do not, what is there, and what was promised.
        """
        for rank, plan in enumerate(self.plans):
            declared = declaration_of(plan.collective.kind)
            promised = Values.of(declared.after(self.symbols, plan.collective, self.topology, rank))
            there = self._buffers[rank][Buffer.DEVICE_OUT if plan.device_out else Buffer.OUT]
            if len(promised.elements) != len(there.elements):
                raise PlanError(
                    f"rank {rank} ends with {len(there.elements)} elements; promised {len(promised.elements)}"
                )
            wrong = (there.expressions != promised.expressions) | (there.elements != promised.elements)
            if wrong.any():
                element = int(np.argmax(wrong))
                raise PlanError(
                    f"rank {rank} ends with {self.symbols.show(int(there.expressions[element]))} of element "
                    f"{int(there.elements[element])} in element {element}; promised is "
                    f"{self.symbols.show(int(promised.expressions[element]))} of element "
                    f"{int(promised.elements[element])}"
                )

    def _written(self, values: Values, place: int) -> None:
        if len(values.expressions) and values.expressions.min() == UNWRITTEN:
            raise PlanError(f"input {place} reads scratch that nothing has written")

    def _weighted(self, numbers: NDArray[np.int64], place: int, ranks: int) -> None:
        for number in numbers.tolist():
            if self.symbols.known[number].ranks != ranks:
                raise PlanError(f"input {place} counts as {ranks} ranks; it is {self.symbols.show(number)}")


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
