"""The benchmarks run with tiny sizes, alone and on the ranks of a launcher, and rank 0 alone reports."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from forked import TORCH
from forked_runs import command_here, fork_ranks_of_runs
from numpy.typing import NDArray

from detcoll.emulation.lab import why_unavailable
from detcoll.launch.mpiexec import find_mpiexec
from detcoll.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
TIMEOUT_S = 180
TINY = ["-m", "pytest", str(BENCHMARKS), "--sizes", "4KiB", "--rounds", "2"]
MPIEXEC = find_mpiexec()

pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not installed"),
    pytest.mark.timeout(200),
]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    # Where this suite itself runs in parallel, the pytest below must not take itself for one of its workers.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ |= MPIEXEC.environment if MPIEXEC else {}
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT, env=environ)


def run_here(script: str, *argv: str, **changed: object) -> subprocess.CompletedProcess[str]:
    """Run a benchmark in this process, which spares its imports; ``changed`` replaces global names of the script."""
    path, code = str(BENCHMARKS / script), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(sys, "argv", [path, *argv])
        main = runpy.run_path(path)["main"]
        main.__globals__.update(changed)
        try:
            code = main() or 0
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess([path, *argv], code, out.getvalue(), err.getvalue())


COMMANDS_HERE = SimpleNamespace(run=command_here, TimeoutExpired=subprocess.TimeoutExpired)
"""In place of the module ``subprocess``, where a benchmark runs commands of detcoll one after another."""


def test_alone() -> None:
    done = run(sys.executable, *TINY, "--transports", "shm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert "all_reduce of 4 KiB, 1 rank" in done.stdout


def test_rank_0_alone_saves_and_compares(tmp_path: Path) -> None:
    store = ["--benchmark-storage", str(tmp_path), "--benchmark-save", "kept"]
    given = [*TINY, "--transports", "shm,slotted", *store]
    if find_spec("pygal") is not None:
        given += ["--benchmark-histogram", str(tmp_path / "drawn")]
    for times in (1, 2):
        done = run(sys.executable, "-m", "detcoll", "run", "-n", "2", *given)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("8 passed") == 1
        assert "bench_all_reduce[4 KiB-slotted]" in done.stdout
        assert len(list(tmp_path.glob("*/*.json"))) == times
        given += ["--benchmark-compare"]
    assert "bench_barrier[shm-0 B] (0001_kept)" in done.stdout
    assert done.stderr.count("Comparing against benchmarks from") == 1
    compare = ["--storage", str(tmp_path), "compare", "--group-by=param:nbytes"]
    done = run(sys.executable, "-m", "pytest_benchmark", *compare)
    assert done.returncode == 0, done.stderr
    assert [line.split("'")[1] for line in done.stdout.splitlines() if " benchmark '" in line] == [
        "nbytes=0 B", "nbytes=4 KiB",
    ]  # fmt: skip


def conftest() -> SimpleNamespace:
    """What the benchmarks share."""
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "conftest.py")))


class Pair:
    """Rank 0 of two; the other enters each call earlier or leaves it later."""

    rank, size, transport = 0, 2, "fake"

    def __init__(self, *, early_s: float = 0.0, late_s: float = 0.0) -> None:
        # In the order in which the ranks compare stamps: the first entry, the last entry, the last exit.
        self._differ_ns = itertools.cycle([-round(early_s * 1e9), 0, round(late_s * 1e9)])

    def all_reduce(self, array: NDArray[np.int64], op: str) -> None:
        assert op in ("min", "max")
        array += next(self._differ_ns)


class Together:
    kind = "instant"

    def __call__(self) -> None: ...


def slowest_rank_s(pair: Pair, floor_s: float) -> list[float]:
    shared = conftest()
    return shared._slowest_rank_s(pair, Together(), shared.Calls("all_reduce", 8, lambda: None), 3, floor_s)


def test_times_are_the_slowest_ranks() -> None:
    times_s = slowest_rank_s(Pair(late_s=1000), floor_s=0.0)
    assert [round(each) for each in times_s] == [1000] * 3


def test_less_than_the_floor_is_an_error() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"8 B over fake took 100\.?\d* s, below the physical floor of 3600 s"
    ):
        slowest_rank_s(Pair(early_s=50, late_s=50), floor_s=3600)


def test_rounds_that_say_nothing_are_taken_again() -> None:
    with pytest.raises(pytest.fail.Exception, match="only 0 of 3 rounds"):
        slowest_rank_s(Pair(early_s=3600), floor_s=3000)


def test_a_table_shows_the_times_that_were_taken() -> None:
    class Benchmark:
        def pedantic(self, call: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
            self.seen = []
            for _ in range(rounds):
                setup()
                began = replay()
                call()
                self.seen.append(replay() - began)

    replay, benchmark = conftest().Replay(), Benchmark()
    replay.run(benchmark, [0.25, 3.0])
    assert benchmark.seen == [0.25, 3.0]


def test_lines_that_nothing_emulates_are_refused(tmp_path: Path) -> None:
    far = tmp_path / "far.toml"
    far.write_text(Topology.uniform(2, 1, 125e6, 5 * 10**9).to_toml())
    given = ["--topology", str(far), *TINY, "--transports", "tcp", "-k", "bench_broadcast["]
    done = run(sys.executable, "-m", "detcoll", "run", "-n", "2", *given)
    assert done.returncode != 0
    told = done.stdout + done.stderr  # the rank that fails first ends the other, which may be the one that reports
    assert "broadcast of 4 KiB over tcp took" in told
    assert "below the physical floor of 5 s" in told
    done = run(sys.executable, "-m", "detcoll", "run", "-n", "2", *given, "--transports", "shm")
    assert "shm: joins ranks of one host only" in done.stdout


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.skipif(MPIEXEC is None or find_spec("mpi4py") is None, reason="MPI is not installed")
def test_no_time_across_the_lab_is_below_the_floor(tmp_path: Path) -> None:
    """Rank 0 leaves a broadcast of eight bytes long before they have crossed the line."""
    written = tmp_path / "seen.json"
    lab = [sys.executable, "-m", "detcoll", "lab", "--mpi", "--ranks-per-site", "1", "--"]
    given = [*TINY, "--sizes", "8B", "--transports", "mpi", "-k", "bench_broadcast[", "--benchmark-json", str(written)]
    done = run(*lab, sys.executable, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    [seen] = json.loads(written.read_bytes())["benchmarks"]
    assert seen["params"] == {"transport": "mpi", "nbytes": "8 B"}
    assert seen["stats"]["min"] >= seen["extra_info"]["floor_s"] >= 0.01
    assert seen["options"]["timer"] == "slowest_rank"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sizes", "4KiB,3B"], "--sizes: 3B must be a positive multiple of 4 bytes (float32)"),
        (["--sizes", "much"], "much"),
        (["--transports", "shm,pigeon"], "--transports: 'pigeon' is not known; expected some of"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(given: list[str], said: str) -> None:
    done = run(sys.executable, *TINY, *given)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr


@pytest.mark.skipif(MPIEXEC is None or find_spec("mpi4py") is None, reason="MPI is not installed")
def test_under_mpirun() -> None:
    assert MPIEXEC is not None
    done = run(*MPIEXEC.command(2), sys.executable, *TINY, "--transports", "mpi", "-k", "barrier or bench_all_reduce[")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed") == 1
    assert "bench_barrier[mpi-0 B]" in done.stdout


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_the_lab_line_is_held_against_what_it_was_told() -> None:
    done = run_here("lab_line.py", "--pings", "3", "--stretches", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["least_round_trip_over_stated"] >= 1
    assert facts["rate_over_stated"] > 0


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
@pytest.mark.parametrize("asked", ["python", "compiled"])
def test_the_router_is_held_against_a_loop_in_c(asked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DETCOLL_ROUTER", asked)
    written = tmp_path / "blast.json"
    given = ["--rounds", "1", "--seconds", "0.02", "--json", str(written)]
    done = run(sys.executable, str(BENCHMARKS / "router_blast.py"), *given)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(written.read_bytes())
    assert list(facts["units"]) == ["two segments", "64 kB"]
    for name, figures in facts["units"].items():
        assert f"| {name} |" in done.stdout
        [loop], [router] = figures["loop"]["runs"], figures["router"]["runs"]
        assert loop["bytes"] / loop["units"] == router["bytes"] / router["units"]
        assert router["is_compiled"] is (asked == "compiled")
        assert (loop["refused"], router["dropped"]) == (0, 0)


def test_the_loop_in_c_says_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-compiler")
    done = run(sys.executable, str(BENCHMARKS / "router_blast.py"))
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("there is no C compiler 'no-compiler': install gcc or set CC")


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_the_figures_of_the_docs_can_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks_of_runs(monkeypatch)
    written, drawn = tmp_path / "performance.json", tmp_path / "performance.svg"
    given = ["--iterations", "1", "--only", "growth: 2", "--json", str(written), "--plot", str(drawn)]
    done = run_here("performance.py", *given, subprocess=COMMANDS_HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    [case] = json.loads(written.read_bytes())["cases"]
    assert case["command"].startswith("python -m detcoll bench --lab --sites 2")
    [row] = case["rows"]
    assert row["bound_s"] > 0
    assert "| growth: 2 sites | slotted | 4,194,304 |" in done.stdout
    assert drawn.read_text().count("<rect") == (0 if row["limits"] else 1), "what the lab limited is not drawn"


@pytest.mark.parametrize(
    ("only", "needs_lab"), [("", True), ("growth", True), ("one host", False), ("planning", False), ("nothing", False)]
)
def test_the_figures_of_one_host_need_no_lab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], only: str, needs_lab: bool
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    main = runpy.run_path(str(BENCHMARKS / "performance.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["performance.py", "--only", only])
    monkeypatch.setitem(main.__globals__, "obtain", lambda: "no lab here")
    monkeypatch.setitem(main.__globals__, "_run_all", lambda _: [])
    monkeypatch.setitem(main.__globals__, "planning", lambda: 1.0)
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code == "the lab cannot be opened: no lab here") is needs_lab


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_training_under_load_can_be_measured(tmp_path: Path) -> None:
    written, table, drawn = (tmp_path / name for name in ("training.json", "training.md", "training.svg"))
    other = {"part": "busy", "name": "kept", "runs": [], "left_out": [], "workload": {}, "digests_equal": None}
    written.write_text(json.dumps({"schema": "detcoll.training/1", "cases": [other]}))
    done = run_here(
        "training.py", "--only", "line", "--iterations", "1", "--rounds", "1", "--compute", "60 ms", "--gradient-bytes",
        "64KiB", "--bucket-bytes", "32KiB", "--rate", "100 Mbit/s", "--json", str(written), "--markdown", str(table),
        "--picture", str(drawn), RANKS_PER_SITE=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(written.read_bytes())
    assert [case["part"] for case in facts["cases"]] == ["line", "busy"]
    assert facts["cases"][0]["command"].startswith("detcoll measure --workload synthetic --sites 2")
    single, quiet, full = facts["rows"]
    assert [len(row["iteration_s"]["samples"]) for row in (single, quiet, full)] == [1, 1, 1]
    assert (single["efficiency"], single["name"], quiet["cross_traffic"]) == (1.0, "single cluster", 0.0)
    assert full["efficiency"] == pytest.approx(single["iteration_s"]["median"] / full["iteration_s"]["median"])
    assert {goal["goal"].partition(",")[0] for goal in facts["goals"]} >= {"iterations of each"}
    assert table.read_text() == done.stdout.rstrip("\n") + "\n"
    assert ElementTree.fromstring(drawn.read_text()).tag.endswith("svg")
    rounds = runpy.run_path(str(BENCHMARKS / "training.py"))["rows_of"](facts["cases"][:1] * 2)
    assert [len(row.iteration_s.samples) for row in rounds] == [2, 2, 2], "rounds of one case are taken together"


def test_failure_of_another_rank_shows() -> None:
    size = "'4B' if int(os.environ['RANK']) else '8B'"
    fault = f"import os, sys, pytest; sys.exit(pytest.main([*sys.argv[1:], '--sizes', {size}]))"
    arguments = [str(BENCHMARKS), "--rounds", "2", "--transports", "shm", "-k", "bench_broadcast["]
    done = run(sys.executable, "-m", "detcoll", "run", "-n", "2", sys.executable, "-c", fault, *arguments)
    assert done.returncode != 0
    assert "rank 1: " in done.stderr
    assert "PlanMismatch" in done.stderr


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_the_simulator_is_held_against_the_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks_of_runs(monkeypatch)
    path = tmp_path / "simulator.json"
    done = run_here(
        "simulator.py", "--only", "2 x 1, 200 Mbit/s", "--iterations", "2", "--json",
        str(path), subprocess=COMMANDS_HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 2 x 1, 200 Mbit/s, 10 ms, 8MiB |" in done.stdout
    [case] = json.loads(path.read_text())["cases"]
    assert case["command"].startswith("python -m detcoll bench --lab --sites 2")
    assert case["error_of_measured"] == case["simulated_s"] / case["row"]["median_s"] - 1
    assert case["simulated_s"] == pytest.approx(8 * 2**20 / 25e6 / 0.955 + 0.005, rel=0.02)


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_interference_shows_cells_that_fail_beside_those_that_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_ranks_of_runs(monkeypatch)
    written, drawn, told = (tmp_path / f"interference.{ending}" for ending in ("json", "svg", "md"))
    done = run_here(
        "interference.py", "--rate", "100 Mbit/s", "--bytes", "64KiB", "--iterations", "1", "--rounds", "1",
        "--round-trip", "4 ms", "--time-limit", "0.3 s", "--transports", "slotted,shm", "--cross-traffic", "0.05",
        "--light", "0.05", "--deadline", "80 s", "--json", str(written), "--plot", str(drawn), "--markdown", str(told),
        RANKS_PER_SITE=1, subprocess=COMMANDS_HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    wrote = json.loads(written.read_bytes())
    found = {(cell["transport"], cell["service"]): cell for cell in wrote["cells"]}
    assert list(found) == [
        (None, "deterministic"), ("slotted", "deterministic"), ("slotted", "best-effort"), ("shm", "deterministic"),
        ("shm", "best-effort"),
    ]  # fmt: skip
    own, idle = found["slotted", "deterministic"], found[None, "deterministic"]
    assert own["failed"] is None
    assert own["throughput_bits_per_s"] == pytest.approx(8 * 2**16 / own["median_s"])
    assert idle["co_tenant_p99_s"] >= 0.004
    assert "one host only" in found["shm", "best-effort"]["failed"]
    assert "| shm | best-effort | 5% | failed: " in told.read_text()
    assert "shm, best-effort (failed at 5%)" in drawn.read_text()
    assert told.read_text() in done.stdout


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_fast_lines_compare_transports_in_one_run(tmp_path: Path) -> None:
    written = tmp_path / "fast_lines.json"
    done = run_here(
        "fast_lines.py", "--transports", "slotted,shm", "--baseline", "shm",
        "--bytes", "64KiB", "--rounds", "2", "--iterations", "1", "--warmup", "0", "--json", str(written),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    wrote = json.loads(written.read_bytes())
    slotted, shm = wrote["lines"]
    assert (slotted["transport"], slotted["bytes"], slotted["calls"]) == ("slotted", 65_536, 2)
    assert slotted["bits_per_s"] == pytest.approx(8 * 65_536 / slotted["median_s"])
    assert (shm["speed"], shm["processor"]) == (1.0, 1.0)
    assert wrote["topology"]["order"] == "kept"
    assert [row["transport"] for row in wrote["rows"]] == ["slotted", "shm"] * 2, "transports take turns"
    assert "| slotted | 65,536 |" in done.stdout


@pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
@pytest.mark.skipif(not entry_points(group="torch.backends", name="detcoll"), reason="torch cannot find this detcoll")
@pytest.mark.parametrize(
    ("only", "rows", "rounds"),
    [
        ("one host", ["none", "gloo", "detcoll"], 2),
        pytest.param("HSDP", ["none", "gloo", "detcoll", "tcp"], 1, marks=pytest.mark.lab),
    ],
)
def test_torch_trains_over_gloo_and_detcoll_in_turns(
    only: str, rows: list[str], rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if only == "HSDP" and (reason := why_unavailable()) is not None:
        pytest.skip(reason)
    fork_ranks_of_runs(monkeypatch, TORCH)
    written = tmp_path / "torch_ddp.json"
    done = run_here(
        "torch_ddp.py", "--only", only, "--layers", "1", "--width", "32", "--rounds", str(rounds), "--steps", "2",
        "--warmup", "1", "--round-trip", "2 ms", "--json", str(written),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    wrote = json.loads(written.read_bytes())
    assert [line["row"] for line in wrote["lines"]] == rows
    assert [line["steps"] for line in wrote["lines"]] == [2 * rounds] * len(rows)
    assert [row["row"] for row in wrote["rows"]] == [*rows, *rows[1:], rows[0]][: rounds * len(rows)]
    assert wrote["lines"][1]["speed"] == 1.0
    assert wrote["parameters"] == 12 * 32**2 + 13 * 32 + 2 * 256 * 32 + 256
    assert "a step without communication is" in done.stdout


def test_torch_benchmarks_compare_steps_of_one_round() -> None:
    shared = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "torch_ddp.py")))

    def row(name: str, number: int, median_s: float, loss: float = 1.0) -> dict[str, object]:
        return {"case": "c", "row": name, "round": number, "step_s": [median_s] * 2, "median_s": median_s, "cpu_s": 1.0,
                "losses": [loss, 2.0]}  # fmt: skip

    found = [row("gloo", 0, 1.0), row("detcoll", 0, 0.5), row("gloo", 1, 8.0), row("detcoll", 1, 2.0)]
    _, own = shared.summary(found)
    assert (own["speed"], own["least_speed"], own["greatest_speed"]) == (3.0, 2.0, 4.0)
    assert (own["median_s"], own["min_s"], own["max_s"], own["steps"]) == (1.25, 0.5, 2.0, 4)
    shared.require_equal([*found, row("none", 0, 1.0, loss=5.0)])
    with pytest.raises(SystemExit, match=r"c: losses are \[1.1, 2.0\] over tcp, Gloo \[1.0, 2.0\]"):
        shared.require_equal([*found, row("tcp", 0, 1.0, loss=1.1)])
