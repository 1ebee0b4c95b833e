"""``detcoll measure``: how close a run across sites comes to the same run inside one cluster."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.text import Text

from detcoll.cli.invocation import command_line
from detcoll.cli.lines import ANY_LINES, ANY_NETWORK, LineOptions, NetworkOptions, comma_separated, given, present
from detcoll.cli.quantity import Quantity, Whole
from detcoll.cli.relaying import must_relay, refuse_with_relay
from detcoll.cli.results import RESULTS_GROUP, ResultOptions
from detcoll.cli.terminal import error_console, output_console
from detcoll.emulation.lab import Conditions
from detcoll.errors import UsageError
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.experiment import WARMUP, EndedEarly, Experiment, run_experiment
from detcoll.measure.results import LeftOut, Measurement, write_result
from detcoll.measure.tables import measurement_table
from detcoll.outputs import write_file
from detcoll.quantities import parse_duration_ns, parse_size_bytes, parse_timeout_s
from detcoll.report import forget_traces, gather, write_report
from detcoll.report.inputs import RESULTS, TOPOLOGY, TRACES
from detcoll.topology import Topology
from detcoll.workloads.arrays import CPU
from detcoll.workloads.compute import ComputeKind
from detcoll.workloads.workload import WorkloadName, WorkloadSpec

_DEFAULT: WorkloadName = "digits"
_ITERATIONS = {"digits": 60, "synthetic": 20}
_ROUNDS, _SCRIPT_ROUNDS = 4, 2
_COMPUTE, _GRADIENT, _BUCKET = "400 ms", "16MiB", "1MiB"


@Parameter(name="*", group="How much is measured")
@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """How much is measured."""

    iterations: Whole | None = None
    """Iterations measured in each setting; 60 for digits and 20 for synthetic unless given."""

    rounds: Whole | None = None
    """In how many rounds the settings take turns, each of which starts the ranks anew; 4 unless given, 2 of a script.
    More rounds even out what the machine is busy with."""

    warmup: Whole | None = None
    """Iterations of each setting before the measured ones, in each round; 3 unless given."""


@Parameter(name="*", group="What is trained")
@dataclass(frozen=True, kw_only=True)
class TrainedOptions:
    """What is trained, unless a script says it."""

    workload: WorkloadName | None = None
    """digits: real training of a perceptron on handwritten digits (the default). synthetic: given compute time and
    gradient size."""

    bucket_bytes: Quantity | None = None
    """What is reduced at once while the backward pass goes on; 1MiB unless given. A script has its own."""

    batches: Whole | None = None
    """Of the digits: batches in an iteration, whose gradients are added up before they are reduced; 1 unless given."""

    device: Literal["cpu", "cuda"] | None = None
    """Where the workload's arrays are and its arithmetic is done: cpu (the default), or cuda (by torch, or else by
    CuPy; ranks use the CUDA devices of this machine in turn, and share them). A script chooses its own. The digits are
    too small for a GPU, which mostly waits for Python: for an efficiency, give --workload synthetic and your compute
    time."""


@Parameter(name="*", group="A synthetic iteration")
@dataclass(frozen=True, kw_only=True)
class SyntheticOptions:
    """A synthetic iteration."""

    compute: Quantity | None = None
    """Compute time of a synthetic iteration, a third forward and two thirds backward; "400 ms" unless given."""

    compute_kind: ComputeKind | None = None
    """How a synthetic iteration spends it: wait (on the wall clock, as for a GPU; the default), or python or numpy (so
    much processor time, with the interpreter's lock and without)."""

    gradient_bytes: Quantity | None = None
    """Gradient of a synthetic iteration; 16MiB unless given."""


@Parameter(name="*", group="What slotted is compared with")
@dataclass(frozen=True, kw_only=True)
class ComparedOptions:
    """What the slotted transport is compared with."""

    against: str | None = None
    """Transports to compare with, separated by commas, or none; "tcp,gloo,mpi" unless given, with --relay none."""

    without: str = "none"
    """What to switch off in slotted runs of their own in the deterministic service, each on its own, to show what it
    gains: some of topology, slots, overlap, reservation, separated by commas."""

    def transports(self, *, relay: bool) -> tuple[tuple[str, ...], tuple[LeftOut, ...]]:
        """Return the transports to compare with, and those that cannot be used here."""
        default = "" if relay else "tcp,gloo,mpi"
        return present(comma_separated(default if self.against is None else self.against), "against")


@Parameter(name="*", group=RESULTS_GROUP)
@dataclass(frozen=True, kw_only=True)
class MeasureResultOptions(ResultOptions):
    """A file for the results, and a directory for a report of them with traces."""

    report: Path | None = None
    """Directory for report.html, its results.json, and traces of the slotted run's last round."""


_TRAINED, _LENGTH, _SYNTHETIC, _COMPARED = TrainedOptions(), LengthOptions(), SyntheticOptions(), ComparedOptions()
_RESULTS = MeasureResultOptions()


def measure(
    *script: Annotated[str, Parameter(allow_leading_hyphen=True)],
    trained: TrainedOptions = _TRAINED,
    lines: LineOptions = ANY_LINES,
    network: NetworkOptions = ANY_NETWORK,
    length: LengthOptions = _LENGTH,
    synthetic: SyntheticOptions = _SYNTHETIC,
    compared: ComparedOptions = _COMPARED,
    results: MeasureResultOptions = _RESULTS,
    deadline: Quantity = "10 min",
    relay: bool | None = None,
) -> int:
    """Compare training across emulated sites with the same training in one cluster.

    The same ranks and grouping run a workload in a single cluster over shared memory, and across sites with the
    slotted transport and the transports to compare with. Needs Linux for the emulated lines, and no root: an ordinary
    user's lab is in a user namespace. Where those are forbidden, the command goes on as with --relay and says so. If it
    is ended early, it gives the results of the rounds that are whole.

    Parameters
    ----------
    script
        A training script of your own and its arguments, as the workload; put ``--`` before it where its arguments
        look like options. It is timed by its calls of ``detcoll.measure.step()``, once an iteration, or as a whole.
    deadline
        How long one setting may take in one round.
    relay
        Relay what ranks send between sites, with rate and delay alone, instead of emulating the lines. With --no-relay,
        the command ends with an error where the lab is forbidden.
    """
    results.require_writable()
    name = trained.workload or _DEFAULT
    _refuse_of_no_use(script, trained, length, synthetic)
    of_the_lab = {"against": comma_separated(compared.against or ""), **given(network)}
    if relay:
        refuse_with_relay(**of_the_lab)
    topology = network.reserve(lines.wide_topology())
    builtin = _workload(name, trained, synthetic)
    relay = relay or must_relay(may_relay=relay is None, **of_the_lab)
    transports, left_out = compared.transports(relay=relay)
    iterations = _ITERATIONS[name] if length.iterations is None else length.iterations
    rounds = _SCRIPT_ROUNDS if script else max(1, min(_ROUNDS, iterations))
    experiment = Experiment(
        topology=topology, workload=None if script else builtin, script=script, iterations=iterations,
        rounds=rounds if length.rounds is None else length.rounds, against=transports, left_out=left_out,
        conditions=Conditions(lines.queue_bytes()), networks=network.networks(),
        deadline_s=parse_timeout_s(deadline, "deadline"),
        traces=None if results.report is None else results.report / TRACES, relay=relay,
        warmup=WARMUP if length.warmup is None else length.warmup, without=comma_separated(compared.without),
    )  # fmt: skip
    experiment.validate()
    return _run(experiment, results.json, results.report)


def _run(experiment: Experiment, json: Path | None, report: Path | None) -> int:
    if report is not None:
        forget_traces(report)
    progress = error_console()
    for one in experiment.left_out:
        progress.print(f"left out: {one.transport}: {one.why}", highlight=False)
    with ended_by_signals(), progress.status("starting") as status:

        def say(line: str) -> None:
            status.update(Text(line))
            if not progress.is_terminal:
                print(line, file=sys.stderr, flush=True)

        try:
            result, cause = run_experiment(experiment, say), None
        except EndedEarly as ended:
            result, cause = ended.result, ended.cause
    _give(replace(result, command=command_line()), experiment.topology, json, report)
    if cause is not None:
        raise cause
    return _exit_code(result, experiment)


def _give(result: Measurement, topology: Topology, json: Path | None, report: Path | None) -> None:
    """Print the comparison, and write what was asked for."""
    if json is not None:
        write_result(json, result)
    output_console().print(measurement_table(result))
    if report is None:
        return
    if result.ended_early:
        forget_traces(report)  # of a round that is not whole
    write_result(report / RESULTS, result)
    write_file(report / TOPOLOGY, topology.to_toml().encode())
    error_console().print(f"report: {write_report(report, gather([report]))}", highlight=False)


def _exit_code(result: Measurement, experiment: Experiment) -> int:
    """Return 1 where bits differ or a setting that was to be measured failed."""
    failed = len(result.runs) < len(experiment.settings())
    return 1 if result.digests_equal is False or failed else 0


def _refuse_of_no_use(
    script: tuple[str, ...], trained: TrainedOptions, length: LengthOptions, synthetic: SyntheticOptions
) -> None:
    """Refuse options that mean nothing to the script or the workload."""
    workload = trained.workload
    if script and workload is not None:
        raise UsageError(f"workload={workload!r} and a script are two workloads; give one")
    if script:
        what = "a script, which has its own"
        own = {"iterations": length.iterations, "warmup": length.warmup, "bucket_bytes": trained.bucket_bytes}
        _refuse(what, **own, batches=trained.batches, device=trained.device)
    if workload == "synthetic":
        _refuse("workload='synthetic', whose compute time is given", batches=trained.batches)
    if script or workload != "synthetic":
        what = "a script" if script else f"workload={workload or _DEFAULT!r}"
        _refuse(f"{what}; expected with --workload synthetic", **given(synthetic))


def _refuse(workload: str, **options: object) -> None:
    """Refuse options that mean nothing to ``workload``, in words; those with a value were given."""
    useless = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if useless:
        raise UsageError(f"{', '.join(useless)}: of no use to {workload}")


def _workload(name: WorkloadName, trained: TrainedOptions, synthetic: SyntheticOptions) -> WorkloadSpec:
    device, batches = trained.device or CPU, 1 if trained.batches is None else trained.batches
    bucket = parse_size_bytes(_BUCKET if trained.bucket_bytes is None else trained.bucket_bytes, "bucket_bytes")
    gradient = parse_size_bytes(
        _GRADIENT if synthetic.gradient_bytes is None else synthetic.gradient_bytes, "gradient_bytes"
    )
    compute_ns = parse_duration_ns(_COMPUTE if synthetic.compute is None else synthetic.compute, "compute")
    for option, size in (("gradient_bytes", gradient), ("bucket_bytes", bucket)):
        if size < 4 or size % 4:
            raise UsageError(f"{option}={size} must be a positive multiple of 4 bytes (float32)")
    if name == "digits":
        if batches < 1:
            raise UsageError(f"batches={batches} must be at least 1")
        return WorkloadSpec("digits", bucket, device=device, batches=batches)
    kind = synthetic.compute_kind or "wait"
    return WorkloadSpec("synthetic", bucket, compute_ns, gradient, compute_kind=kind, device=device)
