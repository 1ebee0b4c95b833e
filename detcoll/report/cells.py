"""Table cells, remarks below a result, and the colours of series."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from detcoll.draw import Axis
from detcoll.draw.scale import percent, time_text
from detcoll.measure.tables import doubts
from detcoll.report.reported import ReportedResult

NOTHING = "\N{EN DASH}"
"""Placeholder for a figure that does not apply or is not known."""

TO = "\N{EN DASH}"


def series_of(names: Sequence[str]) -> dict[str, int]:
    """Return a series number for each name in order of appearance, from 1; 0 is the grey of the baseline."""
    return {name: 1 + index for index, name in enumerate(dict.fromkeys(names))}


def traffic_axis(offered: Collection[float]) -> Axis:
    """Return the axis of cross traffic; ``offered`` are the measured loads as shares of the line."""
    ticks = tuple(sorted(offered)) if len(offered) <= 8 else None
    return Axis("cross traffic, share of the line", lambda value: percent(value, 0), ticks=ticks)


def remarks(result: ReportedResult) -> list[str]:
    """Return the remarks below the figures: settings left out, doubtful baselines, bits, accuracy, the audit."""
    lines = [
        f"left out: {one.transport}{f', {one.network}' if one.network else ''}: {one.why}" for one in result.left_out
    ]
    for run in result.runs[:1]:
        if not run.is_wide:
            lines += [f"a doubtful baseline: {doubt}" for doubt in doubts(run.iteration_s, run.arithmetic_ratio)]
    if result.digests_equal is False:
        lines.append("the slotted run across sites did not give the bits of the single cluster")
    told = (f"{run.name} {percent(run.accuracy)}" for run in result.runs if run.accuracy is not None)
    accuracies = list(dict.fromkeys(told))
    if accuracies:
        lines.append(f"accuracy on held-out data: {', '.join(accuracies)}")
    if result.audit is not None:
        seen = result.audit
        verdict = "kept to" if seen.passed else "did NOT keep to"
        lines.append(
            f"audit of the line: slotted ({seen.slotting}) {verdict} its calendar; {percent(seen.inside_share, 2)} of "
            "the payload was sent inside its owner's windows and rate"
        )
    return lines


def time_cell(seconds: float | None) -> str:
    """Return a time as text, or `NOTHING` for None."""
    return NOTHING if seconds is None else time_text(seconds)


def share_cell(value: float | None) -> str:
    """Return a share as text, or `NOTHING` for None."""
    return NOTHING if value is None else percent(value)


def range_cell(low_s: float | None, high_s: float | None) -> str:
    """Return a range of times as text; the unit is not repeated if both have the same."""
    low, high = time_cell(low_s), time_cell(high_s)
    figure, _, unit = low.partition("\N{NO-BREAK SPACE}")
    return f"{figure if high.endswith(unit) else low}\N{NO-BREAK SPACE}{TO} {high}"


def count_cell(value: int | None) -> str:
    """Return a count as text, or `NOTHING` for None."""
    return NOTHING if value is None else str(value)
