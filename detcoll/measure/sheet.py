"""Tables for a terminal whose headings are never cut.

What is the same in every row is said once above the table. What does not fit beside each other follows in a second
table with the same first columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

NONE = "-"
"""Stands for a figure that does not apply, or that nobody knows."""

_GAP = 2
"""Characters between two columns."""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and a cell for each row.

    ``is_label`` : it tells rows apart, so every part of the table has it.  ``moves`` : it stands above the table where
    all cells are the same. A column of `NONE` alone is left out.
    """

    heading: str
    cells: tuple[str | Text, ...]
    is_label: bool = False
    moves: bool = False

    @property
    def width(self) -> int:
        """Characters of the widest cell or of the heading."""
        return max(cell_len(str(text)) for text in (self.heading, *self.cells))

    @property
    def is_same(self) -> bool:
        """Whether all cells say the same."""
        return len({str(cell) for cell in self.cells}) == 1

    @property
    def is_empty(self) -> bool:
        """Whether no cell says anything."""
        return self.is_same and str(self.cells[0]) == NONE


class Sheet:
    """A table as wide as the terminal, or several below each other."""

    def __init__(self, title: str, columns: Sequence[Column]) -> None:
        known = [column for column in columns if not column.is_empty]
        moved = [column for column in known if column.moves and column.is_same]
        if not any(column.is_label and column not in moved for column in known):
            moved = [column for column in moved if column != known[0]]
        self._same = ", ".join(f"{column.heading} {column.cells[0]}" for column in moved)
        self._title, self._columns = title, [column for column in known if column not in moved]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Give rich the title, what is the same in every row, and the tables."""
        yield Text(f"{self._title}. Every row: {self._same}" if self._same else self._title, style="italic")
        labels = [column for column in self._columns if column.is_label]
        figures = [column for column in self._columns if not column.is_label]
        for part in _parts(figures, options.max_width + _GAP - _width(labels)):
            yield _table([*labels, *part])


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width + _GAP for column in columns)


def _parts(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Return the columns in parts of at most ``width`` characters, or of one column."""
    parts: list[list[Column]] = [[]]
    for column in columns:
        if parts[-1] and _width([*parts[-1], column]) > width:
            parts.append([])
        parts[-1].append(column)
    return parts


def _table(columns: Sequence[Column]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(
            column.heading,
            justify="left" if column.is_label else "right",
            overflow="fold",
            min_width=len(column.heading),
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table
