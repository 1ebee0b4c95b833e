"""How figures stand in tables, what remarks a result makes, and which colour a name gets."""

from __future__ import annotations

from collections.abc import Sequence

from detcoll.draw.scale import percent, time_text
from detcoll.measure.report.reported import ReportedResult

NOTHING = "\N{EN DASH}"
"""Stands where a figure does not apply or is not known."""

TO = "\N{EN DASH}"


def series_of(names: Sequence[str]) -> dict[str, int]:
    """Return a series for each name in order of appearance, from 1: 0 is the grey of the baseline."""
    return {name: 1 + index for index, name in enumerate(dict.fromkeys(names))}


def remarks(result: ReportedResult) -> list[str]:
    """Return what has to be said below the figures: what was left out, bits, accuracy, the audit."""
    lines = [
        f"left out: {one.transport}{f', {one.network}' if one.network else ''}: {one.why}" for one in result.left_out
    ]
    if result.digests_equal is False:
        lines.append("the slotted run across sites did not give the bits of the single cluster")
    accuracies = [f"{run.name} {percent(run.accuracy)}" for run in result.runs if run.accuracy is not None]
    if accuracies:
        lines.append(f"accuracy on held-out data: {', '.join(accuracies)}")
    if result.audit is not None:
        seen = result.audit
        verdict = "kept to" if seen.passed else "did NOT keep to"
        lines.append(
            f"audit of the line: slotted ({seen.slotting}) {verdict} its calendar; {percent(seen.inside_share, 2)} of "
            "its payload lay in its owner's windows and rate"
        )
    return lines


def time_cell(seconds: float | None) -> str:
    """Return a time that may not be known."""
    return NOTHING if seconds is None else time_text(seconds)


def share_cell(value: float | None) -> str:
    """Return a share that may not be known."""
    return NOTHING if value is None else percent(value)


def count_cell(value: int | None) -> str:
    """Return a count that may not be known."""
    return NOTHING if value is None else str(value)
