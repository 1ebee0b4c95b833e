"""``detcoll lab``: run a command once per rank in an emulated wide-area network."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cyclopts import Parameter

from detcoll.cli.lines import ANY_LINES, NETWORK_GROUP, LineOptions, OthersOptions
from detcoll.cli.quantity import Quantity, Whole
from detcoll.cli.relaying import must_relay, refuse_with_relay, run_through_relay
from detcoll.cli.splitting import executed
from detcoll.emulation.lab import Conditions, Failure, Lab, Launcher, Service, run_ranks
from detcoll.emulation.lab.conditions import CrossTrafficKind
from detcoll.errors import UsageError
from detcoll.launch.processes import ended_by_signals
from detcoll.measure.networks import PROBE_GAP_NS, Network, reserve
from detcoll.outputs import require_writable, write_file
from detcoll.quantities import format_duration, format_rate, parse_duration_ns, parse_size_bytes, parse_timeout_s
from detcoll.topology import Topology

_CROSS_TCP = 0.05
_PAST_THE_RELAY = (
    "detcoll: nothing went through the relay: it carries what detcoll's slotted transport sends between sites; "
    "whatever else the ranks did was at the speed of this host"
)


@Parameter(name="*", group=NETWORK_GROUP)
@dataclass(frozen=True, kw_only=True)
class ConditionOptions(OthersOptions):
    """What happens on the lines beyond rate, delay and queue."""

    loss: float = 0.0
    """Probability with which a best-effort segment is lost."""

    jitter: Quantity = "0 ms"
    """Best-effort packets take up to this much longer, in order."""

    service: str | None = None
    """Class that the ranks are put in: best-effort, or deterministic (a reserved and policed rate that goes first).
    Unless given, packets marked with DSCP 46 are deterministic where a rate is reserved."""

    reserved: Quantity | None = None
    """Rate reserved between any two sites, headers included; four fifths of the line with --service deterministic
    unless given here or by the topology file."""

    burst: Quantity | None = None
    """What the policer lets pass beyond the reserved rate; what that carries in 5 ms, and at least 128 KiB, unless
    given."""

    cross_traffic: float = 0.0
    """What others offer each line's best-effort class, as a share of its rate, 0 to 2."""

    cross_tcp: float = _CROSS_TCP
    """How much of bursts is offered by real TCP flows; the router makes up the rest."""

    failure: list[str] | None = None
    """When links are down, such as "5 s to 7 s" or "site0 and site1: 5 s to 7 s", from the lab's opening; may be
    repeated."""

    seed: Whole = 0
    """Of losses, jitter and others' traffic."""

    def changed(self) -> dict[str, object]:
        """Return all options by name; the value of one that changes nothing is false."""
        own = {"jitter": parse_duration_ns(self.jitter, "jitter"), "cross_tcp": self.cross_tcp != _CROSS_TCP}
        return vars(self) | own

    def reserve(self, lines: Topology) -> Topology:
        """Return the lines with the reserved rates that are asked for, or nothing where all is best effort.

        Raises
        ------
        UsageError
            If there is too little to reserve from, or an option is of no use without another.
        """
        if self.cross_tcp != _CROSS_TCP and not self.cross_traffic:
            raise UsageError(
                f"cross_tcp={self.cross_tcp} is a part of the cross traffic; expected with --cross-traffic"
            )
        if self.service == Service.BEST_EFFORT.value:
            lines = reserve(lines, (), self.reserved).with_reserved(None)
        elif self.reserved is not None or self.service is not None:
            lines = reserve(lines, (Network(Service.DETERMINISTIC),), self.reserved)
        if self.burst is not None and not lines.has_reservations:
            raise UsageError(f"burst={self.burst!r} is of what polices a reserved rate; expected with --reserved")
        return lines

    def conditions(self, lines: Topology, queue_bytes: int, probe_gap_ns: int) -> Conditions:
        """Return the lab's conditions.

        Raises
        ------
        UsageError
            If a value cannot be used.
        """
        kind = self.kind(has_traffic=self.cross_traffic > 0)
        if self.cross_tcp != _CROSS_TCP and kind is CrossTrafficKind.TCP:
            raise UsageError(
                f"cross_tcp={self.cross_tcp} is a part of bursts; expected without --cross-traffic-kind tcp"
            )
        return Conditions(
            queue_bytes=queue_bytes,
            loss=self.loss,
            jitter_ns=parse_duration_ns(self.jitter, "jitter"),
            seed=self.seed,
            service=None if self.service is None else Service.parse(self.service),
            burst_bytes=None if self.burst is None else parse_size_bytes(self.burst, "burst"),
            cross_traffic=self.cross_traffic,
            cross_traffic_kind=kind,
            cross_tcp_share=self.cross_tcp,
            failures=tuple(Failure.parse(text, lines) for text in self.failure or ()),
            probe_gap_ns=probe_gap_ns,
        )


