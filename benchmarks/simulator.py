"""Holds the simulator against the lab, and its coarse steps against fine ones; writes JSON.

    python benchmarks/simulator.py --json simulator.json            # the lab; needs Linux
    python benchmarks/simulator.py --scale --json scale.json        # large worlds, virtual time alone

Each case of the lab is one command, `detcoll bench --lab`, and the same plans, calendar and costs in the simulator. The
costs are those that predictions of that run use. The simulator knows no TCP: a line whose round trip holds more than
TCP's buffers is faster in it. On a busy machine the median is the scheduler's as well, hence the error of the minimum.
``--only`` takes the cases whose name contains it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detcoll.emulation.lab import obtain
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.host import host_facts
from detcoll.plan import ChunkSize, Collective, Costs, Planner, Slotting, compile_plan
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s, parse_size_bytes
from detcoll.scenarios import load
from detcoll.scenarios.buckets import Buckets, default_calendar, taken_together
from detcoll.scenarios.study import study
from detcoll.sim import simulate
from detcoll.topology import Topology

DEADLINE_S = 300
GOAL = 0.05
PHASES = 8
"""Of a calendar with windows, over which the simulator's time is the mean."""


@dataclass(frozen=True, slots=True)
class Case:
    """One collective in the lab."""

    sites: int
    ranks: int
    rate: str
    round_trip: str
    size: str
    slotting: str | None = None

    @property
    def name(self) -> str:
        """What the case is, in a few words."""
        how = f", {self.slotting}" if self.slotting else ""
        return f"{self.sites} x {self.ranks}, {self.rate}, {self.round_trip}, {self.size}{how}"

    def arguments(self, iterations: int) -> list[str]:
        """Return the options of `detcoll bench`."""
        chosen = ["--slotting", self.slotting] if self.slotting else []
        return [
            "--lab", "--sites", str(self.sites), "--ranks-per-site", str(self.ranks), "--rate", self.rate,
            "--round-trip", self.round_trip, "--bytes", self.size, "--iterations", str(iterations), "--warmup", "2",
            *chosen,
        ]  # fmt: skip


CASES = (
    Case(2, 1, "50 Mbit/s", "20 ms", "4MiB"),
    Case(2, 1, "200 Mbit/s", "10 ms", "8MiB"),
    Case(2, 1, "250 Mbit/s", "60 ms", "32MiB"),
    Case(2, 1, "500 Mbit/s", "80 ms", "32MiB"),
    Case(2, 2, "100 Mbit/s", "40 ms", "8MiB"),
    Case(2, 2, "500 Mbit/s", "20 ms", "32MiB"),
    Case(3, 1, "100 Mbit/s", "20 ms", "8MiB"),
    Case(3, 1, "250 Mbit/s", "40 ms", "16MiB"),
    Case(4, 1, "100 Mbit/s", "20 ms", "8MiB"),
    Case(4, 1, "200 Mbit/s", "60 ms", "16MiB"),
    Case(4, 1, "100 Mbit/s", "20 ms", "16MiB", "calendar"),
)


