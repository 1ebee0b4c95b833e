"""Runs one workload in every setting, in turns, and compares.

A machine is noisy, and what it is busy with changes over minutes. So the settings take turns: every setting runs a
part of its iterations in each round, odd rounds in reverse order. The digits go on in each round from where the setting
left them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from detcoll.emulation.lab import Conditions, Lab, Service, why_unavailable
from detcoll.emulation.relay import Relay
from detcoll.errors import DetcollError, TransportUnavailable, UsageError
from detcoll.marks import MARKS_VARIABLE, was_job_opened
from detcoll.measure.aggregate import (
    Round,
    ScriptRound,
    Setting,
    make_run,
    make_script_run,
    marked_span_ns,
    measured_span_ns,
)
from detcoll.measure.gains import (
    OVERLAP,
    TOPOLOGY,
    environment_without,
    flattened,
    networks_without,
    require_removable,
)
from detcoll.measure.host import host_facts
from detcoll.measure.limits import doubts, limits_of_run, scale_of, with_doubts
from detcoll.measure.lines import LineRecord, read_lines
from detcoll.measure.load import Readings, Spans, Watch, load_of
from detcoll.measure.networks import QUIET, Network, require_usable
from detcoll.measure.records import WorkerConfig, read_marks, read_record, write_json
from detcoll.measure.results import LAB, MEASURE_SCHEMA, RELAY, SINGLE_CLUSTER, WIDE_AREA, LeftOut, Measurement, Run
from detcoll.measure.runner import Runner
from detcoll.quantities import format_count
from detcoll.registry import SLOTTED, title_of
from detcoll.topology import Topology
from detcoll.trace import TRACE_VARIABLE
from detcoll.workloads.arrays import CUDA, require_device
from detcoll.workloads.digits import HELD_OUT, LAYERS, PARAMETERS, save_digits
from detcoll.workloads.workload import WorkloadSpec

CLUSTER_TRANSPORT = "shm"
WARMUP = 3

REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Lets products of matrices by cuBLAS give the same bits in every run (NVIDIA's documentation of cuBLAS)."""

Say = Callable[[str], None]
"""Gets a line of progress."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What to measure.

    ``workload`` : a built-in workload, or None where ``script`` (program and arguments) is the workload.
    ``iterations`` : measured in each setting, all ``rounds`` together.
    ``networks`` : what the lines are in turn; ``topology`` has the reserved rates, which only deterministic ones grant.
    ``timeout_s`` : of a collective.  ``deadline_s`` : of one setting in one round.  ``warmup`` : iterations before the
    measured ones of each round.
    ``without`` : of `detcoll.measure.gains.MEANS`; each is switched off in slotted runs of their own.
    ``relay`` : the lines are those of a relay instead of the lab, which go with ``QUIET`` alone.
    ``traces`` : folder for the traces of the last round of slotted runs, one folder in it for each; none unless given.
    """

    topology: Topology
    workload: WorkloadSpec | None
    script: tuple[str, ...]
    iterations: int
    rounds: int
    against: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    conditions: Conditions
    networks: tuple[Network, ...] = (QUIET,)
    timeout_s: float = 60.0
    deadline_s: float = 600.0
    traces: Path | None = None
    relay: bool = False
    warmup: int = WARMUP
    without: tuple[str, ...] = ()

    def validate(self) -> None:
        """Refuse what cannot be run.

        Raises
        ------
        UsageError
            If a figure, the script or the device cannot be used; names it and what was expected.
        """
        if self.rounds < 1:
            raise UsageError(f"rounds={self.rounds} must be at least 1")
        if self.warmup < 1:
            raise UsageError(f"warmup={self.warmup} must be at least 1: before the first, nothing is connected")
        if SLOTTED in self.against or len(set(self.against)) < len(self.against):
            raise UsageError(f"against={','.join(self.against)!r}: {SLOTTED} is measured anyway, and each other once")
        if self.workload is not None and self.iterations < self.rounds:
            raise UsageError(f"iterations={self.iterations} must be at least one for each of {self.rounds} rounds")
        if self.workload is None and not Path(self.script[0]).is_file():
            is_option = self.script[0].startswith("-")
            what = "no option of measure; see detcoll measure --help" if is_option else "not a file"
            raise UsageError(f"script={self.script[0]!r} is {what}")
        if self.workload is None and len({len(site.ranks) for site in self.topology.sites}) > 1:
            raise UsageError("a script needs sites of equal size, so that a single cluster can be grouped like them")
        if self.workload is not None:
            require_device(self.workload.device, np.dtype(np.float32))
        require_removable(self.without, self.topology, self.networks, self.workload is None)
        require_usable(self.topology, self.networks, self.conditions)

    def settings(self) -> tuple[Setting, ...]:
        """Return the settings to measure; the single cluster is first."""
        return (
            Setting("single cluster", CLUSTER_TRANSPORT, SINGLE_CLUSTER),
            *(
                Setting(title_of(name), name, WIDE_AREA, network)
                for network in self.networks
                for name in (SLOTTED, *self.against)
            ),
            *(
                Setting(f"{SLOTTED} without {mean}", SLOTTED, WIDE_AREA, network, mean)
                for mean in self.without
                for network in networks_without(mean, self.networks)
            ),
        )

    def parts(self) -> list[tuple[int, int]]:
        """Return the first iteration of each round and how many it has."""
        whole, rest = divmod(self.iterations, self.rounds)
        counts = [whole + (index < rest) for index in range(self.rounds)]
        return [(sum(counts[:index]), count) for index, count in enumerate(counts)]


