"""Which calendar a job keeps: rank 0 makes it or finds it on disk, the others check what they are given.

Aligning arrivals takes a solver with a time limit, which need not give two machines the same answer, so one rank
decides. What it decided is kept under ``$XDG_CACHE_HOME/detcoll/calendars`` by a digest of all that it depends on. The
cache is only a shortcut: unusable entries are ignored, and so is a folder that cannot be written.

Windows between more than two sites mean arrivals that do not meet. Sites that do not share a clock align them
(`detcoll.clock.arrival`) before there is a calendar, and guards allow for what they could not mend. Where that is too
much, where ranks of a site would have to send to several of another at once, where rates are reserved between sites, or
where no calendar is found, flows share the lines instead, and the log says why.
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
"""Of the calendars on disk; raised when equal arguments give other calendars."""

LARGEST_ARRIVAL_ERROR_NS = 1_000_000
"""Arrivals further apart than this get no windows, which would have to last too long for guards to be a small share."""

ARRIVAL_STEP_NS = 50_000
"""Errors of arrivals are rounded up to a multiple of this, so that what was solved once is found again on disk."""

Exchange = Callable[[bytes], list[bytes]]
"""Gives this rank's payload and returns everybody's, in rank order."""


class Answer(msgspec.Struct, frozen=True):
    """What rank 0 tells: the calendar, and why it has no windows where it might have had."""

    calendar: Calendar
    reason: str = ""


def aligns_arrivals(topology: Topology, mode: Slotting | None, clocks: Sequence[str]) -> bool:
    """Tell whether sites without a common clock have to align arrivals for the calendar that was asked for."""
    wants = mode is Slotting.CALENDAR and len(topology.sites) > 2 and topology.is_wide
    return wants and not _share_a_clock(topology, clocks) and not _obstacle(topology)


def agree_on_calendar(
    topology: Topology, mode: Slotting | None, error_ns: int, clocks: Sequence[str], rank: int, exchange: Exchange,
    arrivals_ns: int | None = None,
) -> Calendar:  # fmt: skip
    """Return the calendar that all ranks will keep; all of them call it.

    Parameters
    ----------
    topology : Topology
        Where all ranks are.
    mode : Slotting, optional
        What was asked for; None: CALENDAR for two sites, SHARE for more.
    error_ns : int
        What guards have to cover, apart from ``arrivals_ns``.
    clocks : sequence of str
        The clock domain of each rank.
    rank : int
        Of the caller.
    exchange : callable
        How ranks tell each other; called only where a calendar has to be agreed on.
    arrivals_ns : int, optional
        Where `aligns_arrivals`: how far apart arrivals are that should meet exactly, the same on all ranks. None: that
        is not known.

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
    """Return why sites without a common clock cannot keep windows, or nothing."""
    if arrivals_ns is None:
        return "sites do not share a clock, and could not align arrivals"
    if arrivals_ns > LARGEST_ARRIVAL_ERROR_NS:
        return (
            f"sites do not share a clock, and arrivals stay {arrivals_ns / 1e6:.2f} ms apart, more than "
            f"{LARGEST_ARRIVAL_ERROR_NS / 1e6:.2f} ms; are the delays in the topology right?"
        )
    return ""


def _obstacle(topology: Topology) -> str:
    """Return why no ranks could keep windows across these sites, or nothing."""
    if len({len(site.ranks) for site in topology.sites}) > 1:
        return "sites have unequal numbers of ranks"
    if topology.has_reservations:
        return "what is reserved between two sites cannot be lent to others for a while"
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
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
