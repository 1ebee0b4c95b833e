"""Connections of the rendezvous that are cut, processes that die or freeze, and descriptors that run out."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from detcoll.errors import PeerLost
from detcoll.rendezvous import Aborted, Event, Lost, Session, connection, meet
from detcoll.rendezvous.channels import Dealer
from detcoll.testing.cuts import CuttingRelay
from detcoll.testing.meetings import (
    ahead,
    close_all,
    end_child,
    exchange_all,
    free_address,
    in_threads,
    meet_all,
    start_child,
    wait_for_event,
    wait_for_events,
    world_at,
)

SHORT_NS = 1_500_000_000
"""A tolerance: heartbeats show a silent path after a third of it."""


class Cuttable:
    """Ranks of which the last meets the others through a relay."""

    def __init__(self, size: int, tolerance_ns: int) -> None:
        address = free_address()
        self.relay = CuttingRelay(address)
        worlds = [world_at(rank, size, address) for rank in range(size - 1)]
        worlds.append(world_at(size - 1, size, self.relay.address))
        self.met: list[Session] = meet_all(worlds, tolerance_ns=tolerance_ns)
        assert [type(one) for one in self.met] == [Session] * size, self.met


@pytest.fixture
def cuttable() -> Iterator[Callable[..., Cuttable]]:
    made: list[Cuttable] = []

    def make(size: int, tolerance_ns: int = 30 * 10**9) -> Cuttable:
        made.append(Cuttable(size, tolerance_ns))
        return made[-1]

    yield make
    for one in made:
        close_all(one.met, seconds=2)
        one.relay.__exit__(None, None, None)


def test_no_two_jobs_of_this_process_meet_at_one_address() -> None:
    count = 1_000  # of 22,000 ports: without a memory about 23 would come twice
    assert len({free_address() for _ in range(count)}) == count


def eventfds() -> int:
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum("eventfd" in link for link in links)


def test_threads_that_end_late_give_their_descriptors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = eventfds()
    address, may_end = free_address(), threading.Event()
    met = meet_all([world_at(rank, 2, address) for rank in range(2)])
    late = [session._connection._thread for session in met]
    close = Dealer.close

    def close_late(dealer: Dealer) -> None:
        may_end.wait()
        close(dealer)

    monkeypatch.setattr(connection, "_JOIN_S", 0.0)
    monkeypatch.setattr(Dealer, "close", close_late)
    met[1].drop()
    may_end.set()
    close_all(met[:1], seconds=2)
    for thread in late:
        thread.join()
    assert eventfds() <= before


def test_a_reset_connection_is_made_again_and_nothing_is_lost_or_doubled(cuttable: Callable[..., Cuttable]) -> None:
    world = cuttable(2)
    for turn in range(8):
        world.met[0].abort("of 0", str(turn), group=turn + 1)
        world.met[1].abort("of 1", str(turn), group=turn + 1)
        world.relay.reset()
        assert exchange_all(world.met, b"%d." % turn) == [[b"%d.0" % turn, b"%d.1" % turn]] * 2
    told = [session.events() for session in world.met]
    assert told[0] == [Aborted(1, "of 1", str(turn), turn + 1) for turn in range(8)]
    assert told[1] == [Aborted(0, "of 0", str(turn), turn + 1) for turn in range(8)]


def test_a_connection_that_was_forgotten_on_the_way_is_replaced(cuttable: Callable[..., Cuttable]) -> None:
    world = cuttable(2, 3 * SHORT_NS)
    world.relay.forget()
    assert exchange_all(world.met) == [[b"0", b"1"]] * 2
    assert [session.events() for session in world.met] == [[], []]


def test_a_connection_is_made_again_though_something_else_answered_meanwhile(cuttable: Callable[..., Cuttable]) -> None:
    world = cuttable(2)
    world.relay.garble()
    world.relay.reset()
    assert exchange_all(world.met) == [[b"0", b"1"]] * 2
    assert [session.events() for session in world.met] == [[], []]


def test_a_connection_is_made_again_once_there_are_descriptors_for_it(
    cuttable: Callable[..., Cuttable], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = cuttable(2)
    scarce, opens = [1, 2], Dealer._open

    def open_if_there_are(dealer: Dealer) -> None:
        if scarce:
            scarce.pop()
            raise zmq.ZMQError(errno.EMFILE)
        opens(dealer)

    monkeypatch.setattr(Dealer, "_open", open_if_there_are)
    world.relay.garble()
    world.relay.reset()
    assert exchange_all(world.met) == [[b"0", b"1"]] * 2
    assert [session.events() for session in world.met] == [[], []]


def test_what_was_said_during_a_cut_is_heard_after_it(cuttable: Callable[..., Cuttable]) -> None:
    world = cuttable(2)
    world.relay.silence()
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(s.exchange, "x", b"%d" % s.rank, ahead()) for s in world.met]
        world.relay.reset()
        assert [one.result() for one in pending] == [[b"0", b"1"]] * 2


def test_a_rank_that_is_silent_for_longer_than_the_tolerance_is_lost_and_others_go_on(
    cuttable: Callable[..., Cuttable],
) -> None:
    world = cuttable(3, SHORT_NS)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(world.met[0].exchange, "all", b"", ahead())
        world.relay.silence()
        with pytest.raises(PeerLost, match=r"exchange 'all': rank 2 is lost: nothing was heard of it for 1\.5 s"):
            pending.result()
    for session in world.met[:2]:
        lost = wait_for_event(session)
        assert lost == Lost(2)
        assert isinstance(lost, Lost)
        assert lost.why == "nothing was heard of it for 1.5 s"
    lost = wait_for_event(world.met[2])
    assert lost == Lost(0)
    assert isinstance(lost, Lost)
    assert lost.why == "nothing was heard of it for 1.5 s"
    few = in_threads([lambda s=s: s.exchange("few", b"%d" % s.rank, ahead(), [1, 0]) for s in world.met[:2]])
    assert few == [[b"1", b"0"]] * 2
    with pytest.raises(PeerLost, match="rank 2 is lost"):
        world.met[1].exchange("all", b"", ahead())
    with pytest.raises(PeerLost, match="rank 0 is lost: nothing was heard of it"):
        world.met[2].exchange("all", b"", ahead())


def test_a_rank_that_comes_back_after_it_was_given_up_is_told(cuttable: Callable[..., Cuttable]) -> None:
    address = free_address()
    with CuttingRelay(address) as relay, ThreadPoolExecutor(1) as pool:
        patient = pool.submit(meet, world_at(1, 2, relay.address), ahead(), {})
        hasty = meet(world_at(0, 2, address), ahead(), {}, None, SHORT_NS)
        met = [hasty, patient.result()]
        relay.silence()
        assert wait_for_event(met[0]) == Lost(1)
        relay.reset()
        lost = wait_for_event(met[1])
        assert lost == Lost(0)
        assert isinstance(lost, Lost)
        assert lost.why == "rank 0 gave this rank up: nothing was heard of it for 1.5 s"
        assert close_all(met) == [None] * 2


def test_rank_0_that_refuses_new_connections_is_lost_at_once(cuttable: Callable[..., Cuttable]) -> None:
    world = cuttable(3)
    world.relay.refuse()
    lost = wait_for_event(world.met[2])
    assert lost == Lost(0)
    assert isinstance(lost, Lost)
    assert lost.why == "its connection ended and its host refuses new ones"
    world.met[2].abort("error", "nobody hears it")
    assert world.met[0].events() == []  # rank 2 accepts connections still, so rank 0 waits for it


def test_rank_0_that_freezes_is_lost_after_the_tolerance() -> None:
    address = free_address()
    child = start_child(world_at(0, 2, address), tolerance_ns=SHORT_NS)
    try:
        session = meet(world_at(1, 2, address), ahead(), {}, None, SHORT_NS)
        session.exchange("hello", b"", ahead())
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(PeerLost, match=r"rank 0 is lost: nothing was heard of it for 1\.5 s"):
            session.exchange("never", b"", ahead())
        assert wait_for_event(session) == Lost(0)
        session.close(ahead())
    finally:
        end_child(child)


def test_the_last_words_of_a_rank_that_dies_come_before_its_loss() -> None:
    address = free_address()
    child = start_child(world_at(1, 2, address))
    try:
        session = meet(world_at(0, 2, address), ahead(), {})
        session.exchange("hello", b"", ahead())
        child.communicate("die\n")
        told: list[Event] = []
        while Lost(1) not in told:
            told += wait_for_events(session)
        assert told == [Aborted(1, "error", "last words"), Lost(1)]
        assert isinstance(told[1], Lost)
        assert told[1].why == "its connection ended and its host refuses new ones"
        session.close(ahead())
    finally:
        end_child(child)


def test_threads_exchange_at_once_under_different_names_and_ranks() -> None:
    address = free_address()
    met: list[Session] = meet_all([world_at(rank, 4, address) for rank in range(4)])
    groups = {"all": None, "pair": [3, 1], "other": [0, 2], "same name": [0, 1], "trio": [3, 2, 0]}

    def live(session: Session, name: str, ranks: list[int] | None) -> list[list[bytes]]:
        return [
            session.exchange(name, b"%s %d %d" % (name.encode(), turn, session.rank), ahead(), ranks)
            for turn in range(20)
        ]

    calls = {
        (session.rank, name): (lambda s=session, n=name, r=ranks: live(s, n, r))
        for name, ranks in groups.items()
        for session in met
        if ranks is None or session.rank in ranks
    }
    got = dict(zip(calls, in_threads(list(calls.values())), strict=True))  # type: ignore[arg-type]
    for (_, name), seen in got.items():
        order = groups[name] or range(4)
        assert seen == [[b"%s %d %d" % (name.encode(), turn, rank) for rank in order] for turn in range(20)]
    assert close_all(met) == [None] * 4


def test_one_name_of_different_ranks_does_not_meet_and_harms_nothing() -> None:
    address = free_address()
    met: list[Session] = meet_all([world_at(rank, 3, address) for rank in range(3)])
    calls = [
        lambda: met[0].exchange("x", b"", ahead(3), [0, 1]),
        lambda: met[1].exchange("x", b"", ahead(4), [1, 2]),
    ]
    errors = in_threads(calls)
    assert str(errors[0]) == "exchange 'x': rank 1 did not arrive in time; rank 1 came to 'x' of ranks 1, 2"
    assert str(errors[1]) == "exchange 'x': rank 2 did not arrive in time"
    assert exchange_all(met) == [[b"0", b"1", b"2"]] * 3
    assert close_all(met) == [None] * 3


def test_an_abort_of_a_group_is_told_and_fails_no_exchange() -> None:
    address = free_address()
    met: list[Session] = meet_all([world_at(rank, 3, address) for rank in range(3)])
    met[2].abort("mismatch", "in a group", group=2**64 - 1)
    for session in met[:2]:
        assert wait_for_event(session) == Aborted(2, "mismatch", "in a group", 2**64 - 1)
    assert exchange_all(met) == [[b"0", b"1", b"2"]] * 3
    assert close_all(met) == [None] * 3


STARVED = """
import resource, sys, time, os
from detcoll.launch.launchers import World
from detcoll.rendezvous import meet
from detcoll.errors import DetcollError
before = len(os.listdir("/proc/self/fd"))
limit = int(sys.argv[1]) + (before if sys.argv[1][0] == "+" else 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    session = meet(World(0, int(sys.argv[3]), None, None, "environment", "address", sys.argv[2]),
                   time.monotonic_ns() + 10 * 10**9, {})
except DetcollError as error:
    print(type(error).__name__, error)
else:
    session.close(time.monotonic_ns() + 10**9)
    print("met")
assert len(os.listdir("/proc/self/fd")) == before
"""


@pytest.mark.parametrize("limit", [8, 20, 26, 32, 40])
def test_too_few_descriptors_are_said_to_be_so(limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARVED, str(limit), free_address(), "2"],
        env=dict(os.environ), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("ConnectError too few file descriptors: the rendezvous needs 42 more")
    assert f"of the {limit} that this process may have; raise the limit (ulimit -n)" in done.stdout


def test_a_world_of_one_opens_no_more_than_it_announced() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARVED, "+41", free_address(), "1"],
        env=dict(os.environ), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "met\n"