class EndedEarly(Exception):
    """A measurement ended before its last round. ``result`` : of its whole rounds.  ``cause`` : what ended it."""

    def __init__(self, result: Measurement, cause: BaseException) -> None:
        super().__init__(result.ended_early)
        self.result, self.cause = result, cause


def run_experiment(experiment: Experiment, say: Say) -> Measurement:
    """Measure every setting and return the comparison.

    Parameters
    ----------
    experiment : Experiment
        What to measure.
    say : callable
        Gets a line of progress before each run.

    Raises
    ------
    UsageError, TransportUnavailable
        If something cannot be used or is missing; nothing was started.
    DetcollError
        If the single cluster or the slotted run fails in the first round. Of the others, and in best effort beside
        others' traffic, a failure is kept in ``left_out``.
    EndedEarly
        If one of those fails later, or this process is told to end: with the comparison of the rounds that are whole.
    """
    experiment.validate()
    if not experiment.relay and (reason := why_unavailable()) is not None:
        raise TransportUnavailable(reason)
    with tempfile.TemporaryDirectory(prefix="detcoll-measure-") as directory:
        if experiment.workload is not None and experiment.workload.name == "digits":
            save_digits(_digits_path(Path(directory)))
        session = _Session(experiment, Runner(experiment.topology, experiment.deadline_s), Path(directory))
        try:
            session.run_all(say)
        except (DetcollError, KeyboardInterrupt, SystemExit) as error:
            if not session.whole_rounds:
                raise
            raise EndedEarly(session.result_of_whole_rounds(_why_ended(error)), error) from error
    return session.result()


def _why_ended(error: BaseException) -> str:
    return str(error) if isinstance(error, DetcollError) else "the command was interrupted"


