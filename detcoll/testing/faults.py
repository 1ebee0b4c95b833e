"""Faults by rule: what happens to the n-th message that a rank sends.

A *step* counts the sends of one endpoint from 0. `Faults` answers what happens at (rank, step), from a table, from a
seed, or both, and from nothing else: the same rules give the same faults in every run. `FaultyEndpoint` is an ordinary
`Endpoint` that wraps another, and `FaultyTransport` an ordinary `Transport`::

    faults = Faults({(1, 3): Kill()}, seed=7, drop=0.01)
    fabric = ThreadFabric(FaultyTransport(MemoryTransport(), faults), 4)
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detcoll.errors import Closed, DetcollError, UsageError
from detcoll.transport import (
    LARGEST_TAG,
    Clock,
    Endpoint,
    Rendezvous,
    Ticket,
    TicketKind,
    TicketStatus,
    Transport,
    Window,
)


@dataclass(frozen=True, slots=True)
class Pass:
    """The message goes its way."""


@dataclass(frozen=True, slots=True)
class Delay:
    """The message leaves later, and what follows it to the same rank with the same tag leaves after it."""

    delay_ns: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The sender believes that the message has left, but it never arrives."""


@dataclass(frozen=True, slots=True)
class Kill:
    """The endpoint aborts instead of sending, as if its process had died."""


Fault = Pass | Delay | Drop | Kill


class Faults:
    """Rules that give the fault at (rank, step).

    Parameters
    ----------
    rules : Mapping
        Faults by (rank, step); they go before chance.
    seed : int
        Fixes which of the other steps are delayed, dropped or killed.
    delay, drop, kill : float
        Chances of each, from 0 to 1, adding up to at most 1.
    delay_ns : int
        The longest delay by chance; each is drawn evenly from 0 to this.

    Raises
    ------
    UsageError
        If the chances are no chances.
    """

    def __init__(
        self,
        rules: Mapping[tuple[int, int], Fault] | None = None,
        *,
        seed: int = 0,
        delay: float = 0.0,
        drop: float = 0.0,
        kill: float = 0.0,
        delay_ns: int = 10**6,
    ) -> None:
        if min(delay, drop, kill) < 0 or delay + drop + kill > 1:
            raise UsageError(f"delay={delay}, drop={drop}, kill={kill} must be chances that add up to at most 1")
        self._rules = dict(rules or {})
        self._seed = seed
        self._delay, self._drop, self._kill = delay, drop, kill
        self._delay_ns = delay_ns

    def at(self, rank: int, step: int) -> Fault:
        """Return what happens to message ``step`` of ``rank``."""
        if (rank, step) in self._rules:
            return self._rules[rank, step]
        chance = random.Random(f"{self._seed}:{rank}:{step}")
        drawn = chance.random()
        if drawn < self._kill:
            return Kill()
        if drawn < self._kill + self._drop:
            return Drop()
        if drawn < self._kill + self._drop + self._delay:
            return Delay(chance.randint(0, self._delay_ns))
        return Pass()


class FaultyTransport(Transport):
    """A transport whose endpoints suffer ``faults``; it has no collectives of its own, so that plans run."""

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self.name = f"faulty-{inner.name}"
        self.capabilities = replace(
            inner.capabilities, native=frozenset(), native_dtypes=frozenset(), native_ops=frozenset()
        )
        self._inner = inner
        self._faults = faults

    def open(
        self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]
    ) -> FaultyEndpoint:
        """Open an endpoint of the inner transport and wrap it."""
        inner = self._inner.open(rank, size, rendezvous, clock, options)
        return FaultyEndpoint(inner, rank, self._faults, clock, self.capabilities.largest_message_bytes)


@dataclass(eq=False, slots=True)
class _Held:
    """A delayed send: the caller's ticket, and what it takes to send it."""

    ticket: Ticket
    view: memoryview
    window: Window | None
    due_ns: int


