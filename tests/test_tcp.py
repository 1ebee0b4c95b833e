"""What is plain TCP's own: who may connect, how much is held, what still arrives when a peer goes, and whole jobs."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from jobs import environment
from ranks import lines, run_ranks

from detcoll.communicator import Communicator
from detcoll.errors import ConnectError, PeerLost, TransportUnavailable, UsageError
from detcoll.greeting import PAUSE_NS
from detcoll.mailbox import HELD_BYTES
from detcoll.runtime.credit import LARGEST_UNASKED_BYTES, LARGEST_UNTOLD_BYTES
from detcoll.stream import GREETING_NS, StreamEndpoint
from detcoll.testing import FakeClock, LocalMeeting, MonotonicClock, ThreadFabric, pattern
from detcoll.transport import Ticket, TicketStatus
from detcoll_tcp import TcpTransport

HELD = {"held_bytes": 100_000}
PATIENCE_NS = 20_000_000_000
MIB = 2**20


def two(**options: int) -> ThreadFabric:
    return ThreadFabric(TcpTransport(), 2, options)


def settle(fabric: ThreadFabric, *tickets: Ticket) -> None:
    """Poll both ranks in turn until all tickets have ended."""
    deadline_ns = time.monotonic_ns() + PATIENCE_NS
    while any(ticket.status is TicketStatus.PENDING for ticket in tickets):
        assert time.monotonic_ns() < deadline_ns, tickets
        for rank in range(fabric.size):
            fabric[rank].poll(0)


def exchange(fabric: ThreadFabric, tag: int, nbytes: int = 1000) -> None:
    """Send a message in each direction and check both."""
    receives = [fabric[rank].recv(1 - rank, tag, nbytes) for rank in range(2)]
    sends = [fabric[rank].send(1 - rank, tag, memoryview(pattern(rank, nbytes))) for rank in range(2)]
    settle(fabric, *receives, *sends)
    assert [ticket.view for ticket in receives] == [pattern(1, nbytes), pattern(0, nbytes)]


def call(endpoint: StreamEndpoint, said: bytes = b"") -> socket.socket:
    host, _, port = endpoint.address.rpartition(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.sendall(said)
    return made


def is_sent_away(fabric: ThreadFabric, stranger: socket.socket) -> bool:
    """Poll rank 0 until a stranger's connection has ended."""
    deadline_ns = time.monotonic_ns() + PATIENCE_NS
    while time.monotonic_ns() < deadline_ns:
        fabric[0].poll(0)
        if select.select([stranger], [], [], 0.01)[0]:
            try:
                return stranger.recv(1) == b""
            except ConnectionResetError:
                return True
    return False


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(20), struct.pack("<16sI", b"a guess at this", 1) + bytes(1000)],
    ids=["http", "zeros", "guess"],
)
def test_a_stranger_is_sent_away(said: bytes) -> None:
    with two() as fabric, call(fabric[0], said) as stranger:
        assert is_sent_away(fabric, stranger)
        assert fabric[0].counters()["refused_connections"] == 1
        exchange(fabric, 1)


def test_silent_strangers_give_way() -> None:
    with two() as fabric:
        strangers = [call(fabric[0], b"half a hello"[: index % 13]) for index in range(70)]
        assert is_sent_away(fabric, strangers[0])
        exchange(fabric, 1)
        assert fabric[0].counters()["refused_connections"] == 6
        assert not select.select(strangers[6:], [], [], 0)[0]
        for stranger in strangers:
            stranger.close()


