"""``detcoll lab``: run a command once per rank in an emulated wide-area network."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from detcoll.cli.lines import ANY_LINES, LineOptions
from detcoll.cli.quantity import Quantity
from detcoll.cli.relaying import refuse_with_relay, run_through_relay
from detcoll.emulation.lab import Conditions, Failure, Lab, Launcher, Service, run_ranks
from detcoll.errors import UsageError
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.networks import PROBE_GAP_NS, Network, reserve
from detcoll.outputs import require_writable, write_file
from detcoll.quantities import parse_duration_ns, parse_size_bytes, parse_timeout_s
from detcoll.topology import Topology

_CROSS_TCP = 0.05
_PAST_THE_RELAY = (
    "detcoll: nothing went through the relay: it carries what detcoll's slotted transport sends between sites; "
    "whatever else the ranks did was at the speed of this host"
)


def lab(
    *command: str,
    lines: LineOptions = ANY_LINES,
    loss: float = 0.0,
    jitter: Quantity = "0 ms",
    service: str | None = None,
    reserved: Quantity | None = None,
    burst: Quantity | None = None,
    cross_traffic: float = 0.0,
    cross_tcp: float = _CROSS_TCP,
    failure: list[str] | None = None,
    seed: int = 0,
    statistics: Path | None = None,
    log: Path | None = None,
    mpi: bool = False,
    prefix: bool = False,
    relay: bool = False,
    slow_start_after_idle: bool = False,
    deadline: Quantity | None = None,
) -> int:
    """Run COMMAND once per rank, each in the network of its site, and return the exit code of the first that failed.

    Sites reach each other over an emulated line only. Ranks get RANK, WORLD_SIZE, MASTER_ADDR and the other variables
    of a launcher. Needs Linux and root, unless with --relay.

    Parameters
    ----------
    command : str
        Program and arguments, after ``--``.
    loss : float
        Probability with which a best-effort segment is lost.
    jitter : str
        Best-effort packets take up to this much longer, in order.
    service : str
        Class that the ranks are put in: best-effort, or deterministic (a reserved and policed rate that goes first).
        Unless given, packets marked with DSCP 46 are deterministic where a rate is reserved.
    reserved : str
        Rate reserved between any two sites, headers included; four fifths of the line with --service deterministic
        unless given here or by the topology file.
    burst : str
        What the policer lets pass beyond the reserved rate; what that carries in 5 ms, and at least 128 KiB, unless
        given.
    cross_traffic : float
        What others offer each line's best-effort class, as a share of its rate, 0 to 2.
    cross_tcp : float
        How much of that real TCP flows offer; bursts that the router makes up are the rest.
    failure : list
        When links are down, such as "5 s to 7 s" or "site0 and site1: 5 s to 7 s", from the lab's opening; may be
        repeated.
    seed : int
        Of losses, jitter and others' traffic.
    statistics : Path
        File for what the router counted (.json), with a co-tenant's round trips.
    log : Path
        File for the router's arrival log (.npy).
    mpi : bool
        Start the ranks through mpiexec of MPICH or Open MPI, for MPI programs.
    prefix : bool
        Put "[rank]" in front of every line that ranks other than 0 print.
    relay : bool
        Run the ranks as ordinary processes, and detcoll's connections between sites through a relay that adds rate and
        delay, and nothing else; needs no root. docs/lab.md tells what that cannot show.
    slow_start_after_idle : bool
        Leave TCP's slow start after idle phases on, as it is by default.
    deadline : str
        End the ranks after this time, such as "10 min"; the exit code is then 124.
    """
    if not command:
        raise UsageError("COMMAND is missing; expected detcoll lab [OPTIONS] -- COMMAND [ARGUMENTS]")
    wanted = lines.wide_topology()
    if relay:
        refuse_with_relay(
            loss=loss, jitter=parse_duration_ns(jitter, "jitter"), service=service, reserved=reserved, burst=burst,
            cross_traffic=cross_traffic, cross_tcp=cross_tcp != _CROSS_TCP, failure=failure, seed=seed, log=log,
            mpi=mpi, slow_start_after_idle=slow_start_after_idle,
        )  # fmt: skip
    if cross_tcp != _CROSS_TCP and not cross_traffic:
        raise UsageError(f"cross_tcp={cross_tcp} is a part of the cross traffic; expected with --cross-traffic")
    wanted = _reserve(wanted, service, reserved)
    if burst is not None and not wanted.has_reservations:
        raise UsageError(f"burst={burst!r} is of what polices a reserved rate; expected with --reserved")
    deadline_s = None if deadline is None else parse_timeout_s(deadline, "deadline")
    require_writable(statistics, "statistics")
    require_writable(log, "log")
    if relay:
        with ended_by_signals():
            code, seen = run_through_relay(wanted, lines.queue_bytes(), command, deadline_s, prefix=prefix)
        if not seen.connections and code == 0:
            print(_PAST_THE_RELAY, file=sys.stderr, flush=True)
        if statistics is not None:
            write_file(statistics, msgspec.json.encode(seen))
        return code
    conditions = Conditions(
        queue_bytes=lines.queue_bytes(),
        loss=loss,
        jitter_ns=parse_duration_ns(jitter, "jitter"),
        seed=seed,
        service=None if service is None else Service.parse(service),
        burst_bytes=None if burst is None else parse_size_bytes(burst, "burst"),
        cross_traffic=cross_traffic,
        cross_tcp_share=cross_tcp,
        failures=tuple(Failure.parse(text, wanted) for text in failure or ()),
        probe_gap_ns=0 if statistics is None else PROBE_GAP_NS,
    )
    with (
        ended_by_signals(),
        Lab(
            wanted, conditions, log_path=log, slow_start_after_idle=slow_start_after_idle,
        ) as network,
    ):  # fmt: skip
        code = run_ranks(
            network,
            command,
            launcher=Launcher.MPIEXEC if mpi else Launcher.PLAIN,
            deadline_s=deadline_s,
            prefix=prefix,
        )
        if statistics is not None:
            write_file(statistics, msgspec.json.encode(network.statistics()))
    return code


def _reserve(lines: Topology, service: str | None, reserved: str | None) -> Topology:
    """Return the lines with the reserved rates that are asked for, or nothing where all is best effort."""
    if service == Service.BEST_EFFORT.value:
        return reserve(lines, (), reserved).with_reserved(None)
    if reserved is not None or service is not None:
        return reserve(lines, (Network(Service.DETERMINISTIC),), reserved)
    return lines
