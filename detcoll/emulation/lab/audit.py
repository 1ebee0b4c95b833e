"""Holds what the router saw against the calendars that the ranks say they kept.

A transport is slotted if payload reaches its site's uplink inside windows of the rank that sent it, which lead to
where it goes, and within the rate reserved for it there, and the windows that are open at a site never add up to more
than its line. Windows in which a rank owns the whole line must not overlap; ranks that share a slot have windows of a
part of the line each, which may. All that a rank sends to one site shares what is reserved for it there, over however
many connections it goes. Whether it keeps to that is judged as a policer does, by a token bucket that holds what the
rank may send in its longest window, or where its window never closes in a few milliseconds; arrays that fit into it
prove nothing. The router's arrival log is the witness: it runs in another process, on the machine's
monotonic clock, and knows nothing of calendars. What ranks give is a trace file each: their windows, the difference
between their site's time and the monotonic clock, and which connections are theirs, so that a record can be put down
to its sender.

Small messages, descriptors and acknowledgements go express: they follow no window, and belong to the headroom that
calendars leave. What exceeds it, by a token bucket for each rank, counts as payload outside windows.

A unit counts as a whole at the moment it reaches the uplink. Only payload of TCP counts: acknowledgements without
payload follow no window, nor could they.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from detcoll.emulation.lab.unit import TCP
from detcoll.errors import UsageError
from detcoll.topology import Topology

SLOTTED_SHARE = 0.99
"""The share of bulk payload that must lie in its owner's windows."""

_BULK, _EXPRESS, _NOBODY = 0, 1, 2
_WHOLE = 0.9
"""A rank that may use less of its line shares it: calendars are laid out for 0.99."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What the log shows.

    ``bulk_bytes`` and ``express_bytes`` are TCP payload that reached an uplink on a rank's bulk and express
    connections, ``other_bytes`` on connections that no rank claims, all of them since the last rank was ready;
    ``warm_up_bytes`` came before and counts nowhere else. Those ending in ``_inside_bytes`` came while a window of the
    sending rank was open, bulk also within its flow's rate; for express the rank's headroom counts as a window.
    ``overlap_ns`` is, for each site, for how much of a cycle open windows add up to more than the line, and
    ``clock_spread_ns`` how far its ranks' ideas of the site's time lie apart. ``peak_queue_bytes`` is the longest queue
    of each uplink, ``window_capacity_bytes`` what it carries in the longest window of one rank (0 without windows);
    both count wire bytes. ``ranks_share``: windows are of a part of the line each. ``asleep_bytes``: what an uplink
    carries in the longest time that the router slept while a unit was due; what comes meanwhile seems to come at once.
    """

    bulk_bytes: int
    bulk_inside_bytes: int
    express_bytes: int
    express_inside_bytes: int
    other_bytes: int
    warm_up_bytes: int
    overlap_ns: tuple[int, ...]
    clock_spread_ns: tuple[int, ...]
    peak_queue_bytes: tuple[int, ...]
    window_capacity_bytes: tuple[int, ...]
    ranks_share: bool
    asleep_bytes: tuple[int, ...]
    mode: str

    @property
    def kept_share(self) -> float:
        """The share of payload that kept to its reservation: bulk to windows and rates, and what exceeds the headroom.

        1 if all there was went express within the headroom; 0 if there was nothing.
        """
        held_bytes = self.bulk_bytes + self.express_bytes - self.express_inside_bytes
        return self.bulk_inside_bytes / held_bytes if held_bytes else float(self.express_bytes > 0)

    @property
    def payload_inside_share(self) -> float:
        """The share of all TCP payload that came inside its owner's windows or, if express, within its headroom.

        What nobody claims is outside.
        """
        everything = self.bulk_bytes + self.express_bytes + self.other_bytes
        return (self.bulk_inside_bytes + self.express_inside_bytes) / everything if everything else 0.0

    @property
    def windows_disjoint(self) -> bool:
        """Whether open windows of a site never add up to more than its line."""
        return not any(self.overlap_ns)

    @property
    def queues_within_windows(self) -> bool:
        """Whether no uplink ever queued more than it carries in a window, and while the router slept."""
        rooms = zip(self.window_capacity_bytes, self.asleep_bytes, strict=True)
        return all(peak <= sum(room) for peak, room in zip(self.peak_queue_bytes, rooms, strict=True))

    @property
    def is_slotted(self) -> bool:
        """Whether at least 99 % of the payload kept to its windows, and the windows apart."""
        return self.windows_disjoint and self.kept_share >= SLOTTED_SHARE


_Window = Annotated[tuple[int, ...], msgspec.Meta(min_length=2, max_length=3)]
"""Start, end, and the site to which it leads (-1 or none: any)."""


@dataclass(frozen=True, slots=True)
class _Connection:
    dst: int
    lane: Literal["bulk", "express"]
    local: str
    remote: str


