"""From settings to open endpoints: choose the transport and connect the ranks.

``transport="auto"`` chooses the slotted transport if the topology has several sites with lines between them, else
shared memory if all ranks are on one host, else MPI if MPI started the ranks, else the slotted transport without
windows. If the automatic choice is not available on some rank, all ranks fall back to MPI, and from shared memory to
the slotted transport where MPI did not start them; a warning gives the reason. An address that may not be used
(`UsageError`) never causes a fall-back.

Across lines, a transport without collectives of its own that reaches other hosts (slotted, tcp) leaves ranks of one
site on one host to shared memory.

Ranks of one host may run in containers that keep them from sharing memory. So each pair tries before it connects, and
those that cannot use the network.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from detcoll import registry
from detcoll.clock import MonotonicClock
from detcoll.errors import TransportUnavailable, UsageError
from detcoll.job.settings import AUTO, Facts, Settings
from detcoll.plan.calendar import Slotting, build_calendar
from detcoll.plan.layout import is_fast, partners
from detcoll.runtime import Routes
from detcoll.runtime.routes import acquaintances
from detcoll.topology import Topology
from detcoll.transport import Endpoint, NativeCollectives, Rendezvous, Scope, Transport

log = logging.getLogger("detcoll")

Opened = TypeVar("Opened")

WIDE, LOCAL, FALLBACK = "slotted", "shm", "mpi"
WARM_UP_ROUND_TRIPS = 12
LARGEST_WARM_UP_BYTES = 2**27
WIDE_ACKNOWLEDGE_DELAY_NS = 5_000_000
"""Delay of acknowledgements across lines, where scratch covers two cycles more than a round trip. An acknowledgement
wakes two hosts: with 5 ms instead of 2 ms, an all-reduce of 4 MiB over two sites of two ranks takes 5 % less CPU time.
"""
FAST_ACKNOWLEDGE_DELAY_NS = 500_000
"""The same on lines faster than hosts, where a call ends when what was sent in place of its array is acknowledged."""
LONGEST_HOST_PACED_NS = 500_000
"""Round trip up to which hosts pace lines that are faster than they are. TCP has little under way there, so what the
kernel does not pace comes in small bursts."""
LARGEST_BURST_NS = 2_000_000
_MPI_LAUNCHERS = ("mpich", "openmpi")


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport and the reason for choosing it; ``automatic`` if the user did not name one."""

    name: str
    reason: str
    automatic: bool


@dataclass(frozen=True, slots=True)
class Assembled:
    """Open endpoints. ``native`` is set if the transport has collectives of its own that may be used."""

    transport: Transport
    routes: Routes
    endpoints: Sequence[Endpoint]
    native: NativeCollectives | None


def choose(settings: Settings, facts: Sequence[Facts], topology: Topology) -> Choice:
    """Return the transport for these ranks; the result is the same on all ranks."""
    if settings.transport != AUTO:
        return Choice(settings.transport, "it was asked for", False)
    if topology.is_wide:
        return Choice(WIDE, f"the topology has {len(topology.sites)} sites", True)
    if len({fact.host for fact in facts}) == 1:
        return Choice(LOCAL, "all ranks are on one host", True)
    if _started_by_mpi(facts):
        return Choice(FALLBACK, "MPI started the ranks and they are on several hosts", True)
    return Choice(WIDE, "ranks are on several hosts", True)


def assemble(
    settings: Settings, facts: Sequence[Facts], topology: Topology, rank: int, meeting: Rendezvous, deadline_ns: int
) -> Assembled:
    """Open and connect the endpoints of this rank.

    Raises
    ------
    TransportUnavailable
        If the requested transport is not available on some rank; with "auto", if no fall-back is available either.
    UsageError, ConnectError
        See `detcoll.transport`.
    """
    opener = _Opener(settings, facts, topology, rank, meeting, deadline_ns)
    choice = choose(settings, facts, topology)
    if rank == 0:
        log.info("transport %s, since %s", choice.name, choice.reason)
    try:
        return opener.open(choice.name)
    except TransportUnavailable as error:
        if not choice.automatic or choice.name == FALLBACK:
            raise
        reason = str(error)
    fallback = FALLBACK if _started_by_mpi(facts) else WIDE
    if fallback == choice.name:
        raise TransportUnavailable(
            f"{reason}; cannot fall back to {FALLBACK}, because MPI did not start all ranks (use mpiexec)"
        )
    if rank == 0:
        log.warning("transport %s cannot be used: %s; falling back to %s", choice.name, reason, fallback)
    return opener.open(fallback)


