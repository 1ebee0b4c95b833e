"""``detcoll measure``: how close a run across sites comes to the same run inside one cluster."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.text import Text

from detcoll.cli.invocation import command_line
from detcoll.cli.lines import ANY_LINES, ANY_NETWORK, LineOptions, NetworkOptions, comma_separated, given, present
from detcoll.cli.quantity import Quantity
from detcoll.cli.relaying import refuse_with_relay
from detcoll.cli.terminal import error_console, output_console
from detcoll.emulation.lab import Conditions
from detcoll.errors import UsageError
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.experiment import WARMUP, Experiment, run_experiment
from detcoll.measure.results import Measurement, write_result
from detcoll.measure.tables import measurement_table
from detcoll.outputs import require_folder, require_writable, write_file
from detcoll.quantities import parse_duration_ns, parse_size_bytes, parse_timeout_s
from detcoll.report import forget_traces, gather, write_report
from detcoll.report.inputs import RESULTS, TOPOLOGY, TRACES
from detcoll.workloads.compute import ComputeKind
from detcoll.workloads.workload import WorkloadName, WorkloadSpec

_ITERATIONS = {"digits": 60, "synthetic": 20}
_COMPUTE, _GRADIENT, _BUCKET = "400 ms", "16MiB", "1MiB"


def measure(
    *script: Annotated[str, Parameter(allow_leading_hyphen=True)],
    workload: Literal["digits", "synthetic"] | None = None,
    lines: LineOptions = ANY_LINES,
    network: NetworkOptions = ANY_NETWORK,
    iterations: int | None = None,
    rounds: int = 2,
    warmup: int | None = None,
    compute: Quantity | None = None,
    compute_kind: ComputeKind | None = None,
    gradient_bytes: Quantity | None = None,
    bucket_bytes: Quantity | None = None,
    against: str | None = None,
    without: str = "none",
    json: Path | None = None,
    report: Path | None = None,
    deadline: Quantity = "10 min",
    relay: bool = False,
) -> int:
    """Compare training across emulated sites with the same training in one cluster.

    The same ranks and grouping run a workload in a single cluster over shared memory, and across sites with the
    slotted transport and the transports to compare with. Needs Linux and root for the emulated lines, unless with
    --relay.

    Parameters
    ----------
    script
        A training script of your own and its arguments, as the workload; put ``--`` before it where its arguments
        look like options. It is timed by its calls of ``detcoll.measure.step()``, once an iteration, or as a whole.
    workload
        digits: real training of a perceptron on handwritten digits (the default). synthetic: given compute time and
        gradient size.
    iterations
        Measured in each setting; 60 for digits and 20 for synthetic unless given.
    rounds
        In how many rounds the settings take turns.
    warmup
        Iterations of each setting before the measured ones, in each round; 3 unless given.
    compute
        Compute time of a synthetic iteration, a third forward and two thirds backward; "400 ms" unless given.
    compute_kind
        How a synthetic iteration spends it: wait (on the wall clock, as for a GPU; the default), or python or numpy (so
        much processor time, with the interpreter's lock and without).
    gradient_bytes
        Gradient of a synthetic iteration; 16MiB unless given.
    bucket_bytes
        What is reduced at once while the backward pass goes on; 1MiB unless given. A script has its own.
    against
        Transports to compare with, separated by commas, or none; "gloo,mpi" unless given, with --relay none.
    without
        What to switch off in slotted runs of their own in the deterministic service, each on its own, to show what it
        gains: some of topology, slots, overlap, reservation, separated by commas.
    json
        File for the results.
    report
        Directory for report.html, its results.json, and traces of the slotted run's last round.
    deadline
        How long one setting may take in one round.
    relay
        Relay what ranks send between sites, with rate and delay alone, instead of emulating the lines; needs no root.
    """
    require_writable(json, "json")
    require_folder(report, "report")
    name = workload or "digits"
    if script and workload is not None:
        raise UsageError(f"workload={workload!r} and a script are two workloads; give one")
    if script:
        _refuse("a script, which has its own", iterations=iterations, warmup=warmup, bucket_bytes=bucket_bytes)
    if script or name != "synthetic":
        what = "a script" if script else f"workload={name!r}"
        _refuse(
            f"{what}; expected with --workload synthetic",
            compute=compute,
            compute_kind=compute_kind,
            gradient_bytes=gradient_bytes,
        )
    if relay:
        refuse_with_relay(against=comma_separated(against or ""), **given(network))
        against = ""
    topology = network.reserve(lines.wide_topology())
    builtin = _workload(name, compute, compute_kind or "wait", gradient_bytes, bucket_bytes)
    transports, left_out = present(comma_separated("gloo,mpi" if against is None else against), "against")
    experiment = Experiment(
        topology=topology,
        workload=None if script else builtin,
        script=script,
        iterations=_ITERATIONS[name] if iterations is None else iterations,
        rounds=rounds,
        against=transports,
        left_out=left_out,
        conditions=Conditions(lines.queue_bytes()),
        networks=network.networks(),
        deadline_s=parse_timeout_s(deadline, "deadline"),
        traces=None if report is None else report / TRACES,
        relay=relay,
        warmup=WARMUP if warmup is None else warmup,
        without=comma_separated(without),
    )
    experiment.validate()
    if report is not None:
        forget_traces(report)
    return _run(experiment, json, report)


def _run(experiment: Experiment, json: Path | None, report: Path | None) -> int:
    console, progress = output_console(), error_console()
    for one in experiment.left_out:
        progress.print(f"left out: {one.transport}: {one.why}", highlight=False)
    with ended_by_signals(), progress.status("starting") as status:

        def say(line: str) -> None:
            status.update(Text(line))
            if not progress.is_terminal:
                print(line, file=sys.stderr, flush=True)

        result = replace(run_experiment(experiment, say), command=command_line())
    if json is not None:
        write_result(json, result)
    console.print(measurement_table(result))
    if report is not None:
        write_result(report / RESULTS, result)
        write_file(report / TOPOLOGY, experiment.topology.to_toml().encode())
        progress.print(f"report: {write_report(report, gather([report]))}", highlight=False)
    return _exit_code(result, experiment)


def _exit_code(result: Measurement, experiment: Experiment) -> int:
    """Return 1 where bits differ or a setting that was to be measured failed."""
    failed = len(result.runs) < len(experiment.settings())
    return 1 if result.digests_equal is False or failed else 0


def _refuse(workload: str, **options: object) -> None:
    """Refuse options that mean nothing to ``workload``, in words; those with a value were given."""
    useless = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if useless:
        raise UsageError(f"{', '.join(useless)}: of no use to {workload}")


def _workload(
    name: WorkloadName, compute: str | None, kind: ComputeKind, gradient_bytes: str | None, bucket_bytes: str | None
) -> WorkloadSpec:
    bucket = parse_size_bytes(_BUCKET if bucket_bytes is None else bucket_bytes, "bucket_bytes")
    gradient = parse_size_bytes(_GRADIENT if gradient_bytes is None else gradient_bytes, "gradient_bytes")
    compute_ns = parse_duration_ns(_COMPUTE if compute is None else compute, "compute")
    for option, size in (("gradient_bytes", gradient), ("bucket_bytes", bucket)):
        if size < 4 or size % 4:
            raise UsageError(f"{option}={size} must be a positive multiple of 4 bytes (float32)")
    if name == "digits":
        return WorkloadSpec("digits", bucket)
    return WorkloadSpec("synthetic", bucket, compute_ns, gradient, compute_kind=kind)
