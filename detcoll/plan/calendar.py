"""The calendar: which rank may use its site's uplink when, and how fast.

A calendar repeats for ever from time zero of the site's clock, so no collective has to negotiate its start. Modes:

- CALENDAR  a site's uplink leads to one destination at a time, and the R ranks of the site share that slot by rate.
            With two sites there is one destination and nobody else shares its downlink: the slot never closes, and no
            clock is needed. With more, windows are laid so that what arrives at a downlink comes from one site at a
            time too (`detcoll.plan.alignment`), which needs a clock that all sites share. In a window a rank sends to
            one peer at a time, so each has 1/R of the line, however many peers it has at the destination.
- TURNS     two sites whose R ranks do not share the slot but own the uplink in turn, each in a window of ``slot_ns``
            less the guard, at the full rate. A site of one rank owns its line always and has no windows.
- SHARE     no slots: every flow is paced at an equal share of the lines it crosses. Needs no clock.
- OFF       no slots and no pacing: what an ordinary library does, kept for comparison.

Rates are payload bytes per second. A calendar is laid out for `LAID_OUT` of the line's payload rate: what is left
carries express messages, acknowledgements and what TCP sends by itself. Slow flows leave more, since TCP acknowledges
every second segment of theirs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import Enum

import msgspec

from detcoll.errors import PlanError, UsageError
from detcoll.plan.alignment import CALL_NS, LARGEST_GUARD_SHARE, LATE_NS, SECONDS, align
from detcoll.topology import Topology

LAID_OUT = 0.99
"""Share of the payload rate that windows and pacing use at most."""

PACED_BURSTS_A_SECOND, LEAST_SEGMENTS = 1024, 2
"""Linux lets a paced connection send what its rate carries in a millisecond at once, and at least so many segments
(``tcp_tso_autosize``); what arrives at once is acknowledged once, by a segment without payload (RFC 5681, 4.2)."""

DEFAULT_SLOT_NS = 12_000_000
"""A host's wake-up lateness, some 0.1 ms, costs about one part in a hundred of a slot this long."""

SMALLEST_SLOT_BYTES = 65_536
"""On slow lines slots grow until they carry this much, so that chunks do not get too small to be worth a frame."""

SHORTEST_ALIGNED_SLOT_NS = 10_000_000
"""Between more than two sites each window has to be begun by waking up, and a host has more to do than that."""

DEFAULT_HOST_ERROR_NS = 100_000
"""How late kernel pacing and the sender's own wake-up may let the last byte of a window leave."""


class Slotting(Enum):
    """How flows share a line."""

    CALENDAR = "calendar"
    TURNS = "turns"
    SHARE = "share"
    OFF = "off"

    @classmethod
    def parse(cls, text: str) -> Slotting:
        """Return the mode that ``text`` names.

        Raises
        ------
        UsageError
            If there is no such mode.
        """
        try:
            return cls(text)
        except ValueError:
            raise UsageError(f"slotting={text!r} must be one of {', '.join(mode.value for mode in cls)}") from None


@dataclass(frozen=True, slots=True)
class SlotWindow:
    """A window of ``rank`` within its site's cycle: ``[start_ns, end_ns)``, guard not included.

    ``rank`` -1: of all ranks of the site, each at its flow's rate.  ``destination`` : the site to which it leads, -1
    for any. One that leads to a site may run over the end of the cycle.
    """

    rank: int
    start_ns: int
    end_ns: int
    destination: int = -1


@dataclass(frozen=True, slots=True)
class SiteCycle:
    """One site's cycle. No windows: every rank may send at any time, at its flows' rates."""

    cycle_ns: int
    windows: tuple[SlotWindow, ...] = ()


