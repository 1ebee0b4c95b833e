"""The parts of a report about a simulated scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from xml.etree.ElementTree import Element

from detcoll.draw import Axis, Bar, Curve, bar_chart, curve_chart
from detcoll.draw.scale import percent, plain, time_text
from detcoll.quantities import format_bytes, format_count, format_rate
from detcoll.report.cells import NOTHING, share_cell, time_cell
from detcoll.report.page import figure, heading, section, table, tile
from detcoll.scenarios.study import DETERMINISTIC, SINGLE, Point, Study

_CHANGED: dict[str, tuple[str, Callable[[float], str]]] = {
    "reserved_bit_per_s": ("reserved rate of every site", lambda value: format_rate(value / 8)),
    "loss": ("packets lost on the way", plain),
    "cross_traffic": ("share of the line that others take", lambda value: percent(value, 0)),
}


def study_headline(study: Study) -> str | None:
    """Return the main finding of a simulation in a sentence, None if it has no network."""
    wide = [run for run in study.runs if run.setting != SINGLE]
    if not wide:
        return None
    main = next((run for run in wide if run.setting == DETERMINISTIC), wide[0])
    where = f"Across {study.scenario['sites']} sites" if study.scenario.get("sites") else "Across sites"
    what = f"the {main.setting} network trains at {percent(main.efficiency)}"
    return f"{where}, {what} of one cluster\N{RIGHT SINGLE QUOTATION MARK}s speed, in simulation"


def study_setup(study: Study) -> str:
    """Return a sentence about the simulated scenario."""
    facts, parts = study.scenario, list[str]()
    if facts.get("ranks"):
        parts.append(format_count(facts["ranks"], "rank"))
    if facts.get("parameters"):
        parts.append(f"{facts['parameters']:,} parameters")
    if facts.get("gradient_bytes"):
        parts.append(
            f"{format_bytes(facts['gradient_bytes'])} of gradients in {format_count(facts.get('buckets', 1), 'bucket')}"
        )
    if facts.get("compute_s"):
        parts.append(f"{time_text(facts['compute_s'])} of computing")
    if facts.get("longest_km"):
        parts.append(f"at most {facts['longest_km']:,.0f} km apart")
    return f"Scenario {facts.get('name', NOTHING)}: {', '.join(parts) or 'no facts are known'}."


def study_tiles(study: Study) -> list[Element]:
    """Return the efficiency of each network."""
    wide = [run for run in study.runs if run.setting != SINGLE]
    return [tile(percent(run.efficiency), f"of one cluster: {run.setting}, simulated") for run in wide]


def study_sections(study: Study) -> list[Element]:
    """Return the pictures of a simulation and the tables of all its figures."""
    sections = [_efficiency(study), _sensitivity(study), _settings(study), _needs(study)]
    return [each for each in sections if each is not None]


def _efficiency(study: Study) -> Element | None:
    if not study.runs:
        return None
    bars = [
        Bar(run.setting, run.efficiency, f"{percent(run.efficiency)} ({time_text(run.iteration_s)})", index)
        for index, run in enumerate(study.runs)
    ]
    axis = Axis("share of the single cluster's speed", lambda value: percent(value, 0), includes=(1.0,))
    told = "Iteration time in one cluster divided by that across sites. In brackets: the latter, in virtual time."
    drawn = figure(partial(bar_chart, bars, axis, "Efficiency of each network", mark=1.0, mark_label="one cluster"))
    return section("Efficiency, simulated", told, drawn)


def _sensitivity(study: Study) -> Element | None:
    parts: list[Element] = []
    for changed in dict.fromkeys(point.changed for point in study.sensitivity):
        points = [point for point in study.sensitivity if point.changed == changed]
        if len({point.value for point in points}) > 1:
            label, shown = _CHANGED.get(changed, (changed, plain))
            parts += [heading(label.capitalize()), _sensitivity_figure(points, label, shown)]
    return section("What it depends on", "One thing is changed at a time.", *parts) if parts else None


def _sensitivity_figure(points: Sequence[Point], label: str, shown: Callable[[float], str]) -> Element:
    names = sorted({point.setting for point in points})
    curves = [
        Curve(
            name,
            tuple(sorted((point.value, point.efficiency) for point in points if point.setting == name)),
            1 if name == DETERMINISTIC else 2 + index,
            has_markers=True,
        )
        for index, name in enumerate(names)
    ]
    tried = tuple(sorted({point.value for point in points}))
    x = Axis(label, shown, ticks=tried, may_be_log=True)
    y = Axis("efficiency", lambda value: percent(value, 0), includes=(0.0, 1.0))
    return figure(partial(curve_chart, curves, x, y, f"Efficiency against {label}"))


def _settings(study: Study) -> Element | None:
    headings = ("network", "line", "iteration", "efficiency", "beyond computing", "all buckets in a row")
    rows = [
        (run.setting, _line(run.line_bit_per_s), time_text(run.iteration_s), percent(run.efficiency),
         time_cell(run.exposed_s), time_cell(run.sync_s))
        for run in study.runs
    ]  # fmt: skip
    told = f"Algorithm: {study.algorithm or NOTHING}."
    shown = table("An iteration on each network", headings, rows)
    return section("All figures of the simulation", told, shown) if rows else None


def _needs(study: Study) -> Element | None:
    if not study.needed:
        return None
    headings = ("if", "line", "iteration", "efficiency", "ordinary network on it")
    rows = [
        (need.condition, "none is enough" if need.line_bit_per_s is None else _line(need.line_bit_per_s),
         time_text(need.iteration_s), percent(need.efficiency), share_cell(need.ordinary_efficiency))
        for need in study.needed
    ]  # fmt: skip
    target = percent(study.needed[0].target)
    told = "The slowest line of each site that reaches the target, and the efficiency of the ordinary network on it."
    return section(f"The line that {target} needs", told, table(f"For an efficiency of {target}", headings, rows))


def _line(bit_per_s: float | None) -> str:
    return NOTHING if bit_per_s is None else format_rate(float(f"{bit_per_s / 8:.4g}"))
