"""Those who speak to a hub what and when they like: strangers, floods, and ranks played by hand."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from detcoll.errors import ConnectError
from detcoll.rendezvous import Address, Lost, Session, meet, wire
from detcoll.rendezvous.channels import TOKEN_BYTES, Router
from detcoll.rendezvous.door import Door
from detcoll.rendezvous.link import Link
from detcoll.rendezvous.sockets import reach
from detcoll.testing.cuts import CuttingRelay
from detcoll.testing.meetings import (
    ahead,
    close_all,
    exchange_all,
    free_address,
    meet_all,
    wait_for_event,
    world_at,
)
from detcoll.testing.socks import receive

SHORT_NS = 1_500_000_000
"""A tolerance."""


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
        assert wire.from_hub(piece) == wire.Refused("world", "the hub that it had joined is gone")


def test_a_flood_delays_no_deadline(pair: tuple[str, list[Session]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, met = pair
    receive = Router.receive
    monkeypatch.setattr(Router, "receive", lambda router: receive(router) or (b"stranger", bytes(64), -1, ""))
    with pytest.raises(ConnectError, match="exchange 'alone': rank 1 did not arrive in time"):
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
            with pytest.raises(ConnectError, match="rank 1 did not arrive in time"):  # and not that it is lost
                session.exchange("alone", b"", ahead(4))
            assert session.events() == []
        assert wait_for_event(session) == Lost(1)  # its end is seen though nothing came over the new connection
        session.close(ahead(1))
