"""The slotted transport on real sockets: broken connections, strangers, credit, windows, and what is left behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import operator
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest
import zmq

import detcoll_slotted.line
from detcoll.errors import ConnectError, PeerLost, TransportUnavailable, UsageError
from detcoll.priority import make_prompt
from detcoll.testing import LocalMeeting, MonotonicClock, ThreadFabric, pattern
from detcoll.testing.fabric import in_threads
from detcoll.testing.socks import FaultyProxy
from detcoll.transport import Ticket, TicketStatus, Transport, Window
from detcoll_slotted import SlottedEndpoint, SlottedTransport, constant, gate, health, roads, tcp
from detcoll_slotted.pacing import AHEAD_NS, ALONE_AHEAD_NS, SWITCH_AHEAD_NS
from detcoll_slotted.post import Post
from detcoll_slotted.roads import OWN_DESCRIPTORS
from detcoll_slotted.tcp import SO_MAX_PACING_RATE
from detcoll_slotted.wire import FrameKind, Header, Lane
from detcoll_tcp import TcpTransport

pytestmark = pytest.mark.timeout(60)

GRACE_NS = 300_000_000
MS = 1_000_000
PENDING, DONE, MISSED, FAILED = TicketStatus.PENDING, TicketStatus.DONE, TicketStatus.MISSED, TicketStatus.FAILED


class Clock:
    """The clock of the host; it can be held, so that what is asked for meanwhile is asked for at one moment."""

    def __init__(self) -> None:
        self.held_ns = 0

    def now_ns(self) -> int:
        return self.held_ns or time.monotonic_ns()

    @contextlib.contextmanager
    def held(self) -> Iterator[int]:
        self.held_ns = time.monotonic_ns()
        try:
            yield self.held_ns
        finally:
            self.held_ns = 0


def pair(clock: Clock | None = None, **options: object) -> ThreadFabric:
    """Two ranks with a connection for each lane."""
    options = {"tolerance_ns": 20_000_000_000, "pace_groups": {0: 0, 1: 1}} | options
    return ThreadFabric(SlottedTransport(), 2, options, clock)


def now_ns() -> int:
    return time.monotonic_ns()


def pump(fabric: ThreadFabric, until, *, ranks: tuple[int, ...] = (0, 1)) -> None:
    """Poll both ends until ``until()`` holds."""
    deadline_ns = now_ns() + 30_000 * MS
    while not until():
        assert now_ns() < deadline_ns, "it never came to that"
        for rank in ranks:
            fabric[rank].poll(now_ns() + MS)


def settle(fabric: ThreadFabric, *tickets: Ticket) -> None:
    pump(fabric, lambda: all(ticket.status is not PENDING for ticket in tickets))


def line_of(endpoint: SlottedEndpoint, peer: int, lane: Lane):
    return endpoint._peers[peer].lines[lane]


def break_line(fabric: ThreadFabric, rank: int, lane: Lane) -> None:
    """Cut the TCP connection under a line and wait for a new one; the peer acknowledges nothing meanwhile."""
    line = line_of(fabric[rank], 1 - rank, lane)
    pump(fabric, lambda: line.connected, ranks=(rank,))
    cut, its_gate = line.tcp, fabric[1 - rank]._roads.gate
    line.cut()
    pump(fabric, lambda: its_gate.admit() or (line.connected and line.tcp is not cut), ranks=(rank,))


def pacing_rate(line) -> int:
    return struct.unpack("Q", line.tcp.option(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8))[0]


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize("breaks", [1, 3])
def test_a_broken_connection_loses_and_doubles_nothing(lane: Lane, breaks: int) -> None:
    nbytes = {Lane.BULK: 200_000, Lane.EXPRESS: 3_000}[lane]
    with pair(credit_bytes=64 * 2**20) as fabric:
        data = [pattern(index, nbytes) for index in range(120)]
        sends = []
        for index, payload in enumerate(data):
            sends.append(fabric[0].send(1, 7, memoryview(payload)))
            if index % (120 // breaks) == 60 // breaks:
                break_line(fabric, 0, lane)
        receives = [fabric[1].recv(0, 7, nbytes) for _ in data]
        settle(fabric, *sends, *receives)
        assert [ticket.status for ticket in sends] == [DONE] * 120
        assert [bytes(ticket.view) for ticket in receives] == data, "in order, each once"
        extra = fabric[1].recv(0, 7, nbytes)
        fabric[1].poll(now_ns() + 20 * MS)
        assert extra.status is PENDING
        assert fabric[0].counters()["resent_bytes"] % nbytes == 0
        if lane is Lane.BULK:
            assert fabric[0].counters()["resent_bytes"] > 0


def test_traffic_in_both_directions_survives_cuts_of_every_line() -> None:
    with pair(credit_bytes=1_000_000) as fabric:
        tickets: list[Ticket] = []
        wanted = []
        for turn in range(8):
            for rank in (0, 1):
                for size in (100, 50_000, 3_000, 200_000):
                    payload = pattern(turn * 8 + rank + size, size)
                    tickets.append(fabric[rank].send(1 - rank, size, memoryview(payload)))
                    into = memoryview(bytearray(size))
                    wanted.append((fabric[1 - rank].recv(rank, size, size, into), into, payload))
            break_line(fabric, turn % 2, Lane(turn // 2 % 2))
        settle(fabric, *tickets, *(ticket for ticket, *_ in wanted))
        for ticket, into, payload in wanted:
            assert (ticket.status, bytes(into)) == (DONE, payload)


def test_an_acknowledgement_that_went_with_its_connection_is_given_again() -> None:
    with pair() as fabric:
        ticket = fabric[0].send(1, 1, memoryview(b"x" * 10))
        peer = fabric[1]._peers[0]
        deadline_ns = now_ns() + 10_000 * MS
        while not peer.inbound.received[Lane.EXPRESS] and now_ns() < deadline_ns:
            fabric[1]._roads.gate.turn(fabric[1]._roads.gate.descriptors, fabric[1]._take)
        peer.inbound.told()  # as if it had been handed to the connection that breaks now
        break_line(fabric, 1, Lane.EXPRESS)
        settle(fabric, ticket)
        assert ticket.status is DONE


def test_pace_and_congestion_control_are_set_again_after_a_reconnect() -> None:
    with pair(congestion="reno") as fabric:
        line = line_of(fabric[0], 1, Lane.BULK)
        line.pace(12_345_678.9)
        assert pacing_rate(line) == 12_345_678
        break_line(fabric, 0, Lane.BULK)
        pump(fabric, lambda: line.tcp is not None)
        assert pacing_rate(line) == 12_345_678
        assert line.tcp.option(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"reno")
        assert line.tcp.names[1] == fabric[1].address.removeprefix("tcp://")


def test_a_peer_whose_host_refuses_new_connections_is_lost_at_once() -> None:
    with pair(tolerance_ns=10**18) as fabric:
        kept = fabric[0].send(1, 1, memoryview(bytes(200_000)))
        timed = fabric[0].send(1, 2, memoryview(bytes(10)), Window(now_ns() + 10**12, None, 1e6))
        awaited = fabric[0].recv(1, 3, 10)
        fabric[1].abort()
        pump(fabric, lambda: awaited.status is not PENDING, ranks=(0,))
        assert [ticket.status for ticket in (timed, awaited)] == [FAILED] * 2
        assert kept.status is FAILED
        assert isinstance(kept.error, PeerLost)
        assert str(awaited.error) == "rank 1: its connection ended and new ones are refused"
        with pytest.raises(PeerLost, match="rank 1: its connection ended"):
            fabric[0].send(1, 4, memoryview(b"x"))
        with pytest.raises(PeerLost, match="rank 1: its connection ended"):
            fabric[0].recv(1, 4, 1)


def test_a_port_that_somebody_else_took_over_is_no_return() -> None:
    """Whoever accepts and hangs up again and again must not prolong the grace."""
    with pair(tolerance_ns=GRACE_NS) as fabric:
        host, _, port = fabric[1].address.removeprefix("tcp://").rpartition(":")
        awaited = fabric[0].recv(1, 3, 10)
        fabric[1].abort()
        stop = threading.Event()
        with contextlib.closing(socket.socket()) as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.bind((host, int(port)))
            stranger.listen()
            stranger.settimeout(0.05)

            def hang_up() -> None:
                while not stop.is_set():
                    with contextlib.suppress(TimeoutError):
                        stranger.accept()[0].close()

            thread = threading.Thread(target=hang_up)
            thread.start()
            try:
                pump(fabric, lambda: awaited.status is not PENDING, ranks=(0,))
            finally:
                stop.set()
                thread.join()
        assert isinstance(awaited.error, PeerLost)
        assert str(awaited.error) == "rank 1: nothing came through for 0.3 s"


def foreign_frames(endpoint: SlottedEndpoint) -> list[list[bytes]]:
    def header(**changes: object) -> bytes:
        fields = {"kind": FrameKind.DATA, "lane": Lane.BULK, "source": 0, "tag": 1, "token": endpoint._post.token,
                  "total": 7, "offset": 0, "sequence": 0, "acks": (0, 0), "consumed": 0} | changes  # fmt: skip
        return Header(**fields).encode()

    return [
        [b""],
        [b"GET / HTTP/1.1"],
        [os.urandom(len(header()))],
        [header(token=endpoint._post.token ^ 1), b"payload"],
        [header(source=5), b"payload"],
        [header(source=1), b"from itself"],
        [header()],
        [header(), b"one", b"too many"],
        [header(kind=FrameKind.BYE, token=0)],
        [header(kind=FrameKind.HELLO, token=0)] * 3,
    ]


@contextlib.contextmanager
def sender(address: str, token: int | None) -> Iterator[zmq.Socket]:
    """A socket of somebody who knows the job's token, or shows none."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.linger, made.sndhwm = 1000, 0
        if token is not None:
            gate.show(made, token)
        made.connect(address)
        yield made


