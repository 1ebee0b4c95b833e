"""The arrays that a collective works on: the caller's, and scratch from a pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.fold import fold_step
from detcoll.plan.ir import Buffer, Plan
from detcoll.runtime.devices import DeviceCopy, Devices
from detcoll.runtime.onsite import OnSiteCall
from detcoll.runtime.work import Work
from detcoll.transport import Ticket, byte_view
from detcoll.types import ReduceOp, accumulation_dtype


class ScratchPool:
    """Scratch memory that operations use one after another, so that its pages are touched once."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Return ``nbytes`` of memory, content unspecified."""
        free = self._free.get(nbytes)
        return free.pop() if free else np.empty(nbytes, np.uint8)

    def give(self, memory: NDArray[np.uint8]) -> None:
        """Take memory back; sizes that are no longer asked for are forgotten."""
        if memory.nbytes not in self._free and len(self._free) >= 4:
            self._free.pop(next(iter(self._free)))
        self._free.setdefault(memory.nbytes, []).append(memory)


@dataclass(eq=False, slots=True)
class Memory:
    """What the loop keeps of one operation.

    ``array`` : the caller's output or its staging copy, which is written; of a collective on one array, that array.
    ``source`` : the caller's input or its staging copy, which is only read; None for a collective on one array.
    ``hello`` : the record that ranks compare; empty if each rank is told another.
    ``load``, ``store`` : copy between a staging array and the caller's memory; None where there is none.
    ``devices`` : where the caller's arrays are, if the plan copies from and to devices.
    ``onsite`` : the call as the site's devices see it, if they reduce.
    """

    array: NDArray[Any]
    op: ReduceOp
    work: Work
    hello: bytes
    load: Callable[[], None] | None = None
    store: Callable[[], None] | None = None
    source: NDArray[Any] | None = None
    devices: Devices | None = None
    onsite: OnSiteCall | None = None
    lent: dict[int, Ticket] = field(default_factory=dict)
    copies: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    """What was lent and had to be copied, by RECV step."""
    _buffers: dict[int, NDArray[Any]] = field(default_factory=dict)
    _scratch: list[NDArray[np.uint8]] = field(default_factory=list)

    def open(self, plan: Plan, pool: ScratchPool) -> None:
        """Lay out scratch for the plan."""
        self._buffers[Buffer.OUT] = self.array
        if self.source is not None:
            self._buffers[Buffer.IN] = self.source
        for buffer, elems, dtype in (
            (Buffer.PARTIAL, plan.partial_elems, self.array.dtype),
            (Buffer.ACCUMULATOR, plan.accumulator_elems, self.accumulator_dtype),
        ):
            memory = pool.take(elems * dtype.itemsize)
            self._scratch.append(memory)
            self._buffers[buffer] = memory.view(dtype)

    def close(self, pool: ScratchPool) -> None:
        """Give scratch back; nothing may be under way any more."""
        self._buffers.clear()
        while self._scratch:
            pool.give(self._scratch.pop())

    def drop(self) -> None:
        """Let go of everything; what a transport still borrows lives until its tickets end."""
        for ticket in self.lent.values():
            ticket.release()
        self.lent.clear()
        self.copies.clear()
        self._buffers.clear()
        self._scratch.clear()
        # The error of the call, which is kept, may refer to the call by its traceback.
        self.array, self.source, self.devices, self.onsite = np.empty(0, self.array.dtype), None, None, None

    @property
    def accumulator_dtype(self) -> np.dtype[Any]:
        """The type in which this operation folds."""
        return accumulation_dtype(self.array.dtype)

    def elements(self, buffer: int, offset: int, length: int) -> NDArray[Any]:
        """Return elements of a buffer that the plan names."""
        return self._buffers[buffer][offset : offset + length]

    def view(self, buffer: int, offset: int, length: int) -> memoryview:
        """Return the same as `elements`, as bytes."""
        return byte_view(self.elements(buffer, offset, length))

    def device_copy(self, plan: Plan, step: int) -> DeviceCopy:
        """Return what the step copies, which is one of those that copy from or to a device."""
        assert self.devices is not None
        row, buffers = plan.rows[step], self.devices.buffers
        ((source, _),) = plan.inputs_of(step)
        to_device = row.buffer in buffers
        host = self.elements(source if to_device else row.buffer, row.offset, row.length)
        return DeviceCopy(buffers[row.buffer if to_device else source], row.offset, host, to_device)

    def arrived(self, step: int, accumulated: bool) -> NDArray[Any]:
        """Return what the RECV ``step`` lent."""
        dtype = self.accumulator_dtype if accumulated else self.array.dtype
        copy = self.copies.get(step)
        if copy is not None:
            return copy.view(dtype)
        view = self.lent[step].view
        return np.frombuffer(view if view is not None else b"", dtype)

    def keep(self, step: int) -> None:
        """Copy what the RECV ``step`` lent, and give the loan back."""
        ticket = self.lent.pop(step, None)
        if ticket is not None:
            self.copies[step] = np.array(np.frombuffer(ticket.view if ticket.view is not None else b"", np.uint8))
            ticket.release()

    def fold(self, plan: Plan, step: int) -> None:
        """Do the FOLD ``step``, and give back what it used."""
        row, inputs, used = plan.rows[step], [], []
        for buffer, offset in plan.inputs_of(step):
            if buffer == Buffer.LENT:
                inputs.append(self.arrived(offset, bool(plan.rows[offset].accumulated)))
                used.append(offset)
            else:
                inputs.append(self.elements(buffer, offset, row.length))
        out = self.elements(row.buffer, row.offset, row.length)
        fold_step(self.op, inputs, plan.ranks_of(step), out, plan.size, final=bool(row.final))
        del inputs
        for lender in used:
            self.used(lender)

    def used(self, step: int) -> None:
        """Give back what the RECV ``step`` lent."""
        ticket = self.lent.pop(step, None)
        if ticket is not None:
            ticket.release()
        else:
            self.copies.pop(step, None)