class FaultyEndpoint(Endpoint):
    """An endpoint to whose sends ``faults`` happen. It is polled in turn: it has no descriptor."""

    def __init__(self, inner: Endpoint, rank: int, faults: Faults, clock: Clock, largest_bytes: int) -> None:
        self.inner = inner
        self.step = 0
        self._rank = rank
        self._faults = faults
        self._clock = clock
        self._largest_bytes = largest_bytes
        self._peers: set[int] = set()
        self._closed = False
        self._held: defaultdict[tuple[int, int], deque[_Held]] = defaultdict(deque)
        self._outer: dict[Ticket, Ticket] = {}
        self._ended: list[Ticket] = []
        self._happened = {"fault_delays": 0, "fault_drops": 0, "fault_kills": 0}

    @property
    def address(self) -> str:
        """Address of the inner endpoint."""
        return self.inner.address

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Connect the inner endpoint."""
        self.inner.connect(addresses, deadline_ns, needed)
        self._peers |= set(addresses) - {self._rank}

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Send, delay, drop or die."""
        self._check(dst, tag, view.nbytes)
        fault = self._faults.at(self._rank, self.step)
        self.step += 1
        if isinstance(fault, Kill):
            self._happened["fault_kills"] += 1
            self.abort()
            raise Closed(f"a fault rule killed rank {self._rank} at step {self.step - 1}")
        ticket = Ticket(TicketKind.SEND, dst, tag, view.nbytes)
        if isinstance(fault, Drop):
            self._happened["fault_drops"] += 1
            return self._end(ticket, TicketStatus.DONE)
        if isinstance(fault, Delay) or self._held.get((dst, tag)):
            self._happened["fault_delays"] += isinstance(fault, Delay)
            delay_ns = fault.delay_ns if isinstance(fault, Delay) else 0
            self._held[dst, tag].append(_Held(ticket, view, window, self._clock.now_ns() + delay_ns))
            return ticket
        return self.inner.send(dst, tag, view, window)

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Receive from the inner endpoint."""
        return self.inner.recv(src, tag, nbytes, into)

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Poll the inner endpoint, waking up for delayed sends that are due."""
        while True:
            next_ns = self._forward()
            ended, self._ended = self._ended, []
            wake_ns = deadline_ns if next_ns is None else min(deadline_ns, next_ns)
            ended += [self._translate(ticket) for ticket in self.inner.poll(0 if ended else wake_ns)]
            if ended or self._clock.now_ns() >= deadline_ns:
                return ended

    def cancel(self, ticket: Ticket) -> bool:
        """Cancel a delayed send, or what the inner endpoint holds."""
        for (dst, tag), queue in self._held.items():
            for held in list(queue):
                if held.ticket is ticket and (dst, tag) == (ticket.peer, ticket.tag):
                    queue.remove(held)
                    ticket.status = TicketStatus.CANCELLED
                    return True
        for inner, outer in list(self._outer.items()):
            if outer is ticket:
                cancelled = self.inner.cancel(inner)
                ticket.status = inner.status
                return cancelled
        return self.inner.cancel(ticket)

    def discard(self, tag: int, bits: int) -> None:
        """Discard in the inner endpoint; delayed sends leave all the same."""
        self.inner.discard(tag, bits)

    def abort(self) -> None:
        """Drop what is delayed and abort the inner endpoint."""
        self.inner.abort()
        self._drop_held()

    def close(self, deadline_ns: int) -> None:
        """Send what is delayed and close the inner endpoint."""
        try:
            while (next_ns := self._forward()) is not None and self._clock.now_ns() < deadline_ns:
                self._ended += [self._translate(ticket) for ticket in self.inner.poll(min(next_ns, deadline_ns))]
        except Closed:
            pass
        self.inner.close(deadline_ns)
        self._drop_held()

    def counters(self) -> Mapping[str, int]:
        """Return the inner counters, and how often each fault happened."""
        return {**self.inner.counters(), **self._happened}

    def _check(self, dst: int, tag: int, nbytes: int) -> None:
        """Refuse what the inner endpoint would refuse, also where the fault keeps it from being asked."""
        if self._closed:
            raise Closed(f"the endpoint of rank {self._rank} is closed")
        if dst not in self._peers or not 0 <= tag <= LARGEST_TAG or nbytes > self._largest_bytes:
            raise UsageError(f"dst={dst}, tag={tag} or size {nbytes} is out of range")

    def _drop_held(self) -> None:
        self._closed = True
        waiting = [held.ticket for queue in self._held.values() for held in queue]
        for ticket in [*waiting, *self._outer.values()]:
            ticket.status = TicketStatus.CANCELLED
        self._held.clear()
        self._outer.clear()

    def _end(self, ticket: Ticket, status: TicketStatus) -> Ticket:
        ticket.status = status
        self._ended.append(ticket)
        return ticket

    def _forward(self) -> int | None:
        """Send what is due; return when the next one is."""
        now_ns = self._clock.now_ns()
        for key, queue in list(self._held.items()):
            while queue and queue[0].due_ns <= now_ns:
                held = queue.popleft()
                try:
                    self._outer[self.inner.send(*key, held.view, held.window)] = held.ticket
                except Closed:
                    raise
                except DetcollError as error:
                    held.ticket.error = error
                    self._end(held.ticket, TicketStatus.FAILED)
            if not queue:
                del self._held[key]
        return min((queue[0].due_ns for queue in self._held.values()), default=None)

    def _translate(self, ticket: Ticket) -> Ticket:
        """Return the caller's ticket for one that the inner endpoint ended."""
        outer = self._outer.pop(ticket, None)
        if outer is None:
            return ticket
        outer.status, outer.error = ticket.status, ticket.error
        outer.started_ns, outer.left_ns, outer.ended_ns = ticket.started_ns, ticket.left_ns, ticket.ended_ns
        return outer