@dataclass(frozen=True, slots=True)
class Calendar:
    """Windows and rates for all sites; the same on every rank.

    ``rates`` : payload bytes per second from site i to site j, by i * sites + j, of one of those that may send at once
    (`at_once`); 0 where it is not limited.
    """

    mode: Slotting
    sites: tuple[SiteCycle, ...]
    rates: tuple[float, ...]
    guard_ns: int = 0

    @property
    def digest(self) -> str:
        """A hexadecimal digest that is equal on ranks that hold the same calendar."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()

    def rate_bytes_per_s(self, source: int, destination: int) -> float:
        """Return the payload rate of one sender from site ``source`` to site ``destination``; 0: not limited."""
        return self.rates[source * len(self.sites) + destination]

    @property
    def has_windows(self) -> bool:
        """Whether any rank has to wait for its turn."""
        return any(cycle.windows for cycle in self.sites)

    @property
    def leads(self) -> bool:
        """Whether windows lead to one site each."""
        return any(window.destination >= 0 for cycle in self.sites for window in cycle.windows)

    def windows_of(self, site: int, rank: int) -> tuple[SlotWindow, ...]:
        """Return the windows of ``rank`` in the cycle of ``site``, in order of time."""
        return tuple(window for window in self.sites[site].windows if window.rank in (rank, -1))

    def windows_to(self, site: int, rank: int, destination: int) -> tuple[SlotWindow, ...]:
        """Return those of them that may carry something to site ``destination``."""
        return tuple(window for window in self.windows_of(site, rank) if window.destination in (destination, -1))


def build_calendar(
    topology: Topology,
    mode: Slotting = Slotting.CALENDAR,
    slot_ns: int | None = None,
    error_ns: int = DEFAULT_HOST_ERROR_NS,
    seconds: float = SECONDS,
) -> Calendar:
    """Lay out the lines of ``topology``.

    Parameters
    ----------
    topology : Topology
        With lines between its sites, else the calendar is empty.
    mode : Slotting
        TURNS becomes SHARE where there are more than two sites.
    slot_ns : int, optional
        Length of a slot, guard included; by default long enough for the guard to cost at most 2 %. Where more than two
        sites are not equally far apart, what a pair has in a cycle comes near it, in one window or in two.
    error_ns : int
        What a guard has to cover: how far ranks disagree about time, and how late the last byte leaves.
    seconds : float
        How long to look for windows where distances differ.

    Raises
    ------
    PlanError
        If the guard would cost more than `LARGEST_GUARD_SHARE` of ``slot_ns``: the clock cannot honour such windows. If
        arrivals of more than two sites cannot be aligned.
    """
    count = len(topology.sites)
    if not topology.is_wide or mode is Slotting.OFF:
        return Calendar(Slotting.OFF, tuple(SiteCycle(DEFAULT_SLOT_NS) for _ in range(count)), (0.0,) * count**2)
    if mode is Slotting.TURNS and count == 2:
        return _in_turns(topology, slot_ns, error_ns)
    if mode is Slotting.CALENDAR and count > 2:
        return _aligned(topology, slot_ns, error_ns, seconds)
    return _shared(topology, mode if count == 2 else Slotting.SHARE)


def _line_rate(topology: Topology, source: int, destination: int, flows: int) -> float:
    """Return the payload rate that ``flows`` between two sites use together."""
    up = topology.sites[source].uplink_bytes_per_s
    down = topology.sites[destination].downlink_bytes_per_s
    assert up is not None
    rate = min(up, down if down is not None else up) * topology.payload_share
    return rate * laid_out(topology, rate / flows)


def laid_out(topology: Topology, flow_bytes_per_s: float) -> float:
    """Return the share of a line that flows of this rate may use: slow ones leave room for acknowledgements.

    They are as many as the bursts of the other direction, each as large as a segment's headers. Up to half of what
    `LAID_OUT` leaves is theirs, enough from some 80 Mbit/s on.
    """
    payload_bytes = topology.mtu_bytes * topology.payload_share
    segments = max(int(flow_bytes_per_s / PACED_BURSTS_A_SECOND / payload_bytes), LEAST_SEGMENTS)
    acknowledged = (1 - topology.payload_share) / segments
    return LAID_OUT - max(acknowledged - (1 - LAID_OUT) / 2, 0)


def _in_turns(topology: Topology, slot_ns: int | None, error_ns: int) -> Calendar:
    there, back = _in_a_turn(topology, 0, 1), _in_a_turn(topology, 1, 0)
    rates = (0.0, _line_rate(topology, 0, 1, there) / there, _line_rate(topology, 1, 0, back) / back, 0.0)
    slot_ns = _slot_ns(slot_ns, DEFAULT_SLOT_NS, min(rates[1], rates[2]), error_ns)
    return Calendar(
        Slotting.TURNS, tuple(_turns(site.ranks, slot_ns, error_ns) for site in topology.sites), rates, error_ns
    )


def _slot_ns(slot_ns: int | None, default_ns: int, slowest_bytes_per_s: float, error_ns: int) -> int:
    """Return a slot that is long enough for its guard and for what it should carry, or the one asked for."""
    if slot_ns is None:
        slot_ns = max(
            default_ns, int(SMALLEST_SLOT_BYTES / slowest_bytes_per_s * 1e9), int(error_ns / LARGEST_GUARD_SHARE) + 1
        )
    if error_ns > slot_ns * LARGEST_GUARD_SHARE:
        raise PlanError(
            f"slot_ns={slot_ns} is too short for errors of {error_ns} ns: the guard would cost "
            f"{error_ns / slot_ns:.1%}, more than {LARGEST_GUARD_SHARE:.0%}"
        )
    return slot_ns


def _aligned_slot_ns(sites: int, error_ns: int) -> int:
    """Return the slot with which a call of `CALL_NS` ends soonest where a cycle is one slot for each other site.

    Of each slot the guard and what waking up late costs are lost, and the call's last bytes wait a cycle:
    CALL_NS (error + late) / slot + (S-1) slot is smallest at the root of CALL_NS (error + late) / (S-1).
    """
    return max(round(math.sqrt(CALL_NS * (error_ns + LATE_NS) / (sites - 1))), SHORTEST_ALIGNED_SLOT_NS)


def _aligned(topology: Topology, slot_ns: int | None, error_ns: int, seconds: float) -> Calendar:
    """One destination at a time at each uplink, one source at a time at each downlink; equal bytes for all pairs."""
    sites = range(len(topology.sites))
    ranks = [len(site.ranks) for site in topology.sites]
    lines = [[_line_rate(topology, i, j, ranks[i]) if i != j else 0.0 for j in sites] for i in sites]
    slowest = min(lines[i][j] for i in sites for j in sites if i != j)
    longest_ns = _slot_ns(slot_ns, _aligned_slot_ns(len(sites), error_ns), slowest, error_ns)
    carried_bytes = (longest_ns - error_ns) * slowest
    shortest_ns = int(error_ns / LARGEST_GUARD_SHARE) + 1
    slots_ns = [
        [max(round(carried_bytes / lines[i][j]) + error_ns, shortest_ns) if i != j else 0 for j in sites] for i in sites
    ]
    found = align([[topology.one_way_ns(i, j) for j in sites] for i in sites], slots_ns, error_ns, seconds)
    windows: list[list[SlotWindow]] = [[] for _ in sites]
    for each in found.departures:
        windows[each.source].append(SlotWindow(-1, each.start_ns, each.start_ns + each.length_ns, each.destination))
    rates = tuple(lines[i][j] / ranks[i] for i in sites for j in sites)
    cycles = tuple(SiteCycle(found.cycle_ns, tuple(of_site)) for of_site in windows)
    return Calendar(Slotting.CALENDAR, cycles, rates, error_ns)


def _in_a_turn(topology: Topology, source: int, destination: int) -> int:
    """Return how many flows of a site may send at once in mode TURNS: all of a lone rank's, else one."""
    return flows_between(topology, source, destination) if len(topology.sites[source].ranks) == 1 else 1


