"""Ranks that meet over real sockets on loopback, in threads and in processes."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from devices import until

from detcoll.errors import Closed, ConnectError, PeerLost, UsageError
from detcoll.launch.launchers import World
from detcoll.rendezvous import Aborted, Address, Lost, Session, asking, is_loopback, meet, meeting, wire
from detcoll.rendezvous.asking import Answer, Asker
from detcoll.rendezvous.connection import Connection
from detcoll.rendezvous.member import Member
from detcoll.rendezvous.sockets import OwnHost, listen, open_life_port, own_host, parse_ports, reach
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
    world_at,
)

LATE_S = 3.0
"""When those that do not come are given up; all others have come by then, on a busy machine too."""


@pytest.fixture
def sessions() -> Iterator[Callable[..., list[Session]]]:
    opened: list[Session] = []

    def make(size: int, address: str | None = None) -> list[Session]:
        where = address or free_address()
        met = meet_all([world_at(rank, size, where) for rank in range(size)])
        opened.extend(session for session in met if isinstance(session, Session))
        assert [type(one) for one in met] == [Session] * size, met
        return met

    yield make
    close_all(opened, seconds=5)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_exchange_gives_everybodys_payload_in_rank_order(sessions: Callable[..., list[Session]], size: int) -> None:
    met = sessions(size)
    for turn in (b"", b"second", bytes(range(256)) * 100):
        assert exchange_all(met, turn) == [[turn + b"%d" % rank for rank in range(size)]] * size
    assert [(session.rank, session.size, session.host) for session in met] == [
        (rank, size, "127.0.0.1") for rank in range(size)
    ]


def test_large_payloads_pass_and_larger_ones_are_refused(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(3)
    given = [bytes([rank]) * 2**20 for rank in range(3)]
    assert in_threads([lambda s=s: s.exchange("large", given[s.rank], ahead()) for s in met]) == [given] * 3
    with pytest.raises(UsageError, match="1048577 bytes exceed the 1048576"):
        met[1].exchange("larger", bytes(2**20 + 1), ahead())


def test_ipv6(sessions: Callable[..., list[Session]]) -> None:
    try:
        address = free_address("::1")
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
        pytest.skip("no IPv6 here")
    met = sessions(2, address)
    assert met[1].host == "::1"
    assert exchange_all(met) == [[b"0", b"1"]] * 2


def test_ranks_may_come_in_any_order() -> None:
    address = free_address()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(meet, world_at(1, 2, address), ahead(), {})
        late = meet(world_at(0, 2, address), ahead(), {})
        assert in_threads([lambda: late.close(ahead()), lambda: early.result().close(ahead())]) == [None, None]


def test_all_that_came_learn_who_never_came() -> None:
    address = free_address()
    errors = meet_all([world_at(rank, 6, address) for rank in (0, 1, 3, 4)], seconds=LATE_S)
    for error in errors:
        assert isinstance(error, ConnectError)
        assert "rank 2, 5 never came" in str(error)


def test_without_rank_0_there_is_nobody_to_ask() -> None:
    address = free_address()
    for error in meet_all([world_at(rank, 3, address) for rank in (1, 2)], seconds=0.3):
        assert isinstance(error, ConnectError)
        expected = f"the rendezvous at {address} did not answer: rank 0 has not started, has left, or is unreachable ("
        assert expected in str(error)


def test_an_exchange_names_those_that_never_arrived(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(4)
    for error in in_threads([lambda s=s: s.exchange("plans", b"", ahead(LATE_S)) for s in (met[0], met[3])]):
        assert isinstance(error, ConnectError)
        assert str(error) == "exchange 'plans': rank 1, 2 did not arrive in time"
    with pytest.raises(ConnectError, match="rank 1, 2 did not arrive in time"):  # who comes too late is told at once
        met[1].exchange("plans", b"", ahead())


def test_different_exchanges_are_told_apart(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(2)
    errors = in_threads([lambda s=s: s.exchange(f"of {s.rank}", b"", ahead(LATE_S + s.rank)) for s in met])
    assert all(isinstance(error, ConnectError) for error in errors)
    assert str(errors[0]) == "exchange 'of 0': rank 1 did not arrive in time; rank 1 came to 'of 1' of all ranks"
    assert str(errors[1]) == "exchange 'of 1': rank 0 did not arrive in time; rank 0 came to 'of 0' of all ranks"
    assert exchange_all(met) == [[b"0", b"1"]] * 2


def test_a_double_is_refused_alone_and_is_part_of_why_a_meeting_failed() -> None:
    address = free_address()
    errors = meet_all([world_at(rank, 3, address) for rank in (0, 1, 1)], seconds=LATE_S)
    assert sorted(type(error).__name__ for error in errors) == ["ConnectError", "ConnectError", "UsageError"]
    assert all("two processes say that they are rank 1" in str(error) for error in errors)
    assert "rank 2 never came; a process that says it is rank 1 of 3 was refused" in str(errors[0])


def test_a_rank_with_another_world_size_is_refused_and_the_others_learn_why_it_is_missing() -> None:
    address = free_address()
    worlds = [world_at(0, 3, address), world_at(1, 3, address), world_at(2, 4, address)]
    errors = meet_all(worlds, seconds=LATE_S)
    assert [type(error) for error in errors] == [ConnectError, ConnectError, UsageError]
    assert all("rank 2 says that the world has 4 ranks, rank 0 says 3" in str(error) for error in errors)
    assert all("rank 2 never came; a process that says it is rank 2 of 4 was refused" in str(e) for e in errors[:2])


def test_a_stray_of_another_size_does_not_break_the_meeting() -> None:
    address = free_address()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, world_at(0, 2, address), ahead(), {})
        with pytest.raises(UsageError, match="rank 1 says that the world has 5 ranks, rank 0 says 2"):
            meet(world_at(1, 5, address), ahead(), {})
        second = meet(world_at(1, 2, address), ahead(), {})
        met = [first.result(), second]
        assert exchange_all(met) == [[b"0", b"1"]] * 2
        assert close_all(met) == [None] * 2


def test_a_late_double_harms_nobody(sessions: Callable[..., list[Session]], monkeypatch: pytest.MonkeyPatch) -> None:
    address = free_address()
    met = sessions(2, address)
    monkeypatch.setattr("detcoll.rendezvous.meeting._epochs", Counter())  # as another process would count
    with pytest.raises(UsageError, match="two processes say that they are rank 1"):
        meet(world_at(1, 2, address), ahead(), {})
    assert exchange_all(met) == [[b"0", b"1"]] * 2


def test_another_job_is_refused_and_harms_nobody() -> None:
    address = free_address()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, world_at(0, 2, address, job="ours"), ahead(), {})
        with pytest.raises(ConnectError, match="belongs to another job"):
            meet(world_at(1, 2, address, job="theirs"), ahead(), {})
        second = meet(world_at(1, 2, address, job="ours"), ahead(), {})
        in_threads([lambda: first.result().close(ahead()), lambda: second.close(ahead())])


def test_a_port_in_use_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectError, match=f"rendezvous {address}: the port is already in use"):
            meet(world_at(0, 2, address), ahead(), {})


def test_two_jobs_at_once(sessions: Callable[..., list[Session]]) -> None:
    jobs = [sessions(2), sessions(2)]
    got = in_threads([lambda j=j: exchange_all(jobs[j], b"job%d/" % j) for j in range(2)])
    assert got == [[[b"job%d/0" % j, b"job%d/1" % j]] * 2 for j in range(2)]


def test_the_same_ranks_meet_again_and_again() -> None:
    address = free_address()

    def live(rank: int) -> list[list[bytes]]:
        seen = []
        for turn in range(4):
            session = meet(world_at(rank, 3, address), ahead(), {})
            seen.append(session.exchange("turn", b"%d" % turn, ahead()))
            session.close(ahead())
        return seen

    expected = [[b"%d" % turn] * 3 for turn in range(4)]
    assert in_threads([lambda rank=rank: live(rank) for rank in range(3)]) == [expected] * 3


def test_another_service_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectError, match="is not a detcoll rendezvous"):
            meet(world_at(1, 2, f"127.0.0.1:{server.getsockname()[1]}"), ahead(), {})
        thread.join()


def test_abort_is_shown_to_everybody_else(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(3)
    met[1].abort("mismatch", "all_reduce(4) met broadcast(8)")
    for other in (met[0], met[2]):
        assert wait_for_event(other) == Aborted(1, "mismatch", "all_reduce(4) met broadcast(8)")
    assert met[1].events() == []


def test_abort_ends_a_pending_exchange_and_stays_to_be_told(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(2)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(met[0].exchange, "slow", b"", ahead())
        met[1].abort("error", "disk full")
        with pytest.raises(PeerLost, match=r"exchange 'slow': rank 1 gave up \(error\): disk full"):
            pending.result()
    assert wait_for_event(met[0]) == Aborted(1, "error", "disk full")
    assert met[0].events() == []
    with pytest.raises(PeerLost):
        met[0].exchange("later", b"", ahead())


def test_an_answer_read_by_the_progress_thread_reaches_the_exchange(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(2)
    stop = threading.Event()

    def progress() -> None:
        while not stop.is_set():
            select.select([met[0].fileno()], [], [], 0.01)
            met[0].events()

    thread = threading.Thread(target=progress)
    thread.start()
    try:
        for turn in range(200):
            assert exchange_all(met, b"%d." % turn) == [[b"%d.0" % turn, b"%d.1" % turn]] * 2
    finally:
        stop.set()
        thread.join()


def test_leaving_in_good_order_is_no_loss(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(3)
    met[1].close(ahead())
    with pytest.raises(ConnectError, match="rank 1 has left"):
        met[2].exchange("x", b"", ahead())
    assert met[0].events() == met[2].events() == []
    with pytest.raises(Closed):
        met[1].exchange("x", b"", ahead())
    met[1].close(ahead())
    met[1].abort("error", "too late to matter")
    assert met[1].events() == []


def test_rank_0_stays_until_all_have_left(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(2)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(met[0].close, ahead())
        with pytest.raises(ConnectError, match="rank 0 has left"):
            met[1].exchange("x", b"", ahead())
        assert not closing.done()
        met[1].close(ahead())
        closing.result()


def test_rank_0_leaves_at_its_deadline_and_that_is_no_loss(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(2)
    met[0].close(ahead(0.1))
    with pytest.raises((PeerLost, ConnectError), match="rank 0 has left"):
        met[1].exchange("x", b"", ahead())
    assert met[1].events() == []
    assert not select.select([met[1].fileno()], [], [], 0)[0]


def test_a_closed_session_gives_out_no_descriptor(sessions: Callable[..., list[Session]]) -> None:
    met = sessions(3)
    assert met[1].fileno() != met[2].fileno()
    met[1].close(ahead())
    met[2].drop()
    for session in met[1:]:
        with pytest.raises(Closed, match="the rendezvous is closed"):
            session.fileno()


def test_no_thread_and_no_descriptor_is_left() -> None:
    def live() -> None:
        address = free_address()
        met = meet_all([world_at(rank, 3, address) for rank in range(3)])
        assert close_all(met) == [None] * len(met)
        meet_all([world_at(rank, 3, address) for rank in (0, 1, 1)], seconds=0.5)

    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    live()
    before = count()
    live()
    until(lambda: all(now <= then for now, then in zip(count(), before, strict=True)))


@pytest.mark.parametrize("arguments", [(), ("fork",)], ids=["alone", "with a forked worker"])
def test_a_killed_rank_is_lost(arguments: tuple[str, ...]) -> None:
    address = free_address()
    child = start_child(world_at(1, 2, address), *arguments)
    try:
        session = meet(world_at(0, 2, address), ahead(), {})
        assert session.exchange("hello", b"parent", ahead()) == [b"parent", b"child"]
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(session.exchange, "never", b"", ahead())
            child.kill()
            with pytest.raises(PeerLost, match="rank 1 is lost"):
                pending.result()
        assert wait_for_event(session) == Lost(1)
        session.close(ahead())  # the dead need not say goodbye
    finally:
        end_child(child)


def test_when_rank_0_is_killed_the_others_lose_it() -> None:
    address = free_address()
    child = start_child(world_at(0, 2, address))
    try:
        session = meet(world_at(1, 2, address), ahead(), {})
        session.exchange("hello", b"", ahead())
        child.kill()
        assert wait_for_event(session) == Lost(0)
        with pytest.raises(PeerLost, match="rank 0 is lost"):
            session.exchange("x", b"", ahead())
        session.abort("error", "nobody hears it")
        session.close(ahead())
    finally:
        end_child(child)


def test_who_accepted_and_went_has_accepted() -> None:
    asker: Asker[int] = Asker()
    life = open_life_port("127.0.0.1", {}, 1)
    asker.ask(1, life.getsockname())
    asked = asker.begin(time.monotonic_ns())
    assert select.select([], asked, [], 10)[1]
    life.close()
    assert asker.answers(time.monotonic_ns()) == [(1, Answer.ACCEPTED)]


def test_a_probe_that_waits_for_its_turn_does_not_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """More ranks than are probed at a time are silent; the one behind them is alive, and is found so."""
    connect = asking._connect

    def try_to_connect(question: asking._Question) -> None:
        if question.where[1]:
            connect(question)
        else:
            question.connection = socket.socket()  # never connected

    monkeypatch.setattr(asking, "_connect", try_to_connect)
    asker: Asker[int] = Asker()
    silent = range(asking._AT_A_TIME)
    with open_life_port("127.0.0.1", {}, 1) as life:
        for rank in silent:
            asker.ask(rank, ("127.0.0.1", 0))
        asker.ask(len(silent), life.getsockname())
        assert len(asker.begin(0)) == len(silent)
        end_ns = asker.next_ns()
        assert end_ns
        assert asker.answers(end_ns - 1) == []
        assert asker.answers(end_ns) == [(rank, Answer.NONE) for rank in silent]
        assert asker.next_ns() is None
        asked = asker.begin(end_ns)
        assert asker.next_ns() == 2 * end_ns
        assert select.select([], asked, [], 10)[1]
        assert asker.answers(2 * end_ns) == [(len(silent), Answer.ACCEPTED)]
    asker.close()


def test_a_rank_that_dies_before_all_have_come() -> None:
    address = free_address()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(meet, world_at(0, 3, address), ahead(), {})
        life, where = open_life_port("127.0.0.1", {}, 1), reach(Address.parse(address), ahead()).where
        dying = Connection(Member(1, 3), where, 30 * 10**9, life, lambda: None)
        dying.start()
        dying.deliver(wire.Hello(wire.VERSION, "", 0, 1, 3, 20_000, life.getsockname()[1]), ahead())
        dying.stop()
        with pytest.raises(ConnectError, match="rank 1 joined, but left before all ranks had joined"):
            pending.result()


class Dictionary:
    """A store as torch's are, with what the ranks of one process need."""

    def __init__(self, patience_s: float = 20.0) -> None:
        self.patience_s = patience_s
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value.encode()
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, self.patience_s):
                raise RuntimeError("wait timeout")
            return self.values[key]


