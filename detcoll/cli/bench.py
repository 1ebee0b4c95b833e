"""``detcoll bench``: times collectives over sizes, against the floor and the prediction."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from detcoll import registry
from detcoll.bench.runs import LabBench, run_here, run_in_lab
from detcoll.bench.sweep import Sweep
from detcoll.cli.invocation import command_line
from detcoll.cli.lines import ANY_LINES, ANY_NETWORK, LineOptions, NetworkOptions, comma_separated, given, present
from detcoll.cli.quantity import Quantity, Whole
from detcoll.cli.relaying import must_relay, refuse_with_relay
from detcoll.cli.terminal import output_console
from detcoll.emulation.lab import Conditions
from detcoll.errors import UsageError
from detcoll.job.settings import AUTO, check_slotting
from detcoll.launch.launchers import read_environment
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.host import host_facts
from detcoll.measure.results import BENCH_SCHEMA, BenchResult, LeftOut, write_result
from detcoll.measure.tables import bench_table
from detcoll.outputs import require_writable
from detcoll.plan import Slotting
from detcoll.quantities import parse_size_bytes, parse_timeout_s
from detcoll.registry import SLOTTED

ALONE = (
    "bench: nobody launched this process, so it times 1 rank alone; "
    "detcoll run -n 4 -m detcoll bench ... starts more on this host, --lab across emulated sites"
)


@Parameter(name="*", group="What is timed")
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is timed, and how often."""

    collective: str = "all_reduce"
    """Such as all_reduce, broadcast or barrier; several separated by commas."""

    bytes: Quantity = "256KiB,4MiB,16MiB"
    """Sizes, such as 256KiB,64MiB."""

    dtype: str = "float32"
    """Element type, such as float32, bfloat16, int64, complex64 or bool; bool, which has no sum, is reduced by bxor."""

    transport: str | None = None
    """One or several separated by commas, one after another; auto unless given, slotted with --lab."""

    iterations: Whole = 20
    """Timed calls a size."""

    warmup: Whole = 3
    """Calls before those."""

    time_limit: Quantity | None = None
    """No more calls begin once those of one size have taken so long; one is timed in any case."""

    empty: bool = False
    """Time arrays of comm.empty, which ranks of one host need not stage."""

    device: str = "cpu"
    """Where arrays are: cpu, or cuda (tensors of torch, or else arrays of CuPy; the ranks of a host use its devices in
    turn); several separated by commas, one after another."""

    def sweep(self) -> Sweep:
        """Return what to time.

        Raises
        ------
        UsageError
            If a value cannot be used.
        """
        sizes = tuple(parse_size_bytes(text, "bytes") for text in comma_separated(self.bytes))
        limit_s = None if self.time_limit is None else parse_timeout_s(self.time_limit, "time_limit")
        sweep = Sweep(
            comma_separated(self.collective), sizes, self.dtype, self.iterations, self.warmup, self.empty, limit_s,
            comma_separated(self.device),
        )  # fmt: skip
        sweep.validate()
        return sweep

    def transports(self, default: str) -> tuple[str, ...]:
        """Return the names of the transports to time; ``default`` unless given."""
        return comma_separated(self.transport or default)


_SWEEP = SweepOptions()


