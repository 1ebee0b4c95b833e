"""Native collectives of the world and of groups, over the transports that have them, as users call them."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from every_kind import every_kind, from_three_threads
from ranks import attempt, grouped, launch, run_ranks

from detcoll.communicator import Communicator
from detcoll.errors import Closed, DeadlineMissed, DetcollError, PeerLost, PlanMismatch, UsageError
from detcoll_shm import ShmTransport
from detcoll_shm.groups import ENTRY_WORDS
from detcoll_shm.stage import TABLE


@pytest.fixture(params=["shm", "gloo"])
def transport(request: pytest.FixtureRequest) -> str:
    """A transport that has native collectives for groups."""
    if request.param == "gloo":
        pytest.importorskip("torch")  # here, since it takes long where ranks wait for each other
    return str(request.param)


KINDS = ("reduce", "all_gather", "reduce_scatter", "gather", "scatter", "all_to_all")


def test_every_kind_in_the_world_and_in_groups(transport: str) -> None:
    """What a transport lacks, such as blocks of different sizes in Gloo, goes through a plan beside the rest."""
    native, own = {"gloo": ("gloo-native", set(KINDS) - {"reduce_scatter"}), "shm": ("shared-memory", set())}[transport]

    def program(comm):
        every_kind(comm)
        part = comm.split(comm.rank % 2 if comm.rank < 3 else 1, key=-comm.rank)
        every_kind(part)
        algorithms = [part.algorithm(kind, 12 * part.size) for kind in KINDS]
        names = comm.algorithm("all_reduce", 4), part.algorithm("all_reduce", 4)
        part.close()
        return *names, algorithms

    answers = run_ranks(4, program, transport=transport)
    for world, group, algorithms in answers:
        assert world == native
        assert group == native
        assert [name == native for name in algorithms] == [kind in own for kind in KINDS]


def test_a_native_call_that_waits_in_one_group_delays_none_of_another(transport: str) -> None:
    def program(comm):
        waiting, going = comm.group(range(comm.size), "waiting"), comm.group(range(comm.size), "going")
        x, y = np.ones(1000), np.ones(1000)
        work = waiting.all_reduce(x, async_op=True) if comm.rank == 0 else None
        for _ in range(5):
            going.all_reduce(y, async_op=True).wait(20)
        comm.barrier()
        assert work is None or not work.done()
        comm.barrier()
        work = work or waiting.all_reduce(x, async_op=True)
        work.wait(20)
        assert (x == comm.size).all()

    run_ranks(3, program, transport=transport)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather"])
def test_a_fixed_fold_order_excludes_natives_that_have_another(transport: str, kind: str) -> None:
    def program(comm):
        return [group.algorithm(kind, 12 * comm.size) for group in (comm, comm.group([1, 0], "turned"))]

    is_native = transport == "shm" and kind == "all_reduce"
    for names in run_ranks(2, program, transport=transport, reproducible=True):
        assert [name == "shared-memory" for name in names] == [is_native] * 2
        assert "gloo-native" not in names


def test_three_groups_that_overlap_from_three_threads(transport: str) -> None:
    run_ranks(4, lambda comm: from_three_threads(comm, 30), transport=transport)


NATIVE_AND_PLANNED = {
    "shm": (lambda c: c.all_reduce(np.ones(3), async_op=True), lambda c: c.all_gather(np.ones(3), async_op=True)),
    "gloo": (
        lambda c: c.all_reduce(np.ones(3), async_op=True),
        lambda c: c.reduce_scatter(np.ones(2 * c.size), async_op=True),
    ),
}


def test_what_is_native_on_one_rank_and_planned_on_another_ends_on_all(transport: str) -> None:
    """Also where the planned one is followed by what the others are in: calls of different numbers do not meet."""
    native, planned = NATIVE_AND_PLANNED[transport]

    def program(comm):
        for odd in ({0}, {3}, {1, 2, 3}):
            group = comm.group(range(4), f"{odd}")
            works = []
            with suppress(PlanMismatch, Closed):  # it may have ended before the last one is called
                works.extend(call(group) for call in [planned, native, native][comm.rank not in odd :])
            for work in works:
                with pytest.raises(PlanMismatch):
                    work.wait(20)
            with pytest.raises(Closed, match="called different collectives"):
                group.barrier()
        comm.barrier()
        with pytest.raises(PlanMismatch, match="which its transport does"):
            (planned if comm.rank == 1 else native)(comm).wait(20)

    run_ranks(4, program, transport=transport)


def test_what_one_rank_refuses_ends_soon_on_those_that_are_in_it(transport: str) -> None:
    def program(comm):
        for group in (comm.group([2, 1, 0], "part"), comm):
            group.barrier()
            with pytest.raises(UsageError, match="op='median'" if comm.rank == 1 else "^rank 1 refused the call: op"):
                group.all_reduce(np.ones(4), op="median" if comm.rank == 1 else "sum")

    run_ranks(3, program, transport=transport)


def test_what_one_rank_refuses_is_no_mismatch_though_it_goes_on_to_its_next_call(transport: str) -> None:
    comms: dict[int, Communicator] = {}

    def is_inside(rank: int) -> bool:
        comm = comms.get(rank)
        return comm is not None and comm._job.natives.of(comm._group).unfinished is not None

    def program(comm):
        comm.barrier()
        comms[comm.rank] = comm
        if comm.rank == 1:
            until_s = time.monotonic() + 20
            while not (is_inside(0) and is_inside(2)):
                assert time.monotonic() < until_s, "the others do not come"
            with pytest.raises(UsageError, match="op='median'"):
                comm.all_reduce(np.ones(4), op="median")
        with pytest.raises((UsageError, Closed), match="rank 1 refused the call: op='median'") as caught:
            comm.all_reduce(np.ones(4))
        assert comm.rank == 1 or caught.type is UsageError

    run_ranks(3, program, transport=transport)


def test_what_ends_a_group_natively_ends_no_other(transport: str) -> None:
    """Every member hears it in the words of the rank that found it out, by the ranks of the job."""

    def program(comm):
        ranks = [2, 1]
        part = comm.group(ranks, "pair") if comm.rank in ranks else None
        other = comm.group([2, 0, 1], "all")
        seen: DetcollError | None = None
        if part is not None:
            with pytest.raises(PlanMismatch) as caught:
                part.all_reduce(np.ones(3 + comm.rank))
            seen = caught.value
        other.barrier()
        comm.barrier()
        return str(seen or "")

    said = run_ranks(3, program, transport=transport)
    assert "rank 1 called" in said[1]
    assert "rank 2 called" in said[2]


def test_who_waits_in_an_earlier_native_call_is_not_blamed_for_a_planned_one(transport: str) -> None:
    """Rank 2 calls nothing; rank 1 is in the transport, and has not come to the planned call yet."""
    native, planned = NATIVE_AND_PLANNED[transport]
    told = threading.Event()

    def program(comm):
        comm.barrier()
        if comm.rank == 2:
            assert told.wait(30)
            return ""
        work = native(comm)
        if comm.rank == 0:
            comm.timeout = 1.0
            work = planned(comm)
        try:
            with pytest.raises(DetcollError) as caught:
                work.wait(30)
        finally:
            told.set()
        return str(caught.value)

    for said in run_ranks(3, program, transport=transport)[:2]:
        assert re.search("waits for rank 2, which has not called it; .* is number 0$", said)


def test_a_member_that_is_late_natively_ends_its_group_for_all(transport: str) -> None:
    begun = threading.Barrier(3)

    def program(comm):
        part = comm.group(range(3), "late")
        part.barrier()
        errors = []
        if comm.rank != 2:
            with pytest.raises((DeadlineMissed, PeerLost)) as caught:
                part.all_reduce(np.ones(10), timeout=0.3)
            errors.append(str(caught.value))
        begun.wait(30)
        with pytest.raises(DetcollError):
            part.all_reduce(np.ones(10))
        comm.all_reduce(np.ones(10))
        return errors

    first, second, _ = run_ranks(3, program, transport=transport)
    assert "rank 2" in first[0] + second[0]


def test_natives_of_mpi(tmp_path, mpiexec: list[str]) -> None:
    ended = launch(
        4, "native_kinds.py", launcher=[*mpiexec, "-n", "4"], environ={"DETCOLL_TRANSPORT": "mpi"}, folder=tmp_path
    )
    assert ended.code == 0, ended.err
    assert ended.out.split() == ["mpi-native"]


def test_natives_of_a_group_give_the_bits_of_its_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its order of ranks is not that of their sites."""

    def program(comm):
        part = comm.group([3, 0, 1], "turned") if comm.rank != 2 else None
        if part is None:
            return "", b""
        given = [np.random.default_rng([n]).standard_normal(1000).astype(np.float32) for n in range(3)]
        mine = given[part.rank].copy()
        part.all_reduce(mine)
        return part.algorithm("all_reduce", 4000), mine.tobytes()

    native = run_ranks(4, program, transport="shm", topology=grouped(2, 2))
    monkeypatch.setattr(
        ShmTransport, "capabilities", dataclasses.replace(ShmTransport.capabilities, native_groups=False)
    )
    planned = run_ranks(4, program, transport="shm", topology=grouped(2, 2))
    assert [name for name, _ in native] == ["shared-memory", "shared-memory", "", "shared-memory"]
    assert "shared-memory" not in [name for name, _ in planned]
    assert [bits for _, bits in native] == [bits for _, bits in planned]
    assert native[0][1] == native[3][1]