def test_meeting_through_a_store() -> None:
    store = Dictionary()
    worlds = [World(rank, 2, rank, 2, "torchrun", "store", "localhost:1", "run.0") for rank in range(2)]
    for _ in range(2):
        met = in_threads([lambda w=w: meet(w, ahead(), {}, store) for w in worlds])
        assert exchange_all(met) == [[b"0", b"1"]] * 2
        assert close_all(met) == [None] * len(met)
    assert len(store.values) == 2  # each meeting has a key of its own


def test_a_store_without_rank_0() -> None:
    with pytest.raises(ConnectError, match="rank 0 never came"):
        meet(World(1, 2, 1, 2, "torchrun", "store", "localhost:1", "run.0"), ahead(), {}, Dictionary(0.3))


def store_world(rank: int, job: str) -> World:
    return World(rank, 2, rank, 2, "torchrun", "store", "localhost:1", job)


def test_a_store_whose_rank_0_is_gone() -> None:
    store, address = Dictionary(), free_address()
    store.set("detcoll/gone/0/rendezvous", address)
    with pytest.raises(ConnectError, match=f"rank 0 is gone: it was at {address}, but nobody listens there any more"):
        meet(store_world(1, "gone"), ahead(1.0), {}, store)


class Watched(Dictionary):
    """Tells when a key is read for the second time: whoever reads has failed at the address it read first."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.read_again = threading.Event()

    def get(self, key: str) -> bytes:
        self.reads[key] += 1
        if self.reads[key] == 2:
            self.read_again.set()
        return super().get(key)


def meet_after_a_failure(store: Watched, job: str) -> None:
    """Let rank 1 read what is in the store, and rank 0 come once rank 1 has failed there."""
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(meet, store_world(1, job), ahead(), {}, store)
        assert store.read_again.wait(20.0)
        met = [meet(store_world(0, job), ahead(), {}, store), second.result()]
    assert exchange_all(met) == [[b"0", b"1"]] * 2
    assert close_all(met) == [None, None]


def test_an_address_of_an_earlier_round_is_not_kept() -> None:
    store = Watched()
    store.set("detcoll/again/0/rendezvous", free_address())
    meet_after_a_failure(store, "again")


def test_an_address_where_nobody_listens_is_asked_about_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long rank 0 takes to come: to the meeting, each look at the clock is a minute after the last."""
    store, minutes = Watched(), itertools.count(1)
    store.set("detcoll/late/0/rendezvous", free_address())
    clock = SimpleNamespace(monotonic_ns=lambda: time.monotonic_ns() + next(minutes) * 60 * 10**9, sleep=time.sleep)
    monkeypatch.setattr(meeting, "time", clock)
    meet_after_a_failure(store, "late")