def test_senders_that_know_the_token_and_not_the_protocol_are_counted_and_do_no_harm() -> None:
    with pair() as fabric:
        frames = foreign_frames(fabric[1])
        with sender(fabric[1].address, fabric[1]._post.token) as stranger:
            for message in frames:
                stranger.send_multipart(message)
            pump(fabric, lambda: fabric[1].counters()["foreign_frames"] >= len(frames))
            ticket = fabric[1].recv(0, 1, 100_000)
            sent = fabric[0].send(1, 1, memoryview(pattern(3, 100_000)))
            settle(fabric, sent, ticket)
            assert bytes(ticket.view) == pattern(3, 100_000)
            assert fabric[1].counters()["duplicates"] == 0


def test_strangers_on_the_port_are_not_let_in() -> None:
    with pair() as fabric:
        host, _, port = fabric[1].address.removeprefix("tcp://").rpartition(":")
        with (
            sender(fabric[1].address, None) as nameless, sender(fabric[1].address, fabric[1]._post.token ^ 1) as other,
            socket.create_connection((host, int(port))), socket.create_connection((host, int(port))) as raw,
        ):  # fmt: skip
            for stranger in (nameless, other):
                with contextlib.suppress(zmq.Again):  # it knows that it is refused
                    for message in foreign_frames(fabric[1]):
                        stranger.send_multipart(message, zmq.DONTWAIT)
            raw.sendall(b"\x16\x03\x01" + os.urandom(2000))
            pump(fabric, lambda: fabric[1].counters()["refused_connections"] > 0)
            ticket = fabric[1].recv(0, 1, 100_000)
            sent = fabric[0].send(1, 1, memoryview(pattern(3, 100_000)))
            settle(fabric, sent, ticket)
            assert bytes(ticket.view) == pattern(3, 100_000)
            assert fabric[1].counters()["foreign_frames"] == 0


