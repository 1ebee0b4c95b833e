"""The parts of a report about traces, calendars and maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from xml.etree.ElementTree import Element

from detcoll.draw import cycle_of_traces, cycle_picture, site_map, time_space
from detcoll.draw.scale import time_text
from detcoll.draw.timespace import OneWay
from detcoll.quantities import format_rate
from detcoll.report.cells import NOTHING, TO
from detcoll.report.inputs import ReportInputs, TracedRun
from detcoll.report.page import figure, folded, section, table
from detcoll.report.reported import SiteMap
from detcoll.topology import Topology

MOST_TRACED = 6
"""Largest number of runs whose traces are drawn."""

MOST_LINKS = 12
"""Largest number of links that are listed openly; more are folded."""


def trace_sections(inputs: ReportInputs) -> list[Element]:
    """Return a time-space diagram for each traced run, and each different calendar once."""
    sections: list[Element] = []
    runs, names, one_way_ns = inputs.traced[:MOST_TRACED], inputs.site_names, inputs.one_way_ns()
    cycles = [cycle_of_traces(run.traces, names, one_way_ns) for run in runs]
    several = len(set(cycles)) > 1
    for index, (run, cycle) in enumerate(zip(runs, cycles, strict=True)):
        if any(trace.collectives for trace in run.traces):
            sections.append(_time_space(run, f": {run.name}" if len(runs) > 1 else "", names, one_way_ns))
        if cycle is not None and cycle not in cycles[:index]:
            told = "When each sender may use a line; the cycle repeats. " + _slots_told(run)
            which = f": {run.name}" if several else ""
            sections.append(section(f"The calendar of a cycle{which}", told, figure(partial(cycle_picture, cycle))))
    return sections


def _time_space(run: TracedRun, which: str, names: Sequence[str], one_way_ns: OneWay | None) -> Element:
    told = (
        "One of the largest collectives, from the middle of the run. Hollow: when each message was planned to be on "
        "the line. Filled: when it was, at the pacing rate set in the kernel. A lane is a rank and its destination."
    )
    if one_way_ns is not None:
        told += " Slanted lines between the sites: the propagation of messages."
    drawn = figure(lambda width: time_space(run.traces, width, one_way_ns=one_way_ns, site_names=names))
    return section(f"Planned and actual sends{which}", told, drawn)


def _slots_told(run: TracedRun) -> str:
    calendars = [trace.calendar for trace in run.traces if trace.calendar is not None]
    if all(calendar.is_always_open for calendar in calendars):
        return "Here slots never close: each rank may send at any time, at the rate reserved for it."
    guard_ns = max(calendar.guard_ns for calendar in calendars)
    return f"Guards of {time_text(guard_ns / 1e9)} separate different owners. A window may span the end of the cycle."


def map_section(shown: SiteMap) -> Element:
    """Return the section with the map of the sites, and a table of them: not every name has room on a phone's map."""
    told = f"Sites: {len(shown.places)}. Links between them: {len(shown.links)}."
    drawn = figure(lambda width: site_map(shown.places, shown.links, width, f"Sites of {shown.name}"))
    rows = [
        (place.name, f"{place.latitude:.6g}\N{DEGREE SIGN}", f"{place.longitude:.6g}\N{DEGREE SIGN}")
        for place in shown.places
    ]
    positions = table(f"Positions of the sites of {shown.name}", ("site", "latitude", "longitude"), rows)
    return section(f"Map: {shown.name}", told, drawn, folded(f"Positions of {len(rows)} sites", positions))


def topology_section(name: str, shown: Topology) -> Element:
    """Return the section with the tables of a topology's sites and links."""
    sites = [
        (
            site.name,
            str(len(site.ranks)),
            *(_rate(rate) for rate in (site.uplink_bytes_per_s, site.downlink_bytes_per_s)),
        )
        for site in shown.sites
    ]
    links = [
        (f"{shown.sites[low].name} {TO} {shown.sites[high].name}", time_text(shown.one_way_ns(low, high) / 1e9),
         time_text(shown.one_way_ns(high, low) / 1e9), _rate(shown.reserved_bytes_per_s(low, high)))
        for (low, high), _ in shown.links
    ]  # fmt: skip
    tables = [table(f"Sites of {name}", ("site", "ranks", "uplink", "downlink"), sites)]
    if links:
        delays = table(f"Links of {name}", ("between", "one way", "back", "reserved"), links)
        tables.append(delays if len(links) <= MOST_LINKS else folded(f"{len(links)} links", delays))
    return section(f"Topology: {name}", f"Sites: {len(sites)}. Links between them: {len(links)}.", *tables)


def _rate(bytes_per_s: float | None) -> str:
    return NOTHING if bytes_per_s is None else format_rate(bytes_per_s)