def _started_by_mpi(facts: Sequence[Facts]) -> bool:
    return all(fact.launcher in _MPI_LAUNCHERS for fact in facts)


@dataclass(frozen=True, slots=True)
class _Opener:
    """Opens a transport on all ranks, or on none if one rank fails."""

    settings: Settings
    facts: Sequence[Facts]
    topology: Topology
    rank: int
    meeting: Rendezvous
    deadline_ns: int

    def open(self, name: str) -> Assembled:
        """Open and connect transport ``name``, and shared memory beside it for ranks of one site on one host."""
        transport = self._on_all(f"load {name}", lambda: registry.load(name))
        self._check_scope(transport)
        is_native = bool(transport.capabilities.native) and not (
            self.settings.reproducible and not transport.capabilities.ordered
        )
        opened: list[Endpoint] = []
        try:
            main = self._open_one(transport)
            opened.append(main)
            local: frozenset[int] = frozenset()
            near: Endpoint | None = None
            if any(self._local_peers_of(transport, rank) for rank in range(len(self.facts))):
                near = self._open_near()
            if near is not None:
                opened.append(near)
                local = self._connect_near(near, self._local_peers_of(transport, self.rank))
            here = self.topology.site_of(self.rank)
            sites = [self.topology.site_of(rank) for rank in range(self.topology.size)]
            others = frozenset(range(self.topology.size)) - {self.rank} - local
            addresses = self._addresses(name, main)
            if transport.capabilities.scope is Scope.HOST:
                self._require_together(main, addresses)
            self._connect(main, addresses, others, others & self._needed())
            # Wait for all ranks: one that went on and failed would disturb others that still connect to it.
            self.meeting.exchange(f"connected {name}", b"", self.deadline_ns)
        except BaseException:
            for endpoint in opened:
                endpoint.abort()
            raise
        endpoint_of = dict.fromkeys(others, main)
        if near is not None:
            endpoint_of |= dict.fromkeys(local, near)
        wide = frozenset(rank for rank in others if sites[rank] != here) if self.topology.is_wide else frozenset()
        native = main if is_native and isinstance(main, NativeCollectives) else None
        if native is not None:
            native.arrange([site.ranks for site in self.topology.sites])
        return Assembled(transport, Routes(endpoint_of, sites, wide), opened, native)

    def _check_scope(self, transport: Transport) -> None:
        if transport.capabilities.scope is Scope.HOST and len({fact.host for fact in self.facts}) > 1:
            raise TransportUnavailable(f"transport {transport.name!r} needs all ranks on one host; they are on several")

    def _local_peers_of(self, transport: Transport, rank: int) -> frozenset[int]:
        """Return the ranks that ``rank`` reaches through shared memory instead of the wide transport."""
        if transport.capabilities.native or transport.capabilities.scope is Scope.HOST or not self.topology.is_wide:
            return frozenset()
        site = self.topology.sites[self.topology.site_of(rank)]
        host = self.facts[rank].host
        return frozenset(other for other in site.ranks if other != rank and self.facts[other].host == host)

    def _elsewhere(self) -> frozenset[int]:
        """Return the ranks of other sites."""
        here = self.topology.sites[self.topology.site_of(self.rank)]
        return frozenset(range(self.topology.size)).difference(here.ranks)

    def _open_one(self, transport: Transport) -> Endpoint:
        job = _across_lines(self.topology.granted, self.rank, self.settings.slotting) | self.settings.options
        job["proxied_peers"] = self._elsewhere()
        options = {name: value for name, value in job.items() if name in transport.options}
        return self._on_all(
            f"open {transport.name}",
            lambda: transport.open(self.rank, self.topology.size, self.meeting, MonotonicClock(), options),
        )

    def _needed(self) -> frozenset[int]:
        """Return the ranks that this one exchanges messages with in collectives of the world.

        Other ranks are connected when a group needs them.
        """
        topology, rank = self.topology, self.rank
        site_of = [topology.site_of(other) for other in range(topology.size)]
        needed = {*topology.sites[site_of[rank]].ranks, *partners(topology, rank)}
        last = {site.ranks[-1] for site in topology.sites}  # plans for small arrays use the last rank of each site
        return frozenset(needed | acquaintances(rank, site_of) | (last if rank in last else set()))

    def _addresses(self, name: str, endpoint: Endpoint) -> list[str]:
        texts = self.meeting.exchange(f"addresses {name}", endpoint.address.encode(), self.deadline_ns)
        return [text.decode() for text in texts]

    def _connect(
        self, endpoint: Endpoint, addresses: Sequence[str], peers: frozenset[int], needed: frozenset[int]
    ) -> None:
        told = {peer: addresses[peer] for peer in sorted(peers | {self.rank})}
        endpoint.connect(told, self.deadline_ns, needed)

    def _open_near(self) -> Endpoint | None:
        """Open shared memory; None on all ranks if one of them has none, since `_open_one` raises on all alike."""
        try:
            return self._open_one(registry.load(LOCAL))
        except TransportUnavailable as error:
            if self.rank == 0:
                log.warning("ranks of one host use the network: %s", error)
            return None

    def _connect_near(self, near: Endpoint, peers: frozenset[int]) -> frozenset[int]:
        """Connect to those ranks of this host and site that can share memory with this one, and return them."""
        addresses = self._addresses(LOCAL, near)
        apart = self._apart(near, addresses, peers)
        for (low, high), reason in apart.items():
            if self.rank == low:
                log.info("ranks %d and %d of one host use the network: %s", low, high, reason)
        together = frozenset(peer for peer in peers if _pair(self.rank, peer) not in apart)
        self._connect(near, addresses, together, together)
        return together

    def _require_together(self, endpoint: Endpoint, addresses: Sequence[str]) -> None:
        apart = self._apart(endpoint, addresses, frozenset(range(len(self.facts))) - {self.rank})
        for (low, high), reason in apart.items():
            raise TransportUnavailable(f"ranks {low} and {high} cannot share memory: {reason}")

    def _apart(self, endpoint: Endpoint, addresses: Sequence[str], peers: frozenset[int]) -> dict[tuple[int, int], str]:
        """Return the pairs of which one rank cannot be connected from the other, with the reason; equal on all ranks.

        All ranks call it.
        """
        found = endpoint.apart({peer: addresses[peer] for peer in sorted(peers)})
        answers = self.meeting.exchange("apart", msgspec.json.encode(dict(found)), self.deadline_ns)
        pairs: dict[tuple[int, int], str] = {}
        for rank, answer in enumerate(answers):
            for peer, reason in msgspec.json.decode(answer, type=dict[int, str]).items():
                pairs.setdefault(_pair(rank, peer), reason)
        return pairs

    def _on_all(self, what: str, action: Callable[[], Opened]) -> Opened:
        """Run ``action`` on every rank; if it fails on one rank, undo it and raise the same error on all."""
        result: Opened | None = None
        problem = ""
        kind: type[TransportUnavailable] | type[UsageError] = TransportUnavailable
        cause: Exception | None = None
        try:
            result = action()
        except (TransportUnavailable, UsageError) as error:
            problem, cause = str(error), error
            kind = UsageError if isinstance(error, UsageError) else TransportUnavailable
        answers = self.meeting.exchange(what, f"{kind.__name__}:{problem}".encode(), self.deadline_ns)
        failed = [(rank, *answer.decode().split(":", 1)) for rank, answer in enumerate(answers)]
        failed = [entry for entry in failed if entry[2]]
        if not failed and result is not None:
            return result
        if isinstance(result, Endpoint):
            result.abort()
        rank, first_kind, text = failed[0]
        message = f"rank {rank} could not {what}: {text}"
        raise (UsageError if first_kind == "UsageError" else TransportUnavailable)(message) from cause


