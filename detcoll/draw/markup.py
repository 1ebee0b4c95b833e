"""Elements of SVG and HTML, and how they become text.

Everything is built as a tree and escaped when it is written, so no name that comes from a file can become markup.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from detcoll.draw.style import STYLE

SVG_NAMESPACE = "http://www.w3.org/2000/svg"
FILE_MARGIN = 16

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")
"""What XML cannot hold, and marks that turn the direction of the text around them."""


def clean(text: str) -> str:
    """Return ``text`` without the characters that no document can hold or that reorder their neighbours."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def element(tag: str, attributes: Mapping[str, object] | None = None, *children: Element | str | None) -> Element:
    """Return an element.

    Parameters
    ----------
    tag : str
        Its name.
    attributes : mapping, optional
        Numbers are written with two decimals; None leaves an attribute out.
    children : Element, str or None
        Elements and text, in order; None is left out.
    """
    made = Element(tag, {name: _value(value) for name, value in (attributes or {}).items() if value is not None})
    for child in children:
        if isinstance(child, str):
            _append_text(made, clean(child))
        elif child is not None:
            made.append(child)
    return made


def picture(width: float, height: float, title: str, description: str, *children: Element | None) -> Element:
    """Return an SVG picture that scales to the room it is given and names itself to those who do not see it."""
    attributes = {"viewBox": f"0 0 {_value(width)} {_value(height)}", "role": "img", "class": "picture"}
    return element("svg", attributes, element("title", None, title), element("desc", None, description), *children)


def rect(x: float, y: float, width: float, height: float, kind: str, tip: str | None = None) -> Element:
    """Return a rectangle of the class ``kind``, with a text that appears where one points at it."""
    attributes = {"x": x, "y": y, "width": max(width, 0), "height": height, "class": kind}
    return element("rect", attributes, None if tip is None else element("title", None, tip))


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    """Return a straight line of the class ``kind``."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": kind})


def words(x: float, y: float, text: str, kind: str = "", anchor: str | None = None) -> Element:
    """Return a text of the class ``kind`` whose baseline is at ``y``; ``anchor`` is start, middle or end."""
    return element("text", {"x": x, "y": y, "class": kind or None, "text-anchor": anchor}, text)


def html_text(root: Element) -> str:
    """Return an HTML document."""
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def svg_text(svg: Element) -> str:
    """Return a picture as an SVG file of its own, with the styles, ground and margin that a page gives it."""
    own = copy.deepcopy(svg)
    _, _, width, height = (float(part) for part in own.attrib["viewBox"].split())
    wide, high = width + 2 * FILE_MARGIN, height + 2 * FILE_MARGIN
    own.set("xmlns", SVG_NAMESPACE)
    own.set("viewBox", f"{-FILE_MARGIN} {-FILE_MARGIN} {_value(wide)} {_value(high)}")
    own.set("width", _value(wide))
    own.set("height", _value(high))
    own.insert(2, element("style", None, STYLE))
    own.insert(3, rect(-FILE_MARGIN, -FILE_MARGIN, wide, high, "ground"))
    return ElementTree.tostring(own, encoding="unicode") + "\n"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return clean(str(value))


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text
