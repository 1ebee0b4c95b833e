"""``detcoll bench``: its options, its tables, its file, and real runs on ranks of this host and of the lab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked_runs import fork_ranks_of_runs

from detcoll.bench import runs
from detcoll.bench.runs import LabBench, run_in_lab
from detcoll.bench.sweep import Sweep
from detcoll.cli import main
from detcoll.cli.terminal import PIPE_WIDTH, output_console
from detcoll.emulation.lab import Conditions, why_unavailable
from detcoll.errors import DetcollError, UsageError
from detcoll.measure.host import host_facts
from detcoll.measure.limits import limits_of_row, scale_of
from detcoll.measure.lines import CoTenant, LineUse
from detcoll.measure.load import Load
from detcoll.measure.networks import Network, parse_networks
from detcoll.measure.results import BENCH_SCHEMA, AuditResult, BenchLine, BenchResult, LeftOut, Row, write_result
from detcoll.measure.tables import bench_table, came
from detcoll.topology import Topology

TIMEOUT_S = 100
ROW = Row(
    "all_reduce", "slotted", "exchange", 4, 2, "float32", 0.018, 0.03, 0.029, 0.0187, 0.021, 0.935, 0.05, 20, "instant",
    1e-4, bytes=2**20, median_s=0.02, cpu_s_per_gb=0.625, extra_memory_bytes=3 * 2**20,
)  # fmt: skip
AUDIT = AuditResult("calendar", True, 0.999, 0.998, 10**6, 1000, 10, 0, (0, 0), (0, 0), (2**20, 2**19), (2**21, 2**21))
USE = LineUse(10**6, 1, 2, 3, 4, 5000, 0.01, 0.011, CoTenant(0.02, 0.03, 9, 10), 0, 0, 0.001, 0.2)
SWEEP = Sweep(("all_reduce",), (4096,), "float32", 2, 1)
PROMISED = {
    "collective", "transport", "algorithm", "ranks", "sites", "dtype", "bytes", "median_s", "min_s", "max_s", "p99_s",
    "bound_s", "predicted_s", "fraction_of_bound",
}  # fmt: skip


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "detcoll", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    assert data["schema"] == "detcoll.bench/1"
    assert data["host"]["python"] == host_facts()["python"]
    assert all(set(row) >= PROMISED for row in data["rows"])
    return data


def test_file_has_the_promised_keys(tmp_path: Path) -> None:
    write_result(tmp_path / "bench.json", BenchResult(BENCH_SCHEMA, host_facts(), (ROW,), (), AUDIT))
    data = read_json(tmp_path / "bench.json")
    assert data["rows"][0]["fraction_of_bound"] == 0.935
    assert data["audit"]["passed"] is True


@pytest.mark.parametrize(
    ("passed", "overlap_ns", "verdict"),
    [(True, (0, 0), "audit: PASS"), (False, (0, 7), "audit: FAIL")],
)
def test_table_tells_how_the_line_was_used(
    passed: bool, overlap_ns: tuple[int, int], verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = AuditResult("calendar", passed, 0.5, 0.5, 1, 1, 1, 1, overlap_ns, (0, 0), (2**20, 2**19), (2**21, 0))
    output_console().print(bench_table(BenchResult(BENCH_SCHEMA, {}, (ROW,), (LeftOut("mpi", "gone"),), seen)))
    shown = capsys.readouterr().out
    assert verdict in shown
    assert ("overlap by 7 ns" in shown) == any(overlap_ns)
    assert "left out: mpi: gone" in shown
    assert "93.5%" in shown
    assert "longest queue at each uplink: 1 MiB, 512 KiB (the calendar lets 2 MiB go at a stretch)" in shown
    assert "messages: 1 B, all in the room left for them" in shown
    assert "0.625" in shown
    assert "3 MiB" in shown
    assert "no calendar to keep to" not in shown


def test_table_tells_of_networks_that_are_not_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    line = BenchLine("slotted", "deterministic", 0.5, USE)
    output_console().print(
        bench_table(BenchResult(BENCH_SCHEMA, {}, (ROW,), lines=(replace(line, cross_traffic=0.0),)))
    )
    assert "others" not in capsys.readouterr().out
    row = replace(ROW, service="deterministic", cross_traffic=0.5)
    output_console().print(bench_table(BenchResult(BENCH_SCHEMA, {}, (row,), lines=(line,))))
    shown = capsys.readouterr().out
    told = " ".join(shown.split())
    assert "slotted, deterministic, others 50%: segments dropped: 2 by the policer, 1 by full queues, 3 at" in told
    assert "round trip of a co-tenant's small packets 20 ms, p99 30 ms" in told


def test_table_tells_what_plain_tcp_is_compared_for(capsys: pytest.CaptureFixture[str]) -> None:
    for transport, is_told in (("slotted", False), ("tcp", True)):
        output_console().print(bench_table(BenchResult(BENCH_SCHEMA, {}, (replace(ROW, transport=transport),))))
        assert ("tcp: same plans, plain TCP" in capsys.readouterr().out) == is_told


@pytest.mark.parametrize(
    ("prediction_error", "told"),
    [(-0.255, "34.2% late"), (0.03, "2.9% early"), (0.0001, "on time"), (None, None)],
)
def test_table_tells_when_a_call_came(prediction_error: float | None, told: str | None) -> None:
    assert came(replace(ROW, prediction_error=prediction_error)) == told


@pytest.mark.parametrize(
    ("fraction", "load", "is_unknown"), [(0.5, Load(2), True), (0.95, Load(2), False), (0.5, None, False)]
)
def test_table_tells_that_nobody_knows_the_limit(
    fraction: float, load: Load | None, is_unknown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = None if load is None else limits_of_row(fraction, load, scale_of(Topology.uniform(2, 2, 1e8, 10**7)))
    row = replace(ROW, fraction_of_bound=fraction, load=load, limits=limits)
    output_console().print(bench_table(BenchResult(BENCH_SCHEMA, {}, (row,))))
    assert ("more --iterations help" in capsys.readouterr().out) == is_unknown


def test_table_tells_that_there_is_no_calendar(capsys: pytest.CaptureFixture[str]) -> None:
    seen = replace(AUDIT, slotting="off", passed=False, window_capacity_bytes=(0, 0))
    output_console().print(bench_table(BenchResult(BENCH_SCHEMA, {}, (ROW,), (), seen)))
    assert "slotting was off, so there is no calendar to keep to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collective", "shuffle"], "collective='shuffle'"),
        (["--bytes", "64"], "bytes='64'"),
        (["--bytes", "3B"], "bytes=3"),
        (["--bytes", ""], "at least one"),
        (["--dtype", "complex256"], "complex256"),
        (["--iterations", "0"], "iterations=0"),
        (["--sites", "2"], "--sites need --lab"),
        (["--rate", "1 Gbit/s", "--round-trip", "1 ms"], "--rate, --round-trip need --lab"),
        (["--service", "deterministic", "--cross-traffic", "1"], "--service, --cross-traffic need --lab"),
        (["--lab", "--service", "good"], "service='good' is not known"),
        (["--lab", "--reserved", "1 Mbit/s"], "needs service=deterministic"),
        (["--lab", "--cross-traffic", "3"], "cross_traffic=3.0 must be a share"),
        (["--lab", "--cross-traffic-kind", "tcp"], "cross_traffic_kind='tcp' is of what others send"),
        (["--cross-traffic-kind", "tcp"], "--cross-traffic-kind need --lab"),
        (["--lab", "--transport", "pigeon"], "transport='pigeon'"),
        (["--lab", "--transport", "shm"], "one host only"),
        (["--lab", "--sites", "1"], "sites=1"),
        (["--lab", "--slotting", "sometimes"], "sometimes"),
        (["--lab", "--slotting", "turns", "--sites", "3"], "slotting='turns' is for two sites, and the topology has 3"),
        (["--json", "/no/such/directory/x.json"], "no directory"),
        (["--timeout", "60"], "timeout='60'"),
        (["--deadline", "1 min", "--queue", "1MB"], "--queue, --deadline need --lab"),
        (["--slotting", "off"], "--slotting need --lab"),
        (["--transport", "pigeon"], "transport='pigeon' is not known"),
        (["--relay", "--transport", "slotted", "--slotting", "turns", "--sites", "3"], "is for two sites"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def _spec(*transports: str) -> LabBench:
    return LabBench(SWEEP, transports, Topology.uniform(2, 1, 1e8, 10**6), Conditions(), "calendar", 30.0, 60.0)


def test_transport_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(spec: LabBench, transport: str, network: Network) -> Any:
        if transport == "gloo":
            raise DetcollError("a rank ended with exit code 1")
        return (ROW,), USE, AUDIT if transport == "slotted" else None

    monkeypatch.setattr(runs, "_run_transport", run)
    said: list[str] = []
    result = run_in_lab(_spec("slotted", "gloo", "mpi"), said.append)
    assert result.rows == (ROW, ROW)
    assert result.audit == AUDIT
    assert result.left_out == (LeftOut("gloo", "it failed: a rank ended with exit code 1", "best-effort"),)
    assert result.lines == (BenchLine("slotted", "best-effort", 0.0, USE), BenchLine("mpi", "best-effort", 0.0, USE))
    assert said == [
        "slotted: 1 row of 2 calls", "gloo: 1 row of 2 calls",
        "gloo failed and is left out: a rank ended with exit code 1", "mpi: 1 row of 2 calls",
    ]  # fmt: skip
    with pytest.raises(DetcollError, match="exit code 1"):
        run_in_lab(_spec("gloo"), said.append)


def test_every_network_has_rows_and_the_audit_that_failed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(spec: LabBench, transport: str, network: Network) -> Any:
        return (ROW,), USE, replace(AUDIT, passed=network.cross_traffic == 0, slotting=network.label)

    monkeypatch.setattr(runs, "_run_transport", run)
    spec = _spec("slotted")
    networks = parse_networks(("best-effort", "deterministic"), ("0", "0.5"))
    spec = replace(spec, networks=networks, topology=spec.topology.with_reserved(5e7))
    result = run_in_lab(spec, lambda line: None)
    assert [(row.service, row.cross_traffic) for row in result.rows] == [
        (service, share) for service in ("best-effort", "deterministic") for share in (0.0, 0.5)
    ]
    assert result.audit is not None
    assert result.audit.slotting == "best-effort, others offer 50%"
    output_console().print(bench_table(result))
    with pytest.raises(UsageError, match="needs a rate reserved"):
        run_in_lab(replace(spec, topology=spec.topology.with_reserved(None)), lambda line: None)


@pytest.mark.parametrize(
    ("slotting", "passed", "failed", "code"),
    [
        ("calendar", True, (), 0),
        ("calendar", False, (), 1),
        ("turns", False, (), 1),
        ("off", False, (), 0),
        ("calendar", True, (LeftOut("mpi", "it failed"),), 1),
    ],
)
def test_exit_code_tells_whether_the_calendar_was_kept(
    slotting: str, passed: bool, failed: tuple[LeftOut, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = AuditResult(slotting, passed, 1.0, 1.0, 1, 1, 1, 1, (0, 0), (0, 0), (1, 1), (1, 1))
    result = BenchResult(BENCH_SCHEMA, {}, (ROW,), failed, seen)
    monkeypatch.setattr("detcoll.cli.bench.run_in_lab", lambda spec, say: result)
    assert main(["bench", "--lab", "--slotting", slotting]) == code


def test_runs_alone(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = run_cli("bench", "--transport", "shm", "--bytes", "4KiB", "--iterations", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    [row] = read_json(path)["rows"]
    assert (row["ranks"], row["sites"], row["bytes"], row["bound_s"]) == (1, 1, 4096, None)
    assert "nobody launched this process, so it times 1 rank alone" in done.stderr


def test_runs_on_the_launchers_ranks(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    sweep = ["--collective", "all_reduce,broadcast,barrier", "--bytes", "4KiB,64KiB", "--dtype", "bfloat16"]
    ranks = ["run", "-n", "2", "-m", "detcoll"]
    done = run_cli(*ranks, "bench", "--transport", "shm", *sweep, "--iterations", "3", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Time of a call") == 1
    assert "alone" not in done.stderr
    rows = read_json(path)["rows"]
    assert [(row["collective"], row["bytes"]) for row in rows] == [
        ("all_reduce", 4096), ("all_reduce", 65536), ("broadcast", 4096), ("broadcast", 65536), ("barrier", 0),
    ]  # fmt: skip
    for row in rows:
        assert (row["transport"], row["ranks"], row["dtype"], row["start"]) == ("shm", 2, "bfloat16", "instant")
        assert 0 < row["min_s"] <= row["median_s"] <= row["p99_s"] <= row["max_s"]


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_a_reserved_rate_holds_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"
    fork_ranks_of_runs(monkeypatch)
    code = main([
        "bench", "--lab", "--ranks-per-site", "1", "--rate", "100 Mbit/s", "--round-trip", "4 ms", "--bytes", "1MiB",
        "--iterations", "6", "--service", "deterministic", "--cross-traffic", "0,2.0", "--reserved", "50 Mbit/s",
        "--json", str(path),
    ])  # fmt: skip
    data = read_json(path)
    quiet, busy = data["rows"]
    assert [(row["service"], row["cross_traffic"]) for row in (quiet, busy)] == [
        ("deterministic", 0),
        ("deterministic", 2),
    ]
    bound_s = 2**20 / (50e6 / 8) * 1500 / 1448 + 0.002
    seen = data["lines"][1]["use"]["co_tenant"]
    for row, line in zip((quiet, busy), data["lines"], strict=True):
        assert row["bound_s"] == pytest.approx(bound_s, rel=1e-3)
        assert row["median_s"] >= bound_s
        assert line["use"]["queue_dropped_segments"] == 0
        assert line["use"]["wire_bytes"] >= 8 * 2**20
        assert line["use"]["delay_p50_s"] < seen["median_s"] / 5
    assert busy["retransmits"] >= 0
    assert data["lines"][1]["use"]["burst_dropped_bytes"] > 0
    assert seen == busy["co_tenant"]
    assert 0 < seen["counted"] < seen["sent"]  # what left between calls and before them does not count
    assert seen["median_s"] > 0.1  # behind 2.5 MB of others, at half the line's rate
    assert code in (0, 1)  # on a busy machine the audit may fail


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_runs_in_the_lab(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = run_cli(
        "bench", "--lab", "--ranks-per-site", "1", "--rate", "200 Mbit/s", "--round-trip", "4 ms", "--bytes", "256KiB",
        "--iterations", "3", "--slotting", "share", "--json", str(path),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr  # on a busy machine the audit may fail
    data = read_json(path)
    [row] = data["rows"]
    assert (row["transport"], row["ranks"], row["sites"]) == ("slotted", 2, 2)
    line_s = 2**18 / (200e6 / 8)
    assert row["bound_s"] == pytest.approx(line_s * 1500 / 1448 + 0.002, rel=1e-3)
    assert row["median_s"] > line_s
    assert row["predicted_s"] >= row["bound_s"]
    assert data["audit"]["slotting"] == "share"
    assert data["audit"]["bulk_bytes"] >= 6 * 2**18


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_a_delay_that_no_router_keeps_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 50 us the router is late by more than a tenth on most machines, since it has to wake up."""
    path = tmp_path / "bench.json"
    fork_ranks_of_runs(monkeypatch)
    main([
        "bench", "--lab", "--ranks-per-site", "1", "--round-trip", "0.1 ms", "--bytes", "4KiB", "--iterations", "200",
        "--json", str(path),
    ])  # fmt: skip
    [row] = read_json(path)["rows"]
    load, limited_by = row["load"], [limit["by"] for limit in row["limits"]]
    is_late = load["router_late_s"] > 5e-6 or load["router_full_share"] > 0.1
    assert ("router" in limited_by) == (is_late and (row["fraction_of_bound"] or 0) < 0.9)
    assert (row["fraction_of_bound"] is None) == bool(limited_by)
    assert row["bound_s"] > 0
    assert 0 < load["processors_share"] <= 1
    assert load["router_share"] > 0
    told = "limited by the lab's router: all_reduce of 4 KiB: the router "
    assert (told in capsys.readouterr().out) == ("router" in limited_by)


@pytest.mark.parametrize(("columns", "width"), [(0, PIPE_WIDTH), (70, 70)])
def test_a_terminal_without_a_width_gets_every_column(
    monkeypatch: pytest.MonkeyPatch, columns: int, width: int
) -> None:
    ours, theirs = os.openpty()
    with open(ours, "rb"), open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr("os.get_terminal_size", lambda descriptor: os.terminal_size((columns, 24)))
        assert output_console().width == width
