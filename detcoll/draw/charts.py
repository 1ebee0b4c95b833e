"""Bars with their spread, and curves: what a result file says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from detcoll.draw.labels import LABEL_GAP, SMALL, axis_labels, axis_words, text_width, wrapped
from detcoll.draw.markup import element, line, picture, rect, words
from detcoll.draw.scale import NARROW_BELOW, Scale
from detcoll.draw.style import series_class

BAR_HEIGHT, BAR_PITCH, LINE_ABOVE = 18.0, 34.0, 18.0
NAME_LINE = 15.0
LEGEND_LINE, LEGEND_WRAP, KEY_WIDTH, CURVE_HEIGHT = 22.0, 17.0, 38.0, 240.0
MOST_LABEL_ROWS = 3
"""Rows of labels below an axis whose ticks are given, each of which is worth its label."""

LARGEST_POINTS = 400
"""A curve of more points is drawn as the least and the greatest of each stretch, so that no peak is lost."""

LOG_FROM = 4.0
"""Values that lie further apart than this factor are set on a logarithmic scale, on which equal ratios look equal."""

_DASHES = ("2 4", "", "7 3", "9 3 2 3", "12 4", "4 2")
_MARKERS = ("circle", "square", "diamond", "up", "down", "cross")

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; ``low`` and ``high`` are the spread, ``shown`` the figure beside it, ``series`` its colour."""

    label: str
    value: float
    shown: str
    series: int = 0
    low: float | None = None
    high: float | None = None
    tip: str | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one series in order of x; ``ranges`` are the spread of each, low and high, where there is one."""

    label: str
    points: tuple[tuple[float, float], ...]
    series: int = 0
    ranges: tuple[tuple[float, float], ...] = ()
    has_markers: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, how its ticks read, and which figures it must hold."""

    label: str
    shown: Format
    includes: tuple[float, ...] = ()
    ticks: tuple[float, ...] | None = None
    may_be_log: bool = False


def bar_chart(
    bars: Sequence[Bar], axis: Axis, title: str, width: float, mark: float | None = None, mark_label: str = ""
) -> Element:
    """Draw horizontal bars from zero.

    Parameters
    ----------
    bars : sequence of Bar
        From top to bottom.
    axis : Axis
        Of the values.
    title : str
        What is shown, for those who do not see it.
    width : float
        Of the picture in pixels; below 600 names and figures stand above their bars.
    mark : float, optional
        A value to be marked by a line through all bars, with ``mark_label`` above it.
    """
    narrow = width < NARROW_BELOW
    top = 22.0 if mark is not None else 4.0
    left, right, placed, bottom = _narrow_bars(bars, width, top) if narrow else _wide_bars(bars, width, top)
    reach = max([0.0, *axis.includes, *(bar.high or bar.value for bar in bars), *(bar.value for bar in bars)])
    at = Scale(0.0, reach or 1.0, left, right)
    ticks = [(at(tick), axis.shown(tick)) for tick in axis.ticks or at.ticks(5 if narrow else 8)]
    labels, low = axis_words(axis_labels(ticks, 0, width), bottom + 16)
    # On a phone names stand between the bars, where no line may cross them.
    stretches = [(bar.middle - 11, bar.middle + 11) for bar in placed] if narrow else [(top - 4, bottom)]
    parts: list[Element | None] = [line(x, begin, x, end, "rule") for x, _ in ticks for begin, end in stretches]
    for each in placed:
        parts += _bar(each, at)
    if mark is not None:
        parts += [line(at(mark), begin, at(mark), end, "mark dashed") for begin, end in stretches]
        parts += axis_words(axis_labels([(at(mark), mark_label)], 0, width), 12)[0]
    parts += [*labels, words(left, low + 16, axis.label, "muted small")]
    told = "; ".join(f"{bar.label}: {bar.shown}" for bar in bars)
    return picture(width, low + 22, title, told, *parts)


@dataclass(frozen=True, slots=True)
class _PlacedBar:
    """A bar, the y of its middle, and its texts."""

    bar: Bar
    middle: float
    texts: tuple[Element, ...]


_Bars = tuple[float, float, list[_PlacedBar], float]
"""Left and right end of the scale, the bars, and the y below them."""


