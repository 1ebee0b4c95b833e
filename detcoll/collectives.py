"""The collectives of a communicator: one method a kind.

A method checks its arguments, makes flat views of the user's arrays, and passes a `Request` to the group's `Caller`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import msgspec
import numpy as np

from detcoll.arguments import check_name, of_blocks, on_one_array, rank_of, timeout_of, to_root
from detcoll.errors import PlanMismatch, UsageError
from detcoll.job.caller import Caller, Request
from detcoll.runtime import Work
from detcoll.types import ReduceOp

Checked = TypeVar("Checked")


class Collectives:
    """The calls of a group; `Communicator` inherits them.

    Input comes first. Kinds with input and output take ``out``, which is allocated where absent, and return it. Blocks
    lie along the first axis. Roots and peers are ranks of the group.
    """

    _caller: Caller
    _timeout: float

    @overload
    def all_reduce(
        self, x: Any, op: str | ReduceOp = "sum", async_op: Literal[False] = False, *, timeout: float | None = None,
        name: str = "",
    ) -> None: ...  # fmt: skip
    @overload
    def all_reduce(
        self, x: Any, op: str | ReduceOp = "sum", *, async_op: Literal[True], timeout: float | None = None,
        name: str = "",
    ) -> Work: ...  # fmt: skip
    @overload
    def all_reduce(self, x: Any, op: str | ReduceOp, async_op: Literal[True]) -> Work: ...
    @overload
    def all_reduce(
        self, x: Any, op: str | ReduceOp = "sum", async_op: bool = False, *, timeout: float | None = None,
        name: str = "",
    ) -> Work | None: ...  # fmt: skip

    def all_reduce(
        self, x: Any, op: str | ReduceOp = "sum", async_op: bool = False, *, timeout: float | None = None,
        name: str = "",
    ) -> Work | None:  # fmt: skip
        """Reduce ``x`` over all ranks, in place.

        Parameters
        ----------
        x : Buffer, any shape, one of the types in `detcoll.types.DTYPES`, C-contiguous, writable, borrowed until wait
            A NumPy or CuPy array, a torch tensor, or a list of them, which is coalesced. Equal shapes on all ranks.
        op : str
            ``sum``, ``avg``, ``min``, ``max``, ``prod``, ``band``, ``bor`` or ``bxor``, if the type has it:
            `detcoll.types.operators_of` says so.
        async_op : bool
            Return a `Work` at once instead of waiting.
        timeout : float, optional
            Seconds for which this call may make no progress once it has begun; by default `timeout` of the group.
        name : str
            At most 64 bytes. Compared between ranks and shown in messages. Use it where calls of equal shape could be
            made in a wrong order.

        Returns
        -------
        Work or None
            `Work` if ``async_op`` is set.

        Raises
        ------
        UsageError
            If an argument is not valid; no data has moved. Other members raise it as well, unless they have done their
            part already, as one that only sends may have. The next call works. Where a member is in the transport's
            own collective already (shared memory, MPI, Gloo), it cannot leave that alone, so the group ends instead.
        PlanMismatch
            If members called differently. One whose part fits those of all that it exchanges data with may return; it
            has a right result, and raises this in its next call.
        PeerLost, DeadlineMissed
            See `detcoll.errors`.
        Closed
            If the communicator is closed, or its group has failed and the failure was raised before.

        Guarantees
        ----------
        With transport ``slotted`` or ``shm``, or with ``reproducible=True``, the fold order is fixed: contributions are
        folded in rank order inside each site, then the sites in order. The result is the same bit for bit on every
        rank, for any such transport, chunk size and load. 16-bit floats are folded in float32 and rounded once for each
        level: inside the sites, and between them.

        With every transport, ``min`` and ``max`` give NaN on all ranks if any rank has one, as in NumPy. The payload of
        the NaN and the sign of a zero are not specified, except that the fixed fold order gives NumPy's
        ``op(lower, higher)``. ``avg`` of 16-bit floats is correct if the mean can be represented, even if the sum
        cannot: between sites it adds means, each weighted by the number of ranks of its site. ``avg`` of float32 and
        float64 divides the sum, which becomes infinite if it overflows, and so it does each part of complex numbers.
        Integers wrap around.
        """
        work: Work | None = self._run("all_reduce", lambda: on_one_array("all_reduce", x, op), async_op, timeout, name)
        return work

    @overload
    def broadcast(
        self, x: Any, root: int = 0, async_op: Literal[False] = False, *, timeout: float | None = None, name: str = ""
    ) -> None: ...
    @overload
    def broadcast(
        self, x: Any, root: int = 0, *, async_op: Literal[True], timeout: float | None = None, name: str = ""
    ) -> Work: ...
    @overload
    def broadcast(self, x: Any, root: int, async_op: Literal[True]) -> Work: ...
    @overload
    def broadcast(
        self, x: Any, root: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
    ) -> Work | None: ...

    def broadcast(
        self, x: Any, root: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
    ) -> Work | None:
        """Copy ``x`` of rank ``root`` into ``x`` of all ranks.

        Parameters
        ----------
        x : Buffer
            As for `all_reduce`.
        root : int
            A rank of the group, from 0 to size - 1, the same on all ranks.
        async_op, timeout, name
            As for `all_reduce`.

        Returns
        -------
        Work or None
            `Work` if ``async_op`` is set.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `all_reduce`.
        """

        def check() -> Request:
            return on_one_array("broadcast", x, root=rank_of("root", root, self._size))

        work: Work | None = self._run("broadcast", check, async_op, timeout, name)
        return work

    @overload
    def barrier(self, async_op: Literal[False] = False, *, timeout: float | None = None, name: str = "") -> None: ...
    @overload
    def barrier(self, async_op: Literal[True], *, timeout: float | None = None, name: str = "") -> Work: ...
    @overload
    def barrier(self, async_op: bool = False, *, timeout: float | None = None, name: str = "") -> Work | None: ...

    def barrier(self, async_op: bool = False, *, timeout: float | None = None, name: str = "") -> Work | None:
        """Block until every rank of the group has called it; parameters, result and errors as for `all_reduce`."""
        work: Work | None = self._run(
            "barrier", lambda: on_one_array("barrier", np.zeros(1, np.uint8), ReduceOp.MAX), async_op, timeout, name
        )
        return work

    @overload
    def reduce(
        self,
        x: Any,
        root: int = 0,
        op: str | ReduceOp = "sum",
        *,
        async_op: Literal[True],
        timeout: float | None = None,
        name: str = "",
    ) -> Work: ...
    @overload
    def reduce(
        self,
        x: Any,
        root: int = 0,
        op: str | ReduceOp = "sum",
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any: ...

    def reduce(
        self,
        x: Any,
        root: int = 0,
        op: str | ReduceOp = "sum",
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any:
        """Reduce ``x`` over all ranks into ``x`` of rank ``root``; the other ranks' arrays stay as they are.

        Parameters
        ----------
        x : Buffer
            As for `all_reduce`; may be read-only on ranks other than the root.
        root : int
            A rank of the group, the same on all ranks.
        op : str
            As for `all_reduce`; the fold order is the same.
        async_op, timeout, name
            As for `all_reduce`.

        Returns
        -------
        Work or None
            `Work` if ``async_op`` is set.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `all_reduce`.
        """

        def check() -> Request:
            return to_root("reduce", x, op, rank_of("root", root, self._size), self._own_rank)

        return self._run("reduce", check, async_op, timeout, name)

    @overload
    def all_gather(
        self,
        x: Any,
        out: Any = None,
        counts: Sequence[int] | None = None,
        *,
        async_op: Literal[True],
        timeout: float | None = None,
        name: str = "",
    ) -> Work: ...
    @overload
    def all_gather(
        self,
        x: Any,
        out: Any = None,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any: ...

    def all_gather(
        self,
        x: Any,
        out: Any = None,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any:
        """Concatenate ``x`` of all ranks along the first axis, in rank order, on every rank.

        Parameters
        ----------
        x : Buffer, (n, ...), as for `all_reduce`, read-only will do
            This rank's block. A 0-d array counts as one row. A list is coalesced: ``out`` is a list too.
        out : Buffer, (P n, ...), writable, optional
            Takes the result; any shape with as many elements. ``x`` may be this rank's block of it.
        counts : sequence of int, optional
            How many rows of the first axis each rank gives, by rank; the same on all ranks. By default all are equal.
        async_op, timeout, name
            As for `all_reduce`.

        Returns
        -------
        Buffer, or Work if ``async_op`` is set
            ``out``; `Work.wait` returns it too.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `all_reduce`.
        """

        def check() -> Request:
            return of_blocks("all_gather", self._size, self._own_rank, x, out, counts=counts)

        return self._run("all_gather", check, async_op, timeout, name)

    @overload
    def reduce_scatter(
        self,
        x: Any,
        out: Any = None,
        op: str | ReduceOp = "sum",
        counts: Sequence[int] | None = None,
        *,
        async_op: Literal[True],
        timeout: float | None = None,
        name: str = "",
    ) -> Work: ...
    @overload
    def reduce_scatter(
        self,
        x: Any,
        out: Any = None,
        op: str | ReduceOp = "sum",
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any: ...

    def reduce_scatter(
        self,
        x: Any,
        out: Any = None,
        op: str | ReduceOp = "sum",
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any:
        """Reduce ``x`` over all ranks and give each rank its block of the result.

        Parameters
        ----------
        x : Buffer, (P n, ...), as for `all_reduce`, read-only will do
            The blocks for all ranks along the first axis, in rank order. A list is coalesced: ``out`` is a list too.
        out : Buffer, (n, ...), writable, optional
            Takes the result; any shape with as many elements. It may be this rank's block of ``x``.
        op : str
            As for `all_reduce`; the fold order is the same, so the result is a block of that of an `all_reduce`.
        counts : sequence of int, optional
            How many rows of the first axis each rank gets, by rank; the same on all ranks. By default all are equal.
        async_op, timeout, name
            As for `all_reduce`.

        Returns
        -------
        Buffer, or Work if ``async_op`` is set
            ``out``; `Work.wait` returns it too.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `all_reduce`.
        """

        def check() -> Request:
            return of_blocks("reduce_scatter", self._size, self._own_rank, x, out, op=op, counts=counts)

        return self._run("reduce_scatter", check, async_op, timeout, name)

    @overload
    def gather(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        counts: Sequence[int] | None = None,
        *,
        async_op: Literal[True],
        timeout: float | None = None,
        name: str = "",
    ) -> Work: ...
    @overload
    def gather(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any: ...

    def gather(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any:
        """Concatenate ``x`` of all ranks along the first axis, in rank order, on rank ``root``.

        Parameters
        ----------
        x : Buffer, (n, ...), as for `all_reduce`, read-only will do
            This rank's block. A 0-d array counts as one row.
        root : int
            A rank of the group, the same on all ranks.
        out : Buffer, (P n, ...), writable, optional
            Takes the result at the root; any shape with as many elements. Ignored on other ranks.
        counts : sequence of int, optional
            How many rows of the first axis each rank gives, by rank; the same on all ranks. By default all are equal.
        async_op, timeout, name
            As for `all_reduce`.

        Returns
        -------
        Buffer or None, or Work if ``async_op`` is set
            ``out`` at the root, None on other ranks; `Work.wait` returns the same.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `all_reduce`.
        """

        def check() -> Request:
            return of_blocks(
                "gather", self._size, self._own_rank, x, out, root=rank_of("root", root, self._size), counts=counts
            )

        return self._run("gather", check, async_op, timeout, name)

    @overload
    def scatter(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        counts: Sequence[int] | None = None,
        *,
        async_op: Literal[True],
        timeout: float | None = None,
        name: str = "",
    ) -> Work: ...
    @overload
    def scatter(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any: ...

    def scatter(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any:
        """Give each rank its block of ``x`` of rank ``root``.

        Parameters
        ----------
        x : Buffer or None, (P n, ...), as for `all_reduce`, read-only will do
            At the root, the blocks for all ranks along the first axis, in rank order. Ignored on other ranks.
        root : int
            A rank of the group, the same on all ranks.
        out : Buffer, (n, ...), writable
            Takes the result; any shape with as many elements, but with ``counts`` as many rows. Optional at the root,
            where it may be the root's block of ``x``.
        counts : sequence of int, optional
            How many rows of the first axis each rank gets, by rank; the same on all ranks. By default all are equal.
        async_op, timeout, name
            As for `all_reduce`.

        Returns
        -------
        Buffer, or Work if ``async_op`` is set
            ``out``; `Work.wait` returns it too.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `all_reduce`.
        """

        def check() -> Request:
            return of_blocks(
                "scatter", self._size, self._own_rank, x, out, root=rank_of("root", root, self._size), counts=counts
            )

        return self._run("scatter", check, async_op, timeout, name)

    @overload
    def all_to_all(
        self,
        x: Any,
        out: Any = None,
        counts: Sequence[int] | None = None,
        out_counts: Sequence[int] | None = None,
        *,
        async_op: Literal[True],
        timeout: float | None = None,
        name: str = "",
    ) -> Work: ...
    @overload
    def all_to_all(
        self,
        x: Any,
        out: Any = None,
        counts: Sequence[int] | None = None,
        out_counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any: ...

    def all_to_all(
        self,
        x: Any,
        out: Any = None,
        counts: Sequence[int] | None = None,
        out_counts: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> Any:
        """Send a block of ``x`` to every rank, and concatenate what all ranks sent to this one, in rank order.

        Parameters
        ----------
        x : Buffer, (P n, ...), as for `all_reduce`, read-only will do
            The blocks for all ranks along the first axis, in rank order.
        out : Buffer, writable, optional
            Takes the result; any shape with as many elements. If it shares memory with ``x``, ``x`` is copied first.
        counts : sequence of int, optional
            How many rows of the first axis this rank sends to each rank. By default all blocks are equal.
        out_counts : sequence of int, optional
            How many rows this rank gets from each rank; needed with ``counts``.
        async_op, timeout, name
            As for `all_reduce`.

        Returns
        -------
        Buffer, or Work if ``async_op`` is set
            ``out``; `Work.wait` returns it too.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `all_reduce`.
        """

        def check() -> Request:
            return of_blocks("all_to_all", self._size, self._own_rank, x, out, counts=counts, out_counts=out_counts)

        return self._run("all_to_all", check, async_op, timeout, name)

    def broadcast_object(
        self, value: Any = None, root: int = 0, *, timeout: float | None = None, name: str = ""
    ) -> Any:
        """Return ``value`` of rank ``root`` on all ranks.

        Parameters
        ----------
        value : object
            None, bool, int of 64 bits, float, str, bytes, datetime with a time zone, or a list or dict of those. What
            else msgspec encodes arrives as one of them: a tuple or set as a list, a datetime without a time zone, UUID
            or Decimal as a str. Nothing is pickled. Ignored on ranks other than the root.
        root : int
            A rank of the group, the same on all ranks.
        timeout, name
            As for `all_reduce`.

        Raises
        ------
        UsageError
            If an argument is not valid, or ``value`` cannot be encoded.
        PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `all_reduce`.
        """

        def check() -> bytes:
            return _encoded(value) if rank_of("root", root, self._size) == self._own_rank else b""

        # Not a broadcast: its root could be done, and begin the second call, while another rank refuses the first.
        text = self._checked(check, timeout, name)
        told = self.all_gather(np.array([[len(text), root]], np.int64), timeout=timeout, name=name)
        self._check_one_root(told[:, 1].tolist())
        is_root = self._own_rank == root
        held = np.frombuffer(text, np.uint8).copy() if is_root else np.empty(int(told[root, 0]), np.uint8)
        self.broadcast(held, root, timeout=timeout, name=name)
        return msgspec.msgpack.decode(held.tobytes())

    def all_gather_object(self, value: Any, *, timeout: float | None = None, name: str = "") -> list[Any]:
        """Return ``value`` of all ranks, in rank order.

        Parameters
        ----------
        value : object
            As for `broadcast_object`.
        timeout, name
            As for `all_reduce`.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed, Closed
            As for `broadcast_object`.
        """
        text = self._checked(lambda: _encoded(value), timeout, name)
        lengths = self.all_gather(np.array([len(text)], np.int64), timeout=timeout, name=name).tolist()
        held = self.all_gather(np.frombuffer(text, np.uint8), counts=lengths, timeout=timeout, name=name).tobytes()
        ends = [sum(lengths[: rank + 1]) for rank in range(self._size)]
        return [msgspec.msgpack.decode(held[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    @property
    def _size(self) -> int:
        return len(self._caller.group.ranks)

    @property
    def _own_rank(self) -> int:
        return self._caller.rank

    def _check_one_root(self, roots: Sequence[int]) -> None:
        """End the group, on all ranks, if they gave `broadcast_object` different roots."""
        other = next((rank for rank, root in enumerate(roots) if root != roots[0]), None)
        if other is not None:
            told = f"rank 0 called broadcast_object with root {roots[0]}, rank {other} with root {roots[other]}"
            mismatch = PlanMismatch(f"ranks called different collectives: {told}")
            self._caller.job.fail(self._caller.group, mismatch)
            raise mismatch

    def _checked(self, check: Callable[[], Checked], timeout: float | None, name: str) -> Checked:
        """Check arguments; where that raises, fail the call on the other ranks too."""
        try:
            if name != "":
                check_name(name)
            if timeout is not None:
                timeout_of(timeout)
            return check()
        except UsageError as error:
            self._caller.refuse(error)
            raise
        except BaseException as error:  # no memory for the output, say: the others wait for this call all the same
            self._caller.refuse(UsageError(f"{type(error).__name__}: {error}"))
            raise

    def _run(
        self, kind: str, check: Callable[[], Request], async_op: bool, timeout: float | None, name: str
    ) -> Any:  # fmt: skip
        request = self._checked(check, timeout, name)
        seconds = self._timeout if timeout is None else timeout
        work = self._caller.call(request, timeout_s=seconds, name=name, wait=not async_op)
        if async_op:
            return work
        return request.result if work is None else work.wait()  # None: a native collective that has already ended


def _encoded(value: Any) -> bytes:
    """Return the bytes of an object, of which this rank has seen that they can be decoded."""
    try:
        text = msgspec.msgpack.encode(value)
        msgspec.msgpack.decode(text)
        return text
    except (TypeError, ValueError, OverflowError, RecursionError, BufferError, msgspec.MsgspecError) as error:
        raise UsageError(f"value of type {type(value).__name__} cannot be sent as an object: {error}") from error
