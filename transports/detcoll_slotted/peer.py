"""Everything that a rank knows about one other rank."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from detcoll.errors import TransportError
from detcoll.transport import Ticket, Window
from detcoll_slotted.flow import Inbound, Outbound
from detcoll_slotted.gate import LARGEST_FRAME_BYTES
from detcoll_slotted.line import Line
from detcoll_slotted.pacing import PaceGroup
from detcoll_slotted.wire import LANES, Lane


@dataclass(eq=False, slots=True)
class Peer:
    """One other rank: its connections, the rules of both directions, and sends that wait."""

    rank: int
    lines: tuple[Line, Line]
    """By lane; where both lanes share a connection, it is twice the same."""
    outbound: Outbound
    inbound: Inbound
    blocked: deque[tuple[Ticket, memoryview, Window | None]] = field(default_factory=deque)
    """Bulk sends that wait for credit."""
    group: PaceGroup | None = None
    """With whom it shares a rate; None for nobody."""
    heard_ns: int = 0
    """When something came from it."""
    acknowledged_ns: int = 0
    """When a message to it was acknowledged."""
    lost: TransportError | None = None

    @property
    def next_bytes(self) -> int:
        """How much of the next bulk send goes into one frame."""
        return min(self.blocked[0][1].nbytes, LARGEST_FRAME_BYTES)

    @property
    def own_lines(self) -> tuple[Line, ...]:
        """Its connections, each once."""
        return self.lines if self.lines[0] is not self.lines[1] else self.lines[:1]

    @property
    def own_lanes(self) -> tuple[Lane, ...]:
        """One lane for each of its connections."""
        return LANES if self.lines[0] is not self.lines[1] else (Lane.EXPRESS,)

    @property
    def is_heard(self) -> bool:
        """Whether its hello has come, and something over each of its connections."""
        return self.outbound.is_open and self.inbound.heard.issuperset(self.own_lanes)

    @property
    def is_joined(self) -> bool:
        """Whether each connection, in both directions, carries messages."""
        return self.is_heard and all(line.was_connected for line in self.lines)
