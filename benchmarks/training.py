"""Training under load: what a job across two sites keeps of one cluster's speed, and what each means gains.

    python benchmarks/training.py --json training.json --markdown training.md --picture training.svg

Takes the figures of docs/training.md, which tells how the job is sized. Every part is some commands of `detcoll
measure` that anybody can run alone; the file holds each of them beside its runs. It takes about half an hour;
``--only`` takes some of the parts and keeps the others that the JSON file has already, and ``--iterations`` takes fewer
iterations. Needs Linux for the emulated lines.

- ``line``   one cluster and slotted in the deterministic class, without others and beside a full line's worth of them
- ``peers``  the same job by Gloo and MPI on both networks, each with buckets of the size that suits it
- ``gains``  slotted with topology, slots, overlap and reservation switched off in turn, all beside others
- ``busy``   the job with ranks that keep Python or NumPy busy
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detcoll.cli.lines import comma_separated
from detcoll.draw import Axis, Bar, Curve, bar_chart, curve_chart, element, svg_text
from detcoll.draw.scale import percent
from detcoll.emulation.lab import obtain
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.host import host_facts
from detcoll.measure.statistics import Summary, ratio, summarize
from detcoll.quantities import format_bytes

SCHEMA = "detcoll.training/1"
PARTS = ("line", "peers", "gains", "busy")
SUITS = {"gloo": "4MiB", "mpi": "1MiB"}
"""With which buckets each peer was fastest on the quiet ordinary network, of 256 KiB, 1 MiB and 4 MiB."""

FULL = ("--service", "deterministic", "--cross-traffic", "1.0")
BOTH = ("--service", "deterministic", "--cross-traffic", "0,1.0")
LARGEST_ARITHMETIC_RATIO, LEAST_BUSY, LEAST_EFFICIENCY, LARGEST_CHANGE = 1.01, 0.6, 0.98, 0.01
LARGEST_BASELINE = 1.1
"""Times its own arithmetic: an efficiency against a single cluster that is slower says nothing."""

RANKS_PER_SITE = 2
DEADLINE_S = 900
WIDTH = 960.0


@dataclass(frozen=True, slots=True)
class Case:
    """A command of `detcoll measure`; the runs of those of one name are taken together."""

    part: str
    name: str
    arguments: tuple[str, ...]

    @property
    def argv(self) -> list[str]:
        """What is run."""
        return [sys.executable, "-m", "detcoll", "measure", "--workload", "synthetic", *self.arguments]


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of one case, of all its rounds; see `detcoll.measure.results.Run`.

    ``why_failed`` : why there is no figure.
    """

    part: str
    case: str
    name: str
    service: str
    cross_traffic: float
    bucket_bytes: int
    iteration_s: Summary | None
    efficiency: float | None = None
    efficiency_spread: tuple[float, float] | None = None
    wire_busy_fraction: float | None = None
    arithmetic_ratio: float | None = None
    retransmits: int | None = None
    policed_segments: int | None = None
    co_tenant_p99_s: float | None = None
    why_failed: str | None = None

    @property
    def is_wide(self) -> bool:
        """Whether it ran across sites."""
        return self.name != "single cluster"


def cases(given: argparse.Namespace) -> Iterator[Case]:
    """Yield the commands, part by part, of those asked for."""
    for part, make in (("line", _line), ("peers", _peers), ("gains", _gains), ("busy", _busy)):
        if part in given.only:
            yield from make(given)


def _job(
    given: argparse.Namespace, bucket: str, iterations: int, *more: str, ranks: int | None = None
) -> tuple[str, ...]:
    """Return what describes the job, with ``more`` of the setting."""
    return (
        "--sites", "2", "--ranks-per-site", str(ranks or RANKS_PER_SITE), "--rate", given.rate, "--compute",
        given.compute, "--gradient-bytes", given.gradient_bytes, "--bucket-bytes", bucket, "--iterations",
        str(iterations), *more,
    )  # fmt: skip


