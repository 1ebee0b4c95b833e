"""One rank's end of the shared-memory transport.

`ShmEndpoint.poll` looks at the rings, and sleeps on the doorbell when there is nothing to see. Before it sleeps it
says so in shared memory, passes a fence and looks once more, so that no message is missed; and it never sleeps long
without another look (`detcoll_shm.bell.RECHECK_NS`), so that even a lost ring costs little.

Before all that it looks again for a few microseconds (``spin_ns``) and offers the processor to others between looks.
Waking a sleeper takes some 25 us, so with idle cores a small message arrives five times sooner. With more ranks than
cores it still helps, since whoever yields lets the rank run that it waits for; a plain spin would keep it from that.

One thread at a time sends, receives and polls, and another one may be in a collective (`detcoll_shm.natives`). `close`
and `abort` may come from any thread: they say that the endpoint is closed and wake whoever waits, and give back what
it holds once both have left it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from detcoll.discarding import Discarded
from detcoll.errors import Closed, ConnectError, FrameError, PeerLost, TransportError, TransportUnavailable, UsageError
from detcoll.transport import (
    LARGEST_TAG,
    Clock,
    Endpoint,
    NativeCall,
    NativeCollectives,
    Ticket,
    TicketKind,
    TicketStatus,
    Window,
)
from detcoll_shm.bell import Bell, open_process, process_ended, ring
from detcoll_shm.collectives import Collectives
from detcoll_shm.groups import GroupCollectives, await_members, hide, refuse, show
from detcoll_shm.inbound import Inbound
from detcoll_shm.layout import Address, Geometry, State
from detcoll_shm.memory import Ring, check_reachable, create, open_descriptor, open_memory, try_memory
from detcoll_shm.natives import NativePeer, Natives, NativeSettings
from detcoll_shm.outbound import Outbound
from detcoll_shm.regions import Mapped, Regions
from detcoll_shm.settings import Settings
from detcoll_shm.stage import Stage
from detcoll_shm.stores import Budget, Counts, Pool

_WENT = {State.CLOSED: "closed its endpoint", State.ABORTED: "aborted"}


@dataclass(eq=False, slots=True)
class _Peer:
    """One connected rank; ``error`` says why it is gone."""

    rank: int
    address: Address
    bell_fd: int
    inbound: Inbound
    outbound: Outbound
    stage: Stage
    mapped: Mapped
    error: TransportError | None = None

    def why_gone(self) -> TransportError | None:
        """Return why it is gone, or None while it is there."""
        if self.error is None and (state := self.inbound.peer_state()) >= State.CLOSED:
            return PeerLost(f"rank {self.rank} {_WENT[State(state)]}")
        return self.error


class ShmEndpoint(Endpoint, NativeCollectives):
    """One rank's rings, stage and doorbell; see the module.

    It has many fields since it owns every resource of the transport, messages' and collectives', and gives all back.
    """

    algorithm = "shared-memory"

    def __init__(self, rank: int, size: int, clock: Clock, settings: Settings, largest_message_bytes: int) -> None:
        self._rank = rank
        self._size = size
        self._clock = clock
        self._settings = settings
        self._largest_message_bytes = largest_message_bytes
        self._geometry = Geometry(
            settings.ring_bytes, settings.slots, settings.chunk_bytes, settings.device_chunk_bytes
        )  # fmt: skip
        self._pool = Pool(settings.pool_bytes)
        self._budget = Budget(settings.unexpected_bytes)
        self._counts, self._native_counts = Counts(), Counts()
        self._discards = Discarded()
        self._fence = threading.Lock()
        self._peers: dict[int, _Peer] = {}
        self._processes: dict[int, int] = {}
        """Pidfds of other ranks' processes."""
        self._ended: list[Ticket] = []
        self._open = True
        self._aborting = self._left = self._is_stopped = False
        self._using = threading.Lock()
        """Held by whoever sends, receives or polls, so that nothing is given back meanwhile."""
        self._asleep = False
        self._groups: Sequence[Sequence[int]] = [range(size)]
        self._natives: Natives | None = None
        self._collectives: Collectives | None = None
        self._stage: Stage | None = None
        self._made_groups: list[GroupCollectives] = []
        self._making = threading.Lock()
        """Held while the collectives are made or taken away."""
        self._bell = Bell()
        try:
            self._memory_fd, self._address = create(size, self._geometry, self._bell.reader)
        except TransportError:
            self._bell.close()
            raise
        self._regions = Regions(self._address.key_bytes)
        self._group_stages = Regions(self._address.key_bytes, empties=False)  # others may still look at them

    @property
    def address(self) -> str:
        """The process and its descriptors of memory and doorbell."""
        return self._address.encode()

    def apart(self, addresses: Mapping[int, str]) -> Mapping[int, str]:
        """Open the memory and the doorbell of each of these ranks, and return those where that fails."""
        reasons = {}
        for rank, text in addresses.items():
            try:
                try_memory(rank, Address.decode(rank, text))
            except ConnectError as error:
                reasons[rank] = str(error)
        return reasons

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Map the rings of the ranks in ``addresses``, and wait until they have done so with this rank's.

        Raises
        ------
        ConnectError
            If one is on another host, has ended, may not be opened, or does not join before the deadline.
        """
        self._check_open()
        try:
            with self._using:
                joining = sorted(set(addresses) - {self._rank} - set(self._peers))
                for rank in joining:
                    self._join(rank, Address.decode(rank, addresses[rank]))
                self._await(joining, deadline_ns)
        except TransportError:
            self.abort()
            raise

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Send ``view``; the ticket ends when all of it is in the peer's memory. Windows are not kept."""
        with self._using:
            peer = self._ready("dst", dst, tag, view.nbytes)
            if not view.c_contiguous:
                raise UsageError("view must be contiguous")
            if view.ndim != 1 or view.format != "B":
                view = view.cast("B")
            if peer.error is not None:
                raise PeerLost(f"nothing can be sent: {peer.error}") from peer.error
            ticket = Ticket(TicketKind.SEND, dst, tag, view.nbytes)
            peer.outbound.post(ticket, view)
            return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Receive exactly ``nbytes`` from ``src``, at once if the message is here.

        Raises
        ------
        UsageError
            If ``src`` was not connected, ``tag`` or ``nbytes`` is out of range, or ``into`` does not fit.
        PeerLost
            If ``src`` is gone and the message is not among what it sent before.
        """
        with self._using:
            peer = self._ready("src", src, tag, nbytes)
            if into is not None:
                if into.readonly or into.nbytes != nbytes or not into.c_contiguous:
                    raise UsageError(f"into has {into.nbytes} bytes; expected {nbytes} contiguous, writable bytes")
                if into.ndim != 1 or into.format != "B":
                    into = into.cast("B")
            ticket = Ticket(TicketKind.RECV, src, tag, nbytes)
            try:
                peer.inbound.post(ticket, into)
            except FrameError as error:
                self._lose(peer, error)
            if peer.error is not None and ticket.status is TicketStatus.PENDING and peer.inbound.drained():
                peer.inbound.withdraw(ticket)
                raise PeerLost(f"tag {tag} will not come: {peer.error}") from peer.error
            return ticket

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Return tickets that ended; see `Endpoint.poll`."""
        with self._using:
            self._check_open()
            if self._asleep:
                self._set_asleep(False)
            self._advance(self._peers.values())
            while not self._ended and self._rest(deadline_ns):
                self._check_open()
            ended, self._ended = self._ended, []
            return ended

    def arrange(self, groups: Sequence[Sequence[int]]) -> None:
        """Fold the ranks of each group in its order, then the groups; see `NativeCollectives.arrange`.

        Raises
        ------
        UsageError
            If they are not all ranks, each once, or a collective was called before.
        """
        if sorted(rank for group in groups for rank in group) != list(range(self._size)) or not all(groups):
            raise UsageError(f"groups={groups} must hold each of {self._size} ranks once")
        if self._collectives is not None:
            raise UsageError("arrange() must come before the first collective")
        self._groups = [list(group) for group in groups]

    def allocate(self, nbytes: int) -> memoryview:
        """Return memory for an array that all ranks can work on where it is.

        Raises
        ------
        TransportUnavailable
            If the system has no more.
        """
        try:
            return self._regions.allocate(nbytes)
        except OSError as error:
            raise TransportUnavailable(f"transport 'shm' cannot make an array of {nbytes} bytes: {error}") from error

    def group(self, ranks: Sequence[int], key: int, deadline_ns: int) -> GroupCollectives:
        """Return the collectives of some ranks, with stages of their own.

        Raises
        ------
        ConnectError
            If not all members join before the deadline, or one is gone.
        TransportError
            If the system has no more memory, or this rank is in too many groups.
        """
        members = list(ranks)
        with self._making:
            self._check_open()
            words = self._own_stage().words
            try:
                memory = self._group_stages.allocate(self._geometry.stage_bytes)
            except OSError as error:
                refuse(words, key)
                raise TransportError(f"transport 'shm' cannot make a group: {error}") from error
            own = Stage(memory, self._geometry)
            show(words, key, self._group_stages.place_of(np.frombuffer(memory, np.uint8)))
        others = {rank: self._peers[rank].stage.words for rank in members if rank != self._rank}
        try:
            places = await_members(others, key, lambda rank: self._peers[rank].why_gone(), deadline_ns)
            stages = {
                rank: Stage(self._regions_of(rank).view(place, self._geometry.stage_bytes), self._geometry)
                for rank, place in places.items()
            }
        except BaseException:
            self._hide_group(key)
            raise

        def forget() -> None:
            self._hide_group(key)
            self._made_groups.remove(made)

        made = GroupCollectives(
            len(members), lambda groups: self._make_group(members, own, stages, groups), forget
        )  # fmt: skip
        self._made_groups.append(made)
        return made

    def _hide_group(self, key: int) -> None:
        with self._making:
            if self._stage is not None:
                hide(self._stage.words, key)

    def run(self, call: NativeCall, deadline_ns: int) -> None:
        """Carry out a collective, reductions in the promised order."""
        (self._collectives or self._begin_collectives()).run(call, deadline_ns)

    def stop(self) -> None:
        """Take no more collectives of all ranks, and end one under way on another thread."""
        with self._making:
            self._is_stopped, natives = True, self._natives
        if natives is not None:
            natives.stop()

    def cancel(self, ticket: Ticket) -> bool:
        """End a pending ticket of which no byte has moved; `poll` does not return it."""
        with self._using:
            self._check_open()
            peer = self._peers.get(ticket.peer)
            if peer is None or ticket.status is not TicketStatus.PENDING:
                return False
            side = peer.outbound if ticket.kind is TicketKind.SEND else peer.inbound
            if not side.withdraw(ticket):
                return False
            self._cancelled([ticket])
            return True

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to tags that equal ``tag`` in all but their lowest ``bits`` bits, from any peer.

        Pending receives of such tags end as CANCELLED and come out of the next `poll`. What has arrived unasked is
        dropped and its memory given back, and what arrives later is dropped as well. Posting a receive, or sending,
        with such a tag later on ends the dropping for that prefix. The last 4,096 prefixes are remembered. Sends under
        way are not touched.

        Raises
        ------
        UsageError
            If ``tag`` or ``bits`` is out of range.
        """
        if not 0 <= tag <= LARGEST_TAG:
            raise UsageError(f"tag={tag} must be from 0 to {LARGEST_TAG}")
        if not 0 <= bits <= LARGEST_TAG.bit_length():
            raise UsageError(f"bits={bits} must be from 0 to {LARGEST_TAG.bit_length()}")
        with self._using:
            self._check_open()
            self._discards.add(tag, bits)
            for peer in self._peers.values():
                peer.inbound.discard()

    def abort(self) -> None:
        """Leave at once; peers see PeerLost."""
        self._aborting = True
        self._leave(0)

    def close(self, deadline_ns: int) -> None:
        """Wait until all that was sent is in the peers' memory, then leave; peers can still receive it."""
        self._leave(deadline_ns)

    def fileno(self) -> int | None:
        """Return a descriptor that becomes readable when a peer rings or its process ends."""
        self._check_open()
        return self._bell.fileno()

    def arm(self, deadline_ns: int) -> bool:
        """Ask peers to ring; True if there is nothing to collect yet."""
        with self._using:
            self._hear(0)
            self._check_open()  # after `_hear`, which may have taken the ring that told of the end
            self._fall_asleep()
            if self._ended:
                self._set_asleep(False)
            return not self._ended

    def counters(self) -> Mapping[str, int]:
        """Return what was sent, received, lent, kept and rung."""
        of_natives = asdict(self._native_counts)
        return {name: count + of_natives[name] for name, count in asdict(self._counts).items()}

    def _check_open(self) -> None:
        if not self._open:
            raise Closed(f"the endpoint of rank {self._rank} is closed")

    def _ready(self, name: str, rank: int, tag: int, nbytes: int) -> _Peer:
        """Check the arguments of a send or receive and return its peer."""
        if not self._open:
            self._check_open()
        peer = self._peers.get(rank)
        if peer is None:
            raise UsageError(f"{name}={rank} is not connected; expected one of {sorted(self._peers)}")
        if not 0 <= tag <= LARGEST_TAG:
            raise UsageError(f"tag={tag} must be from 0 to {LARGEST_TAG}")
        if not 0 <= nbytes <= self._largest_message_bytes:
            raise UsageError(f"nbytes={nbytes} of a message must be from 0 to {self._largest_message_bytes}")
        if self._asleep:
            self._set_asleep(False)
        if self._discards:
            self._discards.lift(tag)
        return peer

    def _join(self, rank: int, address: Address) -> None:
        """Map this rank's ring in the memory of ``rank``, and tell it."""
        for name in ("chunk_bytes", "device_chunk_bytes"):
            theirs, own = getattr(address, name), getattr(self._settings, name)
            if theirs != own:
                raise ConnectError(f"rank {rank} has {name}={theirs}, this rank {own}; expected the same on all ranks")
        if self._rank >= address.ranks or not 0 <= rank < self._size:
            raise ConnectError(f"rank {rank} expects {address.ranks} ranks; this is rank {self._rank} of {self._size}")
        check_reachable(rank, address)
        # Watched first: if the memory is then found to be the right one, so is the process.
        if address.pid != os.getpid():
            self._processes[rank] = open_process(rank, address.pid)
            self._bell.watch(rank, self._processes[rank])
        memory_fd = open_memory(rank, address)
        try:
            bell_fd = open_descriptor(rank, address, address.bell_fd, os.O_WRONLY | os.O_NONBLOCK)
            theirs = Ring(memory_fd, address.geometry, self._rank)
            stage = Stage.in_file(memory_fd, address.geometry, address.ranks)
        finally:
            os.close(memory_fd)
        settings, counts = self._settings, self._counts
        outbound = Outbound(
            theirs, address.geometry, settings.fragment_bytes, self._clock, counts,
            partial(self._ring, bell_fd), self._end,
        )  # fmt: skip
        inbound = Inbound(
            rank, Ring(self._memory_fd, self._geometry, rank), self._geometry, self._pool, self._budget, counts,
            self._discards, outbound.wake_sleeper, self._end,
        )  # fmt: skip
        mapped = Mapped(rank, address.key_bytes, lambda fd: open_descriptor(rank, address, fd, os.O_RDWR))
        self._peers[rank] = _Peer(rank, address, bell_fd, inbound, outbound, stage, mapped)
        outbound.set_state(State.JOINED)
        ring(bell_fd)

    def _begin_collectives(self) -> Collectives:
        """Make what collectives need, when the first is called."""
        with self._making:
            self._check_open()
            if self._is_stopped:
                raise Closed("the group of all ranks has ended")
            if self._collectives is not None:
                return self._collectives
            others = [rank for rank in range(self._size) if rank != self._rank]
            missing = [rank for rank in others if rank not in self._peers]
            if missing:
                raise UsageError(f"collectives need all ranks; ranks {missing} are not connected")
            peers = [self._as_peer(rank, rank, self._peers[rank].stage, self._peers[rank].mapped) for rank in others]
            self._natives = self._make_natives(self._rank, self._own_stage(), peers, self._groups)
            self._collectives = self._natives.collectives
            return self._collectives

    def _as_peer(self, number: int, rank: int, stage: Stage, mapped: Mapped) -> NativePeer:
        peer = self._peers[rank]
        return NativePeer(number, peer.address, self._processes.get(rank), stage, mapped, peer.why_gone, rank)

    def _make_natives(
        self, number: int, own: Stage, peers: Sequence[NativePeer], groups: Sequence[Sequence[int]]
    ) -> Natives:
        settings = self._settings
        given = NativeSettings(
            groups, settings.chunk_bytes, settings.device_chunk_bytes, settings.direct_bytes, settings.wait_ns,
            settings.read_bytes,
        )  # fmt: skip
        return Natives(
            number, self._rank, own, self._address.key_bytes, self._regions, peers, given, lambda: self._open,
            self._native_counts,
        )  # fmt: skip

    def _own_stage(self) -> Stage:
        if self._stage is None:
            self._stage = Stage.in_file(self._memory_fd, self._geometry, self._size)
        return self._stage

    def _make_group(
        self, ranks: Sequence[int], own: Stage, stages: Mapping[int, Stage], groups: Sequence[Sequence[int]]
    ) -> Natives:
        """Return the collectives of a group whose stages all members have mapped."""
        self._check_open()
        peers = [
            self._as_peer(number, rank, stages[rank], self._regions_of(rank))
            for number, rank in enumerate(ranks) if rank != self._rank
        ]  # fmt: skip
        return self._make_natives(ranks.index(self._rank), own, peers, groups)

    def _regions_of(self, rank: int) -> Mapped:
        """Return a view of a peer's regions for one thread alone."""
        address = self._peers[rank].address
        return Mapped(rank, address.key_bytes, lambda fd: open_descriptor(rank, address, fd, os.O_RDWR))

    def _await(self, joining: Sequence[int], deadline_ns: int) -> None:
        """Wait until the ranks in ``joining`` have mapped their rings in this rank's memory."""
        while True:
            absent = [rank for rank in joining if self._peers[rank].inbound.peer_state() == State.ABSENT]
            if not absent:
                return
            lost = [peer.error for rank in absent if (peer := self._peers[rank]).error is not None]
            if lost:
                raise ConnectError(f"{lost[0]} before it joined rank {self._rank}") from lost[0]
            if not self._rest(deadline_ns, whatever_ended=True):
                raise ConnectError(f"ranks {absent} did not join rank {self._rank} over shared memory in time")

    def _ring(self, bell_fd: int) -> None:
        self._counts.bells_rung += 1
        ring(bell_fd)

    def _end(self, ticket: Ticket, status: TicketStatus) -> None:
        ticket.status = status
        ticket.ended_ns = self._clock.now_ns()
        self._ended.append(ticket)

    def _cancelled(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            ticket.status = TicketStatus.CANCELLED
            ticket.ended_ns = self._clock.now_ns()

    def _advance(self, peers: Iterable[_Peer]) -> None:
        """Take and give what there is, with no look at who has gone."""
        for peer in peers:
            if peer.outbound.queue:
                peer.outbound.advance()
            if peer.inbound.waiting or self._discards:
                try:
                    peer.inbound.advance()
                except FrameError as error:
                    self._lose(peer, error)
                if peer.error is not None and peer.inbound.drained():
                    peer.inbound.fail(peer.error)

    def _rest(self, deadline_ns: int, whatever_ended: bool = False) -> bool:
        """Sleep until something may have happened and look again; False once the deadline has passed."""
        now_ns = self._clock.now_ns()
        if now_ns >= deadline_ns:
            self._hear(0)
            self._look_after_peers()
            return False
        if not whatever_ended and self._spin(min(now_ns + self._settings.spin_ns, deadline_ns)):
            return True
        self._fall_asleep()
        if not self._ended or whatever_ended:
            self._counts.sleeps += 1
            self._hear(deadline_ns - now_ns)
        self._set_asleep(False)
        self._look_after_peers()
        return True

    def _spin(self, until_ns: int) -> bool:
        """Look again and again, offering the processor to others; True once a ticket has ended."""
        while not self._ended and self._clock.now_ns() < until_ns:
            os.sched_yield()
            self._advance(self._peers.values())
        return bool(self._ended)

    def _fall_asleep(self) -> None:
        """Ask to be woken, then look once more."""
        self._set_asleep(True)
        with self._fence:
            pass
        self._look_after_peers()

    def _set_asleep(self, asleep: bool) -> None:
        self._asleep = asleep
        for peer in self._peers.values():
            peer.inbound.set_sleeping(asleep)

    def _hear(self, timeout_ns: int) -> None:
        """Wait on the doorbell, silence it, and note whose process ended."""
        for rank in self._bell.wait(timeout_ns):
            self._bell.forget(rank)
            peer = self._peers.get(rank)
            if peer is not None and peer.error is None and peer.inbound.peer_state() < State.CLOSED:
                self._lose(peer, process_ended(rank))

    def _look_after_peers(self) -> None:
        """Note who has gone, then take and give what there is."""
        for peer in self._peers.values():
            if peer.error is None and (state := peer.inbound.peer_state()) >= State.CLOSED:
                self._lose(peer, PeerLost(f"rank {peer.rank} {_WENT[State(state)]}"))
        self._advance(self._peers.values())

    def _lose(self, peer: _Peer, error: TransportError) -> None:
        """Fail what can no longer happen with ``peer``; what it sent before can still be received."""
        peer.error = error
        self._bell.forget(peer.rank)
        peer.outbound.fail(error)
        if isinstance(error, FrameError):
            peer.inbound.fail(error)
        elif peer.inbound.waiting:
            self._advance([peer])

    def _leave(self, deadline_ns: int) -> None:
        """Send what there is until the deadline, unless this aborts, and give everything back."""
        self._open = False
        self._bell.wake()  # whoever polls or is in a collective on another thread ends at once
        with self._making:
            natives = self._natives
        if natives is not None:
            natives.wake()
        for group in list(self._made_groups):
            group.wake()
        with self._using:
            while not self._aborting and any(peer.outbound.queue for peer in self._peers.values()):
                self._advance(self._peers.values())
                if not self._rest(deadline_ns, whatever_ended=True):
                    break
            self._give_back()

    def _give_back(self) -> None:
        """Tell all peers that this rank goes, and give back what it holds, once."""
        if self._left:
            return
        self._left = True
        with self._making:
            natives, self._natives, self._collectives = self._natives, None, None
        if natives is not None:
            natives.close()
        for group in list(self._made_groups):
            group.leave(clean=False)
        self._stage = None
        state = State.ABORTED if self._aborting else State.CLOSED
        for peer in self._peers.values():  # all at once, or who hears first aborts before others know the reason
            peer.outbound.set_state(state)
        for peer in self._peers.values():
            ring(peer.bell_fd)
            self._cancelled(peer.outbound.drop())
            self._cancelled(peer.inbound.drop())
            os.close(peer.bell_fd)
        self._peers.clear()
        self._ended.clear()
        self._bell.close()
        for fd in (*self._processes.values(), self._memory_fd):
            os.close(fd)
