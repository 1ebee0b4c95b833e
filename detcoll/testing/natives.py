"""Native collectives with a method for each kind, as tests call them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.transport import NativeCall, NativeCollectives
from detcoll.types import ReduceOp


class Natives:
    """Calls the native collectives of an endpoint or a group.

    Parameters
    ----------
    collectives : NativeCollectives
        What carries the calls out.
    """

    def __init__(self, collectives: NativeCollectives) -> None:
        self._collectives = collectives

    def all_reduce(self, array: NDArray[Any], op: ReduceOp, deadline_ns: int, arrays: int = 1, name: str = "") -> None:
        """Reduce ``array`` over all ranks, in place."""
        call = NativeCall("all_reduce", array, array.size, op, arrays=arrays, name=name)
        self._collectives.run(call, deadline_ns)

    def broadcast(self, array: NDArray[Any], root: int, deadline_ns: int, arrays: int = 1, name: str = "") -> None:
        """Copy ``array`` of ``root`` to all ranks."""
        self._collectives.run(
            NativeCall("broadcast", array, array.size, root=root, arrays=arrays, name=name), deadline_ns
        )

    def barrier(self, deadline_ns: int, name: str = "", timeout_ns: int = 0) -> None:
        """Return once every rank has called; ``timeout_ns`` : what the caller says that it allows."""
        array = np.zeros(1, np.uint8)
        self._collectives.run(
            NativeCall("barrier", array, 1, ReduceOp.MAX, name=name, timeout_ns=timeout_ns), deadline_ns
        )

    def arrange(self, groups: list[list[int]]) -> None:
        """Set the fold order; see `NativeCollectives.arrange`."""
        self._collectives.arrange(groups)
