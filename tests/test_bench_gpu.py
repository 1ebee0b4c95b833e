"""``benchmarks/gpu.py`` on the double of CUDA: every step is tried, and what cannot run says why."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from forked_runs import fork_ranks_of_runs
from test_bench_smoke import BENCHMARKS, run, run_here

from detcoll.emulation.lab import why_unavailable
from detcoll.measure.results import Limit, LimitKind

pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not installed"),
    pytest.mark.timeout(200),
]


def tried(tmp_path: Path, only: str) -> dict[str, dict[str, Any]]:
    """Try steps on the double, and return them by their names."""
    written = tmp_path / "gpu.json"
    done = run_here("gpu.py", "--device", "double", "--only", only, "--json", str(written))
    assert done.returncode == 0, done.stdout + done.stderr
    wrote = json.loads(written.read_bytes())
    for line in (line for step in wrote["steps"] for line in step["lines"]):
        assert f"| {line['what']} | " in done.stdout
    return {step["step"]: step for step in wrote["steps"]}


def test_figures_of_the_double_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks_of_runs(monkeypatch)
    step = tried(tmp_path, "one host")["one host"]
    assert [(row["way"], row["bytes"]) for row in step["rows"][:4]] == [
        ("host", 2**14), ("double", 2**14), ("double", 2**14), ("host", 2**14),
    ], "ways take turns"  # fmt: skip
    found = {line["found"] for line in step["lines"]}
    assert {text for text in found if not text.startswith("not run: ")} == {"tried"}
    assert not any(line["reached"] for line in step["lines"])


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_lines_between_sites_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks_of_runs(monkeypatch)
    steps = tried(tmp_path, "lab,veth")
    assert {(name, step["status"]) for name, step in steps.items()} == {("lab", "ran"), ("veth", "ran")}
    assert all(len(step["rows"]) == 8 for step in steps.values())


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module("gpu")
    for name in ("gpu", "gpu_ranks", "fast_lines"):
        sys.modules.pop(name, None)


def ending(error: BaseException) -> Callable[..., Any]:
    def step(*_: object) -> None:
        raise error

    return step


def test_a_step_that_cannot_run_or_fails_ends_no_other(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {
        "tests": (program.NotRun("no tests"), "not run", "not run: no tests"),
        "one host": (program.Failed("rank 1: wrong"), "failed", "failed: rank 1: wrong"),
        "veth": (SystemExit("packets cannot be kept in order"), "failed", "failed: packets cannot be kept in order"),
    }
    for name, (error, status, said) in errors.items():
        limit_s, is_for_each, _ = program.STEPS[name]
        monkeypatch.setitem(program.STEPS, name, (limit_s, is_for_each, ending(error)))
        step = program.carry_out(name, {}, ("torch", "cupy"), 100)
        assert (step["status"], {line["found"] for line in step["lines"]}) == (status, {said})
        assert len(step["lines"]) == (2 if is_for_each else 1)
    step = program.carry_out("tests", {}, ("torch",), 4)
    assert step["lines"][0]["found"] == "not run: no time is left"
    monkeypatch.setitem(program.STEPS, "lab", (1, False, ending(SystemExit(130))))
    with pytest.raises(SystemExit):
        program.carry_out("lab", {}, ("torch",), 100)


def test_what_ranks_wrote_says_whether_they_failed_or_were_refused(program: ModuleType, tmp_path: Path) -> None:
    task = program.Task(str(tmp_path))
    program._check(task, None)
    with pytest.raises(program.Failed, match="exit code 1"):
        program._check(task, "exit code 1")
    (tmp_path / "refused.txt").write_text("no CUDA tensors\nno CUDA tensors\n")
    with pytest.raises(program.NotRun, match=r"^no CUDA tensors$"):
        program._check(task, "exit code 1")
    (tmp_path / "failed.txt").write_text("TransportError: element 0 is 7\n")
    with pytest.raises(program.Failed, match="element 0 is 7"):
        program._check(task, "exit code 1")


def test_ratios_are_those_of_one_round(program: ModuleType) -> None:
    rows = [
        {"way": way, "round": number, "samples_s": [seconds] * 3}
        for number, (host, torch) in enumerate([(1.0, 2.0), (10.0, 30.0), (100.0, 500.0)])
        for way, seconds in (("host", host), ("torch", torch))
    ]
    assert program._ratio(rows, "torch", "host") == 3.0
    assert program._median_s(rows, "torch") == 30.0


def test_the_efficiency_of_training_is_one_clusters_time_over_that_of_sites(program: ModuleType) -> None:
    rows = [
        {"way": way, "batch": 1024, "samples_s": [seconds * share for share in (0.9, 1.0, 1.5)]}
        for way, seconds in (("cluster", 0.4), ("sites", 0.5))
    ]
    line = program._efficiency(rows)
    assert line.ratio == pytest.approx(0.8)
    assert "1024 examples" in line.what
    assert line.found == "0.800 (one cluster 400, sites 500)"
    limit = Limit(LimitKind.ROUTER, "the router was late")
    assert program._limited_by([limit], line).found.endswith("sites 500) (limited by the lab: the router was late)")
    assert program._limited_by([], line) is line


def test_without_a_device_every_step_says_why() -> None:
    if any(find_spec(name) for name in ("cupy",)) or Path("/dev/nvidiactl").exists():
        pytest.skip("there may be a device here")
    done = run(sys.executable, str(BENCHMARKS / "gpu.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| not run: torch ") == 5
    assert run(sys.executable, str(BENCHMARKS / "gpu.py"), "--only", "lab,moon").returncode == 2
