"""Labels: how wide a text is, and where labels go so that none covers another or leaves the picture.

No font can be measured here, and the reader's is not known. Widths are those of DejaVu Sans, the widest of the fonts
that the pictures name or fall back to: what fits in it fits in the others.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from detcoll.draw.markup import words

TEXT, SMALL = 13.0, 11.5
"""Sizes of the pictures' texts in pixels."""

BOLD = 1.13
"""Width of bold text over that of regular text."""

LABEL_GAP, LABEL_ROW = 8.0, 14.0
"""Least room between two labels, and from one row of small labels to the next."""

_EM = {
    " '.,ijlIJ\N{NO-BREAK SPACE}": 0.32, "/:;\\|f-": 0.36, "()[]!tr": 0.41, '"*_`\N{EN DASH}\N{DEGREE SIGN}': 0.5,
    "szc?L": 0.56, "FkvxyPTYao": 0.61, "KAVBRXZCUHN&DGOQ": 0.79, "w#+<=>^~M\N{RIGHTWARDS ARROW}": 0.86,
    "%mW@\N{HORIZONTAL ELLIPSIS}": 1.0,
}  # fmt: skip
_CHARACTER_EM = {character: width for characters, width in _EM.items() for character in characters}
_OTHER_EM, _WIDE_EM = 0.64, 1.0


def text_width(text: str, size: float = TEXT, bold: bool = False) -> float:
    """Return the width of ``text`` in pixels; other fonts than DejaVu Sans need less."""
    return sum(map(_character_em, text)) * size * (BOLD if bold else 1.0)


def _character_em(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return _WIDE_EM
    return _CHARACTER_EM.get(character, _OTHER_EM)


def shortened(text: str, room: float, size: float = TEXT) -> str:
    """Return ``text``, cut with an ellipsis if it does not fit into ``room``."""
    if text_width(text, size) <= room:
        return text
    kept = text
    while len(kept) > 1 and text_width(f"{kept}\N{HORIZONTAL ELLIPSIS}", size) > room:
        kept = kept[:-1]
    return kept.rstrip(" ,") + "\N{HORIZONTAL ELLIPSIS}"


def wrapped(text: str, room: float, size: float = TEXT, most: int = 9) -> list[str]:
    """Return ``text`` in at most ``most`` lines, broken at spaces; a line that does not fit into ``room`` is cut."""
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (len(lines) == most or text_width(longer, size) <= room):
            lines[-1] = longer
        else:
            lines.append(word)
    return [shortened(each, room, size) for each in lines]


@dataclass(frozen=True, slots=True)
class AxisLabel:
    """A label below an axis: the left end of its text, and its row, 0 nearest to the axis."""

    begin: float
    row: int
    text: str


def axis_labels(ticks: Sequence[tuple[float, str]], left: float, right: float, rows: int = 1) -> list[AxisLabel]:
    """Place labels below an axis in at most ``rows`` rows, so that none touches another.

    Each label is centred on its tick, and moved as far as it must to stay between ``left`` and ``right``. The outermost
    two are placed first. A label that fits into no row is left out.

    Parameters
    ----------
    ticks : sequence of (float, str)
        Places in pixels, ascending, and texts.
    left, right : float
        Where the picture begins and ends.
    rows : int
        The most rows to use.
    """
    ordered = [*ticks[:1], *ticks[-1:], *ticks[1:-1]] if len(ticks) > 1 else list(ticks)
    found: list[AxisLabel] = []
    for place, text in ordered:
        wide = text_width(text, SMALL)
        begin = max(min(place - wide / 2, right - wide), left)
        for row in range(rows):
            beside = [label for label in found if label.row == row]
            if all(_is_apart(begin, wide, label) for label in beside):
                found.append(AxisLabel(begin, row, text))
                break
    return sorted(found, key=lambda label: label.begin)


def _is_apart(begin: float, wide: float, other: AxisLabel) -> bool:
    other_end = other.begin + text_width(other.text, SMALL)
    return begin >= other_end + LABEL_GAP or begin + wide + LABEL_GAP <= other.begin


def axis_words(labels: Sequence[AxisLabel], y: float) -> tuple[list[Element], float]:
    """Return the texts of ``labels`` with the baseline of row 0 at ``y``, and the baseline of the lowest row."""
    parts = [words(each.begin, y + each.row * LABEL_ROW, each.text, "muted small number") for each in labels]
    return parts, y + max((each.row for each in labels), default=0) * LABEL_ROW
