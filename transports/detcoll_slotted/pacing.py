"""Connections that share one rate, by arithmetic and by what the kernel says of them; no clock is read.

The kernel paces each connection by itself. So that several do not add up to more than their common rate, one at a time
is busy: what goes over another is handed over when all that was handed over before has left, or a moment earlier, so
that the line does not idle in between.

On lines faster than hosts the kernel's pacing, a timer for every 64 KB, costs more than a host has to spare. There the
same arithmetic paces by itself (``host_paced``): a message is handed over when what went before is about to have left
at the common rate. What leaves early fits a policer's bucket as long as a message takes no more than a millisecond.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from detcoll_slotted.line import Line

if TYPE_CHECKING:
    from detcoll_slotted.peer import Peer

AHEAD_NS = 2_000_000
"""How much of a window may lie in ZeroMQ's and TCP's queues: enough to sleep through, too little to spill far."""
SWITCH_AHEAD_NS = 500_000
"""How much earlier than the connection before has drained another is given something: what it takes to wake up and to
get to the line. Both may be busy for so long, which policers bear: their buckets hold 4 ms."""
ALONE_AHEAD_NS = 20_000_000
"""The same where no other connection of the group waits: the kernel paces it, so it may sleep longer. Another one that
comes then waits for so long at most."""
_SETTLE_NS = 300_000


@dataclass(eq=False, slots=True)
class Uplink:
    """What was handed over last, and when it will have left."""

    last: Line | None = None
    handed_ns: int = 0
    drained_ns: int = 0

    def drained_at(self, now_ns: int, rate_bytes_per_s: float) -> int:
        """Return when everything handed over so far will have left, at this granted rate.

        The kernel says what it has not sent; what ZeroMQ's thread was given a moment ago it may not know yet.
        """
        if self.last is None:
            return now_ns
        known_ns = self._known_ns(now_ns, rate_bytes_per_s)
        return max(known_ns, self.drained_ns) if now_ns - self.handed_ns < _SETTLE_NS else known_ns

    def hand(self, line: Line, now_ns: int, drained_ns: int) -> None:
        """Take note of what is handed over now."""
        self.last, self.handed_ns, self.drained_ns = line, now_ns, drained_ns

    def _known_ns(self, now_ns: int, rate_bytes_per_s: float) -> int:
        if self.last is None:
            return now_ns
        return now_ns + int(self.last.unsent_bytes() / (rate_bytes_per_s * self.last.share) * 1e9)


@dataclass(eq=False, slots=True)
class PaceGroup(Uplink):
    """Peers whose paced sends share one rate, and whose turn it is among those that wait."""

    host_paced: bool = False
    waiting: deque[Peer] = field(default_factory=deque)
    """Peers with paced sends, the next one first."""
    resume_ns: int = 0

    def free_ns(self, now_ns: int, rate_bytes_per_s: float) -> int:
        """Return when everything handed over so far will have left, both by arithmetic and as far as the kernel knows.

        Of a large message the kernel knows only what fits into its buffer.
        """
        if self.last is None:
            return now_ns
        return max(self._known_ns(now_ns, rate_bytes_per_s), self.drained_ns)

    def ahead_ns(self, line: Line) -> int:
        """Return how long before everything handed over has left this line may be given more."""
        if line is not self.last:
            return SWITCH_AHEAD_NS
        return ALONE_AHEAD_NS if len(self.waiting) == 1 and not self.host_paced else AHEAD_NS

    def join_queue(self, peer: Peer) -> None:
        """Let a peer wait for its turn, unless it does."""
        if peer not in self.waiting:
            self.waiting.append(peer)

    def go_on(self, peer: Peer, *, has_more: bool) -> None:
        """End a peer's turn; with more to send it waits behind the others."""
        self.waiting.remove(peer)
        if has_more:
            self.waiting.append(peer)

    def first_ready(self) -> Peer | None:
        """Return the first that waits and has credit."""
        for peer in self.waiting:
            if peer.outbound.has_credit(peer.next_bytes):
                return peer
        return None


def pace_groups(groups: Mapping[int, int], own_rank: int, *, host_paced: bool) -> dict[int, PaceGroup]:
    """Return the group of each peer that shares its pace with another one, or of all where the host paces."""
    members: dict[int, list[int]] = {}
    for rank, number in groups.items():
        if rank != own_rank:
            members.setdefault(number, []).append(rank)
    needed = [ranks for ranks in members.values() if len(ranks) > 1 or host_paced]
    return {rank: group for ranks in needed for group in [PaceGroup(host_paced=host_paced)] for rank in ranks}
