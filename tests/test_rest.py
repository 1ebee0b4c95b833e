"""What a job hears of its other ranks from the rendezvous: what is told to the engine, and what is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from detcoll.errors import PeerLost, PlanMismatch
from detcoll.job.rest import Rest
from detcoll.rendezvous import Aborted, Lost
from detcoll.runtime.control import WHOLE_GROUP, Cause


def rest_of(*events: Aborted | Lost) -> tuple[Rest, list[Any], Any]:
    """Return a rest that hears these events at once, what it tells, and to whom."""
    left, told = list(events), []

    def hear() -> list[Aborted | Lost]:
        heard = left[:]
        left.clear()
        return heard

    failures: Any = SimpleNamespace(
        told=lambda cause, now_ns: told.append((cause.group, cause.sequence, cause.text)),
        rank_lost=lambda rank, text, now_ns, is_known: told.append((rank, text, is_known)),
    )
    session: Any = SimpleNamespace(events=hear)
    return Rest(session), told, failures


def test_each_event_is_told_once_and_what_ended_a_call_is_not_kept() -> None:
    refused = [Aborted(1, f"UsageError@{sequence}", "no", 7) for sequence in range(100)]
    rest, told, failures = rest_of(*refused, Aborted(2, "PlanMismatch", "differ", 7), Lost(3, "it ended"))
    for _ in range(2):
        rest.tell(failures, 0)
    assert told == [
        *((7, sequence, "no") for sequence in range(100)),
        (7, WHOLE_GROUP, "differ"),
        (3, "rank 3 is lost: it ended", True),
    ]
    assert len(rest._heard) == 2
    assert isinstance(rest.failure(7), PlanMismatch)
    assert isinstance(rest.failure(8), PeerLost)


def test_what_another_thread_heard_first_is_told_as_well() -> None:
    rest, told, failures = rest_of(Aborted(1, "UsageError@4", "no", 7))
    assert rest.failure(7) is None
    rest.tell(failures, 0)
    assert told == [(7, 4, "no")]


@pytest.mark.parametrize("sequence", [4, WHOLE_GROUP])
@pytest.mark.parametrize("rank", [0, 1])
def test_who_announces_what_another_rank_found_out_names_that_rank(rank: int, sequence: int) -> None:
    cause, heard = Cause(7, sequence, "UsageError", "no", rank), []
    said: Any = SimpleNamespace(rank=1, abort=lambda kind, text, group: heard.append(Aborted(1, kind, text, group)))
    Rest(said).announce(cause)
    causes: list[Cause] = []
    rest, _, failures = rest_of(*heard)
    failures.told = lambda cause, now_ns: causes.append(cause)
    rest.tell(failures, 0)
    assert causes == [cause]
