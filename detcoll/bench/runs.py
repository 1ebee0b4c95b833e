"""Runs sweeps: on the ranks that a launcher started, or on ranks of the lab; one transport after another."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

import detcoll
from detcoll.bench.sweep import Sweep, run_sweep
from detcoll.emulation.lab import Conditions, Lab, Service, read_log
from detcoll.emulation.lab.audit import audit, read_traces
from detcoll.emulation.lab.log import of_ranks
from detcoll.emulation.relay import Relay
from detcoll.errors import DetcollError
from detcoll.measure.aggregate import Setting
from detcoll.measure.host import host_facts
from detcoll.measure.limits import limits_of_row, scale_of
from detcoll.measure.lines import LineUse, read_lines, use_of
from detcoll.measure.load import Readings, Watch, load_of
from detcoll.measure.networks import QUIET, Network, require_usable
from detcoll.measure.records import write_json
from detcoll.measure.results import (
    BENCH_SCHEMA,
    LAB,
    RELAY,
    WIDE_AREA,
    AuditResult,
    BenchLine,
    BenchResult,
    LeftOut,
    Row,
)
from detcoll.measure.runner import Runner
from detcoll.quantities import format_count
from detcoll.registry import SLOTTED
from detcoll.topology import Topology
from detcoll.trace import TRACE_VARIABLE

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
    """A sweep over emulated lines, which are each of ``networks`` in turn, or with ``relay`` those of a relay."""

    sweep: Sweep
    transports: tuple[str, ...]
    topology: Topology
    conditions: Conditions
    slotting: str | None
    timeout_s: float
    deadline_s: float
    networks: tuple[Network, ...] = (QUIET,)
    relay: bool = False


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
    """Time the sweep of ``bench`` on ranks of the lab, each transport on each network in a fresh lab.

    A slotted run is audited: what the router saw is held against the calendars that the ranks kept.

    Returns
    -------
    BenchResult
        The rows, which transports failed where more than one was asked for, and the audit.

    Raises
    ------
    TransportUnavailable
        If the lab cannot run here; nothing was started.
    UsageError
        If the lab cannot be one of the networks; nothing was started.
    DetcollError
        If the only transport fails.
    """
    bench.sweep.validate()
    require_usable(bench.topology, bench.networks, bench.conditions)
    rows, lines, failed = list[Row](), list[BenchLine](), list[LeftOut]()
    audits: list[AuditResult] = []
    runs = [(transport, network) for network in bench.networks for transport in bench.transports]
    count = len(bench.sweep.points()) * len(bench.sweep.devices)
    for transport, network in runs:
        where = Setting(transport, transport, WIDE_AREA, network).title
        say(f"{where}: {format_count(count, 'row')} of {format_count(bench.sweep.iterations, 'call')}")
        try:
            more, use, seen = _run_transport(bench, transport, network)
        except DetcollError as error:
            if len(runs) == 1:
                raise
            failed.append(LeftOut(transport, f"it failed: {error}", network.label))
            say(f"{where} failed and is left out: {error}")
        else:
            service, share = network.service.value, network.cross_traffic
            rows += [replace(row, service=service, cross_traffic=share) for row in more]
            lines += [] if use is None else [BenchLine(transport, service, share, use)]
            audits += [] if seen is None else [seen]
    emulation = RELAY if bench.relay else LAB
    audited = next((seen for seen in audits if not seen.passed), audits[-1] if audits else None)
    return BenchResult(BENCH_SCHEMA, host_facts(), tuple(rows), tuple(failed), audited, tuple(lines), None, emulation)


def _run_transport(
    bench: LabBench, transport: str, network: Network
) -> tuple[tuple[Row, ...], LineUse | None, AuditResult | None]:
    topology = network.topology(bench.topology)
    with tempfile.TemporaryDirectory(prefix="detcoll-bench-") as name:
        directory = Path(name)
        config = BenchConfig(bench.sweep, transport, topology, str(directory / "rows.json"), bench.timeout_s)
        write_json(directory / "config.json", config)
        env, log_path = {SLOTTING_VARIABLE: bench.slotting} if bench.slotting else {}, None
        argv = [sys.executable, "-m", "detcoll.bench.runs", str(directory / "config.json")]
        setting, runner = Setting(transport, transport, WIDE_AREA, network), Runner(topology, bench.deadline_s)
        if bench.relay:
            with Watch() as watch, Relay(topology, bench.conditions.queue_bytes) as relay:
                watch.router_pid = relay.pid
                runner.run(setting, argv, directory, env, relay)
                watch.router_late_s = relay.statistics().late_mean_ns / 1e9
            return _with_limits(_read_rows(config), topology, watch.readings()), None, None
        if transport == SLOTTED:
            env[TRACE_VARIABLE] = str(directory)
            log_path = directory / "arrivals.npy"
        conditions = network.conditions(bench.conditions)
        with Watch() as watch, Lab(topology, conditions, log_path=log_path) as lab:
            watch.router_pid = lab.router_pid
            runner.run(setting, argv, directory, env, lab)
            seen = read_lines(lab, network.service)
            watch.router_late_s = seen.statistics.late_mean_ns / 1e9
        late_ns = seen.statistics.late_peak_ns
        audited = None if log_path is None else _audit(topology, network, log_path, directory, late_ns)
        rows = tuple(replace(row, co_tenant=use_of([seen], [_spans_ns([row])]).co_tenant) for row in _read_rows(config))
        rows = _with_limits(rows, topology, watch.readings())
        return rows, use_of([seen], [_spans_ns(rows)]), audited


def _with_limits(rows: Sequence[Row], topology: Topology, readings: Readings) -> tuple[Row, ...]:
    """Return ``rows`` with what limited each; one that the lab limited is not held against its lines."""
    scale, marked = scale_of(topology), list[Row]()
    for row in rows:
        load = load_of([readings], [_spans_ns([row])])
        limits = limits_of_row(row.fraction_of_bound, load, scale)
        row = replace(row, load=load, limits=limits)
        marked.append(replace(row, fraction_of_bound=None, prediction_error=None) if limits else row)
    return tuple(marked)


def _spans_ns(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return when timed calls were under way; ranks of a lab are on one host and so share a clock."""
    return [
        (round(began_s * 1e9), round((began_s + took_s) * 1e9))
        for row in rows
        for began_s, took_s in zip(row.began_s, row.samples_s, strict=True)
    ]


