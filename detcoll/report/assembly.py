"""The report as a whole: headline, key figures, sections, and the command and machine that produced the figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from detcoll.draw import html_text, svg_text
from detcoll.draw.scale import time_text
from detcoll.measure.results import MEASURE_SCHEMA
from detcoll.outputs import write_file
from detcoll.quantities import format_bytes, format_count, format_rate
from detcoll.report.cells import TO, warnings
from detcoll.report.inputs import ReportInputs
from detcoll.report.page import command, facts, notes, page, part, section
from detcoll.report.reported import Reported, ReportedResult
from detcoll.report.rows import row_headline, row_sections, row_tiles
from detcoll.report.runs import run_headline, run_sections, run_tiles
from detcoll.report.study import study_headline, study_sections, study_setup, study_tiles
from detcoll.report.traced import map_section, topology_section, trace_sections
from detcoll.scenarios import Study
from detcoll.workloads.arrays import CPU

_FACTS = (
    ("cpu", "processor"), ("cores", "cores"), ("kernel", "Linux"), ("python", "Python"), ("detcoll", "detcoll"),
    ("numpy", "NumPy"), ("pyzmq", "pyzmq"), ("libzmq", "libzmq"), ("gpu", "GPU"), ("torch", "torch"), ("cupy", "CuPy"),
    ("mpi4py", "mpi4py"), ("mpi", "MPI"), ("congestion_control", "congestion control"),
)  # fmt: skip


def write_report(directory: Path, inputs: ReportInputs, svg: bool = False) -> Path:
    """Write ``report.html`` into ``directory`` and return its path; with ``svg`` also write each picture as SVG."""
    made = report(inputs)
    path = directory / "report.html"
    write_file(path, html_text(made).encode())
    for name, drawn in pictures(made) if svg else ():
        write_file(directory / f"{name}.svg", svg_text(drawn).encode())
    return path


def pictures(made: Element) -> list[tuple[str, Element]]:
    """Return the pictures of a report in their wide version, each with a file name without suffix."""
    found: list[tuple[str, Element]] = []
    for svg in made.iter("svg"):
        if "wide" in svg.get("class", "").split():
            title = re.sub("[^a-z0-9]+", "-", (svg.findtext("title") or "").lower())[:60].strip("-")
            found.append((f"{len(found) + 1:02}-{title}", svg))
    return found


def report(inputs: ReportInputs) -> Element:
    """Return the report as an HTML page.

    Parameters
    ----------
    inputs : ReportInputs
        Results, traces and maps; sections without data are omitted.
    """
    told = [_told(result) for result in inputs.results]
    others = trace_sections(inputs)
    others += [map_section(each) for each in inputs.maps]
    others += [topology_section(name, each) for name, each in inputs.topologies]
    if inputs.remarks:
        others.append(section("Files", "What was done with the files of this report.", notes(inputs.remarks)))
    first = next((each for each in told if each.finding is not None), None)
    title, lede = _headline(inputs) if first is None else (first.finding or "", first.setup)
    if len(told) == 1:
        return page(title, lede, told[0].tiles, [*told[0].sections, *others, told[0].origin])
    parts = [
        part(inputs.name_of(index), each.kind, [each.finding or NOTHING_MEASURED, each.setup], each.tiles,
             [*each.sections, each.origin])
        for index, each in enumerate(told)
    ]  # fmt: skip
    return page(title, lede, [], [*parts, *others])


NOTHING_MEASURED = "Nothing was measured"


@dataclass(frozen=True, slots=True)
class _Told:
    """What the page says about one result; ``finding`` is None if it has none."""

    kind: str
    finding: str | None
    setup: str
    tiles: list[Element]
    sections: list[Element]
    origin: Element


def _told(result: Reported) -> _Told:
    origin = _origin(result)
    if isinstance(result, Study):
        setup, sections = study_setup(result), study_sections(result)
        return _Told("Simulation", study_headline(result), setup, study_tiles(result), sections, origin)
    setup = " ".join([*(f"{line[0].upper()}{line[1:]}." for line in warnings(result)), _setup(result)])
    if result.schema == MEASURE_SCHEMA:
        return _Told("Training", run_headline(result), setup, run_tiles(result), run_sections(result), origin)
    return _Told("Collectives", row_headline(result), setup, row_tiles(result), row_sections(result), origin)


def _headline(inputs: ReportInputs) -> tuple[str, str]:
    """Return the title and the sentence below it of a page without a finding."""
    if inputs.results:
        return NOTHING_MEASURED, "The result file contains no run. The reasons are listed below."
    ranks = len(inputs.traced[0].traces) if inputs.traced else 0
    if ranks:
        return f"Planned and actual sends of {format_count(ranks, 'rank')}", "From the traces of the ranks."
    return "Sites and links", "From the positions of the sites." if inputs.maps else "From a topology file."


def _setup(result: ReportedResult) -> str:
    """Return a sentence about the workload, the sites and their lines."""
    told = result.workload
    parts: list[str] = []
    if told.get("name"):
        parts.append(f"Workload: {told.get('script') or told['name']}")
    if told.get("iterations"):
        rounds = told.get("rounds") or 1
        parts.append(format_count(told["iterations"], "iteration") + (f" in {rounds} rounds" if rounds > 1 else ""))
    if told.get("batches", 1) > 1:
        parts.append(f"{told['batches']} batches in each")
    if told.get("gradient_bytes"):
        parts.append(f"{format_bytes(told['gradient_bytes'])} of gradients")
    if told.get("compute_s"):
        parts.append(f"{time_text(told['compute_s'])} of computing")
    if told.get("device", CPU) != CPU:
        parts.append(f"arrays on {told['device']}")
    if told.get("sites"):
        parts.append(
            f"{told['sites']} sites"
            + (f" of {format_count(told['ranks_per_site'], 'rank')}" if told.get("ranks_per_site") else "")
        )
    parts += _lines(told.get("uplink_bytes_per_s"), told.get("round_trip_s"))
    if result.rows:
        row = result.rows[0]
        parts += (
            [f"{format_count(row.ranks, 'rank')} in {format_count(row.sites, 'site')}, {row.dtype}", *_devices(result)]
            if row.ranks and row.sites
            else []
        )
    return ", ".join(parts) + "." if parts else "From a result file."


def _devices(result: ReportedResult) -> list[str]:
    """Return where arrays of a sweep were, if any was on a device."""
    devices = list(dict.fromkeys(row.device for row in result.rows))
    return [] if devices == [CPU] else [f"arrays on {' and '.join(devices)}"]


def _lines(uplinks: Sequence[float] | None, round_trips: Sequence[float] | None) -> list[str]:
    parts: list[str] = []
    if uplinks:
        rates = sorted({rate for rate in uplinks if rate})
        parts += (
            [f"lines of {f' {TO} '.join(format_rate(rate) for rate in rates[:1] + rates[1:][-1:])}"] if rates else []
        )
    if round_trips:
        times = sorted(set(round_trips))
        parts.append(f"{f' {TO} '.join(time_text(value) for value in times[:1] + times[1:][-1:])} round trip")
    return parts


def _origin(result: Reported) -> Element:
    made = command(result.command or "not kept in this file")
    if isinstance(result, Study):
        return section("Command", "Time is virtual, so this command gives the same figures on any machine.", made)
    known = [(name, str(result.host[key])) for key, name in _FACTS if result.host.get(key) is not None]
    told = "The command that produced these figures, and the machine that it ran on. They apply to this machine."
    return section("Command and machine", told, made, facts(known) if known else None)