@dataclass(slots=True)
class _Session:
    """What one measurement has gathered so far."""

    experiment: Experiment
    runner: Runner
    directory: Path
    rounds: dict[Setting, list[Round]] = field(default_factory=dict)
    script_rounds: dict[Setting, list[ScriptRound]] = field(default_factory=dict)
    lines: dict[Setting, list[LineRecord]] = field(default_factory=dict)
    readings: dict[Setting, list[Readings]] = field(default_factory=dict)
    failed: dict[Setting, LeftOut] = field(default_factory=dict)
    whole_rounds: int = 0

    def run_all(self, say: Say) -> None:
        settings = self.experiment.settings()
        for number in range(self.experiment.rounds):
            for setting in settings if number % 2 == 0 else settings[::-1]:
                if setting not in self.failed:
                    say(f"round {number + 1} of {self.experiment.rounds}: {setting.title}")
                    self._run(setting, number, say)
            self.whole_rounds += 1

    def _run(self, setting: Setting, number: int, say: Say) -> None:
        try:
            if self.experiment.workload is None:
                self._run_script(setting, number)
            else:
                self._run_workload(setting, number, self.experiment.workload)
        except DetcollError as error:
            if not _may_fail(setting):
                raise
            self.failed[setting] = LeftOut(setting.name, f"it failed: {error}", setting.network.label)
            say(f"{setting.title} failed and is left out: {error}")

    def _run_workload(self, setting: Setting, number: int, workload: WorkloadSpec) -> None:
        here = self._directory_of(setting, number)
        config = self._config(setting, number, workload, here)
        write_json(here / "config.json", config)
        argv = [sys.executable, "-m", "detcoll.measure.worker", str(here / "config.json")]
        self._run_ranks(setting, argv, here, self._environment(setting, number, here))
        ranks = range(self.experiment.topology.size)
        self.rounds.setdefault(setting, []).append([read_record(config.record_path(rank)) for rank in ranks])

    def _run_ranks(
        self, setting: Setting, argv: Sequence[str], here: Path, env: Mapping[str, str] | None = None
    ) -> float:
        """Run the ranks, keep what the lines and the machine did meanwhile, and return how long it took."""
        with Watch() as watch:
            total_s = self._run_watched(watch, setting, argv, here, env)
        self.readings.setdefault(setting, []).append(watch.readings())
        return total_s

    def _run_watched(
        self, watch: Watch, setting: Setting, argv: Sequence[str], here: Path, env: Mapping[str, str] | None
    ) -> float:
        """Run the ranks, apart in a fresh lab or together."""
        if not setting.is_wide:
            return self.runner.run(setting, argv, here, env)
        network, experiment = setting.network, self.experiment
        if experiment.relay:
            with Relay(network.topology(experiment.topology), experiment.conditions.queue_bytes) as relay:
                watch.router_pid = relay.pid
                total_s = self.runner.run(setting, argv, here, env, relay)
                watch.router_late_s = relay.statistics().late_mean_ns / 1e9
                return total_s
        with Lab(network.topology(experiment.topology), network.conditions(experiment.conditions)) as lab:
            watch.router_pid = lab.router_pid
            total_s = self.runner.run(setting, argv, here, env, lab)
            seen = read_lines(lab, network.service)
        watch.router_late_s = seen.statistics.late_mean_ns / 1e9
        self.lines.setdefault(setting, []).append(seen)
        return total_s

    def _config(self, setting: Setting, number: int, workload: WorkloadSpec, here: Path) -> WorkerConfig:
        topology = setting.network.topology(self.experiment.topology)
        first, count = self.experiment.parts()[number]
        if workload.name == "digits":
            workload = replace(workload, data_path=str(_digits_path(self.directory)))
        before = self._directory_of(setting, number - 1) / "state.npz" if number else None
        return WorkerConfig(
            workload=replace(workload, overlap=setting.without != OVERLAP),
            transport=setting.transport,
            topology=topology if setting.is_wide else topology.as_single_cluster(),
            iterations=count,
            warmup=self.experiment.warmup,
            timeout_s=self.experiment.timeout_s,
            output_dir=str(here),
            first_iteration=first,
            resume_path=str(before) if before is not None and workload.name == "digits" else None,
            checkpoint_path=str(here / "state.npz"),
        )

    def _run_script(self, setting: Setting, number: int) -> None:
        here = self._directory_of(setting, number)
        program, *arguments = self.experiment.script
        argv = [sys.executable, program, *arguments] if program.endswith(".py") else [program, *arguments]
        env = {MARKS_VARIABLE: str(here), "DETCOLL_TRANSPORT": setting.transport}
        env |= self._environment(setting, number, here)
        if not setting.is_wide:
            env["DETCOLL_SITES"] = str(len(self.experiment.topology.sites))
        total_s = self._run_ranks(setting, argv, here, env)
        if not was_job_opened(here):
            raise DetcollError(
                f"{program} does not use detcoll, so all transports would show the same; call detcoll.init() in it, or "
                'init_process_group("detcoll")'
            )
        marks = tuple(read_marks(path) for path in sorted(here.glob("marks*.json")))
        self.script_rounds.setdefault(setting, []).append(ScriptRound(total_s, marks))

    def _environment(self, setting: Setting, number: int, here: Path) -> dict[str, str]:
        """Return what ranks are told beside what all are: their topology, what is switched off, where traces go."""
        told = environment_without(setting.without) | self._tracing(setting, number)
        if self.experiment.workload is not None and self.experiment.workload.device == CUDA:
            told |= REPEATABLE
        if setting.is_wide:
            topology = setting.network.topology(self.experiment.topology)
            path = here / "topology.toml"
            path.write_text((flattened(topology) if setting.without == TOPOLOGY else topology).to_toml(), "utf-8")
            told["DETCOLL_TOPOLOGY"] = str(path)
        return told | ({"DETCOLL_SITE": ""} if setting.without == TOPOLOGY else {})

    def _tracing(self, setting: Setting, number: int) -> dict[str, str]:
        """Return what makes ranks keep a trace: of slotted runs, in their last round."""
        traces = self.experiment.traces
        if traces is None or setting.transport != SLOTTED or number < self.experiment.rounds - 1:
            return {}
        return {TRACE_VARIABLE: str(traces.resolve() / self._directory_of(setting, number).name)}

    def _directory_of(self, setting: Setting, number: int) -> Path:
        network = f"{setting.network.service.value}-{setting.network.cross_traffic:g}"
        name = setting.name.replace(" ", "-") if setting.without else setting.transport
        folder = self.directory / f"{setting.where}-{name}-{network}-{number}"
        folder.mkdir(exist_ok=True)
        return folder

    def result_of_whole_rounds(self, why: str) -> Measurement:
        """Return the comparison of the rounds that are whole, and that it ended for the reason ``why``."""
        for kept in (self.rounds, self.script_rounds, self.lines, self.readings):
            for entries in kept.values():
                del entries[self.whole_rounds :]
        asked = self.experiment
        iterations = sum(count for _, count in asked.parts()[: self.whole_rounds])
        self.experiment = replace(asked, iterations=iterations, rounds=self.whole_rounds)
        told = f"after {self.whole_rounds} of {format_count(asked.rounds, 'round')}: {why}"
        return replace(self.result(), ended_early=told)

    def result(self) -> Measurement:
        """Return the comparison."""
        runs: list[Run] = []
        for setting in self.experiment.settings():
            if setting not in self.failed:
                runs.append(self._limited(setting, self._make(setting, runs[0] if runs else None), runs))
        runs = list(with_doubts(runs))
        return Measurement(
            schema=MEASURE_SCHEMA,
            host=host_facts(),
            workload=_describe(self.experiment),
            runs=tuple(runs),
            left_out=(*self.experiment.left_out, *self.failed.values()),
            digests_equal=digests_equal(runs) if self.experiment.workload is not None else None,
            doubts=tuple(doubts(runs)),
        )

    def _limited(self, setting: Setting, run: Run, before: Sequence[Run]) -> Run:
        """Return ``run`` with the load of the machine meanwhile, and what of the lab limited it."""
        readings, workload = self.readings[setting], self.experiment.workload
        spans_ns: list[Spans | None] = [[measured_span_ns(records)] for records in self.rounds.get(setting, ())]
        spans_ns += [marked_span_ns(one.marks) for one in self.script_rounds.get(setting, ())]
        load = load_of(readings, spans_ns)
        computes = workload is None or workload.name == "digits" or workload.compute_kind != "wait"
        scale = scale_of(self.experiment.topology)
        limits = limits_of_run(load, before[0].load if before else None, scale, computes=computes)
        return replace(run, load=load, limits=limits)

    def _make(self, setting: Setting, baseline: Run | None) -> Run:
        workload = self.experiment.workload
        if workload is None:
            return make_script_run(setting, self.script_rounds[setting], baseline, self.lines.get(setting, ()))
        arithmetic_s = workload.compute_ns / 1e9 if workload.name == "synthetic" else None
        topology = setting.network.topology(self.experiment.topology)
        lines = self.lines.get(setting, ())
        return make_run(setting, self.rounds[setting], topology, baseline, arithmetic_s, lines)


