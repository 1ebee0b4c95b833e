"""The tables that `detcoll measure` and `detcoll bench` print."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from detcoll.measure.limits import doubts, limit_word
from detcoll.measure.lines import LineUse
from detcoll.measure.results import RELAY, AuditResult, BenchResult, LeftOut, Limit, LimitKind, Measurement, Row, Run
from detcoll.measure.statistics import Summary
from detcoll.quantities import format_bytes, format_duration, format_rate
from detcoll.registry import PLAIN, SLOTTED, title_of

NONE = "-"
_PARTS = {LimitKind.ROUTER: "lab's router", LimitKind.PROCESSORS: "processors", LimitKind.BASELINE: "baseline"}


def measurement_table(result: Measurement) -> RenderableType:
    """Return the table of a measurement: doubts and limits first, what was left out and what the digests say below."""
    table = Table(title="Training across sites, compared with one cluster", title_justify="left")
    table.add_column("setting", no_wrap=True)
    has_networks = _has_networks(result.runs)
    for heading in ("service", "others") if has_networks else ():
        table.add_column(heading)
    for heading in ("iteration", "p01 .. p99", "sync", "efficiency", "spread"):
        table.add_column(heading, justify="right")
    table.add_column("limit")
    for heading in ("line busy", "resent", "misses"):
        table.add_column(heading, justify="right")
    table.add_column("algorithm")
    for run in result.runs:
        table.add_row(*_cells(run, has_networks))
    return Group(*_warnings(run_warnings(result.runs)), table, *_notes(result))


def run_warnings(runs: Sequence[Run]) -> list[str]:
    """Return what to know before any figure of a measurement is read: doubts, and what of the lab was a limit."""
    doubted = doubts(runs)
    found = [f"a doubtful baseline, the single cluster: {'; '.join(doubted)}"] if doubted else []
    named = [(run.name, limit) for run in runs for limit in run.limits or () if limit.by is not LimitKind.BASELINE]
    return [*found, *_limit_lines(named)]


def slot_gains(runs: Sequence[Run]) -> list[str]:
    """Return, for each network, what slots change where the plans are the same; nothing of what the lab limited.

    A doubtful baseline does not matter here: nothing is compared with it.
    """
    found, sound = [], [run for run in runs if run.is_wide and run.without is None and not _own_limits(run)]
    plain = {(run.service, run.cross_traffic): run for run in sound if run.transport == PLAIN}
    for run in sound:
        if run.transport == SLOTTED and (other := plain.get((run.service, run.cross_traffic))) is not None:
            times = run.iteration_s.median / other.iteration_s.median
            is_quiet = (run.service, run.cross_traffic) == ("best-effort", 0)
            where = "" if is_quiet else f", {run.service}, others {run.cross_traffic:.0%}"
            found.append(
                f"slots against none, over the same plans: an iteration takes {times:.2f} times as long as over plain "
                f"TCP{where}"
            )
    return found


def _own_limits(run: Run) -> list[Limit]:
    return [limit for limit in run.limits or () if limit.by is not LimitKind.BASELINE]


def row_warnings(rows: Sequence[Row]) -> list[str]:
    """Return what to know before any figure of a sweep is read: what of the lab was a limit."""
    many = len({row.transport for row in rows}) > 1
    named = [
        (f"{f'{row.transport}, ' if many else ''}{row.collective} of {format_bytes(row.bytes)}", limit)
        for row in rows
        for limit in row.limits or ()
    ]
    return _limit_lines(named)


def _warnings(lines: Sequence[str]) -> list[Text]:
    return [Text(line, style="yellow") for line in lines]


def _limit_lines(named: Sequence[tuple[str, Limit]]) -> list[str]:
    """Return a line for each part of the lab that was a limit: of which rows, why, and what would fit."""
    lines = []
    for by, group in groupby(sorted(named, key=lambda one: one[1].by.value), key=lambda one: one[1].by):
        limited = list(group)
        names = ", ".join(dict.fromkeys(name for name, _ in limited))
        last = limited[-1][1]
        fits = f". What fits: {last.fits}" if last.fits else ""
        lines.append(f"limited by the {_PARTS[by]}: {names}: {last.why}{fits}")
    return lines


def bench_table(result: BenchResult) -> RenderableType:
    """Return the table of a sweep: limits first, what was left out and the audit below."""
    table = Table(title="Time of a call, slowest rank", title_justify="left")
    has_networks = _has_networks(result.rows)
    for heading in ("collective", "transport", *(("service", "others") if has_networks else ()), "algorithm"):
        table.add_column(heading)
    is_limited = any(row.limits is not None for row in result.rows)
    for heading in (
        "size",
        "median",
        "min",
        "max",
        "p99",
        "bound",
        "of bound",
        *(("limit",) if is_limited else ()),
        "predicted",
        "error",
        "CPU s/GB",
        "memory",
    ):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            row.collective,
            row.transport,
            *((row.service, f"{row.cross_traffic:.0%}") if has_networks else ()),
            f"{row.algorithm or NONE}{', empty' if row.empty else ''}",
            format_bytes(row.bytes),
            *(_time(value) for value in (row.median_s, row.min_s, row.max_s, row.p99_s, row.bound_s)),
            _share(row.fraction_of_bound),
            *((limit_word(row.limits, row.fraction_of_bound) or NONE,) if is_limited else ()),
            _time(row.predicted_s),
            NONE if row.prediction_error is None else f"{row.prediction_error:+.1%}",
            NONE if row.cpu_s_per_gb is None else f"{row.cpu_s_per_gb:.3g}",
            NONE if row.extra_memory_bytes is None else format_bytes(row.extra_memory_bytes),
        )
    notes = [left_out_line(one) for one in result.left_out]
    named = dict.fromkeys(row.transport for row in result.rows)
    notes += [Text(f"{name}: {title_of(name)}") for name in named if title_of(name) != name]
    if result.emulation == RELAY:
        notes.append(Text("through the relay: rate and delay alone, no queues, no drops, nothing audited"))
    if has_networks:
        notes += [
            line_note(f"{each.transport}, {each.service}, others {each.cross_traffic:.0%}", each.use)
            for each in result.lines
        ]
    if result.audit is not None:
        notes += audit_lines(result.audit)
    return Group(*_warnings(row_warnings(result.rows)), table, *notes)


def audit_lines(seen: AuditResult) -> list[Text]:
    """Return what the router saw of a slotted run, and whether that is slotted."""
    apart = "no two windows overlap"
    if seen.ranks_share:
        apart = "open windows never exceed the line"
    if any(seen.overlap_ns):
        apart = f"windows overlap by {max(seen.overlap_ns)} ns"
    if not any(seen.window_capacity_bytes):
        apart = "there are no windows"
    queues = ", ".join(
        f"{format_bytes(peak)} of {format_bytes(room)}" if room else format_bytes(peak)
        for peak, room in zip(seen.peak_queue_bytes, seen.window_capacity_bytes, strict=True)
    )
    asleep = ""
    if any(seen.asleep_bytes):
        asleep = f"; up to {format_bytes(max(seen.asleep_bytes))} came while the router itself slept"
    verdict = Text("audit: PASS", style="green") if seen.passed else Text("audit: FAIL", style="bold red")
    return [
        verdict.append(
            f" ({seen.slotting}): {seen.inside_share:.2%} of payload in its owner's windows and rate, {apart}"
        ),
        Text(f"peak queue of each uplink, against one window: {queues}{asleep}"),
        Text(
            f"express, in the headroom of the calendar: {format_bytes(seen.express_bytes)}"
            f", {format_bytes(seen.express_beyond_bytes)} beyond it"
        ),
        Text(f"not counted: {format_bytes(seen.warm_up_bytes)} that opened TCP's windows before the first collective"),
    ]


def left_out_line(left_out: LeftOut) -> Text:
    """Return the line that says what was not measured, and why."""
    where = f", {left_out.network}" if left_out.network else ""
    return Text(f"left out: {left_out.transport}{where}: {left_out.why}", style="yellow")


def line_note(name: str, use: LineUse) -> Text:
    """Return what the lines saw of a run, in one line."""
    dropped = f"policed {use.policed_segments}, queue full {use.queue_dropped_segments}, lost {use.lost_segments}"
    co_tenant = use.co_tenant
    others = "no probe came back"
    if co_tenant is not None:
        others = f"a co-tenant's round trip {_time(co_tenant.median_s)}, p99 {_time(co_tenant.p99_s)}"
    queue = f"peak queue {format_bytes(use.peak_queue_bytes or 0)}, router {use.router_cpu_share:.0%} of a core"
    if use.others_bytes_per_s is not None:
        others += f"; others' TCP flows got {format_rate(round(use.others_bytes_per_s, -4))}"
    return Text(f"{name}: dropped segments: {dropped}; {queue}; {others}")


def _has_networks(entries: Sequence[Run | Row]) -> bool:
    """Tell whether anything was measured on other than a quiet ordinary network."""
    return any((entry.service, entry.cross_traffic) != ("best-effort", 0) for entry in entries)


def _cells(run: Run, has_networks: bool) -> list[str]:
    spread = run.efficiency_spread
    is_wide = run.line is not None
    network = [run.service if is_wide else NONE, f"{run.cross_traffic:.0%}" if is_wide else NONE]
    return [
        run.name,
        *(network if has_networks else []),
        _time(run.iteration_s.median),
        _range(run.iteration_s),
        _time(run.sync_s.median if run.sync_s else None),
        _share(run.efficiency),
        NONE if spread is None else "{:.1%} .. {:.1%}".format(*spread),
        limit_word(run.limits) or NONE,
        _share(run.wire_busy_fraction),
        NONE if run.retransmits is None else str(run.retransmits),
        NONE if run.slot_misses is None else str(run.slot_misses),
        run.algorithm or NONE,
    ]


def _notes(result: Measurement) -> list[Text]:
    notes = [left_out_line(one) for one in result.left_out]
    if result.digests_equal is not None:
        notes.append(_digest_line(result))
    notes += [Text(line) for line in slot_gains(result.runs)]
    if _has_networks(result.runs):
        named = [(f"{run.name}, {run.service}, others {run.cross_traffic:.0%}", run.line) for run in result.runs]
        notes += [line_note(name, use) for name, use in named if use is not None]
    accuracies = [f"{run.name} {run.accuracy:.1%}" for run in result.runs if run.accuracy is not None]
    if accuracies:
        notes.append(Text(f"accuracy on held-out digits: {', '.join(accuracies)}"))
    return notes


def _digest_line(result: Measurement) -> Text:
    digests = {run.name: run.result_digest for run in result.runs}
    if result.digests_equal:
        shared = result.runs[0].result_digest
        return Text(f"results: slotted across sites equals the single cluster bit for bit ({shared})", style="green")
    shown = ", ".join(f"{name} {digest or 'differs between ranks'}" for name, digest in digests.items())
    return Text(f"results: slotted across sites DIFFERS from the single cluster: {shown}", style="bold red")


def _time(seconds: float | None) -> str:
    return NONE if seconds is None else format_duration(seconds * 1e9)


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def _range(summary: Summary) -> str:
    return f"{_time(summary.p01)} .. {_time(summary.p99)}"
