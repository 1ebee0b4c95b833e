"""One collective on its way: a machine, the arrays it works on, and what it was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.descriptor import HELLO_BYTES, Descriptor
from detcoll.machine import Machine
from detcoll.plan.ir import Buffer, Plan
from detcoll.runtime.work import Work
from detcoll.transport import Ticket, byte_view
from detcoll.types import ReduceOp, accumulation_dtype

__all__ = ["HELLO_BYTES", "Descriptor", "Operation", "ScratchPool"]


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
class Operation:
    """What the progress thread knows about one collective.

    ``array`` : (count,), the caller's memory or its staging copy; written in place.
    """

    descriptor: Descriptor
    plan: Plan
    array: NDArray[Any]
    op: ReduceOp
    work: Work
    deadline_ns: int
    called_ns: int
    machine: Machine = field(init=False)
    lent: dict[int, Ticket] = field(default_factory=dict)
    strangers: set[int] = field(default_factory=set)
    """Ranks that have not said yet what they called; what comes from them is held."""
    held: list[Ticket] = field(default_factory=list)
    unasked_bytes: dict[int, int] = field(default_factory=dict)
    """What was sent to each stranger."""
    unsent: dict[int, list[int]] = field(default_factory=dict)
    """SEND steps that wait until a stranger has called, by rank."""
    reported: bool = False
    _buffers: dict[int, NDArray[Any]] = field(default_factory=dict)
    _scratch: list[NDArray[np.uint8]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the machine for the plan."""
        self.machine = Machine(self.plan)

    def open(self, pool: ScratchPool) -> None:
        """Lay out scratch for the plan."""
        self._buffers[Buffer.USER] = self.array
        for buffer, elems, dtype in (
            (Buffer.PARTIAL, self.plan.partial_elems, self.array.dtype),
            (Buffer.ACCUMULATOR, self.plan.accumulator_elems, self.accumulator_dtype),
        ):
            memory = pool.take(elems * dtype.itemsize)
            self._scratch.append(memory)
            self._buffers[buffer] = memory.view(dtype)

    def close(self, pool: ScratchPool) -> None:
        """Give scratch back; nothing may be under way any more."""
        self._buffers.clear()
        while self._scratch:
            pool.give(self._scratch.pop())

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

    def arrived(self, step: int, accumulated: bool) -> NDArray[Any]:
        """Return what the RECV ``step`` lent."""
        view = self.lent[step].view
        dtype = self.accumulator_dtype if accumulated else self.array.dtype
        return np.frombuffer(view if view is not None else b"", dtype)
