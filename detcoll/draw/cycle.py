"""The calendar of a cycle: who may send to whom when, and what arrives where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from detcoll.draw.labels import SMALL, axis_labels, axis_words, shortened, text_width
from detcoll.draw.markup import line, picture, rect, words
from detcoll.draw.scale import NARROW_BELOW, Scale, plain, time_text, time_unit
from detcoll.draw.style import series_class
from detcoll.draw.timespace import OneWay, name_of
from detcoll.draw.traces import RankTrace
from detcoll.plan import Calendar
from detcoll.topology import Topology

ROW_HEIGHT, ROW_PITCH, HEADING = 24.0, 31.0, 26.0


@dataclass(frozen=True, slots=True)
class Block:
    """A window of a cycle; ``label`` says where it leads or from where it comes. May run over the cycle's end."""

    start_ns: int
    end_ns: int
    label: str
    series: int


@dataclass(frozen=True, slots=True)
class CycleRow:
    """All windows of one line, or of one rank."""

    label: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Cycle:
    """A calendar as it is drawn; ``arrivals`` may be empty."""

    cycle_ns: int
    departures: tuple[CycleRow, ...]
    arrivals: tuple[CycleRow, ...] = ()


def cycle_of_calendar(calendar: Calendar, topology: Topology) -> Cycle:
    """Return the cycle of a calendar, with arrivals where windows lead to one site each."""
    sites = [(site, cycle) for site, cycle in zip(topology.sites, calendar.sites, strict=True)]
    windows = {
        (index, rank): tuple((w.start_ns, w.end_ns, w.destination) for w in calendar.windows_of(index, rank))
        for index, (site, _) in enumerate(sites)
        for rank in site.ranks
    }
    longest_ns = max(cycle.cycle_ns for cycle in calendar.sites)
    return _cycle(longest_ns, windows, [site.name for site in topology.sites], topology.one_way_ns)


def cycle_of_traces(
    traces: Sequence[RankTrace], site_names: Sequence[str] = (), one_way_ns: OneWay | None = None
) -> Cycle | None:
    """Return the cycle that ranks kept by their traces; None where they kept none."""
    windows = {(trace.site, trace.rank): trace.calendar.windows for trace in traces if trace.calendar is not None}
    if not windows:
        return None
    cycle_ns = max(trace.calendar.cycle_ns for trace in traces if trace.calendar is not None)
    return _cycle(cycle_ns, windows, site_names, one_way_ns)


_Windows = dict[tuple[int, int], tuple[tuple[int, int, int], ...]]


def _cycle(cycle_ns: int, windows: _Windows, names: Sequence[str], one_way_ns: OneWay | None) -> Cycle:
    departures: list[CycleRow] = []
    arriving: dict[int, list[Block]] = {}
    for site in sorted({site for site, _ in windows}):
        ranks = sorted(rank for at, rank in windows if at == site)
        shared = len({windows[site, rank] for rank in ranks}) == 1
        for rank in ranks[:1] if shared else ranks:
            label = name_of(names, site) if shared else f"{name_of(names, site)}, rank {rank}"
            spans = windows[site, rank] or ((0, cycle_ns, -1),)
            is_open = spans == ((0, cycle_ns, -1),)
            blocks = tuple(
                Block(start, end, "open at all times" if is_open else _goal(dst, names), 1 + (site if dst < 0 else dst))
                for start, end, dst in spans
            )
            departures.append(CycleRow(label, blocks))
            if one_way_ns is None or not shared:
                continue
            for start_ns, end_ns, dst in spans:
                if dst >= 0:
                    begin_ns = (start_ns + one_way_ns(site, dst)) % cycle_ns
                    block = Block(begin_ns, begin_ns + end_ns - start_ns, f"from {name_of(names, site)}", 1 + site)
                    arriving.setdefault(dst, []).append(block)
    arrivals = tuple(CycleRow(name_of(names, dst), tuple(arriving[dst])) for dst in sorted(arriving))
    return Cycle(cycle_ns, tuple(departures), arrivals)


