"""A fleet: the engines of all ranks, over modelled delays, in virtual time.

It carries out what engines say as the progress thread does, on a network in which a message takes a delay that depends
on its ends, messages of one sender to one receiver keep their order, and a sender stops where its receiver holds as
many bytes of it as its credit allows. Folds cost no time. Nothing here reads a clock or sleeps; equal calls give equal
results::

    fleet = Fleet(3)
    calls = [fleet.call(rank, "all_reduce", np.ones(10)) for rank in range(3)]
    fleet.run()
    assert all((call.array == 3).all() for call in calls)
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.discarding import Discarded, has_prefix
from detcoll.errors import DetcollError, FrameError
from detcoll.machine import Queued, Slots
from detcoll.plan import Calendar, Collective, Kind, Planner, Slotting, build_calendar
from detcoll.plan.headroom import Express
from detcoll.plan.ir import Buffer
from detcoll.runtime import Descriptor, Engine, Group, Memory, Operation, Work
from detcoll.runtime.actions import Act
from detcoll.runtime.control import CONTROL_BYTES, CONTROL_TAG, Cause, Message, pack, unpack
from detcoll.runtime.engine import HELLO_TAG, Wide
from detcoll.runtime.group import WORLD_ID, group_id, world
from detcoll.runtime.memory import ScratchPool
from detcoll.runtime.messages import Verb
from detcoll.runtime.postman import Parcel
from detcoll.runtime.transfer import ANY, NOTE_BYTES, Posting, Transfer
from detcoll.signature import signature_of
from detcoll.testing.plans import sites_of
from detcoll.topology import Topology
from detcoll.transport import Ticket, TicketKind, TicketStatus, Window, byte_view
from detcoll.types import ReduceOp, accumulation_dtype, check_op

SECOND_NS = 1_000_000_000
LONGEST_RUN_NS = 3_600 * SECOND_NS
PENDING = 0xFB
"""What host memory has before a device's copy wrote to it."""

Program = Generator["Called", None, None]
Delay = Callable[[int, int], int]


@dataclass(eq=False, slots=True)
class Called:
    """A call that a rank made: its array, and what became of it and when.

    ``copy_ns`` : how long a copy between the array and the host takes, for a message whose array is on a device.
    """

    rank: int
    operation: Operation | Transfer | None
    array: NDArray[Any]
    error: Exception | None = None
    ended_ns: int = -1
    then: Callable[[], None] | None = None
    copy_ns: int = 0

    @property
    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        return self.ended_ns >= 0


@dataclass(eq=False, slots=True)
class Letter:
    """A message on its way or arrived; ``taken`` : told to the sender that it was received."""

    source: int
    dst: int
    tag: int
    data: bytes
    sent: Callable[[], None] | None = None


@dataclass(eq=False, slots=True)
class Receive:
    """A receive that waits: where to, and what to do with what comes."""

    nbytes: int
    into: memoryview | None
    done: Callable[[Ticket], None]


@dataclass(eq=False, slots=True)
class Lender:
    """Gives credit back when a view that was lent is released."""

    fleet: Fleet
    source: int
    dst: int
    nbytes: int

    def take_back(self, ticket: Ticket) -> None:
        """Take note that the view is released."""
        self.fleet.free(self.source, self.dst, self.nbytes)


@dataclass(eq=False, slots=True)
class Host:
    """A rank of a fleet: its engine, what arrived for it, whose natives it was to stop, and whether it is frozen."""

    engine: Engine
    pool: ScratchPool = field(default_factory=ScratchPool)
    posted: dict[tuple[int, int], deque[Receive]] = field(default_factory=dict)
    arrived: dict[tuple[int, int], deque[Letter]] = field(default_factory=dict)
    discarded: Discarded = field(default_factory=Discarded)
    calls: dict[Operation | Transfer, Called] = field(default_factory=dict)
    sequences: Counter[int] = field(default_factory=Counter)
    announced: list[Cause] = field(default_factory=list)
    stopped: list[tuple[Group, Exception]] = field(default_factory=list)
    events: int = 0
    stops_at: int | None = None
    frozen: bool = False
    is_mute: bool = False
    wakes_ns: int = -1


@lru_cache(1024)
def _planner(topology: Topology, ranks: tuple[int, ...], rank: int) -> Planner:
    """Return what makes the plans of a rank of a group; they are compiled once for all fleets."""
    restricted = topology.restricted(ranks)
    return Planner(restricted, ranks.index(rank), build_calendar(restricted, Slotting.OFF))