@dataclass(frozen=True, slots=True)
class _Calendar:
    cycle_ns: int
    windows: tuple[_Window, ...]
    offset_ns: int
    mode: str
    rates_bytes_per_s: tuple[float, ...]
    burst_bytes: tuple[float, ...]
    line_share: float
    flows: tuple[int, ...] = ()
    express_bytes_per_s: float = 0.0
    express_burst_bytes: float = 0.0

    def is_open(self, times_ns: NDArray[np.int64], destinations: NDArray[Any]) -> NDArray[np.bool_]:
        """Tell for each monotonic time whether it lies in a window that leads to its destination."""
        phase = (times_ns + self.offset_ns) % self.cycle_ns
        inside = np.zeros(len(times_ns), dtype=np.bool_)
        for start, end, *leads in self.windows:
            within = (phase >= start) & (phase < end)
            within |= (phase + self.cycle_ns >= start) & (phase + self.cycle_ns < end)
            inside |= within if leads in ([], [-1]) else within & (destinations == leads[0])
        return inside

    def reserved(self) -> list[tuple[float, float]]:
        """Return for each site what may be sent there: bytes per second, and how many at once."""
        flows = self.flows or (1,) * len(self.rates_bytes_per_s)
        each = zip(flows, self.rates_bytes_per_s, self.burst_bytes, strict=True)
        return [(max(count, 1) * rate, max(count, 1) * burst) for count, rate, burst in each]

    def longest_ns(self) -> int:
        """Return the length of the longest window."""
        return max((end - start for start, end, *_ in self.windows), default=0)


@dataclass(frozen=True, slots=True)
class _Trace:
    schema: Literal["detcoll.trace/1"]
    rank: int
    calendar: _Calendar | None
    connections: tuple[_Connection, ...]
    ready_ns: int = 0


def read_traces(paths: Sequence[str | Path]) -> list[Mapping[str, Any]]:
    """Return the contents of trace files.

    Raises
    ------
    UsageError
        If one cannot be read or is no JSON object.
    """
    traces: list[Mapping[str, Any]] = []
    for path in paths:
        try:
            trace = json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"trace={str(path)!r} cannot be read: {error}") from error
        if not isinstance(trace, dict):
            raise UsageError(f"trace={str(path)!r} is not a JSON object")
        traces.append(trace)
    return traces


def audit(
    records: NDArray[Any], traces: Sequence[Mapping[str, Any]], topology: Topology, router_late_ns: int = 0
) -> Audit:
    """Hold an arrival log against the ranks' calendars.

    Parameters
    ----------
    records : (n,) structured array of `detcoll.emulation.lab.log.RECORD`
        The arrival log.
    traces : sequence of mapping
        The ranks' trace files, as `read_traces` gives them, one per rank.
    topology : Topology
        That of the lab.
    router_late_ns : int
        How late the router handed a unit over at most, by its own statistics.

    Raises
    ------
    UsageError
        If a trace breaks the schema, a rank has none or two, or calendars of a site have different cycles.
    """
    known = _parsed(traces, topology)
    # What flows send while they connect, to open TCP's windows, belongs to no collective and no calendar.
    before = records["time_ns"] < max(trace.ready_ns for trace in known.values())
    warm_up_bytes = int(records["payload_bytes"][before].sum())
    records = records[~before]
    payload = records[(records["protocol"] == TCP) & (records["payload_bytes"] > 0)]
    owners, lanes = _attribute(payload, known)
    inside = _inside(payload, known, owners, lanes)
    sizes = payload["payload_bytes"].astype(np.int64)
    sites = range(len(topology.sites))
    return Audit(
        bulk_bytes=int(sizes[lanes == _BULK].sum()),
        bulk_inside_bytes=int(sizes[(lanes == _BULK) & inside].sum()),
        express_bytes=int(sizes[lanes == _EXPRESS].sum()),
        express_inside_bytes=int(sizes[(lanes == _EXPRESS) & inside].sum()),
        other_bytes=int(sizes[lanes == _NOBODY].sum()),
        warm_up_bytes=warm_up_bytes,
        overlap_ns=tuple(_overlap_ns(_calendars(known, topology, site)) for site in sites),
        clock_spread_ns=tuple(_clock_spread_ns(_calendars(known, topology, site)) for site in sites),
        peak_queue_bytes=tuple(
            int(records["queue_bytes"][records["source_site"] == site].max(initial=0)) for site in sites
        ),
        window_capacity_bytes=tuple(_capacity_bytes(known, topology, site) for site in sites),
        ranks_share=any(trace.calendar is not None and trace.calendar.line_share < _WHOLE for trace in known.values()),
        mode=next((trace.calendar.mode for trace in known.values() if trace.calendar is not None), "off"),
        asleep_bytes=tuple(int(router_late_ns * (site.uplink_bytes_per_s or 0.0) / 1e9) for site in topology.sites),
    )