def _wide_bars(bars: Sequence[Bar], width: float, top: float) -> _Bars:
    """Place bars with their names to the left and their figures to the right."""
    room = max((text_width(bar.shown, bold=True) for bar in bars), default=0.0) + 26
    left = min(max((text_width(bar.label) for bar in bars), default=0.0) + 14, 0.34 * width)
    placed: list[_PlacedBar] = []
    for index, bar in enumerate(bars):
        middle = top + BAR_PITCH * (index + 0.5)
        names = wrapped(bar.label, left - 12, most=2)
        first = middle + 4.5 - NAME_LINE / 2 * (len(names) - 1)
        texts = [words(left - 12, first + NAME_LINE * row, name, anchor="end") for row, name in enumerate(names)]
        texts.append(words(width, middle + 4.5, bar.shown, "strong number", "end"))
        placed.append(_PlacedBar(bar, middle, tuple(texts)))
    return left, width - room, placed, top + BAR_PITCH * len(bars)


def _narrow_bars(bars: Sequence[Bar], width: float, top: float) -> _Bars:
    """Place bars with their names and figures above them; where both do not fit into a line, the figure has its own."""
    placed: list[_PlacedBar] = []
    y = top
    for bar in bars:
        texts: list[Element] = []
        names = wrapped(bar.label, width)
        figure = text_width(bar.shown, bold=True)
        for name in names:
            y += LINE_ABOVE
            texts.append(words(0, y - 4, name))
        if text_width(names[-1]) + LABEL_GAP + figure > width:
            y += LINE_ABOVE
        texts.append(words(width, y - 4, bar.shown, "strong number", "end"))
        placed.append(_PlacedBar(bar, y + 2 + BAR_HEIGHT / 2, tuple(texts)))
        y += BAR_HEIGHT + 14
    return 0.0, width - 8, placed, y


def _bar(placed: _PlacedBar, at: Scale) -> list[Element]:
    bar, middle = placed.bar, placed.middle
    length, kind = at(bar.value) - at.begin, f"fill {series_class(bar.series)}"
    parts = [rect(at.begin, middle - BAR_HEIGHT / 2, length, BAR_HEIGHT, kind, bar.tip or bar.label)]
    if bar.low is not None and bar.high is not None:
        parts += _whisker(at(bar.low), at(bar.high), middle)
    return [*parts, *placed.texts]


def _whisker(low: float, high: float, y: float) -> list[Element]:
    """Return a spread: what it crosses is cut out around it, so that it is seen on a bar of any colour."""
    strokes = [(low, y, high, y), *((x, y - 5, x, y + 5) for x in (low, high))]
    return [line(*stroke, kind) for kind in ("halo", "whisker") for stroke in strokes]


def curve_chart(curves: Sequence[Curve], x_axis: Axis, y_axis: Axis, title: str, width: float) -> Element:
    """Draw curves over a common x.

    The y scale begins at zero. A scale is logarithmic where its axis allows it and values differ by more than a factor
    of four. Curves differ by dash and marker as well as by colour.

    Parameters
    ----------
    curves : sequence of Curve
        At least one with a point.
    x_axis, y_axis : Axis
        Of the points.
    title : str
        What is shown, for those who do not see it.
    width : float
        Of the picture in pixels.
    """
    legend, top = _legend(curves, width)
    y = _y_scale(curves, y_axis, top + 22, top + 22 + CURVE_HEIGHT)
    ticks = y_axis.ticks or tuple(y.ticks(7))
    left = max((text_width(y_axis.shown(tick), SMALL) for tick in ticks), default=0.0) + 16
    x = _x_scale(curves, x_axis, left + 8, width - 22)
    bottom = y.begin
    parts: list[Element | None] = [*legend, words(0, top + 10, y_axis.label + _log_note(y), "muted small")]
    for tick in ticks:
        parts.append(line(left, y(tick), width, y(tick), "rule"))
        parts.append(words(left - 8, y(tick) + 4, y_axis.shown(tick), "muted small number", "end"))
    x_ticks = [(x(tick), x_axis.shown(tick)) for tick in x_axis.ticks or x.ticks(4 if width < NARROW_BELOW else 9)]
    placed = axis_labels(x_ticks, 0, width, MOST_LABEL_ROWS if x_axis.ticks else 1)
    labels, low = axis_words(placed, bottom + 17)
    parts += [line(place, bottom, place, bottom + 4, "axis") for place, _ in x_ticks]
    parts += [*labels, line(left, bottom, width, bottom, "axis")]
    parts += [node for curve in curves for node in _curve(curve, x, y)]
    parts.append(words(width, low + 16, x_axis.label + _log_note(x), "muted small", "end"))
    told = "; ".join(f"{curve.label}: {_told(curve, y_axis)}" for curve in curves)
    return picture(width, low + 22, title, told, *parts)


