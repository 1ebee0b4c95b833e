"""The parts of a report about the runs of `detcoll measure`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from xml.etree.ElementTree import Element

from detcoll.draw import Axis, Bar, Curve, bar_chart, curve_chart
from detcoll.draw.scale import linear_ticks, percent, plain, time_text, time_unit
from detcoll.measure.limits import doubts
from detcoll.measure.results import Run
from detcoll.registry import SLOTTED
from detcoll.report.cells import (
    NOTHING,
    TO,
    count_cell,
    no_headline,
    range_cell,
    remarks,
    run_limit_cell,
    series_of,
    share_cell,
    time_cell,
    traffic_axis,
)
from detcoll.report.page import figure, heading, notes, section, table, tile
from detcoll.report.reported import ReportedResult

MOST_TILES = 6
"""Largest number of key figures; the others are in the pictures and the table."""


def run_headline(result: ReportedResult) -> str | None:
    """Return the main finding of a measurement in a sentence, None if nothing ran across sites.

    There is none where the single cluster is in doubt, or the lab was the limit.
    """
    wide = [run for run in result.runs if run.is_wide and run.efficiency is not None]
    if not wide:
        return None
    if doubts(result.runs):
        return "No figure to quote: the times of the single cluster are in doubt"
    main = [run for run in wide if run.name == _main_name(wide)]
    name = main[0].name
    shares = [min(run.efficiency, 1.0) for run in main if run.efficiency is not None and not run.limits]
    if not shares:
        return no_headline([limit for run in main for limit in run.limits or ()])
    low, high = min(shares), max(shares)
    shown = percent(high, 0) if round(100 * low) == round(100 * high) else f"{round(100 * low)} to {percent(high, 0)}"
    sites = result.workload.get("sites")
    where = f"Across {sites} sites" if sites else "Across sites"
    hedge = ", depending on the network" if len(shares) > 1 else ""
    if limited := len(main) - len(shares):
        hedge += f", without {limited} of {len(main)} networks, where this machine was the limit"
    return f"{where}, {name} trains at {shown} of one cluster\N{RIGHT SINGLE QUOTATION MARK}s speed{hedge}"


def _main_name(wide: Sequence[Run]) -> str | None:
    """Return the name of the main run: the first slotted one, else the first; None if there is none."""
    return next((run.name for run in wide if run.transport == SLOTTED), wide[0].name if wide else None)


def _networks(result: ReportedResult) -> list[tuple[str, float]]:
    return list(dict.fromkeys((run.service, run.cross_traffic) for run in result.runs if run.is_wide))


def _network_label(service: str, cross_traffic: float) -> str:
    others = f"others offering {percent(cross_traffic, 0)}" if cross_traffic else "nobody else"
    return f"{service}, {others}"


def _label(run: Run, has_networks: bool) -> str:
    if not has_networks or not run.is_wide:
        return run.name
    return f"{run.name}, {run.service}, others {percent(run.cross_traffic, 0)}"


def run_tiles(result: ReportedResult) -> list[Element]:
    """Return the efficiency of the first runs that are worth quoting, and whether the digests are equal."""
    wide = [run for run in result.runs if run.is_wide and run.efficiency is not None and not run.limits]
    wide = [] if doubts(result.runs) else wide
    has_networks = len(_networks(result)) > 1
    if has_networks:
        name = _main_name(wide)
        wide = [run for run in wide if run.name == name]
    named = [(_label(run, has_networks), run.efficiency or 0.0) for run in wide[:MOST_TILES]]
    tiles = [tile(percent(share), f"of one cluster: {label}") for label, share in named]
    if result.digests_equal is not None:
        tiles.append(
            tile("bit for bit", "the parameters equal those of the single cluster")
            if result.digests_equal
            else tile("bits differ", "the parameters are not those of the single cluster")
        )
    return tiles


def run_sections(result: ReportedResult) -> list[Element]:
    """Return the pictures of a measurement and the table of all its figures."""
    sections: list[Element | None] = []
    if result.runs:
        sections += [_efficiency(result), _iterations(result), _cross_traffic(result), _co_tenant(result)]
    sections.append(_run_table(result))
    return [each for each in sections if each is not None]


def _efficiency(result: ReportedResult) -> Element | None:
    runs = [run for run in result.runs if run.efficiency is not None]
    if not runs:
        return None
    series, has_networks = series_of([run.transport for run in runs if run.is_wide]), len(_networks(result)) > 1
    bars = [_efficiency_bar(run, series[run.transport] if run.is_wide else 0, has_networks) for run in runs]
    axis = Axis("share of the single cluster's speed", lambda value: percent(value, 0), includes=(1.0,))
    told = (
        "Median iteration time of the single cluster divided by that of each run. Whiskers: the same with the 99th and "
        "the 1st percentile of the run's iteration times, so they show the spread of single iterations. Limited: this "
        "machine was the limit, so the bar says little of the lines."
    )
    drawn = figure(partial(bar_chart, bars, axis, "Efficiency of each run", mark=1.0, mark_label="one cluster"))
    return section("Efficiency", told, drawn)


def _efficiency_bar(run: Run, series: int, has_networks: bool) -> Bar:
    share = run.efficiency or 0.0
    low, high = run.efficiency_spread or (None, None)
    tip = f"{run.name}: {percent(share)}"
    if low is not None and high is not None:
        tip += f", from {percent(low)} to {percent(high)}"
    shown = f"{percent(share)}, limited" if run.limits else percent(share)
    return Bar(_label(run, has_networks), share, shown, series, low, high, tip)


def _iterations(result: ReportedResult) -> Element | None:
    runs = [run for run in result.runs if len(run.iteration_s.samples) > 1]
    if not runs:
        return None
    baseline = [run for run in runs if not run.is_wide]
    wide = [run for run in runs if run.is_wide]
    series = series_of([run.transport for run in wide])
    networks = list(dict.fromkeys((run.service, run.cross_traffic) for run in wide)) or [("", 0.0)]
    parts: list[Element] = []
    for network in networks:
        here = baseline + [run for run in wide if (run.service, run.cross_traffic) == network]
        curves = [_samples(run, series[run.transport] if run.is_wide else 0) for run in here]
        if len(networks) > 1:
            parts.append(heading(_network_label(*network)))
        parts.append(_time_figure(curves, "iteration", "Time of each iteration"))
    told = "All measured iterations in order. A flat line means that the timing of the run is predictable."
    return section("Iteration time over the run", told, *parts)


def _samples(run: Run, series: int) -> Curve:
    points = tuple((float(number), value) for number, value in enumerate(run.iteration_s.samples, 1))
    return Curve(f"{run.name}, median {time_text(run.iteration_s.median)}", points, series)


def _time_figure(curves: Sequence[Curve], x_label: str, title: str) -> Element:
    unit, size = time_unit(median(value for curve in curves for _, value in curve.points))
    y = Axis(f"time, {unit}", lambda value: plain(value / size), may_be_log=True)
    longest = max(x for curve in curves for x, _ in curve.points)
    ticks = tuple(tick for tick in linear_ticks(1.0, longest, 7) if tick.is_integer())
    return figure(partial(curve_chart, curves, Axis(x_label, plain, ticks=ticks), y, title))


def _by_flow(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Return the runs of each transport and service with several loads of cross traffic, ordered by load."""
    keys = dict.fromkeys((run.name, run.service) for run in runs)
    found = []
    for name, service in keys:
        same = sorted(
            (run for run in runs if (run.name, run.service) == (name, service)), key=lambda run: run.cross_traffic
        )
        if len({run.cross_traffic for run in same}) > 1:
            found.append((f"{name}, {service}", same))
    return found


