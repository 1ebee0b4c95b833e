"""A rank's end of the slotted transport: the SPI, and the one wait."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Collection, Mapping, Sequence

import zmq

from detcoll.discarding import has_prefix
from detcoll.errors import Closed, ConnectError, PeerLost, TransportError, UsageError
from detcoll.mailbox import Mailbox
from detcoll.names import ANSWER_S
from detcoll.priority import OWNER, PROGRESS, Urgency, prompt_threads
from detcoll.transport import Clock, Endpoint, Ticket, TicketKind, TicketStatus, Window
from detcoll_slotted.departures import Departures
from detcoll_slotted.descriptors import is_shortage, shortage
from detcoll_slotted.flow import Inbound, Outbound
from detcoll_slotted.health import Health
from detcoll_slotted.intake import Intake
from detcoll_slotted.joining import Joining
from detcoll_slotted.line import Trunk
from detcoll_slotted.options import Options
from detcoll_slotted.pacing import pace_groups
from detcoll_slotted.peer import Peer
from detcoll_slotted.post import Post
from detcoll_slotted.roads import Roads
from detcoll_slotted.timer import Timer
from detcoll_slotted.wire import FrameKind, Header, Lane

EXPRESS_BYTES = 4_096
LARGEST_MESSAGE_BYTES = 2**30
_PARTING_NS = 500_000_000
_LINGER_MS = 100
_LONG_WAIT_NS = 1_000_000_000


class SlottedEndpoint(Endpoint):
    """See the package. One thread at a time uses it.

    It has more attributes than most classes, since it is where the parts meet: each of them knows one subject.
    """

    def __init__(self, rank: int, host: str, told: str, token: int, clock: Clock, options: Options) -> None:
        self._rank, self._clock, self._options = rank, clock, options
        self._addresses: dict[int, str] = {}
        self._peers: dict[int, Peer] = {}
        self._monitored: dict[int, Trunk] = {}
        self._groups = pace_groups(options.pace_groups, rank, host_paced=options.host_paced)
        # What it holds early is bounded by the credit of each sender.
        self._mail = Mailbox(rank, largest_message_bytes=LARGEST_MESSAGE_BYTES)
        self._post = Post(rank, token, clock)
        self._departures = Departures(self._peers, self._post, self._mail, clock)
        self._intake = Intake(
            self._peers, self._mail, self._post, self._departures, clock, options.acknowledge_delay_ns
        )  # fmt: skip
        self._joining = Joining(rank, options, self._post, clock, self._wait_and_look)
        self._urgency = Urgency()
        self._closed: TransportError | None = None
        with prompt_threads() if options.prompt else contextlib.nullcontext():
            self._roads = Roads(host, told, token, options)
        with contextlib.ExitStack() as opened:
            opened.callback(self._roads.close, 0)
            self._timer = Timer()
            opened.callback(self._timer.close)
            self._epoll = select.epoll()
            opened.pop_all()
        self._health = Health(options, self._epoll)
        for descriptor in (self._timer.fd, *self._roads.gate.descriptors):
            self._epoll.register(descriptor, select.EPOLLIN)

    @property
    def address(self) -> str:
        """The ZeroMQ address at which this rank receives."""
        return self._roads.address

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Join the ranks that are ``needed``, all if not given; others are joined when they are first needed.

        Raises
        ------
        ConnectError
            If not all that are needed are joined at the deadline, or file descriptors run out.
        """
        self._check_open()
        self._addresses.update({rank: address for rank, address in addresses.items() if rank != self._rank})
        self._mail.peers.update(self._addresses)
        ranks = [rank for rank in (addresses if needed is None else needed) if rank != self._rank]
        new = [rank for rank in ranks if rank not in self._peers]
        lacking = shortage(sum(map(self._roads.descriptors, new)))
        if lacking:
            raise ConnectError(f"rank {self._rank} cannot connect to {len(new)} ranks: {lacking}")
        for rank in new:
            self._reach(rank, deadline_ns, max(0.0, (deadline_ns - self._clock.now_ns()) / 1e9))
        self._joining.join([self._peers[rank] for rank in ranks], deadline_ns)

    def _reach(self, rank: int, deadline_ns: int, name_s: float = ANSWER_S) -> Peer:
        """Begin to join a rank; ``name_s`` is how long it may take to find out which address of its name answers."""
        try:
            lines = self._roads.lead_to(rank, self._addresses[rank], name_s)
        except (OSError, zmq.ZMQError) as error:
            lacking = shortage(self._roads.descriptors(rank)) if is_shortage(error) else ""
            raise ConnectError(f"rank {self._rank} cannot connect to rank {rank}: {lacking or error}") from error
        in_flight = self._options.in_flight_bytes if rank in self._options.warm_up_peers else 0
        credit = max(self._options.credit_bytes, 2 * in_flight)
        peer = Peer(rank, lines, Outbound(credit, is_open=False), Inbound(credit // 8), group=self._groups.get(rank))
        self._peers[rank] = peer
        for line in peer.own_lines:
            line.is_paced = not self._options.host_paced
        self._joining.begin(peer, deadline_ns)
        self._intake.due_ns = 0
        for trunk in self._roads.trunks:
            if trunk.monitor.fileno() not in self._monitored:
                self._monitored[trunk.monitor.fileno()] = trunk
                self._epoll.register(trunk.monitor.fileno(), select.EPOLLIN)
                self._watch(trunk, self._clock.now_ns())  # it tells only of what comes after a first look
        return peer

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Queue ``view`` for ``dst``; without a window it leaves as soon as the peer's credit allows."""
        view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        self._need("dst", dst, tag, view.nbytes)
        peer = self._peers.get(dst)
        if peer is not None and tag in peer.outbound.begun and tag not in self._departures.begun_tags(dst):
            total, sent = peer.outbound.begun[tag]
            if view.nbytes != total - sent:
                told = f"the send with tag={tag} has {view.nbytes} bytes; of the one before it"
                raise UsageError(f"{told} {total - sent} are left")
        ticket, peer = self._mail.send(dst, tag, view.nbytes), self._peers[dst]
        if window is not None and (window.not_after_ns is not None or window.not_before_ns > self._clock.now_ns()):
            self._departures.hold(ticket, view, window)
            self._intake.due_ns = 0
            self._departures.turn(self._clock.now_ns())
        elif self._may_pass(peer, tag, view.nbytes) and window is None:
            self._post.put(peer, peer.outbound.lane_for(tag, Lane.EXPRESS), ticket, view)
        else:
            self._departures.queue(peer, ticket, view, window)
            if peer.group is not None and peer.group.waiting:
                self._intake.due_ns = 0  # its turn may come before anything else
        return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Take ``nbytes`` from ``src``, from what has already arrived where it has."""
        self._need("src", src, tag, nbytes)
        return self._mail.recv(src, tag, nbytes, into, self._clock.now_ns())

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Move what can be moved; wait until a ticket ends or the deadline passes."""
        self._check_open()
        self._progress()
        if not self._mail.has_ended and self._clock.now_ns() < deadline_ns:
            self._wait(deadline_ns)
        return self._mail.take_ended()

    def cancel(self, ticket: Ticket) -> bool:
        """Cancel a receive that nothing matched, or a send of which nothing has left."""
        if ticket.status is not TicketStatus.PENDING or ticket.sent_bytes:
            return False
        self._intake.due_ns = 0  # the next that waits for a window may be due, or a rank that waits for nobody now
        if ticket.kind is TicketKind.SEND and not self._departures.withdraw(lambda other: other is ticket):
            return False
        return self._mail.cancel(ticket, self._clock.now_ns())

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix; sends of which nothing has left end as CANCELLED too."""
        self._check_open()
        now_ns = self._clock.now_ns()
        self._mail.discard(tag, bits, now_ns)
        for ticket in self._departures.withdraw(
            lambda ticket: has_prefix(ticket.tag, tag, bits) and not ticket.sent_bytes
        ):
            self._mail.end(ticket, TicketStatus.CANCELLED, now_ns)
        for peer in self._peers.values():
            peer.inbound.drop(tag, bits)
            peer.outbound.drop(tag, bits, self._departures.begun_tags(peer.rank))
        self._intake.due_ns = 0

    def fileno(self) -> int | None:
        """Return the epoll descriptor that holds the sockets, their monitors and the timer."""
        return self._epoll.fileno()

    def arm(self, deadline_ns: int) -> bool:
        """Set the timer for what comes next by itself; what arrives makes the descriptor readable."""
        self._check_open()
        if self._mail.has_ended:
            return False
        self._timer.arm(min(deadline_ns, self._intake.due_ns or self._next_ns()))
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
        """Return what TCP retransmitted, sends that missed their windows, and what was resent, refused or changed."""
        return self._intake.counted | {
            "refused_connections": self._roads.gate.refused_connections,
            "resent_bytes": self._post.resent_bytes,
            "missed_sends": self._departures.missed_sends,
            "congestion_switches": self._roads.congestion_switches,
            "retransmits": sum(line.retransmits() for peer in list(self._peers.values()) for line in peer.own_lines),
        }

    def connections(self) -> list[dict[str, object]]:
        """Return which TCP connections carry what under which congestion control, to hold a capture against."""
        rows = []
        for peer in self._peers.values():
            for line in peer.own_lines:
                if line.tcp is not None:
                    local, remote = line.tcp.names
                    lane = line.lanes[0].name.lower()
                    congestion = line.tcp.congestion()
                    rows.append(
                        {"dst": peer.rank, "lane": lane, "local": local, "remote": remote, "congestion": congestion}
                    )
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
        while (
            any(not peer.lost and peer.is_joined for peer in self._peers.values())
            and self._clock.now_ns() < deadline_ns
        ):
            self._wait(deadline_ns)  # a goodbye loses the peer
        self._shut(_LINGER_MS, Closed(f"the endpoint of rank {self._rank} is closed"))

    def _shut(self, linger_ms: int, reason: TransportError) -> None:
        if self._closed is not None:
            return
        self._closed = reason
        self._health.close()
        self._epoll.close()
        for peer in self._peers.values():
            self._fail(peer, peer.lost or reason)
        self._roads.close(linger_ms)
        self._timer.close()
        self._mail.close(self._clock.now_ns())

    def _check_open(self) -> None:
        if self._closed is not None:
            raise Closed(str(self._closed)) from self._closed

    def _need(self, name: str, rank: int, tag: int, nbytes: int) -> None:
        """Begin to join a rank that is needed for the first time."""
        self._check_open()
        if rank not in self._peers:
            self._mail.check(name, rank, tag, nbytes)
            self._reach_later(rank)

    def _reach_later(self, rank: int) -> Peer:
        """Begin to join a rank that is needed for the first time."""
        lacking = shortage(self._roads.descriptors(rank))
        if lacking:
            raise PeerLost(f"rank {rank} cannot be reached: {lacking}")
        try:
            return self._reach(rank, self._clock.now_ns() + self._options.tolerance_ns)
        except ConnectError as error:
            raise PeerLost(str(error)) from error

    def _may_pass(self, peer: Peer, tag: int, nbytes: int) -> bool:
        """Tell whether a message is small enough to leave at once, and overtakes none of its tag."""
        return nbytes <= EXPRESS_BYTES and peer.outbound.is_open and all(tag != entry[0].tag for entry in peer.blocked)

    # What follows runs inside the one wait.

    def _wait(self, deadline_ns: int) -> None:
        """Sleep until something happens or the deadline passes, then move what can be moved."""
        self._timer.arm(min(deadline_ns, self._next_ns()))
        self._epoll.poll(_LONG_WAIT_NS / 1e9)
        self._progress()

    def _wait_and_look(self, deadline_ns: int) -> None:
        self._wait(deadline_ns)
        for trunk in self._roads.trunks:
            self._watch(trunk, self._clock.now_ns())

    def _next_ns(self) -> int:
        """Return when this endpoint has something to do even if nothing arrives."""
        if self._roads.gate.has_more:
            return 1
        now_ns = self._clock.now_ns()
        times = [now_ns + _LONG_WAIT_NS]
        at_times = self._departures.next_ns(now_ns), self._joining.next_ns(), self._health.next_ns()
        times += [at_ns for at_ns in at_times if at_ns is not None]
        for peer in self._peers.values():
            if peer.inbound.untold_since_ns and not peer.lost:
                due_ns = peer.inbound.due_ns(self._options.acknowledge_delay_ns)
                if due_ns is not None:
                    times.append(due_ns)
        return max(min(times), 1)

    def _progress(self) -> None:
        ready = [descriptor for descriptor, _ in self._epoll.poll(0)]
        now_ns = self._clock.now_ns()
        if not ready and now_ns < self._intake.due_ns:
            self._step_back(now_ns)
            return
        if self._roads.gate.turn(ready, self._take):
            now_ns = self._clock.now_ns()
        self._departures.turn(now_ns)
        self._step_back(now_ns)
        self._roads.look(now_ns)
        for descriptor in ready:
            if descriptor in self._monitored:
                self._watch(self._monitored[descriptor], now_ns)
        for peer, reason in self._joining.turn(now_ns) + self._health.turn(ready, now_ns):
            self._lose(peer, reason)
        for peer in self._peers.values():
            if peer.inbound.untold_since_ns and not peer.lost:
                self._intake.acknowledge(peer, now_ns)
        self._intake.due_ns = self._next_ns()

    def _step_back(self, now_ns: int) -> None:
        """Let ranks go ahead whose window it is, unless it is this one's."""
        if not self._departures.is_near(now_ns):
            self._urgency.set(PROGRESS)

    def _take(self, frames: Sequence[zmq.Frame]) -> None:
        self._intake.take(frames, self._greeted, self._left)

    def _greeted(self, hello: Header) -> None:
        """Take a hello in, and connect back to whom this rank has not needed yet."""
        if hello.source not in self._addresses:
            return
        try:
            peer = self._peers.get(hello.source) or self._reach_later(hello.source)
        except PeerLost:  # that rank will tell that it reached nobody
            return
        if peer.lost:
            return
        peer.outbound.is_open = True
        if hello.total > 0:
            self._joining.answer(peer)

    def _left(self, peer: Peer) -> None:
        self._lose(peer, PeerLost(f"rank {peer.rank} closed its endpoint"))

    def _watch(self, trunk: Trunk, now_ns: int) -> None:
        """Take in what became of connections, and send again over those that came back."""
        for line, is_back in trunk.events():
            peer = self._peers[line.rank]
            if not line.connected:
                self._health.ended(peer, now_ns)
                if peer.lost:
                    trunk.disconnect(line)
            if line.connected and not peer.is_joined and not peer.lost:
                self._joining.greet(peer)
            if is_back and not peer.lost:
                peer.inbound.tell(now_ns, soon=True)  # what was said last may have gone with the connection
                self._intake.note_due(peer.inbound)
                for lane in line.lanes:
                    nbytes = self._post.resend(peer, lane)
                    if lane is Lane.BULK and nbytes:
                        self._departures.note_resent(peer, nbytes)

    def _lose(self, peer: Peer, reason: TransportError) -> None:
        """End everything that still needs this peer, and nothing else."""
        if not peer.inbound.bye:  # to one that says goodbye it is said back
            for line in peer.own_lines:
                line.trunk.disconnect(line)
        self._fail(peer, reason)

    def _fail(self, peer: Peer, reason: TransportError) -> None:
        """Fail the tickets with a peer. What was lent to ZeroMQ stays referred to by what is kept for it."""
        peer.lost = reason
        self._intake.due_ns = 0
        self._departures.withdraw(lambda ticket: ticket.peer == peer.rank)
        self._mail.lose(peer.rank, reason, self._clock.now_ns())
