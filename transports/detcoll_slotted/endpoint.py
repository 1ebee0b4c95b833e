"""A rank's end of the slotted transport: sockets, queues and the one wait."""

from __future__ import annotations

import contextlib
import heapq
import ipaddress
import itertools
import select
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import zmq

from detcoll.errors import Closed, ConnectError, FrameError, PeerLost, UsageError
from detcoll.priority import OWNER, PROGRESS, Urgency, prompt_threads
from detcoll.transport import LARGEST_TAG, Clock, Endpoint, Ticket, TicketKind, TicketStatus, Window
from detcoll_slotted.constant import send_constant
from detcoll_slotted.flow import Inbound, Kept, Outbound
from detcoll_slotted.line import UNPACED, Line
from detcoll_slotted.options import Options
from detcoll_slotted.timer import Timer
from detcoll_slotted.wire import FRAME_BYTES, FrameKind, Header, Lane, decode

EXPRESS_BYTES = 4_096
LARGEST_MESSAGE_BYTES = 2**30
_LEAD_NS = 150_000
"""What a send needs from here through ZeroMQ's thread and TCP to the line, at least: it starts that much earlier."""
_AHEAD_NS = 2_000_000
"""How much of a window may lie in ZeroMQ's and TCP's queues: enough to sleep through, too little to spill far."""
_SETTLE_NS = 300_000
_SHORTEST_WAIT_NS = 100_000
_WARM_FRAME_BYTES = 65_536
_LEAST_LENT_BYTES = 65_536
"""Smaller payloads are copied, which costs less than it does to lend them."""
_HELLO_EVERY_NS = 200_000_000
_PARTING_NS = 500_000_000
_LINGER_MS = 100
_LONG_WAIT_NS = 1_000_000_000


@dataclass(slots=True)
class _Peer:
    """Everything about one other rank."""

    rank: int
    lines: tuple[Line, Line]
    outbound: Outbound
    inbound: Inbound
    blocked: deque[tuple[Ticket, memoryview, Window | None]] = field(default_factory=deque)
    """Bulk sends that wait for credit."""
    lost: Exception | None = None


@dataclass(eq=False, slots=True)
class _Loan:
    """What a lent view counts against the credit of its sender."""

    endpoint: SlottedEndpoint

    def take_back(self, ticket: Ticket) -> None:
        """Count the bytes as consumed, so that the sender's credit comes back."""
        self.endpoint._consumed(ticket.peer, ticket.nbytes)


