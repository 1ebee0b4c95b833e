"""What tests of pictures share: reading markup back, and traces made by hand."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import combinations
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from detcoll.draw.labels import SMALL, TEXT, text_width

VOID = {"meta", "br", "hr", "img", "input", "link"}
MS = 10**6


class Strict(HTMLParser):
    """Refuses elements that are not closed in their order, and keeps every tag, attribute and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(text: str) -> Strict:
    """Return what an HTML page holds."""
    reader = Strict()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def of_class(root: Element, *kinds: str, tag: str | None = None) -> list[Element]:
    """Return the elements that have all the classes, in the order in which they are drawn."""
    return [
        node for node in root.iter() if set(kinds) <= set(node.get("class", "").split()) and tag in (None, node.tag)
    ]


def number(node: Element, name: str) -> float:
    """Return an attribute as a figure."""
    return float(node.attrib[name])


def texts(root: Element) -> list[str]:
    """Return the words that a picture shows."""
    return [node.text or "" for node in root.iter("text")]


Box = tuple[float, float, float, float]


def text_box(node: Element) -> Box:
    """Return left, top, right and bottom of a text, at the width that the code counts on."""
    kinds = node.get("class", "").split()
    size = SMALL if {"small", "inside"} & set(kinds) else TEXT
    wide = text_width(node.text or "", size, bold=bool({"strong", "inside"} & set(kinds)))
    x, y = number(node, "x"), number(node, "y")
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[node.get("text-anchor", "start")]
    return left, y - 0.75 * size, left + wide, y + 0.2 * size


def check_labels(drawn: Element) -> None:
    """Fail where a text leaves the picture, or covers another."""
    _, _, width, height = map(float, drawn.attrib["viewBox"].split())
    placed = [(node.text, text_box(node)) for node in drawn.iter("text")]
    for text, (left, top, right, bottom) in placed:
        assert left >= -0.1, text
        assert right <= width + 0.1, text
        assert top >= 0, text
        assert bottom <= height, text
    for (one, a), (other, b) in combinations(placed, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one!r} and {other!r} cover each other"


def svg_again(text: str) -> Element:
    """Return an SVG file's root."""
    return ElementTree.fromstring(text)


def send(begin_ms: float, left_ms: float, dst: int, **changes: Any) -> dict[str, Any]:
    """Return a send that was planned from its begin on, in a window without an end."""
    made = {
        "sequence": 0, "dst": dst, "nbytes": 100_000, "not_before_ns": round(begin_ms * MS), "not_after_ns": 0,
        "started_ns": round(begin_ms * MS), "left_ns": round(left_ms * MS), "ended_ns": round((left_ms + 5) * MS),
        "trimmed": False,
    }  # fmt: skip
    return made | changes


def call(called_ms: float, ended_ms: float, **changes: Any) -> dict[str, Any]:
    """Return a collective that ended when it was predicted to."""
    made = {
        "sequence": 0, "called_ns": round(called_ms * MS), "ended_ns": round(ended_ms * MS), "kind": "all_reduce",
        "nbytes": 400_000, "algorithm": "exchange", "predicted_end_ns": round(ended_ms * MS),
    }  # fmt: skip
    return made | changes


def trace(rank: int, site: int, **changes: Any) -> dict[str, Any]:
    """Return a trace file's content: two sites whose slot never closes, 20 MB/s a flow."""
    calendar = {
        "cycle_ns": 12 * MS, "windows": [[0, 12 * MS, -1]], "offset_ns": 0, "guard_ns": 0, "mode": "calendar",
        "rates_bytes_per_s": [20e6, 20e6], "burst_bytes": [1, 1],
    }  # fmt: skip
    made: dict[str, Any] = {
        "schema": "detcoll.trace/1", "rank": rank, "site": site, "ready_ns": 0, "calendar": calendar,
        "connections": [], "counts": {}, "collectives": [], "sends": [], "misses": [],
    }  # fmt: skip
    return made | changes