def simulated_s(case: Case) -> float:
    """Return what the simulator gives for a case, by the plans and the calendar of that run."""
    topology = Topology.uniform(
        case.sites, case.ranks, parse_rate_bytes_per_s(case.rate), parse_duration_ns(case.round_trip) // 2
    )
    mode = None if case.slotting is None else Slotting.parse(case.slotting)
    calendar = default_calendar(topology, mode)
    collective = Collective("all_reduce", parse_size_bytes(case.size) // 4, 4, 4)
    costs = Costs.on_host(topology.size, len(os.sched_getaffinity(0)))
    plans = [Planner(topology, rank, calendar, costs).plan(collective) for rank in range(topology.size)]
    cycle_ns = calendar.sites[0].cycle_ns
    phases = [cycle_ns * phase // PHASES for phase in range(PHASES)] if calendar.has_windows else [0]

    def late_ns(rank: int, opens_ns: int) -> int:
        return costs.late_ns

    ends = [simulate(plans, topology, calendar, costs, phase_ns=phase, lateness=late_ns).slowest_ns for phase in phases]
    return sum(ends) / len(ends) / 1e9


def measured(case: Case, folder: Path, iterations: int) -> dict[str, Any]:
    """Run a case in the lab and return its command and its row."""
    path = folder / "row.json"
    path.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "detcoll", "bench", *case.arguments(iterations), "--json", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=folder)
    command = shlex.join(["python", *argv[1:-2]])
    if not path.exists():
        return {"command": command, "error": done.stderr[-1000:]}
    return {"command": command, "row": json.loads(path.read_bytes())["rows"][0]}


def run_cases(only: str, iterations: int) -> list[dict[str, Any]]:
    """Return all cases, measured and simulated."""
    results = []
    with tempfile.TemporaryDirectory(prefix="detcoll-simulator-") as name:
        for case in CASES:
            if only not in case.name:
                continue
            print(case.name, file=sys.stderr, flush=True)
            result = {"name": case.name, "simulated_s": simulated_s(case)} | measured(case, Path(name), iterations)
            if "row" in result:
                result["measured_s"] = result["row"]["median_s"]
                result["error_of_measured"] = result["simulated_s"] / result["measured_s"] - 1
            results.append(result)
    return results


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print the cases as Markdown."""
    print(
        "| case | measured (median, min .. max) | simulated | error | error of min |\n| --- | --- | --- | --- | --- |"
    )
    for result in results:
        if "row" not in result:
            print(f"| {result['name']} | failed | {result['simulated_s'] * 1e3:.1f} ms | | |")
            continue
        row = result["row"]
        spread = f"{row['median_s'] * 1e3:.1f} ms ({row['min_s'] * 1e3:.1f} .. {row['max_s'] * 1e3:.1f})"
        error = result["error_of_measured"]
        missed = "" if abs(error) <= GOAL else " (beyond the goal)"
        least = result["simulated_s"] / row["min_s"] - 1
        simulated = f"{result['simulated_s'] * 1e3:.1f} ms"
        print(f"| {result['name']} | {spread} | {simulated} | {error:+.1%}{missed} | {least:+.1%} |")


def scale() -> dict[str, Any]:
    """Return what 40 sites of 8 ranks cost, and how coarse chunks and few buckets compare with fine and many."""
    scenario = load("forty-cities")
    full = Buckets(scenario.work, scenario.reserved, scenario.costs)
    calendar = default_calendar(scenario.reserved)
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    end_ns = full.end_ns(2, scenario.reserved, calendar)
    steps = sum(len(plan.steps) for plan in full.plans(2))
    one = {
        "ranks": scenario.lines.size, "steps": steps, "end_s": end_ns / 1e9,
        "wall_s": time.perf_counter() - begin_s, "cpu_s": time.process_time() - cpu_s, "peak_bytes": _peak_bytes(),
    }  # fmt: skip
    print(f"two buckets, every rank: {one}", flush=True)
    chunks = [_with_chunks(rounds) for rounds in (1, 2, 4)]
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    whole = study(scenario)
    cost = {"wall_s": time.perf_counter() - begin_s, "cpu_s": time.process_time() - cpu_s, "peak_bytes": _peak_bytes()}
    print(f"the whole study: {cost}; ranks taken together differ by {whole.together_error:+.3%}", flush=True)
    return {"two_buckets": one, "chunks": chunks, "study": cost, "together_error": whole.together_error}


def _with_chunks(rounds: int) -> dict[str, Any]:
    """Return when 1, 2, 3, 4 and 8 buckets in a row end, with so many chunks a home; ranks taken together."""
    scenario = load("forty-cities")
    topology = taken_together(scenario.reserved)
    calendar = default_calendar(topology)
    costs = Costs(copy_bytes_per_s=scenario.costs.copy_bytes_per_s * 8, step_ns=scenario.costs.step_ns, late_ns=0)
    bucket, sites = scenario.work.bucket(), len(topology.sites)
    chunk = ChunkSize(-(-bucket.count // (sites * rounds)), 3 * sites * rounds)
    ends = {}
    for number in (1, 2, 3, 4, 8):
        collective = scenario.work.bucket(number)
        plans = [compile_plan(collective, topology, rank, "direct", chunk) for rank in range(topology.size)]
        ends[str(number)] = simulate(plans, topology, calendar, costs, fluid=True).slowest_ns / 1e9
    found = {"chunks_a_home": rounds, "end_s_of_buckets": ends}
    print(f"coarse and fine: {found}", flush=True)
    return found


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run what is asked for and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--scale", action="store_true", help="large worlds instead of the lab")
    given = parser.parse_args()
    wrote: dict[str, Any] = {"schema": "detcoll.simulator/1", "host": host_facts()}
    if given.scale:
        wrote["scale"] = scale()
    else:
        if (reason := obtain()) is not None:
            sys.exit(f"the lab cannot be opened: {reason}")
        with ended_by_signals():
            wrote["cases"] = run_cases(given.only, given.iterations)
        show(wrote["cases"])
    if given.json is not None:
        given.json.write_text(json.dumps(wrote, indent=1), encoding="utf-8")
    sys.exit(1 if any("error" in case for case in wrote.get("cases", ())) else 0)


if __name__ == "__main__":
    main()