def test_a_hub_of_an_earlier_round_that_still_serves_is_left_alone() -> None:
    store, address = Watched(), free_address()
    earlier = meet_all([world_at(rank, 2, address, job="restarted") for rank in range(2)])
    store.set("detcoll/restarted/0/rendezvous", address)
    meet_after_a_failure(store, "restarted")
    assert exchange_all(earlier) == [[b"0", b"1"]] * 2
    assert close_all(earlier) == [None, None]


def test_a_refusal_by_the_hub_that_the_store_names_is_told_after_the_tolerance() -> None:
    store, address = Dictionary(), free_address()
    others = meet_all([world_at(rank, 2, address, job="taken") for rank in range(2)])
    store.set("detcoll/taken/0/rendezvous", address)
    with pytest.raises(UsageError, match="two processes say that they are rank 1"):
        meet(store_world(1, "taken"), ahead(1000), {}, store, tolerance_ns=1)
    assert close_all(others) == [None, None]


def local_mpi_world(rank: int, size: int, job: str) -> World:
    return World(rank, size, rank, size, "openmpi", "mpi", None, job)


def test_mpi_on_one_host_meets_at_a_socket_named_after_the_job() -> None:
    jobs = [f"test-{os.getpid()}-{i}" for i in range(2)]
    met = meet_all([local_mpi_world(rank, 3, job) for job in jobs for rank in range(3)])
    got = in_threads([lambda j=j: exchange_all(met[3 * j : 3 * j + 3], b"job%d/" % j) for j in range(2)])
    assert got == [[[b"job%d/%d" % (j, rank) for rank in range(3)]] * 3 for j in range(2)]
    with open("/proc/net/unix", encoding="ascii") as table:
        assert sum("@detcoll-" in line for line in table) >= 2
    assert close_all(met) == [None] * len(met)


