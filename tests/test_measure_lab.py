"""``detcoll measure`` for real, in the lab: short runs of each kind of workload."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked_runs import fork_ranks_of_runs

from detcoll.cli import main
from detcoll.emulation.lab import why_unavailable

TIMEOUT_S = 110
LINES = ["--rate", "200 Mbit/s", "--round-trip", "4 ms"]

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

SCRIPT = """
import sys
import numpy as np
import detcoll
from detcoll.measure import step

assert sys.argv[1:] == ["--epochs", "1"]
comm = detcoll.init()
x = np.ones(1000, np.float32)
for _ in range(4):
    detcoll.all_reduce(x, op="avg")
    step()
assert len(comm.topology.sites) == 2
detcoll.finalize()
"""


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the ranks of what `measure` runs; those of `test_script` are started as those of users are."""
    fork_ranks_of_runs(monkeypatch)


def command(path: Path, *arguments: str, ranks_per_site: int = 1) -> list[str]:
    return ["measure", *arguments, *LINES, "--ranks-per-site", str(ranks_per_site), "--json", str(path)]


def measure(path: Path, *arguments: str, ranks_per_site: int = 1) -> dict[str, Any]:
    assert main(command(path, *arguments, ranks_per_site=ranks_per_site)) == 0
    data: dict[str, Any] = json.loads(path.read_text())
    return data


@pytest.mark.usefixtures("forked")
def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    data = measure(tmp_path / "m.json", "--iterations", "6", "--rounds", "1", "--warmup", "1", "--against", "none")
    single, slotted = data["runs"]
    assert single["result_digest"] == slotted["result_digest"] is not None
    assert single["losses"] == slotted["losses"]
    assert len(single["losses"]) == 6
    assert single["accuracy"] == slotted["accuracy"] > 0.2


def test_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    own = [str(script), "--epochs", "1", "--rounds", "1", "--against", "none"]
    argv = [sys.executable, "-m", "detcoll", *command(path := tmp_path / "m.json", *own)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert [len(run["iteration_s"]["samples"]) for run in data["runs"]] == [3, 3]
    assert data["digests_equal"] is None
    slotted = data["runs"][1]
    assert slotted["iteration_s"]["median"] >= 0.002  # a one-way delay, at the least
    assert slotted["retransmits"] >= 0


@pytest.mark.usefixtures("forked")
def test_a_reserved_rate_beside_others(tmp_path: Path) -> None:
    arguments = [
        "--workload", "synthetic", "--compute", "60 ms", "--gradient-bytes", "256KiB", "--bucket-bytes", "64KiB",
        "--iterations", "4", "--rounds", "1", "--against", "none", "--service", "deterministic",
        "--cross-traffic", "0,2.0", "--reserved", "100 Mbit/s", "--report", str(report := tmp_path / "report"),
    ]  # fmt: skip
    data = measure(tmp_path / "m.json", *arguments)
    single, quiet, busy = data["runs"]
    assert data["command"].startswith("detcoll measure --workload synthetic")
    assert data["digests_equal"] is True
    assert json.loads((report / "results.json").read_text()) == data
    assert "Planned and actual sends" in (report / "report.html").read_text(encoding="utf-8")
    traced = [sorted(path.name for path in run.iterdir()) for run in (report / "traces").iterdir()]
    assert traced == [["rank0.json", "rank1.json"]] * 2, "the slotted runs are traced, no other"
    assert (single["wire_busy_fraction"], single["retransmits"]) == (None, None)
    for run in data["runs"]:
        assert run["iteration_s"]["median"] >= 0.06
        assert len(run["iteration_s"]["samples"]) == 4
        assert len(run["round_s"]) == 1
        assert 0 < run["load"]["processors_share"] <= 1
        assert run["limits"] is not None
    assert [(run["service"], run["cross_traffic"]) for run in (quiet, busy)] == [
        ("deterministic", 0),
        ("deterministic", 2),
    ]
    assert single["line"] is None
    line_s, backward_s = 2**18 / (100e6 / 8), 0.04  # at least, and longer where ranks get no core
    crowded_s = busy["line"]["co_tenant"]["median_s"]
    for run in (quiet, busy):
        assert run["slot_misses"] >= 0
        assert 0 < run["wire_busy_fraction"] < 1.25 * line_s / backward_s
        assert run["line"]["wire_bytes"] > 7 * 2 * 2**18
        assert run["line"]["queue_dropped_segments"] == 0
        assert run["line"]["delay_p50_s"] < crowded_s / 5
    assert quiet["line"]["co_tenant"]["median_s"] < crowded_s / 5
    assert data["workload"]["reserved_bytes_per_s"] == [12.5e6]


@pytest.mark.usefixtures("forked")
def test_each_gain_apart(tmp_path: Path) -> None:
    arguments = [
        "--workload", "synthetic", "--compute", "20 ms", "--gradient-bytes", "1MiB", "--bucket-bytes", "256KiB",
        "--iterations", "1", "--rounds", "1", "--warmup", "1", "--against", "none", "--service", "deterministic",
        "--compute-kind", "python", "--without", "topology,slots,overlap,reservation",
    ]  # fmt: skip
    data = measure(tmp_path / "m.json", *arguments, ranks_per_site=2)
    flat, *grouped = data["runs"][2:]
    assert [run["without"] for run in data["runs"]] == [None, None, "topology", "slots", "overlap", "reservation"]
    assert data["digests_equal"] is True
    assert (flat["algorithm"], {run["algorithm"] for run in grouped}) == ("direct", {"exchange"})
    assert flat["line"]["wire_bytes"] > 1.5 * data["runs"][1]["line"]["wire_bytes"]
    assert [run["service"] for run in grouped] == ["deterministic", "deterministic", "best-effort"]
    assert data["workload"]["compute_kind"] == "python"
    assert data["workload"]["warmup"] == 1
