"""Gloo's own collectives, on the caller's memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import Closed, DetcollError, UsageError
from detcoll.extrema import comparable
from detcoll.fold import fold, fold_step, widened
from detcoll.transport import Capabilities, Endpoint, NativeCollectives
from detcoll.types import ReduceOp, check_op, is_half, parse_dtype
from detcoll_gloo.agreement import Agreement
from detcoll_gloo.group import Group

STAGE_ELEMS = 2**23
"""So many 16-bit elements are widened to float32 at a time."""

_WIDENED = (ReduceOp.AVG, ReduceOp.MIN, ReduceOp.MAX)
"""What 16-bit floats go through in float32."""

_NOTHING = np.empty(0, np.uint8)


class GlooCollectives(Endpoint, NativeCollectives):
    """The collective half of an endpoint."""

    def __init__(self, group: Group, capabilities: Capabilities, compare: bool) -> None:
        self._group = group
        self._capabilities = capabilities
        self._is_broken = False
        self._agreement = Agreement(group) if compare and group.size > 1 else None
        ops = group.torch.distributed.ReduceOp
        self._ops = {
            ReduceOp.SUM: ops.SUM,
            ReduceOp.AVG: ops.SUM,
            ReduceOp.MIN: ops.MIN,
            ReduceOp.MAX: ops.MAX,
            ReduceOp.PROD: ops.PRODUCT,
            ReduceOp.BAND: ops.BAND,
            ReduceOp.BOR: ops.BOR,
            ReduceOp.BXOR: ops.BXOR,
        }

    @property
    def algorithm(self) -> str:
        """The name in traces and results."""
        return "gloo-native"

    def all_reduce(self, array: NDArray[Any], op: ReduceOp, deadline_ns: int, arrays: int = 1, name: str = "") -> None:
        """Reduce ``array`` over all ranks, in place; averages are divided once at the end.

        Gloo's minimum and maximum lose NaN, so floats go through them as integers; bool goes as uint8, a sum of complex
        numbers as one of floats. See `detcoll.extrema`.
        """
        self._check_usable()
        dtype = parse_dtype(array.dtype)
        if dtype.name not in self._capabilities.native_dtypes:
            known = ", ".join(sorted(self._capabilities.native_dtypes))
            raise UsageError(f"Gloo does not reduce {dtype}; expected one of {known}")
        check_op(op, dtype)
        if (dtype.name, op) in self._capabilities.native_lacks:
            raise UsageError(f"Gloo has no op={op.value!r} of {dtype}; a plan does")
        with self._in_step():
            self._agree("all_reduce", op, array, 0, arrays, name, deadline_ns)
            if op in _WIDENED and is_half(dtype):
                for start in range(0, array.size, STAGE_ELEMS):
                    part = array[start : start + STAGE_ELEMS]
                    wide = widened(op, part, self._group.size)
                    self._all_reduce(wide, op, deadline_ns)
                    fold_step(op, [wide], [self._group.size], part, self._group.size, final=True)
                return
            self._all_reduce(array, op, deadline_ns)
            if op is ReduceOp.AVG:
                fold(op, [array], array, self._group.size)

    def broadcast(self, array: NDArray[Any], root: int, deadline_ns: int, arrays: int = 1, name: str = "") -> None:
        """Copy ``array`` of ``root`` to all ranks."""
        self._check_usable()
        if not 0 <= root < self._group.size:
            raise UsageError(f"root={root} must be a rank from 0 to {self._group.size - 1}")
        options = self._group.torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        with self._in_step():
            self._agree("broadcast", ReduceOp.SUM, array, root, arrays, name, deadline_ns)
            self._run("broadcast", [self._group.tensor(array.view(np.uint8))], options, deadline_ns, array.size)

    def barrier(self, deadline_ns: int, name: str = "") -> None:
        """Return once every rank has called."""
        self._check_usable()
        with self._in_step():
            if self._agreement is not None:
                self._agree("barrier", ReduceOp.MAX, _NOTHING, 0, 1, name, deadline_ns)
            elif self._group.size > 1:
                options = self._group.torch.distributed.BarrierOptions()
                options.timeout = self._group.timeout(deadline_ns)
                self._group.wait(lambda: self._group.gloo.barrier(options), deadline_ns)

    def _all_reduce(self, array: NDArray[Any], op: ReduceOp, deadline_ns: int) -> None:
        options = self._group.torch.distributed.AllreduceOptions()
        options.reduceOp = self._ops[op]
        with comparable(op, array) as given:
            self._run("allreduce", [self._group.tensor(given)], options, deadline_ns, array.size)

    def _run(self, name: str, tensors: list[Any], options: Any, deadline_ns: int, elems: int) -> None:
        if self._group.size == 1 or elems == 0:
            return
        options.timeout = self._group.timeout(deadline_ns)
        self._group.wait(lambda: getattr(self._group.gloo, name)(tensors, options), deadline_ns)

    def _agree(
        self, kind: str, op: ReduceOp, array: NDArray[Any], root: int, arrays: int, name: str, deadline_ns: int
    ) -> None:  # fmt: skip
        """Return once all ranks are known to call the same, where they compare."""
        if self._agreement is not None:
            self._agreement.reach(kind, op, array, root, arrays, name, deadline_ns)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Count the ranks as out of step until the body has ended well, so that nothing interrupts unseen."""
        self._is_broken = True
        try:
            yield
        except DetcollError:
            raise
        except BaseException:
            self._group.end()
            raise
        self._is_broken = False

    @abstractmethod
    def _check_open(self) -> object:
        """Raise Closed if the endpoint is closed."""

    def _check_usable(self) -> None:
        self._check_open()
        if self._is_broken:
            raise Closed("an earlier collective of this Gloo endpoint did not end")