def greeted(address: str, mechanism: bytes) -> socket.socket:
    """Return a connection over which ZeroMQ's protocol was begun, as far as nobody asks who it is (RFC 23)."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32))
    return made


def is_ended(made: socket.socket, sends: bytes) -> bool:
    """Tell whether a connection comes to its end while more and more is sent."""
    made.settimeout(5)  # less than there is for a handshake
    try:
        for _ in range(64):
            made.sendall(sends)
        while made.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_messages_without_an_end_are_not_collected_for_those_who_are_not_let_in() -> None:
    endless = b"\x03" + (2**20).to_bytes(8, "big") + bytes(2**20)  # a long frame, and more to come
    ready = b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
    hello = b"\x06" + (8 * gate.LARGEST_FRAME_BYTES).to_bytes(8, "big") + b"\x05HELLO"
    with pair() as fabric, greeted(fabric[1].address, b"NULL") as null, greeted(fabric[1].address, b"PLAIN") as plain:
        assert is_ended(null, ready + endless)
        assert is_ended(plain, hello + bytes(2**20)), "nor is a command larger than what is held for each"
        settle(fabric, fabric[0].send(1, 1, memoryview(b"on")), fabric[1].recv(0, 1, 2))


def test_a_flood_is_taken_a_part_at_a_time() -> None:
    with pair() as fabric, sender(fabric[1].address, fabric[1]._post.token) as stranger:
        floods = 20 * gate.TURN_MESSAGES
        for _ in range(floods):
            stranger.send(b"x" * 64)
        inlet = fabric[1]._roads._inlet
        pump(fabric, lambda: fabric[1]._roads.gate.admit() or inlet.getsockopt(zmq.EVENTS) & zmq.POLLIN, ranks=(0,))
        fabric[1]._roads.gate._has_messages = True  # it was looked at, so the socket will not tell again
        seen = []
        while fabric[1].counters()["foreign_frames"] < floods:
            before = fabric[1].counters()["foreign_frames"]
            fabric[1].arm(now_ns() + 60_000 * MS)
            assert select.select([fabric[1].fileno()], [], [], 10)[0], "what is left makes the descriptor readable"
            fabric[1].poll(0)
            seen.append(fabric[1].counters()["foreign_frames"] - before)
            assert not fabric[1]._roads.gate.has_more or fabric[1]._next_ns() <= now_ns(), "it goes on at once"
        assert max(seen) <= gate.TURN_MESSAGES


def test_messages_larger_than_a_frame_arrive_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("peer", "departures"):
        monkeypatch.setattr(f"detcoll_slotted.{user}.LARGEST_FRAME_BYTES", 100_000)
    nbytes = 1_000_005
    with pair(credit_bytes=250_000) as fabric:
        for window in (None, Window(now_ns(), None, 1e10), Window(now_ns(), now_ns() + 10**11, 1e10)):
            sends = [fabric[0].send(1, 1, memoryview(pattern(seed, nbytes)), window) for seed in (1, 2)]
            for seed in (1, 2):
                received = fabric[1].recv(0, 1, nbytes)
                settle(fabric, received)
                assert bytes(received.view) == pattern(seed, nbytes)
                received.release()
            settle(fabric, *sends)
            assert {ticket.status for ticket in sends} == {DONE}
        assert fabric[0]._peers[1].outbound.next_sequence[Lane.BULK] == 3 * 2 * 11


def test_little_credit_moves_everything_and_bounds_memory() -> None:
    credit = 10_000
    with pair(credit_bytes=credit) as fabric:
        data = [pattern(index, 4_500 + index * 50) for index in range(100)] + [pattern(7, 50_000), pattern(8, 5_000)]
        sends = [fabric[0].send(1, index, memoryview(payload)) for index, payload in enumerate(data)]
        fabric[1].poll(now_ns() + 20 * MS)
        for index, payload in enumerate(data):
            assert fabric[1]._mail.held_bytes(0) <= max(credit, len(payload))
            ticket = fabric[1].recv(0, index, len(payload))
            settle(fabric, ticket)
            assert bytes(ticket.view) == payload
            ticket.release()
        settle(fabric, *sends)
        assert {ticket.status for ticket in sends} == {DONE}


def test_what_is_lent_counts_until_it_is_released() -> None:
    with pair(credit_bytes=10_000) as fabric:
        sends = [fabric[0].send(1, 1, memoryview(bytes(6_000))) for _ in range(2)]
        first, second = (fabric[1].recv(0, 1, 6_000) for _ in range(2))
        settle(fabric, first, sends[0])
        for rank in (1, 0, 1):
            fabric[rank].poll(now_ns() + 10 * MS)
        assert second.status is PENDING
        first.release()
        settle(fabric, second, sends[1])
        second.release()


def test_small_ones_pass_a_clogged_lane_but_never_one_of_their_own_tag() -> None:
    with pair(credit_bytes=10_000) as fabric:
        large = [fabric[0].send(1, 1, memoryview(pattern(number, 9_000))) for number in range(3)]
        same = fabric[0].send(1, 1, memoryview(b"same"))
        other = fabric[0].send(1, 2, memoryview(b"other"))
        received = fabric[1].recv(0, 2, 5)
        settle(fabric, received, other)
        assert same.status is PENDING
        for number in range(3):
            ticket = fabric[1].recv(0, 1, 9_000)
            settle(fabric, ticket)
            assert bytes(ticket.view) == pattern(number, 9_000)
            ticket.release()
        last = fabric[1].recv(0, 1, 4)
        settle(fabric, last, same, *large)
        assert bytes(last.view) == b"same"


def test_a_window_that_has_passed_or_is_too_short_is_missed() -> None:
    with pair() as fabric:
        view = memoryview(bytes(100_000))
        passed = fabric[0].send(1, 1, view, Window(now_ns() - 20 * MS, now_ns() - 10 * MS, 1e9))
        short = fabric[0].send(1, 2, view, Window(now_ns(), now_ns() + 10 * MS, 1e6))
        settle(fabric, passed, short)
        assert [passed.status, short.status] == [MISSED] * 2
        assert fabric[0].counters()["missed_sends"] == 2


def send_a_part(fabric: ThreadFabric, clock: Clock, content: bytes, rate: float) -> Ticket:
    """Let rank 0 send what of a message fits in a window of 100 ms that is open now."""
    with clock.held() as begins_ns:
        ticket = fabric[0].send(1, 1, memoryview(content), Window(begins_ns, begins_ns + 100 * MS, rate))
        fabric[0].poll(0)
    return ticket


def test_a_message_is_cut_where_its_window_ends_and_arrives_whole() -> None:
    clock = Clock()
    with pair(clock) as fabric:
        content = pattern(1, 200_000)
        first = send_a_part(fabric, clock, content, 1e6)
        other = fabric[0].send(1, 2, memoryview(pattern(2, 9_000)))
        settle(fabric, first)
        assert first.status is MISSED
        assert 16_384 <= first.sent_bytes <= 100_000
        with pytest.raises(UsageError, match=f"of the one before it {200_000 - first.sent_bytes} are left"):
            fabric[0].send(1, 1, memoryview(content))
        rest = fabric[0].send(1, 1, memoryview(content)[first.sent_bytes :], Window(now_ns(), None, 1e9))
        again = fabric[0].send(1, 1, memoryview(pattern(3, 50)))
        received = [fabric[1].recv(0, 1, 200_000), fabric[1].recv(0, 2, 9_000), fabric[1].recv(0, 1, 50)]
        settle(fabric, rest, other, again, *received)
        assert [bytes(ticket.view) for ticket in received] == [content, pattern(2, 9_000), pattern(3, 50)]
        assert fabric[0].counters()["missed_sends"] == 0


def test_parts_are_sent_again_after_a_break() -> None:
    clock = Clock()
    with pair(clock, credit_bytes=200_000) as fabric:
        content = pattern(5, 600_000)
        ticket = send_a_part(fabric, clock, content, 4e6)
        settle(fabric, ticket)
        assert ticket.status is MISSED
        sent_bytes = ticket.sent_bytes
        assert sent_bytes > 0
        break_line(fabric, 0, Lane.BULK)
        into = bytearray(len(content))
        received = fabric[1].recv(0, 1, len(content), memoryview(into))
        while sent_bytes < len(content):
            window = Window(now_ns(), now_ns() + 8 * MS, 40e6)
            ticket = fabric[0].send(1, 1, memoryview(content)[sent_bytes:], window)
            settle(fabric, ticket)
            sent_bytes += ticket.sent_bytes if ticket.status is MISSED else ticket.nbytes
        settle(fabric, received)
        assert into == content


def test_a_send_waits_for_its_window_and_takes_its_rate() -> None:
    with pair() as fabric:
        begins_ns = now_ns() + 100 * MS
        window = Window(begins_ns, begins_ns + 5_000 * MS, 50e6)
        tickets = [fabric[0].send(1, tag, memoryview(bytes(20_000)), window) for tag in range(3)]
        received = [fabric[1].recv(0, tag, 20_000) for tag in range(3)]
        settle(fabric, *tickets, *received)
        assert [ticket.status for ticket in tickets] == [DONE] * 3
        assert all(ticket.started_ns >= begins_ns - MS for ticket in tickets)
        assert all(ticket.ended_ns >= begins_ns for ticket in received)
        assert pacing_rate(line_of(fabric[0], 1, Lane.BULK)) == 50_000_000


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("groups", [{}, {"pace_groups": {0: 1, 1: 2, 2: 2}}])
def test_a_thread_stopped_before_it_sends_has_sent_later(groups, closes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler may stop a thread between the reading of the clock for a turn and a send."""
    stopped_ns = 5 * MS
    with ThreadFabric(SlottedTransport(), 3, groups) as fabric:
        fabric.run(lambda here: here.meet())
        monkeypatch.setattr(fabric[0]._post, "_clock", SimpleNamespace(now_ns=lambda: now_ns() + stopped_ns))
        begins_ns = now_ns() + 20 * MS
        window = Window(begins_ns, begins_ns + 5_000 * MS if closes else None, 50e6)
        tickets = [fabric[0].send(1, tag, memoryview(bytes(20_000)), window) for tag in range(3)]
        settle(fabric, *tickets, *[fabric[1].recv(0, tag, 20_000) for tag in range(3)])
        for ticket in tickets:
            assert ticket.started_ns >= begins_ns + stopped_ns
            assert ticket.left_ns - ticket.started_ns >= 400_000, "20,000 bytes at 50 MB/s"


def test_timed_sends_end_as_missed_where_credit_never_comes() -> None:
    with pair(credit_bytes=10_000) as fabric:
        fabric[0].send(1, 1, memoryview(bytes(9_000)))
        window = Window(now_ns(), now_ns() + 100 * MS, 1e9)
        ticket = fabric[0].send(1, 2, memoryview(bytes(9_000)), window)
        settle(fabric, ticket)
        assert ticket.status is MISSED
        fabric[1].recv(0, 1, 9_000)


