"""Checks and measures detcoll on one CUDA device: one command, at most six minutes.

    python benchmarks/gpu.py --json gpu.json

- ``tests``: ``pytest -m gpu``.
- ``one host``: two ranks on one device, all-reduces of 4 KiB to 256 MiB, arrays of torch and of CuPy, in turns with
  detcoll on arrays of the host and with Gloo on tensors of torch on the device. Also how much memory of the device, and
  pinned memory of the host, the first calls take.
- ``lab``: two sites of a rank, lines of 1 Gbit/s, 20 ms there and back, in turns with arrays of the host.
- ``veth``: 64 MiB between two network namespaces at 10 Gbit/s, in turns with arrays of the host. Needs root.
- ``training``: DDP over detcoll on the device across two emulated sites, whose parameters must equal those of the same
  training in one cluster, bit for bit, and its efficiency: one cluster's time over theirs. The model has a gradient of
  32 MiB, which a line carries in 0.28 s, and the first run finds the batch with which an iteration takes some 0.5 s.

A time is the median over all calls, a ratio the median over rounds of the ratio of medians. Every result is checked.
Each step has a time limit, and one that fails does not end the others. What cannot run says "not run" and why. The exit
code is 1 if a step failed or a result was wrong; a goal that is not reached is no failure.

``--device double`` tries all of this on a double of CUDA with tiny sizes: its figures mean nothing. Needs Linux, and
``pip install -e ".[dev,torch,measure]"`` with torch for CUDA, or CuPy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fast_lines
from gpu_ranks import CUPY, DOUBLE, GLOO, HOST, TORCH, Task

from detcoll.emulation.lab import Conditions, Lab, obtain
from detcoll.errors import DetcollError
from detcoll.launch.processes import ended_by_signals
from detcoll.launch.ranks import run_crew
from detcoll.marks import MARKS_VARIABLE
from detcoll.measure.aggregate import Setting, marked_span_ns, marked_times_s
from detcoll.measure.host import host_facts
from detcoll.measure.limits import limits_of_row, scale_of
from detcoll.measure.load import Watch, load_of
from detcoll.measure.records import read_marks
from detcoll.measure.results import SINGLE_CLUSTER, WIDE_AREA, Limit
from detcoll.measure.runner import Runner
from detcoll.quantities import format_bytes, parse_rate_bytes_per_s
from detcoll.topology import Topology

SCHEMA = "detcoll.gpu/1"
ROOT = Path(__file__).resolve().parent.parent
TOTAL_S, FACTS_S = 360.0, 60.0
LARGEST_WORKERS = 4
"""How many tests run at once, where there are enough processors."""
PATIENCE = 5
"""On the double nothing is measured, so all may take so many times as long: a machine that runs tests may be busy."""
KIB, MIB = 2**10, 2**20
ROUND_TRIP_NS = 20_000_000
LAB_RATE, VETH_RATE = "1 Gbit/s", "10 Gbit/s"
WAYS_OF_TRAINING = ("cluster", "sites")
MOST_DEVICE_BYTES, MOST_PINNED_BYTES = 64 * MIB, 256 * MIB
SETTLED = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
}  # fmt: skip
"""What ranks are told: sums of torch repeat their bits, and all share one device, also where there are several."""


class NotRun(Exception):
    """Why a step, or a part of it, cannot be run here."""


class Failed(Exception):
    """Why a step failed."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table. ``reached`` : whether the goal was; None where there is none, or nothing was measured."""

    what: str
    found: str
    goal: str = ""
    reached: bool | None = None
    ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What every step is told: the facts, the libraries to measure, seconds it may take, and a folder of its own."""

    facts: dict[str, Any]
    libraries: tuple[str, ...]
    limit_s: float
    folder: Path
    rows: list[dict[str, Any]]

    @property
    def is_dry(self) -> bool:
        return self.libraries == (DOUBLE,)

    def task(self, library: str, sizes: dict[int, int], rounds: int, **more: Any) -> Task:
        """Return a task for ranks; tiny on the double."""
        if self.is_dry:
            sizes, rounds = {16 * KIB: 2, 64 * KIB: 2}, 2
            more |= {"timeout_s": 30 * PATIENCE}
        folder = self.folder / library
        folder.mkdir()
        return Task(str(folder), library, sizes=tuple(sizes), calls=tuple(sizes.values()), rounds=rounds, **more)


def run_tests(call: Call) -> list[Line]:
    """Run the tests that need a device."""
    if not (ROOT / "tests").is_dir():
        raise NotRun("the tests are not installed")
    report, log = call.folder / "report.xml", call.folder / "pytest.log"
    what = "tests/test_bench_device.py" if call.is_dry else "tests"
    argv = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", what]
    workers = min(LARGEST_WORKERS, (os.cpu_count() or 1) // 4)  # each test has a few ranks
    if workers > 1 and find_spec("xdist"):
        argv += ["-n", str(workers), "-p", "no:benchmark"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with log.open("wb") as out:
        ran = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        ran.wait(call.limit_s)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"the tests were not done within {call.limit_s:.0f} s") from error
    finally:
        if ran.poll() is None:
            os.killpg(ran.pid, signal.SIGKILL)
            ran.wait()
    if not report.exists():
        raise Failed(f"pytest ended with exit code {ran.returncode}: {log.read_text()[-300:]}")
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    count, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    wrong = [case.get("name", "?") for case in suite.iter("testcase") if {e.tag for e in case} & {"failure", "error"}]
    if wrong:
        print(log.read_text(), file=sys.stderr)
        raise Failed(f"{len(wrong)} of {count} tests failed: {', '.join(wrong[:5])}")
    if count == skipped:
        raise NotRun(f"all {count} tests were skipped; pytest -m gpu -rs says why")
    return [Line("pytest -m gpu", f"{count - skipped} passed, {skipped} skipped", "all pass", True)]


def run_one_host(call: Call, library: str) -> list[Line]:
    """Compare with arrays of the host and with Gloo, on two ranks of this host."""
    small = {4 * KIB: 60, 16 * KIB: 100, 64 * KIB: 60, 256 * KIB: 40, MIB: 30}
    sizes = small | {4 * MIB: 20, 64 * MIB: 5, 256 * MIB: 2}
    beside_gloo = not call.is_dry and call.facts["torch_lacks"] is None
    task = call.task(library, sizes, 3, beside_gloo=beside_gloo)
    setting = Setting("one host", "shm", SINGLE_CLUSTER)
    _run(Runner(Topology.single_site(2), call.limit_s), setting, task, dict(SETTLED))
    rows, memory = _read(call, "one host", task)
    lines = []
    for nbytes in task.sizes:
        of_size = [row for row in rows if row["bytes"] == nbytes]
        what = f"one host, {library}, {format_bytes(nbytes)}"
        median_s = _median_s(of_size, library)
        is_small = nbytes < 4 * MIB
        told = ", ".join(f"{way} {_median_s(of_size, way) * 1e3:.3g}" for way in (library, GLOO, HOST) if way != GLOO
                         or beside_gloo)  # fmt: skip
        goal = {"goal": "at most 0.1 ms", "reached": median_s <= 1e-4} if nbytes == 16 * KIB else {}
        lines.append(Line(f"{what}: ms a call", told, **goal))
        if beside_gloo:
            least = 2 if nbytes == 4 * MIB else 4
            ratio = _ratio(of_size, GLOO, library)
            goal = {} if is_small else {"goal": f"at least {least}", "reached": ratio >= least}
            lines.append(Line(f"{what}: speed over Gloo's", f"{ratio:.2f}", ratio=ratio, **goal))
        else:
            lines.append(Line(f"{what}: speed over Gloo's", "not run: Gloo needs torch for CUDA"))
        ratio = _ratio(of_size, library, HOST)
        goal = {} if is_small else {"goal": "at most 1.3", "reached": ratio <= 1.3}
        lines.append(Line(f"{what}: time over that on arrays of the host", f"{ratio:.2f}", ratio=ratio, **goal))
    return [*lines, *_memory_lines(library, memory)]


def _memory_lines(library: str, memory: dict[str, int | None]) -> list[Line]:
    lines = []
    for name, what, most in (
        ("device_bytes", "extra memory of the device, both ranks", MOST_DEVICE_BYTES),
        ("pinned_bytes", "pinned memory, greatest of a rank", MOST_PINNED_BYTES),
        ("unpinned_bytes", "ordinary memory where pinned was short", None),
    ):
        seen = memory[name]
        if seen is None:
            lines.append(Line(f"one host, {library}: {what}", "not run: nothing here tells it"))
        else:
            goal = {} if most is None else {"goal": f"at most {format_bytes(most)}", "reached": seen <= most}
            lines.append(Line(f"one host, {library}: {what}", format_bytes(seen), **goal))
    return lines


def run_lab(call: Call, library: str) -> list[Line]:
    """Compare with arrays of the host across emulated lines."""
    _need_lab()
    topology = Topology.uniform(2, 1, parse_rate_bytes_per_s(LAB_RATE, "rate"), ROUND_TRIP_NS // 2)
    task = call.task(library, {4 * MIB: 8, 64 * MIB: 2}, 3)
    with Watch() as watch, Lab(topology, Conditions()) as lab:
        watch.router_pid = lab.router_pid
        _run(Runner(topology, call.limit_s), Setting("lab", "slotted", WIDE_AREA), task, dict(SETTLED), lab, topology)
    rows, _ = _read(call, "lab", task)
    spans = [(at, at + round(s * 1e9)) for row in rows for at, s in zip(row["began_ns"], row["samples_s"], strict=True)]
    limits = limits_of_row(None, load_of([watch.readings()], [spans]), scale_of(topology)) or ()
    return [_limited_by(limits, line) for line in _beside_host("lab, 1 Gbit/s, 20 ms", library, task, rows, 1.02)]


def run_veth(call: Call, library: str) -> list[Line]:
    """Compare with arrays of the host over a line that is faster than the lab."""
    _need_lab()
    rate_bytes_per_s = parse_rate_bytes_per_s(VETH_RATE, "rate")
    topology = Topology.uniform(fast_lines.SITES, 1, rate_bytes_per_s, fast_lines.ONE_WAY_NS)
    task = call.task(library, {64 * MIB: 8}, 3)
    topology_path = Path(task.folder) / "topology.toml"
    topology_path.write_text(topology.to_toml(), encoding="utf-8")
    with fast_lines.joined_sites(topology.mtu_bytes, keeps_order=not call.is_dry) as sites:
        starts = [
            partial(fast_lines.start_in, sites[rank], _argv(task), own | SETTLED | {"DETCOLL_TRANSPORT": "slotted"})
            for rank, own in enumerate(fast_lines.environments(topology, topology_path))
        ]
        code = run_crew(starts, logs=Path(task.folder), deadline_s=call.limit_s)
    _check(task, None if code == 0 else f"the ranks ended with exit code {code}")
    rows, _ = _read(call, "veth", task)
    return _beside_host("veth pair, 10 Gbit/s", library, task, rows, 1.05)


def run_training(call: Call) -> list[Line]:
    """Train on the device in one cluster and across sites; compare the parameters, and how long iterations take."""
    if call.is_dry:
        small = {"train_on": "cpu", "width": 32, "batch": 16, "steps": 2, "timeout_s": 30 * PATIENCE}
    elif (why := call.facts["torch_lacks"]) is not None:
        raise NotRun(why)
    else:
        small = {"train_on": "cuda"}
    _need_lab()
    topology = Topology.uniform(2, 1, parse_rate_bytes_per_s(LAB_RATE, "rate"), ROUND_TRIP_NS // 2)
    runner, digests, limits = Runner(topology, call.limit_s / 2), set(), ()
    for name in WAYS_OF_TRAINING:
        folder = call.folder / name
        folder.mkdir()
        task, told = Task(str(folder), **small), SETTLED | {MARKS_VARIABLE: str(folder)}
        with Watch() as watch:
            if name == "cluster":
                setting = Setting(name, "shm", SINGLE_CLUSTER)
                _run(runner, setting, task, told | {"DETCOLL_SITES": str(len(topology.sites))})
            else:
                with Lab(topology, Conditions()) as lab:
                    watch.router_pid = lab.router_pid
                    _run(runner, Setting(name, "slotted", WIDE_AREA), task, told, lab, topology)
        digests |= {(folder / f"digest{rank}.txt").read_text() for rank in range(topology.size)}
        small["batch"] = int((folder / "batch.txt").read_text())
        marks = [read_marks(path) for path in sorted(folder.glob("marks*.json"))]
        call.rows.append({"step": "training", "way": name, "samples_s": marked_times_s(marks), **small})
        limits = limits_of_row(None, load_of([watch.readings()], [marked_span_ns(marks)]), scale_of(topology)) or ()
    if len(digests) != 1:
        raise Failed(f"parameters differ: {', '.join(sorted(digests))}")
    equal = f"equal ({digests.pop()[:12]})"
    return [
        Line("DDP across two sites against one cluster", equal, "equal bits", True),
        _limited_by(limits, _efficiency(call.rows)),
    ]


def _efficiency(rows: Sequence[dict[str, Any]]) -> Line:
    """Return how near training across sites comes to that in one cluster."""
    inside_s, across_s = (_median_s(rows, name) for name in WAYS_OF_TRAINING)
    share = inside_s / across_s
    what = f"DDP across two sites, {rows[0]['batch']} examples: one cluster's time over theirs, ms an iteration"
    return Line(what, f"{share:.3f} (one cluster {inside_s * 1e3:.0f}, sites {across_s * 1e3:.0f})", ratio=share)


def _limited_by(limits: Sequence[Limit], line: Line) -> Line:
    """Return a line with what of the lab limited it, which then says little of the goal."""
    if not limits:
        return line
    why = "; ".join(limit.why for limit in limits)
    return replace(line, found=f"{line.found} (limited by the lab: {why})", reached=None)


STEPS: dict[str, tuple[float, bool, Callable[..., list[Line]]]] = {
    "tests": (100, False, run_tests), "one host": (60, True, run_one_host), "lab": (45, True, run_lab),
    "veth": (45, True, run_veth), "training": (60, False, run_training),
}  # fmt: skip
"""For each step its limit in seconds, for each library where it runs for each, and what carries it out."""


def _need_lab() -> None:
    if (reason := obtain()) is not None:
        raise NotRun(f"the lab cannot be opened: {reason}")


def _argv(task: Task) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("gpu_ranks.py")), str(task.write())]


def _run(
    runner: Runner, setting: Setting, task: Task, env: dict[str, str], lab: Lab | None = None,
    topology: Topology | None = None,
) -> None:  # fmt: skip
    """Run the ranks of a task; raises what they said if they failed."""
    folder = Path(task.folder)
    if topology is not None:
        path = folder / "topology.toml"
        path.write_text(topology.to_toml(), encoding="utf-8")
        env |= {"DETCOLL_TOPOLOGY": str(path)}
    try:
        runner.run(setting, _argv(task), folder, env, lab)
    except DetcollError as error:
        _check(task, str(error))


def _check(task: Task, failed: str | None) -> None:
    refused, said = (Path(task.folder) / name for name in ("refused.txt", "failed.txt"))
    if failed is not None and refused.exists() and not said.exists():
        raise NotRun(refused.read_text(encoding="utf-8").splitlines()[0])
    if failed is not None:
        raise Failed(said.read_text(encoding="utf-8").splitlines()[0] if said.exists() else failed)


def _read(call: Call, step: str, task: Task) -> tuple[list[dict[str, Any]], dict[str, int | None]]:
    wrote = json.loads((Path(task.folder) / "rows.json").read_bytes())
    call.rows.extend({"step": step, "library": task.library} | row for row in wrote["rows"])
    return wrote["rows"], wrote["memory"]


def _beside_host(where: str, library: str, task: Task, rows: Sequence[dict[str, Any]], most: float) -> list[Line]:
    lines = []
    for nbytes in task.sizes:
        of_size = [row for row in rows if row["bytes"] == nbytes]
        ratio, ms = _ratio(of_size, library, HOST), {way: _median_s(of_size, way) * 1e3 for way in (library, HOST)}
        found = f"{ratio:.3f} ({ms[library]:.1f} ms, host {ms[HOST]:.1f})"
        what = f"{where}, {library}, {format_bytes(nbytes)}: time over that on arrays of the host"
        lines.append(Line(what, found, f"at most {most}", ratio <= most, ratio))
    return lines


def _median_s(rows: Iterable[dict[str, Any]], way: str) -> float:
    return statistics.median(sample for row in rows if row["way"] == way for sample in row["samples_s"])


def _ratio(rows: Iterable[dict[str, Any]], over: str, under: str) -> float:
    """Return the median over rounds of the ratio of medians."""
    by_round: dict[int, dict[str, float]] = {}
    for row in rows:
        by_round.setdefault(row["round"], {})[row["way"]] = statistics.median(row["samples_s"])
    return statistics.median(ways[over] / ways[under] for ways in by_round.values())


def facts(is_dry: bool) -> dict[str, Any]:
    """Return what of CUDA is here, as another process sees it: this one uses no device."""
    if is_dry:
        return {"torch_lacks": "the device is a double", "cupy_lacks": "the device is a double"}
    argv = [sys.executable, str(Path(__file__).with_name("gpu_ranks.py")), "facts"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=FACTS_S, check=False)
    if done.returncode:
        sys.exit(f"what is installed here cannot be found out: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def carry_out(name: str, told: dict[str, Any], libraries: tuple[str, ...], left_s: float) -> dict[str, Any]:
    """Carry out a step, and return its lines and rows, how it ended and how long it took."""
    limit_s, is_for_each, function = STEPS[name]
    patience = PATIENCE if libraries == (DOUBLE,) else 1
    lines, rows, status, began_s = list[Line](), list[dict[str, Any]](), "ran", time.monotonic()
    for library in libraries if is_for_each else ("",):
        what, left = f"{name}, {library}" if library else name, left_s - (time.monotonic() - began_s)
        with tempfile.TemporaryDirectory(prefix="detcoll-gpu-") as folder:
            call = Call(told, libraries, min(patience * limit_s, left), Path(folder), rows)
            try:
                if left < 5:
                    raise NotRun("no time is left")
                lines += function(call, library) if is_for_each else function(call)
            except NotRun as reason:
                lines.append(Line(what, f"not run: {reason}"))
            except (Failed, DetcollError, OSError) as error:
                status, lines = "failed", [*lines, Line(what, f"failed: {error}", reached=False)]
            except SystemExit as ended:
                if not isinstance(ended.code, str):
                    raise
                status, lines = "failed", [*lines, Line(what, f"failed: {ended.code}", reached=False)]
    if libraries == (DOUBLE,):
        is_measured = [not line.found.startswith(("not run", "failed", "equal")) for line in lines]
        lines = [
            replace(line, found="tried", reached=None, ratio=None) if measured else line
            for line, measured in zip(lines, is_measured, strict=True)
        ]
    if all(line.found.startswith("not run") for line in lines):
        status = "not run"
    took_s = time.monotonic() - began_s
    return {"step": name, "status": status, "took_s": took_s, "lines": [asdict(line) for line in lines], "rows": rows}


def table(steps: Sequence[dict[str, Any]]) -> str:
    """Return the lines as Markdown."""
    shown = ["| what | found | goal | reached |", "| --- | --- | --- | --- |"]
    for line in (line for step in steps for line in step["lines"]):
        reached = {True: "yes", False: "no", None: ""}[line["reached"]]
        shown.append(f"| {line['what']} | {' '.join(line['found'].split())} | {line['goal']} | {reached} |")
    return "\n".join(shown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    parser.add_argument("--device", choices=["cuda", DOUBLE], default="cuda")
    parser.add_argument("--total", type=float, default=TOTAL_S, help="seconds that all of it may take")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.only = [name.strip() for name in given.only.split(",")]
    for name in given.only:
        if name not in STEPS:
            parser.error(f"--only {name!r} is no step; expected some of {', '.join(STEPS)}")
    return given


def main() -> int:
    """Carry out all steps, print the table, write the file."""
    given, began_s = _arguments(), time.monotonic()
    is_dry = given.device == DOUBLE
    told, steps = facts(is_dry), []
    lacks = {TORCH: told["torch_lacks"], CUPY: told["cupy_lacks"]}
    libraries = (DOUBLE,) if is_dry else tuple(name for name, why in lacks.items() if why is None)
    with ended_by_signals():
        for name in given.only:
            left_s = given.total * (PATIENCE if is_dry else 1) - (time.monotonic() - began_s)
            print(f"{name} ...", file=sys.stderr, flush=True)
            if libraries:
                steps.append(carry_out(name, told, libraries, left_s))
            else:
                line = Line(name, f"not run: {lacks[TORCH]}; {lacks[CUPY]}")
                steps.append({"step": name, "status": "not run", "took_s": 0, "lines": [asdict(line)], "rows": []})
    host, took_s = host_facts(), time.monotonic() - began_s
    print(table(steps))
    print(", ".join(f"{name} {value}" for name, value in (told | host).items() if value is not None))
    print(f"device: {given.device}; all of it took {took_s:.0f} s")
    if given.json is not None:
        wrote = {"schema": SCHEMA, "device": given.device, "gpu": told, "host": host, "took_s": took_s, "steps": steps}
        given.json.write_text(json.dumps(wrote, indent=1), encoding="utf-8")
    return 1 if any(step["status"] == "failed" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
