"""The tables of ``detcoll plan``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.text import Text

from detcoll.cli.terminal import output_console
from detcoll.measure.sheet import NONE, Column, Sheet
from detcoll.plan import Calendar, SiteReservation, Slotting
from detcoll.plan.calendar import flows_between
from detcoll.plan.reservation import OPEN, GateList
from detcoll.plan.summary import Summary
from detcoll.quantities import format_bytes, format_duration, format_rate, rounded_up
from detcoll.scenarios.study import Needed
from detcoll.signature import signature_of
from detcoll.topology import Topology

MOST_ENTRIES = 6
"""Of a gate list that a table shows; the file has all."""


def print_calendar(topology: Topology, calendar: Calendar, plan: Summary) -> None:
    """Print the cycle and rates of every site, and what the collective comes to."""
    console = output_console()
    console.print(_calendar_line(calendar), soft_wrap=True)
    console.print(Sheet("Lines of sites, and what each site sends", _site_columns(topology, calendar, plan)))
    floor = ""
    if plan.bound_s is not None:
        floor = f", {plan.bound_s / plan.predicted_s:.1%} of the floor ({format_duration(plan.bound_s * 1e9)})"
    size = f" of {format_bytes(plan.bytes)}" if signature_of(plan.collective).has_array else ""
    console.print(
        f"{plan.collective}{size} by {plan.algorithm}: {format_duration(plan.predicted_s * 1e9)} predicted{floor}. "
        "Steps and bytes are those of each site's first rank.",
        soft_wrap=True,
    )


def _site_columns(topology: Topology, calendar: Calendar, plan: Summary) -> list[Column]:
    sites, places = topology.sites, range(len(topology.sites))

    def column(heading: str, cells: Iterable[str], *, is_label: bool = False, moves: bool = False) -> Column:
        return Column(heading, tuple(cells), is_label, moves)

    farthest_ns = [max(topology.one_way_ns(index, other) for other in places) for index in places]
    flows = [max(flows_between(topology, index, other) for other in places if other != index) for index in places]
    windows = [_windows(calendar, index) for index in places]
    return [
        column("site", (site.name for site in sites), is_label=True),
        column("ranks", (str(len(site.ranks)) for site in sites), moves=True),
        column("line", (format_rate(site.uplink_bytes_per_s or 0) for site in sites), moves=True),
        column("farthest site", map(format_duration, farthest_ns), moves=True),
        column("windows", (count for count, _ in windows), moves=True),
        column("line in use", (share for _, share in windows), moves=True),
        column("flows to a site", map(str, flows), moves=True),
        column("payload of a flow", (_flow_rates(calendar, index) for index in places)),
        column("steps", (f"{part.steps:,}" for part in plan.parts)),
        column("sent inside", (format_bytes(part.local_bytes) for part in plan.parts)),
        column("sent to others", (format_bytes(part.wide_bytes) for part in plan.parts)),
    ]


def _calendar_line(calendar: Calendar) -> str:
    cycle = format_duration(calendar.sites[0].cycle_ns)
    paced = f"flows share each line, each paced to a rate that it keeps in every {cycle}"
    if calendar.has_windows:
        guard = format_duration(calendar.guard_ns)
        how = f"a line leads to one destination at a time, in windows of a cycle of {cycle}, with guards of {guard}"
    elif calendar.mode is Slotting.OFF:
        how = "neither slots nor pacing"
    elif calendar.mode is Slotting.SHARE:
        how = paced
    else:
        how = f"each line has one slot, which never closes, since there is one destination; {paced}"
    return f"slotting {calendar.mode.value}: {how}"


def _windows(calendar: Calendar, index: int) -> tuple[str, str]:
    cycle = calendar.sites[index]
    if not cycle.windows:
        return NONE, NONE
    open_ns = sum(window.end_ns - window.start_ns for window in cycle.windows)
    return str(len(cycle.windows)), f"{open_ns / cycle.cycle_ns:.1%}"


def _flow_rates(calendar: Calendar, index: int) -> str:
    count = len(calendar.sites)
    rates = [calendar.rate_bytes_per_s(index, other) for other in range(count) if other != index]
    if not rates or not max(rates):
        return "not limited"
    low, high = format_rate(min(rates)), format_rate(max(rates))
    return low if low == high else f"{low} .. {high}"


def print_needed(needed: Needed, topology: Topology) -> None:
    """Print what every site must reserve for an efficiency, beside what it has."""
    console = output_console()
    if needed.line_bit_per_s is None:
        console.print(
            f"No line is fast enough for {needed.target:.1%}: an endless one gives {needed.efficiency:.1%}, "
            f"{format_duration(needed.iteration_s * 1e9)} an iteration. The rest is delays, and what is not hidden.",
            style="bold red", soft_wrap=True,
        )  # fmt: skip
        return
    rate, sites = needed.line_bit_per_s / 8, topology.sites
    has = [site.uplink_bytes_per_s or 0.0 for site in sites]
    columns = [
        Column("site", tuple(site.name for site in sites), is_label=True),
        Column("ranks", tuple(str(len(site.ranks)) for site in sites)),
        Column("must reserve", (format_rate(rounded_up(needed.line_bit_per_s) / 8),) * len(sites)),
        Column("has", tuple(map(format_rate, has))),
        Column("verdict", tuple(_verdict(rate, each) for each in has)),
    ]
    console.print(Sheet(f"To reserve for {needed.target:.1%} of a single cluster's speed", columns))
    console.print(
        f"An iteration then takes {format_duration(needed.iteration_s * 1e9)}, {needed.efficiency:.2%}. Rates count IP "
        "packets, headers included; every site sends and receives the same.",
        soft_wrap=True,
    )


def _verdict(needed: float, has: float) -> Text:
    return Text("enough", style="green") if has >= needed else Text(f"{needed / has:.3g} times that", style="red")


def print_reservation(asked: Sequence[SiteReservation]) -> None:
    """Print traffic specifications and gate lists."""

    def column(heading: str, cell: Callable[[SiteReservation], str], *, is_label: bool = False) -> Column:
        return Column(heading, tuple(cell(site) for site in asked), is_label)

    sites = column("site", lambda site: site.site, is_label=True)
    specification = [
        sites,
        column("Interval", lambda site: format_duration(site.specification.interval_ns)),
        column("MaxPacketsPerInterval", lambda site: f"{site.specification.max_packets_per_interval:,}"),
        column("MaxPayloadSize", lambda site: f"{site.specification.max_payload_size_bytes} B"),
        column("rate", lambda site: format_rate(site.specification.wire_bytes_per_s)),
        column("flows", lambda site: str(len(site.flows))),
        column("packets of a flow", _packets),
    ]
    gates = [
        sites,
        column("base-time", lambda site: format_duration(site.gates.base_time_ns)),
        column("cycle-time", lambda site: f"{site.gates.cycle_time_ns:,} ns"),
        column("open", lambda site: f"{_open_share(site.gates):.1%}"),
        column("entries: gate states, time interval", lambda site: _entries(site.gates), is_label=True),
    ]
    console = output_console()
    console.print(Sheet("Traffic specification (RFC 9016) of each site's line", specification))
    console.print(Sheet("Gate list (802.1Qbv) at each site's port", gates))


def _packets(site: SiteReservation) -> str:
    packets = sorted({flow.specification.max_packets_per_interval for flow in site.flows})
    return f"{packets[0]:,}" if len(packets) == 1 else f"{packets[0]:,} .. {packets[-1]:,}"


def _open_share(gates: GateList) -> float:
    opened = sum(entry.interval_ns for entry in gates.entries if entry.gate_states == OPEN)
    return opened / gates.cycle_time_ns


def _entries(gates: GateList) -> str:
    shown = ", ".join(f"{entry.gate_states:#04x} {entry.interval_ns:,} ns" for entry in gates.entries[:MOST_ENTRIES])
    left = len(gates.entries) - MOST_ENTRIES
    return f"{shown}, and {left} more" if left > 0 else shown
