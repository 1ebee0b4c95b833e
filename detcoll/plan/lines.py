"""When bytes have left: the lines of a calendar in closed form, for predictions.

A stage of a collective is a set of flows, each from one owner to another. `Lines.end_ns` answers when a flow that
begins at a given time has put its bytes on the line:

- share     at the flow's own rate: begin + bytes / rate.
- calendar  T of time on the line, in windows that add up to W a cycle: what is left of the first cycle's windows is
            used first, then pass as many whole cycles as T has Ws, and the rest ends that far into its window. A
            message is cut where a window ends, as `detcoll.machine.Slots` does. Each window is shorter by what its
            owner takes to wake up. What a rank sends in the same windows leaves one after another, and T is that of
            all of it. Where windows lead to one site each, that is all that a rank sends to one site; else all of it.
- off, express   all of a site's flows together at the line's rate, at both ends.
"""

from __future__ import annotations

import math
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
    late_ns : int
        How long after a window has opened its owner begins to send.
    """

    def __init__(
        self, topology: Topology, calendar: Calendar, *, express: bool, phase_ns: int = 0, late_ns: int = 0
    ) -> None:
        self.calendar = calendar
        self.late_ns = late_ns
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
        self._windows: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
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
        if self.calendar.mode is Slotting.CALENDAR:
            nbytes = self._sent_together(flows)
            for site in np.unique(self.site_of[flows.src]):
                if self.calendar.sites[site].windows:
                    self._end_by_destination(int(site), flows, nbytes, begin_ns, ends)
            return ends
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

    def _sent_together(self, flows: Flows) -> Floats:
        """Return, for each flow, the bytes of all flows from its rank to its destination site."""
        lanes = flows.src * len(self._up) + self.site_of[flows.dst]
        nbytes: Floats = np.bincount(lanes, flows.nbytes)[lanes]
        return nbytes

    def _end_by_destination(self, site: int, flows: Flows, nbytes: Floats, begin_ns: Floats, ends: Floats) -> None:
        """Put in ``ends`` when flows of ``site`` end, those to one destination one after another in its windows."""
        cycle = self.calendar.sites[site]
        mine = np.flatnonzero(self.site_of[flows.src] == site)
        # Ranks share the windows of their site, so most flows to one destination end alike: each kind is solved once.
        owners = flows.src[mine] if any(window.rank >= 0 for window in cycle.windows) else np.full(len(mine), -1)
        keys = np.stack([owners, self.site_of[flows.dst[mine]], begin_ns[mine], nbytes[mine]], axis=1)
        kinds, where = np.unique(keys, axis=0, return_inverse=True)
        solved = np.empty(len(kinds))
        for kind, (owner, destination, starts_ns, sent) in enumerate(kinds.tolist()):
            takes_ns = sent / float(self._rates[site, int(destination)]) * 1e9
            windows = self._windows_to(site, int(owner), int(destination))
            solved[kind] = last_end_ns(windows, cycle.cycle_ns, starts_ns + self.phase_ns, takes_ns) - self.phase_ns
        ends[mine] = solved[where.ravel()]

    def _windows_to(self, site: int, owner: int, destination: int) -> list[tuple[int, int]]:
        """Return when the line leads to ``destination``, lateness deducted, with no window over the cycle's end."""
        key = (site, owner, destination)
        if key in self._windows:
            return self._windows[key]
        cycle_ns = self.calendar.sites[site].cycle_ns
        parts: list[tuple[int, int]] = []
        for window in self.calendar.windows_to(site, owner, destination):
            start, end = min(window.start_ns + self.late_ns, window.end_ns - 1), window.end_ns
            if end <= cycle_ns:
                parts.append((start, end))
            else:
                parts += [(start - cycle_ns, end - cycle_ns)] if start >= cycle_ns else [
                    (start, cycle_ns), (0, end - cycle_ns)
                ]  # fmt: skip
        return self._windows.setdefault(key, sorted(parts))

    def _end_in_windows(self, site: int, rank: int, flows: Flows, mine: NDArray[np.bool_], begin_ns: float) -> float:
        rate = self.calendar.rate_bytes_per_s(site, 1 - site)
        windows = [
            (min(window.start_ns + self.late_ns, window.end_ns - 1), window.end_ns)
            for window in self.calendar.windows_of(site, rank)
        ]
        cycle_ns = self.calendar.sites[site].cycle_ns
        takes_ns = float(flows.nbytes[mine].sum()) / rate * 1e9
        return last_end_ns(windows, cycle_ns, begin_ns + self.phase_ns, takes_ns) - self.phase_ns


def last_end_ns(windows: list[tuple[int, int]], cycle_ns: int, begin_ns: float, takes_ns: float) -> float:
    """Return when ``takes_ns`` of time on the line are over that begin at ``begin_ns``, in ``windows`` of a cycle."""
    if takes_ns <= 0:
        return begin_ns
    turn_ns, left_ns = begin_ns - begin_ns % cycle_ns, takes_ns
    for start, end in windows:
        from_ns = max(turn_ns + start, begin_ns)
        room_ns = max(turn_ns + end - from_ns, 0.0)
        if left_ns <= room_ns:
            return from_ns + left_ns
        left_ns -= room_ns
    cycles = math.ceil(left_ns / sum(end - start for start, end in windows)) - 1
    turn_ns += (1 + cycles) * cycle_ns
    left_ns -= cycles * sum(end - start for start, end in windows)
    for start, end in windows:
        if left_ns <= end - start:
            return turn_ns + start + left_ns
        left_ns -= end - start
    return turn_ns + windows[-1][1]  # what rounding left over