def test_mpi_on_one_host_without_rank_0() -> None:
    with pytest.raises(ConnectError, match=r"nobody listens .*: rank 0 has not started, or has left"):
        meet(local_mpi_world(1, 2, f"test-{os.getpid()}-absent"), ahead(0.2), {})


def test_mpi_across_hosts_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UsageError, match="set DETCOLL_RENDEZVOUS"):
        meet(World(1, 4, 1, 2, "mpich", "mpi"), ahead(), {})


@pytest.mark.parametrize(
    ("world", "environ", "told"),
    [
        (world_at(0, 2, "192.0.2.7:5000"), {}, "has no encryption.*DETCOLL_INSECURE=1"),
        (world_at(1, 2, "192.0.2.7:5000"), {"DETCOLL_INSECURE": "0"}, "DETCOLL_INSECURE=1"),
        (world_at(1, 2, "192.0.2.7:5000"), {"DETCOLL_INSECURE": "no"}, "DETCOLL_INSECURE=1"),
        (world_at(0, 2, "[2001:db8::1]:5000"), {}, "DETCOLL_INSECURE=1"),
        (world_at(0, 2, "0.0.0.0:5000"), {}, "DETCOLL_INSECURE=1"),
        (world_at(0, 2, "127.0.0.1:5000"), {"DETCOLL_ADVERTISE": "192.0.2.7"}, "this rank's address 192.0.2.7"),
        (world_at(0, 2, None), {}, "environment: no rendezvous address; set DETCOLL_RENDEZVOUS"),
        (world_at(0, 2, "localhost"), {}, "DETCOLL_RENDEZVOUS='localhost' must be host:port"),
        (world_at(0, 2, "::1:5000"), {}, "must be host:port"),
        (world_at(0, 2, "localhost:70000"), {}, "port from 1 to 65535"),
        (world_at(0, 2, "localhost:5000"), {"DETCOLL_INTERFACE": "nope0"}, "DETCOLL_INTERFACE='nope0'"),
        (world_at(0, 2, "localhost:5000"), {"DETCOLL_PORTS": "9-5"}, "DETCOLL_PORTS='9-5' must be first-last"),
    ],
)
def test_refused_before_anything_opens(world: World, environ: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        meet(world, ahead(), environ)


def test_insecure_use_is_warned_of_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detcoll.rendezvous.meeting._warned", set())
    address = free_address("0.0.0.0")  # reached over loopback here, but open to all
    with caplog.at_level(logging.WARNING, "detcoll"):
        met = meet_all([world_at(rank, 2, address) for rank in range(2)], environ={"DETCOLL_INSECURE": "1"})
    assert close_all(met) == [None] * len(met)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nothing is encrypted or authenticated" in caplog.text


def test_an_address_that_is_not_this_hosts() -> None:
    with pytest.raises(ConnectError, match="not an address of this host"):
        meet(world_at(0, 2, "192.0.2.7:5000"), ahead(), {"DETCOLL_INSECURE": "1"})


def test_an_inherited_socket_is_used_and_a_foreign_one_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as foreign:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        descriptor = os.dup(listener.fileno())
        environ = {"DETCOLL_RENDEZVOUS_FD": str(descriptor)}
        met = meet_all([world_at(rank, 2, address) for rank in range(2)], environ=environ)
        assert close_all(met) == [None] * len(met)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        with pytest.raises(ConnectError, match="already in use"):
            meet(world_at(0, 2, address, job="b"), ahead(), {"DETCOLL_RENDEZVOUS_FD": str(foreign.fileno())})
        assert foreign.getsockname()


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.10", "::1", "localhost", "LOCALHOST", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "fe80::1%eth0", "localhost.example.org", "")))


def test_addresses_as_text() -> None:
    assert Address.parse("[fe80::1%eth0]:80") == Address("fe80::1%eth0", 80)
    assert Address.parse("node-7.example.org:65535").port == 65535
    assert str(Address("::1", 5)) == "[::1]:5"
    for wrong in ("", ":5", "a b:5", "[::1]", "host:0", "host:", "host:5x"):
        with pytest.raises(UsageError):
            Address.parse(wrong)


def test_ports_of_a_range_are_taken_in_order() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        with pytest.raises(ConnectError, match=f"no port of DETCOLL_PORTS='{first}-{first}' is free"):
            listen(Address("127.0.0.1", 0), {"DETCOLL_PORTS": f"{first}-{first}"})
        last = min(first + 50, 65535)
        with listen(Address("127.0.0.1", 0), {"DETCOLL_PORTS": f"{first}-{last}"}) as listener:
            assert first < listener.getsockname()[1] <= last
    assert list(parse_ports("7-9")) == [7, 8, 9]


def test_the_port_that_shows_life_leaves_a_narrow_range_to_the_transport() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = min(taken.getsockname()[1], 65000)
    environ = {"DETCOLL_PORTS": f"{first}-{first + 8}"}
    with open_life_port("127.0.0.1", environ, 2) as wide, open_life_port("127.0.0.1", environ, 4) as narrow:
        assert first < wide.getsockname()[1] <= first + 8
        assert not first <= narrow.getsockname()[1] <= first + 8


def test_the_interface_gives_the_address() -> None:
    assert own_host({"DETCOLL_INTERFACE": "lo"}) == OwnHost("127.0.0.1", "127.0.0.1")
    assert own_host({"DETCOLL_INTERFACE": "::1"}) == OwnHost("::1", "::1")
    both = {"DETCOLL_INTERFACE": "lo", "DETCOLL_ADVERTISE": "203.0.113.5"}
    assert own_host(both) == OwnHost("203.0.113.5", "127.0.0.1")
    assert own_host({}) is None


def resolved(monkeypatch: pytest.MonkeyPatch, names: dict[str, str]) -> None:
    """Let names lead to addresses, as a hosts file does; all other names and addresses as before."""
    ask = socket.getaddrinfo

    def answer(host: str, *rest: object, **more: object) -> object:
        return ask(names.get(host, host), *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("socket.getaddrinfo", answer)


@pytest.mark.parametrize(
    ("advertised", "is_local", "listens"),
    [
        ("127.0.0.1", False, "127.0.0.1"),
        ("localhost", False, "127.0.0.1"),
        ("myself", False, "0.0.0.0"),  # leads to loopback here, elsewhere perhaps not
        ("myself", True, "127.0.1.1"),
        ("outside", False, "0.0.0.0"),
        ("203.0.113.5", False, "0.0.0.0"),
        ("2001:db8::5", False, "::"),
    ],
)
def test_what_others_are_told_and_where_to_listen_are_two_things(
    advertised: str, is_local: bool, listens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved(monkeypatch, {"localhost": "127.0.0.1", "myself": "127.0.1.1", "outside": "203.0.113.5"})
    assert own_host({"DETCOLL_ADVERTISE": advertised}, is_local=is_local) == OwnHost(advertised, listens)


@pytest.mark.parametrize("name", ["nosuch.invalid", "a..b", "x" * 70])
def test_a_name_that_cannot_be_resolved_is_refused_at_once(name: str) -> None:
    with pytest.raises(UsageError, match=f"DETCOLL_ADVERTISE='{name}' must be an address, or a name that this host"):
        meet(world_at(0, 2, "127.0.0.1:9"), ahead(1000), {"DETCOLL_ADVERTISE": name, "DETCOLL_INSECURE": "1"})


def test_ranks_meet_although_the_resolver_fails_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ask, failures = socket.getaddrinfo, [socket.EAI_AGAIN] * 3

    def answer(host: str, *rest: object, **more: object) -> object:
        if host == "late" and failures:
            raise socket.gaierror(failures.pop(), "Temporary failure in name resolution")
        return ask("127.0.0.1" if host == "late" else host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("socket.getaddrinfo", answer)
    address = free_address()
    worlds = [world_at(rank, 2, address) for rank in range(2)]
    met = meet_all(worlds, environ={"DETCOLL_ADVERTISE": "late", "DETCOLL_INSECURE": "1"})
    assert exchange_all(met) == [[b"0", b"1"]] * 2
    assert close_all(met) == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, "DETCOLL_RENDEZVOUS=127.0.0.1:5000"),
        ({"MASTER_ADDR": "myself"}, "MASTER_ADDR=127.0.0.1"),
        ({"MASTER_ADDR": "other", "DETCOLL_RENDEZVOUS": "myself:5000"}, "DETCOLL_RENDEZVOUS=127.0.0.1:5000"),
        ({"DETCOLL_ADVERTISE": "myself"}, "DETCOLL_ADVERTISE=127.0.0.1"),
    ],
)
def test_a_name_for_loopback_is_refused_on_every_rank_that_may_have_peers_elsewhere(
    rank: int, environ: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved(monkeypatch, {"myself": "127.0.1.1"})
    with pytest.raises(UsageError, match=rf"all 2 ranks run here, set {told} on each .* set DETCOLL_INSECURE=1"):
        meet(world_at(rank, 2, "myself:5000"), ahead(1000), environ)


def test_a_name_for_loopback_is_listened_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 stands for one of another host, for which the name leads to another address of rank 0's host."""
    port = free_address().rpartition(":")[2]
    resolved(monkeypatch, {"myself": "127.0.1.1", "elsewhere": "127.9.9.9"})
    worlds = [world_at(0, 2, f"myself:{port}"), world_at(1, 2, f"elsewhere:{port}")]
    met = meet_all(worlds, environ={"DETCOLL_INSECURE": "1"})
    assert exchange_all(met) == [[b"0", b"1"]] * 2
    assert close_all(met) == [None, None]


def test_rank_0_says_that_it_hears_its_own_host_only() -> None:
    address = free_address()
    (error,) = meet_all([world_at(0, 2, address)], seconds=1.0)
    assert f"rank 1 never came; rank 0 listens at {address}, where only ranks of its own host reach it" in str(error)
