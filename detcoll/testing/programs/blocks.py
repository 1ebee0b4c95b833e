"""Programs about native collectives whose input and output are different arrays, and about those of groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detcoll.errors import Closed, DeadlineMissed, PeerLost, PlanMismatch, TransportError
from detcoll.signature import signature_of
from detcoll.testing.fabric import Here
from detcoll.testing.natives import Natives
from detcoll.testing.programs.collectives import native_of
from detcoll.testing.values import exact, reduced_whole_numbers, whole_numbers
from detcoll.transport import NativeCall, NativeCollectives
from detcoll.types import DTYPES, ReduceOp

LATE_NS = 5 * 10**7


@dataclass(frozen=True, slots=True)
class Case:
    """One call, as all ranks make it; ``counts`` are the sizes of the ranks' blocks."""

    kind: str
    dtype: np.dtype[Any]
    op: ReduceOp
    root: int
    counts: tuple[int, ...]
    in_place: bool

    @property
    def count(self) -> int:
        """Elements of the whole collective."""
        return self.counts[0] if self.kind == "reduce" else sum(self.counts)

    def given(self, rank: int) -> NDArray[Any]:
        """Return what a rank gives."""
        own = self.counts[rank] if self.kind in ("all_gather", "gather") else self.count
        return whole_numbers(rank, own, self.op, self.dtype)

    def block(self, array: NDArray[Any], rank: int) -> NDArray[Any]:
        """Return a rank's block of an array of all blocks."""
        begin = sum(self.counts[:rank])
        return array[begin : begin + self.counts[rank]]

    def result(self, rank: int) -> NDArray[Any]:
        """Return what a rank gets."""
        size = len(self.counts)
        match self.kind:
            case "reduce":
                return reduced_whole_numbers(size, self.count, self.op, self.dtype)
            case "reduce_scatter":
                return self.block(reduced_whole_numbers(size, self.count, self.op, self.dtype), rank)
            case "scatter":
                return self.block(self.given(self.root), rank)
            case "all_to_all":
                return np.concatenate([self.block(self.given(other), rank) for other in range(size)])
            case _:
                return np.concatenate([self.given(other) for other in range(size)])

    def call(self, rank: int) -> NativeCall:
        """Return the call of a rank, on new memory; input that is not the output is read-only."""
        nothing = np.empty(0, self.dtype)
        gives = self.kind != "scatter" or rank == self.root
        gets = self.kind not in ("reduce", "gather") or rank == self.root
        source = self.given(rank) if gives else nothing
        array = np.empty(self.result(rank).size, self.dtype) if gets else nothing
        if self.in_place and gives and gets:
            if self.kind == "reduce":
                array = source
            elif array.size > source.size:
                place = self.block(array, rank)
                place[:] = source
                source = place
            else:
                array = self.block(source, rank)
        else:
            source.flags.writeable = False
        is_even = len(set(self.counts)) == 1
        return NativeCall(
            self.kind, array, self.count, self.op, self.root, source, () if is_even else self.counts
        )  # fmt: skip


def each_case(here: Here, kind: str, counts: tuple[int, ...], dtype_names: list[str] | None = None) -> None:
    """Check that every type, operation and root gives the exact result, apart from the input and in its place."""
    assert isinstance(here.endpoint, NativeCollectives)
    signature, size = signature_of(kind), here.size
    for name in sorted(DTYPES if dtype_names is None else dtype_names):
        dtype = DTYPES[name]
        for op in ReduceOp if signature.has_op else [ReduceOp.MAX]:
            if not here.capabilities.supports(kind, dtype, op, uneven=len(set(counts)) > 1):
                continue
            for root in range(size) if signature.has_root else [0]:
                for in_place in (False, True) if kind != "all_to_all" else (False,):
                    _check(here, here.endpoint, Case(kind, dtype, op, root, counts, in_place))


def _check(here: Here, collectives: NativeCollectives, case: Case) -> None:
    call = case.call(here.rank)
    collectives.run(call, here.deadline_ns())
    wanted = case.result(here.rank)[: call.array.size]
    np.testing.assert_array_equal(exact(call.array), exact(wanted), f"{case} on {here.rank}")
    assert call.source is not None
    if not case.in_place and call.source.size:
        assert call.source.tobytes() == case.given(here.rank).tobytes(), f"{case} changed the input of {here.rank}"


