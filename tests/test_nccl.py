"""All-reduces of arrays on devices that NCCL does inside the sites, over doubles of CUDA and NCCL."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from devices import assert_nothing_left, own_stream, until
from ranks import attempt, grouped, lines, run_ranks

from detcoll.communicator import Communicator
from detcoll.device.nccl import TYPES
from detcoll.errors import (
    DeadlineMissed,
    DetcollError,
    PeerLost,
    TransportError,
    TransportUnavailable,
    UsageError,
)
from detcoll.fold import reference
from detcoll.job import rails
from detcoll.rendezvous.session import Session
from detcoll.runtime import onsite
from detcoll.testing.device import DeviceArray, StrictDevice, in_place_of_cuda
from detcoll.testing.nccl import FakeClique, FakeNccl
from detcoll.testing.values import varied
from detcoll.types import DTYPES, ReduceOp, operators_of

NCCL = {"DETCOLL_NCCL": "1"}
CALLS = int(os.environ.get("TEST_DRAWS", "4"))


@pytest.fixture
def device() -> Iterator[StrictDevice]:
    """Let all ranks of this process have devices."""
    with in_place_of_cuda(6) as strict:
        yield strict


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch, device: StrictDevice) -> FakeNccl:
    """Let them have NCCL too."""
    fake = FakeNccl(device)
    monkeypatch.setattr(rails, "library", lambda: fake)
    return fake


PLACES: dict[str, tuple[str, Any, int]] = {
    "one site": ("tcp", None, 3),
    "one site, shm": ("shm", None, 2),
    "two sites": ("slotted", lines(2, 2, rate_bytes_per_s=1e9), 4),
    "two sites of three": ("shm", grouped(3, 3), 6),
    "three sites": ("slotted", lines(2, 2, 2, rate_bytes_per_s=1e9), 6),
    "one rank a site": ("tcp", grouped(1, 1), 2),
}


class Draw:
    """One call, the same on all ranks, and what must come out."""

    def __init__(self, draw: random.Random, comm: Communicator, device: StrictDevice) -> None:
        self.comm, self.device, rank = comm, device, comm.rank
        dtype = DTYPES[draw.choice([name for name in DTYPES if name != "bfloat16"])]  # of which no interface speaks
        op = draw.choice(sorted(operators_of(dtype), key=lambda each: each.value))
        sizes = [draw.choice([0, 1, 2, 3, 5, 7, draw.randrange(3000)]) for _ in range(draw.choice([1, 1, 3]))]
        seed, is_async, is_late = draw.randrange(1 << 30), draw.random() < 0.6, draw.random() < 0.5
        given = [
            [varied(dtype, size, seed, at, number) for number, size in enumerate(sizes)] for at in range(comm.size)
        ]
        sites = [site.ranks for site in comm.topology.sites]
        self.expected = [reference(op, [of[number] for of in given], sites, dtype) for number in range(len(sizes))]
        self.what = f"{op.value} of {dtype}, {sizes} elements"
        own = comm.ranks[rank]
        stream = own_stream(device, own)
        self.arrays = [device.array(np.zeros_like(each) if is_late else each, own, stream) for each in given[rank]]
        if is_late:
            for array, values in zip(self.arrays, given[rank], strict=True):
                device.kernel(stream, lambda array=array, values=values: device.poke(array, values))
        x = self.arrays if len(sizes) > 1 else self.arrays[0]
        self.work = comm.all_reduce(x, op, async_op=True) if is_async else comm.all_reduce(x, op)

    def check(self) -> None:
        if self.work is not None:
            self.work.wait(20)
        for array, expected in zip(self.arrays, self.expected, strict=True):
            assert self.device.peek(array).tobytes() == expected.tobytes(), self.what


@pytest.mark.parametrize("place", PLACES)
def test_random_calls(nccl: FakeNccl, device: StrictDevice, place: str) -> None:
    transport, topology, size = PLACES[place]
    device.seeded(5)

    def serve(comm: Communicator, seed: int) -> None:
        draw, pending = random.Random(seed), []
        for _ in range(CALLS):
            pending.append(Draw(draw, comm, device))
            while len(pending) > 3:
                pending.pop(0).check()
        for each in pending:
            each.check()

    def program(comm: Communicator) -> None:
        serve(comm, 1)
        backwards = comm.group(list(range(comm.size))[::-1], "backwards")
        serve(backwards, 2)
        backwards.close()
        serve(comm, 3)

    run_ranks(size, program, transport=transport, topology=topology, environ=NCCL)
    across = {"reduce_scatter", "all_gather", "reduce", "broadcast"}
    assert set(nccl.calls) == (set() if place == "one rank a site" else {"all_reduce"} if topology is None else across)
    assert_nothing_left(device)
    assert not device.pending
    assert transport == "shm" or not device.unpinned  # calls without NCCL are the transport's there


@pytest.mark.parametrize("place", ["one site, shm", "two sites"])
def test_every_type_and_operator(nccl: FakeNccl, device: StrictDevice, place: str) -> None:
    transport, topology, size = PLACES[place]
    device.seeded(4)

    def program(comm: Communicator) -> None:
        own, sites = comm.rank, [site.ranks for site in comm.topology.sites]
        stream, calls = own_stream(device, own), []
        for dtype in [dtype for name, dtype in DTYPES.items() if name in TYPES and name != "bfloat16"]:
            given = [varied(dtype, 7, 3, at) for at in range(size)]
            for op in sorted(operators_of(dtype), key=lambda each: each.value):
                x = device.array(given[own], own, stream)
                calls.append((comm.all_reduce(x, op, async_op=True), x, reference(op, given, sites, dtype), op, dtype))
        for work, x, expected, op, dtype in calls:
            work.wait(20)
            assert device.peek(x).tobytes() == expected.tobytes(), f"{op} of {dtype}"

    run_ranks(size, program, transport=transport, topology=topology, environ=NCCL)


def ones(device: StrictDevice, comm: Communicator, elems: int = 1001) -> DeviceArray:
    return device.array(np.full(elems, comm.rank + 1.0), comm.rank, own_stream(device, comm.rank))


@pytest.mark.parametrize("place", ["one site", "one site, shm", "two sites"])
@pytest.mark.parametrize("wrong", ["size", "op", "host"])
def test_calls_that_differ_raise_on_every_rank_before_nccl_begins(
    nccl: FakeNccl, device: StrictDevice, place: str, wrong: str
) -> None:
    transport, topology, size = PLACES[place]
    device.seeded(6)

    def program(comm: Communicator) -> None:
        odd = comm.rank == 1
        x: Any = ones(device, comm, 1001 - (odd and wrong == "size"))
        if odd and wrong == "host":
            x = np.ones(1001)
        comm.all_reduce(x, "prod" if odd and wrong == "op" else "sum", timeout=10)

    answers = attempt(size, program, transport=transport, topology=topology, environ=NCCL)
    # Whoever has heard it leaves the job, and others may hear of that first, with the cause.
    assert all("ranks called different collectives" in str(answer) for answer in answers), answers
    assert topology is not None or not nccl.calls  # another site may have agreed
    answers.clear()  # errors keep the frames in which they were raised
    assert_nothing_left(device)


def test_a_call_that_one_rank_refuses_ends_the_group(nccl: FakeNccl, device: StrictDevice) -> None:
    device.seeded(7)

    def program(comm: Communicator) -> str:
        comm.all_reduce(ones(device, comm))
        x = ones(device, comm)
        with pytest.raises(UsageError) as caught:  # noqa: PT012 - others may hear of it in the barrier
            comm.barrier()
            device.capture(x.stream, comm.rank == 1)
            comm.all_reduce(x)
        with pytest.raises(DetcollError, match="graph"):
            comm.all_reduce(ones(device, comm))
        return str(caught.value)

    answers = run_ranks(4, program, transport="tcp", topology=grouped(2, 2), environ=NCCL)
    assert all("graph" in answer for answer in answers), answers
    assert all(member.is_aborted for each in nccl.cliques.values() for member in each.members.values())


def test_later_calls_reduce_while_an_earlier_one_is_on_the_line(nccl: FakeNccl, device: StrictDevice) -> None:
    device.seeded(8)

    def program(comm: Communicator) -> None:
        if comm.rank >= 2:  # the other site comes late, so the first site's sums wait
            until(lambda: nccl.calls.count("reduce_scatter") == 2 * 3)
        arrays = [ones(device, comm, 1000) for _ in range(3)]
        works = [comm.all_reduce(array, async_op=True) for array in arrays]
        for array, work in zip(arrays, works, strict=True):
            work.wait(20)
            assert (device.peek(array) == 10).all()

    run_ranks(4, program, transport="tcp", topology=grouped(2, 2), environ=NCCL)


def test_calls_on_the_same_memory_are_carried_out_in_order(nccl: FakeNccl, device: StrictDevice) -> None:
    device.seeded(9)

    def program(comm: Communicator) -> None:
        x = ones(device, comm)
        works = [
            comm.all_reduce(x, async_op=True),
            comm.all_reduce(x, "prod", async_op=True),
            comm.broadcast(x, 1, async_op=True),
            comm.all_reduce(x, "max", async_op=True),
            comm.all_reduce(x, async_op=True),
        ]
        for work in works:
            work.wait(20)
        assert (device.peek(x) == 4 * 10**4).all()

    run_ranks(4, program, transport="shm", topology=grouped(2, 2), environ=NCCL)


def test_an_array_that_its_caller_drops_lives_as_long_as_the_call(nccl: FakeNccl, device: StrictDevice) -> None:
    device.seeded(16)

    def program(comm: Communicator) -> None:
        works = [comm.all_reduce(ones(device, comm), async_op=True) for _ in range(4)]
        gc.collect()
        for work in works:
            work.wait(20)  # the double notices memory that is used when it was freed

    run_ranks(4, program, transport="tcp", topology=grouped(2, 2), environ=NCCL)
    gc.collect()
    assert device._memory._freed == set(device._memory._pieces), "memory is kept after the calls"


@pytest.mark.parametrize("step", ["reduces", "gathers"])
def test_a_step_that_does_not_end_counts_against_the_deadline(nccl: FakeNccl, device: StrictDevice, step: str) -> None:
    device.seeded(10)
    seen = []

    def program(comm: Communicator) -> str:
        comm.all_reduce(ones(device, comm))
        x = ones(device, comm)
        if comm.rank == 1 and step == "reduces":
            hold_stream(device, x)
        if step == "gathers":
            hold_lane(comm, 1)
        comm.barrier()  # so that all have called it long before the deadline
        with pytest.raises(DeadlineMissed) as caught:
            comm.all_reduce(x, timeout=0.5)
        seen.append((x, device.peek(x)))
        return str(caught.value)

    answers = run_ranks(4, program, transport="tcp", topology=grouped(2, 2), environ=NCCL)
    assert all("NCCL in its site, with rank" in answer for answer in answers), answers
    device.drive()
    for x, before in seen:
        assert (device.peek(x) == before).all(), "an array was written to after its call had failed"


def hold_stream(device: StrictDevice, x: DeviceArray) -> None:
    device._streams.find(x.stream, x.device)
    device.kernel(x.stream, lambda: None, x.device)
    device._streams.find(x.stream, x.device).queue[-1].may_run = lambda: False


def hold_lane(comm: Communicator, number: int, *, for_good: bool = False) -> None:
    """Let nothing happen on the stream of a lane any more, until its clique is given up or ``for_good``."""
    lane = comm._caller._rails.onsite._lanes[number]
    lane._cuda.kernel(lane._stream, lambda: None, lane._device)
    held = lane._cuda._streams.find(lane._stream, lane._device).queue[-1]
    held.may_run = lambda: not for_good and lane.clique is None


@pytest.mark.parametrize("place", ["one site", "two sites"])
@pytest.mark.parametrize("is_lost", [False, True], ids=["leaves", "is lost"])
def test_a_rank_that_goes_is_named_by_all(nccl: FakeNccl, device: StrictDevice, place: str, is_lost: bool) -> None:
    transport, topology, size = PLACES[place]
    device.seeded(11)

    def lose(comm: Communicator) -> None:
        """Do as a rank does that hears from the rendezvous that rank 1 is gone."""
        failures = comm._job.loop.engine.failures
        until(lambda: is_under_way(nccl, size))
        if topology is None:
            assert "waits for NCCL in its site, with rank" in str(comm._job.describe())  # as flight records tell it
        comm._job.loop.post(lambda now_ns: failures.rank_lost(1, "rank 1 is gone", now_ns, is_known=True))

    def program(comm: Communicator) -> str:
        comm.all_reduce(ones(device, comm))
        x = ones(device, comm)
        clique = comm._caller._rails.onsite._lanes[0].clique
        if comm.rank == 1:
            hold_stream(device, x)
            work = comm.all_reduce(x, async_op=True)
            until(lambda: is_under_way(nccl, size))
            if is_lost:
                work.exception(20)
            raise ZeroDivisionError("rank 1 leaves")
        work = comm.all_reduce(x, async_op=True)
        if is_lost:
            lose(comm)
        error = work.exception(20)
        assert isinstance(error, PeerLost if is_lost else TransportError)
        if comm.rank < len(comm.topology.sites[0].ranks):
            assert clique.is_aborted, "its caller heard of the end before NCCL had let its array go"
        return str(error)

    answers = attempt(size, program, transport=transport, topology=topology, environ=NCCL)
    assert isinstance(answers.pop(1), ZeroDivisionError)
    assert all(f"rank 1 {'is gone' if is_lost else 'gave up: '}" in str(answer) for answer in answers), answers


def is_under_way(nccl: FakeNccl, size: int) -> bool:
    """Tell whether all ranks but one have begun to reduce for the second time."""
    return sum(nccl.calls.count(call) for call in ("all_reduce", "reduce_scatter")) == 2 * size - 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"environ": [NCCL, {}]}, "ranks disagree about nccl: rank 0 has True, rank 1 has False"),
        ({"environ": NCCL, "reproducible": True}, "DETCOLL_NCCL='1' with reproducible=True"),
        ({"environ": {"DETCOLL_NCCL": "maybe"}}, "DETCOLL_NCCL='maybe' is neither on nor off"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    for answer in attempt(2, lambda comm: None, **settings):
        assert isinstance(answer, UsageError)
        assert said in str(answer)


def test_sites_of_unequal_size_are_refused_and_groups_with_such_do_without(
    nccl: FakeNccl, device: StrictDevice
) -> None:
    device.seeded(12)
    for answer in attempt(3, lambda comm: None, topology=grouped(1, 2), environ=NCCL):
        assert "needs sites of equal size; those of the topology have [1, 2] ranks" in str(answer)

    def program(comm: Communicator) -> None:
        if comm.rank:
            x = ones(device, comm)
            comm.group([1, 2, 3]).all_reduce(x)
            assert (device.peek(x) == 9).all()

    run_ranks(4, program, topology=grouped(2, 2), environ=NCCL)
    assert not nccl.calls


def without_library(nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise TransportUnavailable("there is no NCCL")

    monkeypatch.setattr(rails, "library", load)


def with_one_device(nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl.cuda, "pci_bus_id", lambda number: "0000:3b:00.0")


def with_another_version(nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter(range(22800, 22900))
    monkeypatch.setattr(FakeNccl, "version", property(lambda self: next(versions)))


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (without_library, "cannot use NCCL: there is no NCCL. Without DETCOLL_NCCL=1"),
        (with_one_device, "ranks 0 and 1 share the device "),
        (with_another_version, "expected one version"),
    ],
)
def test_what_nccl_lacks_is_said_on_every_rank(
    nccl: FakeNccl, device: StrictDevice, monkeypatch: pytest.MonkeyPatch, lacking: Callable[..., None], said: str
) -> None:
    device.seeded(13)
    lacking(nccl, monkeypatch)
    for answer in attempt(2, lambda comm: comm.all_reduce(ones(device, comm)), environ=NCCL):
        assert isinstance(answer, UsageError)
        assert said in str(answer)


def test_a_group_keeps_to_one_device(nccl: FakeNccl, device: StrictDevice) -> None:
    device.seeded(14)

    def program(comm: Communicator) -> None:
        comm.all_reduce(ones(device, comm))
        comm.all_reduce(device.array(np.ones(3), 5, own_stream(device, 5)))

    answers = attempt(2, program, environ=NCCL)
    assert all("expected one device for a group" in str(answer) for answer in answers), answers


@pytest.mark.parametrize("call", ["is_settled", "start"])
def test_an_error_of_nccl_ends_the_group(nccl: FakeNccl, device: StrictDevice, monkeypatch: Any, call: str) -> None:
    device.seeded(15)
    monkeypatch.setattr(onsite, "PATIENCE_NS", 0)
    inner = getattr(FakeClique, call)

    def failing(clique: FakeClique, *arguments: Any) -> Any:
        if clique._place == 1:
            raise TransportError("NCCL failed with unhandled cuda error (1)")
        return inner(clique, *arguments)

    monkeypatch.setattr(FakeClique, call, failing)
    answers = attempt(2, lambda comm: comm.all_reduce(ones(device, comm)), environ=NCCL)
    assert all("unhandled cuda error" in str(answer) for answer in answers), answers


@pytest.mark.parametrize("closes", ["close ", "finalize"])
def test_nccl_is_given_up_when_all_ranks_have_ended_their_calls(
    nccl: FakeNccl, device: StrictDevice, monkeypatch: pytest.MonkeyPatch, closes: str
) -> None:
    device.seeded(18)
    parts = threading.Event()
    exchange, is_settled = Session.exchange, FakeClique.is_settled

    def parting(session: Session, name: str, *arguments: Any) -> list[bytes]:
        if session.rank == 0 and name.startswith(closes):
            parts.set()
        return exchange(session, name, *arguments)

    def late(clique: FakeClique) -> bool:
        is_last = clique._place == 1 and clique._count == 1  # one that was given up raises
        return is_settled(clique) and (parts.is_set() or not is_last)

    monkeypatch.setattr(Session, "exchange", parting)
    monkeypatch.setattr(FakeClique, "is_settled", late)

    def program(comm: Communicator) -> None:
        group = comm.group([0, 1]) if closes == "close " else comm
        x = ones(device, group)
        group.all_reduce(x)
        assert (device.peek(x) == 3).all()
        if group is not comm:
            group.close()

    run_ranks(2, program, environ=NCCL)
    assert parts.is_set()


@pytest.mark.parametrize("error", [TransportError, RuntimeError])
def test_an_array_is_kept_where_nccl_cannot_be_given_up(
    nccl: FakeNccl, device: StrictDevice, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    device.seeded(17)
    kept: list[object] = []
    monkeypatch.setattr(onsite, "_abandoned", kept)

    def failing(clique: FakeClique) -> None:
        raise error("NCCL cannot abort")

    def program(comm: Communicator) -> None:
        comm.all_reduce(ones(device, comm))
        if comm.rank == 0:
            hold_lane(comm, 0, for_good=True)  # else one rank gives up, and the other one's call ends well
            monkeypatch.setattr(FakeClique, "abort", failing)
        comm.barrier()
        comm.all_reduce(ones(device, comm), timeout=1.0, async_op=True).wait(10)

    answers = attempt(2, program, environ=NCCL)
    assert all("NCCL in its site" in str(answer) for answer in answers), f"callers did not hear of the end: {answers}"
    answers.clear()
    gc.collect()
    assert len(kept) == 2
    assert len(set(device._memory._pieces) - device._memory._freed) == 2, "memory that the device may use was freed"


TAKEN = [
    ("sum", "float32", 8, 1, True),
    ("avg", "float32", 8, 1, False),
    ("avg", "float64", 8, 2, True),
    ("sum", "bfloat16", 2, 1, True),
    ("sum", "bfloat16", 3, 1, False),
    ("prod", "float16", 2, 2, True),
    ("avg", "float16", 2, 2, False),
    ("max", "float32", 2, 1, False),
    ("max", "uint8", 3, 2, True),
    ("sum", "int16", 2, 1, False),
    ("sum", "complex64", 2, 1, False),
    ("bor", "int32", 2, 1, False),
    ("min", "bool", 2, 1, False),
]


@pytest.mark.parametrize(("op", "dtype", "size", "sites", "is_taken"), TAKEN)
def test_nccl_takes_what_it_does_as_promised(op: str, dtype: str, size: int, sites: int, is_taken: bool) -> None:
    assert onsite.takes(ReduceOp(op), dtype, size, sites) == is_taken
