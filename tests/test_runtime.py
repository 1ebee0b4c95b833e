"""The runtime over the in-memory fabric, with faults by rule, and its parts alone."""

from __future__ import annotations

import os
import re
import sys
import threading
import time

import numpy as np
import pytest
from ranks import attempt, grouped, lines, run_ranks

from detcoll import registry
from detcoll.descriptor import HELLO_BYTES
from detcoll.errors import Closed, DeadlineMissed, PlanMismatch, TransportError, UsageError
from detcoll.fold import reference
from detcoll.runtime import Descriptor, Work
from detcoll.runtime.group import world
from detcoll.runtime.memory import ScratchPool
from detcoll.runtime.native import NativeRunner, Submission
from detcoll.runtime.routes import acquaintances
from detcoll.testing import Delay, Drop, Faults, FaultyTransport, Kill, MemoryTransport
from detcoll.trace import Trace
from detcoll.transport import NativeCall, NativeCollectives, Transport
from detcoll.types import ReduceOp

TOPOLOGIES = {"1": None, "2+2": grouped(2, 2), "wide 2+2": lines(2, 2), "wide 1+1+2": lines(1, 1, 2)}


@pytest.fixture
def use(monkeypatch):
    """Let ranks open a transport that this test made."""
    load = registry.load

    def with_transport(transport: Transport) -> str:
        monkeypatch.setattr(registry, "load", lambda name: transport if name == "made" else load(name))
        return "made"

    return with_transport


def sums(comm) -> None:
    """Run all-reduces of several sizes, some at once, and check each bit."""
    groups = [site.ranks for site in comm.topology.sites]
    cases = []
    for elems in (1, 7, 1000, 5001, 70_000):
        given = [np.random.default_rng([elems, rank]).standard_normal(elems).astype(np.float32) for rank in range(4)]
        mine = given[comm.rank].copy()
        cases.append((comm.all_reduce(mine, async_op=True), mine, given))
    for work, mine, given in cases:
        work.wait()
        assert mine.tobytes() == reference(ReduceOp.SUM, given, groups, np.dtype(np.float32)).tobytes()
    comm.broadcast(mine, root=3)
    comm.barrier()


@pytest.mark.parametrize(
    "site_of", [[0], [0, 0], [0, 1], [0, 0, 1, 1], [0] * 7, [0, 1, 1, 2, 2, 2], [2, 0, 1, 0, 2], list(range(7))]
)
def test_acquaintances_know_each_other_and_connect_all_ranks(site_of: list[int]) -> None:
    known = [acquaintances(rank, site_of) for rank in range(len(site_of))]
    assert all(rank in known[other] and other != rank for rank, others in enumerate(known) for other in others)
    reached, border = {0}, [0]
    while border:
        found = known[border.pop()] - reached
        reached |= found
        border.extend(found)
    assert reached == set(range(len(site_of)))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("timed", [False, True])
def test_over_memory(use, topology: str, timed: bool) -> None:
    run_ranks(4, sums, transport=use(MemoryTransport(timed=timed)), topology=TOPOLOGIES[topology])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_delays_change_no_bit(use, topology: str, seed: int) -> None:
    faults = Faults(seed=seed, delay=0.3, delay_ns=3_000_000)
    run_ranks(4, sums, transport=use(FaultyTransport(MemoryTransport(), faults)), topology=TOPOLOGIES[topology])


@pytest.mark.parametrize(("topology", "step"), [("1", 0), ("1", 5), ("wide 2+2", 2), ("wide 2+2", 9)])
def test_a_message_that_never_arrives_is_missed_by_all(use, topology: str, step: int) -> None:
    transport = FaultyTransport(MemoryTransport(), Faults({(1, step): Drop()}))
    answers = attempt(4, sums, transport=use(transport), topology=TOPOLOGIES[topology], patience=1.0, stay=True)
    assert all(isinstance(answer, DeadlineMissed) for answer in answers), answers
    told = "not finished after 1 s without progress (the timeout of the call); it waits for rank"
    assert all(told in str(answer) for answer in answers)


@pytest.mark.parametrize("step", [0, 1, 4, 9])
@pytest.mark.parametrize("topology", ["1", "wide 1+1+2"])
def test_an_endpoint_that_dies_ends_all(use, topology: str, step: int) -> None:
    transport = FaultyTransport(MemoryTransport(), Faults({(2, step): Kill()}))
    answers = attempt(4, sums, transport=use(transport), topology=TOPOLOGIES[topology])
    assert isinstance(answers[2], Closed)
    for rank in (0, 1, 3):
        assert isinstance(answers[rank], TransportError), answers[rank]
        # Who sees the endpoint gone asks why, and goes without the reason if that takes too long.
        assert re.search(f"killed rank 2 at step {step}|^rank 2 is gone$", str(answers[rank]))


