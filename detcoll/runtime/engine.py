"""The engine: what one rank does next in all its calls, without a clock, a socket or an array.

Events come in with the time (`submit`, `received`, `sent`, `worked`, `greeted`, `Failures.told`, ...), and actions go
out: the list `Engine.actions`, which the driver carries out in order and empties. On the wire the driver is
`detcoll.runtime.loop`, in virtual time `detcoll.sim` and the tests. Steps that cost processor time, folds and copies,
are not actions: the driver takes them one by one from `next_work`, as it finds time, and reports each by `worked`.

A call's life::

    submit -> queue of its group -> OPEN, greet -> RECV, SEND, work ... -> result ready -> FINISH -> last step -> CLOSE
                    (at most `LARGEST_ACTIVE` of a group, after calls of any group that share memory with it which
                     either of them writes)

- Greeting: ranks compare descriptors before a result counts. What comes from a rank that has not said what it called is
  held, and it is sent a bounded number of bytes (`detcoll.runtime.credit`).
- Groups are served in turns, one piece of work each; inside a group, calls and steps keep their order.
- What ends calls and groups early, and what others say of that, goes to `Engine.failures`
  (`detcoll.runtime.failures`).
- send and recv, which never wait for collectives of other memory, go to `Engine.messages`
  (`detcoll.runtime.messages`).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detcoll.descriptor import HELLO_BYTES
from detcoll.errors import Closed, FrameError, PeerLost, PlanMismatch, UsageError
from detcoll.machine import Queued, Slots
from detcoll.plan.headroom import Express
from detcoll.plan.ir import LARGEST_PLAN_TAG, Buffer, Kind
from detcoll.plan.layout import uses_window
from detcoll.runtime import blame, mixed
from detcoll.runtime.actions import Act
from detcoll.runtime.control import Cause
from detcoll.runtime.credit import Credit
from detcoll.runtime.failures import Failures
from detcoll.runtime.group import Group
from detcoll.runtime.membership import Membership, NativeCalls
from detcoll.runtime.messages import Messages
from detcoll.runtime.operation import Operation
from detcoll.runtime.recorder import Recorder
from detcoll.runtime.transfer import NEVER_NS, Posting, Transfer
from detcoll.transport import Window

LARGEST_ACTIVE = 16
"""Operations of a group under way at once; further ones wait, so that scratch and credit stay bounded."""

HELLO_TAG = LARGEST_PLAN_TAG

GREETING_DELAY_NS = 3_000_000
"""The hello to other sites is sent after the call's first message over the line, and at the latest after this time.
Sending it earlier would take processor time from the work that leads to that message."""

SEND, RECV, FOLD, LENT = Kind.SEND, Kind.RECV, Kind.FOLD, Buffer.LENT
GIVE, POST, COPY = Act.SEND, Act.RECV, Act.COPY
"""What every step is compared with: to look a member up in its class takes ten times as long."""

Wide = tuple[Operation | Transfer | Posting, int]


class Engine:
    """All calls of one rank; see the module. It keeps more than a few fields since it is where rules of calls meet.

    Parameters
    ----------
    rank : int
        This rank of the job.
    site_of : sequence of int
        The site of every rank.
    wide : frozenset of int
        Ranks behind the line.
    slots : Slots
        What this rank may send over the line, and when.
    express : Express, optional
        The budget of what leaves at once; None: not limited.
    recorder : Recorder, optional
        Where events are kept.
    lines_cost : bool
        Whether sends over the line are work too, as the simulator has it.
    greets : bool
        Whether ranks compare descriptors, which they need not in the simulator.
    """

    def __init__(
        self, rank: int, site_of: Sequence[int], wide: frozenset[int], slots: Slots[Wide],
        express: Express | None = None, recorder: Recorder | None = None, *, lines_cost: bool = False,
        greets: bool = True,
    ) -> None:  # fmt: skip
        self.rank, self.site_of, self.wide, self.slots = rank, site_of, wide, slots
        self.express, self.recorder, self._lines_cost = express, recorder or Recorder(), lines_cost
        self._greets = greets
        self.actions: list[tuple[Any, ...]] = []
        """The driver carries them out from the front while more are added at the end; the list is never replaced."""
        self.groups: dict[int, Membership] = {}
        self._listening: set[int] = set()
        self._greetings: list[tuple[Operation, set[int]]] = []
        self._ready: deque[Membership] = deque()
        self._may_start = self._may_retire = False
        self.credit = Credit()
        self.failures = Failures(rank, self.groups, self.actions, slots, self.credit, self.recorder, self._blocker)
        self._heard_ns = self.failures.heard_ns
        self._order = 0
        self.messages = Messages(
            rank, site_of, wide, self.groups, self.actions, self.failures, slots, express, self.credit, self.recorder,
            self._listen, self._predecessor,
        )  # fmt: skip

    # Groups and calls.

    def join(self, group: Group, now_ns: int = 0) -> Membership:
        """Take part in a group from now on, and listen to the ranks with which its calls will probably have to do.

        Raises
        ------
        UsageError
            If a group with the same id or number is open already.
        PeerLost
            If a member is lost already.
        """
        for other in self.groups.values():
            if other.group.number == group.number:
                raise UsageError(
                    f"group {group.title} has the same number in tags as group {other.group.title}; close that one, or "
                    "give this one another name="
                )
        for rank in group.ranks:
            if rank in self.failures.lost:
                raise PeerLost(str(self.failures.lost[rank]))
        known = group.acquaintances(self.rank)
        membership = Membership(group, known, {*known, *group.neighbours(self.rank)})
        self.groups[group.id] = membership
        self._listen(membership.contacts | group.partners(self.rank))
        self.recorder.note(now_ns, "join", group.number, detail=group.title)
        return membership

    def attach(self, group: Group, natives: NativeCalls) -> Mapping[int, Cause]:
        """Take note that a transport does calls of a group by itself; return those that others refuse, as they come."""
        membership = self.groups[group.id]
        membership.natives = natives
        return membership.refused

    def bind(self, group: Group) -> None:
        """Let a call that one rank refuses end the group: the site's devices count calls, so none may be left out."""
        self.groups[group.id].is_bound = True

    def leave(self, group: Group) -> None:
        """Remove a group. Its calls that have not finished end as Closed."""
        membership = self.groups.pop(group.id, None)
        if membership is None:
            return
        self.failures.leave(membership)

    def submit(self, operation: Operation | Transfer, now_ns: int) -> None:
        """Take in a call; it starts as soon as its group and its memory allow."""
        membership = self.groups.get(operation.group.id)
        if isinstance(operation, Operation):
            of = operation.descriptor
            called = (of.kind, of.op, of.dtype, of.count, of.root, of.arrays, of.name, of.shape)
            self.recorder.note(now_ns, "call", operation.group.number, operation.sequence, detail=called)
        if membership is None:
            closed = Closed(f"{operation.title}: the group was closed")
            self.actions.append((Act.FINISH, operation, closed))
            return
        if membership.failure is not None:
            membership.told = True
            self.actions.append((Act.FINISH, operation, membership.failure))
            return
        operation.order = self._order
        self._order += 1
        if isinstance(operation, Transfer):
            self.messages.submit(membership, operation, now_ns)
            return
        membership.made(operation.sequence)
        membership.waiting.append(operation)
        self._may_start = True

    def start_ready(self, now_ns: int) -> None:
        """Start calls that wait for nothing but this."""
        if self.messages.blocked:
            self.messages.start_ready(now_ns)
        if not self._may_start:
            return
        self._may_start = False
        for membership in self.groups.values():
            while membership.waiting and len(membership.active) < LARGEST_ACTIVE:
                operation = membership.waiting[0]
                if operation.spans and self._predecessor(operation) is not None:
                    break
                membership.waiting.popleft()
                self._start(membership, operation, now_ns)
            if membership.waiting:
                self._may_start = True

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is under way in any group."""
        return all(membership.idle for membership in self.groups.values())

    @property
    def can_start(self) -> bool:
        """Whether `start_ready` might start something."""
        if self.messages.blocked and self.messages.can_start:
            return True
        return self._may_start and any(
            membership.waiting
            and len(membership.active) < LARGEST_ACTIVE
            and self._predecessor(membership.waiting[0]) is None
            for membership in self.groups.values()
        )

    def _predecessor(self, operation: Operation | Transfer) -> Operation | Transfer | None:
        """Return an earlier call that has not ended and shares memory with this one that either writes, or None."""
        for membership in self.groups.values():
            for other in membership.active:
                if not other.reported and other.order < operation.order and other.holds(operation):
                    return other
            for other in membership.waiting:
                if other.order >= operation.order:
                    break
                if other.holds(operation):
                    return other
            transfer = membership.mail.memory.find(operation)
            if transfer is not None:
                return transfer
        return None

    def _blocker(self, queued: Operation) -> tuple[Operation | Transfer, int] | None:
        """Return the call under way for which a queued call waits in the end, and when it made progress last, or None.

        A call waits for earlier calls on its memory, and for all earlier calls of its group to start.
        """
        call: Operation | Transfer = queued
        while (before := self._predecessor(call) or self._before_in_group(call)) is not None:
            call = before
        if isinstance(call, Transfer):
            return call, max(call.live_ns, call.called_ns)
        active = self.groups[call.group.id].active
        lives = [other.live_ns for other in active if not other.reported and other.sequence <= call.sequence]
        return (call, max(lives)) if call in active and lives else None

    def _before_in_group(self, call: Operation | Transfer) -> Operation | None:
        """Return an earlier collective of the group that has to start, or to end, before this one starts."""
        membership = self.groups[call.group.id]
        if isinstance(call, Transfer) or call not in membership.waiting:
            return None
        first = membership.waiting[0]
        if first is not call:
            return first
        return membership.active[0] if len(membership.active) >= LARGEST_ACTIVE else None

    def _start(self, membership: Membership, operation: Operation, now_ns: int) -> None:
        self.recorder.note(now_ns, "start", operation.group.number, operation.sequence)
        if membership.dropped:
            self.failures.lift_old(membership, operation.sequence)
        refusal = membership.refused.pop(operation.sequence, None)
        if refusal is not None:
            self.failures.end_call(membership, operation, refusal.error(), now_ns)
            return
        membership.active.append(operation)
        blame.progressed(operation, now_ns)
        self._may_retire = True
        self.actions.append((Act.OPEN, operation))
        if self._greets and len(operation.group.ranks) > 1:
            self._greet(membership, operation, now_ns)
        self._carry_out(membership, operation, operation.machine.start(), now_ns)

    def _greet(self, membership: Membership, operation: Operation, now_ns: int) -> None:
        """Exchange descriptors with every peer of the plan, so that nothing of another collective is taken in.

        Acquaintances hear it too: ranks that called different collectives may have plans that share no message.
        """
        operation.strangers = operation.partners | membership.acquaintances
        if membership.natives is not None:
            mixed.begin(operation, now_ns)
        membership.contacts |= operation.strangers
        self._listen(operation.strangers)
        for peer in operation.strangers - self.wide:
            self.actions.append((Act.AWAIT_HELLO, operation, peer))
            self.actions.append((Act.HELLO, operation, peer))
        far = operation.strangers & self.wide
        if far:
            operation.greets_ns = now_ns + GREETING_DELAY_NS
            self._greetings.append((operation, far))

    def _listen(self, peers: Iterable[int]) -> None:
        for peer in peers:
            if peer not in self._listening:
                self._listening.add(peer)
                self.actions.append((Act.LISTEN, peer))

    # Steps.

    def _carry_out(self, membership: Membership, operation: Operation, ready: list[int], now_ns: int) -> None:
        """Start steps that may start and cost little; the others are put in order for `next_work`."""
        kinds = operation.columns.kind
        for step in ready:
            kind = kinds[step]
            if kind == RECV:
                self.actions.append((POST, operation, step))
            elif kind == SEND and not self._lines_cost and operation.peer(step) in self.wide:
                self._send(operation, step, now_ns)
            elif step in operation.plan.onsite:
                operation.onsite.append(step)
                self._let_devices(operation)
            else:
                if not membership.work:
                    self._ready.append(membership)
                heapq.heappush(membership.work, (operation.order, step, operation))

    def _let_devices(self, operation: Operation) -> None:
        """Let the site's devices do what they may: their library would hang, or worse, where ranks call differently."""
        if operation.onsite and not operation.strangers & operation.mates:
            self.actions.extend((Act.ONSITE, operation, step) for step in operation.onsite)
            operation.onsite.clear()

    def next_work(self) -> tuple[Operation, int] | None:
        """Return a fold or a send to be done now, or None; groups take turns."""
        while self._ready:
            membership = self._ready.popleft()
            while membership.work:
                _, step, operation = heapq.heappop(membership.work)
                if operation.over:
                    continue
                if membership.work:
                    self._ready.append(membership)
                return operation, step
        return None

    @property
    def has_work(self) -> bool:
        """Whether `next_work` may have something."""
        return bool(self._ready)

    def worked(self, operation: Operation, step: int, now_ns: int) -> None:
        """Take note that work of `next_work` is done: a fold has been folded, a send may go."""
        if operation.over:
            return
        if operation.columns.kind[step] != FOLD:
            self._send(operation, step, now_ns)
            return
        if operation.lent:
            for lender in operation.plan.lenders_of(step):
                self.credit.give_back(operation, lender)
        self._ended(operation, step, now_ns)

    def received(self, operation: Operation, step: int, now_ns: int) -> None:
        """Take note that what a RECV waits for has come."""
        if operation.over:
            return
        ready: list[int] = []
        peer = operation.peer(step)
        self._heard_ns[peer] = now_ns
        if peer in operation.strangers:
            operation.held.append(step)
        else:
            ready = self._ended(operation, step, now_ns)
        if not ready and operation.columns.buffer[step] == LENT and self.credit.lend(operation, step):
            self.actions.append((COPY, operation, step))

    def sent(self, operation: Operation, step: int, now_ns: int) -> None:
        """Take note that a SEND has been acknowledged; that is no progress of the call."""
        if not operation.over:
            self._heard_ns[operation.peer(step)] = now_ns
            membership = self.groups[operation.group.id]
            self._may_retire = True
            self._carry_out(membership, operation, operation.machine.ended(step), now_ns)

    def missed(self, sends: Sequence[tuple[Queued[Wide], Window, int]]) -> None:
        """Put sends back that did not end in their window; the third item is the bytes already sent."""
        left = [send for send in sends if not send[0].item[0].over]
        for queued, _, _ in left:
            if not isinstance(queued.item[0], Operation):
                self.messages.missed(queued)
        if left:
            self.slots.missed(left)

    def failed(self, operation: Operation, step: int, peer: int, error: Exception, now_ns: int) -> None:
        """Take note that a SEND or RECV of a step failed."""
        if operation.over:
            return
        operation.settled.add(step)
        if isinstance(error, PeerLost):
            self.failures.suspect(peer, error, now_ns)
        elif isinstance(error, FrameError) and peer in operation.strangers:
            operation.wrong[peer] = error  # what the stranger called explains it, most probably
        else:
            self.failures.end_group(self.groups[operation.group.id], error, now_ns)

    def _ended(self, operation: Operation, step: int, now_ns: int) -> list[int]:
        blame.progressed(operation, now_ns)
        peer = operation.columns.peer[step]
        peer = operation.group.ranks[peer] if peer >= 0 else -1
        self.recorder.note(now_ns, "step", operation.group.number, operation.sequence, step, peer)
        ready = operation.machine.ended(step)
        self._may_retire = True
        if ready:
            self._carry_out(self.groups[operation.group.id], operation, ready, now_ns)
        return ready

    # Sending.

    def _send(self, operation: Operation, step: int, now_ns: int) -> None:
        peer, nbytes = operation.peer(step), operation.columns.nbytes[step]
        if peer in operation.strangers and not self.credit.may_send_unasked(operation, peer, nbytes):
            operation.unsent.setdefault(peer, []).append(step)
            operation.greets_ns = now_ns
            return
        if peer in self.wide:
            if not self._leaves_at_once(operation, nbytes, now_ns):
                self.slots.add(Queued((operation, step), self.site_of[peer], peer, nbytes))
                return
            operation.greets_ns = now_ns
        self.actions.append((GIVE, operation, step, None, None))

    def _leaves_at_once(self, operation: Operation, nbytes: int, now_ns: int) -> bool:
        """Tell whether a wide message needs no window: one of a small collective that the headroom has room for."""
        if uses_window(self.slots.calendar, operation.plan.collective.nbytes):
            return False
        return self.express is None or self.express.take(nbytes, now_ns)

    def give_the_line(self, now_ns: int) -> None:
        """Send what goes into this rank's current or next windows, and what other sites are to hear of calls."""
        given = deque(self.slots.due(now_ns))
        while given:
            queued, window = given.popleft()
            operation, step = queued.item
            if not isinstance(operation, Operation):
                if self.messages.give(queued, window, now_ns):
                    given.extend(self.slots.due(now_ns))
                continue
            self.recorder.note(now_ns, "window", operation.group.number, operation.sequence, step, queued.peer)
            self.actions.append((GIVE, operation, step, queued, window))
            operation.greets_ns = now_ns
        if self._greetings:
            self._greet_far(now_ns)

    def _greet_far(self, now_ns: int) -> None:
        """Exchange descriptors with ranks of other sites for the calls whose `greets_ns` has come."""
        later = []
        for operation, peers in self._greetings:
            if operation.over:
                continue
            if operation.greets_ns > now_ns:
                later.append((operation, peers))
                continue
            for peer in peers:
                if self.express is not None:
                    self.express.spend(HELLO_BYTES, now_ns)
                self.actions.append((Act.AWAIT_HELLO, operation, peer))
                self.actions.append((Act.HELLO, operation, peer))
        self._greetings = later

    def greeted(self, operation: Operation, peer: int, record: bytes, now_ns: int) -> None:
        """Take in what a peer says that it called."""
        if operation.over:
            return
        self._heard_ns[peer] = now_ns
        try:
            operation.described_to(peer).compare(self.rank, peer, record)
        except PlanMismatch as error:
            self.failures.end_group(self.groups[operation.group.id], error, now_ns)
            return
        if peer in operation.wrong:
            self.failures.end_group(self.groups[operation.group.id], operation.wrong[peer], now_ns)
            return
        self.recorder.note(now_ns, "greeted", operation.group.number, operation.sequence, peer=peer)
        operation.strangers.discard(peer)
        self._may_retire = True
        self.credit.has_called(operation, peer)
        self._let_devices(operation)
        for step in operation.unsent.pop(peer, ()):
            self._send(operation, step, now_ns)
        held, operation.held = operation.held, []
        for step in held:
            if operation.peer(step) in operation.strangers:
                operation.held.append(step)
            else:
                self._ended(operation, step, now_ns)

    def retire(self, now_ns: int) -> None:
        """Report calls whose result is ready, and close those whose last step has ended."""
        if not self._may_retire:
            return
        self._may_retire = False
        for membership in self.groups.values():
            closed = 0
            for operation in membership.active:
                if not operation.reported:
                    if not operation.machine.result_ready or operation.strangers:
                        continue
                    operation.reported = True
                    self.recorder.note(now_ns, "end", operation.group.number, operation.sequence)
                    self.actions.append((Act.FINISH, operation, None))
                    blame.promote(membership, now_ns)
                closed += operation.machine.done
            if closed:
                self._close(membership)

    def _close(self, membership: Membership) -> None:
        left = []
        for operation in membership.active:
            if operation.reported and operation.machine.done:
                self.actions.append((Act.CLOSE, operation))
            else:
                left.append(operation)
        membership.active = left

    # Time.

    def next_ns(self, now_ns: int) -> int | None:
        """Return when this or `Failures.look_after` has something to do even if nothing happens, or None."""
        times = [until_ns for _, until_ns in self.failures.suspects.values()]
        times += [operation.greets_ns for operation, _ in self._greetings]
        line_ns = self.slots.next_ns(now_ns)
        if line_ns is not None:
            times.append(line_ns)
        for membership in self.groups.values():
            if membership.mail.look_ns != NEVER_NS:
                times.append(membership.mail.look_ns)
            first = membership.first
            if first is not None:
                times.append(first.limit_ns)
            if membership.natives is not None and (due_ns := mixed.next_ns(membership)) is not None:
                times.append(due_ns)
        return min(times, default=None)
