"""A rank's end of the slotted transport: the SPI, and the one wait."""

from __future__ import annotations

import ipaddress
import select
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import zmq

from detcoll.errors import Closed, FrameError, PeerLost, UsageError
from detcoll.priority import OWNER, PROGRESS, Urgency, prompt_threads
from detcoll.transport import LARGEST_TAG, Clock, Endpoint, Ticket, TicketKind, TicketStatus, Window
from detcoll_slotted.departures import Departures
from detcoll_slotted.flow import Inbound, Outbound
from detcoll_slotted.joining import Joining
from detcoll_slotted.line import Line
from detcoll_slotted.matching import Mailbox
from detcoll_slotted.options import Options
from detcoll_slotted.outcomes import Outcomes
from detcoll_slotted.pacing import shared_groups
from detcoll_slotted.peer import Peer
from detcoll_slotted.post import Post
from detcoll_slotted.timer import Timer
from detcoll_slotted.wire import FrameKind, Header, Lane, decode

EXPRESS_BYTES = 4_096
LARGEST_MESSAGE_BYTES = 2**30
_PARTING_NS = 500_000_000
_LINGER_MS = 100
_LONG_WAIT_NS = 1_000_000_000


@dataclass(eq=False, slots=True)
class _Loan:
    """What a lent view counts against the credit of its sender."""

    endpoint: SlottedEndpoint

    def take_back(self, ticket: Ticket) -> None:
        """Count the bytes as consumed, so that the sender's credit comes back."""
        self.endpoint._consumed(ticket.peer, ticket.nbytes)