def _turns(ranks: tuple[int, ...], slot_ns: int, guard_ns: int) -> SiteCycle:
    if len(ranks) == 1:
        return SiteCycle(slot_ns)
    windows = tuple(
        SlotWindow(rank, index * slot_ns, (index + 1) * slot_ns - guard_ns) for index, rank in enumerate(ranks)
    )
    return SiteCycle(slot_ns * len(ranks), windows)


def _shared(topology: Topology, mode: Slotting) -> Calendar:
    """All flows of a site may send at once, so each gets an equal part of both lines it crosses."""
    count = len(topology.sites)
    rates = []
    for i in range(count):
        for j in range(count):
            flows = (count - 1) * flows_between(topology, i, j)
            rates.append(0.0 if i == j else _line_rate(topology, i, j, flows) / flows)
    return Calendar(mode, tuple(SiteCycle(DEFAULT_SLOT_NS) for _ in range(count)), tuple(rates))


def flows_between(topology: Topology, source: int, destination: int) -> int:
    """Return how many rank pairs of two sites own a common piece of an array cut evenly over each site's ranks."""
    here, there = len(topology.sites[source].ranks), len(topology.sites[destination].ranks)
    return here + there - math.gcd(here, there)


def at_once(calendar: Calendar, topology: Topology, source: int, destination: int) -> int:
    """Return how many may send from one site to another at once, each at the rate of the calendar.

    Where windows lead to one site each these are the ranks of the source, since each sends to one peer at a time. In
    mode TURNS it is the one whose turn it is, or all flows of a lone rank. Else all flows send at once.
    """
    if not calendar.sites[source].windows:
        return flows_between(topology, source, destination)
    return len(topology.sites[source].ranks) if calendar.leads else 1


