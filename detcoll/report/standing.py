"""The state of the ranks of a job, from their flight records, and the calls that do not match.

A record lists for each group the calls that its rank made and the state of each. The findings claim no more than the
records show: ranks without a record are listed, and whom a rank waits for is taken from its own record.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detcoll.errors import UsageError
from detcoll.quantities import format_count
from detcoll.runtime.recorder import RECORD_SCHEMA

log = logging.getLogger("detcoll")

LARGEST_MESSAGES = 3
"""So many pending sends and receives of a rank are told one by one."""


@dataclass(frozen=True, slots=True)
class Stand:
    """State of one rank in one group.

    ``group`` : title of the group.  ``id`` : distinguishes groups with the same ranks and name.  ``latest`` : number of
    the latest call, or -1.  ``doing`` : the oldest pending call and messages, and their state.  ``waits_for`` : ranks
    of the job.
    """

    group: str
    id: str
    rank: int
    latest: int
    doing: str
    waits_for: tuple[int, ...]
    failure: str


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records in a folder, ordered by rank.

    Raises
    ------
    UsageError
        If a file cannot be read or is not a flight record.
    """
    records = []
    for path in sorted(folder.glob("record*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"file={str(path)!r} cannot be read: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != RECORD_SCHEMA:
            raise UsageError(f"file={str(path)!r} is not a flight record; expected schema {RECORD_SCHEMA}")
        records.append(record)
    return sorted(records, key=lambda record: int(record["rank"]))


@dataclass(frozen=True, slots=True)
class Recorded:
    """The folder of one job's records: when the first was written, for what, which ranks wrote, and how many there are.

    ``at`` : in seconds since 1970.
    """

    folder: Path
    at: float
    ranks: tuple[int, ...]
    size: int
    reason: str


def recorded_jobs(folder: Path) -> list[Recorded]:
    """Return the jobs whose folders of records are in ``folder``, the latest first.

    Jobs with a file that is no flight record, or that were removed meanwhile, are left out.
    """
    found = []
    for job in sorted({path.parent for path in folder.glob("*/record*.json")}):
        try:
            records = read_records(job)
        except UsageError as error:
            log.warning("left out: %s", error)
            continue
        if not records:
            continue
        first = min(records, key=lambda record: float(record["at"]))
        ranks = tuple(int(record["rank"]) for record in records)
        found.append(Recorded(job, float(first["at"]), ranks, int(first["size"]), str(first["reason"])))
    return sorted(found, key=lambda job: job.at, reverse=True)


def stands(records: Sequence[dict[str, Any]]) -> list[Stand]:
    """Return the state of each rank in each of its groups, ordered by group and rank."""
    found = []
    for record in records:
        for group in record["groups"]:
            calls = group["calls"]
            numbered = [call for call in calls if call["sequence"] >= 0]
            messages = [call for call in calls if call["sequence"] < 0]
            shown = numbered[:1] + messages[:LARGEST_MESSAGES]
            doing = "; ".join(f"{call['what']}: {call['state']}" for call in shown) or "no pending call"
            if len(messages) > LARGEST_MESSAGES:
                doing += f"; {len(messages) - LARGEST_MESSAGES} more messages"
            waits = tuple(sorted({rank for call in shown for rank in call["waits_for"]}))
            title = _title(group)
            rank, failure = int(record["rank"]), group["failure"] or ""
            found.append(Stand(title, group["id"], rank, group["latest"], doing, waits, failure))
    return sorted(found, key=lambda stand: (stand.group, stand.id, stand.rank))


def findings(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return sentences about why the job does not go on: missing records, calls that differ, ranks that are behind."""
    if not records:
        return ["There are no records."]
    told = []
    size = max(int(record["size"]) for record in records)
    missing = sorted(set(range(size)) - {int(record["rank"]) for record in records})
    if missing:
        told.append(f"No record of {_ranks(missing)}.")
    told += _misfits(records)
    told += _behind(records)
    return told


def _misfits(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each call (group and number) that differs between ranks."""
    calls: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for event in record["events"]:
            if event["event"] == "call" and event["detail"]:
                calls[event["group"], event["sequence"]][event["detail"]].append(int(record["rank"]))
    titles = {group["number"]: _title(group) for record in records for group in record["groups"]}
    told = []
    for (number, sequence), variants in sorted(calls.items()):
        if len(variants) > 1:
            sides = "; ".join(f"{_ranks(sorted(set(ranks)))} called {what}" for what, ranks in variants.items())
            told.append(f"{titles.get(number, f'group {number}')}, call {sequence}: calls differ. {sides}.")
    return told


def _behind(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return for each group the ranks that made fewer calls, and the ranks that others wait for."""
    groups: dict[tuple[str, str], list[Stand]] = defaultdict(list)
    for stand in stands(records):
        groups[stand.group, stand.id].append(stand)
    known = {int(record["rank"]) for record in records}
    told = []
    for (title, _), members in sorted(groups.items()):
        furthest = max(stand.latest for stand in members)
        late = [stand for stand in members if stand.latest < furthest]
        if late:
            made = ", ".join(f"rank {stand.rank} has made {stand.latest + 1}" for stand in late)
            told.append(f"{title}: {made} of {format_count(furthest + 1, 'call')} that others made.")
        awaited = {rank for stand in members for rank in stand.waits_for}
        here = {stand.rank: stand for stand in members}
        idle = sorted(rank for rank in awaited if rank in here and not here[rank].waits_for)
        away = sorted(rank for rank in awaited - here.keys() if rank in known)
        unknown = sorted(awaited - here.keys() - known)
        if idle:
            told.append(f"{title}: others wait for {_ranks(idle)}, {_whose(idle, 'waits', 'wait')} for no other rank.")
        if away:
            told.append(
                f"{title}: others wait for {_ranks(away)}, {_whose(away, 'has', 'have')} left it or not opened it."
            )
        if unknown:
            told.append(f"{title}: others wait for {_ranks(unknown)}, of which there is no record.")
    return told


def _whose(ranks: Sequence[int], one: str, several: str) -> str:
    return f"which {one if len(ranks) == 1 else several}"


def _title(group: dict[str, Any]) -> str:
    if group["id"] == "world":
        return "world"
    return f"group {group['name']!r}" if group["name"] else f"group of ranks {', '.join(map(str, group['ranks']))}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
