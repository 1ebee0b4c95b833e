"""Which calendar a job keeps: rank 0 makes it or finds it on disk, the others check what they are given.

Aligning arrivals takes a solver with a time limit, which need not give two machines the same answer, so one rank
decides. What it decided is kept under ``$XDG_CACHE_HOME/detcoll/calendars`` by a digest of all that it depends on. The
cache is only ever a shortcut: what is broken, from elsewhere or cannot be written is passed over.

Windows between more than two sites mean one time for all of them. Where clocks differ between sites, where ranks of a
site would have to send to several of another at once, or where no calendar is found, flows share the lines instead, and
the log says why.
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
from detcoll.plan import Calendar, Collective, Slotting, build_calendar, check_calendar, choose_chunk, predict_ns
from detcoll.topology import Topology

log = logging.getLogger("detcoll")

FORMAT = 1
"""Of the calendars on disk; raised when equal arguments give other calendars."""

LARGE_S = 1.0
WORTH = 1.05
"""Where nobody chooses, windows may be predicted to take so much longer than shares for an all-reduce that fills the
slowest line for `LARGE_S`: what they give, downlinks without queues, no prediction shows. More is too much."""

Exchange = Callable[[bytes], list[bytes]]
"""Gives this rank's payload and returns everybody's, in rank order."""


class Answer(msgspec.Struct, frozen=True):
    """What rank 0 tells: the calendar, and why it has no windows where it might have had."""

    calendar: Calendar
    reason: str = ""


def agree_on_calendar(
    topology: Topology, mode: Slotting | None, error_ns: int, clocks: Sequence[str], rank: int, exchange: Exchange
) -> Calendar:
    """Return the calendar that all ranks will keep; all of them call it.

    Parameters
    ----------
    topology : Topology
        Where all ranks are.
    mode : Slotting, optional
        What was asked for; None: CALENDAR where its prediction is good enough.
    error_ns : int
        What guards have to cover.
    clocks : sequence of str
        The clock domain of each rank.
    rank : int
        Of the caller.
    exchange : callable
        How ranks tell each other; called only where a calendar has to be agreed on.

    Raises
    ------
    PlanError
        If the calendar of rank 0 breaks a rule.
    """
    wanted = mode or Slotting.CALENDAR
    if wanted is not Slotting.CALENDAR or len(topology.sites) <= 2 or not topology.is_wide:
        return build_calendar(topology, wanted, error_ns=error_ns)
    reason = _obstacle(topology, clocks)
    if reason:
        answer = Answer(build_calendar(topology, Slotting.SHARE), reason)
    else:
        mine = msgspec.msgpack.encode(_decide(topology, mode, error_ns)) if rank == 0 else b""
        answer = msgspec.msgpack.decode(exchange(mine)[0], type=Answer)
        check_calendar(answer.calendar, topology)
    if answer.reason and rank == 0:
        level = logging.INFO if mode is None else logging.WARNING  # who asked for windows should hear
        log.log(level, "flows share the lines without windows: %s", answer.reason)
    return answer.calendar


def _obstacle(topology: Topology, clocks: Sequence[str]) -> str:
    """Return why the ranks cannot keep windows across sites, or nothing."""
    if len({clocks[site.ranks[0]] for site in topology.sites}) > 1:
        return "sites do not share a clock"
    if len({len(site.ranks) for site in topology.sites}) > 1:
        return "sites have unequal numbers of ranks"
    return ""


def _decide(topology: Topology, mode: Slotting | None, error_ns: int) -> Answer:
    share = build_calendar(topology, Slotting.SHARE)
    try:
        calendar = _kept(topology, error_ns)
    except PlanError as error:
        return Answer(share, str(error))
    if mode is None:
        windows_ns, shares_ns = (_large_ns(topology, each) for each in (calendar, share))
        if windows_ns > shares_ns * WORTH:
            return Answer(share, f"with windows a large all-reduce would take {windows_ns / shares_ns:.2f} as long")
    return Answer(calendar)


def _large_ns(topology: Topology, calendar: Calendar) -> int:
    slowest = min(rate for site in topology.sites if (rate := site.uplink_bytes_per_s) is not None)
    collective = Collective("all_reduce", max(int(slowest * LARGE_S / 8), topology.size), 4, 4)
    return predict_ns(collective, topology, calendar, "direct", choose_chunk(topology, calendar, collective))


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
