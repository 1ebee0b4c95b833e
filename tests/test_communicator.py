"""Collectives as users call them: every transport, container and size, held against the fold that is promised."""

from __future__ import annotations

import json
import re
import threading

import ml_dtypes
import numpy as np
import pytest
from forked import launch_forked
from ranks import TIMEOUT_S, grouped, launch, lines, run_ranks

from detcoll.errors import UsageError
from detcoll.fold import reference
from detcoll.plan import Slotting, build_calendar
from detcoll.plan.headroom import Express
from detcoll.plan.layout import LOCAL_CHUNK_BYTES
from detcoll.plan.promise import calendar_facts
from detcoll.testing.values import varied
from detcoll.topology import Topology
from detcoll.types import DTYPES, ReduceOp, operators_of

SHAPES = {
    "shm1": (1, "shm", None),
    "shm2": (2, "shm", None),
    "shm7": (7, "shm", None),
    "shm2+2": (4, "shm", grouped(2, 2)),
    "slotted1": (1, "slotted", None),
    "slotted3": (3, "slotted", None),
    "slotted1+1": (2, "slotted", lines(1, 1)),
    "slotted2+2": (4, "slotted", lines(2, 2)),
    "slotted2+1": (3, "slotted", lines(2, 1)),
    "slotted1+3": (4, "slotted", lines(1, 3)),
    "slotted1+1+1": (3, "slotted", lines(1, 1, 1)),
    "slotted2+3+2": (7, "slotted", lines(2, 3, 2)),
}


@pytest.fixture(params=SHAPES)
def world(request):
    return SHAPES[request.param]