def test_a_refused_call_of_a_planned_kind_ends_on_all_beside_natives() -> None:
    def program(comm):
        x = np.ones(4)
        with pytest.raises(UsageError):
            comm.all_to_all(np.ones(3) if comm.rank == 0 else x)
        comm.all_reduce(x)
        return comm.all_to_all(x).tolist()

    for answer in attempt(2, program, transport="shm"):
        assert answer == [2.0, 2.0, 2.0, 2.0]


def test_a_group_for_which_one_member_has_no_room_is_planned_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is in more groups than the others when it has no room left."""
    monkeypatch.setattr("detcoll_shm.groups.REFUSAL", TABLE + ENTRY_WORDS)
    monkeypatch.setattr("detcoll_shm.groups._END", TABLE + 2 * ENTRY_WORDS)

    def program(comm):
        pair = comm.group([0, 1], "pair") if comm.rank < 2 else None
        whole = comm.group(range(3), "whole")
        x = np.ones(10)
        whole.all_reduce(x)
        if pair is not None:
            pair.all_reduce(x)
            pair.close()
        again = comm.group(range(3), "again")
        again.all_reduce(x)
        return [group.algorithm("all_reduce", 80) for group in (whole, again)]

    for whole, again in run_ranks(3, program, transport="shm"):
        assert whole != "shared-memory"
        assert again == "shared-memory"
