"""The report as a whole: headline, key figures, sections, and the command and machine that produced the figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from detcoll.draw import element, html_text, svg_text
from detcoll.draw.scale import time_text
from detcoll.measure.results import MEASURE_SCHEMA
from detcoll.outputs import write_file
from detcoll.quantities import format_bytes, format_rate
from detcoll.report.cells import TO
from detcoll.report.inputs import ReportInputs
from detcoll.report.page import facts, page, section
from detcoll.report.reported import Reported, ReportedResult
from detcoll.report.rows import row_headline, row_sections, row_tiles
from detcoll.report.runs import run_headline, run_sections, run_tiles
from detcoll.report.study import study_headline, study_sections, study_setup, study_tiles
from detcoll.report.traced import map_section, trace_sections
from detcoll.scenarios import Study

_FACTS = (
    ("cpu", "processor"), ("cores", "cores"), ("kernel", "Linux"), ("python", "Python"), ("detcoll", "detcoll"),
    ("numpy", "NumPy"), ("pyzmq", "pyzmq"), ("libzmq", "libzmq"), ("torch", "torch"), ("mpi4py", "mpi4py"),
    ("mpi", "MPI"), ("congestion_control", "congestion control"),
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
    title, lede = _headline(inputs)
    tiles: list[Element] = []
    sections: list[Element] = []
    for result in inputs.results:
        if isinstance(result, Study):
            tiles += study_tiles(result)
            sections += study_sections(result)
        elif result.schema == MEASURE_SCHEMA:
            tiles += run_tiles(result)
            sections += run_sections(result)
        else:
            tiles += row_tiles(result)
            sections += row_sections(result)
    sections += trace_sections(inputs)
    sections += [map_section(each) for each in inputs.maps]
    sections += [_origin(result) for result in inputs.results]
    return page(title, lede, tiles, sections)


def _headline(inputs: ReportInputs) -> tuple[str, str]:
    for result in inputs.results:
        if isinstance(result, Study):
            found, lede = study_headline(result), study_setup(result)
        else:
            found = run_headline(result) if result.schema == MEASURE_SCHEMA else row_headline(result)
            lede = _setup(result)
        if found is not None:
            return found, lede
    if inputs.results:
        return "Nothing was measured", "The result file contains no run. The reasons are listed below."
    ranks = len(inputs.traced[0].traces) if inputs.traced else 0
    if ranks:
        return f"Planned and actual sends of {ranks} ranks", "From the traces of the ranks."
    return "Sites and links", "From the positions of the sites."


def _setup(result: ReportedResult) -> str:
    """Return a sentence about the workload, the sites and their lines."""
    told = result.workload
    parts: list[str] = []
    if told.get("name"):
        parts.append(f"Workload: {told.get('script') or told['name']}")
    if told.get("iterations"):
        rounds = told.get("rounds") or 1
        parts.append(f"{told['iterations']} iterations" + (f" in {rounds} rounds" if rounds > 1 else ""))
    if told.get("gradient_bytes"):
        parts.append(f"{format_bytes(told['gradient_bytes'])} of gradients")
    if told.get("compute_s"):
        parts.append(f"{time_text(told['compute_s'])} of computing")
    if told.get("sites"):
        parts.append(
            f"{told['sites']} sites" + (f" of {told['ranks_per_site']} ranks" if told.get("ranks_per_site") else "")
        )
    parts += _lines(told.get("uplink_bytes_per_s"), told.get("round_trip_s"))
    if result.rows:
        row = result.rows[0]
        parts += [f"{row.ranks} ranks in {row.sites} sites, {row.dtype}"] if row.ranks and row.sites else []
    return ", ".join(parts) + "." if parts else "From a result file."


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
    made = element("code", None, result.command or "not kept in this file")
    if isinstance(result, Study):
        return section("Command", "Time is virtual, so this command gives the same figures on any machine.", made)
    known = [(name, str(result.host[key])) for key, name in _FACTS if result.host.get(key) is not None]
    told = "The command that produced these figures, and the machine that it ran on. They apply to this machine."
    return section("Command and machine", told, made, facts(known) if known else None)
