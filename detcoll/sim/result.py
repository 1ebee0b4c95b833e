"""What a simulation tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened. Times count from the moment that the first rank could have called.

    ``finish_ns`` : by rank, when its result was there.  ``drained_ns`` : when all its steps had ended.
    ``uplink_busy_ns`` : by site, when its uplink carried something.  ``uplink_wire_bytes`` : how much.
    ``peak_queue_bytes`` : by site, the most that waited at its uplink.  ``downlink_peak_bytes`` : at its downlink.
    ``window_share`` : part of the payload sent in windows that left while its sender owned the line; None if nothing
    was.  ``misses``, ``trimmed`` : by rank, as `Slots` counts them.  ``arrays`` : by rank, if data was given.
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
        """When the last rank had its result."""
        return max(self.finish_ns)
