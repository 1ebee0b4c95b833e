"""What a job hears of its other ranks from the rendezvous: what is told to the engine, and what is kept."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from detcoll.errors import Closed, PeerLost, PlanMismatch
from detcoll.job.job import Job
from detcoll.job.rest import Rest
from detcoll.rendezvous import Aborted, Lost
from detcoll.runtime.control import WHOLE_GROUP
from detcoll.runtime.group import world


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


def test_an_explanation_is_found_though_another_thread_took_the_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detcoll.job.rest.EXPLANATION_NS", 10**14)
    told = os.eventfd(0, os.EFD_CLOEXEC)
    heard: list[list[Lost]] = [[], [Lost(3, "it ended")]]
    session: Any = SimpleNamespace(events=lambda: heard.pop(0) if heard else [], fileno=lambda: told)
    rest = Rest(session)
    try:
        assert str(rest.explanation(7)) == "rank 3 is lost: it ended"
    finally:
        os.close(told)


def test_an_explanation_is_not_waited_for_once_the_session_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the descriptor may then belong to another file."""
    monkeypatch.setattr("detcoll.job.rest.EXPLANATION_NS", 200_000_000)
    told = os.eventfd(1, os.EFD_CLOEXEC)
    looks: list[int] = []

    def fileno() -> int:
        if len(looks) > 1:
            raise Closed("the rendezvous is closed")
        return told

    session: Any = SimpleNamespace(events=lambda: looks.append(1) or [], fileno=fileno)
    try:
        assert Rest(session).explanation(7) is None
    finally:
        os.close(told)
    assert len(looks) == 2


def test_the_engine_is_told_at_once_what_a_native_collective_was_told() -> None:
    rest, told, failures = rest_of(Lost(0, "silence"))
    loop = SimpleNamespace(engine=SimpleNamespace(failures=failures), post=lambda action: action(0))
    job: Any = SimpleNamespace(rest=rest, _loop=loop)
    rest._session.fileno = lambda: 0  # type: ignore[method-assign]
    assert str(Job._explain_native(job, world([0]))) == "rank 0 is lost: silence"
    assert told == [(0, "rank 0 is lost: silence", True)]