def _may_fail(setting: Setting) -> bool:
    """Tell whether the others are worth measuring without it: all but slotted on lines that are not full."""
    is_crowded = setting.network.service is Service.BEST_EFFORT and setting.network.cross_traffic > 0
    return setting.transport not in (CLUSTER_TRANSPORT, SLOTTED) or is_crowded or setting.without is not None


def digests_equal(runs: Sequence[Run]) -> bool | None:
    """Tell whether slotted runs across sites with its grouping have the single cluster's digest; None without any."""
    wanted = next(run.result_digest for run in runs if run.transport == CLUSTER_TRANSPORT)
    slotted = [run.result_digest for run in runs if run.transport == SLOTTED and run.without != TOPOLOGY]
    return wanted is not None and all(digest == wanted for digest in slotted) if slotted else None


def _digits_path(directory: Path) -> Path:
    return directory / "digits.npz"


def _describe(experiment: Experiment) -> dict[str, Any]:
    """Return the ``workload`` of the result file: what ran, and over which lines."""
    topology = experiment.topology
    ranks = [len(site.ranks) for site in topology.sites]
    described: dict[str, Any] = {
        "emulation": RELAY if experiment.relay else LAB,
        "iterations": experiment.iterations,
        "rounds": experiment.rounds,
        "sites": len(ranks),
        "ranks_per_site": ranks[0] if len(set(ranks)) == 1 else None,
        "uplink_bytes_per_s": [site.uplink_bytes_per_s for site in topology.sites],
        "round_trip_s": [2 * link.one_way_ns / 1e9 for _, link in topology.links],
        "mtu_bytes": topology.mtu_bytes,
        "queue_bytes": experiment.conditions.queue_bytes,
        "reserved_bytes_per_s": [link.reserved_bytes_per_s for _, link in topology.links],
        "burst_bytes": [
            experiment.conditions.burst_for(link.reserved_bytes_per_s)
            for _, link in topology.links
            if link.reserved_bytes_per_s is not None
        ],
    }
    workload = experiment.workload
    if workload is None:
        return {"name": "script", "script": Path(experiment.script[0]).name, **described, "iterations": None}
    described |= {"name": workload.name, "bucket_bytes": workload.bucket_bytes, "warmup": experiment.warmup}
    described["device"] = workload.device
    if workload.name == "synthetic":
        described |= {"compute_s": workload.compute_ns / 1e9, "compute_kind": workload.compute_kind}
        return described | {"gradient_bytes": workload.gradient_bytes}
    layers = list(LAYERS)
    described["batches"] = workload.batches
    return described | {"gradient_bytes": PARAMETERS * 4, "layers": layers, "held_out": HELD_OUT, "dtype": "float32"}