def test_a_send_without_credit_delays_only_its_own_peer() -> None:
    with ThreadFabric(SlottedTransport(), 3, {"credit_bytes": 10_000}) as fabric:
        fabric.run(lambda here: here.meet())
        fabric[0].send(1, 1, memoryview(bytes(9_000)))  # all the credit that rank 1 gives
        window = Window(now_ns(), now_ns() + 60_000 * MS, 1e9)
        held_up, behind, other = (fabric[0].send(peer, 2, memoryview(bytes(9_000)), window) for peer in (1, 1, 2))
        pump(fabric, lambda: other.started_ns > 0, ranks=(0,))
        assert held_up.started_ns == behind.started_ns == 0
        fabric[1].recv(0, 1, 9_000, memoryview(bytearray(9_000)))
        pump(fabric, lambda: held_up.started_ns > 0)
        assert behind.started_ns == 0, "nor may the second pass the first"
        assert fabric[0].cancel(behind)


def test_what_is_consumed_last_is_told_at_the_next_poll() -> None:
    with pair(acknowledge_delay_ns=60_000 * MS) as fabric:
        fabric[0].send(1, 1, memoryview(bytes(9_000)))
        pump(fabric, lambda: fabric[1]._mail.held_bytes(0) > 0)
        fabric[1].arm(now_ns() + 60_000 * MS)  # or its timer, which has gone off, makes it look
        assert fabric[1].recv(0, 1, 9_000, memoryview(bytearray(9_000))).status is DONE
        fabric[1].poll(0)
        pump(fabric, lambda: fabric[0]._peers[1].outbound.consumed_bytes == 9_000, ranks=(0,))


def test_what_has_come_is_told_once_it_is_much_even_while_it_is_held() -> None:
    with pair(acknowledge_delay_ns=60_000 * MS, credit_bytes=80_000) as fabric:
        waiting = fabric[1].recv(0, 9, 1)
        sent = fabric[0].send(1, 1, memoryview(bytes(10_000)))
        lent = fabric[1].recv(0, 1, 10_000)
        settle(fabric, sent)
        assert lent.view is not None
        assert fabric[0]._peers[1].outbound.consumed_bytes == 0
        assert fabric[1].cancel(waiting)


def test_opened_and_closed_many_times_it_leaves_nothing() -> None:
    def inventory() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def once(abort: bool) -> None:
        with pair() as fabric:
            ticket = fabric[1].recv(0, 1, 100_000)
            settle(fabric, fabric[0].send(1, 1, memoryview(bytes(100_000))), ticket)
            if abort:
                fabric[0].abort()

    once(False)
    before = inventory()
    for number in range(20):
        once(abort=number % 5 == 4)
    deadline_ns = now_ns() + 10_000 * MS
    while max(map(operator.sub, inventory(), before)) > 0 and now_ns() < deadline_ns:
        select.select([], [], [], 0.001)  # threads that were joined still have to vanish
    assert max(map(operator.sub, inventory(), before)) <= 0


def test_it_closes_at_once_whatever_the_deadline_where_all_close() -> None:
    with pair() as fabric:
        settle(fabric, fabric[0].send(1, 1, memoryview(bytes(10))), fabric[1].recv(0, 1, 10))
        deadline_ns = now_ns() + 10**15
        threads = [threading.Thread(target=fabric[rank].close, args=(deadline_ns,), daemon=True) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def test_who_is_lost_while_others_connect_is_told_at_once() -> None:
    meeting, clock = LocalMeeting(2), MonotonicClock()
    endpoints: list[SlottedEndpoint] = [None, None]  # type: ignore[list-item]

    def open_rank(rank: int) -> None:
        options = {"tolerance_ns": 10**18}
        endpoints[rank] = SlottedTransport().open(rank, 2, meeting.member(rank), clock, options)

    in_threads(2, open_rank)
    addresses = {rank: endpoint.address for rank, endpoint in enumerate(endpoints)}
    try:
        endpoints[0]._addresses.update({1: addresses[1]})
        peer = endpoints[0]._reach(1, now_ns() + 30_000 * MS)
        deadline_ns = now_ns() + 20_000 * MS
        while not all(line.connected for line in peer.lines) and now_ns() < deadline_ns:
            endpoints[0]._wait_and_look(now_ns() + MS)
            endpoints[1]._roads.gate.admit()
        endpoints[1].abort()
        with pytest.raises(ConnectError, match="did not reach rank 1: rank 1: its connection ended and new"):
            endpoints[0].connect(addresses, now_ns() + 30_000 * MS)
    finally:
        for endpoint in endpoints:
            endpoint.abort()


class _Meeting:
    """A rendezvous of one rank on a given address."""

    def __init__(self, host: str, listen_host: str = "") -> None:
        self.host, self.listen_host = host, listen_host or host
        self._inner = LocalMeeting(1).member(0)

    def exchange(self, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
        return self._inner.exchange(name, payload, deadline_ns)


def test_an_address_off_loopback_is_refused_unless_insecure() -> None:
    with pytest.raises(UsageError, match=r"192\.0\.2\.1, which is not a loopback.*DETCOLL_INSECURE"):
        SlottedTransport().open(0, 1, _Meeting("192.0.2.1"), MonotonicClock(), {})
    with pytest.raises(TransportUnavailable, match=r"cannot bind a free port on 192\.0\.2\.1"):
        SlottedTransport().open(0, 1, _Meeting("192.0.2.1"), MonotonicClock(), {"insecure": True})


@pytest.mark.parametrize("told", ["outside.example.org", "203.0.113.5", "2001:db8::5"])
@pytest.mark.parametrize("transport", [SlottedTransport(), TcpTransport()], ids=["slotted", "tcp"])
def test_others_may_be_told_an_address_that_is_none_of_this_host(told: str, transport: Transport) -> None:
    endpoint = transport.open(0, 1, _Meeting(told, "127.0.0.1"), MonotonicClock(), {})
    try:
        assert told in endpoint.address
        assert "127.0.0.1" not in endpoint.address
    finally:
        endpoint.abort()


@pytest.mark.parametrize("options", [{"credit": 5}, {"credit_bytes": "much"}, {"ports": 5}])
def test_unknown_and_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="options of slotted"):
        SlottedTransport().open(0, 1, _Meeting("127.0.0.1"), MonotonicClock(), options)


def test_ports_are_taken_from_the_range_in_turn() -> None:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(1)]
        port = taken[0].getsockname()[1]
        with pytest.raises(TransportUnavailable, match=f"a port from {port} to {port}"):
            SlottedTransport().open(0, 1, _Meeting("127.0.0.1"), MonotonicClock(), {"ports": (port, port)})
        endpoint = SlottedTransport().open(0, 1, _Meeting("127.0.0.1"), MonotonicClock(), {"ports": (port, port + 50)})
        try:
            assert port < int(endpoint.address.rpartition(":")[2]) <= port + 50
        finally:
            endpoint.abort()


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    endpoint = SlottedTransport().open(0, 1, _Meeting("::1"), MonotonicClock(), {})
    assert endpoint.address.startswith("tcp://[::1]:")
    endpoint.close(now_ns())


def test_where_the_library_hides_payloads_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constant, "_LIBRARY", None)
    with pair() as fabric:
        data = pattern(0, 2**20)
        sent, received = fabric[0].send(1, 1, memoryview(data)), fabric[1].recv(0, 1, len(data))
        settle(fabric, sent, received)
        assert bytes(received.view or b"") == data
        received.release()


