"""Measures what others' traffic does to an all-reduce across sites, on a reserved path and on an ordinary one.

    python benchmarks/interference.py --json interference.json --plot interference.svg --markdown interference.md

The same bytes, 2 sites of 2 ranks, with others who offer each line nothing, half of it, all of it and twice that, for
each transport in both classes of the lab (`docs/lab.md`): deterministic, where the router's rule puts whatever ranks
send, and best effort. `docs/interference.md` tells the method and what it cannot show. Needs Linux.

Every cell is a command of detcoll's own that anybody can run alone; the file holds it. Cells take turns in rounds, the
second in the opposite order, so that a busy minute does not fall on one of them. A cell that fails or is not done
within ``--deadline`` is shown with its reason and not tried again; one in which calls take longer than
``--time-limit`` is measured in the first round alone.

Then a co-tenant with a light load: it offers ``--light`` of each line and sends its small packets while slotted runs in
the deterministic class, and while nobody runs.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detcoll.draw import Axis, Curve, curve_chart, svg_text
from detcoll.emulation.lab import obtain
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.host import host_facts
from detcoll.measure.statistics import tails
from detcoll.plan import build_calendar
from detcoll.quantities import format_rate, parse_duration_ns, parse_rate_bytes_per_s, parse_size_bytes
from detcoll.topology import Topology

SITES, RANKS_PER_SITE = 2, 2
DETERMINISTIC, BEST_EFFORT = "deterministic", "best-effort"
SLOTTED = "slotted"
RESERVED_SHARE = 0.8
FULL_LINE = 1.0
LARGEST_CHANGE, LARGEST_JITTER = 0.01, 0.02
SETUP_S = 300
"""Beyond the deadline of a cell's ranks: what a command that hangs is given before it is ended."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One transport in one class beside others who offer ``cross_traffic`` of each line.

    ``transport`` None: nobody runs, and only the co-tenant is there.
    """

    transport: str | None
    service: str
    cross_traffic: float

    @property
    def name(self) -> str:
        """What the cell is, in a few words."""
        return f"{self.transport or 'nobody'}, {self.service}, others {self.cross_traffic:.0%}"

    def argv(self, given: argparse.Namespace, path: Path) -> list[str]:
        """Return the command that measures this cell and writes ``path``."""
        lines = ["--sites", str(SITES), "--ranks-per-site", str(RANKS_PER_SITE), "--rate", given.rate, "--round-trip",
                 given.round_trip, "--service", self.service, "--cross-traffic", f"{self.cross_traffic:g}"]  # fmt: skip
        if self.service == DETERMINISTIC:
            lines += ["--reserved", given.reserved]
        python = [sys.executable, "-m", "detcoll"]
        if self.transport is None:
            seconds = parse_duration_ns(given.time_limit, "time_limit") / 1e9
            return [*python, "lab", *lines, "--statistics", str(path), "--", "sleep", f"{seconds:g}"]
        # Where the line is full already, a call takes so long that its first round trips do not show.
        is_slow = self.service == BEST_EFFORT and self.cross_traffic >= FULL_LINE
        return [
            *python, "bench", "--lab", *lines, "--bytes", given.bytes, "--transport", self.transport, "--iterations",
            str(given.iterations), "--warmup", "0" if is_slow else "1", "--time-limit", given.time_limit, "--deadline",
            given.deadline, "--json", str(path),
        ]  # fmt: skip


@dataclass(slots=True)
class Seen:
    """What the rounds of a cell gave; ``failed`` is the reason why one did not end."""

    cell: Cell
    command: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    probes_s: list[list[float]] = field(default_factory=list)
    failed: str | None = None

    def figures(self, nbytes: int) -> dict[str, Any]:
        """Return the cell as it stands in the file: of calls over all rounds, of co-tenants the median of the rounds'.

        Throughput is the bytes of the array, which each site sends once, over the time of a call.
        """
        found: dict[str, Any] = {
            "transport": self.cell.transport, "service": self.cell.service, "cross_traffic": self.cell.cross_traffic,
            "command": self.command, "failed": self.failed, "rounds": len(self.rows) or len(self.probes_s),
        }  # fmt: skip
        if self.probes_s:
            each = [tails(probes) for probes in self.probes_s]
            found |= _co_tenant([(one.median, one.p99) for one in each], sum(len(probes) for probes in self.probes_s))
        if not self.rows:
            return found
        seen = tails([sample for row in self.rows for sample in row["samples_s"]])
        tenants = [tenant for row in self.rows if (tenant := row["co_tenant"]) is not None]
        counted = sum(tenant["counted"] for tenant in tenants)
        return found | _co_tenant([(tenant["median_s"], tenant["p99_s"]) for tenant in tenants], counted) | {
            "calls": sum(row["iterations"] for row in self.rows),
            "throughput_bits_per_s": 8 * nbytes / seen.median,
            "median_s": seen.median, "p99_s": seen.p99, "min_s": seen.least, "max_s": seen.greatest,
            "jitter": (seen.greatest - seen.least) / seen.median,
            "round_medians_s": [row["median_s"] for row in self.rows],
            "bound_s": self.rows[0]["bound_s"], "fraction_of_bound": self.rows[0]["bound_s"] / seen.median,
            "retransmits": _total([row["retransmits"] for row in self.rows]),
            "slot_misses": _total([row["slot_misses"] for row in self.rows]),
            "policed_segments": sum(line["policed_segments"] for line in self.lines),
            "queue_dropped_segments": sum(line["queue_dropped_segments"] for line in self.lines),
            "router_late_s": max(line["router_late_s"] for line in self.lines),
            "router_cpu_share": max(line["router_cpu_share"] for line in self.lines),
            "samples_s": [row["samples_s"] for row in self.rows],
        }  # fmt: skip

    def goes_on(self, time_limit_s: float) -> bool:
        """Tell whether another round is worth its time."""
        return self.failed is None and all(row["median_s"] < time_limit_s for row in self.rows)


def _co_tenant(each: Sequence[tuple[float, float]], counted: int) -> dict[str, Any]:
    medians, p99s = zip(*each, strict=True) if each else ((), ())
    return {
        "co_tenant_median_s": float(np.median(medians)) if medians else None,
        "co_tenant_p99_s": float(np.median(p99s)) if p99s else None,
        "co_tenant_p99_of_rounds_s": list(p99s), "co_tenant_packets": counted,
    }  # fmt: skip


def _total(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)


def cells(given: argparse.Namespace) -> list[Cell]:
    """Return all cells; those that are compared with each other stand side by side."""
    found = [
        Cell(transport, service, share)
        for transport in given.transports
        for service in (DETERMINISTIC, BEST_EFFORT)
        for share in given.cross_traffic
    ]
    light = [Cell(SLOTTED, DETERMINISTIC, share) for share in given.light if SLOTTED in given.transports]
    idle = [Cell(None, DETERMINISTIC, share) for share in given.light]
    return [cell for pair in zip(idle, light, strict=False) for cell in pair if cell not in found] + found


def measure(cell: Cell, seen: Seen, given: argparse.Namespace, folder: Path) -> None:
    """Run a cell once more and add what it gave, or why it did not."""
    path = folder / "seen.json"
    path.unlink(missing_ok=True)
    argv = cell.argv(given, path)
    seen.command = shlex.join(["python" if word == sys.executable else "seen.json" if word == str(path) else word
                               for word in argv])  # fmt: skip
    patience_s = parse_duration_ns(given.deadline, "deadline") / 1e9 + SETUP_S
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=patience_s, check=False, cwd=folder)
    except subprocess.TimeoutExpired:
        seen.failed = f"the command did not end within {patience_s:g} s"
        return
    if not path.exists():
        seen.failed = _reason(done.stderr, done.returncode)
        return
    wrote = json.loads(path.read_bytes())
    if cell.transport is None:
        seen.probes_s.append([took_ns / 1e9 for took_ns in wrote["probe"]["round_trip_ns"]])
    else:
        seen.rows += wrote["rows"]
        seen.lines += [line["use"] for line in wrote["lines"]]


def _reason(stderr: str, code: int) -> str:
    """Return what a command says of its failure: its own last line, and the error of a rank if one says more."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    own = [line.removeprefix("detcoll: ") for line in lines if line.startswith("detcoll: ")]
    ranks = [line for line in own if re.match(r"\w+ in .*, line \d+: ", line)]
    told = own[-1] if own else f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"
    return f"{told} ({ranks[0]})" if ranks and ranks[0] != told else told


