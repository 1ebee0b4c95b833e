"""Wrong calls of every kind: refused on all ranks before anything moves, or found to differ, and never wrong values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from ranks import lines, run_ranks

from detcoll.communicator import Communicator
from detcoll.descriptor import HELLO_BYTES, Descriptor
from detcoll.errors import Closed, PlanMismatch, UsageError
from detcoll.topology import Topology

PLACES: dict[str, tuple[str, Topology | None]] = {"slotted": ("slotted", lines(2, 2)), "shm": ("shm", None)}
Program = Callable[[Communicator], object]


def ones(count: Any, dtype: str = "float32", *, writable: bool = True) -> np.ndarray:
    array = np.ones(count, dtype)
    array.flags.writeable = writable
    return array


def own(comm: Communicator, mine: int, others: int) -> list[int]:
    """Return a number for each rank: ``mine`` for the caller."""
    return [mine if rank == comm.rank else others for rank in range(comm.size)]


REDUCED: dict[str, Program] = {
    "root=9 must be a rank from 0 to 3": lambda c: c.reduce(ones(3), root=9),
    "op='median'": lambda c: c.reduce(ones(3), op="median"),
    "x is read-only": lambda c: c.reduce(ones(3, writable=False), root=c.rank),
    "x is a NoneType": lambda c: c.reduce(None),
    r"timeout=-1 must be": lambda c: c.reduce(ones(3), timeout=-1),
    "op=None": lambda c: c.reduce(ones(3), op=None),  # type: ignore[arg-type]
}
GATHERED: dict[str, Program] = {
    "x=None, but rank 3 has an input": lambda c: c.all_gather(None),
    "out has 3 elements; expected 12": lambda c: c.all_gather(ones(3), ones(3)),
    "out has dtype float64, x float32": lambda c: c.all_gather(ones(3), ones(12, "float64")),
    "out is read-only": lambda c: c.all_gather(ones(3), ones(12, writable=False)),
    "out is not C-contiguous": lambda c: c.all_gather(ones(3), ones((12, 2))[:, 0]),
    r"counts=\[3\] has 1 entries; expected one for each of 4 ranks": lambda c: c.all_gather(ones(3), counts=[3]),
    r"counts=\[3, 3, 3, -3\] must be": lambda c: c.all_gather(ones(3), counts=own(c, -3, 3)),
    r"counts=\[3, 3, 3, 3.0\] must be": lambda c: c.all_gather(ones(3), counts=own(c, 3.0, 3)),  # type: ignore[arg-type]
    r"counts=\{0, 1, 2, 3\} must be": lambda c: c.all_gather(ones(3), counts={0, 1, 2, 3}),  # type: ignore[arg-type]
    r"counts=dict_keys\(\[3\]\) must be": lambda c: c.all_gather(ones(3), counts={3: 1}.keys()),  # type: ignore[arg-type]
    r"counts=\{3: 3\} must be": lambda c: c.all_gather(ones(3), counts={3: 3}),  # type: ignore[arg-type]
    r"counts=<list_iterator.* must be": lambda c: c.all_gather(ones(3), counts=iter([3])),  # type: ignore[arg-type]
    r"no array has shape \(.*\); expected smaller": lambda c: c.all_gather(ones(3), counts=own(c, 3, 2**70)),
    "counts='3333' must be": lambda c: c.all_gather(ones(3), counts="3333"),  # type: ignore[arg-type]
    r"x has 3 rows; expected 4, by counts=\(1, 1, 1, 4\)": lambda c: c.all_gather(ones(3), counts=own(c, 4, 1)),
    "counts= with a list of arrays": lambda c: c.all_gather([ones(3), ones(2)], counts=own(c, 3, 3)),
    "out is a list of 2; expected one array": lambda c: c.all_gather(ones(4), [ones(4), ones(12)]),
    "out is a list of 2; expected one array, as": lambda c: c.all_gather(ones(4), [ones(4), ones(12)], own(c, 4, 4)),
    "out is a ndarray; expected a list of 2": lambda c: c.all_gather([ones(1), ones(3)], ones(16)),
    "out is a list of 1; expected a list of 2": lambda c: c.all_gather([ones(1), ones(3)], [ones(16)]),
    r"out\[0\] has 12 elements; expected 4": lambda c: c.all_gather([ones(1), ones(3)], [ones(12), ones(4)]),
    r"out=\[\] is empty|out is a list of 0": lambda c: c.all_gather([ones(1), ones(3)], []),
    r"out\[1\]=3 is a scalar": lambda c: c.all_gather([ones(1), ones(3)], [ones(4), 3]),
    "name='.udc80' must be a string": lambda c: c.all_gather(ones(3), name="\udc80"),
}
SCATTERED: dict[str, Program] = {
    "x has 5 rows; expected a multiple of 4": lambda c: c.reduce_scatter(ones(5)),
    "x has 1 rows; expected a multiple of 4": lambda c: c.reduce_scatter(ones(())),
    "out has 1 elements; expected 2": lambda c: c.reduce_scatter(ones(8), ones(1)),
    "op='avg' of int32": lambda c: c.reduce_scatter(ones(8, "int32"), op="avg"),
    "x has 8 rows; expected 4, by counts": lambda c: c.reduce_scatter(ones(8), counts=own(c, 1, 1)),
    r"x\[1\] has 1 rows; expected a multiple": lambda c: c.reduce_scatter([ones(4), ones((1, 4))]),
}
EXCHANGED: dict[str, Program] = {
    "x has 5 rows; expected a multiple of 4": lambda c: c.all_to_all(ones(5)),
    "out_counts=None; expected how many rows rank 3 gets": lambda c: c.all_to_all(ones(4), counts=own(c, 1, 1)),
    "counts=None; expected how many rows rank 3 sends": lambda c: c.all_to_all(ones(4), out_counts=own(c, 1, 1)),
    "x has 4 rows; expected 7, by counts": lambda c: c.all_to_all(ones(4), None, own(c, 1, 2), own(c, 1, 1)),
    "2 rows of rank 3 itself; expected 1": lambda c: c.all_to_all(ones(4), None, own(c, 1, 1), own(c, 2, 1)),
    "out has 5 elements; expected 4": lambda c: c.all_to_all(ones(4), ones(5)),
}
OBJECTS: dict[str, Program] = {
    "root=9 must be": lambda c: c.broadcast_object(1, root=9),
    r"root=array\(\[0, 0\]\) must be": lambda c: c.broadcast_object(1, root=np.zeros(2, int)),  # type: ignore[arg-type]
    "value of type object cannot be sent": lambda c: c.broadcast_object(object(), root=c.rank),
    "value of type int cannot be sent": lambda c: c.broadcast_object(2**70, root=c.rank),
    "value of type memoryview cannot be sent": lambda c: c.broadcast_object(memoryview(b"abcd")[::2], root=c.rank),
    "value of type Raw cannot be sent": lambda c: c.broadcast_object(msgspec.Raw(b"\xc1"), root=c.rank),
    "name=5 must be": lambda c: c.broadcast_object(1, name=5),  # type: ignore[arg-type]
}
ALL = frozenset(range(4))
BAD: list[tuple[dict[str, Program], Program, frozenset[int]]] = [
    (REDUCED, lambda c: c.reduce(ones(3), root=1), frozenset({1})),
    (GATHERED, lambda c: c.all_gather(ones(3)), ALL),
    (SCATTERED, lambda c: c.reduce_scatter(ones(8)), ALL),
    (EXCHANGED, lambda c: c.all_to_all(ones(4)), ALL),
    (OBJECTS, lambda c: c.broadcast_object(1), ALL),
    ({"value of type object": lambda c: c.all_gather_object(object())}, lambda c: c.all_gather_object(1), ALL),
    (
        {"root='0' must be": lambda c: c.gather(ones(2), root="0")},  # type: ignore[arg-type]
        lambda c: c.gather(ones(2), root=2),
        frozenset({2}),
    ),
    (
        {"out has 3 elements; expected 8": lambda c: c.gather(ones(2), 3, ones(3))},
        lambda c: c.gather(ones(2), root=3),
        frozenset(),
    ),
    ({"x=None, but rank 3": lambda c: c.scatter(None, 3)}, lambda c: c.scatter(None, 3, ones(2)), ALL),
]
"""Bad calls of rank 3, the good call that the others make, and which of them cannot end without rank 3."""


@pytest.mark.parametrize("place", PLACES)
def test_a_bad_call_is_refused_on_all_ranks_and_the_next_one_works(place: str) -> None:
    """A rank whose part needs nothing of the one that refused may have done it before it is told."""
    transport, topology = PLACES[place]

    def program(comm: Communicator) -> None:
        for table, good, waiting in BAD:
            for text, bad in table.items():
                if comm.rank == 3:
                    with pytest.raises(UsageError, match=text):
                        bad(comm)
                elif comm.rank in waiting:
                    with pytest.raises(UsageError, match="rank 3 refused the call"):
                        good(comm)
                else:
                    with contextlib.suppress(UsageError):
                        good(comm)
                assert comm.all_gather(ones(1)).tolist() == [1] * 4

    run_ranks(4, program, transport=transport, topology=topology)


@pytest.mark.parametrize("place", PLACES)
def test_whatever_a_check_raises_is_told_to_the_others(place: str) -> None:
    class Broken(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            raise MemoryError("no memory is left")

    transport, topology = PLACES[place]

    def program(comm: Communicator) -> None:
        if comm.rank == 3:
            with pytest.raises(MemoryError):
                comm.all_gather(ones(3), counts=Broken())
        else:
            with pytest.raises(UsageError, match=r"rank 3 refused the call.*MemoryError: no memory is left"):
                comm.all_gather(ones(3))
        assert comm.all_gather(ones(1)).tolist() == [1] * 4

    run_ranks(4, program, transport=transport, topology=topology)


def uneven(comm: Communicator, usual: int, sent: int, expected: int) -> object:
    """Exchange ``usual`` rows with everybody; but rank 0 sends ``sent`` to rank 3, which expects ``expected``."""
    sends, gets = [usual] * comm.size, [usual] * comm.size
    if comm.rank == 0:
        sends[3] = sent
    if comm.rank == 3:
        gets[0] = expected
    return comm.all_to_all(ones(sum(sends)), counts=sends, out_counts=gets)


def odd(comm: Communicator) -> bool:
    return comm.rank == 3


DIFFERING: dict[str, Program] = {
    "all_gather and reduce_scatter": lambda c: c.reduce_scatter(ones(12)) if odd(c) else c.all_gather(ones(3)),
    "gather and scatter": lambda c: c.scatter(None, 0, ones(3)) if odd(c) else c.gather(ones(3)),
    "gather and all_gather": lambda c: c.gather(ones(3)) if odd(c) else c.all_gather(ones(3)),
    "all_gather and all_reduce": lambda c: c.all_reduce(ones(3)) if odd(c) else c.all_gather(ones(3)),
    "objects": lambda c: c.broadcast_object(1, 1, name="b") if odd(c) else c.all_gather_object(1, name="a"),
    "roots of reduce": lambda c: c.reduce(ones(3), root=c.rank // 3),
    "roots of gather": lambda c: c.gather(ones(3), root=c.rank // 3),
    "roots of objects": lambda c: c.broadcast_object(1, root=c.rank // 3),
    "roots of objects, none of which has one": lambda c: c.broadcast_object(1, root=0 if c.rank else 3),
    "roots of scatter": lambda c: c.scatter(ones(12), c.rank // 3, ones(3)),
    "sizes of all_gather": lambda c: c.all_gather(ones(3 + odd(c))),
    "sizes of all_gather, none": lambda c: c.all_gather(ones(3 * odd(c))),
    "sizes of gather, none": lambda c: c.gather(ones(3 * odd(c))),
    "counts of all_gather": lambda c: (
        c.all_gather(ones(1), counts=[1, 1, 1, 1] if odd(c) else [1, 1, 2, 1])
        if c.rank != 2
        else c.all_gather(ones(2), counts=[1, 1, 2, 1])
    ),
    "no counts and counts": lambda c: c.all_gather(ones(1), counts=None if odd(c) else [1] * 4),
    "operators of reduce_scatter": lambda c: c.reduce_scatter(ones(4), op="max" if odd(c) else "sum"),
    "operators of reduce": lambda c: c.reduce(ones(4), op="max" if odd(c) else "sum"),
    "types": lambda c: c.all_gather(ones(3, "float64" if odd(c) else "float32")),
    "numbers of arrays": lambda c: c.all_gather([ones(1), ones(2)] if odd(c) else ones(3)),
    "names": lambda c: c.all_gather(ones(1), name="odd" if odd(c) else ""),
    "long names": lambda c: c.all_gather(ones(1), name="\x01" * 63 + ("a" if odd(c) else "b")),
    "even and uneven": lambda c: uneven(c, 1, 1, 1) if odd(c) else c.all_to_all(ones(4)),
    "sends none, 5 expected": lambda c: uneven(c, 1, 0, 5),
    "sends 5, none expected": lambda c: uneven(c, 1, 5, 0),
    "sends 5, none expected, nothing else": lambda c: uneven(c, 0, 5, 0),
    "sends none, 5 expected, nothing else": lambda c: uneven(c, 0, 0, 5),
    "sends 4, 5 expected": lambda c: uneven(c, 1, 4, 5),
    "sends 40,000, 500,000 expected": lambda c: uneven(c, 1, 40_000, 500_000),
}


def tell(call: Program, group: Communicator) -> None:
    """Make a call that differs. Who has done its part already has a right result, and is told in its next call."""
    result = call(group)
    assert result is None or (np.asarray(result) == 1).all()
    group.all_gather(ones(1))


@pytest.mark.parametrize("place", PLACES)
def test_calls_that_differ_are_told_on_all_ranks(place: str) -> None:
    transport, topology = PLACES[place]

    def program(comm: Communicator) -> None:
        for name, call in DIFFERING.items():
            group = comm.group(range(4), name)
            with pytest.raises(PlanMismatch):
                tell(call, group)
            with pytest.raises(Closed):
                group.barrier()
        comm.barrier()

    run_ranks(4, program, transport=transport, topology=topology)


def test_a_mismatch_of_native_calls_is_raised_once() -> None:
    """Although planned calls of the same group came before."""

    def program(comm: Communicator) -> None:
        comm.all_gather(ones(3))
        with pytest.raises(PlanMismatch):
            comm.broadcast(ones(3), root=int(odd(comm)))
        with pytest.raises(Closed):
            comm.all_gather(ones(3))

    run_ranks(4, program, transport="shm")


def test_a_failure_of_planned_calls_is_raised_once_where_others_are_native() -> None:
    def program(comm: Communicator) -> None:
        with pytest.raises(PlanMismatch):
            comm.all_gather(ones(3 + odd(comm)))
        with pytest.raises(Closed):
            comm.barrier()
        with pytest.raises(Closed):
            comm.all_gather(ones(3))

    run_ranks(4, program, transport="shm")


@pytest.mark.parametrize("name", ["x" * 64, '"' * 64, "\\" * 64, "\x01" * 64, "é" * 32])
def test_every_valid_call_can_be_described(name: str) -> None:
    largest = 2**60
    whole = Descriptor(largest, "reduce_scatter", "prod", "bfloat16", largest, 10**6, 10**6, "f" * 16, name, "f" * 8)
    cut = Descriptor(largest, "reduce_scatter", "prod", "bfloat16", largest, 10**6, 10**6, "f" * 16, name, cut="f" * 8)
    pair = Descriptor(largest, "all_to_all", "sum", "bfloat16", 0, 0, 1, "f" * 16, name, "", (largest, largest - 1))
    shaped = msgspec.structs.replace(cut, shape="(1, " + 48 * "9")
    for one in (whole, cut, pair, shaped):
        assert len(one.encode()) == HELLO_BYTES

    def program(comm: Communicator) -> None:
        assert comm.all_gather(ones(2), name=name).tolist() == [1] * 4
        comm.all_reduce(ones(2), name=name)

    run_ranks(2, program, transport="slotted")