def test_what_is_sent_again_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[int] = []

    def send_constant(push, view) -> None:
        lent.append(view.nbytes)
        constant.send_constant(push, view)

    monkeypatch.setattr("detcoll_slotted.post.send_constant", send_constant)
    with pair() as fabric:
        data = pattern(0, 2**20)
        sent = fabric[0].send(1, 1, memoryview(data))
        peer = fabric[0]._peers[1]
        for kept in peer.outbound.kept[Lane.BULK]:
            fabric[0]._post.transmit_kept(peer, Lane.BULK, kept, again=True)
        received = fabric[1].recv(0, 1, len(data))
        settle(fabric, sent, received)
        pump(fabric, lambda: fabric[1].counters()["duplicates"] == 1)
        assert lent == [len(data)]
        assert bytes(received.view or b"") == data
        received.release()


def test_flows_warm_up_one_after_another_where_each_shall_have_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(3)}
    transmit = Post.transmit

    def watched(self, peer, lane, kind, *rest, **options) -> None:
        if kind is FrameKind.WARM:
            begun[self._rank].append((peer.rank, now_ns()))
        transmit(self, peer, lane, kind, *rest, **options)

    monkeypatch.setattr(Post, "transmit", watched)
    options = {"warm_up_peers": frozenset(range(3)), "warm_up_bytes": 131_072, "warm_up_bytes_per_s": 1e7}
    with ThreadFabric(SlottedTransport(), 3, options | {"warm_up_in_turn": True}):
        for rank, order in ((0, [1, 2]), (1, [2, 0]), (2, [0, 1])):
            assert [peer for peer, _ in begun[rank]] == [order[0]] * 2 + [order[1]] * 2
            assert begun[rank][2][1] - begun[rank][0][1] >= 13.1072 * MS  # what the first takes at its pace


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may exceed the system's limits of send buffers")
def test_send_buffers_and_credit_hold_what_is_under_way() -> None:
    under_way = 2**26
    options = {"warm_up_peers": frozenset({1}), "pace_groups": {0: 0, 1: 1, 2: 2}, "in_flight_bytes": under_way}
    with ThreadFabric(SlottedTransport(), 3, options) as fabric:
        fabric.run(lambda here: here.meet())
        for rank, held in ((1, True), (2, False)):
            peer = fabric[0]._peers[rank]
            assert (peer.outbound.credit_bytes == 2 * under_way) is held
            for lane in Lane:
                told = peer.lines[lane].tcp.option(socket.SOL_SOCKET, socket.SO_SNDBUF, 4)
                buffer_bytes = struct.unpack("i", told)[0]
                assert (buffer_bytes >= tcp.BUFFER_SHARE * under_way) is (held and lane is Lane.BULK)


def test_without_the_right_to_exceed_limits_send_buffers_are_what_the_system_permits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    permitted = 2 * tcp._last_number("/proc/sys/net/core/wmem_max")
    for grows_to, expected in ((2**40, 0), (1, permitted)):
        monkeypatch.setattr(tcp, "_grows_to_bytes", lambda most=grows_to: most)
        with socket.socket() as made:
            before = made.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            tcp._set_send_buffer(_Unprivileged(made), 2**30)
            assert made.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == (expected or before)


class _Unprivileged:
    """A socket that refuses what needs CAP_NET_ADMIN, as the kernel does."""

    def __init__(self, made: socket.socket) -> None:
        self._made = made

    def setsockopt(self, level: int, name: int, value: int) -> None:
        if name == tcp.SO_SNDBUFFORCE:
            raise PermissionError
        self._made.setsockopt(level, name, value)


def test_a_rank_that_waits_for_nobody_any_more_acknowledges_what_came() -> None:
    with pair(acknowledge_delay_ns=60_000 * MS) as fabric:
        awaited = fabric[1].recv(0, 7, 10)
        sent = fabric[0].send(1, 1, memoryview(bytes(100)))
        pump(fabric, lambda: fabric[1]._mail.held_bytes(0) > 0)
        fabric[1].arm(now_ns() + 60_000 * MS)
        assert fabric[1].cancel(awaited)
        fabric[1].poll(0)
        pump(fabric, lambda: sent.status is DONE, ranks=(0,))


def test_what_is_refused_changes_nothing() -> None:
    with pair() as fabric:
        endpoint = fabric[0]
        endpoint.connect({5: fabric[1].address}, now_ns() + MS, needed=[])
        for refused in (lambda: endpoint.recv(5, -1, 4), lambda: endpoint.send(5, -1, memoryview(b"x"))):
            with pytest.raises(UsageError, match="tag=-1"):
                refused()
        assert 5 not in endpoint._peers
        endpoint.discard(8, 2)
        endpoint._peers[1].outbound.begun[9] = 100_000, 50_000
        with pytest.raises(UsageError, match="of the one before it 50000 are left"):
            endpoint.send(1, 9, memoryview(bytes(10)))
        assert endpoint._mail.drops(9)


def test_discarded_receives_end_and_what_came_gives_its_credit_back() -> None:
    with pair(credit_bytes=10_000) as fabric:
        group = 5 << 20
        early = fabric[0].send(1, group | 1, memoryview(bytes(9_000)))
        held_up = fabric[0].send(1, 3, memoryview(bytes(9_000)))
        pump(fabric, lambda: fabric[1]._mail.held_bytes(0) > 0)
        awaited, other = fabric[1].recv(0, group | 2, 10), fabric[1].recv(0, 6 << 20, 10)
        fabric[1].discard(group | 77, 20)
        assert awaited in fabric[1].poll(0)
        assert awaited.status is TicketStatus.CANCELLED
        received = fabric[1].recv(0, 3, 9_000)
        settle(fabric, early, held_up, received)
        assert (early.status, received.status, other.status) == (DONE, DONE, PENDING)
        received.release()


def test_what_is_discarded_goes_on_being_dropped_until_its_tags_are_used_again() -> None:
    with pair(credit_bytes=10_000) as fabric:
        group = 5 << 20
        fabric[1].discard(group, 20)
        late = [fabric[0].send(1, group | tag, memoryview(bytes(9_000))) for tag in range(4)]
        small = fabric[0].send(1, group | 9, memoryview(bytes(9)))
        settle(fabric, *late, small)
        assert {ticket.status for ticket in [*late, small]} == {DONE}
        assert not fabric[1]._mail.held_bytes(0)
        received = fabric[1].recv(0, group | 1, 9_000)
        again = fabric[0].send(1, group | 1, memoryview(pattern(1, 9_000)))
        settle(fabric, received, again)
        assert bytes(received.view) == pattern(1, 9_000)
        received.release()


def test_sends_of_which_nothing_has_left_are_withdrawn_with_their_prefix() -> None:
    with pair(credit_bytes=10_000) as fabric:
        gone, kept = (fabric[0].send(1, 1 << 63 | tag, memoryview(bytes(9_000))) for tag in range(2))
        timed = fabric[0].send(1, 1 << 63 | 2, memoryview(bytes(9)), Window(now_ns() + 10**12, None, 1e9))
        fabric[0].discard(1 << 63, 8)
        assert set(fabric[0].poll(0)) == {kept, timed}
        assert kept.status is timed.status is TicketStatus.CANCELLED
        received = fabric[1].recv(0, 1 << 63, 9_000)
        settle(fabric, gone, received)
        assert gone.status is received.status is DONE


def test_a_message_of_which_a_part_has_left_may_begin_anew_after_it_was_discarded() -> None:
    clock = Clock()
    with pair(clock) as fabric:
        first = send_a_part(fabric, clock, bytes(200_000), 1e6)
        settle(fabric, first)
        assert first.status is MISSED
        fabric[0].discard(1, 0)
        again = fabric[0].send(1, 1, memoryview(pattern(1, 70_000)))
        received = fabric[1].recv(0, 1, 70_000)
        settle(fabric, again, received)
        assert bytes(received.view) == pattern(1, 70_000)


