"""Flight records in the form of PyTorch's flight recorder, for its analyzer ``torchfrtrace``.

The form is that of ``torch/distributed/flight_recorder`` in PyTorch 2.13: a pickle for each rank with its groups and
its calls. The analyzer knows backends by name only, so calls are told as those of Gloo.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detcoll.errors import UsageError
from detcoll.outputs import require_folder
from detcoll.plan import Collective
from detcoll.plan.collectives import declaration_of
from detcoll.signature import signature_of

VERSION = "2.10"
"""Of the form."""

PREFIX = "detcoll_rank_"
"""What the names of the files begin with; the rank follows."""

Record = dict[str, Any]


def write_dumps(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Write a file for each record, and return their paths.

    Only calls of collectives are told, and of each group only those from the first that all its records still hold.

    Raises
    ------
    UsageError
        If there are no records, their events do not say what was called, as those of older releases do not, or the
        folder cannot be made.
    """
    if not records:
        raise UsageError("no flight records; expected at least one")
    if any("called" not in event for record in records for event in _calls(record)):
        raise UsageError("the flight records do not say what was called; expected those of this release")
    require_folder(folder, "torch")
    folder.mkdir(parents=True, exist_ok=True)
    first = _first_calls(records)
    paths = []
    for record in records:
        path = folder / f"{PREFIX}{record['rank']}"
        path.write_bytes(pickle.dumps(_dump(record, first), protocol=4))
        paths.append(path)
    return paths


def _calls(record: Record) -> list[dict[str, Any]]:
    return [event for event in record["events"] if event["event"] == "call"]


def _first_calls(records: Sequence[Record]) -> dict[int, int]:
    """Return of each group the number of the first call that all records hold."""
    first: dict[int, int] = {}
    for record in records:
        own: dict[int, int] = {}
        for event in _calls(record):
            own.setdefault(event["group"], event["sequence"])
        for group, sequence in own.items():
            first[group] = max(first.get(group, sequence), sequence)
    return first


def _dump(record: Record, first: dict[int, int]) -> dict[str, Any]:
    groups = {group["number"]: group for group in record["groups"]}
    started, ended = (
        {(event["group"], event["sequence"]): event["at_ns"] for event in record["events"] if event["event"] == what}
        for what in ("start", "end")
    )
    entries: list[dict[str, Any]] = []
    for event in _calls(record):
        group = groups.get(event["group"])
        if group is None or event["sequence"] < first[event["group"]]:
            continue
        key = event["group"], event["sequence"]
        entry = _entry(event, group, int(record["rank"]), started.get(key), ended.get(key))
        entries.append(entry | {"record_id": len(entries), "op_id": len(entries)})
    return {
        "version": VERSION,
        "pg_config": {
            group["id"]: {"name": group["id"], "desc": _description(group), "ranks": str(list(group["ranks"]))}
            for group in record["groups"]
        },
        "pg_status": {},
        "entries": entries,
    }


def _entry(
    event: dict[str, Any], group: dict[str, Any], rank: int, started_ns: int | None, ended_ns: int | None
) -> dict[str, Any]:  # fmt: skip
    called = event["called"]
    size, own = len(group["ranks"]), group["ranks"].index(rank)
    moved = Collective(called["kind"], called["count"], 1, 1, max(called["root"], 0))
    given, taken = declaration_of(called["kind"]).elems(moved, size, own)
    if not signature_of(called["kind"]).has_out:
        given = taken = called["count"]
    return {
        "pg_id": group["number"],
        "process_group": (group["id"], _description(group)),
        "collective_seq_id": event["sequence"] + 1,
        "p2p_seq_id": 0,
        "profiling_name": f"gloo:{called['kind']}",
        "time_created_ns": event["at_ns"],
        "time_discovered_started_ns": started_ns,
        "time_discovered_completed_ns": ended_ns,
        "duration_ms": None if ended_ns is None else (ended_ns - event["at_ns"]) / 1e6,
        "input_sizes": [[given]],
        "input_dtypes": [called["dtype"]],
        "output_sizes": [[taken]],
        "output_dtypes": [called["dtype"]],
        "state": "completed" if ended_ns is not None else "started" if started_ns is not None else "scheduled",
        "retired": ended_ns is not None,
        "timeout_ms": 0,
        "is_p2p": False,
        "frames": [{"name": _title(called), "filename": "", "line": 0}],
    }


def _title(called: dict[str, Any]) -> str:
    told = [called["op"], called["name"] and f"({called['name']})"]
    return " ".join([called["kind"], *filter(None, told)])


def _description(group: dict[str, Any]) -> str:
    return str(group["name"] or ("default_pg" if group["id"] == "world" else "undefined"))
