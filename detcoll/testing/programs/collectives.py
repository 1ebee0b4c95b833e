"""Programs about the collectives that a transport does itself.

Values are mostly `detcoll.testing.values.whole_numbers`, so that the result does not depend on the fold order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from detcoll.errors import Closed, DeadlineMissed, PeerLost, TransportError, UsageError
from detcoll.fold import reference
from detcoll.testing.fabric import Here
from detcoll.testing.values import EDGE_OPS, FLOATS, exact, reduced_whole_numbers, require_edges, varied, whole_numbers
from detcoll.transport import Capabilities, NativeCollectives
from detcoll.types import DTYPES, ReduceOp, operators_of

AHEAD_NS = 50 * 10**6


def native_of(here: Here) -> NativeCollectives:
    """Return the endpoint as what does collectives."""
    assert isinstance(here.endpoint, NativeCollectives)
    return here.endpoint


def supported(dtype_names: frozenset[str], capabilities: Capabilities) -> list[tuple[str, ReduceOp]]:
    """Return the pairs of type and operation that an endpoint reduces."""
    return [
        (name, op) for name in sorted(dtype_names) for op in ReduceOp
        if capabilities.supports("all_reduce", DTYPES[name], op)
    ]  # fmt: skip


def all_reduce(here: Here, counts: list[int], dtype_names: list[str] | None = None) -> None:
    """Every operation on every type gives the exact result, in place and on every rank."""
    native = native_of(here)
    names = here.capabilities.native_dtypes if dtype_names is None else frozenset(dtype_names)
    for name, op in supported(names, here.capabilities):
        dtype = DTYPES[name]
        for count in counts:
            array = whole_numbers(here.rank, count, op, dtype)
            native.all_reduce(array, op, here.deadline_ns())
            np.testing.assert_array_equal(
                exact(array),
                exact(reduced_whole_numbers(here.size, count, op, dtype)),
                f"{op.value} of {count} {name} on rank {here.rank} of {here.size}",
            )


def ordered(here: Here, groups: list[list[int]], counts: list[int]) -> None:
    """Values whose sum depends on the order of folding give the promised bits."""
    native = native_of(here)
    native.arrange(groups)
    for name, op in supported(here.capabilities.native_dtypes, here.capabilities):
        dtype = DTYPES[name]
        for count in counts:
            given = [varied(dtype, count, rank) for rank in range(here.size)]
            array = given[here.rank].copy()
            native.all_reduce(array, op, here.deadline_ns())
            expected = reference(op, given, groups, dtype)
            assert array.tobytes() == expected.tobytes(), f"{op.value} of {count} {name} on rank {here.rank}"


def edge_values(here: Here, groups: list[list[int]] | None = None) -> None:
    """Averages of 16-bit floats stay in range, and NaN comes through minimum and maximum on every rank.

    ``groups`` : what the endpoint was told by `arrange`, if it was.
    """
    native = native_of(here)
    require_edges(
        lambda array, op: native.all_reduce(array, op, here.deadline_ns()),
        here.rank,
        groups or [list(range(here.size))],
        ordered=here.capabilities.ordered,
        dtype_names=[name for name in FLOATS if name in here.capabilities.native_dtypes],
        ops=[op for op in EDGE_OPS if op in here.capabilities.native_ops],
        counts=(1, 37, 5003),
    )


def all_reduce_part(here: Here, count: int = 1000) -> None:
    """Elements beside a slice that is reduced are not touched."""
    array = np.full(count + 20, -1.0, np.float32)
    array[10:-10] = here.rank + 1
    native_of(here).all_reduce(array[10:-10], ReduceOp.SUM, here.deadline_ns())
    assert (array[10:-10] == here.size * (here.size + 1) / 2).all()
    assert (array[:10] == -1).all()
    assert (array[-10:] == -1).all()


def broadcast(here: Here, counts: list[int]) -> None:
    """Every rank in turn is the root, for every type."""
    for name in sorted(here.capabilities.native_dtypes):
        for root in range(here.size):
            for count in counts:
                array = whole_numbers(here.rank + 1, count, ReduceOp.MAX, DTYPES[name])
                expected = whole_numbers(root + 1, count, ReduceOp.MAX, DTYPES[name])
                native_of(here).broadcast(array, root, here.deadline_ns())
                assert array.tobytes() == expected.tobytes(), f"{count} {name} from {root} on rank {here.rank}"


def barrier(here: Here, rounds: int = 5) -> list[tuple[int, int]]:
    """Pass barriers; return when this rank entered and left each, for the caller to compare between ranks."""
    times = []
    for _ in range(rounds):
        entered_ns = here.clock.now_ns()
        native_of(here).barrier(here.deadline_ns())
        times.append((entered_ns, here.clock.now_ns()))
    return times


def mixed(here: Here, count: int = 5000) -> None:
    """Check that collectives and messages of one endpoint do not disturb each other."""
    native, endpoint = native_of(here), here.endpoint
    incoming = {src: endpoint.recv(src, 3, 1000) for src in here.others}
    array = np.full(count, here.rank, np.float32)
    native.all_reduce(array, ReduceOp.SUM, here.deadline_ns())
    sent = [here.send(dst, 3, bytes([here.rank]) * 1000) for dst in here.others]
    native.barrier(here.deadline_ns())
    native.broadcast(array, here.size - 1, here.deadline_ns())
    here.finish(*sent, *incoming.values())
    assert (array == here.size * (here.size - 1) / 2).all()
    for src, ticket in incoming.items():
        assert ticket.view is not None
        assert bytes(ticket.view) == bytes([src]) * 1000
        ticket.release()


def late_collective(here: Here, kind: str) -> None:
    """Check that a collective which rank 0 never joins ends at the deadline and leaves the endpoint of no use."""
    native = native_of(here)
    native.barrier(here.deadline_ns())
    if here.rank == 0:
        here.meet()
        return
    array = np.ones(1000, np.float32)
    calls: dict[str, Callable[[int], None]] = {
        "all_reduce": lambda deadline_ns: native.all_reduce(array, ReduceOp.SUM, deadline_ns),
        "broadcast": lambda deadline_ns: native.broadcast(array, 0, deadline_ns),
        "barrier": native.barrier,
    }
    with pytest.raises((DeadlineMissed, PeerLost)):
        calls[kind](here.clock.now_ns() + AHEAD_NS)
    with pytest.raises(TransportError):
        calls[kind](here.clock.now_ns() + AHEAD_NS)
    here.endpoint.abort()
    with pytest.raises(Closed):
        calls[kind](here.deadline_ns())
    here.meet()


def unsupported(here: Here) -> None:
    """Check that what the capabilities do not name is a UsageError on this call alone, and the rest works."""
    native = native_of(here)
    for dtype in DTYPES.values():
        for op in ReduceOp:
            array = np.full(3, here.rank % 2, dtype)
            if here.capabilities.supports("all_reduce", dtype, op):
                native.all_reduce(array, op, here.deadline_ns())
            else:
                with pytest.raises(UsageError):
                    native.all_reduce(array, op, here.deadline_ns())
                assert (array == here.rank % 2).all()
        array = np.full(3, here.rank == here.size - 1, dtype)
        assert here.capabilities.supports("broadcast", dtype, ReduceOp.SUM)
        native.broadcast(array, here.size - 1, here.deadline_ns())
        assert (array == 1).all()
    assert not here.capabilities.supports("no such kind", np.dtype(np.float32), ReduceOp.SUM)
    native.barrier(here.deadline_ns())


def bad_arguments(here: Here) -> None:
    """Check that what a collective cannot do is a UsageError before anything moves."""
    native = native_of(here)
    with pytest.raises(UsageError):
        native.broadcast(np.ones(3, np.float32), here.size, here.deadline_ns())
    with pytest.raises(UsageError):
        native.broadcast(np.ones(3, np.float32), -1, here.deadline_ns())
    with pytest.raises(UsageError):
        native.all_reduce(np.ones(3, np.longdouble), ReduceOp.SUM, here.deadline_ns())
    for dtype in DTYPES.values():
        for op in set(ReduceOp) - operators_of(dtype):
            for count in (0, 3):
                with pytest.raises(UsageError):
                    native.all_reduce(np.ones(count, dtype), op, here.deadline_ns())
    native.barrier(here.deadline_ns())