def check_calendar(calendar: Calendar, topology: Topology) -> None:
    """Prove that no uplink and no downlink carries more than it may at any time.

    Windows of one site must not overlap, every rank of a site with windows must have one, and guards must lie between
    different owners. Where windows lead to one site each, every site must have one to every other, and what arrives
    must not overlap either, guards included. Rates are summed over everything that may send at once.

    Raises
    ------
    PlanError
        With the site, the windows or the rates that collide.
    """
    if calendar.mode is Slotting.OFF:
        return
    for index, (site, cycle) in enumerate(zip(topology.sites, calendar.sites, strict=True)):
        _check_cycle(site.name, site.ranks, cycle, calendar.guard_ns)
        _check_rates(calendar, topology, index)
    if calendar.leads:
        for index in range(len(topology.sites)):
            _check_arrivals(calendar, topology, index)


def _check_cycle(name: str, ranks: tuple[int, ...], cycle: SiteCycle, guard_ns: int) -> None:
    if not cycle.windows:
        return
    owners = {window.rank for window in cycle.windows}
    idle = set(ranks) - owners
    if idle and -1 not in owners:
        raise PlanError(f"site {name!r}: ranks {sorted(idle)} own no window")
    for window in cycle.windows:
        last_ns = cycle.cycle_ns + (window.start_ns if window.destination >= 0 else 0)
        if not 0 <= window.start_ns < min(window.end_ns, cycle.cycle_ns) or window.end_ns > last_ns:
            raise PlanError(f"site {name!r}: {window} does not lie in its cycle of {cycle.cycle_ns} ns")
    _check_apart(f"site {name!r}", [(window.start_ns, window) for window in cycle.windows], cycle.cycle_ns, guard_ns)


def _check_apart(where: str, begun: list[tuple[int, SlotWindow]], cycle_ns: int, guard_ns: int) -> None:
    """Check that windows which begin at these times of a cycle do not overlap, with guards between owners."""
    begun = sorted(begun, key=lambda entry: entry[0])
    following = [*begun[1:], (begun[0][0] + cycle_ns, begun[0][1])]
    for (start_ns, window), (next_ns, other) in zip(begun, following, strict=True):
        gap_ns = next_ns - start_ns - (window.end_ns - window.start_ns)
        same_owner = (window.rank, window.destination) == (other.rank, other.destination)
        if gap_ns < (0 if same_owner else guard_ns):
            raise PlanError(f"{where}: {window} and {other} collide; the guard is {guard_ns} ns")


def _check_arrivals(calendar: Calendar, topology: Topology, receiver: int) -> None:
    """Check that windows of all other sites to this one arrive one after another."""
    name, cycle_ns = topology.sites[receiver].name, calendar.sites[receiver].cycle_ns
    arrivals: list[tuple[int, SlotWindow]] = []
    for sender, cycle in enumerate(calendar.sites):
        if sender == receiver:
            continue
        if cycle.cycle_ns != cycle_ns:
            raise PlanError(f"sites have cycles of {cycle.cycle_ns} and {cycle_ns} ns; expected one")
        delay_ns = topology.one_way_ns(sender, receiver)
        mine = [window for window in cycle.windows if window.destination == receiver]
        if not mine or any(window.destination < 0 for window in cycle.windows):
            raise PlanError(f"site {topology.sites[sender].name!r} has no window of its own to site {name!r}")
        # A source is an owner here, so it stands where a rank would.
        arrivals += [
            ((window.start_ns + delay_ns) % cycle_ns, SlotWindow(sender, window.start_ns, window.end_ns, receiver))
            for window in mine
        ]
    _check_apart(f"arrivals at site {name!r}", arrivals, cycle_ns, calendar.guard_ns)


def _check_rates(calendar: Calendar, topology: Topology, index: int) -> None:
    site = topology.sites[index]
    others = [other for other in range(len(topology.sites)) if other != index]
    for label, rate, pairs in (
        ("uplink", site.uplink_bytes_per_s, [(index, other) for other in others]),
        ("downlink", site.downlink_bytes_per_s, [(other, index) for other in others]),
    ):
        each = [calendar.rate_bytes_per_s(i, j) * at_once(calendar, topology, i, j) for i, j in pairs]
        used = (max(each, default=0.0) if calendar.leads else sum(each)) / topology.payload_share
        if rate is not None and used > rate * (1 + 1e-9):
            raise PlanError(f"site {site.name!r}: its {label} of {rate:.0f} bytes/s would carry {used:.0f}")
