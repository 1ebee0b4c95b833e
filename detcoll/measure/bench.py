"""Runs sweeps: on the ranks that a launcher started, or on ranks of the lab; one transport after another."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import detcoll
from detcoll.errors import DetcollError
from detcoll.lab import Lab, read_log
from detcoll.lab.audit import audit, read_traces
from detcoll.measure.aggregate import WIDE_AREA, Setting
from detcoll.measure.host import host_facts
from detcoll.measure.places import Places
from detcoll.measure.records import write_json
from detcoll.measure.results import BENCH_SCHEMA, AuditResult, BenchResult, LeftOut, Row
from detcoll.measure.sweep import Sweep, run_sweep
from detcoll.topology import Topology
from detcoll.trace import TRACE_VARIABLE

SLOTTED = "slotted"
SLOTTING_VARIABLE = "DETCOLL_SLOTTING"

Say = Callable[[str], None]
"""Gets a line of progress."""


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """What a rank in the lab is to time, and where its rows go."""

    sweep: Sweep
    transport: str
    topology: Topology
    rows_path: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class LabBench:
    """A sweep over emulated lines."""

    sweep: Sweep
    transports: tuple[str, ...]
    topology: Topology
    queue_bytes: int
    slotting: str | None
    timeout_s: float
    deadline_s: float


def run_here(
    sweep: Sweep, transports: Sequence[str], topology: Path | None, timeout_s: float
) -> tuple[int, tuple[Row, ...]]:
    """Time ``sweep`` on the ranks of the launcher that started this process; all of them call it.

    Returns
    -------
    rank, rows : int, tuple of Row
        The rank of this process, and the rows, which are the same on every rank.
    """
    sweep.validate()
    rank, rows = 0, list[Row]()
    for transport in transports:
        comm = detcoll.init(transport=transport, topology=topology, timeout=timeout_s)
        rank = comm.rank
        rows += run_sweep(comm, sweep)
        detcoll.finalize()
    return rank, tuple(rows)


def run_in_lab(bench: LabBench, say: Say) -> BenchResult:
    """Time the sweep of ``bench`` on ranks of the lab, each transport in a fresh lab.

    A slotted run is audited: what the router saw is held against the calendars that the ranks kept.

    Returns
    -------
    BenchResult
        The rows, which transports failed where more than one was asked for, and the audit.

    Raises
    ------
    TransportUnavailable
        If the lab cannot run here; nothing was started.
    DetcollError
        If the only transport fails.
    """
    bench.sweep.validate()
    rows: list[Row] = []
    failed: list[LeftOut] = []
    audited: AuditResult | None = None
    for transport in bench.transports:
        say(f"{transport}: {len(bench.sweep.points())} points, {bench.sweep.iterations} calls each")
        try:
            more, seen = _run_transport(bench, transport)
        except DetcollError as error:
            if len(bench.transports) == 1:
                raise
            failed.append(LeftOut(transport, f"it failed: {error}"))
            say(f"{transport} failed and is left out: {error}")
        else:
            rows += more
            audited = seen or audited
    return BenchResult(BENCH_SCHEMA, host_facts(), tuple(rows), tuple(failed), audited)


def _run_transport(bench: LabBench, transport: str) -> tuple[tuple[Row, ...], AuditResult | None]:
    with tempfile.TemporaryDirectory(prefix="detcoll-bench-") as name:
        directory = Path(name)
        config = BenchConfig(bench.sweep, transport, bench.topology, str(directory / "rows.json"), bench.timeout_s)
        write_json(directory / "config.json", config)
        env, log_path = {SLOTTING_VARIABLE: bench.slotting} if bench.slotting else {}, None
        if transport == SLOTTED:
            env[TRACE_VARIABLE] = str(directory)
            log_path = directory / "arrivals.npy"
        with Lab(bench.topology, queue_bytes=bench.queue_bytes, log_path=log_path) as lab:
            argv = [sys.executable, "-m", "detcoll.measure.bench", str(directory / "config.json")]
            setting = Setting(transport, transport, WIDE_AREA)
            Places(bench.topology, lab, bench.deadline_s).run(setting, argv, directory, env)
            late_ns = lab.statistics().late_peak_ns
        rows = msgspec.json.decode(Path(config.rows_path).read_bytes(), type=tuple[Row, ...])
        return rows, None if log_path is None else _audit(bench, log_path, directory, late_ns)


def _audit(bench: LabBench, log_path: Path, traces: Path, router_late_ns: int) -> AuditResult:
    """Hold the router's log against the ranks' calendars."""
    paths = [traces / f"rank{rank}.json" for rank in range(bench.topology.size)]
    seen = audit(read_log(log_path), read_traces(paths), bench.topology, router_late_ns)
    return AuditResult(
        slotting=seen.mode,
        passed=seen.is_slotted and seen.queues_within_windows,
        inside_share=seen.kept_share,
        payload_inside_share=seen.payload_inside_share,
        bulk_bytes=seen.bulk_bytes,
        express_bytes=seen.express_bytes,
        express_beyond_bytes=seen.express_bytes - seen.express_inside_bytes,
        other_bytes=seen.other_bytes,
        warm_up_bytes=seen.warm_up_bytes,
        overlap_ns=seen.overlap_ns,
        clock_spread_ns=seen.clock_spread_ns,
        peak_queue_bytes=seen.peak_queue_bytes,
        window_capacity_bytes=seen.window_capacity_bytes,
        ranks_share=seen.ranks_share,
        asleep_bytes=seen.asleep_bytes,
    )


def main(argv: Sequence[str]) -> None:
    """Run one rank in the lab: ``python -m detcoll.measure.bench CONFIG.json``."""
    config = msgspec.json.decode(Path(argv[1]).read_bytes(), type=BenchConfig)
    comm = detcoll.init(transport=config.transport, topology=config.topology, timeout=config.timeout_s)
    rows = run_sweep(comm, config.sweep)
    if comm.rank == 0:
        write_json(Path(config.rows_path), rows)
    detcoll.finalize()


if __name__ == "__main__":
    main(sys.argv)