def run_all(given: argparse.Namespace) -> list[Seen]:
    """Run every cell in rounds, forwards and backwards in turn."""
    seen = [Seen(cell) for cell in cells(given)]
    time_limit_s = parse_duration_ns(given.time_limit, "time_limit") / 1e9
    with tempfile.TemporaryDirectory(prefix="detcoll-interference-") as name:
        for number in range(given.rounds):
            for one in seen if number % 2 == 0 else reversed(seen):
                if one.goes_on(time_limit_s):
                    print(f"round {number + 1} of {given.rounds}: {one.cell.name}", file=sys.stderr, flush=True)
                    measure(one.cell, one, given, Path(name))
                    if one.failed:
                        print(f"{one.cell.name} failed: {one.failed}", file=sys.stderr, flush=True)
    return seen


def acceptance(found: Sequence[dict[str, Any]], window_s: float) -> list[dict[str, Any]]:
    """Return what was promised of slotted in the deterministic class, and whether the figures bear it out."""
    own = {cell["cross_traffic"]: cell for cell in found
           if (cell["transport"], cell["service"]) == (SLOTTED, DETERMINISTIC) and "median_s" in cell}  # fmt: skip
    idle = {cell["cross_traffic"]: cell for cell in found if cell["transport"] is None and not cell["failed"]}
    lines = []
    for share in own:
        if 0 in own and share >= FULL_LINE:
            change = own[share]["throughput_bits_per_s"] / own[0]["throughput_bits_per_s"] - 1
            lines.append({
                "claim": f"others at {share:.0%} change slotted's reserved throughput by at most {LARGEST_CHANGE:.0%}",
                "figure": f"{change:+.2%}", "holds": abs(change) <= LARGEST_CHANGE,
            })  # fmt: skip
            jitter = own[share]["jitter"]
            lines.append({
                "claim": f"beside others at {share:.0%} slotted's jitter is at most {LARGEST_JITTER:.0%}",
                "figure": f"{jitter:.2%}", "holds": jitter <= LARGEST_JITTER,
            })  # fmt: skip
        if share in idle and own[share]["co_tenant_p99_s"] is not None:
            more_s = own[share]["co_tenant_p99_s"] - idle[share]["co_tenant_p99_s"]
            lines.append({
                "claim": f"a co-tenant that offers {share:.0%} waits at most one window, {window_s * 1e3:g} ms, longer "
                         "(p99)",
                "figure": f"{more_s * 1e3:+.2f} ms", "holds": more_s <= window_s,
            })  # fmt: skip
    return lines