def contributions(size: int, elems: int, dtype, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng([seed, elems, size])
    return [(draw.standard_normal(elems) * 3).astype(dtype) for _ in range(size)]


def groups_of(size: int, topology: Topology | None) -> list[tuple[int, ...]]:
    return [site.ranks for site in (topology or Topology.single_site(size)).sites]


def test_all_reduce_is_the_promised_fold(world) -> None:
    size, transport, topology = world
    edge = LOCAL_CHUNK_BYTES // 4
    counts = [0, 1, 3, 1000, 1025, edge - 1, edge, edge + 1, 3 * edge + 5]
    given = {elems: contributions(size, elems, np.float32) for elems in counts}
    dtype, groups = np.dtype(np.float32), groups_of(size, topology)
    expected = {elems: reference(ReduceOp.SUM, given[elems], groups, dtype).tobytes() for elems in counts}

    def program(comm):
        for elems in counts:
            mine = given[elems][comm.rank].copy()
            assert comm.all_reduce(mine) is None
            assert mine.tobytes() == expected[elems], elems

    run_ranks(size, program, transport=transport, topology=topology)


@pytest.mark.parametrize("op", list(ReduceOp))
def test_every_type_and_operation(op: ReduceOp) -> None:
    topology = lines(2, 1)
    dtypes = [dtype for dtype in DTYPES.values() if op in operators_of(dtype)]
    given = [[varied(dtype, 501, rank) for rank in range(3)] for dtype in dtypes]

    def program(comm):
        mine = [arrays[comm.rank].copy() for arrays in given]
        works = [comm.all_reduce(array, op=op.value, async_op=True) for array in mine]
        for work, array, arrays, dtype in zip(works, mine, given, dtypes, strict=True):
            work.wait()
            expected = reference(op, arrays, groups_of(3, topology), dtype)
            assert array.tobytes() == expected.tobytes(), dtype

    run_ranks(3, program, transport="slotted", topology=topology)


def test_broadcast_from_every_root(world) -> None:
    size, transport, topology = world

    def program(comm):
        for root in range(size):
            for elems in (0, 1, 1000, 70_000):
                mine = np.full(elems, comm.rank + 1, np.int32)
                comm.broadcast(mine, root=root)
                assert (mine == root + 1).all()

    run_ranks(size, program, transport=transport, topology=topology)


def test_nobody_leaves_a_barrier_before_all_have_come(world) -> None:
    size, transport, topology = world
    come: list[int] = []

    def program(comm):
        for turn in range(1, 4):
            come.append(comm.rank)
            comm.barrier()
            assert len(come) >= turn * size

    run_ranks(size, program, transport=transport, topology=topology)


@pytest.mark.parametrize(("transport", "topology"), [("shm", None), ("slotted", lines(1, 1))])
def test_containers(transport: str, topology: Topology | None) -> None:
    torch = pytest.importorskip("torch")

    def program(comm):
        matrix = np.full((3, 5), comm.rank + 1.0, ml_dtypes.bfloat16)
        scalar = np.array(comm.rank + 1, np.int64)
        tensor = torch.full((2, 2), comm.rank + 1.0, dtype=torch.bfloat16)
        empty = np.empty((0, 4), np.float32)
        listed = [np.ones(3, np.float32), np.full((2, 2), 2.0, np.float32), np.array(3.0, np.float32)]
        tensors = [torch.ones(3), torch.full((2,), 2.0)]
        for x in (matrix, scalar, tensor, empty, listed, tensors):
            comm.all_reduce(x)
        assert (matrix == 3).all()
        assert scalar == 3
        assert (tensor == 3).all()
        assert [float(array.sum()) for array in listed] == [6.0, 16.0, 6.0]
        assert [float(array.sum()) for array in tensors] == [6.0, 8.0]
        part = np.full(10, float(comm.rank + 1))
        comm.all_reduce(part[2:5])
        assert part.tolist() == [comm.rank + 1.0] * 2 + [3.0] * 3 + [comm.rank + 1.0] * 5
        later = [torch.zeros(3) + comm.rank, torch.zeros(1) + comm.rank]
        comm.broadcast(later, root=1, async_op=True).wait()
        assert all((array == 1).all() for array in later)

    run_ranks(2, program, transport=transport, topology=topology)


@pytest.mark.parametrize("topology", [lines(2, 2), lines(2, 1), None], ids=["2+2", "2+1", "shm"])
def test_forty_at_once_waited_for_in_any_order(topology: Topology | None) -> None:
    size = 4 if topology is None else topology.size

    def program(comm):
        draw = np.random.default_rng(7)
        sizes = draw.integers(0, 60_000, 40)
        arrays = [np.full(elems, comm.rank + 1, np.float32) for elems in sizes]
        works = [comm.all_reduce(array, async_op=True) for array in arrays]
        for index in draw.permutation(40):
            works[index].wait()
            works[index].wait()
            assert works[index].done()
            assert (arrays[index] == sum(range(1, size + 1))).all()

    run_ranks(size, program, topology=topology)


def test_threads_may_call_as_long_as_ranks_agree_on_the_order() -> None:
    turns = 30

    def program(comm):
        turn = threading.Condition()
        called = [0]
        problems: list[BaseException] = []

        def caller(first: int) -> None:
            try:
                for number in range(first, turns, 3):
                    x = np.full(2000, comm.rank + number, np.float32)
                    with turn:
                        assert turn.wait_for(lambda number=number: called[0] == number, 20)
                        work = comm.all_reduce(x, async_op=True)
                        called[0] += 1
                        turn.notify_all()
                    work.wait()
                    assert (x == 2 * number + 1).all()
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=caller, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not problems
        assert called == [turns]

    run_ranks(2, program, transport="slotted", topology=lines(1, 1))


def test_more_than_a_peer_may_hold() -> None:
    """An array beyond the standing credit of 16 MiB moves in parts."""

    def program(comm):
        x = np.full(6_000_000, comm.rank + 1, np.float32)
        comm.all_reduce(x)
        assert (x == 3).all()
        comm.broadcast(x, root=1)

    run_ranks(2, program, transport="slotted", topology=lines(1, 1, rate_bytes_per_s=2e9))


@pytest.mark.parametrize("slotting", ["calendar", "turns", "share", "off"])
def test_a_later_collective_does_not_use_up_what_an_earlier_one_needs(slotting: str) -> None:
    """Rank 0 broadcasts ahead to rank 2, which waits for the sum before, which waits for rank 1."""
    is_full = threading.Event()

    def holds_enough(comm) -> bool:
        (outbound,) = [peer.outbound for endpoint in comm._job.assembled.endpoints
                       for rank, peer in endpoint._peers.items() if rank == 2]  # fmt: skip
        world = comm._job.loop.engine.groups[comm._group.id]
        stopped = any(operation.unsent for operation in list(world.active))
        return stopped or not outbound.has_credit(2**20)

    def program(comm):
        comm.barrier()
        x, large = np.ones(1_000_000, np.float32), np.full(8_000_000, comm.rank, np.float32)
        if comm.rank == 1:
            assert is_full.wait(TIMEOUT_S)
        works = [comm.all_reduce(x, async_op=True)]
        if comm.rank != 0:
            works[0].wait()
        works.append(comm.broadcast(large, async_op=True))
        while comm.rank == 0 and not is_full.wait(0.001):
            if holds_enough(comm):
                is_full.set()
        for work in works:
            work.wait()
        assert (x == 3).all()
        assert not large.any()

    topology = lines(2, 1, rate_bytes_per_s=1e9)
    run_ranks(3, program, topology=topology, environ={"DETCOLL_SLOTTING": slotting}, timeout=15.0)


@pytest.mark.parametrize("slotting", ["calendar", "turns", "share", "off"])
def test_slotting_changes_no_bit(slotting: str) -> None:
    topology = lines(2, 2)
    given = contributions(4, 100_001, np.float32)
    expected = reference(ReduceOp.SUM, given, groups_of(4, topology), np.dtype(np.float32))

    def program(comm):
        assert comm.calendar.mode.value == slotting
        mine = given[comm.rank].copy()
        comm.all_reduce(mine)
        assert mine.tobytes() == expected.tobytes()

    run_ranks(4, program, topology=topology, environ={"DETCOLL_SLOTTING": slotting})


def test_sites_by_name_place_the_ranks() -> None:
    topology = lines(2, 1)
    sites = ["s1", "s0", "s0"]
    given = contributions(3, 1000, np.float32)
    expected = reference(ReduceOp.SUM, given, [(1, 2), (0,)], np.dtype(np.float32))

    def program(comm):
        assert [site.ranks for site in comm.topology.sites] == [(1, 2), (0,)]
        mine = given[comm.rank].copy()
        comm.all_reduce(mine)
        assert mine.tobytes() == expected.tobytes()

    run_ranks(3, program, topology=topology, environ=[{"DETCOLL_SITE": site} for site in sites])


@pytest.mark.parametrize(("transport", "topology"), [("shm", None), ("shm", grouped(2, 1)), ("slotted", lines(2, 1))])
def test_empty_gives_arrays_like_any(transport: str, topology: Topology | None) -> None:
    def program(comm):
        whole, bits = comm.empty((3, 50_000)), comm.empty(100_000, "bfloat16")
        whole[:], bits[:] = comm.rank, 1
        comm.all_reduce(whole[1:])
        comm.all_reduce(whole[0], op="avg")
        comm.all_reduce(bits, op="avg")
        assert (whole[1:] == 3).all()
        assert (whole[0] == 1).all()
        assert (bits == 1).all()
        assert (whole.flags.writeable, whole.flags.c_contiguous, whole.shape) == (True, True, (3, 50_000))
        assert (comm.empty(0).shape, comm.empty((2, 0, 3), "int8").shape, comm.empty(()).shape) == ((0,), (2, 0, 3), ())
        for shape in (-1, (2, -3), 1.5, None, ("x",), True):
            with pytest.raises(UsageError, match=re.escape(f"shape={shape!r} must be")):
                comm.empty(shape)
        with pytest.raises(UsageError, match="dtype"):
            comm.empty(3, "complex256")

    run_ranks(3, program, transport=transport, topology=topology)


def test_what_a_communicator_tells() -> None:
    topology = lines(1, 1)

    def program(comm):
        assert (comm.size, comm.transport, comm.topology) == (2, "slotted", topology)
        assert comm.predict("all_reduce", 4_000_000) > comm.bound("all_reduce", 4_000_000) > 0.02
        assert comm.algorithm("all_reduce", 4) == "exchange"
        comm.all_reduce(np.ones(50_000, np.float32))
        assert comm.counters()["foreign_frames"] == 0
        return comm.trace

    for trace in run_ranks(2, program, topology=topology):
        assert (len(trace.collectives), len(trace.sends)) == (0, 0), "nothing is kept unasked"
        assert [row["lane"] for row in trace.connections] == ["bulk", "express"]


@pytest.mark.parametrize("slotting", ["turns", "calendar"])
def test_a_trace_holds_what_was_planned_against_what_happened(tmp_path, slotting: str) -> None:
    def program(comm):
        comm.all_reduce(np.ones(500_000, np.float32))
        comm.barrier()

    run_ranks(4, program, topology=lines(2, 2), environ={"DETCOLL_SLOTTING": slotting, "DETCOLL_TRACE": str(tmp_path)})
    for rank in range(4):
        trace = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert [(call["kind"], call["nbytes"]) for call in trace["collectives"]] == [
            ("all_reduce", 2_000_000),
            ("barrier", 1),
        ]
        for call in trace["collectives"]:
            assert call["called_ns"] < call["ended_ns"]
            assert call["predicted_end_ns"] > call["called_ns"] + 1_000_000, "a one-way delay at the least"
        reduced = [send for send in trace["sends"] if send["nbytes"] > 1]
        assert sum(send["nbytes"] for send in reduced) == 1_000_000
        rate = trace["calendar"]["rates_bytes_per_s"][1 - trace["site"]]
        for send in reduced:
            assert send["not_before_ns"] <= send["started_ns"]
            line_ns = send["nbytes"] / rate * 1e9
            assert send["left_ns"] - send["started_ns"] >= line_ns - 1
            assert (send["not_after_ns"] > 0) == (slotting == "turns")
        assert {"slot_misses", "slot_trims"} <= set(trace["counts"])
        assert trace["counts"]["slot_misses"] == len(trace["misses"])
        assert slotting == "turns" or trace["counts"]["slot_misses"] == trace["counts"]["slot_trims"] == 0


def test_small_messages_leave_at_once_until_the_headroom_is_used_up(tmp_path) -> None:
    def program(comm):
        comm.all_reduce(np.ones(100, np.float32))
        engine = comm._job.loop.engine
        assert 0 < engine.express.rate_bytes_per_s < 0.01 * 100e6 / 2
        engine.express = Express(1.0, 1)
        comm.all_reduce(np.ones(100, np.float32))

    environ = {"DETCOLL_SLOTTING": "turns", "DETCOLL_TRACE": str(tmp_path)}
    run_ranks(4, program, topology=lines(2, 2), environ=environ)
    windows: dict[int, set[bool]] = {0: set(), 1: set()}
    for rank in range(4):
        for send in json.loads((tmp_path / f"rank{rank}.json").read_text())["sends"]:
            windows[send["sequence"]].add(send["not_after_ns"] > 0)
    assert windows == {0: {False}, 1: {True}}


@pytest.mark.parametrize("transport", ["shm", "tcp", "gloo"])
def test_processes_of_detcoll_run(transport: str) -> None:
    if transport == "gloo":
        pytest.importorskip("torch")
    ended = launch(2, "calls.py", "containers", transport)
    assert ended.code == 0, ended.err
    assert ended.said == {rank: [transport] for rank in range(2)}


def test_processes_of_mpiexec(mpiexec: list[str]) -> None:
    ended = launch(3, "calls.py", "containers", "mpi", launcher=[*mpiexec, "-n", "3"])
    assert ended.code == 0, ended.err
    assert ended.said == {rank: ["mpi"] for rank in range(3)}


def test_calls_that_differ_under_mpi_raise_on_every_rank(mpiexec: list[str]) -> None:
    ended = launch(3, "calls.py", "differ", "mpi", launcher=[*mpiexec, "-n", "3"])
    assert ended.code == 0, ended.err
    assert sorted(ended.said) == [0, 1, 2]
    for said in ended.said.values():
        assert len(said) == 16
        for kind, text in said:
            assert kind == "PlanMismatch", text
            assert len(re.findall("rank [0-9] called ", text)) == 2
            assert re.search("called all_reduce of [0-9]+ float32, sum", text)
            assert "{" not in text


def test_a_frozen_rank_keeps_no_mpi_job_alive(mpiexec: list[str]) -> None:
    ended = launch(3, "calls.py", "freeze_one", launcher=[*mpiexec, "-n", "3"])
    assert ended.code != 0
    assert {rank: [kind for kind, _ in said] for rank, said in ended.said.items()} == {
        0: ["DeadlineMissed"],
        2: ["DeadlineMissed"],
    }
    texts = [text for said in ended.said.values() for _, text in said]
    assert all("it waits for rank 1, which has not begun it" in text for text in texts)
    assert "SIGALRM" in ended.err


def test_mpi_starts_on_no_rank_unless_all_have_it(mpiexec: list[str]) -> None:
    ended = launch(3, "calls.py", "one_without_mpi4py", launcher=[*mpiexec, "-n", "3"])
    assert ended.code == 0, ended.err
    for [[(kind, text), is_started]] in ended.said.values():
        assert kind == "TransportUnavailable"
        assert "on rank 1, mpi4py does not load" in text
        assert not is_started
    assert len(ended.said) == 3


def test_memory_does_not_grow_with_the_number_of_operations() -> None:
    ended = launch_forked(2, "calls.py", "many_operations", 1250)
    assert ended.code == 0, ended.err
    for (grown_bytes,) in ended.said.values():
        assert grown_bytes < 8e6  # traces of 10,000 operations are 2 MB


def test_processes_of_two_jobs_at_once_of_which_one_has_another_folder(tmp_path) -> None:
    answers: list[object] = [None, None]

    def job(index: int) -> None:
        answers[index] = launch(2, "calls.py", "containers", "slotted", cwd=(None, tmp_path)[index])

    threads = [threading.Thread(target=job, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for ended in answers:
        assert ended.code == 0, ended.err
        assert ended.said == {rank: ["slotted"] for rank in range(2)}


@pytest.mark.parametrize("ranks", [(2, 2), (3, 2), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("mode", list(Slotting))
def test_what_a_trace_says_of_the_calendar_adds_up(ranks: tuple[int, ...], mode: Slotting) -> None:
    topology = lines(*ranks)
    calendar = build_calendar(topology, mode)
    for index, site in enumerate(topology.sites):
        facts = [calendar_facts(calendar, topology, rank) for rank in site.ranks]
        if mode is Slotting.OFF:
            assert facts == [None] * len(site.ranks)
            continue
        windows = calendar.sites[index].windows
        in_turn = calendar.mode is Slotting.TURNS and bool(windows)
        shares = [fact["line_share"] for fact in facts]
        assert 0.9 < (max(shares) if in_turn else sum(shares)) <= 0.99 + 1e-9
        for fact in facts:
            assert fact["mode"] == calendar.mode.value
            assert fact["rates_bytes_per_s"] == [calendar.rate_bytes_per_s(index, j) for j in range(len(ranks))]
            assert all(
                burst >= rate * 0.004
                for burst, rate in zip(fact["burst_bytes"], fact["rates_bytes_per_s"], strict=True)
            )