def test_a_late_message_is_no_loss(use) -> None:
    transport = FaultyTransport(MemoryTransport(), Faults({(0, 1): Delay(200_000_000)}))
    run_ranks(4, sums, transport=use(transport), timeout=20)


def test_nothing_of_another_collective_is_passed_on(use) -> None:
    """Rank 3 folds for all, and gets what rank 2 sends before it hears what rank 2 called."""
    transport = FaultyTransport(MemoryTransport(), Faults({(2, 0): Delay(200_000_000)}))

    def differ(comm):
        comm.barrier()  # no rank is still opening when another hears of the mismatch
        comm.all_reduce(np.ones(1), op="max" if comm.rank == 2 else "sum")

    def program(comm):
        with pytest.raises(PlanMismatch, match="float64, max"):
            differ(comm)

    run_ranks(4, program, transport=use(transport))


def test_a_failing_progress_thread_fails_its_operations(use, monkeypatch) -> None:
    def program(comm):
        comm.barrier()
        if comm.rank == 1:
            comm._job.loop.engine.worked = None
        comm.all_reduce(np.ones(10, np.float32))

    answers = attempt(2, program, transport=use(MemoryTransport()))
    assert all(isinstance(answer, TransportError) for answer in answers)
    assert str(answers[0]) == "rank 1 gave up: the progress thread failed: " + str(answers[1]).partition("failed: ")[2]
    assert "rank 1: the progress thread failed: TypeError" in str(answers[1])


def test_a_descriptor_fits_its_record_and_shows_both_sides() -> None:
    ours = Descriptor(2**63 - 1, "all_reduce", "prod", "bfloat16", 2**40, 2**16 - 1, 10**6)
    assert len(ours.encode()) == HELLO_BYTES
    ours.compare(0, 1, ours.encode())
    theirs = Descriptor(3, "broadcast", "sum", "int8", 5, 2)
    both = (
        "rank 0 called all_reduce of 1099511627776 bfloat16 in 1000000 arrays, prod, rank 1 called broadcast of 5 int8"
    )
    with pytest.raises(PlanMismatch, match=rf"{both}, root 2; they differ in the number of the call \(.*the kind"):
        ours.compare(0, 1, theirs.encode())
    for unreadable in (b"\xff" * HELLO_BYTES, Descriptor(3, "unknown", "sum", "int8", 5, 2).encode()):
        with pytest.raises(PlanMismatch, match=r"rank 1 called something that this rank cannot read$"):
            ours.compare(0, 1, unreadable)
    with pytest.raises(UsageError, match="too long"):
        Descriptor(1, "x" * HELLO_BYTES, "sum", "int8", 5, 2).encode()


def test_the_scratch_pool_gives_memory_again_and_forgets_old_sizes() -> None:
    pool = ScratchPool()
    first = pool.take(100)
    pool.give(first)
    assert pool.take(100) is first
    assert pool.take(100) is not first
    for nbytes in range(1, 50):
        pool.give(pool.take(nbytes))
    assert sum(len(free) for free in pool._free.values()) <= 5