def _cross_traffic(result: ReportedResult) -> Element | None:
    runs = [run for run in result.runs if run.is_wide and run.efficiency is not None]
    flows = _by_flow(runs)
    if not flows:
        return None
    curves = [
        Curve(
            label,
            tuple((run.cross_traffic, run.efficiency or 0.0) for run in same),
            1 + index,
            tuple(run.efficiency_spread for run in same if run.efficiency_spread is not None),
            has_markers=True,
        )
        for index, (label, same) in enumerate(flows)
    ]
    y = Axis("efficiency", lambda value: percent(value, 0), includes=(0.0, 1.0))
    x = traffic_axis({run.cross_traffic for _, same in flows for run in same})
    told = "Efficiency while others send on the same lines. A reservation should give a flat curve."
    drawn = figure(partial(curve_chart, curves, x, y, "Efficiency against others' traffic"))
    return section("Under cross traffic", told, drawn)


def _co_tenant(result: ReportedResult) -> Element | None:
    runs = {run: run.line.co_tenant for run in result.runs if run.line is not None and run.line.co_tenant is not None}
    if not runs:
        return None
    series, has_networks = series_of([run.transport for run in runs]), len(_networks(result)) > 1
    bars = [
        Bar(_label(run, has_networks), seen.p99_s, f"{time_text(seen.p99_s)} (median {time_text(seen.median_s)})",
            series[run.transport])
        for run, seen in runs.items()
    ]  # fmt: skip
    unit, size = time_unit(max(bar.value for bar in bars))
    axis = Axis(f"round trip, {unit}", lambda value: plain(value / size))
    told = "Small packets of another user on the same lines during the run: the 99th percentile of their round trips."
    drawn = figure(partial(bar_chart, bars, axis, "A co-tenant's round trip during each run"))
    return section("A co-tenant's round trip", told, drawn)


def _run_table(result: ReportedResult) -> Element:
    has_networks = len(_networks(result)) > 1
    network = ("service", "others") if has_networks else ()
    headings = ("setting", *network, "iteration", f"p01 {TO} p99", "waiting", "efficiency", "limited by", "line busy",
                "resent", "slots missed", "algorithm", "digest")  # fmt: skip
    rows = [
        (
            run.name,
            *((run.service if run.is_wide else NOTHING, percent(run.cross_traffic, 0) if run.is_wide else NOTHING)
              if has_networks else ()),
            time_text(run.iteration_s.median),
            range_cell(run.iteration_s.p01, run.iteration_s.p99),
            time_cell(run.sync_s.median if run.sync_s else None),
            share_cell(run.efficiency),
            run_limit_cell(run),
            share_cell(run.wire_busy_fraction),
            count_cell(run.retransmits),
            count_cell(run.slot_misses),
            run.algorithm or NOTHING,
            (run.result_digest or NOTHING)[:8],
        )
        for run in result.runs
    ]  # fmt: skip
    told = (
        "Limited by: where it is the machine (router, processors) or the baseline, the efficiency says little of the "
        "lines. "
        "Waiting: from the end of the backward pass to the reduced gradient. Line busy: the share of the backward pass "
        "that the line needs for what was sent. Resent: TCP segments. Digest: of the trained parameters."
    )
    shown = table("Medians of each run", headings, rows, names=1 + len(network)) if rows else None
    return section("All figures of training", told, shown, notes(remarks(result)))