def different_counts(here: Here, kind: str) -> None:
    """Check that blocks whose sizes ranks state differently end the call on all ranks."""
    size = here.size
    counts = tuple(3 + rank for rank in range(size))
    counts = counts if here.rank else counts[::-1]
    case = Case(kind, np.dtype(np.float32), ReduceOp.SUM, 0, counts, in_place=False)
    with pytest.raises(PlanMismatch, match="sizes of blocks"):
        here.endpoint.run(case.call(here.rank), here.deadline_ns())  # type: ignore[attr-defined]
    here.meet()


def in_a_group(here: Here) -> None:
    """Check that groups in orders of their own reduce and broadcast among their members alone."""
    endpoint = _collectives(here)
    for key, ranks in enumerate([[0, 2], [2, 1], [2, 0, 1]], 1):
        if here.rank not in ranks:
            continue
        group, own = endpoint.group(ranks, 2**63 + key, here.deadline_ns()), ranks.index(here.rank)
        array = np.full(1000, float(here.rank))
        Natives(group).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
        assert (array == sum(ranks)).all()
        array[:] = here.rank
        Natives(group).broadcast(array, 1, here.deadline_ns())
        assert (array == ranks[1]).all()
        if here.capabilities.supports("all_gather", array.dtype, ReduceOp.SUM):
            out = np.empty(len(ranks))
            group.run(NativeCall("all_gather", out, len(ranks), source=np.array([here.rank + 0.5])), here.deadline_ns())
            assert out.tolist() == [rank + 0.5 for rank in ranks]
        Natives(group).barrier(here.deadline_ns())
        group.leave(clean=True)
        with pytest.raises(Closed):
            Natives(group).barrier(here.deadline_ns())
        assert own == ranks.index(here.rank)
    native_of(here).barrier(here.deadline_ns())


def groups_wait_alone(here: Here, elems: int) -> None:
    """Check that a call that waits in one group delays none in another, nor in the world."""
    endpoint = _collectives(here)
    waiting, going = (endpoint.group(range(here.size), key, here.deadline_ns()) for key in (1, 2))
    early = np.full(elems, 1.0)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            Natives(waiting).all_reduce(early, ReduceOp.SUM, here.deadline_ns())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=wait, name=f"a group of rank {here.rank}")
    if here.rank == 0:
        thread.start()
    for collectives in (going, endpoint):
        for _ in range(20 if elems == 1 else 3):
            array = np.full(elems, 2.0)
            Natives(collectives).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
            assert (array == 2 * here.size).all()
    if here.rank:
        thread.start()
    thread.join()
    if errors:
        raise errors[0]
    assert (early == here.size).all()


def a_group_ends_alone(here: Here) -> None:
    """Check that a rank that is late in one group ends that group, and no other."""
    endpoint = _collectives(here)
    ending, going = (endpoint.group([2, 1, 0], key, here.deadline_ns()) for key in (1, 2))
    Natives(ending).barrier(here.deadline_ns())
    calls: list[Callable[[], None]] = []
    if here.rank != 1:
        with pytest.raises((DeadlineMissed, PeerLost)):
            Natives(ending).barrier(here.clock.now_ns() + LATE_NS)
        calls = [lambda: Natives(ending).barrier(here.deadline_ns())]
    here.meet()
    for call in calls:
        with pytest.raises(Closed):
            call()
    for collectives in (going, endpoint):
        Natives(collectives).barrier(here.deadline_ns())
    here.meet()


def numbers_differ(here: Here) -> None:
    """Check that equal calls of different numbers do not meet."""
    array = np.full(10, float(here.rank))
    with pytest.raises(PlanMismatch, match=r"number of the call .*8"):
        _collectives(here).run(NativeCall("all_reduce", array, 10, sequence=7 + here.rank % 2), here.deadline_ns())
    here.meet()


def a_group_is_stopped(here: Here) -> None:
    """Check that a call that waits for others ends when its group is stopped, and that other groups go on."""
    endpoint = _collectives(here)
    ending, going = (endpoint.group(range(here.size), key, here.deadline_ns()) for key in (1, 2))
    Natives(ending).barrier(here.deadline_ns())
    if here.rank == 0:
        errors: list[Exception] = []

        def wait() -> None:
            try:
                Natives(ending).barrier(here.deadline_ns())
            except TransportError as error:
                errors.append(error)

        thread = threading.Thread(target=wait, name="rank 0 waits")
        thread.start()
        ending.stop()
        thread.join()
        assert len(errors) == 1
        with pytest.raises(Closed):
            Natives(ending).barrier(here.deadline_ns())
    for collectives in (going, endpoint):
        Natives(collectives).barrier(here.deadline_ns())
    here.meet()


def _collectives(here: Here) -> NativeCollectives:
    assert isinstance(here.endpoint, NativeCollectives)
    return here.endpoint
