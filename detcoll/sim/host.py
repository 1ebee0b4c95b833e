"""A modelled rank: one core that does its steps one after another, and the memory they work on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.fold import fold_step
from detcoll.machine import Machine, Queued, Slots
from detcoll.plan.ir import Buffer, Kind, Plan
from detcoll.plan.predict import Costs
from detcoll.transport import Window
from detcoll.types import ReduceOp, accumulation_dtype

Job = tuple[int, Callable[..., None], tuple[Any, ...]]
"""Something for the core: how long it takes, and what happens then."""


@dataclass(slots=True)
class Memory:
    """The arrays of one rank, when a simulation carries data."""

    plan: Plan
    op: ReduceOp
    user: NDArray[Any]
    lent: dict[int, NDArray[Any]] = field(default_factory=dict)
    buffers: dict[int, NDArray[Any]] = field(init=False)

    def __post_init__(self) -> None:
        """Lay out scratch, and refuse an array that does not fit the plan."""
        wide = accumulation_dtype(self.user.dtype)
        given = (self.user.shape, self.user.dtype.itemsize, wide.itemsize)
        collective = self.plan.collective
        wanted = ((collective.count,), collective.itemsize, collective.accumulator_itemsize)
        if given != wanted:
            raise UsageError(f"data of rank {self.plan.rank}: shape and item sizes are {given}; expected {wanted}")
        self.user = self.user.copy()
        self.buffers = {
            Buffer.USER: self.user,
            Buffer.PARTIAL: np.zeros(self.plan.partial_elems, self.user.dtype),
            Buffer.ACCUMULATOR: np.zeros(self.plan.accumulator_elems, wide),
        }

    def read(self, step: int) -> NDArray[Any]:
        """Return a copy of what SEND ``step`` sends."""
        row = self.plan.rows[step]
        return self.buffers[row.buffer][row.offset : row.offset + row.length].copy()

    def take(self, step: int, values: NDArray[Any]) -> None:
        """Put what RECV ``step`` received where it belongs."""
        row = self.plan.rows[step]
        if row.buffer == Buffer.LENT:
            self.lent[step] = values
        else:
            self.buffers[row.buffer][row.offset : row.offset + row.length] = values

    def fold(self, step: int) -> None:
        """Do FOLD ``step``."""
        row = self.plan.rows[step]
        inputs = [
            self.lent.pop(offset) if buffer == Buffer.LENT else self.buffers[buffer][offset : offset + row.length]
            for buffer, offset in self.plan.inputs_of(step)
        ]
        out = self.buffers[row.buffer][row.offset : row.offset + row.length]
        fold_step(self.op, inputs, self.plan.ranks_of(step), out, self.plan.size, final=bool(row.final))


class Columns:
    """What a simulation asks of a plan's steps, a list a field: a million steps take a quarter of what rows take.

    ``wide`` : whether it is a SEND over a line.  ``nbytes`` : what a step moves.  ``takes_ns`` : what it costs the
    core, with what it copies: a SEND over a line and a RECV that lends copy nothing, a FOLD every input.
    """

    __slots__ = ("kind", "nbytes", "peer", "tag", "takes_ns", "wide")

    def __init__(self, plan: Plan, costs: Costs, *, lines: bool) -> None:
        steps, collective = plan.steps, plan.collective
        wide = (steps["wide"] == 1) & (steps["kind"] == Kind.SEND) & lines
        widths = np.where(steps["accumulated"] == 1, collective.accumulator_itemsize, collective.itemsize)
        nbytes = steps["length"] * widths
        inputs = np.diff(steps["inputs_end"], prepend=0)
        nothing = wide | ((steps["kind"] == Kind.RECV) & (steps["buffer"] == Buffer.LENT))
        copies = np.where(steps["kind"] == Kind.FOLD, inputs, np.where(nothing, 0, 1))
        takes_ns = costs.step_ns + np.rint(copies * (nbytes / costs.copy_bytes_per_s * 1e9)).astype(np.int64)
        self.kind: list[int] = steps["kind"].tolist()
        self.peer: list[int] = steps["peer"].tolist()
        self.tag: list[int] = steps["tag"].tolist()
        self.wide: list[bool] = wide.tolist()
        self.nbytes = _shared(nbytes)
        self.takes_ns = _shared(takes_ns)


def _shared(values: NDArray[np.int64]) -> list[int]:
    """Return the numbers as a list in which equal ones are one object."""
    distinct, places = np.unique(values, return_inverse=True)
    few: list[int] = distinct.tolist()
    return [few[place] for place in places]


@dataclass(slots=True)
class Host:
    """One rank: its machine, its slots, and what its transport holds.

    ``work`` : what waits for the core.  ``working``, ``taking`` : whether it does something, and just now ends it.
    ``follow`` : what that makes ready.
    ``arrived`` : messages nobody has asked for yet, by (source, tag).  ``posted`` : receives that wait, by the same.
    ``timed`` : sends that wait for their window to open.  ``connection_free_ns`` : when kernel pacing lets the next
    message to a peer begin.
    """

    site: int
    machine: Machine
    columns: Columns
    slots: Slots[int]
    memory: Memory | None
    working: bool = False
    taking: bool = False
    work: deque[Job] = field(default_factory=deque)
    follow: list[Job] = field(default_factory=list)
    line_free_ns: dict[int, int] = field(default_factory=dict)
    finish_ns: int = -1
    drained_ns: int = -1
    asks_ns: int = -1
    arrived: dict[tuple[int, int], NDArray[Any] | None] = field(default_factory=dict)
    posted: dict[tuple[int, int], int] = field(default_factory=dict)
    timed: list[tuple[Queued[int], Window]] = field(default_factory=list)
    connection_free_ns: dict[int, int] = field(default_factory=dict)
