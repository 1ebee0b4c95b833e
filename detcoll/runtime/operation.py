"""The state of one pending collective in the engine. Its arrays are in `detcoll.runtime.memory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from detcoll.descriptor import Descriptor
from detcoll.machine import Machine
from detcoll.plan.ir import Buffer, Columns, Kind, Plan
from detcoll.runtime.group import Group

if TYPE_CHECKING:
    from detcoll.runtime.blame import Inquiry
    from detcoll.runtime.transfer import Transfer

Span = tuple[int, int]
"""A range of addresses: the first, and the one after the last."""


def overlap(one: Sequence[Span], other: Sequence[Span]) -> bool:
    """Return whether two lists of address ranges have a byte in common."""
    return any(low < end and begin < high for low, high in one for begin, end in other)


class UsesMemory(Protocol):
    """A call, as far as its memory goes."""

    spans: Sequence[Span]

    @property
    def written(self) -> Sequence[Span]:
        """The part of ``spans`` that the call may write to."""


def conflict(one: UsesMemory, other: UsesMemory) -> bool:
    """Return whether two calls use the same memory, and at least one of them writes there."""
    return overlap(one.written, other.spans) or overlap(one.spans, other.written)


@dataclass(eq=False, slots=True)
class Operation:
    """A call of a group. It has many fields because it holds the whole state of a call; the rules are in the engine.

    ``plan`` : this rank's part; its ranks are those of the group.  ``timeout_ns`` : longest time without progress.
    ``spans`` : the caller's memory.  ``writes`` : the part of it that the call may write to; None: all.
    ``memory`` : belongs to the driver; the engine does not use it.  ``order`` : position among all calls of this rank.
    ``live_ns`` : when this call, or a call that it waits for, last made progress.  ``limit_ns`` : when the call counts
    as late.  ``over`` : it failed, and what arrives is dropped.
    """

    group: Group
    descriptor: Descriptor
    plan: Plan
    timeout_ns: int
    called_ns: int
    spans: Sequence[Span] = ()
    memory: Any = None
    writes: Sequence[Span] | None = None
    order: int = -1
    machine: Machine = field(init=False)
    columns: Columns = field(init=False)
    sequence: int = field(init=False)
    """Number of the call in its group."""
    prefix: int = field(init=False)
    """Common prefix of the call's tags. The lowest bits of a tag are those of the plan."""
    live_ns: int = 0
    limit_ns: int = 0
    greets_ns: int = 0
    tells_ns: int = 0
    """When ranks that have not confirmed this call are told of it next, where calls may be native."""
    strangers: set[int] = field(default_factory=set)
    """Ranks that have not confirmed this call yet; messages from them are held back."""
    held: list[int] = field(default_factory=list)
    """RECV steps whose message has arrived although its sender has not confirmed the call."""
    onsite: list[int] = field(default_factory=list)
    """Steps of the site's devices that wait until all ranks of the site have confirmed the call."""
    settled: set[int] = field(default_factory=set)
    """RECV steps that have not ended but will get no message: the receive failed, or was never posted."""
    wrong: dict[int, Exception] = field(default_factory=dict)
    """By rank, the error of a message from a stranger that does not match this call."""
    lent: dict[int, int] = field(default_factory=dict)
    """By RECV step, lent bytes that are not folded yet; negative if they were copied."""
    unsent: dict[int, list[int]] = field(default_factory=dict)
    """By rank, SEND steps that wait until a stranger confirms the call."""
    unasked_bytes: dict[int, int] = field(default_factory=dict)
    """By rank, bytes sent to strangers."""
    inquiry: Inquiry | None = None
    """The inquiry about this call, if it is late."""
    hurry_ns: int = 0
    """The shortest timeout of a rank that asked about this call since it made progress, or 0."""
    is_hurried: bool = False
    """Whether ``timeout_ns`` is that of a rank that asked about this call; its own was longer."""
    reported: bool = False
    over: bool = False

    def __post_init__(self) -> None:
        """Create the machine of the plan, and cache attributes that are used at every step."""
        self.machine = Machine(self.plan)
        self.columns = self.plan.columns
        self.sequence = self.descriptor.sequence
        self.prefix = self.group.call_prefix(self.sequence)

    @property
    def title(self) -> str:
        """The call's name in messages."""
        named = f" ({self.descriptor.name})" if self.descriptor.name else ""
        title = self.group.title
        return f"{self.descriptor.kind} number {self.sequence}{named}" + (f" of group {title}" if title else "")

    @property
    def partners(self) -> set[int]:
        """The ranks of the job that compare this call with this rank's: those that it exchanges messages with.

        Where each rank states its own sizes, these are all members, since one may wait for what another does not send.
        """
        ranks = self.group.ranks
        if self.plan.collective.out_counts:
            return set(ranks) - {ranks[self.plan.rank]}
        return {ranks[peer] for peer in self.plan.peers}

    @property
    def mates(self) -> set[int]:
        """The ranks of the job whose devices reduce with this one's."""
        return {self.group.ranks[mate] for mate in self.plan.mates}

    def described_to(self, peer: int) -> Descriptor:
        """Return the descriptor as it is told to ``peer``, a rank of the job."""
        collective = self.plan.collective
        if not collective.out_counts:
            return self.descriptor
        place = self.group.ranks.index(peer)
        return msgspec.structs.replace(self.descriptor, pair=(collective.counts[place], collective.out_counts[place]))

    def peer(self, step: int) -> int:
        """Return the peer of a SEND or RECV step, as a rank of the job."""
        return self.group.ranks[self.columns.peer[step]]

    @property
    def open_receives(self) -> set[int]:
        """RECV steps that may still write into the caller's array."""
        kinds, buffers = self.columns.kind, self.columns.buffer
        receives = {step for step in self.machine.under_way if kinds[step] == Kind.RECV and buffers[step] == Buffer.OUT}
        return receives - self.settled.union(self.held)

    @property
    def written(self) -> Sequence[Span]:
        """The part of the caller's memory that the call may write to."""
        return self.spans if self.writes is None else self.writes

    def holds(self, later: Operation | Transfer) -> bool:
        """Tell whether a later call must wait for this one."""
        return conflict(self, later)