def _pair(one: int, other: int) -> tuple[int, int]:
    return min(one, other), max(one, other)


def _across_lines(topology: Topology, rank: int, slotting: Slotting | None) -> dict[str, object]:
    """Return transport options for flows across lines: their warm-up traffic, and the bytes in flight.

    To warm up, each flow sends at an equal share of the line's rate for `WARM_UP_ROUND_TRIPS` round trips. TCP doubles
    its congestion window every round trip, so twelve take it from ten segments to any window needed here, but not
    beyond twice the bytes in flight. TCP paces by itself at 1.2 windows a round trip. With a calendar for more than two
    sites, a flow has a line to itself in its windows and needs a larger window than at its share. Then the flows of a
    rank warm up one after another, each at half the line's rate, so that two may meet at a receiver.

    Where the line is faster than hosts no moment is lost if ZeroMQ's threads take turns with others, and time is won:
    each wake-up then moves more bytes.
    """
    if not topology.is_wide:
        return {}
    calendar = build_calendar(topology, Slotting.SHARE)
    rate, most = min(rate for rate in calendar.rates if rate > 0), max(calendar.rates)
    in_turn = slotting is Slotting.CALENDAR and len(topology.sites) > 2
    if in_turn:
        rate *= (len(topology.sites) - 1) / 2
        most = max(site.uplink_bytes_per_s or 0 for site in topology.sites)
    round_trip_ns = 2 * max(link.one_way_ns for _, link in topology.links)
    pace_groups = _pace_groups(topology, rank)
    nbytes = min(round(rate * WARM_UP_ROUND_TRIPS * round_trip_ns / 1e9), LARGEST_WARM_UP_BYTES)
    peers = partners(topology, rank)
    fast = is_fast(topology, calendar) and slotting in (None, Slotting.SHARE)
    delay_ns = FAST_ACKNOWLEDGE_DELAY_NS if fast else WIDE_ACKNOWLEDGE_DELAY_NS
    host_paced = fast and round_trip_ns <= LONGEST_HOST_PACED_NS
    if host_paced:
        nbytes = min(nbytes, round(rate * LARGEST_BURST_NS / 1e9))
    return {
        "warm_up_peers": peers, "warm_up_bytes": nbytes, "warm_up_bytes_per_s": rate, "warm_up_in_turn": in_turn,
        "in_flight_bytes": round(most * round_trip_ns / 1e9), "acknowledge_delay_ns": delay_ns,
        "pace_groups": pace_groups, "shared_peers": _shared_peers(topology, rank), "host_paced": host_paced,
        "prompt": not fast,
    }  # fmt: skip


