"""How a message from one rank to another is cut into chunks, and how many bytes of it may be under way."""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.plan.calendar import Calendar
from detcoll.plan.layout import (
    CHUNKS_A_CYCLE,
    CHUNKS_A_WINDOW,
    LARGEST_CHUNK_BYTES,
    LARGEST_FRAME_BYTES,
    SMALLEST_CHUNK_BYTES,
)
from detcoll.topology import Topology

LOCAL_CHUNK_BYTES, LOCAL_AHEAD_BYTES = 524_288, 2_097_152
"""Inside a site: chunks that a receiver copies while the sender copies the next ones, and that shared memory holds."""

LARGEST_CHUNKS_AHEAD = 1_024


@dataclass(frozen=True, slots=True)
class Cut:
    """Chunks of ``chunk_bytes``; at most ``ahead_bytes`` are sent and not acknowledged, and one chunk more."""

    chunk_bytes: int
    ahead_bytes: int


def cut(topology: Topology, calendar: Calendar, rank: int, dst: int) -> Cut:
    """Return the cut of messages from ``rank`` to ``dst``.

    Between sites a chunk is a part of a window, or of what a flow sends in a cycle. Under way is what leaves until an
    acknowledgement is back: a round trip and two cycles later.
    """
    here, there = topology.site_of(rank), topology.site_of(dst)
    if here == there or not topology.is_wide:
        return Cut(LOCAL_CHUNK_BYTES, LOCAL_AHEAD_BYTES)
    round_trip_ns = topology.one_way_ns(here, there) + topology.one_way_ns(there, here)
    rate = calendar.rate_bytes_per_s(here, there)
    cycle_ns = 0
    if not rate:
        rate, chunk_bytes = topology.sites[here].uplink_bytes_per_s or 0.0, LOCAL_CHUNK_BYTES
    else:
        cycle_ns = calendar.sites[here].cycle_ns
        windows = [window.end_ns - window.start_ns for window in calendar.windows_to(here, rank, there)]
        turn_ns = min(windows) / CHUNKS_A_WINDOW if windows else cycle_ns / CHUNKS_A_CYCLE
        chunk_bytes = int(turn_ns * rate / 1e9) - LARGEST_FRAME_BYTES
    ahead_bytes = int(rate * (round_trip_ns + 2 * cycle_ns) / 1e9)
    smallest_bytes = max(SMALLEST_CHUNK_BYTES, ahead_bytes // LARGEST_CHUNKS_AHEAD)
    chunk_bytes = max(min(chunk_bytes, LARGEST_CHUNK_BYTES), smallest_bytes)
    return Cut(chunk_bytes, ahead_bytes + 2 * chunk_bytes)
