"""Express headroom: what a calendar leaves of the line, and how a rank keeps to its part of it.

Windows and pacing use `LAID_OUT` of a site's line. The rest is shared evenly by the ranks of the site. Half of a rank's
part carries messages of small collectives, which leave at once: a token bucket, refilled at that rate, says whether
there is room, and what finds none waits for a window like any other message. The other half is for what cannot be held
back: descriptors of collectives, acknowledgements, and what TCP sends by itself. Descriptors are taken from the bucket
too, as a debt.
"""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.plan.calendar import LAID_OUT
from detcoll.plan.layout import EXPRESS_BYTES, LARGEST_FRAME_BYTES
from detcoll.topology import Topology

EXPRESS_SHARE = 0.5
"""Of the headroom, for messages that could wait."""

BURST_NS = 1_000_000
"""How much time of the whole line a site's ranks may take at once, all together."""

LEAST_BURST_BYTES = 4 * EXPRESS_BYTES
"""Never less a rank, so that a small all-reduce leaves at once on a slow line too."""


def headroom_bytes_per_s(topology: Topology, rank: int) -> float:
    """Return the payload bytes per second of its site's line that no window and no pace uses, a rank's part of them."""
    site = topology.sites[topology.site_of(rank)]
    return (site.uplink_bytes_per_s or 0.0) * topology.payload_share * (1 - LAID_OUT) / len(site.ranks)


def burst_bytes(topology: Topology, rank: int) -> int:
    """Return how many bytes of small messages a rank may send at once."""
    site = topology.sites[topology.site_of(rank)]
    return max(round((site.uplink_bytes_per_s or 0.0) * BURST_NS / 1e9 / len(site.ranks)), LEAST_BURST_BYTES)


@dataclass(slots=True)
class Express:
    """A rank's budget for messages that leave at once; times are nanoseconds of its monotonic clock."""

    rate_bytes_per_s: float
    burst_bytes: int
    _left_bytes: float = 0.0
    _at_ns: int = 0

    @classmethod
    def of(cls, topology: Topology, rank: int) -> Express:
        """Return the budget of ``rank``, full."""
        burst = burst_bytes(topology, rank)
        return cls(headroom_bytes_per_s(topology, rank) * EXPRESS_SHARE, burst, burst)

    def take(self, nbytes: int, now_ns: int) -> bool:
        """Take a message of ``nbytes`` from the budget, or return False where it has no room."""
        self._refill(now_ns)
        if nbytes + LARGEST_FRAME_BYTES > self._left_bytes:
            return False
        self._left_bytes -= nbytes + LARGEST_FRAME_BYTES
        return True

    def spend(self, nbytes: int, now_ns: int) -> None:
        """Take a message that cannot wait, on credit where there is no room; the debt is one burst at most."""
        self._refill(now_ns)
        self._left_bytes = max(self._left_bytes - nbytes - LARGEST_FRAME_BYTES, -float(self.burst_bytes))

    def _refill(self, now_ns: int) -> None:
        gained = max(now_ns - self._at_ns, 0) * self.rate_bytes_per_s / 1e9
        self._left_bytes = min(self._left_bytes + gained, self.burst_bytes)
        self._at_ns = max(now_ns, self._at_ns)