def _shared_peers(topology: Topology, rank: int) -> dict[int, int]:
    """Return the ranks that this one reaches over lines which nobody reserved, with the round trip in ns."""
    here = topology.site_of(rank)
    there = [index for index in range(len(topology.sites)) if topology.reserved_bytes_per_s(here, index) is None]
    return {
        peer: topology.one_way_ns(here, index) + topology.one_way_ns(index, here)
        for index in there
        if index != here
        for peer in topology.sites[index].ranks
    }


def _pace_groups(topology: Topology, rank: int) -> dict[int, int]:
    """Return a pace group for each rank of other sites; ranks of one pace group share the rate of one flow.

    The calendar grants one flow to each partner of a rank in the world's plans. All traffic of a rank to a site, of
    any group and to any peer, uses these flows: a peer that is not a partner shares the site's first flow.
    """
    own = partners(topology, rank)
    numbers: dict[int, int] = {}
    for site in topology.sites:
        if rank not in site.ranks:
            flows = sorted(own.intersection(site.ranks)) or list(site.ranks[:1])
            numbers |= {peer: peer if peer in flows else flows[0] for peer in site.ranks}
    return numbers


def deadline_after(timeout_s: float) -> int:
    """Return the monotonic time ``timeout_s`` from now, in nanoseconds."""
    return time.monotonic_ns() + round(timeout_s * 1e9)
