"""The calendar of a job: rank 0 builds it or reads it from disk, and the other ranks check it.

Aligning arrivals takes a solver with a time limit, whose result may differ between machines, so one rank decides. The
result is cached under ``$XDG_CACHE_HOME/detcoll/calendars`` by a digest of its inputs. Unusable cache entries are
ignored, and so is a folder that cannot be written.

With windows between more than two sites, arrivals from different sites must not overlap at a receiver. Sites without a
common clock align their arrivals (`detcoll.clock.arrival`) before the calendar is built, and guards cover the remaining
error. Flows share the lines without windows, and the log gives the reason, if that error is too large, sites have
unequal numbers of ranks, rates are reserved between sites, or no calendar is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from detcoll.errors import PlanError
from detcoll.plan import Calendar, Slotting, build_calendar, check_calendar
from detcoll.topology import Topology

log = logging.getLogger("detcoll")

FORMAT = 2
"""Format of the calendars on disk; increased when equal inputs give a different calendar."""

LARGEST_ARRIVAL_ERROR_NS = 1_000_000
"""Largest misalignment of arrivals for which windows are used. Beyond it, windows would have to be too long for guards
to take only a small share of them."""

ARRIVAL_STEP_NS = 50_000
"""Misalignments are rounded up to a multiple of this, so that a later job finds the solution in the cache."""

Exchange = Callable[[bytes], list[bytes]]
"""Contributes this rank's payload and returns those of all ranks, in rank order."""


class Answer(msgspec.Struct, frozen=True):
    """The message of rank 0: the calendar and, if windows were wanted but not possible, the reason."""

    calendar: Calendar
    reason: str = ""


def aligns_arrivals(topology: Topology, mode: Slotting | None, clocks: Sequence[str]) -> bool:
    """Return whether the requested calendar needs aligned arrivals, because the sites do not share a clock."""
    wants = mode is Slotting.CALENDAR and len(topology.sites) > 2 and topology.is_wide
    return wants and not _share_a_clock(topology, clocks) and not _obstacle(topology)


def agree_on_calendar(
    topology: Topology, mode: Slotting | None, error_ns: int, clocks: Sequence[str], rank: int, exchange: Exchange,
    arrivals_ns: int | None = None,
) -> Calendar:  # fmt: skip
    """Return the calendar that all ranks will use; all ranks must call it.

    Parameters
    ----------
    topology : Topology
        Sites, ranks and lines.
    mode : Slotting, optional
        The requested mode; None means CALENDAR for up to two sites, SHARE for more.
    error_ns : int
        Timing error that guards have to cover, without ``arrivals_ns``.
    clocks : sequence of str
        The clock domain of each rank.
    rank : int
        The caller's rank.
    exchange : callable
        All-gathers a payload; called only if ranks have to agree on a calendar.
    arrivals_ns : int, optional
        The remaining misalignment of arrivals, the same on all ranks; used only if `aligns_arrivals`. None if unknown.

    Raises
    ------
    PlanError
        If the calendar of rank 0 breaks a rule.
    """
    wanted = mode or (Slotting.CALENDAR if len(topology.sites) <= 2 else Slotting.SHARE)
    if wanted is not Slotting.CALENDAR or len(topology.sites) <= 2 or not topology.is_wide:
        return build_calendar(topology, wanted, error_ns=error_ns)
    reason = _obstacle(topology)
    if not reason and not _share_a_clock(topology, clocks):
        reason = _misalignment(arrivals_ns)
        error_ns += -(-(arrivals_ns or 0) // ARRIVAL_STEP_NS) * ARRIVAL_STEP_NS
    if reason:
        answer = Answer(build_calendar(topology, Slotting.SHARE), reason)
    else:
        mine = msgspec.msgpack.encode(_decide(topology, error_ns)) if rank == 0 else b""
        answer = msgspec.msgpack.decode(exchange(mine)[0], type=Answer)
        check_calendar(answer.calendar, topology)
    if answer.reason and rank == 0:
        log.warning("flows share the lines without windows: %s", answer.reason)
    return answer.calendar


def _share_a_clock(topology: Topology, clocks: Sequence[str]) -> bool:
    return len({clocks[site.ranks[0]] for site in topology.sites}) == 1


def _misalignment(arrivals_ns: int | None) -> str:
    """Return why sites without a common clock cannot use windows, or an empty string if they can."""
    if arrivals_ns is None:
        return "sites do not share a clock and could not align arrivals"
    if arrivals_ns > LARGEST_ARRIVAL_ERROR_NS:
        return (
            f"sites do not share a clock, and arrivals stay misaligned by {arrivals_ns / 1e3:.15g} us, more than "
            f"{LARGEST_ARRIVAL_ERROR_NS / 1e3:.15g} us; check the delays in the topology"
        )
    return ""


def _obstacle(topology: Topology) -> str:
    """Return why this topology does not permit windows, or an empty string if it does."""
    if len({len(site.ranks) for site in topology.sites}) > 1:
        return "sites have unequal numbers of ranks"
    if topology.has_reservations:
        return "rates are reserved between pairs of sites, and one pair cannot use the rate of another"
    return ""


def _decide(topology: Topology, error_ns: int) -> Answer:
    try:
        return Answer(_kept(topology, error_ns))
    except PlanError as error:
        return Answer(build_calendar(topology, Slotting.SHARE), str(error))


def _kept(topology: Topology, error_ns: int) -> Calendar:
    """Return the calendar from the cache, or build it and put it there."""
    key = hashlib.blake2b(f"{FORMAT} {topology.digest} {error_ns}".encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError, RuntimeError, msgspec.MsgspecError, PlanError, ValueError, IndexError):
        calendar = msgspec.msgpack.decode((_folder() / f"{key}.msgpack").read_bytes(), type=Calendar)
        check_calendar(calendar, topology)
        if calendar.mode is Slotting.CALENDAR and calendar.guard_ns == error_ns:
            return calendar
    calendar = build_calendar(topology, Slotting.CALENDAR, error_ns=error_ns)
    with contextlib.suppress(OSError, RuntimeError):
        _write(_folder() / f"{key}.msgpack", msgspec.msgpack.encode(calendar))
    return calendar


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detcoll" / "calendars"


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
