"""When bytes have left: the lines of a calendar in closed form, for predictions.

A stage of a collective is a set of flows, each from one owner to another. `Lines.end_ns` answers when a flow that
begins at a given time has put its bytes on the line:

- share     at the flow's own rate: begin + bytes / rate.
- calendar  n equal messages that take q each, in windows of length w: k = floor(w / q) go into a full window, what is
            left of the first window takes floor(rest / q). After the first, floor((n - 1) / K) whole cycles of K = sum
            of k pass, and the remaining messages end at q times their place in their window. This is the count that
            `detcoll.machine.Slots` makes.
- off, express   all of a site's flows together at the line's rate, at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detcoll.plan.calendar import Calendar, Slotting
from detcoll.topology import Topology

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Flows:
    """Flows from rank ``src[f]`` to rank ``dst[f]``: payload and frame bytes, and the number of messages."""

    src: Indices
    dst: Indices
    nbytes: Floats
    messages: Floats

    def only_one(self) -> Flows:
        """Return the same flows with one message each."""
        return Flows(self.src, self.dst, self.nbytes / np.maximum(self.messages, 1), np.minimum(self.messages, 1))

    def with_more(self, other: Flows) -> Flows:
        """Return these flows with what ``other`` sends between the same ranks added."""
        size = int(max(self.src.max(initial=0), self.dst.max(initial=0))) + 1
        theirs = {int(s) * size + int(d): f for f, (s, d) in enumerate(zip(other.src, other.dst, strict=True))}
        found = np.array([theirs.get(int(s) * size + int(d), -1) for s, d in zip(self.src, self.dst, strict=True)])
        there = found >= 0
        nbytes, messages = self.nbytes.copy(), self.messages.copy()
        nbytes[there] += other.nbytes[found[there]]
        messages[there] += other.messages[found[there]]
        return Flows(self.src, self.dst, nbytes, messages)


class Lines:
    """The lines of one topology under one calendar, as a collective finds them.

    Parameters
    ----------
    topology : Topology
        With lines between its sites.
    calendar : Calendar
        What holds for messages that are not express.
    express : bool
        Whether messages leave at once, at the line's rate.
    phase_ns : int
        Where in the cycle time zero falls.
    """

    def __init__(self, topology: Topology, calendar: Calendar, *, express: bool, phase_ns: int = 0) -> None:
        self.calendar = calendar
        self.phase_ns = phase_ns
        self.at_once = express or calendar.mode is Slotting.OFF
        self.site_of = np.zeros(topology.size, dtype=np.int64)
        for index, site in enumerate(topology.sites):
            self.site_of[list(site.ranks)] = index
        count = len(topology.sites)
        self.delay_ns = np.zeros((count, count))
        for (low, high), link in topology.links:
            half = link.asymmetry_ns // 2
            self.delay_ns[low, high], self.delay_ns[high, low] = link.one_way_ns + half, link.one_way_ns - half
        self._rates = np.array(calendar.rates, dtype=np.float64).reshape(count, count)
        up = [site.uplink_bytes_per_s or np.inf for site in topology.sites]
        down = [site.downlink_bytes_per_s or rate for site, rate in zip(topology.sites, up, strict=True)]
        self._up = np.array(up) * topology.payload_share
        self._down = np.array(down) * topology.payload_share

    def delays_ns(self, flows: Flows) -> Floats:
        """Return each flow's one-way delay."""
        delays: Floats = self.delay_ns[self.site_of[flows.src], self.site_of[flows.dst]]
        return delays

    def end_ns(self, flows: Flows, begin_ns: Floats) -> Floats:
        """Return when the last byte of each flow has left, if its first may leave at ``begin_ns``."""
        if self.at_once:
            return self._end_at_once(flows, begin_ns)
        rates = self._rates[self.site_of[flows.src], self.site_of[flows.dst]]
        ends: Floats = begin_ns + flows.nbytes / rates * 1e9
        for rank in np.unique(flows.src):
            site = int(self.site_of[rank])
            if self.calendar.sites[site].windows:
                mine = flows.src == rank
                ends[mine] = self._end_in_windows(site, int(rank), flows, mine, float(begin_ns[mine].min()))
        return ends

    def _end_at_once(self, flows: Flows, begin_ns: Floats) -> Floats:
        sources, destinations = self.site_of[flows.src], self.site_of[flows.dst]
        out = np.bincount(sources, flows.nbytes, len(self._up)) / self._up
        into = np.bincount(destinations, flows.nbytes, len(self._down)) / self._down
        ends: Floats = begin_ns + np.maximum(out[sources], into[destinations]) * 1e9
        return ends

    def _end_in_windows(self, site: int, rank: int, flows: Flows, mine: NDArray[np.bool_], begin_ns: float) -> float:
        messages = round(float(flows.messages[mine].sum()))
        if not messages:
            return begin_ns
        mean_bytes = float(flows.nbytes[mine].sum()) / messages
        largest_bytes = float((flows.nbytes[mine] / np.maximum(flows.messages[mine], 1)).max())
        rate = self.calendar.rate_bytes_per_s(site, 1 - site)
        windows = [(window.start_ns, window.end_ns) for window in self.calendar.windows_of(site, rank)]
        cycle_ns = self.calendar.sites[site].cycle_ns
        takes_ns = int(max(mean_bytes, largest_bytes) / rate * 1e9)
        end_ns = last_end_ns(windows, cycle_ns, begin_ns + self.phase_ns, messages, takes_ns)
        return end_ns - self.phase_ns


def last_end_ns(windows: list[tuple[int, int]], cycle_ns: int, begin_ns: float, messages: int, takes_ns: int) -> float:
    """Return when the last of ``messages`` that take ``takes_ns`` each ends, in ``windows`` of a repeating cycle."""
    room = [(end - start) // max(takes_ns, 1) for start, end in windows]
    if not sum(room):
        return float("inf")
    turn_ns = begin_ns - begin_ns % cycle_ns
    left, end_ns = messages, begin_ns
    for start, end in windows:
        from_ns = max(turn_ns + start, begin_ns)
        fits = min(max(int((turn_ns + end - from_ns) // max(takes_ns, 1)), 0), left)
        if fits:
            left, end_ns = left - fits, from_ns + fits * takes_ns
    if not left:
        return end_ns
    cycles, left = divmod(left - 1, sum(room))
    left += 1
    turn_ns += (1 + cycles) * cycle_ns
    for (start, _), most in zip(windows, room, strict=True):
        if left <= most:
            return turn_ns + start + left * takes_ns
        left -= most
    raise AssertionError("unreachable")
