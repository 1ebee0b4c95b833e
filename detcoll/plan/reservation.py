"""What to ask of a carrier: the calendar as a traffic specification and as a gate list, site by site.

Traffic specification (RFC 9016, section 5.5): in any ``Interval`` a flow has at most ``MaxPacketsPerInterval`` packets
of at most ``MaxPayloadSize`` bytes. The interval is the calendar's cycle, so windows need no attribute of their own.
Packets are IPv4: the payload is what follows its header of 20 bytes, TCP's own header included. A flow from site i to
site j may send b payload bytes a cycle (rate of all its rank pairs, times the time that its windows are open), in
segments of MTU - 52 bytes:

    MaxPacketsPerInterval = ceil(b / (MTU - 52)),   rate on the wire = MaxPacketsPerInterval * MTU / Interval

A site as a whole asks for its line: what calendars leave of it (`LAID_OUT`) carries express messages, acknowledgements
and what TCP sends by itself.

Gate list (IEEE 802.1Qbv): at the port that leads to the carrier the scheduled class may leave in windows only, the
express class always; whoever else shares the port stays closed, since between windows there is nothing but guards and
what alignment could not use. A site without windows has one entry, open for the whole cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.errors import UsageError
from detcoll.plan.calendar import Calendar, SiteCycle, Slotting, at_once
from detcoll.topology import TCP_IP_HEADER_BYTES, Topology

IP_HEADER_BYTES = 20
"""IPv4 without options."""

SCHEDULED_CLASS, EXPRESS_CLASS = 5, 6
"""Traffic classes of 802.1Q whose gates the lists set."""

OPEN = 1 << SCHEDULED_CLASS | 1 << EXPRESS_CLASS
CLOSED = 1 << EXPRESS_CLASS


@dataclass(frozen=True, slots=True)
class TrafficSpecification:
    """Interval, MaxPacketsPerInterval and MaxPayloadSize of RFC 9016."""

    interval_ns: int
    max_packets_per_interval: int
    max_payload_size_bytes: int

    @property
    def wire_bytes_per_s(self) -> float:
        """The rate of IP packets that this allows, headers included."""
        packet_bytes = self.max_payload_size_bytes + IP_HEADER_BYTES
        return self.max_packets_per_interval * packet_bytes / self.interval_ns * 1e9


@dataclass(frozen=True, slots=True)
class FlowReservation:
    """All that one site sends to another. ``payload_bytes_per_s`` is the mean over a cycle."""

    destination: str
    payload_bytes_per_s: float
    specification: TrafficSpecification


@dataclass(frozen=True, slots=True)
class GateEntry:
    """Gates as 802.1Q writes them, bit k for traffic class k, and for how long."""

    gate_states: int
    interval_ns: int


@dataclass(frozen=True, slots=True)
class GateList:
    """A cycle that begins at ``base_time_ns`` of the clock the sites share, and at every ``cycle_time_ns`` after it."""

    base_time_ns: int
    cycle_time_ns: int
    entries: tuple[GateEntry, ...]


@dataclass(frozen=True, slots=True)
class SiteReservation:
    """What one site asks for: its line as a whole, each of its flows, and gates at its port."""

    site: str
    line_bytes_per_s: float
    specification: TrafficSpecification
    flows: tuple[FlowReservation, ...]
    gates: GateList


def reserve(topology: Topology, calendar: Calendar, base_time_ns: int = 0) -> tuple[SiteReservation, ...]:
    """Return what every site has to ask of the carrier to keep ``calendar``, in the order of sites.

    Parameters
    ----------
    topology : Topology
        With lines between its sites.
    calendar : Calendar
        With rates; `Slotting.OFF` promises nothing that could be reserved.
    base_time_ns : int
        When a cycle begins, by the clock that the sites share.

    Raises
    ------
    UsageError
        If there are no lines, or no rates.
    """
    if not topology.is_wide:
        raise UsageError(f"a topology of {len(topology.sites)} sites without lines has nothing to reserve")
    if calendar.mode is Slotting.OFF:
        raise UsageError("slotting='off' sets no rates; expected calendar, turns or share for a reservation")
    return tuple(_reserve_site(topology, calendar, index, base_time_ns) for index in range(len(topology.sites)))


def _reserve_site(topology: Topology, calendar: Calendar, index: int, base_time_ns: int) -> SiteReservation:
    site, cycle = topology.sites[index], calendar.sites[index]
    others = [other for other in range(len(topology.sites)) if other != index]
    flows = tuple(_reserve_flow(topology, calendar, index, other) for other in others)
    line = site.uplink_bytes_per_s or 0.0
    whole = sum(flow.payload_bytes_per_s for flow in flows) * cycle.cycle_ns / 1e9
    packets = max(
        _packets(whole, topology.mtu_bytes), int(line * cycle.cycle_ns / 1e9 / topology.mtu_bytes)
    )  # fmt: skip
    specification = _specification(cycle, packets, topology.mtu_bytes)
    return SiteReservation(site.name, line, specification, flows, _gates(cycle, base_time_ns))


def _reserve_flow(topology: Topology, calendar: Calendar, source: int, destination: int) -> FlowReservation:
    cycle = calendar.sites[source]
    payload_bytes = calendar.rate_bytes_per_s(source, destination) * _open_flows_ns(
        topology, calendar, source, destination
    ) / 1e9  # fmt: skip
    specification = _specification(cycle, _packets(payload_bytes, topology.mtu_bytes), topology.mtu_bytes)
    name = topology.sites[destination].name
    return FlowReservation(name, payload_bytes / cycle.cycle_ns * 1e9, specification)


def _open_flows_ns(topology: Topology, calendar: Calendar, source: int, destination: int) -> int:
    """Return for how long in a cycle flows between two sites may send, added up over all that may send at once."""
    cycle, number = calendar.sites[source], at_once(calendar, topology, source, destination)
    open_ns = sum(
        window.end_ns - window.start_ns for window in cycle.windows if window.destination in (destination, -1)
    )
    return number * (open_ns if cycle.windows else cycle.cycle_ns)


def _packets(payload_bytes: float, mtu_bytes: int) -> int:
    segment_bytes = mtu_bytes - TCP_IP_HEADER_BYTES
    return max(-(-round(payload_bytes) // segment_bytes), 1)


def _specification(cycle: SiteCycle, packets: int, mtu_bytes: int) -> TrafficSpecification:
    return TrafficSpecification(cycle.cycle_ns, packets, mtu_bytes - IP_HEADER_BYTES)


def _gates(cycle: SiteCycle, base_time_ns: int) -> GateList:
    """Open the scheduled class where any window is open; neighbouring entries differ, and all add up to the cycle."""
    spans: list[tuple[int, int]] = []
    for window in cycle.windows:
        spans.append((window.start_ns, min(window.end_ns, cycle.cycle_ns)))
        if window.end_ns > cycle.cycle_ns:
            spans.append((0, window.end_ns - cycle.cycle_ns))
    if not spans:
        return GateList(base_time_ns, cycle.cycle_ns, (GateEntry(OPEN, cycle.cycle_ns),))
    entries: list[GateEntry] = []
    at_ns = 0
    for start_ns, end_ns in sorted(spans):
        if start_ns > at_ns:
            entries.append(GateEntry(CLOSED, start_ns - at_ns))
            at_ns = start_ns
        if end_ns > at_ns:
            _extend(entries, end_ns - at_ns)
            at_ns = end_ns
    if at_ns < cycle.cycle_ns:
        entries.append(GateEntry(CLOSED, cycle.cycle_ns - at_ns))
    return GateList(base_time_ns, cycle.cycle_ns, tuple(entries))


def _extend(entries: list[GateEntry], open_ns: int) -> None:
    """Let gates be open for longer, or open them."""
    if entries and entries[-1].gate_states == OPEN:
        entries[-1] = GateEntry(OPEN, entries[-1].interval_ns + open_ns)
    else:
        entries.append(GateEntry(OPEN, open_ns))
