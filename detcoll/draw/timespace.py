"""What was sent beside what was planned: sites down, time across.

Every flow (a rank and the rank it sends to) has a lane. Its upper half holds what was planned, hollow: the window of
each send, or where a slot has no end the time that the reserved rate gives it. The lower half holds what happened,
filled: from when its flow was free for a message until, at the pace set, its last byte had left. Where one-way delays
are known, what left is drawn on its slanted way to the other site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from detcoll.draw.labels import SMALL, axis_labels, axis_words, shortened, text_width
from detcoll.draw.markup import element, line, picture, rect, words
from detcoll.draw.scale import NARROW_BELOW, Scale, percent, plain, time_text, time_unit
from detcoll.draw.style import series_class
from detcoll.draw.traces import RankTrace, TimedSend, TracedCall, timed_sends
from detcoll.errors import UsageError
from detcoll.quantities import format_bytes

LANE_HEIGHT, HALF_HEIGHT, LANE_GAP, SITE_HEADING = 24.0, 9.0, 4.0, 22.0
SITE_GAP, SITE_GAP_OF_WAYS = 12.0, 58.0
MOST_FLOWS, MOST_SLANTED, MOST_SENDS = 48, 600, 6000
LEAST_APART = 6.0
"""Slots narrower than this are drawn without lines between them, which would be all that is seen."""

OneWay = Callable[[int, int], int]
"""Gives the one-way delay between two sites in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time in nanoseconds of the sites' clocks."""

    begin_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class _Flow:
    trace: RankTrace
    dst: int = -1
    dst_site: int = -1
    sends: tuple[TimedSend, ...] = ()


@dataclass(slots=True)
class _Canvas:
    """Where things are: x of a time, and the lanes of each site."""

    x: Scale
    begin_ns: int
    bands: dict[int, tuple[float, float]] = field(default_factory=dict)
    parts: list[Element | None] = field(default_factory=list)

    def at(self, time_ns: int) -> float:
        """Return the x of a time of the sites' clocks, kept inside the picture."""
        return min(max(self.x(time_ns - self.begin_ns), self.x.begin), self.x.end)