def _read_rows(config: BenchConfig) -> tuple[Row, ...]:
    return msgspec.json.decode(Path(config.rows_path).read_bytes(), type=tuple[Row, ...])


def _audit(topology: Topology, network: Network, log_path: Path, traces: Path, router_late_ns: int) -> AuditResult:
    """Hold the router's log of what ranks sent against their calendars."""
    paths = [traces / f"rank{rank}.json" for rank in range(topology.size)]
    seen = audit(of_ranks(read_log(log_path)), read_traces(paths), topology, router_late_ns)
    # In best effort the queue is also that of others, for whom no calendar answers.
    is_ours = network.service is Service.DETERMINISTIC or not network.cross_traffic
    return AuditResult(
        slotting=seen.mode,
        passed=seen.is_slotted and (seen.queues_within_windows or not is_ours),
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
    """Run one rank in the lab: ``python -m detcoll.bench.runs CONFIG.json``."""
    config = msgspec.json.decode(Path(argv[1]).read_bytes(), type=BenchConfig)
    comm = detcoll.init(transport=config.transport, topology=config.topology, timeout=config.timeout_s)
    rows = run_sweep(comm, config.sweep)
    if comm.rank == 0:
        write_json(Path(config.rows_path), rows)
    detcoll.finalize()


if __name__ == "__main__":
    main(sys.argv)
