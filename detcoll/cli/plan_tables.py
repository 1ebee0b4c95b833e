"""The tables of ``detcoll plan``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from detcoll.cli.terminal import output_console
from detcoll.measure.tables import NONE
from detcoll.plan import Calendar, SiteReservation
from detcoll.plan.calendar import flows_between
from detcoll.plan.reservation import OPEN, GateList
from detcoll.plan.summary import Summary
from detcoll.quantities import format_bytes, format_duration, format_rate
from detcoll.scenarios.study import Needed
from detcoll.signature import signature_of
from detcoll.topology import Topology

MOST_ENTRIES = 6
"""Of a gate list that a table shows; the file has all."""


def print_calendar(topology: Topology, calendar: Calendar, plan: Summary) -> None:
    """Print the cycle and rates of every site, and what the collective comes to."""
    console = output_console()
    console.print(_calendar_line(calendar, topology), soft_wrap=True)
    table = Table()
    table.add_column("site", no_wrap=True)
    headings = (
        "ranks",
        "line",
        "farthest",
        "windows",
        "line open",
        "a flow's payload",
        "steps",
        "sent inside",
        "sent out",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for index, part in enumerate(plan.parts):
        site = topology.sites[index]
        farthest_ns = max(topology.one_way_ns(index, other) for other in range(len(topology.sites)))
        table.add_row(
            site.name, str(len(site.ranks)), format_rate(site.uplink_bytes_per_s or 0), format_duration(farthest_ns),
            *_windows(calendar, index), _flow_rates(calendar, index), f"{part.steps:,}",
            format_bytes(part.local_bytes), format_bytes(part.wide_bytes),
        )  # fmt: skip
    console.print(table)
    bound = "" if plan.bound_s is None else f", {plan.bound_s / plan.predicted_s:.1%} of what is possible"
    size = f" of {format_bytes(plan.bytes)}" if signature_of(plan.collective).has_array else ""
    console.print(
        f"{plan.collective}{size} by {plan.algorithm}: {format_duration(plan.predicted_s * 1e9)} predicted{bound}. "
        "Steps and bytes are those of each site's first rank.",
        soft_wrap=True,
    )


def _calendar_line(calendar: Calendar, topology: Topology) -> str:
    flows = max(
        flows_between(topology, i, j)
        for i in range(len(topology.sites))
        for j in range(len(topology.sites))
        if i != j
    )  # fmt: skip
    windows = f"guard {format_duration(calendar.guard_ns)}" if calendar.has_windows else "no windows"
    return (
        f"slotting {calendar.mode.value}: cycle {format_duration(calendar.sites[0].cycle_ns)}, {windows}; "
        f"at most {flows} flows between two sites; digest {calendar.digest}"
    )


def _windows(calendar: Calendar, index: int) -> tuple[str, str]:
    cycle = calendar.sites[index]
    if not cycle.windows:
        return NONE, "always"
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
    rate = needed.line_bit_per_s / 8
    table = Table(title=f"To reserve for {needed.target:.1%} of a single cluster's speed", title_justify="left")
    table.add_column("site", no_wrap=True)
    for heading in ("ranks", "must reserve", "has", ""):
        table.add_column(heading, justify="right")
    for site in topology.sites:
        has = site.uplink_bytes_per_s or 0.0
        verdict = Text("enough", style="green") if has >= rate else Text(f"{rate / has:.3g} times that", style="red")
        table.add_row(site.name, str(len(site.ranks)), format_rate(rate), format_rate(has), verdict)
    console.print(table)
    console.print(
        f"An iteration then takes {format_duration(needed.iteration_s * 1e9)}, {needed.efficiency:.2%}. Rates count IP "
        "packets, headers included; every site sends and receives the same.",
        soft_wrap=True,
    )


def print_reservation(asked: Sequence[SiteReservation]) -> None:
    """Print traffic specifications and gate lists."""
    table = Table(title="Traffic specification (RFC 9016) of each site's line", title_justify="left")
    table.add_column("site", no_wrap=True)
    for heading in ("Interval", "MaxPacketsPerInterval", "MaxPayloadSize", "rate", "flows", "packets of a flow"):
        table.add_column(heading, justify="right")
    for site in asked:
        specification = site.specification
        packets = sorted({flow.specification.max_packets_per_interval for flow in site.flows})
        table.add_row(
            site.site, format_duration(specification.interval_ns), f"{specification.max_packets_per_interval:,}",
            f"{specification.max_payload_size_bytes} B", format_rate(specification.wire_bytes_per_s),
            str(len(site.flows)), f"{packets[0]:,}" if len(packets) == 1 else f"{packets[0]:,} .. {packets[-1]:,}",
        )  # fmt: skip
    console = output_console()
    console.print(table)
    gates = Table(title="Gate list (802.1Qbv) at each site's port", title_justify="left")
    gates.add_column("site", no_wrap=True)
    for heading in ("base-time", "cycle-time", "open"):
        gates.add_column(heading, justify="right")
    gates.add_column("entries: gate states, time interval")
    for site in asked:
        gates.add_row(
            site.site, format_duration(site.gates.base_time_ns), f"{site.gates.cycle_time_ns:,} ns",
            f"{_open_share(site.gates):.1%}", _entries(site.gates),
        )  # fmt: skip
    console.print(gates)


def _open_share(gates: GateList) -> float:
    opened = sum(entry.interval_ns for entry in gates.entries if entry.gate_states == OPEN)
    return opened / gates.cycle_time_ns


def _entries(gates: GateList) -> str:
    shown = ", ".join(f"{entry.gate_states:#04x} {entry.interval_ns:,} ns" for entry in gates.entries[:MOST_ENTRIES])
    left = len(gates.entries) - MOST_ENTRIES
    return f"{shown}, and {left} more" if left > 0 else shown