def typical_call(traces: Sequence[RankTrace]) -> Span:
    """Return when the middle one of the largest collectives ran, with a little room around it.

    Raises
    ------
    UsageError
        If no rank has a collective.
    """
    calls = [call for trace in traces for call in trace.collectives]
    if not calls:
        raise UsageError("traces hold no collective; record them with DETCOLL_TRACE=FOLDER in the ranks' environment")
    largest = max(call.nbytes for call in calls)
    numbers = sorted({call.sequence for call in calls if call.nbytes == largest})
    chosen = numbers[len(numbers) // 2]
    pairs = [(trace, call) for trace in traces for call in trace.collectives if call.sequence == chosen]
    begin_ns = min(call.called_ns + trace.offset_ns for trace, call in pairs)
    ends = [max(call.ended_ns, call.predicted_end_ns or 0) + trace.offset_ns for trace, call in pairs]
    room_ns = max((max(ends) - begin_ns) // 25, 1)
    return Span(begin_ns - room_ns, max(ends) + room_ns)


def time_space(
    traces: Sequence[RankTrace], width: float, span: Span | None = None, one_way_ns: OneWay | None = None,
    site_names: Sequence[str] = (),
) -> Element:  # fmt: skip
    """Draw the sends of a stretch of time.

    Parameters
    ----------
    traces : sequence of RankTrace
        Of ranks whose sites' clocks agree; where they do not, sites are shifted against each other.
    width : float
        Of the picture in pixels.
    span : Span, optional
        That of `typical_call` unless given.
    one_way_ns : callable, optional
        Delays between sites, for the slanted ways.
    site_names : sequence of str, optional
        By site number.

    Raises
    ------
    UsageError
        If no span is given and no rank has a collective.
    """
    span = span or typical_call(traces)
    narrow = width < NARROW_BELOW
    left = 44.0 if narrow else 66.0
    canvas = _Canvas(Scale(0.0, float(max(span.end_ns - span.begin_ns, 1)), left, width - 8), span.begin_ns)
    flows = _flows(traces, span)
    top, legend = _legend(width, any(trace.misses for trace in traces))
    lanes, bottom = _place(flows, canvas, top, site_names, SITE_GAP if one_way_ns is None else SITE_GAP_OF_WAYS)
    if one_way_ns is not None:
        _draw_ways(flows, lanes, canvas, one_way_ns)
    for flow, y in zip(flows, lanes, strict=True):
        _draw_lane(flow, y, canvas, narrow)
        _draw_calls(flow.trace, span, y, canvas)
    axis = _axis(canvas, span, top, bottom, width)
    return picture(
        width, bottom + 40, _title(site_names, flows), _told(traces, flows, span), *axis, *legend, *canvas.parts
    )


def _flows(traces: Sequence[RankTrace], span: Span) -> list[_Flow]:
    """Return the flows that send within ``span``, by site; a rank that sends nothing has one empty lane."""
    site_of = {trace.rank: trace.site for trace in traces}
    flows: list[_Flow] = []
    for trace in sorted(traces, key=lambda each: (each.site, each.rank)):
        by_peer: dict[int, list[TimedSend]] = {}
        for timed in timed_sends(trace, site_of):
            if _is_within(timed, span):
                by_peer.setdefault(timed.send.dst, []).append(timed)
        mine = [_Flow(trace, dst, by_peer[dst][0].dst_site, tuple(by_peer[dst])) for dst in sorted(by_peer)]
        flows += mine or [_Flow(trace)]
    return flows[:MOST_FLOWS]


def _is_within(timed: TimedSend, span: Span) -> bool:
    begins_ns, ends_ns = min(timed.planned_begin_ns, timed.begin_ns), max(timed.planned_end_ns, timed.end_ns)
    return begins_ns < span.end_ns and ends_ns > span.begin_ns


def _place(
    flows: Sequence[_Flow], canvas: _Canvas, top: float, names: Sequence[str], gap: float
) -> tuple[list[float], float]:
    """Return the y of every lane and of the last one's end; bands of sites are kept on the canvas."""
    lanes: list[float] = []
    y, site = top, -1
    for flow in flows:
        if flow.trace.site != site:
            y += gap if lanes else 0.0
            site = flow.trace.site
            canvas.parts.append(words(0, y + 14, name_of(names, site), "strong"))
            y += SITE_HEADING
            canvas.bands[site] = (y, y)
        lanes.append(y)
        y += LANE_HEIGHT + LANE_GAP
        canvas.bands[site] = (canvas.bands[site][0], y - LANE_GAP)
    return lanes, y


def name_of(names: Sequence[str], site: int) -> str:
    """Return the name of a site, or its number where it has none."""
    return names[site] if 0 <= site < len(names) else f"site {site}"


def _draw_lane(flow: _Flow, y: float, canvas: _Canvas, narrow: bool) -> None:
    kind = series_class(1 + flow.trace.site)
    label = f"{flow.trace.rank} \N{RIGHTWARDS ARROW} {flow.dst}" if flow.dst >= 0 else f"{flow.trace.rank}"
    shown = label if narrow else f"rank {label}" if text_width(f"rank {label}", SMALL) < canvas.x.begin else label
    canvas.parts.append(words(0, y + 16, shortened(shown, canvas.x.begin - 4, SMALL), "muted small number"))
    canvas.parts.append(rect(canvas.x.begin, y, canvas.x.end - canvas.x.begin, LANE_HEIGHT, "lane"))
    sends = flow.sends[:MOST_SENDS]
    planned = [(canvas.at(timed.planned_begin_ns), canvas.at(timed.planned_end_ns)) for timed in sends]
    for x1, x2 in joined(planned):
        canvas.parts.append(rect(x1, y + 2, x2 - x1, HALF_HEIGHT, f"planned {kind}"))
    for timed in sends:
        canvas.parts += _sent(flow, timed, y + LANE_HEIGHT - HALF_HEIGHT - 2, canvas, kind)
    offset_ns = flow.trace.offset_ns
    for miss in flow.trace.misses:
        if miss.dst_site in (-1, flow.dst_site):
            _draw_miss(canvas, miss.not_before_ns + offset_ns, miss.not_after_ns + offset_ns, y)


def joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join neighbours that are too small to be told apart, so that hollow ones do not fill each other."""
    made: list[tuple[float, float]] = []
    for begin, end in spans:
        if made and end - begin < LEAST_APART and -1 < begin - made[-1][1] < 1:
            made[-1] = (made[-1][0], end)
        else:
            made.append((begin, end))
    return made


def _sent(flow: _Flow, timed: TimedSend, y: float, canvas: _Canvas, kind: str) -> list[Element]:
    x1, x2 = canvas.at(timed.begin_ns), canvas.at(timed.end_ns)
    tip = (
        f"rank {flow.trace.rank} to rank {flow.dst}, {format_bytes(timed.send.nbytes)} of call {timed.send.sequence}: "
        f"began {time_text((timed.begin_ns - timed.planned_begin_ns) / 1e9)} after it was due, "
        f"took {time_text((timed.end_ns - timed.begin_ns) / 1e9)}"
    )
    edge = "edge " if x2 - x1 >= LEAST_APART else ""
    parts = [rect(x1, y, max(x2 - x1, 1.0), HALF_HEIGHT, f"fill {edge}{kind}", tip)]
    if timed.is_late:
        parts += [line(x, y, x - 3, y + HALF_HEIGHT, "hatch") for x in range(int(x1) + 3, int(x2), 5)]
    return parts


def _draw_miss(canvas: _Canvas, begin_ns: int, end_ns: int, y: float) -> None:
    if not canvas.begin_ns <= begin_ns < canvas.begin_ns + canvas.x.high:
        return
    x = (canvas.at(begin_ns) + canvas.at(end_ns)) / 2
    path = f"M{x - 4:.2f} {y + 8:.2f}l8 8m0 -8l-8 8"
    canvas.parts.append(element("path", {"d": path, "class": "cross"}, element("title", None, "a missed window")))


def _draw_calls(trace: RankTrace, span: Span, y: float, canvas: _Canvas) -> None:
    """Mark when a call that began within the span was due by its prediction, and when it had ended."""
    for call in trace.collectives:
        if call.called_ns + trace.offset_ns < span.begin_ns:
            continue
        for time_ns, kind in ((call.predicted_end_ns, "mark dotted"), (call.ended_ns, "mark")):
            if time_ns is not None and span.begin_ns <= time_ns + trace.offset_ns <= span.end_ns:
                x = canvas.at(time_ns + trace.offset_ns)
                canvas.parts.append(line(x, y - 1, x, y + LANE_HEIGHT + 1, kind))


def _draw_ways(flows: Sequence[_Flow], lanes: Sequence[float], canvas: _Canvas, one_way_ns: OneWay) -> None:
    """Draw what left a site on its way to the band of the other."""
    drawn = 0
    for flow, y in zip(flows, lanes, strict=True):
        if flow.dst_site not in canvas.bands:
            continue
        top, bottom = canvas.bands[flow.dst_site]
        down = top > y
        y1, y2 = (y + LANE_HEIGHT, top - SITE_HEADING) if down else (y, bottom)
        delay_ns = one_way_ns(flow.trace.site, flow.dst_site)
        kind = f"wedge {series_class(1 + flow.trace.site)}"
        for timed in flow.sends[: MOST_SLANTED - drawn]:
            drawn += 1
            canvas.parts.append(_way(canvas, timed, delay_ns, y1, y2, kind))


def _way(canvas: _Canvas, timed: TimedSend, delay_ns: int, y1: float, y2: float, kind: str) -> Element:
    times = (timed.begin_ns, timed.end_ns)
    (a, b), (c, d) = ([canvas.at(at + add_ns) for at in times] for add_ns in (0, delay_ns))
    points = f"{a:.2f},{y1:.2f} {b:.2f},{y1:.2f} {d:.2f},{y2:.2f} {c:.2f},{y2:.2f}"
    return element("polygon", {"points": points, "class": kind})


def _axis(canvas: _Canvas, span: Span, top: float, bottom: float, width: float) -> list[Element]:
    length_ns = span.end_ns - span.begin_ns
    unit, size = time_unit(length_ns / 1e9 / 2)
    scale = Scale(0.0, length_ns / 1e9 / size, canvas.x.begin, canvas.x.end)
    shown = [(scale(tick), plain(tick)) for tick in scale.ticks(5 if width < NARROW_BELOW else 10)]
    parts = [line(at, top + SITE_HEADING, at, bottom, "rule") for at, _ in shown]
    parts += axis_words(axis_labels(shown, 0, width), bottom + 14)[0]
    parts.append(words(width, bottom + 32, f"time, {unit}", "muted small", "end"))
    return parts


def _legend(width: float, has_misses: bool) -> tuple[float, list[Element]]:
    """Return where the picture begins below the legend, and the legend."""
    entries: list[tuple[str, Callable[[float, float], list[Element]]]] = [
        ("planned", lambda x, y: [rect(x, y - 9, 24, HALF_HEIGHT, "planned s0")]),
        ("sent", lambda x, y: [rect(x, y - 9, 24, HALF_HEIGHT, "fill s0")]),
        ("sent late or in part", lambda x, y: [
            rect(x, y - 9, 24, HALF_HEIGHT, "fill s0"),
            *(line(x + at, y - 9, x + at - 3, y, "hatch") for at in (5, 10, 15, 20)),
        ]),
        ("predicted end", lambda x, y: [line(x + 12, y - 13, x + 12, y + 3, "mark dotted")]),
        ("end", lambda x, y: [line(x + 12, y - 13, x + 12, y + 3, "mark")]),
    ]  # fmt: skip
    if has_misses:
        cross = "M{:.2f} {:.2f}l8 8m0 -8l-8 8"
        entries.append(
            ("missed window", lambda x, y: [element("path", {"d": cross.format(x + 8, y - 9), "class": "cross"})])
        )
    parts: list[Element] = []
    x, y = 0.0, 16.0
    for label, draw in entries:
        wide = 32 + text_width(label)
        if x and x + wide > width:
            x, y = 0.0, y + 22
        parts += [*draw(x, y), words(x + 32, y, label)]
        x += wide + 14
    return y + 20, parts


def _title(names: Sequence[str], flows: Sequence[_Flow]) -> str:
    sites = sorted({flow.trace.site for flow in flows})
    return f"Planned and actual sends of {', '.join(name_of(names, site) for site in sites)}"


def _told(traces: Sequence[RankTrace], flows: Sequence[_Flow], span: Span) -> str:
    """Return the picture in words: how many sends, how late they began, and how good the prediction was."""
    late = [timed.begin_ns - timed.planned_begin_ns for flow in flows for timed in flow.sends]
    told = f"{len(late)} sends within {time_text((span.end_ns - span.begin_ns) / 1e9)}"
    if late:
        told += f", of which the middle one began {time_text(sorted(late)[len(late) // 2] / 1e9)} after it was due"
    errors = [_error(call) for trace in traces for call in trace.collectives if _ended_within(trace, call, span)]
    known = [error for error in errors if error is not None]
    if known:
        told += f"; predicted times differ from actual ones by at most {percent(max(known, key=abs))}"
    return told


def _ended_within(trace: RankTrace, call: TracedCall, span: Span) -> bool:
    return span.begin_ns <= call.called_ns + trace.offset_ns and call.ended_ns + trace.offset_ns <= span.end_ns


def _error(call: TracedCall) -> float | None:
    took_ns = call.ended_ns - call.called_ns
    if call.predicted_end_ns is None or took_ns <= 0:
        return None
    return (call.predicted_end_ns - call.called_ns) / took_ns - 1
