"""Sites and links on a map: longitude across, latitude up, both to scale at the map's middle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from detcoll.draw.labels import SMALL, axis_labels, axis_words, text_width
from detcoll.draw.markup import element, line, picture, words
from detcoll.draw.scale import Scale, linear_ticks, plain
from detcoll.errors import UsageError

KM_PER_DEGREE = 111.195
"""Of latitude, on a sphere of 6,371 km."""

MARGIN, TOP, BOTTOM = 30.0, 24.0, 34.0
LABEL_HEIGHT = 15.0
LEAST_SHAPE, GREATEST_SHAPE = 0.4, 1.1
"""Height over width, so that sites in one line still give a map."""


@dataclass(frozen=True, slots=True)
class Place:
    """A site: degrees north and east."""

    name: str
    latitude: float
    longitude: float


def site_map(places: Sequence[Place], links: Sequence[tuple[int, int]], width: float, title: str = "") -> Element:
    """Draw sites and the links between them.

    Parameters
    ----------
    places : sequence of Place
        At least one.
    links : sequence of (int, int)
        Pairs of indices into ``places``.
    width : float
        Of the picture in pixels.
    title : str
        What is shown, for those who do not see it.

    Raises
    ------
    UsageError
        If there is no place, one lies outside the globe, or a link leads to none.
    """
    _check(places, links)
    x, y, height = _projection(places, width)
    at = [(x(place.longitude), y(place.latitude)) for place in places]
    grid, taken = _graticule(x, y, width, height)
    parts: list[Element | None] = [*grid]
    faint = min(1.0, max(0.12, 14 / max(len(links), 1)))
    for first, second in links:
        (x1, y1), (x2, y2) = at[first], at[second]
        attributes = {
            "x1": x1,
            "y1": y1,
            "x2": x2,
            "y2": y2,
            "class": "link",
            "stroke-opacity": faint,
            "stroke-width": 1.25,
        }
        parts.append(element("line", attributes))
    for place, (px, py) in zip(places, at, strict=True):
        tip = element(
            "title", None, f"{place.name}: {_degrees(place.latitude, 'NS')}, {_degrees(place.longitude, 'EW')}"
        )
        parts.append(element("circle", {"cx": px, "cy": py, "r": 5.0, "class": "site"}, tip))
    bar, bar_box = _scale_bar(x, places, width, height)
    parts += _labels(places, at, width, height, [*taken, bar_box])
    parts += bar
    told = f"{len(places)} sites, {len(links)} links: {', '.join(place.name for place in places)}"
    return picture(width, height, title or "The sites and their links", told, *parts)


def _check(places: Sequence[Place], links: Sequence[tuple[int, int]]) -> None:
    if not places:
        raise UsageError("places=[] has no site to draw")
    for place in places:
        if not (abs(place.latitude) <= 90 and abs(place.longitude) <= 180):
            raise UsageError(f"site {place.name!r}: latitude and longitude must lie within 90 and 180 degrees")
    for pair in links:
        if not all(0 <= index < len(places) for index in pair):
            raise UsageError(f"link {pair} leads to no site; there are {len(places)}")


def _projection(places: Sequence[Place], width: float) -> tuple[Scale, Scale, float]:
    """Return the scales of longitude and latitude, equal in kilometres, and the height of the picture."""
    souths, wests = [place.latitude for place in places], [place.longitude for place in places]
    middle_north, middle_east = (min(souths) + max(souths)) / 2, (min(wests) + max(wests)) / 2
    shrink = max(math.cos(math.radians(middle_north)), 0.05)
    wide = max((max(wests) - min(wests)) * shrink, 1.0)
    high = max(max(souths) - min(souths), 1.0)
    room = width - 2 * MARGIN
    per_degree = min(room / wide, room * GREATEST_SHAPE / high)
    drawn = max(high * per_degree, room * LEAST_SHAPE)
    half_east, half_north = room / 2 / per_degree / shrink, drawn / 2 / per_degree
    x = Scale(middle_east - half_east, middle_east + half_east, MARGIN, width - MARGIN)
    y = Scale(middle_north - half_north, middle_north + half_north, TOP + drawn, TOP)
    return x, y, TOP + drawn + BOTTOM


_Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a text or a mark."""


def _graticule(x: Scale, y: Scale, width: float, height: float) -> tuple[list[Element], list[_Box]]:
    """Return lines of longitude and latitude, and where the degrees of latitude stand."""
    easts = [(x(east), _degrees(east, "EW")) for east in linear_ticks(x.low, x.high, 6)]
    parts = [line(at, 0, at, height - 18, "rule") for at, _ in easts]
    parts += axis_words(axis_labels(easts, 0, width), height - 4)[0]
    boxes: list[_Box] = []
    for north in linear_ticks(y.low, y.high, 5):
        text = _degrees(north, "NS")
        parts += [line(0, y(north), width, y(north), "rule"), words(2, y(north) - 4, text, "muted small")]
        boxes.append((2, y(north) - 15, 2 + text_width(text, SMALL), y(north) - 1))
    return parts, boxes


def _degrees(value: float, sides: str) -> str:
    return f"{plain(round(abs(value), 2))}\N{DEGREE SIGN}{sides[value < 0]}"


def _labels(
    places: Sequence[Place], at: Sequence[tuple[float, float]], width: float, height: float, boxes: Sequence[_Box]
) -> list[Element]:
    """Return the names beside their sites, away from ``boxes``; a name that fits nowhere is left to the site's tip."""
    taken = [*boxes, *((px - 6, py - 6, px + 6, py + 6) for px, py in at)]
    parts: list[Element] = []
    for place, (px, py) in zip(places, at, strict=True):
        wide = text_width(place.name, SMALL)
        spots = (
            (px + 9, py + 4, "start"), (px - 9, py + 4, "end"), (px, py - 9, "middle"), (px, py + 18, "middle"),
            (px + 7, py - 7, "start"), (px + 7, py + 15, "start"), (px - 7, py - 7, "end"), (px - 7, py + 15, "end"),
        )  # fmt: skip
        for lx, ly, anchor in spots:
            begin = lx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = (begin, ly - LABEL_HEIGHT + 4, begin + wide, ly + 3)
            inside = box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height - 18
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(words(lx, ly, place.name, "small halo", anchor))
                break
    return parts


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _scale_bar(x: Scale, places: Sequence[Place], width: float, height: float) -> tuple[list[Element], _Box]:
    """Return a bar of round length in the lower right corner, and where it stands."""
    souths = [place.latitude for place in places]
    shrink = max(math.cos(math.radians((min(souths) + max(souths)) / 2)), 0.05)
    km_per_pixel = KM_PER_DEGREE * shrink * (x.high - x.low) / (x.end - x.begin)
    length_km = linear_ticks(0.0, 0.25 * (x.end - x.begin) * km_per_pixel, 4)[-1]
    end, y = x.end + MARGIN - 6, height - 26
    begin = end - length_km / km_per_pixel
    text = f"{length_km:,.0f} km"
    wide = text_width(text, SMALL)
    label_begin = min((begin + end - wide) / 2, width - wide)
    parts = [line(begin, y, end, y, "mark"), *(line(edge, y - 4, edge, y, "mark") for edge in (begin, end))]
    parts.append(words(label_begin, y - 6, text, "small halo"))
    return parts, (min(begin, label_begin) - 4, y - 20, max(end, label_begin + wide), y + 2)