def _goal(dst: int, names: Sequence[str]) -> str:
    return "any site" if dst < 0 else f"to {name_of(names, dst)}"


def cycle_picture(cycle: Cycle, width: float) -> Element:
    """Draw a cycle: a row for each uplink, and below, where arrivals are known, one for each downlink.

    Parameters
    ----------
    cycle : Cycle
        From `cycle_of_calendar` or `cycle_of_traces`.
    width : float
        Of the picture in pixels.
    """
    narrow = width < NARROW_BELOW
    labels = [row.label for row in (*cycle.departures, *cycle.arrivals)]
    left = min(max((text_width(label) for label in labels), default=0.0) + 12, (0.3 if narrow else 0.25) * width)
    unit, size = time_unit(cycle.cycle_ns / 1e9 / 2)
    x = Scale(0.0, float(cycle.cycle_ns), left, width - 10)
    ticks = Scale(0.0, cycle.cycle_ns / 1e9 / size, left, width - 10)
    parts: list[Element | None] = []
    y = 0.0
    for heading, rows in (("leaves on the uplink", cycle.departures), ("arrives on the downlink", cycle.arrivals)):
        if not rows:
            continue
        parts.append(words(0, y + 15, heading, "muted small"))
        y += HEADING
        for row in rows:
            parts += _row(row, cycle.cycle_ns, x, y, left)
            y += ROW_PITCH
    shown = [(ticks(tick), plain(tick)) for tick in ticks.ticks(5 if narrow else 10)]
    parts += [line(at, y - 3, at, y + 2, "axis") for at, _ in shown]
    parts += axis_words(axis_labels(shown, 0, width), y + 16)[0]
    parts.append(
        words(width, y + 32, f"time in a cycle of {time_text(cycle.cycle_ns / 1e9)}, {unit}", "muted small", "end")
    )
    told = "; ".join(f"{row.label}: {_row_told(row)}" for row in cycle.departures)
    return picture(width, y + 38, "The calendar of a cycle", told, *parts)


def _row(row: CycleRow, cycle_ns: int, x: Scale, y: float, left: float) -> list[Element]:
    parts = [
        words(0, y + 16, shortened(row.label, left - 8)),
        rect(x.begin, y, x.end - x.begin, ROW_HEIGHT, "track"),
    ]
    for block in row.blocks:
        lasts = time_text((block.end_ns - block.start_ns) / 1e9)
        tip = f"{row.label} {block.label}: from {time_text(block.start_ns / 1e9)}, for {lasts}"
        for start_ns, end_ns in _unwrapped(block, cycle_ns):
            parts.append(
                rect(
                    x(start_ns), y, x(end_ns) - x(start_ns), ROW_HEIGHT, f"fill edge {series_class(block.series)}", tip
                )
            )
            room = x(end_ns) - x(start_ns) - 6
            short = block.label.removeprefix("to ").removeprefix("from ")
            shown = next((text for text in (block.label, short) if text_width(text, SMALL, bold=True) <= room), None)
            if shown is not None:
                parts.append(words((x(start_ns) + x(end_ns)) / 2, y + 16, shown, "inside", "middle"))
    return parts


def _unwrapped(block: Block, cycle_ns: int) -> list[tuple[int, int]]:
    """Return the parts of a window that lie within the cycle, one or two."""
    if block.end_ns <= cycle_ns:
        return [(block.start_ns, block.end_ns)]
    return [(block.start_ns, cycle_ns), (0, block.end_ns - cycle_ns)]


def _row_told(row: CycleRow) -> str:
    told = [f"{block.label} from {time_text(block.start_ns / 1e9)}" for block in row.blocks[:12]]
    return ", ".join(told) + (f" and {len(row.blocks) - 12} more" if len(row.blocks) > 12 else "")