def test_silent_strangers_keep_no_rank_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first connection of rank 1 goes through a proxy that keeps its hello until strangers have pushed it out."""
    fabric = two()
    fabric.needed = ()
    with fabric, socket.create_server(("127.0.0.1", 0)) as proxy, contextlib.ExitStack() as opened:
        reach = fabric[1].reach
        addresses = itertools.chain([f"127.0.0.1:{proxy.getsockname()[1]}"], itertools.repeat(fabric[0].address))
        monkeypatch.setattr(fabric[1], "reach", lambda address: reach(next(addresses)))
        received, sent = fabric[0].recv(1, 1, 1), fabric[1].send(0, 1, memoryview(b"x"))
        near = opened.enter_context(proxy.accept()[0])
        far = opened.enter_context(call(fabric[0]))
        for _ in range(65):
            opened.enter_context(call(fabric[0]))
        assert is_sent_away(fabric, far)
        near.close()
        settle(fabric, received, sent)
        assert received.view == b"x"


def test_a_rank_that_is_never_answered_is_given_up() -> None:
    """Whoever listens there closes each connection: no hello is answered, and none is refused."""
    clock = FakeClock()
    endpoint = TcpTransport().open(0, 1, LocalMeeting(1).member(0), clock, {})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        endpoint.connect({0: endpoint.address, 1: address}, clock.now_ns() + PATIENCE_NS, ())
        sent = endpoint.send(1, 1, memoryview(b"x"))
        calls = 0
        while sent.status is TicketStatus.PENDING:
            assert calls < 1000
            listener.accept()[0].close()
            calls += 1
            made = endpoint._outgoing[1].socket
            assert select.select([made], [], [], 20)[0]
            endpoint.poll(clock.now_ns())  # it has ended
            endpoint.poll(clock.advance(PAUSE_NS))
    assert isinstance(sent.error, PeerLost)
    assert calls == pytest.approx(GREETING_NS / PAUSE_NS, abs=2)
    endpoint.abort()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 8, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(taken[0]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)


def test_who_lacks_descriptors_waits_and_lets_callers_in_later(caplog: pytest.LogCaptureFixture) -> None:
    fabric = two()
    fabric.needed = ()
    with fabric:
        received, sent = fabric[0].recv(1, 1, 1), fabric[1].send(0, 1, memoryview(b"x"))
        with no_descriptor_left():
            for _ in range(3):
                fabric[0].poll(0)
            assert not select.select([fabric[0].fileno()], [], [], 0)[0], "it would keep this rank busy"
        assert "rank 0 cannot accept connections of other ranks (Too many open files)" in caplog.text
        settle(fabric, received, sent)
        assert received.view == b"x"


def test_strangers_give_their_descriptors_to_ranks() -> None:
    fabric = two()
    fabric.needed = ()
    with fabric, call(fabric[0]) as stranger:
        fabric[0].poll(0)
        received, sent = fabric[0].recv(1, 1, 1), fabric[1].send(0, 1, memoryview(b"x"))
        with no_descriptor_left():
            settle(fabric, received, sent)
        assert received.view == b"x"
        assert is_sent_away(fabric, stranger)


def test_a_second_connection_of_a_rank_is_refused() -> None:
    with two() as fabric:
        exchange(fabric, 1)
        with call(fabric[0], fabric[1].hello) as again:
            assert is_sent_away(fabric, again)
        exchange(fabric, 2)


def test_who_takes_nothing_makes_the_sender_wait() -> None:
    with two(**HELD) as fabric:
        sends = [fabric[0].send(1, tag, memoryview(pattern(tag, MIB))) for tag in range(64)]
        small = [fabric[0].send(1, 1000 + tag, memoryview(bytes(1))) for tag in range(3)]
        for _ in range(500):
            fabric[0].poll(0)
            assert not fabric[1].poll(0)
        assert fabric[1].mail.held_bytes(0) <= HELD["held_bytes"]
        assert sends[-1].status is TicketStatus.PENDING
        receives = [fabric[1].recv(0, tag, MIB) for tag in range(64)]
        settle(fabric, *sends, *small, *receives)
        assert all(ticket.view == pattern(tag, MIB) for tag, ticket in enumerate(receives))


def test_a_message_behind_others_reaches_its_receive() -> None:
    with two(**HELD) as fabric:
        ahead = [fabric[0].send(1, tag, memoryview(pattern(tag, 90_000))) for tag in range(20)]
        behind = fabric[0].send(1, 99, memoryview(b"behind"))
        for _ in range(50):
            assert not fabric[1].poll(0)
        ticket = fabric[1].recv(0, 99, 6)
        settle(fabric, ticket, behind)
        assert ticket.view == b"behind"
        receives = [fabric[1].recv(0, tag, 90_000) for tag in range(20)]
        settle(fabric, *ahead, *receives)
        assert all(ticket.view == pattern(tag, 90_000) for tag, ticket in enumerate(receives))


def test_what_was_sent_arrives_though_the_sender_left_its_own_mail_unread() -> None:
    with two(**HELD) as fabric:
        unread = [fabric[1].send(0, tag, memoryview(bytes(8 * MIB))) for tag in range(4)]
        settle(fabric, *(fabric[0].send(1, tag, memoryview(pattern(tag, 20_000))) for tag in range(8)))
        fabric[0].abort()
        settle_one(fabric[1], *unread)
        assert any(isinstance(ticket.error, PeerLost) for ticket in unread)
        receives = [fabric[1].recv(0, tag, 20_000) for tag in range(8)]
        settle_one(fabric[1], *receives)
        assert all(ticket.view == pattern(tag, 20_000) for tag, ticket in enumerate(receives))
        with pytest.raises(PeerLost):
            fabric[1].recv(0, 8, 5000)


def settle_one(endpoint: StreamEndpoint, *tickets: Ticket) -> None:
    deadline_ns = time.monotonic_ns() + PATIENCE_NS
    while any(ticket.status is TicketStatus.PENDING for ticket in tickets):
        assert time.monotonic_ns() < deadline_ns, tickets
        endpoint.poll(time.monotonic_ns() + 10_000_000)


def test_a_paused_peer_that_is_reset_keeps_nobody_busy() -> None:
    with two(**HELD) as fabric:
        fabric[0].send(1, 1, memoryview(bytes(MIB)))
        for _ in range(20):
            fabric[0].poll(0)
            fabric[1].poll(0)
        line = fabric[0]._outgoing[1].socket
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
        fabric[0].abort()
        for _ in range(20):
            fabric[1].poll(0)
        assert not select.select([fabric[1].fileno()], [], [], 0)[0]
        lost = fabric[1].recv(0, 2, 1)
        settle_one(fabric[1], lost)
        assert isinstance(lost.error, PeerLost)


def test_a_child_that_holds_the_sockets_of_a_lost_peer_keeps_nobody_busy() -> None:
    with two() as fabric, contextlib.ExitStack() as copies:
        exchange(fabric, 1)
        for line in fabric[0]._open.values():  # as in a child of fork
            copies.enter_context(line.socket.dup())
        ticket = fabric[0].recv(1, 2, 10)
        fabric[1].abort()
        settle_one(fabric[0], ticket)
        assert isinstance(ticket.error, PeerLost)
        with select.epoll() as waiter:
            waiter.register(fabric[0].fileno(), select.EPOLLIN)
            assert waiter.poll(0.1) == []


def test_peers_are_connected_when_they_are_needed() -> None:
    fabric = ThreadFabric(TcpTransport(), 3)
    fabric.needed = ()
    with fabric:
        assert fabric[0].connections() == []
        sent, ticket = fabric[0].send(2, 1, memoryview(b"x")), fabric[2].recv(0, 1, 1)
        settle(fabric, sent, ticket)
        assert [each["dst"] for each in fabric[0].connections()] == [2]
        assert [each["dst"] for each in fabric[2].connections()] == [0], "to see it go"
        assert fabric[1].connections() == []
        fabric[0].abort()
        waiting = fabric[2].recv(0, 2, 1)
        settle_one(fabric[2], waiting)
        assert isinstance(waiting.error, PeerLost)


def test_the_kernel_keeps_idle_connections_in_the_memory_of_firewalls() -> None:
    with two() as fabric:
        made = fabric[1].reach(fabric[0].address)
        with made:
            assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < 30
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) < 30


def test_a_lack_of_descriptors_loses_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = two()
    fabric.needed = ()
    with fabric:

        def refuse(address: str) -> socket.socket:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(fabric[0], "reach", refuse)
        sent = fabric[0].send(1, 1, memoryview(b"x"))
        assert fabric[0].poll(0) == [sent]
        assert "Too many open files" in str(sent.error)


def test_a_rank_that_is_gone_cannot_be_joined() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    endpoint = TcpTransport().open(0, 1, LocalMeeting(1).member(0), MonotonicClock(), {})
    with pytest.raises(ConnectError, match="did not reach rank 1"):
        endpoint.connect({0: endpoint.address, 1: address}, time.monotonic_ns() + 100 * PATIENCE_NS)
    endpoint.abort()


class Elsewhere:
    """A rendezvous on a host whose address others can reach; of documentation (RFC 5737), so it is no host's."""

    host = listen_host = "192.0.2.1"

    def exchange(self, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
        return [payload]


def test_off_loopback_needs_insecure() -> None:
    with pytest.raises(UsageError, match="DETCOLL_INSECURE"):
        TcpTransport().open(0, 1, Elsewhere(), MonotonicClock(), {})
    with pytest.raises(TransportUnavailable, match="cannot listen on 192"):
        TcpTransport().open(0, 1, Elsewhere(), MonotonicClock(), {"insecure": True})


def test_ports_are_kept_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransportUnavailable, match="cannot listen"):
            TcpTransport().open(0, 1, LocalMeeting(1).member(0), MonotonicClock(), {"ports": (port, port)})
    endpoint = TcpTransport().open(0, 1, LocalMeeting(1).member(0), MonotonicClock(), {"ports": (port, port)})
    assert endpoint.address == f"127.0.0.1:{port}"
    endpoint.abort()


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UsageError, match="congestion"):
        TcpTransport().open(0, 1, LocalMeeting(1).member(0), MonotonicClock(), {"congestion": "bbr"})


