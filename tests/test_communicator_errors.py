"""What goes wrong is told on every rank, nobody hangs, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec

import msgspec
import numpy as np
import pytest
from devices import until
from forked import PLAIN, TORCH, launch_forked
from ranks import PROGRAMS, attempt, give_up_after, grouped, lines, run_ranks

from detcoll.communicator import Communicator, _ending, _said
from detcoll.errors import Closed, ConnectError, DeadlineMissed, PeerLost, PlanMismatch, TransportError, UsageError
from detcoll.job.settings import Facts, agree
from detcoll.runtime import loop
from detcoll.runtime.engine import LARGEST_ACTIVE
from detcoll.topology import Topology

PLANNED = [("shm", None), ("slotted", None), ("slotted", lines(2, 2)), ("shm", grouped(2, 2)), ("slotted", lines(1, 3))]

NEEDS_TORCH = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")

COMPARED = [
    *PLANNED,
    pytest.param("gloo", None, marks=NEEDS_TORCH),
]
"""Gloo does collectives itself, by other ways than plans or shared memory."""


def read_only() -> np.ndarray:
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    return array


BAD_CALLS: dict[str, Callable[[Communicator], object]] = {
    "contiguous": lambda comm: comm.all_reduce(np.ones((4, 4), np.float32)[:, 1]),
    "writ": lambda comm: comm.all_reduce(read_only()),
    "longdouble|float128": lambda comm: comm.all_reduce(np.ones(3, np.longdouble)),
    "op='median'": lambda comm: comm.all_reduce(np.ones(3), op="median"),
    "op='avg' of int32": lambda comm: comm.all_reduce(np.ones(3, np.int32), op="avg"),
    "op='sum' of bool .* Count with": lambda comm: comm.all_reduce(np.ones(0, bool)),
    "op='max' of complex64": lambda comm: comm.all_reduce(np.ones(3, np.complex64), op="max"),
    "op='band' of float64": lambda comm: comm.all_reduce(np.ones(()), op="band"),
    "root=2 must be": lambda comm: comm.broadcast(np.ones(3), root=2),
    "root=-1 must be": lambda comm: comm.broadcast(np.ones(3), root=-1),
    "root=True must be": lambda comm: comm.broadcast(np.ones(3), root=True),
    "root='0' must be": lambda comm: comm.broadcast(np.ones(3), root="0"),  # type: ignore[arg-type]
    "x=3.0": lambda comm: comm.all_reduce(3.0),
    r"x=\[\] is empty": lambda comm: comm.all_reduce([]),
    r"x\[1\]": lambda comm: comm.all_reduce([np.ones(3), np.ones(3, np.float32)]),
    "kind='shuffle' is not a collective known here": lambda comm: comm.predict("shuffle", 4),
    "nbytes=3 must be": lambda comm: comm.predict("all_reduce", 3),
    "nbytes=-8 must be 0 or a positive": lambda comm: comm.predict("all_reduce", -8),
}


@pytest.mark.parametrize("transport", ["shm", "slotted"])
def test_bad_arguments_are_refused_before_anything_moves(transport: str) -> None:
    def program(comm):
        for text, call in BAD_CALLS.items():
            with pytest.raises(UsageError, match=text):
                call(comm)
            x = np.ones(5, np.float32)
            comm.all_reduce(x)
            assert (x == 2).all(), "the communicator is as before"

    run_ranks(2, program, transport=transport)


@pytest.mark.parametrize("topology", [None, lines(2, 2)])
def test_what_one_rank_refuses_ends_for_all_and_the_next_call_works(topology: Topology | None) -> None:
    def program(comm):
        with pytest.raises(UsageError, match="median" if comm.rank == 1 else "rank 1 refused the call: op='median'"):
            comm.all_reduce(np.ones(5), op="median" if comm.rank == 1 else "sum")
        x = np.ones(5)
        comm.all_reduce(x)
        assert (x == 4).all()

    run_ranks(4, program, transport="slotted", topology=topology)


def test_a_group_that_has_failed_costs_no_other_group() -> None:
    def program(comm):
        group = comm.group([0, 1], "pair") if comm.rank < 2 else None
        if group is not None:
            group.timeout = 0.3
            assert group.timeout == 0.3
        if comm.rank == 0:
            with pytest.raises(DeadlineMissed, match=r"group 'pair' was not finished after 0\.3 s without progress"):
                group.all_reduce(np.ones(5))
        comm.barrier()
        if group is not None:
            with pytest.raises((Closed, DeadlineMissed), match="waits for rank 1"):
                group.barrier()
        comm.barrier()

    run_ranks(3, program, transport="slotted")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"timeout": 0}, "timeout=0 must be"),
        ({"timeout": True}, "timeout=True must be"),
        ({"timeout": "5"}, "timeout='5' must be"),
        ({"transport": "pigeon"}, "transport='pigeon' is not known"),
        ({"transport": 5}, "transport=5 must be"),
        ({"topology": lines(1, 2)}, "declares 3 ranks but the world has 2"),
        ({"topology": "/nonexistent.toml"}, "cannot be read"),
        ({"environ": {"DETCOLL_SITES": "3"}}, "DETCOLL_SITES='3' must divide"),
        ({"environ": {"DETCOLL_PORTS": "9-5"}}, "DETCOLL_PORTS='9-5' must be"),
        ({"environ": {"DETCOLL_DSCP": "64"}}, "DETCOLL_DSCP='64' must be a number from 0 to 63"),
        ({"environ": {"DETCOLL_SLOTTING": "both"}}, "slotting='both' must be"),
        ({"environ": {"DETCOLL_LOG": "loud"}}, "DETCOLL_LOG='loud' must be"),
        ({"environ": {"DETCOLL_SITE": "mars"}, "topology": lines(1, 1)}, "'mars'; the topology has s0, s1"),
        ({"environ": [{"DETCOLL_SITE": "s0"}, {}], "topology": lines(1, 1)}, r"ranks \[1\] lack it"),
        ({"environ": {"DETCOLL_SITE": "s0"}, "topology": lines(1, 1)}, "declares 1 ranks but 2 are in it"),
        ({"transport": ["shm", "slotted"]}, "disagree about transport: rank 0 has 'shm', rank 1 has 'slotted'"),
        (
            {"topology": [lines(1, 1), None]},
            r"rank 0 has 2 sites for 2 ranks \('s0' of 1, 's1' of 1\) with lines, rank 1 has 1 site for 2 ranks",
        ),
        (
            {"topology": [lines(1, 1), lines(1, 1, rate_bytes_per_s=9e6)]},
            r"rank 1 has the same with other ranks in them, rates or delays; give all ranks the same",
        ),
        ({"environ": [{"DETCOLL_COMPARE": "0"}, {}]}, "ranks disagree about compare"),
        ({"environ": [{"DETCOLL_CONGESTION": "reno"}, {}]}, "ranks disagree about congestion"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, object], text: str) -> None:
    for answer in attempt(2, lambda comm: None, **settings):
        assert isinstance(answer, UsageError)
        with pytest.raises(UsageError, match=text):
            raise answer


def test_turns_of_more_than_two_sites_are_refused() -> None:
    for answer in attempt(3, lambda comm: None, topology=lines(1, 1, 1), environ={"DETCOLL_SLOTTING": "turns"}):
        assert isinstance(answer, UsageError)
        assert "slotting='turns' is for two sites, and the topology has 3; expected calendar" in str(answer)


def test_another_version_is_refused() -> None:
    facts = Facts("0.1", "auto", "digest", False, "", "cubic", "", "host", "clock", "none", (0, 1))
    agree([facts, facts])
    with pytest.raises(UsageError, match=r"disagree about version: rank 0 has '0\.1', rank 1 has '0\.2'"):
        agree([facts, msgspec.structs.replace(facts, version="0.2")])


TOPOLOGY = '[[site]]\nname="a"\nranks=1\nuplink="1 Gbit/s"\n[[site]]\nname="b"\nranks=1\nuplink="1 Gbit/s"\n'
LINK = '[[link]]\nbetween=["a","b"]\none_way="1 ms"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOPOLOGY, "lacks 1 links: a - b"),
        (TOPOLOGY + LINK + 'colour="red"\n', "unknown keys colour"),
        (TOPOLOGY.replace("ranks=1", "ranks=2", 1) + LINK, "declares 3 ranks but the world has 2"),
        (TOPOLOGY.replace('"1 Gbit/s"', '"1"', 1) + LINK, "uplink"),
        ("[[site]", "is not TOML"),
    ],
)
def test_topology_files_that_cannot_be_used(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "topology.toml"
    path.write_text(text)
    for answer in attempt(2, lambda comm: None, environ={"DETCOLL_TOPOLOGY": str(path)}):
        assert isinstance(answer, UsageError)
        with pytest.raises(UsageError, match=message):
            raise answer


def ones(elems: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(elems, dtype)


DIFFERENT: dict[str, Callable[[Communicator], object]] = {
    "of 101 float32": lambda comm: comm.all_reduce(ones(101)),
    "of 90000 float32": lambda comm: comm.all_reduce(ones(90_000)),
    "of 0 float32": lambda comm: comm.all_reduce(ones(0)),
    "of 100 int32": lambda comm: comm.all_reduce(ones(100, np.int32)),
    "of 100 float64": lambda comm: comm.all_reduce(ones(100, np.float64)),
    "float32, max": lambda comm: comm.all_reduce(ones(100), op="max"),
    "broadcast of 100 float32, root 0": lambda comm: comm.broadcast(ones(100)),
    "called barrier": lambda comm: comm.barrier(),
    "of 100 float32 in 2 arrays, sum": lambda comm: comm.all_reduce([ones(50), ones(50)]),
    "of 100 float32, sum (weights)": lambda comm: comm.all_reduce(ones(100), name="weights"),
}


@pytest.mark.parametrize(
    ("text", "transport", "topology"),
    [(text, *place) for place in COMPARED[:2] for text in DIFFERENT]
    + [(text, *place) for place in COMPARED[2:-1] for text in ("of 101 float32", "called barrier")]
    + [pytest.param(text, *COMPARED[-1].values, marks=COMPARED[-1].marks) for text in DIFFERENT],
)
def test_a_rank_that_calls_something_else(text: str, transport: str, topology: Topology | None) -> None:
    def program(comm):
        comm.barrier()
        if comm.rank == 2:
            DIFFERENT[text](comm)
        else:
            comm.all_reduce(np.ones(100, np.float32))

    for rank, answer in enumerate(attempt(4, program, transport=transport, topology=topology, stay=True)):
        assert isinstance(answer, PlanMismatch), f"rank {rank}: {answer!r}"
        assert text in str(answer)
        assert "called all_reduce of 100 float32, sum" in str(answer)


@NEEDS_TORCH
def test_a_type_that_gloo_does_not_know_ends_no_job() -> None:
    def program(comm):
        with contextlib.suppress(UsageError):
            comm.all_reduce(np.ones(100, np.int16))
        x = np.ones(100, np.float32)
        comm.all_reduce(x)
        assert (x == 2).all()

    run_ranks(2, program, transport="gloo")


@pytest.mark.parametrize(("transport", "topology"), COMPARED)
def test_ranks_that_broadcast_from_different_roots(transport: str, topology: Topology | None) -> None:
    def program(comm):
        comm.broadcast(np.ones(100, np.float32), root=1 if comm.rank == 2 else 0)

    for rank, answer in enumerate(attempt(4, program, transport=transport, topology=topology, stay=True)):
        assert isinstance(answer, PlanMismatch), f"rank {rank}: {answer!r}"
        assert "root 0" in str(answer)
        assert "root 1" in str(answer)


def test_after_a_mismatch_the_communicator_is_closed() -> None:
    def differ(comm):
        comm.barrier()  # no rank is still opening when the other calls
        comm.all_reduce(np.ones(3 + comm.rank, np.float32))

    def program(comm):
        with pytest.raises(PlanMismatch):
            differ(comm)
        with pytest.raises(Closed) as closed:
            comm.barrier()
        assert isinstance(closed.value.__cause__, PlanMismatch)
        comm.finalize()
        comm.finalize()
        with pytest.raises(Closed, match="was finalized"):
            comm.barrier()

    run_ranks(2, program)


@pytest.mark.parametrize(("transport", "topology"), PLANNED)
def test_a_rank_that_never_calls_is_named(transport: str, topology: Topology | None) -> None:
    def program(comm):
        comm.barrier()
        give_up_after(comm, 1.0)
        if comm.rank != 3:
            comm.all_reduce(np.ones(50_000, np.float32))

    answers = attempt(4, program, transport=transport, topology=topology, stay=True)
    for answer in answers[:3]:
        assert isinstance(answer, DeadlineMissed)
        assert "all_reduce number 1 was not finished after 1 s " in str(answer)
        assert re.search("waits for rank 3, which has not (called|begun) it", str(answer))


def test_who_has_nothing_to_do_with_the_missing_rank_names_it_too() -> None:
    """One element is folded by rank 3: rank 0 hears of nobody else, and its deadline comes first."""
    called = threading.Event()

    def program(comm):
        comm.barrier()
        give_up_after(comm, 2.0)
        if comm.rank == 1:
            return
        if comm.rank != 0:
            assert called.wait(20)
        work = comm.all_reduce(np.ones(1), async_op=True)
        called.set()
        work.wait()

    answers = attempt(4, program, transport="slotted", stay=True)
    for rank in (0, 2, 3):
        assert isinstance(answers[rank], DeadlineMissed)
        assert (
            "waits for rank 1, which has not called it; the latest call that it made of this group is number 0"
            in str(answers[rank])
        )


def test_who_knows_nothing_better_names_its_peers() -> None:
    """Rank 1 has said hello, but what it should send never comes."""

    def program(comm):
        comm.barrier()
        give_up_after(comm, 2.0)
        if comm.rank == 1:
            comm._job.loop.engine.worked = lambda operation, step, now_ns: None
        comm.all_reduce(np.ones(50_000, np.float32))

    answers = attempt(2, program, transport="slotted", stay=True)
    assert all(isinstance(answer, DeadlineMissed) for answer in answers)
    for answer in answers:
        assert "not finished after 2 s without progress (the timeout of the call)" in str(answer)
        assert re.search(r"; it waits for rank [01] \(\d messages?\)$", str(answer))


def test_a_rank_that_never_comes_is_named() -> None:
    answers = attempt(3, lambda comm: None, timeout=3.0, absent=[1])
    for rank in (0, 2):
        assert isinstance(answers[rank], ConnectError)
        assert "rank 1 never came" in str(answers[rank])


def test_what_one_rank_aborts_for_is_shown_to_all() -> None:
    def program(comm):
        comm.barrier()
        if comm.rank == 1:
            raise KeyError("lost the key")
        comm.all_reduce(np.ones(10))

    first, second, third = attempt(3, program)
    assert isinstance(second, KeyError)
    for answer in (first, third):
        assert isinstance(answer, TransportError)
        assert str(answer) == "rank 1 gave up: KeyError: 'lost the key'"


def test_work_under_way_fails_with_its_communicator() -> None:
    started = threading.Barrier(2)

    def program(comm):
        works = [comm.all_reduce(np.ones(10), async_op=True) for _ in range(30)] if comm.rank == 0 else []
        started.wait(20)
        if comm.rank == 1:
            comm.abort("had enough")
            return []
        for work in works:
            with pytest.raises(TransportError, match="had enough"):
                work.wait()
        return works

    run_ranks(2, program)


def test_a_wait_with_a_timeout_may_be_repeated() -> None:
    come = threading.Event()

    def program(comm):
        x = np.ones(10)
        if comm.rank == 1:
            assert come.wait(20)
        work = comm.all_reduce(x, async_op=True)
        if comm.rank == 0:
            with pytest.raises(DeadlineMissed, match=r"all_reduce number 0 is not finished after 0\.01 s"):
                work.wait(0.01)
            come.set()
        work.wait()
        assert (x == 2).all()

    run_ranks(2, program)


def test_finalize_tells_what_was_not_finished() -> None:
    told = threading.Event()

    def program(comm):
        comm.barrier()
        if comm.rank == 0:
            work = comm.all_reduce(np.ones(10), async_op=True)
            with pytest.raises(DeadlineMissed, match="closing: collectives were still under way"):
                comm.finalize(0.2)
            told.set()
            with pytest.raises(DeadlineMissed, match="closing"):
                work.wait()
        assert told.wait(20)

    run_ranks(2, program)


def test_finalize_tells_nothing_of_calls_that_were_not_its_own() -> None:
    """Rank 1 has none under way when rank 0 gives up one of its own, and hears of that in the middle of finalize."""
    begun = threading.Event()

    def program(comm):
        comm.barrier()
        if comm.rank == 0:
            comm.all_reduce(np.ones(10), async_op=True)
            assert begun.wait(20)
            with pytest.raises(DeadlineMissed):
                comm.finalize(0.1)
            return
        loop, world = comm._job.loop, comm._group
        drain = loop.drain

        def drain_late(deadline_ns: int) -> bool:
            begun.set()
            until(lambda: comm._job.failure(world))
            return drain(deadline_ns)

        loop.drain = drain_late
        comm.finalize()

    run_ranks(2, program, transport="slotted")


def call_often(comm: Communicator) -> None:
    for _ in range(100):
        comm.all_reduce(np.ones(10), async_op=True)


def test_more_than_the_queue_holds_waits_no_longer_than_its_deadline(monkeypatch) -> None:
    monkeypatch.setattr(loop, "LARGEST_QUEUE", 20)
    full = threading.Event()

    def program(comm):
        if comm.rank == 1:
            assert full.wait(20)
            with contextlib.suppress(DeadlineMissed):
                comm.finalize()
            return
        try:
            with pytest.raises((DeadlineMissed, Closed)):
                call_often(comm)
        finally:
            full.set()

    run_ranks(2, program, transport="slotted", patience=1.0)


def test_the_progress_thread_sleeps_although_operations_wait_to_be_started() -> None:
    asleep = threading.Event()

    class Watched:
        """An epoll that tells when it is waited on with operations left to start."""

        def __init__(self, thread, world) -> None:
            self._world, self._inner, self.close = world, thread._waiter, thread._waiter.close

        def poll(self, timeout):
            if len(self._world.active) == LARGEST_ACTIVE and self._world.waiting and timeout > 0.01:
                asleep.set()
            return self._inner.poll(timeout)

    def program(comm):
        if comm.rank == 0:
            thread = comm._job.loop
            thread._waiter = Watched(thread, thread.engine.groups[comm._group.id])
        else:
            assert asleep.wait(20)
        works = [comm.all_reduce(np.ones(10), async_op=True) for _ in range(50)]
        for work in works:
            work.wait()

    run_ranks(2, program, transport="slotted")


def test_a_killed_rank_is_lost_to_all_others() -> None:
    for environ in ({}, {"DETCOLL_TRANSPORT": "slotted"}):
        ended = launch_forked(3, "calls.py", "killed", environ=environ)
        assert ended.code == -signal.SIGKILL
        assert sorted(ended.said) == [0, 1]
        for (said,) in ended.said.values():
            kind, text = said["seen"]
            assert kind == "PeerLost"
            assert re.search("rank 2 is lost|process of rank 2 ended|rank 2: its connection ended", text)
            assert said["in_time"]
            assert said["left"] == []


@pytest.mark.parametrize("transport", ["shm", "slotted", "tcp", pytest.param("gloo", marks=NEEDS_TORCH)])
def test_ranks_may_end_without_finalize(transport: str) -> None:
    modules, environ = TORCH if transport == "gloo" else PLAIN, {"TEST_WHOLE_END": "1"}
    ended = launch_forked(2, "calls.py", "no_finalize", transport, modules=modules, environ=environ)
    assert (ended.code, ended.said, ended.err) == (0, {0: [True], 1: [True]}, "")


def test_who_leaves_early_is_lost() -> None:
    ended = launch_forked(3, "calls.py", "leaves_early")
    for rank in (1, 2):
        assert ended.said[rank][0][0] == PeerLost.__name__
        assert "rank 0" in ended.said[rank][0][1]


def test_an_exception_inside_with_ends_all() -> None:
    ended = launch_forked(3, "calls.py", "raises")
    assert ended.said[1] == [["KeyError", "'lost the key'"]]
    for rank in (0, 2):
        assert ended.said[rank] == [["TransportError", "rank 1 gave up: KeyError: 'lost the key'"]]


@pytest.mark.parametrize("transport", ["slotted", "shm"])
def test_a_program_that_ends_by_an_exception_is_told_to_be_the_cause(transport: str) -> None:
    """Without ``with``; those that are in `finalize` meanwhile do not say that others failed to come."""
    ended = launch_forked(3, "calls.py", "ends_by_an_exception", transport)
    reason = "rank 1 gave up: its program ended: KeyError: 'lost the key'"
    assert ended.said.pop(2) == [["TransportError", reason]]
    assert all(said == [["TransportError", reason]] for said in ended.said.values())
    assert not re.search("rank [0-9, ]+ (did not|never)", ended.err), ended.err


def test_an_exception_that_was_caught_does_not_end_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools leave it where the interpreter keeps the one that nobody caught."""
    try:
        raise KeyError("lost the key")
    except KeyError as error:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
    assert _ending() is None

    async def failing() -> None:
        raise KeyError("lost the key")

    async def main() -> BaseException | None:
        task = asyncio.create_task(failing())
        await asyncio.wait([task])
        return task.exception()

    monkeypatch.setattr(sys, "last_value", asyncio.run(main()), raising=False)
    assert _ending() is None


