"""The state of one rank in each of its groups, as plain data for its flight record."""

from __future__ import annotations

from itertools import islice
from typing import Any

from detcoll.runtime import blame
from detcoll.runtime.engine import Engine
from detcoll.runtime.group import WORLD_ID
from detcoll.runtime.membership import Membership
from detcoll.runtime.operation import Operation
from detcoll.runtime.transfer import ANY, Transfer

LARGEST_CALLS = 64
"""Of each group, this many queued calls are listed, and this many messages."""


def snapshot(engine: Engine) -> list[dict[str, Any]]:
    """Return the state of this rank in each group. Thread-safe, but not an atomic snapshot in another thread."""
    while True:
        try:
            return [_of_group(membership, engine.rank) for membership in list(engine.groups.values())]
        except RuntimeError:  # the progress thread changed a collection meanwhile
            continue


def merged(natives: list[dict[str, Any]], planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the states of all groups: those whose calls are native, planned, or both."""
    rows = {row["id"]: row for row in planned}
    for row in natives:
        other = rows.get(row["id"])
        if other is not None:
            row = row | {
                "latest": max(row["latest"], other["latest"]), "failure": row["failure"] or other["failure"],
                "calls": row["calls"] + other["calls"],
            }  # fmt: skip
        rows[row["id"]] = row
    return [*(row for row in rows.values() if row["id"] == "world"), *(r for r in rows.values() if r["id"] != "world")]


def _of_group(membership: Membership, rank: int) -> dict[str, Any]:
    group = membership.group
    waiting = list(membership.waiting)[:LARGEST_CALLS]
    active = [operation for operation in membership.active if not operation.reported]
    messages = list(islice(membership.mail.unended(), LARGEST_CALLS))
    calls = [_of_call(operation) for operation in active] + [_of_waiting(operation) for operation in waiting]
    return {
        "id": "world" if group.id == WORLD_ID else f"{group.id:016x}",
        "number": group.number,
        "name": group.name,
        "ranks": list(group.ranks),
        "latest": membership.latest,
        "failure": None if membership.failure is None else str(membership.failure),
        "calls": calls + [_of_message(transfer, group.members - {rank}) for transfer in messages],
    }


def _of_call(operation: Operation) -> dict[str, Any]:
    strangers = sorted(operation.strangers)
    waits = strangers or sorted(blame.awaited(operation))
    if strangers:
        state = f"has not heard that {_ranks(strangers)} called it"
    elif waits:
        state = f"waits for messages from or to {_ranks(waits)}"
    elif devices := blame.devices(operation):
        state = f"waits for {devices}"
    else:
        state = "folds and copies"
    return {
        "sequence": operation.sequence,
        "what": f"call {operation.sequence}, {operation.descriptor.brief}",
        "state": state,
        "waits_for": waits,
    }


def _of_waiting(operation: Operation) -> dict[str, Any]:
    what = f"call {operation.sequence}, {operation.descriptor.brief}"
    return {"sequence": operation.sequence, "what": what, "state": "waits to be started", "waits_for": []}


def _of_message(transfer: Transfer, members: frozenset[int]) -> dict[str, Any]:
    """Return the state of a send or recv; these are not numbered.  ``members`` : the other ranks of its group."""
    waits = sorted(members) if transfer.partner == ANY else [transfer.partner]
    return {"sequence": -1, "what": transfer.what, "state": transfer.awaits, "waits_for": waits}


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