class Fleet:
    """The engines of all ranks; see the module. It has many fields since it is network, clock and callers in one.

    Parameters
    ----------
    ranks_of_sites : int or sequence of int
        How many ranks each site has; a number: one site.
    delay_ns : int or callable
        How long a message takes from a rank to another.
    credit_bytes : int, optional
        How many bytes of one rank another holds until they are received, or given back where they were lent.
    rate_bytes_per_s : float, optional
        What each rank sends at most; without it only delays count.
    rendezvous : bool
        Whether what is announced reaches all ranks.
    slotting : Slotting
        How engines share their lines. The network here keeps no windows and no pace: it sends what it is given.
    """

    def __init__(
        self, ranks_of_sites: int | Sequence[int], *, delay_ns: int | Delay = 1_000_000,
        credit_bytes: int | None = None, rate_bytes_per_s: float | None = None, rendezvous: bool = False,
        slotting: Slotting = Slotting.OFF,
    ) -> None:  # fmt: skip
        counts = [ranks_of_sites] if isinstance(ranks_of_sites, int) else list(ranks_of_sites)
        self.topology: Topology = sites_of(counts)
        self.calendar: Calendar = build_calendar(self.topology, slotting)
        self.now_ns = 0
        self.credit_bytes, self.rate_bytes_per_s, self.rendezvous = credit_bytes, rate_bytes_per_s, rendezvous
        self._delay: Delay = delay_ns if callable(delay_ns) else lambda source, dst: delay_ns
        self._events: list[tuple[int, int, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._held_bytes: Counter[tuple[int, int]] = Counter()
        self._stopped: dict[tuple[int, int], deque[Letter]] = {}
        self._free_ns: Counter[tuple[int, int] | int] = Counter()
        self.largest_held_bytes: Counter[tuple[int, int]] = Counter()
        self.drops: Callable[[int, int, int], bool] = lambda source, dst, tag: False
        """Tells which messages (source, receiver, tag) are lost."""
        size, sites = self.topology.size, [self.topology.site_of(rank) for rank in range(self.topology.size)]
        self.world = world(sites)
        self.hosts = []
        for rank in range(size):
            wide = frozenset(other for other in range(size) if sites[other] != sites[rank])
            slots: Slots[Wide] = Slots(self.calendar, sites[rank], rank)
            express = None if slotting is Slotting.OFF else Express.of(self.topology, rank)
            engine = Engine(rank, sites, wide, slots, express)
            engine.join(self.world)
            self.hosts.append(Host(engine))
            self.at(0, rank, lambda: None)

    # What tests do.

    def engine(self, rank: int) -> Engine:
        """Return the engine of a rank."""
        return self.hosts[rank].engine

    def group(self, ranks: Sequence[int], name: str = "", earlier: int = 0) -> Group:
        """Let some ranks make a group, all at once."""
        identity = group_id(WORLD_ID, ranks, name, earlier)
        group = Group(identity, tuple(ranks), tuple(self.topology.site_of(rank) for rank in ranks), name)
        for rank in ranks:
            self.engine(rank).join(group, self.now_ns)
            self.at(self.now_ns, rank, lambda: None)
        return group

    def call(
        self, rank: int, kind: str, array: NDArray[Any] | None = None, *, group: Group | None = None, op: str = "sum",
        root: int = 0, timeout_s: float = 600.0, at_ns: int | None = None, spans: bool = False, name: str = "",
        load: Callable[[], None] | None = None,
    ) -> Called:  # fmt: skip
        """Let a rank make a call, now or later; with ``spans`` it is held against others on the same memory."""
        group = group or self.world
        array = np.zeros(1, np.uint8) if array is None else array
        host = self.hosts[rank]
        sequence = host.sequences[group.id]
        host.sequences[group.id] += 1
        parsed, called = ReduceOp.parse(op), Called(rank, None, array)
        dtype = array.dtype
        if signature_of(kind).has_op:
            check_op(parsed, dtype)
        text = "" if group.id == WORLD_ID else f"{group.id:016x}"
        descriptor = Descriptor(sequence, kind, parsed.value, dtype.name, array.size, root, 1, text, name)
        collective = Collective(kind, array.size, dtype.itemsize, accumulation_dtype(dtype).itemsize, root)
        memory = Memory(array, parsed, Work(kind), descriptor.encode(), load)
        address = array.__array_interface__["data"][0]
        operation = Operation(
            group, descriptor, self._planner(group, rank).plan(collective), round(timeout_s * SECOND_NS), self.now_ns,
            [(address, address + array.nbytes)] if spans else (), memory,
        )  # fmt: skip
        called.operation = operation
        host.calls[operation] = called
        self.at(self.now_ns if at_ns is None else at_ns, rank, lambda: host.engine.submit(operation, self.now_ns))
        return called

    def send(self, rank: int, dst: int, array: NDArray[Any], tag: int = 0, **given: Any) -> Called:
        """Let a rank send; see `call` for what may be given. ``copy_ns`` : the array is on a device, see `Called`."""
        return self._message(rank, dst, array, tag, is_send=True, **given)

    def recv(self, rank: int, src: int | None, array: NDArray[Any], tag: int = 0, **given: Any) -> Called:
        """Let a rank receive from a rank or from any."""
        return self._message(rank, ANY if src is None else src, array, tag, is_send=False, **given)

    def _message(
        self, rank: int, peer: int, array: NDArray[Any], tag: int, *, is_send: bool, group: Group | None = None,
        timeout_s: float = 600.0, at_ns: int | None = None, spans: bool = False, name: str = "",
        chunk_bytes: int = 65_536, ahead_bytes: int = 262_144, load: Callable[[], None] | None = None,
        awaits_receive: bool = False, copy_ns: int | None = None,
    ) -> Called:  # fmt: skip
        on_host = array if copy_ns is None else np.full_like(array, PENDING)
        address = array.__array_interface__["data"][0]
        transfer = Transfer(
            group or self.world, is_send, peer, tag, array.dtype.name, array.size, array.nbytes,
            round(timeout_s * SECOND_NS), self.now_ns, chunk_bytes, ahead_bytes,
            [(address, address + array.nbytes)] if spans else (), name, Parcel(on_host, Work("message"), load),
            awaits_receive=awaits_receive, is_on_device=copy_ns is not None,
        )  # fmt: skip
        host, called = self.hosts[rank], Called(rank, transfer, array, copy_ns=copy_ns or 0)
        host.calls[transfer] = called
        self.at(self.now_ns if at_ns is None else at_ns, rank, lambda: host.engine.submit(transfer, self.now_ns))
        return called

    def refuse(self, rank: int, error: Exception, *, group: Group | None = None) -> None:
        """Let a rank refuse the call that it would make next."""
        group, host = group or self.world, self.hosts[rank]
        sequence = host.sequences[group.id]
        host.sequences[group.id] += 1
        self.at(self.now_ns, rank, lambda: host.engine.failures.refuse(group, sequence, error, self.now_ns))

    def program(self, rank: int, program: Program) -> None:
        """Let a rank make calls one after another: each that ``program`` yields is waited for.

        What it ended with is raised there; one that the program does not catch ends it.
        """

        def go(last: Called | None) -> None:
            try:
                called = program.throw(last.error) if last is not None and last.error is not None else next(program)
            except (StopIteration, DetcollError):
                return
            if called.ended:
                self.at(self.now_ns, rank, lambda: go(called))
            else:
                called.then = lambda: self.at(self.now_ns, rank, lambda: go(called))

        self.at(self.now_ns, rank, lambda: go(None))

    def freeze(self, rank: int, at_event: int = 0, *, mute: bool = False) -> None:
        """Let a rank do nothing any more from its ``at_event``-th event on; what it has sent still arrives.

        With ``mute`` it goes on, and nothing that it sends arrives.
        """
        self.hosts[rank].stops_at, self.hosts[rank].is_mute = at_event, mute

    def lose(self, rank: int, *, by: Sequence[int]) -> None:
        """Let a rank be gone, and the endpoints of some others notice."""
        self.hosts[rank].frozen = True
        for other in by:
            self.at(self.now_ns, other, partial(self._rank_lost, other, rank))

    def run(self, until_ns: int = LONGEST_RUN_NS) -> None:
        """Go on until nothing happens any more, or until a time."""
        while self._events and self._events[0][0] <= until_ns:
            at_ns, _, rank, event = heapq.heappop(self._events)
            self.now_ns = max(self.now_ns, at_ns)
            if rank < 0:
                event()
                continue
            host = self.hosts[rank]
            host.events += 1
            host.frozen = host.frozen or (host.stops_at is not None and host.events > host.stops_at)
            if not host.frozen or host.is_mute:
                event()
                self._turn(rank)
        if until_ns < LONGEST_RUN_NS:
            self.now_ns = max(self.now_ns, until_ns)

    def at(self, at_ns: int, rank: int, event: Callable[[], None]) -> None:
        """Let something happen at a rank; rank -1: in the network."""
        heapq.heappush(self._events, (at_ns, next(self._count), rank, event))

    @property
    def idle(self) -> bool:
        """Whether nothing is under way on any rank that is not frozen."""
        return all(host.engine.idle for host in self.hosts if not host.frozen)

    def _planner(self, group: Group, rank: int) -> Planner:
        return _planner(self.topology, group.ranks, rank)

    def _rank_lost(self, rank: int, lost: int) -> None:
        self.engine(rank).failures.rank_lost(lost, f"rank {lost} is lost", self.now_ns)

    # What the progress thread does.

    def _turn(self, rank: int) -> None:
        host = self.hosts[rank]
        engine = host.engine
        for _ in range(2):  # what ends frees room for what waits
            engine.start_ready(self.now_ns)
            self._act(host)
            while (work := engine.next_work()) is not None:
                operation, step = work
                if operation.plan.rows[step].kind == Kind.FOLD:
                    operation.memory.fold(operation.plan, step)
                engine.worked(operation, step, self.now_ns)
                self._act(host)
            engine.retire(self.now_ns)
            engine.give_the_line(self.now_ns)
            engine.failures.look_after(self.now_ns)
            self._act(host)
        next_ns = engine.next_ns(self.now_ns)
        if next_ns is not None and (host.wakes_ns <= self.now_ns or next_ns < host.wakes_ns):
            host.wakes_ns = max(next_ns, self.now_ns + 1)
            self.at(host.wakes_ns, rank, lambda: None)

    def _act(self, host: Host) -> None:
        for act, *fields in host.engine.actions:  # also those that are added meanwhile
            getattr(self, f"_{Act(act).name.lower()}")(host, *fields)
        host.engine.actions.clear()

    def _open(self, host: Host, operation: Operation) -> None:
        operation.memory.open(operation.plan, host.pool)
        if operation.memory.load is not None:
            try:
                operation.memory.load()
            except OSError as error:
                host.engine.failures.broken(operation, error, self.now_ns)

    def _recv(self, host: Host, operation: Operation, step: int) -> None:
        if operation.over:
            return
        row, nbytes, peer = operation.plan.rows[step], operation.plan.message_bytes(step), operation.peer(step)
        into = None if row.buffer == Buffer.LENT else operation.memory.view(row.buffer, row.offset, row.length)

        def done(ticket: Ticket) -> None:
            if ticket.error is not None:
                host.engine.failed(operation, step, peer, ticket.error, self.now_ns)
                return
            if operation.over:
                ticket.release()
                return
            if ticket.view is not None:
                operation.memory.lent[step] = ticket
            host.engine.received(operation, step, self.now_ns)

        self._post(host, peer, operation.prefix | row.tag, Receive(nbytes, into, done))

    def _send(
        self, host: Host, operation: Operation, step: int, queued: Queued[Wide] | None, window: Window | None
    ) -> None:
        if operation.over:
            return
        row = operation.plan.rows[step]
        data = bytes(operation.memory.view(row.buffer, row.offset, row.length))
        tag = operation.prefix | row.tag

        def sent() -> None:
            host.engine.sent(operation, step, self.now_ns)

        self._put(Letter(host.engine.rank, operation.peer(step), tag, data, sent))

    def _hello(self, host: Host, operation: Operation, peer: int) -> None:
        if operation.over:
            return
        tag = operation.prefix | HELLO_TAG
        self._put(Letter(host.engine.rank, peer, tag, operation.memory.hello))

    def _await_hello(self, host: Host, operation: Operation, peer: int) -> None:
        if operation.over:
            return

        def done(ticket: Ticket) -> None:
            record = bytes(ticket.view or b"")
            ticket.release()
            host.engine.greeted(operation, peer, record, self.now_ns)

        tag = operation.prefix | HELLO_TAG
        self._post(host, peer, tag, Receive(len(operation.memory.hello), None, done))

    def _stop(self, host: Host, group: Group, error: Exception) -> None:
        host.stopped.append((group, error))

    def _copy(self, host: Host, operation: Operation, step: int) -> None:
        operation.memory.keep(step)

    def _mail(self, host: Host, verb: Verb, *fields: Any) -> None:
        getattr(self, f"_mail_{verb.name.lower()}")(host, *fields)

    def _mail_listen(self, host: Host, group: Group, peer: int) -> None:
        for tag in (group.note_tag, group.paced_note_tag):
            self._await_note(host, group, peer, tag)

    def _await_note(self, host: Host, group: Group, peer: int, tag: int) -> None:
        def done(ticket: Ticket) -> None:
            record = bytes(ticket.view or b"")
            ticket.release()
            self._await_note(host, group, peer, tag)
            host.engine.messages.noted(group.id, peer, record, self.now_ns)

        self._post(host, peer, tag, Receive(NOTE_BYTES, None, done))

    def _mail_note(self, host: Host, posting: Posting, queued: Queued[Wide] | None, window: Window | None) -> None:
        if not posting.over:
            send = posting.send
            record = posting.note.pack(b"" if send is None else send.memory.view(0, send.nbytes))
            tag = posting.group.note_tag if queued is None else posting.group.paced_note_tag
            self._put(Letter(host.engine.rank, posting.peer, tag, record))
            if queued is not None:
                host.engine.messages.told(posting)

    def _mail_open(self, host: Host, transfer: Transfer) -> None:
        if transfer.memory.load is not None:
            transfer.memory.load()

    def _mail_copy(self, host: Host, transfer: Transfer) -> None:
        called = host.calls[transfer]

        def done() -> None:
            if not transfer.over:
                on_host, on_device = transfer.memory.array, called.array
                np.copyto(*((on_host, on_device) if transfer.is_send else (on_device, on_host)))
                host.engine.messages.copied(transfer, self.now_ns)

        self.at(self.now_ns + called.copy_ns, host.engine.rank, done)

    def _mail_keep(self, host: Host, transfer: Transfer) -> None:
        transfer.memory.keep()

    def _mail_send(
        self, host: Host, transfer: Transfer, chunk: int, queued: Queued[Wide] | None, window: Window | None
    ) -> None:
        if transfer.over:
            return

        def sent() -> None:
            host.engine.messages.moved(transfer, chunk, self.now_ns)

        tag = transfer.group.message_tag(transfer.key, chunk)
        data = bytes(transfer.memory.view(*transfer.span(chunk)))
        self._put(Letter(host.engine.rank, transfer.peer, tag, data, sent))

    def _mail_recv(self, host: Host, transfer: Transfer, chunk: int) -> None:
        if transfer.over:
            return
        begin, end = transfer.span(chunk)

        def done(ticket: Ticket) -> None:
            if ticket.error is not None:
                host.engine.messages.failed(transfer, chunk, ticket.error, self.now_ns)
            else:
                host.engine.messages.moved(transfer, chunk, self.now_ns)

        tag = transfer.group.message_tag(transfer.key, chunk)
        self._post(host, transfer.source, tag, Receive(end - begin, transfer.memory.view(begin, end), done))

    def _mail_move(self, host: Host, send: Transfer, recv: Transfer) -> None:
        recv.memory.take(send.memory)

    def _mail_put(self, host: Host, recv: Transfer, payload: bytes) -> None:
        recv.memory.view(0, recv.nbytes)[:] = payload

    def _finish(self, host: Host, operation: Operation | Transfer, error: Exception | None) -> None:
        if error is not None:
            operation.memory.drop()
        called = host.calls.pop(operation)
        called.error, called.ended_ns = error, self.now_ns
        if called.then is not None:
            called.then()

    def _close(self, host: Host, operation: Operation) -> None:
        operation.memory.close(host.pool)

    def _listen(self, host: Host, peer: int) -> None:
        def done(ticket: Ticket) -> None:
            message: Message = unpack(bytes(ticket.view or b""))
            ticket.release()
            self._listen(host, peer)
            host.engine.failures.message(peer, message, self.now_ns)

        self._post(host, peer, CONTROL_TAG, Receive(CONTROL_BYTES, None, done))

    def _tell(self, host: Host, peer: int, message: Message) -> None:
        self._put(Letter(host.engine.rank, peer, CONTROL_TAG, pack(message)))

    def _announce(self, host: Host, cause: Cause) -> None:
        host.announced.append(cause)
        if self.rendezvous:
            for other in {*range(len(self.hosts))} - {host.engine.rank}:
                arrives_ns = self.now_ns + self._delay(host.engine.rank, other)
                self.at(arrives_ns, other, partial(self._hear, other, cause))

    def _hear(self, rank: int, cause: Cause) -> None:
        self.engine(rank).failures.told(cause, self.now_ns)

    def _record(self, host: Host, reason: str) -> None:
        """Write nothing: a test looks at the recorder itself."""

    def _discard(self, host: Host, tag: int, bits: int) -> None:
        host.discarded.add(tag, bits)
        for key in [key for key in host.posted if has_prefix(key[1], tag, bits)]:
            del host.posted[key]
        for key in [key for key in host.arrived if has_prefix(key[1], tag, bits)]:
            for message in host.arrived.pop(key):
                self._taken(message)
                self.free(message.source, message.dst, len(message.data))

    def _lift(self, host: Host, tag: int, ranks: Sequence[int]) -> None:
        host.discarded.lift(tag)

    # The network.

    def _put(self, message: Letter) -> None:
        """Send a message, or hold it where its receiver holds enough of this sender."""
        ends = message.source, message.dst
        self.hosts[message.source].discarded.lift(message.tag)
        waiting = self._stopped.setdefault(ends, deque())
        waiting.append(message)
        self._depart(ends)

    def _depart(self, ends: tuple[int, int]) -> None:
        waiting = self._stopped.get(ends)
        while waiting:
            nbytes = len(waiting[0].data)
            held = self._held_bytes[ends]
            if waiting[0].tag != CONTROL_TAG:
                if self.credit_bytes is not None and held and held + nbytes > self.credit_bytes:
                    return
                self._held_bytes[ends] += nbytes
                self.largest_held_bytes[ends] = max(self.largest_held_bytes[ends], self._held_bytes[ends])
            self._fly(waiting.popleft())

    def _fly(self, message: Letter) -> None:
        source, dst = message.source, message.dst
        host = self.hosts[source]
        if self.drops(source, dst, message.tag) or (host.frozen and host.is_mute):
            if message.sent is not None:
                self.at(self.now_ns, source, message.sent)
            return
        left_ns = self.now_ns
        if self.rate_bytes_per_s is not None:
            left_ns = max(left_ns, self._free_ns[source]) + round(len(message.data) / self.rate_bytes_per_s * 1e9)
            self._free_ns[source] = left_ns
        arrives_ns = max(left_ns + self._delay(source, dst), self._free_ns[source, dst])
        self._free_ns[source, dst] = arrives_ns
        self.at(arrives_ns, dst, lambda: self._arrive(message))

    def _arrive(self, message: Letter) -> None:
        host, key = self.hosts[message.dst], (message.source, message.tag)
        if host.discarded and host.discarded.covers(message.tag):
            self._taken(message)
            self.free(message.source, message.dst, len(message.data))
        elif host.posted.get(key):
            self._match(host.posted[key].popleft(), message)
        else:
            host.arrived.setdefault(key, deque()).append(message)

    def _post(self, host: Host, peer: int, tag: int, receive: Receive) -> None:
        host.discarded.lift(tag)
        arrived = host.arrived.get((peer, tag))
        if arrived:
            message = arrived.popleft()
            # As an endpoint: what a receive finds there is told by a later poll, never at once.
            self.at(self.now_ns, host.engine.rank, lambda: self._match(receive, message))
        else:
            host.posted.setdefault((peer, tag), deque()).append(receive)

    def _match(self, receive: Receive, message: Letter) -> None:
        nbytes = len(message.data)
        if nbytes != receive.nbytes:
            ticket = Ticket(TicketKind.RECV, message.source, message.tag, receive.nbytes, TicketStatus.FAILED)
            ticket.error = FrameError(f"a message of {nbytes} bytes for a receive of {receive.nbytes}")
            self.free(message.source, message.dst, nbytes)
            self._taken(message)
            receive.done(ticket)
            return
        ticket = Ticket(TicketKind.RECV, message.source, message.tag, nbytes, TicketStatus.DONE)
        if receive.into is not None:
            receive.into[:] = message.data
            self.free(message.source, message.dst, nbytes)
        else:
            ticket.view = byte_view(np.frombuffer(message.data, np.uint8))
            if message.tag != CONTROL_TAG:
                ticket.lender = Lender(self, message.source, message.dst, nbytes)
        self._taken(message)
        receive.done(ticket)

    def _taken(self, message: Letter) -> None:
        """Tell the sender that its message was received."""
        if message.sent is not None:
            back_ns = self._delay(message.dst, message.source)
            self.at(self.now_ns + back_ns, message.source, message.sent)

    def free(self, source: int, dst: int, nbytes: int) -> None:
        """Take note that a receiver holds so much less of a sender."""
        ends = source, dst
        self._held_bytes[ends] -= nbytes
        if self.credit_bytes is not None:
            self.at(self.now_ns + self._delay(dst, source), -1, lambda: self._depart(ends))