def _line(given: argparse.Namespace) -> Iterator[Case]:
    count = math.ceil(given.iterations / given.rounds)
    turns = ("--rounds", str(min(2, count)), "--warmup", "2")
    for _ in range(given.rounds):
        more = ("--against", "none", *BOTH, *turns)
        yield Case("line", "slotted and one cluster", _job(given, given.bucket_bytes, count, *more))


def _peers(given: argparse.Namespace) -> Iterator[Case]:
    few = ("--rounds", "1", "--warmup", "1")
    for peer, bucket in SUITS.items():
        for service in (BOTH, ("--service", "best-effort", "--cross-traffic", "0")):
            more = ("--against", peer, *service, *few)
            yield Case("peers", f"{peer}, {service[1]}", _job(given, bucket, given.few_iterations, *more))
    crowded = ("--service", "best-effort", "--cross-traffic", "1.0", "--deadline", given.deadline)
    more = ("--against", ",".join(SUITS), *crowded, *few)
    yield Case("peers", "best effort beside others", _job(given, SUITS["mpi"], 1, *more))


def _gains(given: argparse.Namespace) -> Iterator[Case]:
    few = ("--against", "none", *FULL, "--rounds", "1", "--warmup", "1")
    means = ("--without", "topology,slots,overlap")
    yield Case("gains", "gains", _job(given, given.bucket_bytes, given.few_iterations, *few, *means))
    large = _job(given, SUITS["gloo"], given.few_iterations, *few, "--without", "topology,slots")
    yield Case("gains", "gains, large buckets", large)
    crowded = ("--without", "reservation", "--deadline", given.deadline)
    yield Case("gains", "gain of the reservation", _job(given, given.bucket_bytes, 1, *few, *crowded))


def _busy(given: argparse.Namespace) -> Iterator[Case]:
    for kind, ranks in (("python", 1), ("numpy", 1), ("python", 2)):
        more = ("--compute-kind", kind, "--against", "none", *BOTH, "--rounds", "1", "--warmup", "1")
        job = _job(given, given.bucket_bytes, given.few_iterations, *more, ranks=ranks)
        yield Case("busy", f"2 x {ranks} ranks busy in {kind}", job)


def run(case: Case, under: Sequence[str]) -> dict[str, Any]:
    """Run a case and return its command and what it wrote, or why it did not."""
    with tempfile.TemporaryDirectory(prefix="detcoll-training-") as folder:
        path = Path(folder) / "measured.json"
        argv = [*under, *case.argv, "--json", str(path)]
        code, told = _wait_for(argv)
        result: dict[str, Any] = {
            "part": case.part, "name": case.name, "exit_code": code,
            "command": f"detcoll measure {shlex.join(case.argv[4:])}", "runs": [], "left_out": [], "workload": {},
        }  # fmt: skip
        if not path.exists():
            return result | {"error": told[-2000:]}
        wrote = json.loads(path.read_bytes())
        return result | {name: wrote[name] for name in ("runs", "left_out", "workload", "digests_equal")}


def _wait_for(argv: Sequence[str]) -> tuple[int, str]:
    """Run a command and return its exit code and errors; it is ended, with all it started, if this program is."""
    with subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:  # fmt: skip
        try:
            told = child.communicate(timeout=DEADLINE_S)[1]
        except BaseException as error:
            os.killpg(child.pid, signal.SIGTERM)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return 1, f"not done after {DEADLINE_S} s"
        return child.returncode, told


