"""Options that several commands have: the sites, the lines between them, and the networks that these are in turn.

All of them are None unless given, so that a command can tell which were; the texts say what counts then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cyclopts import Parameter

from detcoll.cli.quantity import Quantity, Whole
from detcoll.emulation.lab.conditions import CrossTrafficKind
from detcoll.errors import UsageError
from detcoll.measure.networks import Network, parse_networks, reserve
from detcoll.measure.results import LeftOut
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s, parse_size_bytes
from detcoll.registry import load, names, why_missing
from detcoll.topology import Topology
from detcoll.transport import Scope

LINES_GROUP, NETWORK_GROUP = "Sites and lines", "What the lines promise, and what others do on them"
"""Headings in the help of commands."""

SITES, RANKS_PER_SITE, RATE, ROUND_TRIP, QUEUE = 2, 2, "1 Gbit/s", "20 ms", "2.5MB"


@Parameter(name="*", group=LINES_GROUP)
@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """Sites of equal size with lines between, or those of a file."""

    topology: Path | None = None
    """A topology file, instead of the four that follow."""

    sites: Whole | None = None
    """Number of sites; 2 unless given."""

    ranks_per_site: Whole | None = None
    """Ranks in each site; 2 unless given."""

    rate: Quantity | None = None
    """What each site's line carries up and down, headers included; "1 Gbit/s" unless given."""

    round_trip: Quantity | None = None
    """Round-trip time between any two sites; "20 ms" unless given."""

    def require_one_way(self) -> None:
        """Refuse a topology beside what it says itself.

        Raises
        ------
        UsageError
            Naming the options.
        """
        also = [name for name in ("sites", "ranks_per_site", "rate", "round_trip") if getattr(self, name) is not None]
        if self.topology is not None and also:
            raise UsageError(f"topology={str(self.topology)!r} already says what {', '.join(also)} would")

    def wide_topology(self) -> Topology:
        """Return the sites and lines that these options describe.

        Raises
        ------
        UsageError
            If both ways are used at once, there are fewer than two sites, or a value cannot be used.
        """
        self.require_one_way()
        if self.topology is not None:
            wide = Topology.from_file(self.topology)
        else:
            wide = Topology.uniform(
                SITES if self.sites is None else self.sites,
                RANKS_PER_SITE if self.ranks_per_site is None else self.ranks_per_site,
                parse_rate_bytes_per_s(RATE if self.rate is None else self.rate, "rate"),
                parse_duration_ns(ROUND_TRIP if self.round_trip is None else self.round_trip, "round_trip") // 2,
            )
        if not wide.is_wide:
            raise UsageError(f"sites={len(wide.sites)}: the wide area needs at least two sites, each with an uplink")
        return wide


@Parameter(name="*", group=LINES_GROUP)
@dataclass(frozen=True, kw_only=True)
class LineOptions(SiteOptions):
    """Sites, and lines that are emulated."""

    queue: Quantity | None = None
    """Drop-tail queue at each end of a line; with --relay, what may wait there before senders are held up. 2.5MB
    unless given."""

    def queue_bytes(self) -> int:
        """Return how much a queue takes."""
        return parse_size_bytes(QUEUE if self.queue is None else self.queue, "queue")


@Parameter(name="*", group=NETWORK_GROUP)
@dataclass(frozen=True, kw_only=True)
class OthersOptions:
    """What others send over emulated lines."""

    cross_traffic_kind: str | None = None
    """What others' traffic is: bursts, which give way to nobody (the default), or tcp, real TCP flows of the kernel's
    default control that offer what --cross-traffic says, and from 1 on as much as TCP lets them."""

    def kind(self, *, has_traffic: bool) -> CrossTrafficKind:
        """Return the kind of others' traffic.

        Raises
        ------
        UsageError
            If it is not known, or others send nothing.
        """
        if self.cross_traffic_kind is None:
            return CrossTrafficKind.BURSTS
        kind = CrossTrafficKind.parse(self.cross_traffic_kind)
        if not has_traffic:
            raise UsageError(
                f"cross_traffic_kind={self.cross_traffic_kind!r} is of what others send; expected with --cross-traffic "
                "above 0"
            )
        return kind


@Parameter(name="*", group=NETWORK_GROUP)
@dataclass(frozen=True, kw_only=True)
class NetworkOptions(OthersOptions):
    """What emulated lines promise, and what others do on them: every combination is run, one after the other."""

    service: str | None = None
    """What the network promises: best-effort (the default), deterministic (a reserved and policed rate that goes
    first), or both separated by commas."""

    cross_traffic: str | None = None
    """What others offer each line's best-effort class, as shares of its rate from 0 to 2, separated by commas; 0 unless
    given."""

    reserved: Quantity | None = None
    """Rate that the deterministic service reserves between any two sites, headers included; four fifths of the line
    unless given here or by the topology file."""

    def networks(self) -> tuple[Network, ...]:
        """Return what the lines are in turn."""
        networks = parse_networks(
            comma_separated("best-effort" if self.service is None else self.service),
            comma_separated("0" if self.cross_traffic is None else self.cross_traffic),
        )
        kind = self.kind(has_traffic=any(network.cross_traffic for network in networks))
        return tuple(replace(network, cross_traffic_kind=kind) for network in networks)

    def reserve(self, lines: Topology) -> Topology:
        """Return the lines with the rates that the deterministic service reserves."""
        return reserve(lines, self.networks(), self.reserved)


ANY_LINES, ANY_NETWORK = LineOptions(), NetworkOptions()
"""Nothing given."""


def given(options: object) -> dict[str, object]:
    """Return the options that have a value, of a dataclass of options."""
    return {name: value for name, value in vars(options).items() if value is not None}


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the parts of ``text`` between commas; none for an empty text or ``"none"``."""
    if text.strip() in ("", "none"):
        return ()
    return tuple(part.strip() for part in text.split(",") if part.strip())


def present(transports: Sequence[str], name: str) -> tuple[tuple[str, ...], tuple[LeftOut, ...]]:
    """Part ``transports`` in those that can be used here and those that cannot, with the reason.

    Raises
    ------
    UsageError
        If no transport has one of the names, or it joins ranks of one host only: the lab's sites are apart, and what
        went past the lines would measure nothing. ``name`` is the option's.
    """
    for transport in transports:
        if transport not in names():
            raise UsageError(f"{name}={transport!r} is not known; expected some of {', '.join(names())}")
    reasons = {transport: why_missing(transport) for transport in transports}
    here = tuple(transport for transport in transports if reasons[transport] is None)
    for transport in here:
        if load(transport).capabilities.scope is Scope.HOST:
            raise UsageError(f"{name}={transport!r} joins ranks of one host only; it cannot cross the lines")
    return here, tuple(LeftOut(transport, why) for transport, why in reasons.items() if why is not None)
