"""The parts of a report about the collectives that `detcoll bench` timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from statistics import median
from xml.etree.ElementTree import Element

from detcoll.draw import Axis, Bar, Curve, bar_chart, curve_chart
from detcoll.draw.scale import percent, plain, time_text, time_unit
from detcoll.measure.results import Row
from detcoll.measure.tables import came
from detcoll.quantities import format_bytes, format_count
from detcoll.registry import SLOTTED, title_of
from detcoll.report.cells import (
    NOTHING,
    TO,
    count_cell,
    limit_cell,
    no_headline,
    range_cell,
    remarks,
    series_of,
    share_cell,
    time_cell,
    traffic_axis,
)
from detcoll.report.page import figure, heading, notes, section, table, tile
from detcoll.report.reported import ReportedResult
from detcoll.workloads.arrays import CPU

CROSS = "Share of the floor against others' traffic"


def row_headline(result: ReportedResult) -> str | None:
    """Return the main finding of a sweep in a sentence, None if it is empty."""
    known = [row for row in result.rows if row.fraction_of_bound is not None]
    limits = [limit for row in result.rows for limit in row.limits or ()]
    if not known and limits:
        return no_headline(limits)
    if not known:
        return f"Times of {format_count(len(result.rows), 'collective')}" if result.rows else None
    best = max(known, key=lambda row: (row.transport == SLOTTED, row.fraction_of_bound))
    share = percent(best.fraction_of_bound or 0.0, 0)
    hedge = ", at best" if len(known) > 1 else ""
    where = "" if best.device == CPU else f" on {best.device}"
    what = f"{_called(best).capitalize()} of {format_bytes(best.bytes)}{where} over {best.transport}"
    return f"{what} reaches {share} of the floor{hedge}"


def _called(row: Row) -> str:
    return row.collective.replace("_", "-")


def row_tiles(result: ReportedResult) -> list[Element]:
    """Return a tile for each transport with its best share of the floor."""
    tiles = []
    known = [row for row in result.rows if row.fraction_of_bound is not None]
    for transport, rows in groupby(sorted(known, key=lambda row: row.transport), key=lambda row: row.transport):
        best = max(rows, key=lambda row: row.fraction_of_bound or 0.0)
        what = f"of the floor: {title_of(transport)}, {format_bytes(best.bytes)}"
        what += "" if best.device == CPU else f", {best.device}"
        tiles.append(tile(percent(best.fraction_of_bound or 0.0), what))
    return tiles


def row_sections(result: ReportedResult) -> list[Element]:
    """Return the pictures of a sweep and the table of all its figures."""
    sections = [_bounds(result), _cross_traffic(result), _sizes(result), _row_table(result)]
    return [each for each in sections if each is not None]


def _row_label(row: Row, has_networks: bool) -> str:
    others = f"others {percent(row.cross_traffic, 0)}"
    name = title_of(row.transport) if row.device == CPU else f"{title_of(row.transport)}, {row.device}"
    return f"{name}, {row.service}, {others}" if has_networks else name


def _has_networks(rows: Sequence[Row]) -> bool:
    return len({(row.service, row.cross_traffic) for row in rows}) > 1


def _bounds(result: ReportedResult) -> Element | None:
    rows = [row for row in result.rows if row.fraction_of_bound is not None]
    if not rows:
        return None
    many = _has_networks(rows)
    series = series_of([row.transport for row in rows])
    parts: list[Element] = []
    axis = Axis("share of the floor", lambda value: percent(value, 0), includes=(1.0,))
    for (collective, nbytes), same in _by_size(rows):
        bars = [_bound_bar(row, series, many) for row in same]
        what = f"{collective.replace('_', '-')}, {format_bytes(nbytes)}"
        parts += [heading(what), figure(partial(bar_chart, bars, axis, what, mark=1.0, mark_label="floor"))]
    told = (
        "The floor is the shortest time that the lines allow: payload and headers over rate, and one one-way delay. "
        "Shown is the floor divided by the median time of a call on the slowest rank. Whiskers: the slowest and the "
        "fastest call."
    )
    return section("Share of the floor", told, *parts)


def _cross_traffic(result: ReportedResult) -> Element | None:
    """Return the share of the floor over the cross traffic, if rows have several loads."""
    rows = [row for row in result.rows if row.fraction_of_bound is not None]
    curves: list[Curve] = []
    for key in dict.fromkeys(map(_without_traffic, rows)):
        same = [row for row in rows if _without_traffic(row) == key]
        points = tuple(sorted((row.cross_traffic, row.fraction_of_bound or 0.0) for row in same))
        if len({share for share, _ in points}) > 1:
            where = "" if same[0].device == CPU else f", {same[0].device}"
            what = f"{_called(same[0])} {format_bytes(same[0].bytes)}"
            label = f"{what}, {same[0].transport}{where}, {same[0].service}"
            curves.append(Curve(label, points, 1 + len(curves), has_markers=True))
    if not curves:
        return None
    shares = {share for curve in curves for share, _ in curve.points}
    y = Axis("share of the floor", lambda value: percent(value, 0), includes=(0.0, 1.0))
    told = "The same while others send on the same lines. A reservation should give a flat curve."
    return section("Under cross traffic", told, figure(partial(curve_chart, curves, traffic_axis(shares), y, CROSS)))


def _without_traffic(row: Row) -> tuple[str, int, str, str, str]:
    return row.collective, row.bytes, row.transport, row.device, row.service


def _bound_bar(row: Row, series: dict[str, int], many: bool) -> Bar:
    low = row.bound_s / row.max_s if row.bound_s and row.max_s else None
    high = row.bound_s / row.min_s if row.bound_s and row.min_s else None
    label, share = _row_label(row, many), row.fraction_of_bound or 0.0
    return Bar(label, share, percent(share), series[row.transport], low, high, f"median {time_text(row.median_s)}")


def _by_size(rows: Sequence[Row]) -> list[tuple[tuple[str, int], list[Row]]]:
    keys = sorted({(row.collective, row.bytes) for row in rows})
    return [(key, [row for row in rows if (row.collective, row.bytes) == key]) for key in keys]


def _sizes(result: ReportedResult) -> Element | None:
    many, parts = _has_networks(result.rows), list[Element]()
    series = series_of([_row_label(row, many) for row in result.rows])
    for collective in dict.fromkeys(row.collective for row in result.rows):
        rows = sorted((row for row in result.rows if row.collective == collective), key=lambda row: row.bytes)
        sizes = tuple(float(size) for size in sorted({row.bytes for row in rows}))
        if len(sizes) < 2:
            continue
        floor = tuple({float(row.bytes): row.bound_s for row in rows if row.bound_s}.items())
        curves = [Curve("floor", floor, 0)] if floor else []
        for label in dict.fromkeys(_row_label(row, many) for row in rows):
            points = tuple((float(row.bytes), row.median_s) for row in rows if _row_label(row, many) == label)
            curves.append(Curve(label, points, series[label], has_markers=True))
        parts += [heading(collective.replace("_", "-")), _size_figure(curves, sizes, collective)]
    told = "Median time of a call on the slowest rank. A scale is logarithmic if its values span a large range."
    return section("Time over size", told, *parts) if parts else None


def _size_figure(curves: Sequence[Curve], sizes: tuple[float, ...], collective: str) -> Element:
    unit, size = time_unit(median(value for curve in curves for _, value in curve.points))
    x = Axis("size", format_bytes, ticks=sizes, may_be_log=True)
    y = Axis(f"time, {unit}", lambda value: plain(value / size), may_be_log=True)
    return figure(partial(curve_chart, curves, x, y, f"Time of {collective} over its size"))


def _row_table(result: ReportedResult) -> Element:
    many = _has_networks(result.rows)
    headings = ("collective", "size", "transport", "algorithm", "median", f"min {TO} max", "p99", "floor", "floor/time",
                "limited by", "predicted", "came", "calls")  # fmt: skip
    rows = [
        (
            _called(row), format_bytes(row.bytes), _row_label(row, many), row.algorithm or NOTHING,
            time_text(row.median_s),
            range_cell(row.min_s, row.max_s), time_cell(row.p99_s), time_cell(row.bound_s),
            share_cell(row.fraction_of_bound), limit_cell(row.limits, row.fraction_of_bound),
            time_cell(row.predicted_s),
            came(row, percent) or NOTHING,
            count_cell(row.iterations),
        )
        for row in result.rows
    ]  # fmt: skip
    told = (
        "The time of a call is that of the slowest rank. Predictions were made before the calls; late or early is of "
        "the predicted time. Limited by: a row "
        "that the machine limited (router, processors) is not compared with the floor."
    )
    shown = table("Times of all calls", headings, rows, names=3) if rows else None
    return section("All figures of the collectives", told, shown, notes(remarks(result)))