def bench(
    *,
    what: SweepOptions = _SWEEP,
    json: Path | None = None,
    lab: bool = False,
    relay: bool | None = None,
    lines: LineOptions = ANY_LINES,
    network: NetworkOptions = ANY_NETWORK,
    slotting: Literal["calendar", "turns", "share", "off"] | None = None,
    timeout: Quantity = "60 s",
    deadline: Quantity | None = None,
) -> int:
    """Time collectives over sizes; every result is checked.

    Runs on the ranks of the launcher it is started under (detcoll run, mpiexec, torchrun), or with --lab on ranks of
    emulated sites that it starts itself. There the slotted transport is audited: the exit code is 1 if the router saw
    that it did not keep to its calendar. Options of lines and networks need --lab or --relay; a topology file does not.

    Parameters
    ----------
    json
        File for the results.
    lab
        Start ranks in emulated sites. Needs Linux, and no root: an ordinary user's lab is in a user namespace. Where
        those are forbidden, the command goes on as with --relay and says so.
    relay
        Start ranks on this host and relay what they send between sites, with rate and delay alone. For slotted only.
        The options of --lab apply, except service, cross traffic and reserved. With --lab --no-relay, the command ends
        with an error where the lab is forbidden.
    slotting
        With --lab, how slotted shares lines: calendar, turns (ranks of a site one by one; two sites), share (pacing
        without slots), off. Slotted chooses unless given.
    timeout
        How long a collective may go without progress.
    deadline
        With --lab: how long one transport may take; "10 min" unless given.
    """
    require_writable(json, "json")
    sweep = what.sweep()
    timeout_s = parse_timeout_s(timeout, "timeout")
    if relay:
        _require_relayed(lab, network, what.transports(SLOTTED))
    if not (lab or relay):
        useless = {name: value for name, value in given(lines).items() if name != "topology"} | given(network)
        _refuse_without_lab(**useless, slotting=slotting, deadline=deadline)
        return _time_launched(sweep, what.transports(AUTO), lines.topology, timeout_s, json)
    transports, left_out = present(what.transports(SLOTTED), "transport")
    if slotting is not None and SLOTTED not in transports:
        raise UsageError(f"slotting={slotting!r} is for {SLOTTED}, which is not in transport={what.transport!r}")
    topology = network.reserve(lines.wide_topology())
    check_slotting(Slotting(slotting) if slotting else None, topology)
    spec = LabBench(
        sweep, transports, topology, Conditions(lines.queue_bytes()), slotting, timeout_s,
        parse_timeout_s("10 min" if deadline is None else deadline, "deadline"), network.networks(), bool(relay),
    )  # fmt: skip
    others = [name for name in transports if name != SLOTTED]
    if lab and must_relay(may_relay=relay is None, transport=others, **given(network)):
        spec = replace(spec, relay=True)
    return _run_in_lab(spec, left_out, json)


def _time_launched(
    sweep: Sweep, transports: tuple[str, ...], topology: Path | None, timeout_s: float, json: Path | None
) -> int:
    """Time the sweep on the ranks of the launcher; rank 0 shows the results."""
    for name in transports:
        if name != AUTO:
            registry.require_known(name)
    if read_environment(os.environ).launcher == "none":
        print(ALONE, file=sys.stderr, flush=True)
    rank, rows = run_here(sweep, transports, topology, timeout_s)
    return _finish(BenchResult(BENCH_SCHEMA, host_facts(), rows), json) if rank == 0 else 0


def _run_in_lab(spec: LabBench, left_out: tuple[LeftOut, ...], json: Path | None) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with ended_by_signals():
        result = run_in_lab(spec, say)
    _finish(replace(result, left_out=(*left_out, *result.left_out)), json)
    broken = result.audit is not None and not result.audit.passed and result.audit.slotting != "off"
    return 1 if broken or result.left_out or not result.rows else 0


def _finish(result: BenchResult, json: Path | None) -> int:
    if json is not None:
        write_result(json, replace(result, command=command_line()))
    output_console().print(bench_table(result))
    return 0


def _refuse_without_lab(**options: object) -> None:
    useless = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if useless:
        raise UsageError(f"{', '.join(useless)} need --lab or --relay: without the ranks are those of the launcher")


def _require_relayed(lab: bool, network: NetworkOptions, transports: tuple[str, ...]) -> None:
    """Refuse what cannot be combined with --relay."""
    if lab:
        raise UsageError("--lab and --relay are two ways to make the lines; give one")
    refuse_with_relay(**given(network))
    for transport in transports:
        if transport != SLOTTED:
            raise UsageError(
                f"transport={transport!r} knows no proxy and would go past the relay; expected {SLOTTED} with --relay"
            )