def test_what_the_engine_sends_unasked_bounds_what_is_held() -> None:
    """Although a mailbox would hold far more while a receive waits, which one for control messages always does."""
    is_measured, count, elems = threading.Event(), 3, 2**20
    held: list[int] = []

    def program(comm: Communicator) -> None:
        groups = [comm.group([0, 1], name) for name in ("a", "b", "c")]
        (mail,) = (endpoint.mail for endpoint in comm._job.assembled.endpoints)
        arrays = [np.full(elems, 1.0 - comm.rank) for _ in range(count * len(groups))]
        works = []
        if comm.rank == 1:
            last = np.zeros(1)
            comm.recv(last, 0)  # what was sent before it on the same connection is here
            assert mail.awaits(0)
            held.append(mail.held_bytes(0))
            is_measured.set()
        for index, array in enumerate(arrays):
            works.append(groups[index % len(groups)].broadcast(array, 0, async_op=True))
        if comm.rank == 0:
            engine = comm._job.loop.engine
            is_sending = True
            while is_sending:
                is_sending = comm._job.loop.ask(
                    lambda now_ns: engine.has_work or engine.credit.unasked_bytes(1) < LARGEST_UNASKED_BYTES // 2
                )
            comm.send(np.ones(1), 1)
            assert is_measured.wait(PATIENCE_NS / 1e9)
        for work in works:
            work.wait()
        assert all((array == 1).all() for array in arrays)

    run_ranks(2, program, transport="tcp")
    notes = 4096 * count * 3
    assert LARGEST_UNASKED_BYTES // 2 < held[0] <= LARGEST_UNASKED_BYTES + LARGEST_UNTOLD_BYTES + notes < HELD_BYTES


PROGRAM = """
import numpy as np, detcoll
comm = detcoll.init()
array = np.full(1_000_003, comm.rank + 1.0)
detcoll.all_reduce(array)
print(comm.transport, set(array.tolist()))
detcoll.finalize()
"""


def test_a_job_under_detcoll_run() -> None:
    command = [sys.executable, "-m", "detcoll", "run", "-n", "3", "--transport", "tcp", sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["tcp {6.0}"] * 3


@pytest.mark.parametrize(("sites", "expected"), [((2, 2), ["TcpEndpoint", "ShmEndpoint"]), ((4,), ["TcpEndpoint"])])
def test_ranks_of_one_site_share_memory(sites: tuple[int, ...], expected: list[str]) -> None:
    def reduce(comm: Communicator) -> list[str]:
        array = np.full(100_003, comm.rank + 1.0, np.float32)
        comm.all_reduce(array)
        assert (array == 10).all()
        return [type(endpoint).__name__ for endpoint in comm._job.assembled.endpoints]

    assert run_ranks(4, reduce, transport="tcp", topology=lines(*sites)) == [expected] * 4