def _x_scale(curves: Sequence[Curve], axis: Axis, begin: float, end: float) -> Scale:
    places = [x for curve in curves for x, _ in curve.points] + list(axis.includes)
    is_log = axis.may_be_log and 0 < LOG_FROM * min(places) < max(places)
    return Scale(min(places), max(places), begin, end, is_log)


def _y_scale(curves: Sequence[Curve], axis: Axis, top: float, bottom: float) -> Scale:
    values = [value for curve in curves for _, value in curve.points]
    values += [bound for curve in curves for pair in curve.ranges for bound in pair] + list(axis.includes)
    least, greatest = min(values), max(values)
    if axis.may_be_log and least > 0 and greatest > LOG_FROM * least:
        return Scale(least / 1.15, greatest * 1.15, bottom, top, log=True)
    return Scale(min(0.0, least), greatest * 1.06 or 1.0, bottom, top)


def _log_note(scale: Scale) -> str:
    return ", logarithmic" if scale.log else ""


def _told(curve: Curve, axis: Axis) -> str:
    values = [value for _, value in curve.points]
    if len(values) > 12:
        return f"{axis.shown(min(values))} to {axis.shown(max(values))} {axis.label}"
    return ", ".join(axis.shown(value) for value in values)


def _curve(curve: Curve, x: Scale, y: Scale) -> list[Element]:
    kind, dash = series_class(curve.series), _DASHES[curve.series % len(_DASHES)]
    thinned = thin_out(curve.points)
    parts: list[Element] = []
    for (at, _), (low, high) in zip(curve.points, curve.ranges, strict=False):
        ends = [line(x(at) - 4, y(bound), x(at) + 4, y(bound), "whisker") for bound in (low, high)]
        parts += [line(x(at), y(low), x(at), y(high), "whisker"), *ends]
    path = " ".join(f"{x(at):.2f},{y(value):.2f}" for at, value in thinned)
    attributes = {"points": path, "class": f"curve {kind}", "stroke-dasharray": dash or None}
    parts.append(element("polyline", attributes, element("title", None, curve.label)))
    if curve.has_markers or len(thinned) == 1:
        parts += [marker(curve.series, x(at), y(value)) for at, value in thinned]
    return parts


def thin_out(points: Sequence[tuple[float, float]], most: int = LARGEST_POINTS) -> list[tuple[float, float]]:
    """Return at most about ``most`` of ``points``: of each stretch its least and its greatest, in their order."""
    if len(points) <= most:
        return list(points)
    stretch = -(-2 * len(points) // most)
    kept: list[tuple[float, float]] = []
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def marker(series: int, x: float, y: float) -> Element:
    """Return the marker of series ``series``: each has a shape of its own."""
    kind, shape = f"hollow {series_class(series)}", _MARKERS[series % len(_MARKERS)]
    if shape == "circle":
        return element("circle", {"cx": x, "cy": y, "r": 4.0, "class": kind})
    if shape == "square":
        return rect(x - 3.75, y - 3.75, 7.5, 7.5, kind)
    corners = {
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
        "up": ((0, -5), (5, 4), (-5, 4)),
        "down": ((0, 5), (5, -4), (-5, -4)),
        "cross": ((-4, -4), (0, -1), (4, -4), (1, 0), (4, 4), (0, 1), (-4, 4), (-1, 0)),
    }[shape]
    return element("polygon", {"points": " ".join(f"{x + a:.2f},{y + b:.2f}" for a, b in corners), "class": kind})


def _legend(curves: Sequence[Curve], width: float) -> tuple[list[Element], float]:
    """Return the legend above the chart, in as many lines as it needs, and how high it is."""
    parts: list[Element] = []
    x, y, next_y = 0.0, 14.0, 14.0
    for curve in curves:
        texts = wrapped(curve.label, width - KEY_WIDTH)
        wide = KEY_WIDTH + max(map(text_width, texts))
        if x and x + wide > width:
            x, y = 0.0, next_y
        points = f"{x:.2f},{y - 4:.2f} {x + 30:.2f},{y - 4:.2f}"
        dash, kind = _DASHES[curve.series % len(_DASHES)] or None, f"curve {series_class(curve.series)}"
        parts.append(element("polyline", {"points": points, "class": kind, "stroke-dasharray": dash}))
        if curve.has_markers:
            parts.append(marker(curve.series, x + 15, y - 4))
        parts += [words(x + KEY_WIDTH, y + LEGEND_WRAP * row, text) for row, text in enumerate(texts)]
        next_y = max(next_y, y + LEGEND_LINE + LEGEND_WRAP * (len(texts) - 1))
        x += wide + 18
    return parts, next_y - 8 if curves else 0.0