def markdown(wrote: dict[str, Any]) -> str:
    """Return the tables of the file as Markdown."""
    lines = [
        "| transport | class | others | throughput | median | p99 | jitter | of the floor | resent | misses | "
        "co-tenant's p99 | calls |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(cell) for cell in wrote["cells"] if cell["transport"] and not _is_light(cell, wrote)]
    lines += [
        "", "| co-tenant offers | nobody runs, median | p99 | slotted runs, median | p99 | longer by | packets |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [_tenant_row(cell, wrote["cells"]) for cell in wrote["cells"] if cell["transport"] is None]
    lines += ["", "| line | measured | |", "| --- | --- | --- |"]
    lines += [
        f"| {one['claim']} | {one['figure']} | {'holds' if one['holds'] else '**does not hold**'} |"
        for one in wrote["acceptance"]
    ]
    return "\n".join(lines) + "\n"


def _is_light(cell: dict[str, Any], wrote: dict[str, Any]) -> bool:
    return cell["cross_traffic"] not in wrote["settings"]["cross_traffic"]


def _row(cell: dict[str, Any]) -> str:
    head = f"| {cell['transport']} | {cell['service']} | {cell['cross_traffic']:.0%} |"
    if "median_s" not in cell:
        return f"{head} failed: {cell['failed']} | | | | | | | | |"
    tail = f" (then failed: {cell['failed']})" if cell["failed"] else ""
    values = (
        f"{cell['throughput_bits_per_s'] / 1e6:.1f} Mbit/s{tail}", _ms(cell["median_s"]), _ms(cell["p99_s"]),
        f"{cell['jitter']:.2%}" if cell["calls"] > 1 else "-", f"{cell['fraction_of_bound']:.1%}",
        _count(cell["retransmits"]), _count(cell["slot_misses"]), _ms(cell["co_tenant_p99_s"]), str(cell["calls"]),
    )  # fmt: skip
    return f"{head} {' | '.join(values)} |"


def _tenant_row(idle: dict[str, Any], found: Sequence[dict[str, Any]]) -> str:
    share = idle["cross_traffic"]
    own = (SLOTTED, DETERMINISTIC, share)
    busy = [cell for cell in found if (cell["transport"], cell["service"], cell["cross_traffic"]) == own]
    values = [idle.get("co_tenant_median_s"), idle.get("co_tenant_p99_s")]
    values += [busy[0].get("co_tenant_median_s"), busy[0].get("co_tenant_p99_s")] if busy else [None, None]
    longer = values[3] - values[1] if None not in (values[1], values[3]) else None
    packets = f"{idle.get('co_tenant_packets', 0)}, {busy[0].get('co_tenant_packets', 0) if busy else 0}"
    why = "".join(f" failed: {cell['failed']}" for cell in (idle, *busy) if cell["failed"])
    return f"| {share:.0%} of the line{why} | {' | '.join(_ms(value, 2) for value in (*values, longer))} | {packets} |"


def _ms(value_s: float | None, digits: int = 1) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.{digits}f} ms"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def plot(wrote: dict[str, Any]) -> str:
    """Return an SVG: throughput of each transport in each class over what others offer; a failed cell lies at zero."""
    settings, curves = wrote["settings"], []
    order = [(transport, service) for service in (DETERMINISTIC, BEST_EFFORT) for transport in settings["transports"]]
    for index, (transport, service) in enumerate(order):
        own = sorted((cell for cell in wrote["cells"] if not _is_light(cell, wrote)
                      and (cell["transport"], cell["service"]) == (transport, service)),
                     key=lambda cell: cell["cross_traffic"])  # fmt: skip
        failed = [f"{cell['cross_traffic']:.0%}" for cell in own if "median_s" not in cell]
        label = f"{transport}, {service}" + (f" (failed at {', '.join(failed)})" if failed else "")
        points = tuple((cell["cross_traffic"], cell.get("throughput_bits_per_s", 0.0) / 1e6) for cell in own)
        megabits = 8 * settings["bytes"] / 1e6
        ranges = tuple((megabits / cell["max_s"], megabits / cell["min_s"]) if "median_s" in cell else (0.0, 0.0)
                       for cell in own)  # fmt: skip
        # The first colour is the grey, and the last transport of best effort gets it.
        curves.append(Curve(label, points, (index + 1) % len(order), ranges, has_markers=True))
    shares = tuple(settings["cross_traffic"])
    title = (
        f"All-reduce of {settings['bytes']:,} bytes, lines of {format_rate(settings['rate_bytes_per_s'])}, "
        f"{format_rate(settings['reserved_bytes_per_s'])} of it reserved for the deterministic class"
    )
    x_axis = Axis("others offer, share of the line", lambda share: f"{share:.0%}", ticks=shares)
    return svg_text(curve_chart(curves, x_axis, Axis("throughput, Mbit/s", lambda value: f"{value:g}"), title, 860))


def _shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--json", "--plot", "--markdown"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rate", default="250 Mbit/s", help="of each site's line")
    parser.add_argument("--reserved", help="for the deterministic class; four fifths of the line unless given")
    parser.add_argument("--round-trip", default="20 ms")
    parser.add_argument("--bytes", default="16MiB")
    parser.add_argument("--iterations", type=int, default=8, help="timed calls a round, at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--time-limit", default="5 s", help="no call of a round begins after this")
    parser.add_argument("--deadline", default="45 s", help="of a cell's ranks, their start included")
    parser.add_argument("--transports", type=lambda text: text.split(","), default=[SLOTTED, "gloo", "mpi"])
    parser.add_argument("--cross-traffic", type=_shares, default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--light", type=_shares, default=[0.0, 0.05, 0.1], help="what a light co-tenant offers")
    given = parser.parse_args(argv)
    if given.reserved is None:
        given.reserved = f"{RESERVED_SHARE * 8e-6 * parse_rate_bytes_per_s(given.rate):g} Mbit/s"
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cells, print the tables, write the files; 1 if slotted failed in the deterministic class."""
    given = _arguments(argv)
    if (reason := obtain(may_restart=argv is None)) is not None:
        sys.exit(f"the lab cannot be opened: {reason}")
    begin_s, nbytes = time.monotonic(), parse_size_bytes(given.bytes, "bytes")
    rate, reserved = parse_rate_bytes_per_s(given.rate), parse_rate_bytes_per_s(given.reserved, "reserved")
    one_way_ns = parse_duration_ns(given.round_trip, "round_trip") // 2
    lines = Topology.uniform(SITES, RANKS_PER_SITE, rate, one_way_ns).with_reserved(reserved)
    window_s = build_calendar(lines.granted).sites[0].cycle_ns / 1e9
    with ended_by_signals():
        found = [one.figures(nbytes) for one in run_all(given)]
    settings = {
        "bytes": nbytes, "rate_bytes_per_s": rate, "reserved_bytes_per_s": reserved, "round_trip": given.round_trip,
        "iterations": given.iterations, "rounds": given.rounds, "time_limit": given.time_limit,
        "deadline": given.deadline, "transports": given.transports, "cross_traffic": given.cross_traffic,
        "light": given.light, "window_s": window_s,
    }  # fmt: skip
    command = shlex.join(["python", "benchmarks/interference.py", *(sys.argv[1:] if argv is None else argv)])
    wrote: dict[str, Any] = {
        "schema": "detcoll.interference/1", "command": command, "host": host_facts(), "settings": settings,
        "elapsed_s": time.monotonic() - begin_s, "acceptance": acceptance(found, window_s), "cells": found,
    }  # fmt: skip
    print(markdown(wrote))
    for path, text in ((given.json, json.dumps(wrote, indent=1)), (given.plot, plot(wrote)),
                       (given.markdown, markdown(wrote))):  # fmt: skip
        if path is not None:
            path.write_text(text, encoding="utf-8")
    return int(any(cell["failed"] and (cell["transport"], cell["service"]) == (SLOTTED, DETERMINISTIC)
                   for cell in found))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