def test_a_lost_peer_costs_its_own_tickets_only() -> None:
    with ThreadFabric(SlottedTransport(), 3, {"credit_bytes": 10_000}) as fabric:
        fabric.run(lambda here: here.meet())
        window = Window(now_ns() + 10**12, None, 1e6)
        lost = [fabric[0].send(2, 1, memoryview(bytes(9_000))), fabric[0].send(2, 2, memoryview(bytes(9_000)))]
        lost += [fabric[0].recv(2, 1, 10), fabric[0].send(2, 3, memoryview(bytes(10)), window)]
        timed = fabric[0].send(1, 3, memoryview(bytes(10)), window)
        blocked = [fabric[0].send(1, tag, memoryview(pattern(tag, 9_000))) for tag in (1, 2)]
        awaited = fabric[0].recv(1, 4, 10)
        fabric[2].abort()
        pump(fabric, lambda: all(ticket.status is not PENDING for ticket in lost))
        assert {ticket.status for ticket in lost} == {FAILED}
        assert all(isinstance(ticket.error, PeerLost) for ticket in lost)
        for tag, sent in zip((1, 2), blocked, strict=True):
            received = fabric[1].recv(0, tag, 9_000)
            settle(fabric, received, sent)
            assert bytes(received.view) == pattern(tag, 9_000)
            received.release()
        settle(fabric, awaited, fabric[1].send(0, 4, memoryview(bytes(10))))
        assert (awaited.status, timed.status) == (DONE, PENDING)
        assert fabric[0].cancel(timed)


def watch_bulk(monkeypatch: pytest.MonkeyPatch, endpoint: SlottedEndpoint) -> list[tuple[int, int, int]]:
    """Return a list that fills with peer and tag of bulk messages, and what connections to others had not sent then."""
    seen: list[tuple[int, int, int]] = []
    put = endpoint._post.put

    def watched(peer, lane, ticket, view) -> int:
        if lane is Lane.BULK:
            others = [other.lines[lane] for other in endpoint._peers.values() if other is not peer]
            seen.append((peer.rank, ticket.tag, sum(line.unsent_bytes() for line in others)))
        return put(peer, lane, ticket, view)

    monkeypatch.setattr(endpoint._post, "put", watched)
    return seen


def shared_pace(clock: Clock | None = None, credit_bytes: int = 16_777_216) -> ThreadFabric:
    options = {"pace_groups": {0: 1, 1: 2, 2: 2}, "credit_bytes": credit_bytes}
    return ThreadFabric(SlottedTransport(), 3, options, clock)


@pytest.mark.parametrize("closes", [False, True])
def test_peers_of_one_pace_take_turns_and_are_never_busy_together(
    monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    rate, size, clock = 1e6, 100_000, Clock()
    with shared_pace(clock) as fabric:
        fabric.run(lambda here: here.meet())
        seen = watch_bulk(monkeypatch, fabric[0])
        order = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
        payload = memoryview(bytes(size))
        with clock.held() as begins_ns:
            window = Window(begins_ns, begins_ns + 50_000 * MS if closes else None, rate)
            sends = [fabric[0].send(peer, tag, payload, window) for peer, tag in order]
        received = [fabric[peer].recv(0, tag, size) for peer, tag in order]
        pump(fabric, lambda: all(t.status is not PENDING for t in sends + received), ranks=(0, 1, 2))
        assert {ticket.status for ticket in sends + received} == {DONE}
        if not closes:
            assert [entry[:2] for entry in seen] == [(1, 0), (1, 1), (2, 0), (1, 2), (2, 1), (2, 2)]
        assert max(unsent for *_, unsent in seen) <= rate * SWITCH_AHEAD_NS / 1e9
        sends.sort(key=lambda ticket: ticket.started_ns)
        for before, after in itertools.pairwise(sends):
            assert after.left_ns - before.left_ns >= int(size / rate * 1e9), "one rate for both"


def test_who_has_a_pace_alone_runs_ahead_until_another_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, size, clock, payload = 1e7, 50_000, Clock(), memoryview(bytes(50_000))
    with shared_pace(clock) as fabric:
        fabric.run(lambda here: here.meet())
        seen = watch_bulk(monkeypatch, fabric[0])
        with clock.held() as begins_ns:
            window = Window(begins_ns, None, rate)
            sends = [fabric[0].send(1, tag, payload, window) for tag in range(30)]
            assert len(seen) >= int(ALONE_AHEAD_NS / 1e9 * rate / size), "as far as it may run ahead"
            sends += [fabric[0].send(2, tag, payload, window) for tag in range(3)]
        received = [fabric[1].recv(0, tag, size) for tag in range(30)]
        received += [fabric[2].recv(0, tag, size) for tag in range(3)]
        pump(fabric, lambda: all(t.status is not PENDING for t in sends + received), ranks=(0, 1, 2))
        assert {ticket.status for ticket in sends + received} == {DONE}
        order = [entry[0] for entry in seen]
        first = order.index(2)
        assert order[first : first + 6] == [2, 1, 2, 1, 2, 1], "from then on they take turns"
        assert max(unsent for *_, unsent in seen[: first + 6]) <= rate * SWITCH_AHEAD_NS / 1e9
        sends.sort(key=lambda ticket: ticket.left_ns)
        for before, after in itertools.pairwise(sends):
            assert after.left_ns - before.left_ns >= int(size / rate * 1e9), "one rate for both"


def test_where_the_host_paces_messages_are_handed_over_at_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, size = 1e7, 50_000
    takes_ns = int(size / rate * 1e9)
    clock = Clock()
    with pair(clock, host_paced=True) as fabric:
        seen, payload = watch_bulk(monkeypatch, fabric[0]), memoryview(bytes(size))
        with clock.held() as begins_ns:
            sends = [fabric[0].send(1, tag, payload, Window(begins_ns, None, rate)) for tag in range(6)]
            assert len(seen) == 1, "the others would leave more than a moment too early"
        received = [fabric[1].recv(0, tag, size) for tag in range(6)]
        settle(fabric, *sends, *received)
        assert {ticket.status for ticket in sends + received} == {DONE}
        for before, after in itertools.pairwise(sends):
            assert after.left_ns - before.left_ns >= takes_ns
            assert after.started_ns >= before.left_ns - AHEAD_NS
        break_line(fabric, 0, Lane.BULK)
        line = line_of(fabric[0], 1, Lane.BULK)
        pump(fabric, lambda: line.tcp is not None)
        assert pacing_rate(line) == 2**64 - 1, "the kernel keeps out of it"


@pytest.mark.parametrize("prompt", [True, False])
def test_threads_of_the_library_go_ahead_where_that_is_wanted(prompt: bool) -> None:
    def classes() -> dict[str, int]:
        found = {}
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # one of an earlier test has just ended
                found[task] = os.sched_getscheduler(int(task))
        return found

    before, goes_ahead = classes(), prompt and may_be_prompt()

    def theirs() -> set[int]:
        return {name for task, name in classes().items() if task not in before}

    with pair(prompt=prompt):
        deadline_ns = now_ns() + 10_000 * MS
        while goes_ahead and os.SCHED_RR not in theirs() and now_ns() < deadline_ns:
            os.sched_yield()  # threads change their class themselves, once they run
        assert (os.SCHED_RR in theirs()) == goes_ahead


def may_be_prompt() -> bool:
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(make_prompt()))
    asking.start()
    asking.join()
    return answers[0]


