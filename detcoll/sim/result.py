"""The result of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Simulation:
    """Result of a simulation. Times count from time zero of the run.

    ``finish_ns`` : by rank, when it had its result.  ``drained_ns`` : by rank, when all its steps had ended.
    ``uplink_busy_ns`` : by site, the intervals in which its uplink was busy.  ``uplink_wire_bytes`` : by site, what its
    uplink sent.  ``peak_queue_bytes``, ``downlink_peak_bytes`` : by site, the longest queue at its uplink and downlink.
    ``window_share`` : the share of the payload with a window that was sent while its sender owned the line; None
    without such payload.  ``misses``, ``trimmed`` : by rank, as `Slots` counts them.  ``arrays`` : by rank, the results
    if data was given.
    """

    finish_ns: tuple[int, ...]
    drained_ns: tuple[int, ...]
    uplink_busy_ns: tuple[tuple[tuple[int, int], ...], ...]
    uplink_wire_bytes: tuple[float, ...]
    peak_queue_bytes: tuple[float, ...]
    downlink_peak_bytes: tuple[float, ...]
    window_share: float | None
    misses: tuple[int, ...]
    trimmed: tuple[int, ...]
    arrays: tuple[NDArray[Any], ...] | None

    @property
    def slowest_ns(self) -> int:
        """When the slowest rank had its result."""
        return max(self.finish_ns)
