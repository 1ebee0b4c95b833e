"""The benchmarks run with tiny sizes, alone and on the ranks of a launcher, and rank 0 alone reports."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from detcoll.emulation.lab import why_unavailable
from detcoll.launch.mpiexec import find_mpiexec

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


def test_alone() -> None:
    done = run(sys.executable, *TINY, "--transports", "shm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert "all_reduce of 4096 bytes, 1 ranks" in done.stdout


def test_on_ranks_of_detcoll_run() -> None:
    done = run(sys.executable, "-m", "detcoll", "run", "-n", "2", *TINY, "--transports", "shm,slotted")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("8 passed") == 1
    assert "bench_all_reduce[slotted-4KiB]" in done.stdout


@pytest.mark.skipif(MPIEXEC is None or find_spec("mpi4py") is None, reason="MPI is not installed")
def test_under_mpirun() -> None:
    assert MPIEXEC is not None
    done = run(*MPIEXEC.command(2), sys.executable, *TINY, "--transports", "mpi", "-k", "barrier or bench_all_reduce[")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed") == 1
    assert "bench_barrier[mpi]" in done.stdout


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_the_lab_line_is_held_against_what_it_was_told() -> None:
    done = run(sys.executable, str(BENCHMARKS / "lab_line.py"), "--pings", "3", "--stretches", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["least_round_trip_over_stated"] >= 1
    assert facts["rate_over_stated"] > 0


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_the_figures_of_the_docs_can_be_taken(tmp_path: Path) -> None:
    written, drawn = tmp_path / "performance.json", tmp_path / "performance.svg"
    given = ["--iterations", "1", "--only", "growth: 2", "--json", str(written), "--plot", str(drawn)]
    done = run(sys.executable, str(BENCHMARKS / "performance.py"), *given)
    assert done.returncode == 0, done.stdout + done.stderr
    [case] = json.loads(written.read_bytes())["cases"]
    assert case["command"].startswith("python -m detcoll bench --lab --sites 2")
    [row] = case["rows"]
    assert row["bound_s"] > 0
    assert "| growth: 2 sites | slotted | 4,194,304 |" in done.stdout
    assert drawn.read_text().count("<rect") == (0 if row["limits"] else 1), "what the lab limited is not drawn"


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_training_under_load_can_be_measured(tmp_path: Path) -> None:
    written, table, drawn = (tmp_path / name for name in ("training.json", "training.md", "training.svg"))
    other = {"part": "busy", "name": "kept", "runs": [], "left_out": [], "workload": {}, "digests_equal": None}
    written.write_text(json.dumps({"schema": "detcoll.training/1", "cases": [other]}))
    done = run(
        sys.executable, str(BENCHMARKS / "training.py"), "--only", "line", "--iterations", "1", "--rounds", "1",
        "--compute", "60 ms", "--gradient-bytes", "64KiB", "--bucket-bytes", "32KiB", "--rate", "100 Mbit/s",
        "--json", str(written), "--markdown", str(table), "--picture", str(drawn),
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
def test_the_simulator_is_held_against_the_lab(tmp_path: Path) -> None:
    path = tmp_path / "simulator.json"
    done = run(
        sys.executable, str(BENCHMARKS / "simulator.py"), "--only", "2 x 1, 200 Mbit/s", "--iterations", "2", "--json",
        str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 2 x 1, 200 Mbit/s, 10 ms, 8MiB |" in done.stdout
    [case] = json.loads(path.read_text())["cases"]
    assert case["command"].startswith("python -m detcoll bench --lab --sites 2")
    assert case["error_of_measured"] == case["simulated_s"] / case["row"]["median_s"] - 1
    assert case["simulated_s"] == pytest.approx(8 * 2**20 / 25e6 / 0.955 + 0.005, rel=0.02)


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_interference_shows_cells_that_fail_beside_those_that_do_not(tmp_path: Path) -> None:
    written, drawn, told = (tmp_path / f"interference.{ending}" for ending in ("json", "svg", "md"))
    two_ranks = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import interference"
    two_ranks += "; interference.RANKS_PER_SITE = 1; sys.exit(interference.main())"
    done = run(
        sys.executable, "-c", two_ranks, "--rate", "100 Mbit/s", "--bytes", "64KiB", "--iterations", "1", "--rounds",
        "1", "--round-trip", "4 ms", "--time-limit", "0.3 s", "--transports", "slotted,shm", "--cross-traffic", "0.05",
        "--light", "0.05", "--deadline", "20 s", "--json", str(written), "--plot", str(drawn), "--markdown", str(told),
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
    done = run(
        sys.executable, str(BENCHMARKS / "fast_lines.py"), "--transports", "slotted,shm", "--baseline", "shm",
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
