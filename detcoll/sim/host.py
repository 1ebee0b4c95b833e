"""A modelled rank: its engine, one core that executes steps one after another, and its memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.fold import fold_step
from detcoll.machine import Queued
from detcoll.plan.collectives import declaration_of
from detcoll.plan.costs import Costs
from detcoll.plan.ir import Buffer, Kind, Plan, shared
from detcoll.runtime.engine import Engine, Wide
from detcoll.runtime.operation import Operation
from detcoll.transport import Window
from detcoll.types import ReduceOp, accumulation_dtype


@dataclass(slots=True)
class Memory:
    """The arrays of one rank, when a simulation carries data."""

    plan: Plan
    op: ReduceOp
    given: NDArray[Any]
    lent: dict[int, NDArray[Any]] = field(default_factory=dict)
    buffers: dict[int, NDArray[Any]] = field(init=False)

    def __post_init__(self) -> None:
        """Allocate output and scratch; raise UsageError if the array does not match the plan."""
        dtype, plan, collective = self.given.dtype, self.plan, self.plan.collective
        wide, has_one = accumulation_dtype(dtype), declaration_of(collective.kind).has_one_array
        given = (self.given.shape, dtype.itemsize, wide.itemsize)
        elems = plan.out_elems if has_one else plan.in_elems
        wanted = ((elems,), collective.itemsize, collective.accumulator_itemsize)
        if given != wanted:
            raise UsageError(f"data of rank {plan.rank}: shape and item sizes are {given}; expected {wanted}")
        result = self.given.copy() if has_one else np.zeros(plan.out_elems, dtype)
        self.buffers = {
            Buffer.IN: np.zeros(plan.in_elems, dtype) if plan.device_in else self.given,
            Buffer.OUT: np.zeros(plan.out_elems, dtype) if plan.device_out else result,
            Buffer.DEVICE_IN: self.given,
            Buffer.DEVICE_OUT: result,
            Buffer.PARTIAL: np.zeros(plan.partial_elems, dtype),
            Buffer.ACCUMULATOR: np.zeros(self.plan.accumulator_elems, wide),
        }

    @property
    def result(self) -> NDArray[Any]:
        """The caller's output."""
        return self.buffers[Buffer.DEVICE_OUT if self.plan.device_out else Buffer.OUT]

    def read(self, step: int) -> NDArray[Any]:
        """Return a copy of the data that SEND ``step`` sends."""
        row = self.plan.rows[step]
        return self.buffers[row.buffer][row.offset : row.offset + row.length].copy()

    def take(self, step: int, values: NDArray[Any]) -> None:
        """Store the data that RECV ``step`` received."""
        row = self.plan.rows[step]
        if row.buffer == Buffer.LENT:
            self.lent[step] = values
        else:
            self.buffers[row.buffer][row.offset : row.offset + row.length] = values

    def fold(self, step: int) -> None:
        """Execute FOLD ``step``."""
        row = self.plan.rows[step]
        inputs = [
            self.lent.pop(offset) if buffer == Buffer.LENT else self.buffers[buffer][offset : offset + row.length]
            for buffer, offset in self.plan.inputs_of(step)
        ]
        out = self.buffers[row.buffer][row.offset : row.offset + row.length]
        fold_step(self.op, inputs, self.plan.ranks_of(step), out, self.plan.size, final=bool(row.final))


def taken_ns(plan: Plan, costs: Costs, *, lines: bool) -> list[int]:
    """Return the core time of each step, including the copies that it makes.

    A FOLD copies every input. A SEND over a line and a RECV that lends its memory copy nothing, and a copy between host
    and device is the device's work. Others copy once.
    """
    steps, kind = plan.steps, plan.steps["kind"]
    over_line = (steps["wide"] == 1) & (kind == Kind.SEND) & lines
    nothing = over_line | ((kind == Kind.RECV) & (steps["buffer"] == Buffer.LENT))
    nothing[list(plan.copies)] = True
    copies = np.where((kind == Kind.FOLD) & ~nothing, np.diff(steps["inputs_end"], prepend=0), np.where(nothing, 0, 1))
    copy_ns = np.array(plan.columns.nbytes, np.int64) / costs.copy_bytes_per_s * 1e9
    return shared(costs.step_ns + np.rint(copies * copy_ns).astype(np.int64))


@dataclass(slots=True)
class Host:
    """One rank: its engine, the call, and the state of its transport.

    It has many fields because it holds everything of a rank that the simulator's events change.

    ``takes_ns`` : core time by step.  ``tags`` : message tag by step.  ``working`` : whether the core is busy.
    ``tickets`` : ended steps that the core has not processed yet, a RECV with its data.
    ``arrived`` : messages without a posted receive, by (source, tag).  ``posted`` : pending receives, by the same key.
    ``timed`` : sends that wait for their window to open.  ``connection_free_ns`` : by peer, when kernel pacing lets the
    next message begin.  ``device_free_ns`` : by the buffer that copies fill, when the device has done those before.
    """

    site: int
    engine: Engine
    operation: Operation
    takes_ns: list[int]
    tags: list[int]
    memory: Memory | None = None
    working: bool = False
    tickets: deque[tuple[int, NDArray[Any] | None]] = field(default_factory=deque)
    finish_ns: int = -1
    drained_ns: int = -1
    asks_ns: int = -1
    line_free_ns: dict[int, int] = field(default_factory=dict)
    device_free_ns: dict[int, int] = field(default_factory=dict)
    arrived: dict[tuple[int, int], NDArray[Any] | None] = field(default_factory=dict)
    posted: dict[tuple[int, int], int] = field(default_factory=dict)
    timed: list[tuple[Queued[Wide], Window]] = field(default_factory=list)
    connection_free_ns: dict[int, int] = field(default_factory=dict)