def test_work_ends_once_and_tells_its_error_every_time() -> None:
    work = Work("sum number 5")
    assert not work.done()
    with pytest.raises(DeadlineMissed, match="sum number 5 is not finished after 0 s"):
        work.wait(0)
    work.finish()
    work.finish(TransportError("too late to matter"))
    work.wait()
    work.wait()
    failed = Work("other")
    failed.finish(TransportError("broken"))
    for _ in range(2):
        with pytest.raises(TransportError, match="broken"):
            failed.wait()
    assert failed.done()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_runs_its_own_callbacks_only() -> None:
    work, gate, begun = Work("sum"), threading.Event(), threading.Event()
    work.finish()
    ran: list[str] = []
    work.add_done_callback(lambda _: (begun.set(), gate.wait(20)))
    assert begun.wait(20)
    work.add_done_callback(lambda _: ran.append("parent's"))
    pid = os.fork()
    if not pid:
        done = threading.Event()
        work.add_done_callback(lambda _: (ran.append("child's"), done.set()))
        os._exit(0 if done.wait(20) and ran == ["child's"] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    gate.set()


ALL = MemoryTransport().capabilities


class Recorded(NativeCollectives):
    """Collectives that only note in which order they are called."""

    algorithm = "recorded"

    def __init__(self) -> None:
        self.roots: list[int] = []
        self.deadlines_ns: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def run(self, call, deadline_ns) -> None:
        self.begun.set()
        if call.kind == "all_reduce":
            raise ValueError("no sums today")
        if call.kind == "barrier":
            raise DeadlineMissed("nobody came")
        assert self.gate.wait(20)
        self.roots.append(call.root)
        self.deadlines_ns.append(deadline_ns)


def deadline(seconds: float = 20.0) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


@pytest.fixture
def native():
    """Give a runner, its collectives, a way to call it, and the failures it told."""
    collectives, told = Recorded(), []
    runner = NativeRunner(collectives, ALL, world([0]), 0, Trace(0, 0), lambda error, is_ours: told.append(error))

    def call(kind: str, root: int = 0, wait: bool = False, seconds: float = 20.0) -> Work:
        work = Work(kind)
        timeout_ns = round(seconds * 1e9)
        native_call = Submission(
            NativeCall(kind, np.zeros(1), 1, root=root, sequence=root, timeout_ns=timeout_ns), called_ns=0
        )
        if wait and runner.run_at_once(*native_call):
            work.finish()
        else:
            runner.run(native_call, work)
        return work

    yield runner, collectives, call, told
    collectives.gate.set()
    runner.drain(deadline())
    assert runner._thread is None or not runner._thread.is_alive()


def test_native_calls_keep_their_order_whether_waited_for_or_not(native) -> None:
    runner, collectives, call, _ = native
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        works = [call("broadcast", root, wait=root % 3 == 0) for root in range(3000)]
        for work in works:
            work.wait(20)
    finally:
        sys.setswitchinterval(before)
    assert collectives.roots == list(range(3000))
    assert runner._queued == 0


@pytest.mark.parametrize(("kind", "error"), [("all_reduce", TransportError), ("barrier", DeadlineMissed)])
def test_a_native_failure_ends_what_is_queued_and_refuses_more(native, kind: str, error: type[Exception]) -> None:
    _, collectives, call, told = native
    collectives.gate.clear()
    first, failing, behind = call("broadcast"), call(kind), call("broadcast")
    collectives.gate.set()
    first.wait(20)
    for work in (failing, behind):
        with pytest.raises(error):
            work.wait(20)
    assert [type(problem) for problem in told] == [error]
    with pytest.raises(Closed):
        call("broadcast")


def test_waiting_for_native_calls_ahead_takes_no_time_of_a_call(native) -> None:
    _, collectives, call, _ = native
    collectives.gate.clear()
    ahead, behind = call("broadcast"), call("broadcast", seconds=5.0)
    opened_ns = time.monotonic_ns()
    collectives.gate.set()
    ahead.wait(20)
    behind.wait(20)
    assert collectives.deadlines_ns[1] >= opened_ns + 5 * 10**9


def test_draining_native_calls_waits_for_them_but_not_for_ever(native) -> None:
    runner, collectives, call, _ = native
    collectives.gate.clear()
    work = call("broadcast")
    assert collectives.begun.wait(20)
    assert not runner.drain(deadline(0.01))
    assert isinstance(runner.failure, DeadlineMissed)
    with pytest.raises(Closed):
        call("broadcast")
    collectives.gate.set()
    work.wait(20)


@pytest.mark.parametrize("wait", [False, True])
def test_the_first_native_call_after_a_failure_is_told_of_it(native, wait: bool) -> None:
    """It may have come from other ranks since the caller looked."""
    runner, _, call, _ = native
    runner.fail(PlanMismatch("ranks called different collectives"))
    for error in (PlanMismatch, Closed):
        with pytest.raises(error, match="ranks called different collectives"):
            call("broadcast", wait=wait)


def test_a_native_call_that_comes_while_the_runner_closes_is_carried_out(native) -> None:
    """It has been let in, and is put into the queue only when the runner has been told to close."""
    runner, _, call, _ = native
    put = runner._queue.put

    def late(entry: object, timeout: float | None = None) -> None:
        runner._queue.put = put
        runner.close()
        assert not runner.drain(deadline(0.05))  # it waits for what was let in
        put(entry, timeout=timeout)

    runner._queue.put = late
    work = call("broadcast")
    work._finished.wait(20)
    assert work.done()


def test_an_interrupted_native_call_leaves_nothing_to_wait_for(native) -> None:
    runner, _, call, _ = native
    put = runner._queue.put

    def interrupted(entry: object, timeout: float | None = None) -> None:
        runner._queue.put = put
        raise KeyboardInterrupt

    runner._queue.put = interrupted
    with pytest.raises(KeyboardInterrupt):
        call("broadcast")
    assert runner._queued == 0
    call("broadcast", wait=True)
    assert runner.drain(deadline())


def test_notices_come_on_the_thread_that_ends_a_call_or_at_once() -> None:
    work, heard = Work("all_reduce number 0"), []
    work.notify(lambda: heard.append(threading.current_thread().name))
    assert not heard
    ending = threading.Thread(target=work.finish, name="ending")
    ending.start()
    ending.join()
    work.notify(lambda: heard.append("at once"))
    assert heard == ["ending", "at once"]