class SlottedEndpoint(Endpoint):
    """See the package. One thread at a time uses it.

    It has more attributes than most classes, since it is where the parts meet: each of them knows one subject.
    """

    def __init__(self, rank: int, host: str, token: int, clock: Clock, options: Options) -> None:
        self._rank, self._token, self._clock, self._options = rank, token, clock, options
        self._peers: dict[int, Peer] = {}
        self._monitored: dict[int, tuple[Peer, Lane]] = {}
        self._groups = shared_groups(options.pace_groups, rank)
        self._outcomes = Outcomes(clock)
        self._mailbox = Mailbox()
        self._post = Post(rank, token, clock)
        self._departures = Departures(self._peers, self._post, self._outcomes, clock)
        self._joining = Joining(rank, options, self._post, clock, self._wait_and_look)
        self._urgency = Urgency()
        self._due_ns = 0
        self._counted = {"duplicates": 0, "foreign_frames": 0}
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
        self._joining.join([self._peers[rank] for rank in addresses if rank != self._rank], deadline_ns)

    def _make_peer(self, rank: int, address: str) -> Peer:
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
        group = self._groups.get(rank)
        peer = Peer(rank, (lines[0], lines[1]), Outbound(credit), Inbound(credit // 8), group=group)
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
        if self._mailbox.discarded:
            self._mailbox.discarded.revive(tag)
        if window is not None and (window.not_after_ns is not None or window.not_before_ns > self._clock.now_ns()):
            self._departures.hold(ticket, view, window)
            self._due_ns = 0
            self._departures.turn(self._clock.now_ns())
        elif view.nbytes <= EXPRESS_BYTES and window is None and all(tag != entry[0].tag for entry in peer.blocked):
            self._post.put(peer, peer.outbound.lane_for(tag, Lane.EXPRESS), ticket, view)
        else:
            self._departures.queue(peer, ticket, view, window)
            if peer.group is not None:
                self._due_ns = 0  # its turn may come before anything else
        return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Take ``nbytes`` from ``src``, from what has already arrived where it has."""
        self._peer(src, tag, nbytes, may_be_lost=self._mailbox.has_early((src, tag)))
        if into is not None:
            if into.nbytes != nbytes or into.readonly or not into.c_contiguous:
                raise UsageError(f"into must be contiguous, writable and of {nbytes} bytes, not {into.nbytes}")
            into = into.cast("B")
        if self._mailbox.discarded:
            self._mailbox.discarded.revive(tag)
        ticket = Ticket(TicketKind.RECV, src, tag, nbytes)
        arrived = self._mailbox.post(ticket, into)
        if arrived is not None:
            self._deliver(ticket, into, *arrived)
        return ticket

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Move what can be moved; wait until a ticket ends or the deadline passes."""
        self._check_open()
        self._progress()
        if not self._outcomes and self._clock.now_ns() < deadline_ns:
            self._wait(deadline_ns)
        return self._outcomes.collect()

    def cancel(self, ticket: Ticket) -> bool:
        """Cancel a receive that nothing matched, or a send of which nothing has left."""
        if ticket.status is not TicketStatus.PENDING or ticket.sent_bytes:
            return False
        if ticket.kind is TicketKind.RECV:
            found = self._mailbox.withdraw(ticket)
        else:
            self._due_ns = 0  # the next of those that wait for a window may be due
            found = self._departures.withdraw(lambda other: other is ticket) != []
        if found:
            self._outcomes.end(ticket, TicketStatus.CANCELLED)
        return found

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix; sends of which nothing has left end as CANCELLED too."""
        self._check_open()
        if not (0 <= tag <= LARGEST_TAG and 0 <= bits <= LARGEST_TAG.bit_length()):
            raise UsageError(f"tag={tag} must be from 0 to {LARGEST_TAG}, and bits={bits} from 0 to 64")

        tickets, held = self._mailbox.discard(tag, bits)
        tickets += self._departures.withdraw(lambda ticket: ticket.tag >> bits == tag >> bits and not ticket.sent_bytes)
        for ticket in tickets:
            self._outcomes.end(ticket, TicketStatus.CANCELLED)
        for rank, nbytes in held:
            self._consumed(rank, nbytes)
        for peer in self._peers.values():
            peer.inbound.drop(tag, bits)
            peer.outbound.drop(tag, bits, self._departures.begun_tags(peer.rank))
        self._due_ns = 0

    def fileno(self) -> int | None:
        """Return the epoll descriptor that holds the sockets, their monitors and the timer."""
        return self._epoll.fileno()

    def arm(self, deadline_ns: int) -> bool:
        """Set the timer for what comes next by itself; what arrives makes the descriptor readable."""
        self._check_open()
        if self._outcomes:
            return False
        self._timer.arm(min(deadline_ns, self._due_ns or self._next_ns()))
        if self._departures.has_timed:  # to wake up ahead of ranks whose window it is not
            self._urgency.set(OWNER)
        return True

    def keep_time(self) -> None:
        """Give the line what is due."""
        if self._departures.has_timed:
            now_ns = self._clock.now_ns()
            if self._departures.is_due(now_ns):
                self._departures.turn(now_ns)

    def counters(self) -> Mapping[str, int]:
        """Return retransmitted TCP segments, sends that missed their windows, and what was resent or refused."""
        return self._counted | {
            "resent_bytes": self._post.resent_bytes,
            "missed_sends": self._departures.missed_sends,
            "retransmits": sum(line.info()[1] for peer in self._peers.values() for line in peer.lines),
        }

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
                self._post.transmit(peer, Lane.EXPRESS, FrameKind.BYE)
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
        self._mailbox.clear()
        self._context.term()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise Closed(str(self._closed)) from self._closed

    def _peer(self, rank: int, tag: int, nbytes: int, *, may_be_lost: bool = False) -> Peer:
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

    def _wait_and_look(self, deadline_ns: int) -> None:
        """Wait, and ask monitors unasked: their descriptors tell only of what comes after a first look."""
        self._wait(deadline_ns)
        for peer in self._peers.values():
            if not peer.is_joined:
                for lane in Lane:
                    self._watch(peer, lane, self._clock.now_ns())

    def _next_ns(self) -> int:
        """Return when this endpoint has something to do even if nothing arrives."""
        now_ns = self._clock.now_ns()
        times = [now_ns + _LONG_WAIT_NS]
        departs_ns = self._departures.next_ns(now_ns)
        if departs_ns is not None:
            times.append(departs_ns)
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
        self._departures.turn(now_ns)
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
                self._post.transmit(peer, Lane.EXPRESS, FrameKind.ACK)
        self._due_ns = self._next_ns()

    def _step_back(self, now_ns: int) -> None:
        """Let ranks go ahead whose window it is, unless it is this one's."""
        if not self._departures.is_near(now_ns):
            self._urgency.set(PROGRESS)

    def _is_at_rest(self) -> bool:
        """Tell whether this rank waits for nobody."""
        return not self._mailbox.is_waiting and all(peer.outbound.idle for peer in self._peers.values())

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
            self._outcomes.end(ticket, TicketStatus.DONE)
        self._departures.unblock(peer)
        if header.kind is FrameKind.HELLO:
            peer.inbound.hello = True
        elif header.kind is FrameKind.BYE:
            peer.inbound.bye = True
            self._lose(peer, PeerLost(f"rank {peer.rank} closed its endpoint"))
        elif header.kind is FrameKind.WARM:
            peer.inbound.warm_bytes += sum(len(frame) for frame in frames[1:])
        elif header.kind is FrameKind.DATA:
            self._take_data(peer, header, frames)

    def _take_data(self, peer: Peer, header: Header, frames: Sequence[zmq.Frame]) -> None:
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
        if self._mailbox.discarded and header.tag in self._mailbox.discarded:
            self._consumed(peer.rank, len(payload) if counts else 0)
            return
        if header.total != len(payload):
            whole = self._join(peer, header, payload)
            if whole is None:
                return
            payload, counts = whole, False
        receive = self._mailbox.arrive((peer.rank, header.tag), payload, counts)
        if receive is not None:
            self._deliver(*receive, payload, counts)

    def _join(self, peer: Peer, header: Header, part: memoryview) -> memoryview | None:
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
            told = f"rank {ticket.peer} sent {len(payload)} bytes with tag {ticket.tag}, expected {ticket.nbytes}"
            self._outcomes.end(ticket, TicketStatus.FAILED, FrameError(told))
            return
        if into is None:
            ticket.view = payload.toreadonly()
            ticket.lender = _Loan(self) if held else None
        else:
            into[:] = payload
            self._consumed(ticket.peer, held)
        self._outcomes.end(ticket, TicketStatus.DONE)

    def _consumed(self, rank: int, nbytes: int) -> None:
        inbound = self._peers[rank].inbound
        inbound.consume(nbytes, self._clock.now_ns())
        self._note_due(inbound)

    def _note_due(self, inbound: Inbound) -> None:
        """Look at a peer again when it must be told something: at the next poll, where that may be the last."""
        due_ns = inbound.due_ns(self._options.acknowledge_delay_ns)
        if due_ns is not None:
            self._due_ns = 0 if self._is_at_rest() else min(self._due_ns, due_ns)

    def _watch(self, peer: Peer, lane: Lane, now_ns: int) -> None:
        """Take in what became of a connection, and send again over one that came back."""
        if peer.lines[lane].events(now_ns) and not peer.lost:
            peer.inbound.tell(now_ns, soon=True)  # what was said last may have gone with the connection
            self._note_due(peer.inbound)
            self._post.resend(peer, lane)

    def _give_up_if_late(self, peer: Peer, now_ns: int) -> None:
        """Lose a peer whose connection stays broken."""
        since_ns = min(line.broken_since_ns for line in peer.lines if line.broken_since_ns)
        if now_ns - since_ns > self._options.reconnect_grace_ns:
            seconds = self._options.reconnect_grace_ns / 1e9
            self._lose(peer, PeerLost(f"rank {peer.rank}: connection broken for more than {seconds:g} s"))

    def _lose(self, peer: Peer, reason: Exception) -> None:
        """End everything that still needs this peer, and nothing else."""
        peer.lost = reason
        self._due_ns = 0
        pending = [kept.ticket for lane in Lane for kept in peer.outbound.kept[lane]]
        pending += self._departures.withdraw(lambda ticket: ticket.peer == peer.rank)
        for ticket in pending + self._mailbox.withdraw_all(peer.rank):
            self._outcomes.end(ticket, TicketStatus.FAILED, reason)