class SlottedEndpoint(Endpoint):
    """See the package. One thread at a time uses it."""

    def __init__(self, rank: int, host: str, token: int, clock: Clock, options: Options) -> None:
        self._rank, self._token, self._clock, self._options = rank, token, clock, options
        self._peers: dict[int, _Peer] = {}
        self._monitored: dict[int, tuple[_Peer, Lane]] = {}
        self._timed: list[tuple[int, int, Ticket, memoryview, Window]] = []
        self._order = itertools.count()
        self._last_line: Line | None = None
        self._handed_ns = self._drained_ns = 0
        self._urgency = Urgency()
        self._resume_ns = 0
        self._due_ns = 0
        self._posted: dict[tuple[int, int], deque[tuple[Ticket, memoryview | None]]] = {}
        self._early: dict[tuple[int, int], deque[tuple[memoryview, bool]]] = {}
        self._ended: list[Ticket] = []
        self._counted = dict.fromkeys(("resent_bytes", "duplicates", "foreign_frames", "missed_sends"), 0)
        self._closed: Exception | None = None
        self._context = zmq.Context()
        try:
            with prompt_threads():
                self._pull = self._bind(host)
            self._timer = Timer()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._epoll = select.epoll()
        self._pull_fd = self._pull.fileno()
        for descriptor in (self._timer.fd, self._pull_fd):
            self._epoll.register(descriptor, select.EPOLLIN)

    def _bind(self, host: str) -> zmq.Socket[bytes]:
        pull = self._context.socket(zmq.PULL)
        ip = ipaddress.ip_address(host)
        self._ipv6 = ip.version == 6
        self._configure(pull)
        pull.rcvhwm = 0  # bounded by credit, which counts bytes
        pull.maxmsgsize = LARGEST_MESSAGE_BYTES
        where = f"tcp://[{host}]" if self._ipv6 else f"tcp://{host}"
        first, last = self._options.ports or (0, 0)
        for port in range(first, last + 1):
            try:
                pull.bind(f"{where}:{port}")
                break
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or port == last:
                    raise
        self._address = pull.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        return pull

    def _configure(self, made: zmq.Socket[bytes]) -> None:
        made.linger = 0
        made.ipv6 = self._ipv6
        made.tos = self._options.dscp << 2
        made.reconnect_ivl, made.reconnect_ivl_max = 20, 500

    @property
    def address(self) -> str:
        """The ZeroMQ address of this rank's PULL socket."""
        return self._address

    def connect(self, addresses: Mapping[int, str], deadline_ns: int) -> None:
        """Connect both lanes to every peer and wait until hellos have passed in both directions."""
        self._check_open()
        for rank, address in addresses.items():
            if rank != self._rank and rank not in self._peers:
                self._peers[rank] = self._make_peer(rank, address)
        waiting = [self._peers[rank] for rank in addresses if rank != self._rank]
        hello_ns = 0
        while missing := [peer for peer in waiting if not self._joined(peer)]:
            now_ns = self._clock.now_ns()
            self._check_reachable(missing, now_ns >= deadline_ns)
            if now_ns >= hello_ns:
                hello_ns = now_ns + _HELLO_EVERY_NS
                for peer in missing:
                    for lane in Lane:
                        self._transmit(peer, lane, FrameKind.HELLO)
            self._wait(min(deadline_ns, hello_ns))
            self._look_at(missing)
        if self._options.warm_up_bytes:
            self._warm_up([peer for peer in waiting if peer.rank in self._options.warm_up_peers], deadline_ns)

    def _check_reachable(self, missing: Sequence[_Peer], is_late: bool) -> None:
        for peer in missing:
            if peer.lost:
                raise ConnectError(f"rank {self._rank} did not reach rank {peer.rank}: {peer.lost}") from peer.lost
        if is_late:
            ranks = ", ".join(str(peer.rank) for peer in missing)
            raise ConnectError(f"rank {self._rank} did not reach rank {ranks} before the deadline")

    def _look_at(self, peers: Sequence[_Peer]) -> None:
        """Ask the monitors unasked: their descriptors tell only of what comes after a first look."""
        for peer in peers:
            for lane in Lane:
                self._watch(peer, lane, self._clock.now_ns())

    def _warm_up(self, peers: Sequence[_Peer], deadline_ns: int) -> None:
        """Open TCP's windows, which start with ten segments, before the first message counts on them."""
        nothing = memoryview(bytes(_WARM_FRAME_BYTES))
        for peer in sorted(peers, key=lambda peer: (peer.rank < self._rank, peer.rank)):
            peer.lines[Lane.BULK].pace(self._options.warm_up_bytes_per_s)
            for _ in range(0, self._options.warm_up_bytes, _WARM_FRAME_BYTES):
                self._transmit(peer, Lane.BULK, FrameKind.WARM, nothing)
            if self._options.warm_up_in_turn:
                self._let_leave(peer.lines[Lane.BULK], self._options.warm_up_bytes, deadline_ns)
        while cold := [peer.rank for peer in peers if peer.inbound.warm_bytes < self._options.warm_up_bytes]:
            if self._clock.now_ns() >= deadline_ns:
                raise ConnectError(f"rank {self._rank}: warming up with rank {cold} took longer than the deadline")
            self._wait(deadline_ns)

    def _let_leave(self, line: Line, nbytes: int, deadline_ns: int) -> None:
        """Wait until bytes given to a line at its pace have left, as far as the kernel knows of them."""
        paced_ns = self._clock.now_ns() + int(nbytes / self._options.warm_up_bytes_per_s * 1e9)
        while (now_ns := self._clock.now_ns()) < deadline_ns and (now_ns < paced_ns or line.unsent_bytes()):
            self._wait(min(deadline_ns, max(paced_ns, now_ns + _AHEAD_NS)))

    def _joined(self, peer: _Peer) -> bool:
        return peer.inbound.hello and all(line.was_connected for line in peer.lines)

    def _make_peer(self, rank: int, address: str) -> _Peer:
        lines = []
        in_flight = self._options.in_flight_bytes if rank in self._options.warm_up_peers else 0
        for lane in Lane:
            push = self._context.socket(zmq.PUSH)
            self._configure(push)
            push.sndhwm = 0  # bounded by credit, which counts bytes
            if self._options.proxy and rank in self._options.proxied_peers:
                push.setsockopt_string(zmq.SOCKS_PROXY, self._options.proxy)
            line = Line(push, self._options.congestion or None, in_flight if lane is Lane.BULK else 0)
            push.connect(address)
            lines.append(line)
        credit = max(self._options.credit_bytes, 2 * in_flight)
        peer = _Peer(rank, (lines[0], lines[1]), Outbound(credit), Inbound(credit // 8))
        for lane in Lane:
            descriptor = peer.lines[lane].monitor.fileno()
            self._monitored[descriptor] = peer, lane
            self._epoll.register(descriptor, select.EPOLLIN)
        return peer

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Queue ``view`` for ``dst``; without a window it leaves as soon as the peer's credit allows."""
        peer = self._peer(dst, tag, view.nbytes)
        view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        ticket = Ticket(TicketKind.SEND, dst, tag, view.nbytes)
        total, sent = peer.outbound.begun.get(tag, (view.nbytes, 0))
        if sent + view.nbytes != total:
            left = total - sent
            raise UsageError(f"the send with tag={tag} has {view.nbytes} bytes; of the one before it {left} are left")
        if window is not None and (window.not_after_ns is not None or window.not_before_ns > self._clock.now_ns()):
            heapq.heappush(self._timed, (window.not_before_ns, next(self._order), ticket, view, window))
            self._due_ns = 0
            self._send_timed(self._clock.now_ns())
        elif view.nbytes <= EXPRESS_BYTES and window is None and all(tag != entry[0].tag for entry in peer.blocked):
            self._put(peer, peer.outbound.lane_for(tag, Lane.EXPRESS), ticket, view)
        else:
            peer.blocked.append((ticket, view, window))
            self._unblock(peer)
        return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Take ``nbytes`` from ``src``, from what has already arrived where it has."""
        self._peer(src, tag, nbytes, may_be_lost=bool(self._early.get((src, tag))))
        if into is not None:
            if into.nbytes != nbytes or into.readonly or not into.c_contiguous:
                raise UsageError(f"into must be contiguous, writable and of {nbytes} bytes, not {into.nbytes}")
            into = into.cast("B")
        ticket = Ticket(TicketKind.RECV, src, tag, nbytes)
        early = self._early.get((src, tag))
        if early:
            payload, counts = early.popleft()
            if not early:
                del self._early[src, tag]
            self._deliver(ticket, into, payload, counts)
        else:
            self._posted.setdefault((src, tag), deque()).append((ticket, into))
        return ticket

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Move what can be moved; wait until a ticket ends or the deadline passes."""
        self._check_open()
        self._progress()
        if not self._ended and self._clock.now_ns() < deadline_ns:
            self._wait(deadline_ns)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, ticket: Ticket) -> bool:
        """Cancel a receive that nothing matched, or a send of which nothing has left."""
        if ticket.status is not TicketStatus.PENDING or ticket.sent_bytes:
            return False
        if ticket.kind is TicketKind.RECV:
            posted = self._posted.pop((ticket.peer, ticket.tag), deque())
            kept = deque(entry for entry in posted if entry[0] is not ticket)
            found = len(kept) < len(posted)
            if kept:
                self._posted[ticket.peer, ticket.tag] = kept
        else:
            found = self._withdraw(lambda other: other is ticket) != []
        if found:
            self._end(ticket, TicketStatus.CANCELLED)
        return found

    def _withdraw(self, wanted: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take out sends that have not left, and return their tickets."""
        self._due_ns = 0  # the next of those that wait for a window may be due
        taken = [entry[2] for entry in self._timed if wanted(entry[2])]
        self._timed = [entry for entry in self._timed if not wanted(entry[2])]
        heapq.heapify(self._timed)
        for peer in self._peers.values():
            taken += [entry[0] for entry in peer.blocked if wanted(entry[0])]
            peer.blocked = deque(entry for entry in peer.blocked if not wanted(entry[0]))
        return taken

    def fileno(self) -> int | None:
        """Return the epoll descriptor that holds the sockets, their monitors and the timer."""
        return self._epoll.fileno()

    def arm(self, deadline_ns: int) -> bool:
        """Set the timer for what comes next by itself; what arrives makes the descriptor readable."""
        self._check_open()
        if self._ended:
            return False
        self._timer.arm(min(deadline_ns, self._due_ns or self._next_ns()))
        if self._timed:  # to wake up ahead of ranks whose window it is not
            self._urgency.set(OWNER)
        return True

    def keep_time(self) -> None:
        """Give the line what is due."""
        if self._timed:
            now_ns = self._clock.now_ns()
            if self._timed[0][0] <= now_ns + _LEAD_NS and self._resume_ns <= now_ns:
                self._send_timed(now_ns)

    def counters(self) -> Mapping[str, int]:
        """Return retransmitted TCP segments, sends that missed their windows, and what was resent or refused."""
        retransmits = sum(line.info()[1] for peer in self._peers.values() for line in peer.lines)
        return self._counted | {"retransmits": retransmits}

    def connections(self) -> list[dict[str, object]]:
        """Return which TCP connections carry what, for holding a capture of the line against the calendar."""
        rows = []
        for peer in self._peers.values():
            for lane in Lane:
                names = peer.lines[lane].names()
                if names:
                    rows.append({"dst": peer.rank, "lane": lane.name.lower(), "local": names[0], "remote": names[1]})
        return rows

    def abort(self) -> None:
        """Close all sockets at once."""
        self._shut(0, Closed(f"the endpoint of rank {self._rank} was aborted"))

    def close(self, deadline_ns: int) -> None:
        """Wait for acknowledgements until the deadline, say goodbye, close."""
        if self._closed is not None:
            return
        while any(not p.outbound.idle or p.blocked for p in self._peers.values() if not p.lost and not p.inbound.bye):
            if self._clock.now_ns() >= deadline_ns:
                break
            self._wait(deadline_ns)
        for peer in self._peers.values():
            if not peer.lost or peer.inbound.bye:
                self._transmit(peer, Lane.EXPRESS, FrameKind.BYE)
        deadline_ns = min(deadline_ns, self._clock.now_ns() + _PARTING_NS)
        while any(not peer.lost for peer in self._peers.values()) and self._clock.now_ns() < deadline_ns:
            self._wait(deadline_ns)  # a goodbye loses the peer
        self._shut(_LINGER_MS, Closed(f"the endpoint of rank {self._rank} is closed"))

    def _shut(self, linger_ms: int, reason: Exception) -> None:
        if self._closed is not None:
            return
        self._closed = reason
        self._epoll.close()
        for peer in self._peers.values():
            self._lose(peer, peer.lost or reason)
            for line in peer.lines:
                line.close(linger_ms if line.connected else 0)
        self._pull.close(linger=0)
        self._timer.close()
        self._early.clear()
        self._context.term()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise Closed(str(self._closed)) from self._closed

    def _peer(self, rank: int, tag: int, nbytes: int, *, may_be_lost: bool = False) -> _Peer:
        self._check_open()
        peer = self._peers.get(rank)
        if peer is None:
            raise UsageError(f"rank {rank} is not connected to rank {self._rank}; it has {sorted(self._peers)}")
        if not 0 <= tag <= LARGEST_TAG:
            raise UsageError(f"tag={tag} must be from 0 to {LARGEST_TAG}")
        if not 0 <= nbytes <= LARGEST_MESSAGE_BYTES:
            raise UsageError(f"nbytes={nbytes} of a message must be from 0 to {LARGEST_MESSAGE_BYTES}")
        if peer.lost and not may_be_lost:
            raise PeerLost(f"rank {rank} is lost: {peer.lost}") from peer.lost
        return peer

    # What follows runs inside the one wait.

    def _wait(self, deadline_ns: int) -> None:
        """Sleep until something happens or the deadline passes, then move what can be moved."""
        self._timer.arm(min(deadline_ns, self._next_ns()))
        self._epoll.poll(_LONG_WAIT_NS / 1e9)
        self._progress()

    def _next_ns(self) -> int:
        """Return when this endpoint has something to do even if nothing arrives."""
        times = [self._clock.now_ns() + _LONG_WAIT_NS]
        if self._timed:
            window = self._timed[0][4]
            opens_ns = window.not_before_ns - _LEAD_NS
            is_ahead = opens_ns > times[0] - _LONG_WAIT_NS
            times.append(opens_ns if is_ahead else self._resume_ns or window.not_after_ns or times[0])
        for peer in self._peers.values():
            due_ns = None if peer.lost else peer.inbound.due_ns(self._options.acknowledge_delay_ns)
            if due_ns is not None:
                times.append(due_ns)
        return max(min(times), 1)

    def _progress(self) -> None:
        ready = [descriptor for descriptor, _ in self._epoll.poll(0)]
        now_ns = self._clock.now_ns()
        if not ready and now_ns < self._due_ns:
            self._step_back(now_ns)
            return
        if self._pull_fd in ready:
            self._drain_pull()
            now_ns = self._clock.now_ns()
        self._send_timed(now_ns)
        self._step_back(now_ns)
        for descriptor in ready:
            if descriptor in self._monitored:
                self._watch(*self._monitored[descriptor], now_ns)
        for peer in self._peers.values():
            if peer.lost:
                continue
            if any(line.broken_since_ns for line in peer.lines):
                self._give_up_if_late(peer, now_ns)
            due_ns = peer.inbound.due_ns(self._options.acknowledge_delay_ns)
            if due_ns is not None and (due_ns <= now_ns or self._is_at_rest()):  # nobody may poll again
                self._transmit(peer, Lane.EXPRESS, FrameKind.ACK)
        self._due_ns = self._next_ns()

    def _step_back(self, now_ns: int) -> None:
        """Let ranks go ahead whose window it is, unless it is this one's."""
        if not self._timed or self._timed[0][0] > now_ns + _LEAD_NS:
            self._urgency.set(PROGRESS)

    def _is_at_rest(self) -> bool:
        """Tell whether this rank waits for nobody."""
        return not any(self._posted.values()) and all(peer.outbound.idle for peer in self._peers.values())

    def _drain_pull(self) -> None:
        while int(self._pull.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._take(self._pull.recv_multipart(zmq.DONTWAIT, copy=False))

    def _take(self, frames: Sequence[zmq.Frame]) -> None:
        try:
            header = decode(frames[0].buffer)
        except FrameError:
            self._counted["foreign_frames"] += 1
            return
        peer = self._peers.get(header.source)
        if header.token != self._token or peer is None:
            self._counted["foreign_frames"] += 1
            return
        for ticket in peer.outbound.acknowledged(header.acks, header.consumed):
            if ticket.status is TicketStatus.PENDING:
                self._end(ticket, TicketStatus.DONE)
        self._unblock(peer)
        if header.kind is FrameKind.HELLO:
            peer.inbound.hello = True
        elif header.kind is FrameKind.BYE:
            peer.inbound.bye = True
            self._lose(peer, PeerLost(f"rank {peer.rank} closed its endpoint"))
        elif header.kind is FrameKind.WARM:
            peer.inbound.warm_bytes += sum(len(frame) for frame in frames[1:])
        elif header.kind is FrameKind.DATA:
            self._take_data(peer, header, frames)

    def _take_data(self, peer: _Peer, header: Header, frames: Sequence[zmq.Frame]) -> None:
        if len(frames) != 2:
            self._counted["foreign_frames"] += 1
            return
        payload = memoryview(frames[1].buffer)
        if not peer.inbound.accept(header.lane, header.sequence):
            self._counted["duplicates"] += 1
            peer.inbound.tell(self._clock.now_ns(), soon=True)
            return
        # Each acknowledgement wakes up two hosts, so it waits a little for the next one.
        peer.inbound.tell(self._clock.now_ns(), soon=False)
        counts = header.lane is Lane.BULK
        if header.total != len(payload):
            whole = self._join(peer, header, payload)
            if whole is None:
                return
            payload, counts = whole, False
        key = (peer.rank, header.tag)
        posted = self._posted.get(key)
        if posted:
            ticket, into = posted.popleft()
            if not posted:
                del self._posted[key]
            self._deliver(ticket, into, payload, counts)
        else:
            self._early.setdefault(key, deque()).append((payload, counts))

    def _join(self, peer: _Peer, header: Header, part: memoryview) -> memoryview | None:
        """Put a part in its place, in memory of its own that no credit covers: one message for each tag at most."""
        if header.lane is Lane.BULK:
            self._consumed(peer.rank, len(part))
        try:
            return peer.inbound.join(header.tag, header.total, header.offset, part)
        except FrameError:
            self._counted["foreign_frames"] += 1
            return None

    def _deliver(self, ticket: Ticket, into: memoryview | None, payload: memoryview, counts: bool) -> None:
        """End a receive with what arrived, which ``counts`` against its sender's credit while it is held."""
        held = len(payload) if counts else 0
        if len(payload) != ticket.nbytes:
            self._consumed(ticket.peer, held)
            ticket.error = FrameError(
                f"rank {ticket.peer} sent {len(payload)} bytes with tag {ticket.tag}, expected {ticket.nbytes}"
            )
            self._end(ticket, TicketStatus.FAILED)
            return
        if into is None:
            ticket.view = payload.toreadonly()
            ticket.lender = _Loan(self) if held else None
        else:
            into[:] = payload
            self._consumed(ticket.peer, held)
        self._end(ticket, TicketStatus.DONE)

    def _consumed(self, rank: int, nbytes: int) -> None:
        inbound = self._peers[rank].inbound
        inbound.consume(nbytes, self._clock.now_ns())
        self._note_due(inbound)

    def _note_due(self, inbound: Inbound) -> None:
        """Look at a peer again when it must be told something: at the next poll, where that may be the last."""
        due_ns = inbound.due_ns(self._options.acknowledge_delay_ns)
        if due_ns is not None:
            self._due_ns = 0 if self._is_at_rest() else min(self._due_ns, due_ns)

    def _send_timed(self, now_ns: int) -> None:
        """Send what is in its window now, as far as it will have left by the window's end."""
        self._resume_ns = 0
        while self._timed and self._timed[0][0] <= now_ns + _LEAD_NS:
            opens_ns, order, ticket, view, window = self._timed[0]
            peer = self._peers[ticket.peer]
            if window.not_after_ns is None:
                heapq.heappop(self._timed)
                peer.blocked.append((ticket, view, window))
                self._unblock(peer)
                continue
            line = peer.lines[Lane.BULK]
            closes_ns = window.not_after_ns - _LEAD_NS
            window = replace(window, not_after_ns=closes_ns)
            drained_ns = self._drained_at(now_ns, window.rate_bytes_per_s)
            part_bytes = window.fitting_bytes(view.nbytes, drained_ns, FRAME_BYTES)
            if not part_bytes and view.nbytes:
                heapq.heappop(self._timed)
                self._counted["missed_sends"] += not ticket.sent_bytes
                self._end(ticket, TicketStatus.MISSED)
                continue
            if drained_ns - now_ns > (_AHEAD_NS if line is self._last_line else 0):
                # Not yet: if the line is slower than said, what lies in the queues leaves after the window.
                self._resume_ns = max(drained_ns - _AHEAD_NS // 2, now_ns + _SHORTEST_WAIT_NS)
                return
            before_tail = replace(window, not_after_ns=closes_ns - _AHEAD_NS)
            part_bytes = before_tail.fitting_bytes(part_bytes, drained_ns, FRAME_BYTES) or part_bytes
            if not peer.outbound.has_credit(part_bytes):
                return
            self._last_line, self._handed_ns = line, now_ns
            self._drained_ns = drained_ns + window.takes_ns(part_bytes + FRAME_BYTES)
            line.pace(window.rate_bytes_per_s)
            self._put(peer, peer.outbound.lane_for(ticket.tag, Lane.BULK), ticket, view[:part_bytes])
            ticket.left_ns = self._drained_ns
            if part_bytes == view.nbytes:
                heapq.heappop(self._timed)
            else:
                ticket.sent_bytes += part_bytes
                self._timed[0] = (opens_ns, order, ticket, view[part_bytes:], self._timed[0][4])

    def _drained_at(self, now_ns: int, rate_bytes_per_s: float) -> int:
        """Return when everything given to the line so far will have left, at this rate.

        The kernel says what it has not sent; what ZeroMQ's thread was given a moment ago it may not know yet.
        """
        if self._last_line is None:
            return now_ns
        known_ns = now_ns + int(self._last_line.unsent_bytes() / rate_bytes_per_s * 1e9)
        return max(known_ns, self._drained_ns) if now_ns - self._handed_ns < _SETTLE_NS else known_ns

    def _unblock(self, peer: _Peer) -> None:
        while peer.blocked and peer.outbound.has_credit(peer.blocked[0][0].nbytes):
            ticket, view, window = peer.blocked.popleft()
            peer.lines[Lane.BULK].pace(UNPACED if window is None else window.rate_bytes_per_s)
            self._put(peer, peer.outbound.lane_for(ticket.tag, Lane.BULK), ticket, view)
            if window is not None:
                ticket.left_ns = peer.lines[Lane.BULK].leaves_ns(ticket.started_ns, view.nbytes + FRAME_BYTES)

    def _put(self, peer: _Peer, lane: Lane, ticket: Ticket, view: memoryview) -> None:
        if not ticket.sent_bytes:  # of several parts the first counts
            lead_ns = _LEAD_NS if lane is Lane.BULK else 0  # when it reaches the line, at the earliest
            ticket.started_ns = self._clock.now_ns() + lead_ns
        self._transmit_kept(peer, lane, peer.outbound.keep(lane, ticket, view))

    def _transmit_kept(self, peer: _Peer, lane: Lane, kept: Kept, *, again: bool = False) -> None:
        # What is sent again may be acknowledged, and its memory given back, while it still waits behind the first.
        lend = not again and kept.view.nbytes >= _LEAST_LENT_BYTES
        self._transmit(peer, lane, FrameKind.DATA, kept.view, kept.ticket.tag, kept.sequence, kept.place, lend=lend)

    def _transmit(
        self, peer: _Peer, lane: Lane, kind: FrameKind, view: memoryview | None = None,
        tag: int = 0, sequence: int = 0, place: tuple[int, int] = (0, 0), *, lend: bool = False,
    ) -> None:  # fmt: skip
        """Hand a frame to ZeroMQ, which copies it, or reads it where it lies if ``lend``."""
        inbound = peer.inbound
        acks = (inbound.received[0], inbound.received[1])
        header = Header(
            kind, lane, self._rank, tag, *place, self._token, sequence, acks, inbound.consumed_bytes
        ).encode()
        push = peer.lines[lane].push
        with contextlib.suppress(zmq.Again):  # no connection yet: hellos are repeated, data comes after them
            if view is None:
                push.send(header, zmq.DONTWAIT)
            elif lend:
                push.send(header, zmq.DONTWAIT | zmq.SNDMORE)
                send_constant(push, view)
            else:
                push.send_multipart((header, view), zmq.DONTWAIT)
            if lane is Lane.EXPRESS:  # on the other lane it waits behind paced data
                inbound.told()

    def _watch(self, peer: _Peer, lane: Lane, now_ns: int) -> None:
        """Take in what became of a connection, and send again over one that came back."""
        if peer.lines[lane].events(now_ns) and not peer.lost:
            peer.inbound.tell(now_ns, soon=True)  # what was said last may have gone with the connection
            self._note_due(peer.inbound)
            for kept in peer.outbound.kept[lane]:
                self._counted["resent_bytes"] += kept.view.nbytes
                self._transmit_kept(peer, lane, kept, again=True)

    def _give_up_if_late(self, peer: _Peer, now_ns: int) -> None:
        """Lose a peer whose connection stays broken."""
        since_ns = min(line.broken_since_ns for line in peer.lines if line.broken_since_ns)
        if now_ns - since_ns > self._options.reconnect_grace_ns:
            seconds = self._options.reconnect_grace_ns / 1e9
            self._lose(peer, PeerLost(f"rank {peer.rank}: connection broken for more than {seconds:g} s"))

    def _lose(self, peer: _Peer, reason: Exception) -> None:
        """End everything that still needs this peer."""
        peer.lost = reason
        pending = [kept.ticket for lane in Lane for kept in peer.outbound.kept[lane]]
        pending += self._withdraw(lambda ticket: ticket.peer == peer.rank)
        for key in [key for key in self._posted if key[0] == peer.rank]:
            pending += [ticket for ticket, _ in self._posted.pop(key)]
        for ticket in pending:
            if ticket.status is TicketStatus.PENDING:
                ticket.error = reason
                self._end(ticket, TicketStatus.FAILED)

    def _end(self, ticket: Ticket, status: TicketStatus) -> None:
        ticket.status = status
        ticket.ended_ns = self._clock.now_ns()
        self._ended.append(ticket)