def _inside(
    payload: NDArray[Any], known: Mapping[int, _Trace], owners: NDArray[Any], lanes: NDArray[Any]
) -> NDArray[np.bool_]:
    """Return which records kept to the windows and rates of the rank that sent them."""
    inside = np.zeros(len(payload), dtype=np.bool_)
    for rank, trace in known.items():
        mine = owners == rank
        if trace.calendar is not None:
            inside[mine] = trace.calendar.is_open(payload["time_ns"][mine], payload["destination_site"][mine])
            bulk = mine & (lanes == _BULK)
            for destination, (rate, burst) in enumerate(trace.calendar.reserved()):
                if rate:
                    there = np.flatnonzero(bulk & (payload["destination_site"] == destination))
                    inside[there] &= ~_policed(payload[there], rate, burst)
            rate, burst = trace.calendar.express_bytes_per_s, trace.calendar.express_burst_bytes
            if rate:
                express = np.flatnonzero(mine & (lanes == _EXPRESS))
                inside[express] = ~_policed(payload[express], rate, burst)
    return inside


def _policed(records: NDArray[Any], rate_bytes_per_s: float, room_bytes: float) -> NDArray[np.bool_]:
    """Return which of these records a token bucket has no room for."""
    beyond = np.zeros(len(records), dtype=np.bool_)
    tokens, before_ns = room_bytes, 0
    for index, (at_ns, nbytes) in enumerate(
        zip(records["time_ns"].tolist(), records["payload_bytes"].tolist(), strict=True)
    ):
        tokens = min(room_bytes, tokens + (at_ns - before_ns) * rate_bytes_per_s / 1e9)
        before_ns = at_ns
        beyond[index] = nbytes > tokens
        tokens -= 0 if beyond[index] else nbytes
    return beyond


def _parsed(traces: Sequence[Mapping[str, Any]], topology: Topology) -> dict[int, _Trace]:
    """Return the traces by rank, all of them checked."""
    known: dict[int, _Trace] = {}
    for number, data in enumerate(traces):
        try:
            trace = msgspec.convert(dict(data), _Trace)
        except msgspec.ValidationError as error:
            raise UsageError(f"traces[{number}] is no trace of a rank: {error}") from error
        if trace.rank in known:
            raise UsageError(f"traces has two of rank {trace.rank}")
        known[trace.rank] = trace
    if sorted(known) != list(range(topology.size)):
        raise UsageError(f"traces are of ranks {sorted(known)}; expected one of each of {topology.size} ranks")
    for site in range(len(topology.sites)):
        cycles = {calendar.cycle_ns for calendar in _calendars(known, topology, site)}
        if len(cycles) > 1 or any(cycle <= 0 for cycle in cycles):
            raise UsageError(f"traces of site {site} have cycles of {sorted(cycles)} ns; expected one above zero")
    return known


def _attribute(payload: NDArray[Any], known: Mapping[int, _Trace]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each record the rank that sent it (-1: nobody's) and the lane it used."""
    claims = {
        (_number(connection.local), _number(connection.remote)): (rank, lane)
        for rank, trace in known.items()
        for connection in trace.connections
        for lane in [_BULK if connection.lane == "bulk" else _EXPRESS]
    }
    fields = ("source_address", "source_port", "destination_address", "destination_port")
    flows, which = np.unique(
        np.stack([payload[field].astype(np.int64) for field in fields], axis=1), axis=0, return_inverse=True
    )
    owners = [
        claims.get(((source << 16) | source_port, (destination << 16) | destination_port), (-1, _NOBODY))
        for source, source_port, destination, destination_port in flows.tolist()
    ]
    table = np.array(owners, dtype=np.int64).reshape(-1, 2)[which.reshape(-1)]
    return table[:, 0], table[:, 1]


def _number(address: str) -> int:
    """Return ``"ip:port"`` as one number, as the log's fields make it; -1 for what is not IPv4."""
    host, _, port = address.rpartition(":")
    try:
        return (int(ipaddress.IPv4Address(host)) << 16) | int(port)
    except ValueError:
        return -1


def _calendars(known: Mapping[int, _Trace], topology: Topology, site: int) -> list[_Calendar]:
    calendars = (known[rank].calendar for rank in topology.sites[site].ranks)
    return [calendar for calendar in calendars if calendar is not None]


def _overlap_ns(calendars: Sequence[_Calendar]) -> int:
    """Return for how long of a cycle open windows add up to more than the line."""
    edges: list[tuple[int, float]] = []
    for calendar in calendars:
        for start, end, *_ in calendar.windows:
            edges += [(start, calendar.line_share), (end, -calendar.line_share)]
            if end > calendar.cycle_ns:  # goes on at the beginning of the next cycle
                edges += [(at - calendar.cycle_ns, change) for at, change in edges[-2:]]
    overlap, is_open = 0, 0.0
    edges.sort()
    for (at, change), (following, _) in pairwise(edges):
        is_open += change
        if is_open > 1 + 1e-9:
            overlap += following - at
    return overlap


def _clock_spread_ns(calendars: Sequence[_Calendar]) -> int:
    offsets = [calendar.offset_ns for calendar in calendars]
    return max(offsets) - min(offsets) if offsets else 0


def _capacity_bytes(known: Mapping[int, _Trace], topology: Topology, site: int) -> int:
    """Return the wire bytes that the uplink carries in the longest window of one rank."""
    lengths = [calendar.longest_ns() for calendar in _calendars(known, topology, site)]
    return int(max(lengths, default=0) * (topology.sites[site].uplink_bytes_per_s or 0.0) / 1e9)
