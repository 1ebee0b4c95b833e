"""Tables for terminals: no heading is ever cut, and what is the same in every row stands once above."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from detcoll.measure.results import BENCH_SCHEMA, BenchResult, Row
from detcoll.measure.sheet import NONE, Column, Sheet
from detcoll.measure.tables import bench_table

SIZES = Column("size", ("1 MiB", "2 MiB"), is_label=True)
KIND = Column("kind", ("ring", "ring"), is_label=True, moves=True)


def shown(sheet: object, width: int = 120) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(sheet)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_what_is_the_same_in_every_row_stands_above() -> None:
    floor, nothing = Column("floor", ("1 ms", "1 ms"), moves=True), Column("error", (NONE, NONE))
    median = Column("median", ("3 ms", "3 ms"))
    assert shown(Sheet("Times", [SIZES, KIND, floor, nothing, median])) == [
        "Times. Every row: kind ring, floor 1 ms",
        "size   median",
        "\u2500" * 13,
        "1 MiB    3 ms",
        "2 MiB    3 ms",
    ]


def test_rows_always_have_a_name() -> None:
    one = replace(SIZES, cells=("1 MiB",), moves=True)
    assert shown(Sheet("Times", [one, replace(KIND, cells=("ring",)), Column("median", ("3 ms",))]))[:2] == [
        "Times. Every row: kind ring", "size   median",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [72, 80, 100, 120, 200])
def test_no_heading_is_cut_and_no_line_is_too_long(width: int) -> None:
    row = Row(
        "reduce_scatter", "slotted", "hierarchical", bytes=2**30, median_s=1.2345, min_s=0.12345, max_s=123.45,
        bound_s=1.1, fraction_of_bound=0.9, predicted_s=1.25, prediction_error=0.01, cpu_s_per_gb=1.23, limits=(),
        extra_memory_bytes=2**24, service="deterministic", cross_traffic=1.0,
    )  # fmt: skip
    other = replace(
        row, collective="all_reduce", transport="tcp", algorithm="exchange", bytes=4, service="best-effort",
        cross_traffic=0.0, bound_s=0.5,
    )  # fmt: skip
    lines = shown(bench_table(BenchResult(BENCH_SCHEMA, {}, (row, other))), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "\u2026" not in text
    for heading in ("collective", "transport", "algorithm", "median", "min .. max", "limited by", "memory"):
        assert heading in text
