"""The hub: the server side of the rendezvous, one thread in the process of rank 0.

All ranks connect, rank 0 too. The hub lets them in once all are there, hands round what they exchange, and tells
everybody when a connection ends without a goodbye or when a rank gives up. It answers a little before the earliest
deadline among the waiting ranks, so that they learn who is missing before their own time is over.

Rank 0 hears last, once what the others are to hear is in the hands of the kernel. What it does next may keep the
interpreter, and so this thread, until all have come: mpi4py holds the interpreter's lock throughout ``MPI_Init``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

from detcoll.errors import FrameError
from detcoll.rendezvous import wire
from detcoll.rendezvous.sockets import is_loopback, keep_alive

_log = logging.getLogger("detcoll")

_HELLO_NS = 10 * 10**9
_STRANGERS = 64
"""Connections that may wait without a hello, beyond one for each rank."""


@dataclass(eq=False, slots=True)
class _Peer:
    """One connection; ``rank`` is None until its hello was accepted."""

    connection: socket.socket
    hello_by_ns: int
    inbox: wire.Inbox = field(default_factory=lambda: wire.Inbox(wire.HELLO_BYTES))
    outbox: bytearray = field(default_factory=bytearray)
    rank: int | None = None
    is_ending: bool = False


@dataclass(eq=False, slots=True)
class _Exchange:
    """Who has come to one exchange, and when the first of them must be told that it failed."""

    name: str
    answer_by_ns: int
    payloads: dict[int, bytes] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)


class Hub:
    """Serves one world of ``size`` ranks on ``listener``, which it owns from here on.

    Parameters
    ----------
    listener : socket.socket
        Listens already.
    size, job, epoch
        What a hello must say to be let in.
    directory : socket.socket, optional
        A listening Unix socket; whoever of the same user connects there is told ``where`` the listener is.
    """

    def __init__(
        self,
        listener: socket.socket,
        size: int,
        job: str,
        epoch: int,
        directory: socket.socket | None = None,
        where: str = "",
    ) -> None:
        self.size, self.job, self.epoch, self.where = size, job, epoch, where
        self._selector = selectors.DefaultSelector()
        for one, serve in ((listener, self._accept), (directory, self._direct)):
            if one is not None:
                one.setblocking(False)
                self._selector.register(one, selectors.EVENT_READ, serve)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._strangers: dict[_Peer, None] = {}
        self._ranks: dict[int, _Peer] = {}
        self._gone: dict[int, str] = {}
        self._exchanges: dict[int, _Exchange] = {0: _Exchange("join", 2**63)}
        self._failed: dict[int, wire.Missing | wire.Refused] = {}
        self._told: set[int] = set()
        self._broken: list[tuple[_Peer, str]] = []
        self._is_assembled = False
        self._finish_ns: int | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="detcoll-rendezvous", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self, deadline_ns: int) -> None:
        """Serve until every rank has left, or was told why the world failed, or the deadline passed. Idempotent."""
        if self._is_closed:
            return
        self._finish_ns = deadline_ns
        os.eventfd_write(self._wake, 1)  # the thread may have ended by now, so closing this is not its task
        self._thread.join(max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9) + 5.0)
        if not self._thread.is_alive():
            self._is_closed = True
            os.close(self._wake)

    def forget(self) -> None:
        """Close the descriptors in a forked child, where the thread does not exist."""
        self._release()
        if not self._is_closed:
            self._is_closed = True
            os.close(self._wake)

    def _serve(self) -> None:
        try:
            while not self._is_over(now_ns := time.monotonic_ns()):
                for key, events in self._selector.select(self._wait_s(now_ns)):
                    if key.fileobj == self._wake:
                        os.eventfd_read(self._wake)
                    elif isinstance(key.data, _Peer):
                        self._serve_peer(key.data, events)
                    else:
                        key.data(key.fileobj)
                while self._broken:
                    self._drop(*self._broken.pop())
                self._on_time(time.monotonic_ns())
        finally:
            self._part()
            self._release()

    def _is_over(self, now_ns: int) -> bool:
        if self._finish_ns is None:
            return False
        is_done = not self._ranks if self._is_assembled else len(self._told) == self.size
        return is_done or now_ns >= self._finish_ns

    def _wait_s(self, now_ns: int) -> float | None:
        times = [exchange.answer_by_ns for exchange in self._exchanges.values() if exchange.payloads]
        times += [peer.hello_by_ns for peer in list(self._strangers)[:1]]
        if self._finish_ns is not None:
            times.append(self._finish_ns)
        return max(0.0, (min(times) - now_ns) / 1e9) if times else None

    def _on_time(self, now_ns: int) -> None:
        for peer in [peer for peer in self._strangers if now_ns >= peer.hello_by_ns]:
            self._drop(peer, "it said no hello")
        for number, exchange in list(self._exchanges.items()):
            if exchange.payloads and now_ns >= exchange.answer_by_ns:
                absent = [rank for rank in exchange.ranks if rank not in exchange.payloads]
                self._fail(number, wire.Missing(number, absent, ""))

    def _part(self) -> None:
        """Tell who is still there that rank 0 takes the hub along, as far as can be done without waiting."""
        if self._is_assembled:
            self._tell_others(None, wire.Closing())

    def _release(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other side changed its mind
            connection, _ = listener.accept()
            connection.setblocking(False)
            keep_alive(connection)
            peer = _Peer(connection, time.monotonic_ns() + _HELLO_NS)
            self._strangers[peer] = None
            self._selector.register(connection, selectors.EVENT_READ, peer)
            if len(self._strangers) > _STRANGERS + self.size:
                self._drop(next(iter(self._strangers)), "too many say no hello")

    def _direct(self, directory: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = directory.accept()
            with connection:
                if peer_uid(connection) == os.getuid():
                    connection.send(self.where.encode(), socket.MSG_NOSIGNAL)

    def _serve_peer(self, peer: _Peer, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(peer)
            if events & selectors.EVENT_READ and not peer.is_ending:
                self._read(peer)
        except OSError as error:
            self._drop(peer, error.strerror or str(error))
        except FrameError as error:
            self._drop(peer, str(error))

    def _read(self, peer: _Peer) -> None:
        data = peer.connection.recv(2**18)
        if not data:
            self._drop(peer, "its connection ended")
            return
        peer.inbox.feed(data)
        while not peer.is_ending and (message := peer.inbox.to_hub()) is not None:
            self._take(peer, message)

    def _take(self, peer: _Peer, message: wire.ToHub) -> None:
        if isinstance(message, wire.Hello) != (peer.rank is None):
            raise FrameError("a hello comes first and once")
        match message:
            case wire.Hello():
                self._greet(peer, message)
            case wire.Gather():
                self._gather(peer, message)
            case wire.Abort(kind, text, group):
                self._tell_others(peer, wire.AbortedRank(_rank_of(peer), kind, text[: wire.TEXT_CHARS], group))
            case wire.Bye():
                self._leave(peer)

    def _greet(self, peer: _Peer, hello: wire.Hello) -> None:
        refusal = self._refusal(hello)
        if refusal is not None:
            is_about_world = refusal.fault == "usage" and hello.version == wire.VERSION and not self._is_assembled
            self._end_with(peer, refusal)
            if is_about_world:
                self._fail(0, wire.Refused("world", refusal.text))
                self._told.add(hello.rank)
            return
        if 0 in self._failed:
            self._end_with(peer, self._failed[0])
            self._told.add(hello.rank)
            return
        peer.rank, peer.inbox.largest_bytes = hello.rank, wire.FRAME_BYTES
        self._strangers.pop(peer, None)
        self._ranks[hello.rank] = peer
        self._arrive(0, peer, b"", hello.remaining_ms)

    def _refusal(self, hello: wire.Hello) -> wire.Refused | None:
        """Return why this hello cannot be let in, if so."""
        if hello.version != wire.VERSION:
            return wire.Refused(
                "usage", f"rank {hello.rank} speaks version {hello.version} of the rendezvous, rank 0 {wire.VERSION}"
            )
        if hello.job != self.job:
            return wire.Refused("world", "it belongs to another job; set DETCOLL_RENDEZVOUS to an address of your own")
        if hello.size != self.size:
            return wire.Refused(
                "usage", f"rank {hello.rank} says that the world has {hello.size} ranks, rank 0 says {self.size}"
            )
        if not 0 <= hello.rank < self.size:
            return wire.Refused("usage", f"rank {hello.rank} is not in a world of {self.size} ranks")
        if hello.epoch > self.epoch:
            return wire.Refused("later", "the meeting before is not over yet")
        if hello.epoch < self.epoch:
            return wire.Refused("world", "its ranks have met before, without this process")
        if hello.rank in self._gone:
            return wire.Refused("usage", f"rank {hello.rank} was here before and {self._gone[hello.rank]}")
        if hello.rank in self._ranks:
            return wire.Refused("usage", f"two processes say that they are rank {hello.rank}")
        return None

    def _gather(self, peer: _Peer, gather: wire.Gather) -> None:
        failure = self._failed.get(gather.number)
        if failure is not None:
            self._send(peer, failure)
            return
        exchange = self._exchanges.setdefault(gather.number, _Exchange(gather.name, 2**63))
        if exchange.name != gather.name:
            text = f"rank {peer.rank} came to {gather.name!r} while others came to {exchange.name!r}"
            exchange.payloads[_rank_of(peer)] = b""
            self._fail(gather.number, wire.Missing(gather.number, [], text))
        elif self._gone:
            exchange.payloads[_rank_of(peer)] = b""
            text = ", ".join(f"rank {rank} {why}" for rank, why in sorted(self._gone.items()))
            self._fail(gather.number, wire.Missing(gather.number, sorted(self._gone), text))
        else:
            self._arrive(gather.number, peer, gather.payload, gather.remaining_ms, gather.ranks)

    def _arrive(
        self, number: int, peer: _Peer, payload: bytes, remaining_ms: int, ranks: list[int] | None = None
    ) -> None:
        exchange = self._exchanges[number]
        exchange.ranks = ranks or list(range(self.size))
        exchange.payloads[_rank_of(peer)] = payload
        # The answer must arrive before the rank's own time is over.
        patience_ns = max(0, remaining_ms - min(500, remaining_ms // 10)) * 10**6
        exchange.answer_by_ns = min(exchange.answer_by_ns, time.monotonic_ns() + min(patience_ns, 2**62))
        if len(exchange.payloads) < len(exchange.ranks):
            return
        del self._exchanges[number]
        if number == 0:
            self._is_assembled = True
            answer: wire.FromHub = wire.Welcome(self._reach())
        else:
            answer = wire.Gathered(number, [exchange.payloads[rank] for rank in exchange.ranks])
        frame = wire.pack(answer)
        for rank in sorted(exchange.payloads, reverse=True):
            if rank in self._ranks:
                self._send(self._ranks[rank], frame)

    def _fail(self, number: int, failure: wire.Missing | wire.Refused) -> None:
        """Tell all that came to an exchange, and all that will, that it failed."""
        self._failed.setdefault(number, failure)
        exchange = self._exchanges.pop(number, None)
        frame = wire.pack(failure)
        for rank in exchange.payloads if exchange is not None else ():
            if rank in self._ranks:
                self._send(self._ranks[rank], frame)
                self._told.add(rank)

    def _reach(self) -> str:
        """Return an address by which another host reached this one."""
        local = (str(peer.connection.getsockname()[0]) for peer in self._ranks.values())
        return next((host for host in local if not is_loopback(host)), "")

    def _leave(self, peer: _Peer) -> None:
        rank = _rank_of(peer)
        del self._ranks[rank]
        self._gone[rank] = "has left"
        self._end_with(peer, None)
        for number in [number for number, exchange in self._exchanges.items() if exchange.payloads]:
            self._fail(number, wire.Missing(number, [rank], f"rank {rank} has left"))

    def _drop(self, peer: _Peer, why: str) -> None:
        """End a connection that broke, or a stranger; the loss of a rank is everybody's news."""
        self._strangers.pop(peer, None)
        self._end(peer)
        if peer.rank is None or self._ranks.get(peer.rank) is not peer:
            _log.debug("rendezvous: dropped a connection: %s", why)
            return
        del self._ranks[peer.rank]
        self._gone[peer.rank] = "is lost"
        if self._is_assembled:
            self._tell_others(peer, wire.LostRank(peer.rank))
        elif 0 not in self._failed:
            self._fail(0, wire.Refused("world", f"rank {peer.rank} came, but was gone before all had come"))

    def _tell_others(self, peer: _Peer | None, message: wire.FromHub) -> None:
        frame = wire.pack(message)
        for other in sorted(self._ranks.values(), key=_rank_of, reverse=True):
            if other is not peer:
                self._send(other, frame)

    def _end_with(self, peer: _Peer, message: wire.FromHub | None) -> None:
        """Send a last message and close the connection once it is out."""
        self._strangers.pop(peer, None)
        peer.is_ending = True
        if message is not None:
            self._send(peer, message)
        else:
            self._flush(peer)

    def _send(self, peer: _Peer, message: wire.FromHub | bytes) -> None:
        peer.outbox += message if isinstance(message, bytes) else wire.pack(message)
        try:
            self._flush(peer)
        except OSError as error:
            self._broken.append((peer, error.strerror or str(error)))
        if len(peer.outbox) > 2 * wire.FRAME_BYTES:
            self._broken.append((peer, "it does not read"))

    def _flush(self, peer: _Peer) -> None:
        if peer.connection.fileno() < 0 or self._must_wait(peer):
            return
        with contextlib.suppress(BlockingIOError):
            while peer.outbox:
                del peer.outbox[: peer.connection.send(peer.outbox, socket.MSG_NOSIGNAL)]
        if peer.is_ending and not peer.outbox:
            self._end(peer)
        else:
            interest = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outbox else 0)
            self._selector.modify(peer.connection, interest, peer)
        first = self._ranks.get(0)
        if first is not None and first is not peer and first.outbox and not peer.outbox:
            self._send(first, b"")

    def _must_wait(self, peer: _Peer) -> bool:
        """Whether this is rank 0 and others have yet to hear."""
        return peer.rank == 0 and any(other.outbox for other in self._ranks.values() if other is not peer)

    def _end(self, peer: _Peer) -> None:
        if peer.connection.fileno() >= 0:
            self._selector.unregister(peer.connection)
            peer.connection.close()


def peer_uid(connection: socket.socket) -> int:
    """Return which user is at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _rank_of(peer: _Peer) -> int:
    assert peer.rank is not None
    return peer.rank