_CONDITIONS = ConditionOptions()


def lab(
    *command: str,
    lines: LineOptions = ANY_LINES,
    conditions: ConditionOptions = _CONDITIONS,
    statistics: Path | None = None,
    log: Path | None = None,
    mpi: bool = False,
    prefix: bool = False,
    relay: bool | None = None,
    slow_start_after_idle: bool = False,
    deadline: Quantity | None = None,
) -> int:
    """Run COMMAND once per rank, each in the network of its site, and return the exit code of the first that failed.

    Sites reach each other over an emulated line only. Ranks get RANK, WORLD_SIZE, MASTER_ADDR and the other variables
    of a launcher. Needs Linux, and no root: an ordinary user's lab is in a user namespace. Where those are forbidden,
    the command goes on as with --relay and says so.

    Parameters
    ----------
    command : str
        SCRIPT.py, ``-m MODULE`` or a program, and its arguments. Options after it belong to it.
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
        delay, and nothing else. docs/lab.md tells what that cannot show. With --no-relay, the command ends with an
        error where the lab is forbidden.
    slow_start_after_idle : bool
        Leave TCP's slow start after idle phases on, as it is by default.
    deadline : str
        End the ranks after this time, such as "10 min"; the exit code is then 124.
    """
    program = executed(command, "lab")
    wanted = lines.wide_topology()
    of_the_lab = conditions.changed() | {"log": log, "mpi": mpi, "slow_start_after_idle": slow_start_after_idle}
    if relay:
        refuse_with_relay(**of_the_lab)
    wanted = conditions.reserve(wanted)
    ranks = _Ranks(program, None if deadline is None else parse_timeout_s(deadline, "deadline"), prefix, statistics)
    require_writable(statistics, "statistics")
    require_writable(log, "log")
    made = conditions.conditions(wanted, lines.queue_bytes(), 0 if statistics is None else PROBE_GAP_NS)
    if relay or must_relay(may_relay=relay is None, **of_the_lab):
        return _run_through_relay(ranks, wanted, lines.queue_bytes())
    launcher = Launcher.MPIEXEC if mpi else Launcher.PLAIN
    with (
        ended_by_signals(),
        Lab(wanted, made, log_path=log, slow_start_after_idle=slow_start_after_idle) as network,
    ):
        return _run_in_lab(ranks, network, launcher)


@dataclass(frozen=True, slots=True)
class _Ranks:
    """What the ranks run, and where to write what the lines counted meanwhile."""

    command: Sequence[str]
    deadline_s: float | None
    prefix: bool
    statistics: Path | None


def _run_through_relay(ranks: _Ranks, lines: Topology, queue_bytes: int) -> int:
    with ended_by_signals():
        code, seen = run_through_relay(lines, queue_bytes, ranks.command, ranks.deadline_s, prefix=ranks.prefix)
    if not seen.connections and code == 0:
        print(_PAST_THE_RELAY, file=sys.stderr, flush=True)
    if ranks.statistics is not None:
        write_file(ranks.statistics, msgspec.json.encode(seen))
    return code


def _run_in_lab(ranks: _Ranks, network: Lab, launcher: Launcher) -> int:
    began_ns = time.monotonic_ns()
    code = run_ranks(network, ranks.command, launcher=launcher, deadline_s=ranks.deadline_s, prefix=ranks.prefix)
    if code == 0:
        told = "" if ranks.statistics else "; --statistics FILE tells what crossed them"
        print(f"detcoll: {_in_words(network.topology)}{told}", file=sys.stderr, flush=True)
    is_tcp = network.conditions.cross_traffic_kind is CrossTrafficKind.TCP
    if ranks.statistics is None and not is_tcp:
        return code
    seen = network.statistics()
    if is_tcp:
        got = format_rate(round(seen.flows_bytes_per_s([(began_ns, time.monotonic_ns())]) or 0.0, -4))
        print(f"detcoll: others' TCP flows got {got} of payload through, all sites", file=sys.stderr, flush=True)
    if ranks.statistics is not None:
        write_file(ranks.statistics, msgspec.json.encode(seen))
    return code


def _in_words(lines: Topology) -> str:
    rates = [site.uplink_bytes_per_s or 0.0 for site in lines.sites]
    trips_ns = [2 * link.one_way_ns for _, link in lines.links]
    slowest, fastest = format_rate(min(rates)), format_rate(max(rates))
    rate = slowest if slowest == fastest else f"{slowest} to {fastest}"
    farthest = f"{'' if min(trips_ns) == max(trips_ns) else 'up to '}{format_duration(max(trips_ns))}"
    return f"ran on {len(rates)} sites, joined by lines of {rate} with a round trip of {farthest}"