def test_what_is_sent_again_keeps_others_of_its_pace_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, size = 1e6, 300_000
    with shared_pace() as fabric:
        fabric.run(lambda here: here.meet())
        monkeypatch.setattr(fabric[1]._intake, "acknowledge", lambda peer, now_ns: None)
        window = Window(now_ns(), None, rate)
        fabric[0].send(1, 1, memoryview(bytes(size)), window)
        behind = fabric[0].send(2, 1, memoryview(bytes(9_000)), window), fabric[2].recv(0, 1, 9_000)
        pump(fabric, lambda: all(ticket.status is DONE for ticket in behind), ranks=(0, 1, 2))
        began_ns = now_ns()
        fabric[0]._peers[1].lines[Lane.BULK].cut()
        pump(fabric, lambda: fabric[0].counters()["resent_bytes"])
        late = fabric[0].send(2, 2, memoryview(bytes(9_000)), window)
        received = fabric[2].recv(0, 2, 9_000)
        pump(fabric, lambda: late.status is received.status is DONE, ranks=(0, 1, 2))
        assert late.left_ns - began_ns >= int((size + 9_000) / rate * 1e9)


def test_a_peer_without_credit_keeps_nobody_of_its_pace_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with shared_pace(credit_bytes=10_000) as fabric:
        fabric.run(lambda here: here.meet())
        seen = watch_bulk(monkeypatch, fabric[0])
        window = Window(now_ns(), None, 1e7)
        sends = [fabric[0].send(1, tag, memoryview(bytes(9_000)), window) for tag in range(3)]
        others = [fabric[0].send(2, tag, memoryview(bytes(9_000)), window) for tag in range(3)]
        received = [fabric[2].recv(0, tag, 9_000, memoryview(bytearray(9_000))) for tag in range(3)]
        pump(fabric, lambda: all(t.status is DONE for t in others + received), ranks=(0, 2))
        assert [entry[:2] for entry in seen] == [(1, 0), (2, 0), (2, 1), (2, 2)]
        assert fabric[0].cancel(sends[1])
        later = [fabric[1].recv(0, tag, 9_000, memoryview(bytearray(9_000))) for tag in (0, 2)]
        settle(fabric, sends[0], sends[2], *later)
        assert sends[2].status is DONE


def test_ranks_are_connected_to_when_they_are_needed() -> None:
    with partly_connected(4, lambda rank: {rank ^ 1}) as endpoints:
        before = count_descriptors()
        awaited = endpoints[2].recv(0, 5, 9_000)
        sends = [endpoints[0].send(2, 5, memoryview(pattern(5, 9_000))), endpoints[0].send(2, 6, memoryview(b"small"))]
        assert endpoints[0].poll(0) == [], "nothing blocks"
        turn_all(endpoints, lambda: awaited.status is DONE)
        late = endpoints[2].recv(0, 6, 5)
        turn_all(endpoints, lambda: all(ticket.status is DONE for ticket in [*sends, late]))
        assert bytes(awaited.view) == pattern(5, 9_000)
        assert count_descriptors() - before == 4, "two for each of two ranks, and none for the others"
        assert 3 not in endpoints[0]._peers


def test_who_is_needed_and_not_reached_costs_the_tickets_with_it() -> None:
    with partly_connected(3, lambda rank: {0, 1} - {rank} if rank < 2 else set(), tolerance_ns=GRACE_NS) as endpoints:
        endpoints[2].abort()
        lost = [endpoints[0].recv(2, 1, 10), endpoints[0].send(2, 1, memoryview(bytes(9_000)))]
        turn_all(endpoints[:2], lambda: all(ticket.status is not PENDING for ticket in lost))
        assert {ticket.status for ticket in lost} == {FAILED}
        for ticket in lost:
            assert isinstance(ticket.error, PeerLost)
            assert str(ticket.error) == "rank 2 was not reached within 0.3 s"
        tickets = [endpoints[0].send(1, 1, memoryview(b"on")), endpoints[1].recv(0, 1, 2)]
        turn_all(endpoints[:2], lambda: all(ticket.status is DONE for ticket in tickets))


@contextlib.contextmanager
def partly_connected(
    size: int, needed: Callable[[int], set[int]], **options: object
) -> Iterator[list[SlottedEndpoint]]:
    """Open endpoints that know all addresses and connect to some at first."""
    meeting, clock = LocalMeeting(size), MonotonicClock()

    def join(rank: int) -> SlottedEndpoint:
        endpoint = SlottedTransport().open(rank, size, meeting.member(rank), clock, options)
        told = meeting.member(rank).exchange("addresses", endpoint.address.encode(), now_ns() + 20_000 * MS)
        addresses = {peer: address.decode() for peer, address in enumerate(told)}
        endpoint.connect(addresses, now_ns() + 20_000 * MS, needed=needed(rank))
        return endpoint

    endpoints = in_threads(size, join)
    try:
        yield endpoints
    finally:
        for endpoint in endpoints:
            endpoint.abort()


def turn_all(endpoints: Sequence[SlottedEndpoint], until: Callable[[], bool]) -> None:
    deadline_ns = now_ns() + 30_000 * MS
    while not until():
        assert now_ns() < deadline_ns, "it never came to that"
        for endpoint in endpoints:
            endpoint.poll(now_ns() + MS)


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("wide", [False, True])
def test_few_descriptors_a_peer(wide: bool) -> None:
    groups = {rank: rank for rank in range(6)} if wide else {}

    def opened(size: int) -> int:
        before = count_descriptors()
        with ThreadFabric(SlottedTransport(), size, {"pace_groups": groups}) as fabric:
            fabric.run(lambda here: here.meet())
            return count_descriptors() - before

    for_each_rank = opened(6) / 6 - opened(2) / 2
    assert for_each_rank <= 4 * (5 if wide else 2)


_OPENS = """
import os, resource, sys
from detcoll.errors import ConnectError, TransportUnavailable
from detcoll.testing import LocalMeeting, MonotonicClock
from detcoll_slotted import SlottedTransport
import resource as _  # all is imported before descriptors run out
def opens(spare):
    limit = len(os.listdir("/proc/self/fd")) - 1 + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    before = len(os.listdir("/proc/self/fd"))
    clock = MonotonicClock()
    try:
        endpoint = SlottedTransport().open(0, 9, LocalMeeting(1).member(0), clock, {})
        addresses = {rank: f"tcp://127.0.0.1:{rank + 1}" for rank in range(9)}
        endpoint.connect(addresses, clock.now_ns() + 500_000_000)
    except (ConnectError, TransportUnavailable) as error:
        print(type(error).__name__, error)
        if isinstance(error, ConnectError):
            endpoint.abort()
    print("left", len(os.listdir("/proc/self/fd")) - before)
for spare in map(int, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        opens(spare)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, spare
"""


def test_too_few_descriptors_are_told_and_never_waited_for() -> None:
    spares = range(1, 32)
    ended = subprocess.run(
        [sys.executable, "-c", _OPENS, *map(str, spares)], capture_output=True, text=True, timeout=90, check=False
    )
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    assert said[1::2] == ["left 0"] * len(spares)
    for spare, told in zip(spares, said[::2], strict=True):
        kind = "ConnectError" if spare >= OWN_DESCRIPTORS else "TransportUnavailable"
        wanted = rf"{kind} .*needs about \d+ file descriptors, the limit is \d+; raise it with ulimit -n"
        assert re.fullmatch(wanted, told), spare