def test_a_program_may_end_by_an_exception_without_a_text() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    assert "Mute" in _said(Mute())
    assert _said(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert _said(ValueError("no such batch")) == "ValueError: no such batch"


def test_a_forked_child_may_not_use_the_communicator() -> None:
    ended = launch_forked(2, "calls.py", "forked")
    assert ended.code == 0, ended.err
    for (said,) in ended.said.values():
        assert said[0] == "UsageError"
        assert "made before a fork" in said[1]
        assert said[2] == 2.0


def test_the_life_of_a_communicator() -> None:
    ended = launch_forked(2, "calls.py", "lifecycle")
    assert ended.code == 0, ended.err
    for (said,) in ended.said.values():
        errors, total, left = said
        assert [error[0] for error in errors] == ["UsageError", "UsageError", "Closed"]
        assert "called twice" in errors[0][1]
        assert (total, left) == (2.0, [])


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root may become another user, by setpriv"
)
def test_another_user() -> None:
    kinds = ("inh-caps", "ambient-caps", "bounding-set")
    may_read_files = [f"--{kind}=-all,+dac_read_search" for kind in kinds]  # this Python may be in a home
    command = [sys.executable, "-m", "detcoll", "run", "-n", "2", str(PROGRAMS / "calls.py"), "small", "slotted"]
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *may_read_files, *command],
        cwd="/", capture_output=True, text=True, timeout=60, check=False,
        env={name: value for name, value in os.environ.items() if name != "HOME"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('["slotted", "exchange", 3.0]') == 2
