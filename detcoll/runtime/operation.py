"""One collective on its way, as the engine's rules see it. Its arrays are in `detcoll.runtime.memory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detcoll.descriptor import Descriptor
from detcoll.machine import Machine
from detcoll.plan.ir import Columns, Plan
from detcoll.runtime.group import Group

if TYPE_CHECKING:
    from detcoll.runtime.blame import Inquiry

Span = tuple[int, int]
"""First address and the one behind the last."""


def overlap(one: Sequence[Span], other: Sequence[Span]) -> bool:
    """Tell whether two pieces of memory have a byte in common."""
    return any(low < end and begin < high for low, high in one for begin, end in other)


@dataclass(eq=False, slots=True)
class Operation:
    """A call of a group. It has many fields since it is all that is known of a call; the rules are the engine's.

    ``plan`` : this rank's part; its ranks are those of the group.  ``timeout_ns`` : how long nothing may come.
    ``spans`` : the caller's memory.  ``memory`` : the driver's own, never looked at by the engine.
    ``order`` : its place among all calls of this rank.  ``live_ns`` : when it, or one that it waits for, was last known
    to get further.  ``limit_ns`` : when it is looked into.  ``over`` : ended with an error; what comes is dropped.
    """

    group: Group
    descriptor: Descriptor
    plan: Plan
    timeout_ns: int
    called_ns: int
    spans: Sequence[Span] = ()
    memory: Any = None
    order: int = -1
    machine: Machine = field(init=False)
    columns: Columns = field(init=False)
    sequence: int = field(init=False)
    """Its number among the calls of its group."""
    live_ns: int = 0
    limit_ns: int = 0
    strangers: set[int] = field(default_factory=set)
    """Ranks that have not said yet what they called; what comes from them is held."""
    held: list[int] = field(default_factory=list)
    """RECV steps that ended although their sender has not said what it called."""
    settled: set[int] = field(default_factory=set)
    """RECV steps that have not ended although no message will come for them: it failed, or none was asked for."""
    wrong: dict[int, Exception] = field(default_factory=dict)
    """What strangers sent that does not fit this call."""
    lent: dict[int, int] = field(default_factory=dict)
    """Bytes that RECV steps lent and nothing has used yet; negative where they were copied."""
    unsent: dict[int, list[int]] = field(default_factory=dict)
    """SEND steps that wait until a stranger has called, by rank."""
    unasked_bytes: dict[int, int] = field(default_factory=dict)
    """What was sent to each stranger."""
    inquiry: Inquiry | None = None
    """What this rank has heard since the call is late."""
    reported: bool = False
    over: bool = False

    def __post_init__(self) -> None:
        """Make the machine for the plan, and keep what is asked for at every step."""
        self.machine = Machine(self.plan)
        self.columns = self.plan.columns
        self.sequence = self.descriptor.sequence

    @property
    def title(self) -> str:
        """What messages call it."""
        named = f" ({self.descriptor.name})" if self.descriptor.name else ""
        title = self.group.title
        return f"{self.descriptor.kind} number {self.sequence}{named}" + (f" of group {title}" if title else "")

    def peer(self, step: int) -> int:
        """Return the rank of the job that a SEND or RECV is about."""
        return self.group.ranks[self.columns.peer[step]]

    def overlaps(self, other: Operation) -> bool:
        """Tell whether two calls work on common memory."""
        return overlap(self.spans, other.spans)