def test_where_zeromq_lacks_descriptors_what_was_opened_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count beforehand can be overtaken by others of the process."""
    before = count_descriptors()
    made = zmq.Context.socket
    left = [0]

    def socket_while_there_are(self: zmq.Context, kind: int, **options: object) -> zmq.Socket:
        left[0] -= 1
        if left[0] < 0:
            raise zmq.ZMQError(errno.EMFILE)
        return made(self, kind, **options)

    monkeypatch.setattr(zmq.Context, "socket", socket_while_there_are)
    for too_few in (0, 1):
        left[0] = too_few
        with pytest.raises(TransportUnavailable, match="ulimit -n"):
            SlottedTransport().open(0, 1, _Meeting("127.0.0.1"), MonotonicClock(), {})
    for enough in (2, 3):
        left[0] = enough
        endpoint = SlottedTransport().open(0, 1, _Meeting("127.0.0.1"), MonotonicClock(), {})
        with pytest.raises(ConnectError, match="Too many open files"):
            endpoint.connect({1: "tcp://127.0.0.1:1"}, now_ns() + 100 * MS)
        endpoint.abort()
    assert count_descriptors() == before


def through(proxy: FaultyProxy, tolerance_ns: int, *, wide: bool) -> ThreadFabric:
    options = {"proxy": proxy.address, "proxied_peers": frozenset({0, 1}), "tolerance_ns": tolerance_ns}
    return pair(**options, pace_groups={0: 0, 1: 1} if wide else {})


@pytest.mark.parametrize("wide", [False, True])
def test_a_path_that_forgets_its_connections_gets_new_ones_and_loses_nothing(wide: bool) -> None:
    with FaultyProxy() as proxy, through(proxy, 6_000 * MS, wide=wide) as fabric:
        settle(fabric, fabric[0].send(1, 1, memoryview(bytes(100_000))), fabric[1].recv(0, 1, 100_000))
        proxy.forget()
        tickets, received = [], []
        for size in (100, 50_000, 200_000):
            for rank in (0, 1):
                payload = pattern(size + rank, size)
                tickets.append(fabric[rank].send(1 - rank, size, memoryview(payload)))
                received.append((fabric[1 - rank].recv(rank, size, size), payload))
        settle(fabric, *tickets, *(ticket for ticket, _ in received))
        for ticket, payload in received:
            assert ticket.status is DONE
            assert bytes(ticket.view) == payload
        assert {ticket.status for ticket in tickets} == {DONE}


def test_a_path_that_forgets_an_idle_connection_is_renewed_before_it_is_needed() -> None:
    with FaultyProxy() as proxy, through(proxy, 6_000 * MS, wide=True) as fabric:
        settle(fabric, fabric[0].send(1, 1, memoryview(bytes(100_000))), fabric[1].recv(0, 1, 100_000))
        lines = [line for rank in (0, 1) for line in fabric[rank]._peers[1 - rank].lines]
        pump(fabric, lambda: all(line.connected for line in lines))
        forgotten = [line.tcp for line in lines]
        proxy.forget()
        pump(fabric, lambda: all(line.connected and line.tcp not in forgotten for line in lines))
        sent = fabric[0].send(1, 2, memoryview(pattern(2, 100_000)))
        received = fabric[1].recv(0, 2, 100_000)
        settle(fabric, sent, received)
        assert bytes(received.view) == pattern(2, 100_000)
        assert fabric[0].counters()["resent_bytes"] == 0


OUTLIVES = """
import sys, time
import zmq
import detcoll_slotted.line
from detcoll.testing.fabric import ThreadFabric
from detcoll.testing.socks import FaultyProxy
from detcoll_slotted import SlottedTransport
from detcoll_slotted.line import Line

class Watched(Line):
    def note(self, event, value, endpoint):
        if event == zmq.EVENT_CLOSED:
            failed.add(self)  # it waits now until it tries again
        return super().note(event, value, endpoint)

failed = set()
detcoll_slotted.line.Line = Watched
with FaultyProxy() as proxy:
    options = {"proxy": proxy.address, "proxied_peers": frozenset({0, 1}), "pace_groups": {0: 0, 1: 1}}
    fabric = ThreadFabric(SlottedTransport(), 2, options).__enter__()
    here, gone = fabric[0], fabric[1]
    gone.abort()
    peer = here._peers[1]
    while not failed.issuperset(peer.lines):
        here.poll(time.monotonic_ns() + 1_000_000)
    if "lost" in sys.argv:
        here._lose(peer, ConnectionError("nothing came through"))
    here.close(time.monotonic_ns()) if "close" in sys.argv else here.abort()
print("ended")
"""


@pytest.mark.parametrize("ways", [["close"], ["abort"], ["lost", "close"]])
def test_who_outlives_a_peer_behind_a_proxy_ends_in_order(ways: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-c", OUTLIVES, *ways], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")


def test_a_connection_behind_a_proxy_that_ended_is_closed_before_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def guard_and_wait(made: zmq.Socket[bytes], tolerance_ns: int) -> None:
        health.guard(made, tolerance_ns)
        made.reconnect_ivl_max = 0

    stayed: list[object] = []
    monkeypatch.setattr(roads, "guard", guard_and_wait)
    monkeypatch.setattr(detcoll_slotted.line, "_FIRST_RETRY_BEHIND_PROXY_MS", 60_000)
    monkeypatch.setattr(
        roads, "ctypes", SimpleNamespace(pythonapi=SimpleNamespace(Py_IncRef=stayed.append), py_object=id)
    )
    with FaultyProxy() as proxy, through(proxy, 6_000 * MS, wide=True) as fabric:
        fabric[1].abort()
        pump(fabric, lambda: not any(line.connected for line in fabric[0]._peers[1].lines), ranks=(0,))
    assert stayed == []


def test_a_connection_behind_a_proxy_whose_end_nobody_has_read_is_not_tried_again_while_the_socket_lingers() -> None:
    with FaultyProxy() as proxy, through(proxy, 6_000 * MS, wide=True) as fabric:
        lines = fabric[0]._peers[1].lines
        fabric[1].abort()
        for line in lines:
            assert line.trunk.monitor.poll(30_000)
        assert all(line.connected for line in lines)
        fabric[0].close(now_ns())
        assert [line.trunk._lines for line in lines] == [{}, {}]


def test_nothing_is_lent_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detcoll_slotted.post.send_constant", lambda *_: pytest.fail("lent"))
    with FaultyProxy() as proxy, through(proxy, 6_000 * MS, wide=True) as fabric:
        payload = pattern(1, 500_000)
        sent, received = fabric[0].send(1, 1, memoryview(payload)), fabric[1].recv(0, 1, 500_000)
        settle(fabric, sent, received)
        assert bytes(received.view) == payload


def test_a_path_that_is_silent_altogether_loses_the_peer_and_says_what_is_known() -> None:
    with FaultyProxy() as proxy, through(proxy, 1_000 * MS, wide=True) as fabric:
        awaited, sent = fabric[0].recv(1, 1, 10), fabric[0].send(1, 1, memoryview(bytes(10)))
        proxy.go_dark()
        pump(fabric, lambda: awaited.status is not PENDING and sent.status is not PENDING, ranks=(0,))
        for ticket in (awaited, sent):
            assert isinstance(ticket.error, PeerLost)
            assert str(ticket.error) == "rank 1: nothing came through for 1 s"


def test_connections_are_kept_alive_and_end_where_nothing_is_acknowledged() -> None:
    with pair(tolerance_ns=30_000 * MS) as fabric:
        for lane in Lane:
            told = [
                struct.unpack("i", line_of(fabric[0], 1, lane).tcp.option(socket.IPPROTO_TCP, name, 4))[0]
                for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            ]
            assert told == [10, 5, 3, 5_000]
            alive = line_of(fabric[0], 1, lane).tcp.option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 4)
            assert struct.unpack("i", alive) == (1,)
