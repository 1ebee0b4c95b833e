"""Table cells, remarks below a result, and the colours of series."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from detcoll.draw import Axis
from detcoll.draw.scale import percent, time_text
from detcoll.measure.limits import limit_of_run, limit_word
from detcoll.measure.results import Limit, Run
from detcoll.measure.tables import early_warnings, kept_line, network_costs, row_warnings, run_warnings, slot_gains
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


def warnings(result: ReportedResult) -> list[str]:
    """Return what to know before any figure: that it ended early, a doubtful baseline, and what of the lab limited."""
    return [*early_warnings(result.ended_early), *run_warnings(result.runs), *row_warnings(result.rows)]


def no_headline(limits: Collection[Limit]) -> str:
    """Return what stands in place of a finding where all of it was limited by the lab."""
    parts = " and ".join(dict.fromkeys(f"the {limit.by.value}" for limit in limits))
    return f"No figure to quote: {parts} limited it, not the lines"


def limit_cell(limits: Sequence[Limit] | None, fraction_of_bound: float | None) -> str:
    """Return what limited a row, or `NOTHING` where nobody looked."""
    return limit_word(limits, fraction_of_bound) or NOTHING


def run_limit_cell(run: Run) -> str:
    """Return what limited a run, or `NOTHING` for one cluster and where nobody looked."""
    return limit_of_run(run) or NOTHING


def remarks(result: ReportedResult) -> list[str]:
    """Return the remarks below the figures: settings left out, bits, costs, gains, accuracy, the audit."""
    lines = [
        f"left out: {one.transport}{f', {one.network}' if one.network else ''}: {one.why}" for one in result.left_out
    ]
    if result.digests_equal is False:
        lines.append("the slotted run across sites did not give the same bits as the single cluster")
    lines += network_costs(result.runs)
    lines += slot_gains(result.runs)
    told = (f"{run.name} {percent(run.accuracy)}" for run in result.runs if run.accuracy is not None)
    accuracies = list(dict.fromkeys(told))
    if accuracies:
        lines.append(f"accuracy on held-out data: {', '.join(accuracies)}")
    if result.audit is not None:
        seen = result.audit
        verdict = "kept to" if seen.passed else "did NOT keep to"
        lines.append(f"audit of the line: slotted ({seen.slotting}) {verdict} its calendar; {kept_line(seen)}")
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