def kept(path: Path | None, anew: Sequence[str]) -> list[dict[str, Any]]:
    """Return the cases that the file at ``path`` has already, but for the parts that are run ``anew``."""
    if path is None or not path.exists():
        return []
    wrote = json.loads(path.read_bytes())
    if wrote.get("schema") != SCHEMA:
        sys.exit(f"--json {str(path)!r} is there and holds something else; expected a file of this program")
    return [case for case in wrote["cases"] if case["part"] not in anew]


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Return the rows of all cases; rounds of one case are one row, compared with the single cluster of the same."""
    rows: list[Row] = []
    for name in dict.fromkeys(result["name"] for result in results):
        same = [result for result in results if result["name"] == name and result["runs"]]
        runs = [run for result in same for run in result["runs"]]
        settings = dict.fromkeys((run["name"], run["service"], run["cross_traffic"]) for run in runs)
        baseline: Summary | None = None
        for key in settings:
            alike = [run for run in runs if (run["name"], run["service"], run["cross_traffic"]) == key]
            row = _row(same[0], key, alike, baseline)
            baseline = baseline or row.iteration_s
            rows.append(row)
        rows += [_failed_row(result, left_out) for result in same for left_out in result["left_out"]]
    return rows


def _row(
    result: dict[str, Any], key: tuple[str, str, float], runs: Sequence[dict[str, Any]], baseline: Summary | None
) -> Row:
    name, service, cross_traffic = key
    iteration_s = summarize([time_s for run in runs for time_s in run["iteration_s"]["samples"]])
    efficiency, low, high = ratio(baseline or iteration_s, iteration_s)
    lines = [run["line"] for run in runs if run["line"] is not None]
    busy = [run["wire_busy_fraction"] for run in runs if run["wire_busy_fraction"] is not None]
    tenants = [line["co_tenant"]["p99_s"] for line in lines if line["co_tenant"] is not None]
    return Row(
        result["part"], result["name"], name, service, cross_traffic, result["workload"]["bucket_bytes"], iteration_s,
        efficiency, (low, high), sum(busy) / len(busy) if busy else None,
        iteration_s.median / result["workload"]["compute_s"],
        sum(run["retransmits"] or 0 for run in runs) if lines else None,
        sum(line["policed_segments"] for line in lines) if lines else None, max(tenants, default=None),
    )  # fmt: skip


def _failed_row(result: dict[str, Any], left_out: dict[str, Any]) -> Row:
    service, _, offered = (left_out["network"] or "-").partition(", others offer ")
    share = float(offered.partition("%")[0] or 0) / 100
    bucket_bytes = result["workload"]["bucket_bytes"]
    return Row(
        result["part"], result["name"], left_out["transport"], service, share, bucket_bytes, None,
        why_failed=left_out["why"],
    )  # fmt: skip


def slow_baselines(rows: Sequence[Row]) -> dict[str, float]:
    """Return the cases whose single cluster took much longer than its own arithmetic, and how many times as long."""
    ratios = {row.case: row.arithmetic_ratio or 0.0 for row in rows if not row.is_wide}
    return {case: times for case, times in ratios.items() if times > LARGEST_BASELINE}


def goals(rows: Sequence[Row], digests_equal: bool) -> list[dict[str, Any]]:
    """Return what was to be reached and what was: of the part ``line``."""
    named = {(row.name, row.cross_traffic): row for row in rows if row.part == "line"}
    single, quiet, full = (named.get(key) for key in (("single cluster", 0.0), ("slotted", 0.0), ("slotted", 1.0)))
    if not (single and quiet and full and single.iteration_s and quiet.iteration_s and full.iteration_s):
        return []
    change = full.iteration_s.median / quiet.iteration_s.median - 1
    busy = min(quiet.wire_busy_fraction or 0.0, full.wire_busy_fraction or 0.0)
    reached: list[tuple[str, float, bool]] = [
        ("the single cluster over its own arithmetic, 1.01 at most", single.arithmetic_ratio or 0.0,
         (single.arithmetic_ratio or 0.0) <= LARGEST_ARITHMETIC_RATIO),
        ("the line's busy share of the backward pass, 0.6 at least", busy, busy >= LEAST_BUSY),
        ("slotted beside others, share of the single cluster's speed, 0.98 at least", full.efficiency or 0.0,
         (full.efficiency or 0.0) >= LEAST_EFFICIENCY),
        ("what others change of slotted's time, 0.01 at most", change, abs(change) <= LARGEST_CHANGE),
        ("iterations of each", float(len(full.iteration_s.samples)), True),
        ("slotted's bits are the single cluster's", float(digests_equal), digests_equal),
    ]  # fmt: skip
    return [{"goal": goal, "reached": value, "met": met} for goal, value, met in reached]


def table(rows: Sequence[Row]) -> str:
    """Return rows as Markdown."""
    lines = [
        "| setting | service | others | buckets | iterations | median | p01 .. p99 | efficiency | its spread "
        "| line busy | policed | resent |",
        "| --- " * 12 + "|",
    ]
    return "\n".join([*lines, *(_cells(row) for row in rows)])


def _cells(row: Row) -> str:
    network = [row.service, percent(row.cross_traffic, 0)] if row.is_wide else ["-", "-"]
    bucket = format_bytes(row.bucket_bytes)
    if row.iteration_s is None:
        return f"| {row.name} | {' | '.join(network)} | {bucket} | - | {row.why_failed} |" + " - |" * 6
    times = row.iteration_s
    low, high = row.efficiency_spread or (0.0, 0.0)
    cells = [
        row.name, *network, bucket, str(len(times.samples)), f"{times.median:.4g} s",
        f"{times.p01:.4g} .. {times.p99:.4g} s", percent(row.efficiency or 0.0),
        f"{percent(low)} .. {percent(high)}",
        "-" if row.wire_busy_fraction is None else percent(row.wire_busy_fraction),
        *("-" if count is None else str(count) for count in (row.policed_segments, row.retransmits)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def gains_table(rows: Sequence[Row]) -> str:
    """Return what an iteration takes without each means, beside one with all of them, as Markdown."""
    lines = [
        "| slotted, beside others | buckets | iterations | median | of the full set's speed | efficiency | policed |",
        "| --- " * 7 + "|",
    ]
    full_s = 0.0
    for row in rows:
        if row.part != "gains" or not row.is_wide:
            continue
        if row.iteration_s is None:
            lines.append(f"| {row.name} | {format_bytes(row.bucket_bytes)} | - | {row.why_failed} | - | - | - |")
            continue
        median_s = row.iteration_s.median
        full_s = median_s if row.name == "slotted" else full_s
        name = "all of them" if row.name == "slotted" else row.name.removeprefix("slotted ")
        lines.append(
            f"| {name} | {format_bytes(row.bucket_bytes)} | {len(row.iteration_s.samples)} | {median_s:.4g} s | "
            f"{percent(full_s / median_s)} | {percent(row.efficiency or 0.0)} | {row.policed_segments} |"
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row], reached: Sequence[dict[str, Any]]) -> str:
    """Return all tables, and what was reached."""
    parts, slow = [], slow_baselines(rows)
    named = {
        "line": "One cluster, and slotted in the deterministic class", "peers": "The same job by peers",
        "busy": "Ranks that keep the processor busy",
    }  # fmt: skip
    for part, heading in named.items():
        for case in dict.fromkeys(row.case for row in rows if row.part == part):
            same = [row for row in rows if row.case == case]
            parts.append(f"### {heading}{'' if part == 'line' else f': {case}'}\n\n{table(same)}")
            if case in slow:
                parts.append(
                    f"The single cluster took {slow[case]:.2f} times its own arithmetic; the efficiency says little."
                )
    if any(row.part == "gains" for row in rows):
        parts.insert(1, f"### What each means gains\n\n{gains_table(rows)}")
    verdicts = [f"- {one['goal']}: {one['reached']:.4g}{'' if one['met'] else ', MISSED'}" for one in reached]
    return "\n\n".join([*parts, *(["\n".join(verdicts)] if verdicts else [])]) + "\n"


def picture(rows: Sequence[Row]) -> str:
    """Return an SVG: efficiency with its spread, and the time of each iteration of the part ``line``."""
    slow = slow_baselines(rows)
    measured = [row for row in rows if row.iteration_s is not None and row.is_wide and row.case not in slow]
    bars = [
        Bar(_label(row), row.efficiency or 0.0, percent(row.efficiency or 0.0), PARTS.index(row.part) + 1,
            *(row.efficiency_spread or (None, None)))
        for row in measured
    ]  # fmt: skip
    axis = Axis("share of the single cluster's speed; whiskers: single iterations", lambda value: percent(value, 0),
                includes=(1.0,))  # fmt: skip
    charts = [bar_chart(bars, axis, "Efficiency of each run", WIDTH, mark=1.0, mark_label="one cluster")]
    line = [row for row in rows if row.part == "line" and row.iteration_s is not None]
    curves = [
        Curve(_label(row), tuple((float(number), time_s) for number, time_s in enumerate(row.iteration_s.samples, 1)),
              index)
        for index, row in enumerate(line)
        if row.iteration_s is not None
    ]  # fmt: skip
    if curves:
        time = Axis("time of an iteration, s", lambda value: f"{value:.3g}")
        charts.append(curve_chart(curves, Axis("iteration", lambda value: f"{value:.0f}"), time,
                                  "Time of each iteration", WIDTH))  # fmt: skip
    return svg_text(_stacked(charts))


def _label(row: Row) -> str:
    if not row.is_wide:
        return row.name
    service = "reserved" if row.service == "deterministic" else "ordinary"
    bucket, others = format_bytes(row.bucket_bytes), percent(row.cross_traffic, 0)
    if row.part == "gains":
        return f"{'all, ' if row.name == 'slotted' else ''}{row.name.removeprefix('slotted ')}, {bucket}"
    if row.part == "busy":
        return f"{row.case.partition(' ranks')[0]}, {row.case.rpartition(' ')[2]}, others {others}"
    return f"{row.name}, {service}, others {others}, {bucket}"


def _stacked(charts: Sequence[Any]) -> Any:
    """Return one picture with charts below each other."""
    placed, top = [], 0.0
    for chart in charts:
        height = float(chart.attrib["viewBox"].split()[3])
        place = {"y": f"{top:.0f}", "width": f"{WIDTH:.0f}", "height": f"{height:.0f}", "class": ""}
        chart.attrib.update(place)
        placed.append(chart)
        top += height + 32
    box = {"viewBox": f"0 0 {WIDTH:.0f} {top:.0f}", "role": "img", "class": "picture"}
    told = element("desc", None, "Efficiency of each run, and the time of each iteration")
    return element("svg", box, element("title", None, "Training under load"), told, *placed)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas, or none")
    parser.add_argument(
        "--iterations", type=int, default=100, help="of slotted and the single cluster, in the part line"
    )
    parser.add_argument("--rounds", type=int, default=4, help="commands that share them")
    parser.add_argument("--few-iterations", type=int, default=8, help="in all other parts")
    parser.add_argument("--deadline", default="75 s", help="of each setting in best effort beside others")
    parser.add_argument("--compute", default="1.6 s")
    parser.add_argument("--gradient-bytes", default="16MiB")
    parser.add_argument("--bucket-bytes", default="256KiB")
    parser.add_argument("--rate", default="250 Mbit/s", help="of each site's line; four fifths are reserved")
    parser.add_argument("--under", default="", help="what each command is started with, such as 'taskset -c 0,1'")
    given = parser.parse_args(argv)
    given.only = list(comma_separated(given.only))
    if unknown := sorted(set(given.only) - set(PARTS)):
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(PARTS)}")
    if given.rounds < 1 or given.iterations < given.rounds or given.few_iterations < 1:
        parser.error("--iterations must be at least --rounds, and both and --few-iterations at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the tables, write the files; 1 where a command gave nothing."""
    given = _arguments(argv)
    if (reason := obtain(may_restart=argv is None)) is not None:
        sys.exit(f"the lab cannot be opened: {reason}")
    results = kept(given.json, given.only)
    with ended_by_signals():
        for case in cases(given):
            print(f"{case.name}: {shlex.join(case.argv[4:])}", file=sys.stderr, flush=True)
            results.append(run(case, shlex.split(given.under)))
    results.sort(key=lambda result: PARTS.index(result["part"]))
    rows = rows_of(results)
    reached = goals(rows, all(result.get("digests_equal") for result in results if result["part"] == "line"))
    shown = markdown(rows, reached)
    print(shown)
    failed = [result for result in results if "error" in result]
    for result in failed:
        print(f"{result['name']} failed: {result['error']}", file=sys.stderr)
    if given.json is not None:
        facts = {"schema": SCHEMA, "host": host_facts(), "goals": reached, "rows": [asdict(row) for row in rows],
                 "cases": results}  # fmt: skip
        given.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if given.markdown is not None:
        given.markdown.write_text(shown, encoding="utf-8")
    if given.picture is not None:
        given.picture.write_text(picture(rows), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
