"""Connections of the rendezvous that are cut, processes that die or freeze, strangers, and descriptors that run out."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from detcoll.errors import ConnectError, PeerLost
from detcoll.rendezvous import Aborted, Address, Event, Lost, Session, meet, wire
from detcoll.rendezvous.channels import TOKEN_BYTES, Router
from detcoll.rendezvous.door import Door
from detcoll.rendezvous.link import Link
from detcoll.rendezvous.sockets import reach
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
from detcoll.testing.socks import receive

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
        lambda: met[0].exchange("x", b"", ahead(1), [0, 1]),
        lambda: met[1].exchange("x", b"", ahead(3), [1, 2]),
    ]
    errors = in_threads(calls)
    assert str(errors[0]) == "exchange 'x': rank 1 never arrived; rank 1 came to 'x' of ranks 1, 2"
    assert str(errors[1]) == "exchange 'x': rank 2 never arrived"
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


class Stranger:
    """Speaks ZeroMQ to a hub, and what it likes."""

    def __init__(self, address: str, name: bytes = b"detcoll", reconnects: bool = False) -> None:
        self.context = zmq.Context(1)
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.plain_username = self.socket.plain_password = name
        self.socket.setsockopt(zmq.ROUTING_ID, os.urandom(TOKEN_BYTES))
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20 if reconnects else -1)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket.connect(f"tcp://{address}")

    def is_dropped(self) -> bool:
        while self.monitor.poll(20_000):
            if int.from_bytes(self.monitor.recv_multipart()[0][:2], sys.byteorder) == zmq.EVENT_DISCONNECTED:
                return True
        return False

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
        self.context.term()


@pytest.fixture
def pair() -> Iterator[tuple[str, list[Session]]]:
    address = free_address()
    met: list[Session] = meet_all([world_at(rank, 2, address) for rank in range(2)])
    assert [type(one) for one in met] == [Session] * 2, met
    yield address, met
    assert close_all(met) == [None] * 2


def numbered(message: wire.ToHub, number: int = 1) -> bytes:
    return wire.frame(wire.Header(0, number, 0), wire.pack(message))


NONSENSE = [
    [b""],
    [wire.frame(wire.Header(255, 1, 2**64 - 1), b"\xff" * 64)],
    [wire.frame(wire.Header(0, 1, 0), b"\xc1\xc1\xc1\xc1")],
    [numbered(wire.Hello(wire.VERSION, "x" * 5000, 0, 0, 2, 1000))],
    [numbered(wire.Bye())],
    [numbered(wire.Gather(wire.Key("x", None, 0), b"", 1000))],
    [b"two", b"parts", b"or more"],
    [bytes(wire.FRAME_BYTES + 1)],
]


@pytest.mark.parametrize("parts", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_ends_the_connection_of_who_says_it(pair: tuple[str, list[Session]], parts: list[bytes]) -> None:
    address, met = pair
    with Stranger(address) as stranger:
        stranger.socket.send_multipart(parts)
        assert stranger.is_dropped()
    assert exchange_all(met) == [[b"0", b"1"]] * 2


def test_who_does_not_name_the_protocol_may_not_say_anything(pair: tuple[str, list[Session]]) -> None:
    address, met = pair
    with Stranger(address, b"other") as stranger:
        assert stranger.is_dropped()
    assert exchange_all(met) == [[b"0", b"1"]] * 2


def test_bytes_that_are_not_zeromq_end_the_connection(pair: tuple[str, list[Session]]) -> None:
    address, met = pair
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    assert exchange_all(met) == [[b"0", b"1"]] * 2


def is_ended(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return True


def test_too_many_strangers_push_each_other_out_and_no_rank(
    pair: tuple[str, list[Session]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detcoll.rendezvous.door.HELLO_NS", 2**62)
    address, met = pair
    host, _, port = address.rpartition(":")
    # ZeroMQ itself ends what does not shake hands in 10 s.
    connections = [socket.create_connection((host, int(port)), timeout=5) for _ in range(80)]
    try:
        assert is_ended(connections[0])
        assert exchange_all(met) == [[b"0", b"1"]] * 2
    finally:
        for connection in connections:
            connection.close()


def test_a_stranger_that_says_nothing_is_shown_out_and_no_rank(
    pair: tuple[str, list[Session]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detcoll.rendezvous.door.HELLO_NS", 10**8)
    address, met = pair
    with Stranger(address) as stranger:
        assert stranger.is_dropped()
    assert exchange_all(met) == [[b"0", b"1"]] * 2


def test_a_message_without_an_end_is_not_kept(pair: tuple[str, list[Session]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detcoll.rendezvous.door.HELLO_NS", 2**62)
    ended: list[int] = []
    end = Door.end
    monkeypatch.setattr(Door, "end", lambda door, descriptor: ended.append(descriptor) or end(door, descriptor))
    address, met = pair
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        # ZMTP 3.0 by hand (RFC 23 and 24 of ZeroMQ), since libzmq sends no part before the last.
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"PLAIN".ljust(20, b"\0") + bytes(32)
        connection.sendall(greeting)
        receive(connection, 64)
        hello = b"\x05HELLO\x07detcoll\x07detcoll"
        connection.sendall(bytes((4, len(hello))) + hello)
        receive(connection, 2 + len(b"\x07WELCOME"))
        initiate = b"\x08INITIATE\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
        connection.sendall(bytes((4, len(initiate))) + initiate)
        with contextlib.suppress(ConnectionError):
            connection.sendall((bytes((1, 255)) + bytes(255)) * 2**12)
        assert is_ended(connection)
        assert len(ended) == 1  # so not by heartbeats, which are not answered here
    assert exchange_all(met) == [[b"0", b"1"]] * 2


def test_a_session_with_another_hub_is_told_so(pair: tuple[str, list[Session]]) -> None:
    address, _ = pair
    with Stranger(address) as stranger:
        stranger.socket.send(wire.frame(wire.Header(wire.HERE, 0, 5)))
        assert stranger.socket.poll(20_000)
        _, piece = wire.parse(stranger.socket.recv())
        assert wire.from_hub(piece) == wire.Refused("world", "the hub of its meeting is gone")


def test_a_flood_delays_no_deadline(pair: tuple[str, list[Session]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, met = pair
    receive = Router.receive
    monkeypatch.setattr(Router, "receive", lambda router: receive(router) or (b"stranger", bytes(64), -1, ""))
    with pytest.raises(ConnectError, match="exchange 'alone': rank 1 never arrived"):
        met[0].exchange("alone", b"", ahead(2))
    assert exchange_all(met) == [[b"0", b"1"]] * 2
    monkeypatch.undo()


class RawRank:
    """A rank that takes in what the hub says when the test wants it to."""

    def __init__(self, address: str, rank: int, size: int, port: int = 0) -> None:
        self.stranger, self.link = Stranger(address, reconnects=True), Link(2 * wire.MESSAGE_BYTES)
        self.link.send(wire.pack(wire.Hello(wire.VERSION, "", 0, rank, size, 20_000, port)))
        self.hand_over()

    def hand_over(self) -> None:
        for frame in self.link.frames():
            self.stranger.socket.send(frame)

    def receive(self) -> wire.FromHub:
        while True:
            assert self.stranger.socket.poll(20_000)
            message = self.link.take(*wire.parse(self.stranger.socket.recv()))
            self.hand_over()
            if message is not None:
                return wire.from_hub(message)


def test_rank_0_hears_last() -> None:
    address = free_address()
    payload = bytes(wire.PAYLOAD_BYTES)  # the answer has more pieces than are on their way at a time
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(meet, world_at(0, 2, address), ahead(), {})
        reach(Address.parse(address), ahead())
        slow = RawRank(address, 1, 2)
        with slow.stranger:
            assert isinstance(slow.receive(), wire.Welcome)
            first = pending.result()
            answer = pool.submit(first.exchange, "x", payload, ahead())
            slow.link.send(wire.pack(wire.Gather(wire.Key("x", None, 0), payload, 20_000)))
            while not slow.link.is_idle:
                slow.hand_over()
                slow.link.take(*wire.parse(slow.stranger.socket.recv()))
            with pytest.raises(TimeoutError):
                answer.result(timeout=0.3)
            message = slow.receive()
            assert isinstance(message, wire.Gathered)
            assert message.payloads == [payload] * 2
            assert answer.result() == [payload] * 2
        first.close(ahead(1))


def test_a_port_that_could_never_be_reached_says_nothing_of_a_death() -> None:
    address = free_address()
    nobody = Address.parse(free_address()).port
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(meet, world_at(0, 2, address), ahead(), {}, None, SHORT_NS)
        reach(Address.parse(address), ahead())
        raw = RawRank(address, 1, 2, nobody)
        with raw.stranger:
            assert isinstance(raw.receive(), wire.Welcome)
            session = pending.result()
            answer = pool.submit(session.exchange, "x", b"", ahead())
            raw.link.send(wire.pack(wire.Gather(wire.Key("x", None, 0), b"", 20_000)))
            raw.hand_over()
            assert isinstance(raw.receive(), wire.Gathered)
            answer.result()
        lost = wait_for_event(session)
        assert lost == Lost(1)
        assert isinstance(lost, Lost)
        assert lost.why == "nothing was heard of it for 1.5 s"
        session.close(ahead())


def test_a_rank_whose_threads_are_busy_is_kept_by_zeromq() -> None:
    address = free_address()
    with ThreadPoolExecutor(1) as pool, CuttingRelay(address) as relay:
        pending = pool.submit(meet, world_at(0, 2, address), ahead(), {}, None, SHORT_NS)
        reach(Address.parse(address), ahead())
        raw = RawRank(relay.address, 1, 2)
        with raw.stranger:
            assert isinstance(raw.receive(), wire.Welcome)
            session = pending.result()
            relay.reset()
            with pytest.raises(ConnectError, match="rank 1 never arrived"):  # and not that it is lost
                session.exchange("alone", b"", ahead(4))
            assert session.events() == []
        assert wait_for_event(session) == Lost(1)  # its end is seen though nothing came over the new connection
        session.close(ahead(1))


STARVED = """
import resource, sys, time, os
from detcoll.launchers import World
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
