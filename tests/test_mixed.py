"""Calls that are native on one rank and planned or refused on another, by the rules of the engine, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from detcoll.errors import DeadlineMissed, PlanMismatch, UsageError
from detcoll.runtime import mixed
from detcoll.runtime.control import WHOLE_GROUP, Cause, Message
from detcoll.testing.fleet import Called, Fleet, Host

SOON_NS = mixed.SILENCE_NS + mixed.DOUBT_NS + 50_000_000


@dataclass
class Natives:
    """What a transport has begun on one rank."""

    latest: int = -1
    unfinished: tuple[int, str] | None = None

    def called(self, sequence: int) -> str:
        return f"native {sequence}"


class StoppingFleet(Fleet):
    """Ranks over a transport that loses the messages which say that a group has ended, as one that is stopped may."""

    def _tell(self, host: Host, peer: int, message: Message) -> None:
        if not (isinstance(message, Cause) and message.sequence == WHOLE_GROUP):
            super()._tell(host, peer, message)


def fleet_of(ranks_of_sites: int | list[int], make: Callable[..., Fleet] = Fleet) -> tuple[Fleet, list[Natives]]:
    """Return engines that know of native calls, and those of each rank."""
    fleet = make(ranks_of_sites)
    natives = [Natives() for _ in fleet.hosts]
    for rank, of in enumerate(natives):
        fleet.engine(rank).attach(fleet.world, of)
    return fleet, natives


def planned(fleet: Fleet, ranks: set[int], *, at_ns: int = 0) -> list[Called]:
    return [fleet.call(rank, "all_reduce", np.ones(10), at_ns=at_ns) for rank in sorted(ranks)]


@pytest.mark.parametrize("ranks_of_sites", [4, [2, 2], [1, 1, 2]])
@pytest.mark.parametrize("of_natives", [{0}, {3}, {1, 2}, {0, 1, 2}], ids=str)
def test_all_ranks_end_soon(ranks_of_sites: int | list[int], of_natives: set[int]) -> None:
    fleet, natives = fleet_of(ranks_of_sites)
    for rank in of_natives:
        natives[rank].latest = 0
    calls = planned(fleet, set(range(4)) - of_natives)
    fleet.run(SOON_NS)
    assert all(isinstance(call.error, PlanMismatch) for call in calls)
    assert all(len(host.stopped) == 1 for host in fleet.hosts)
    assert all("called native 0, which its transport does" in str(call.error) for call in calls)


def test_a_native_call_that_has_ended_already_is_found_too() -> None:
    fleet, natives = fleet_of(2)
    natives[0].latest = 3
    (call,) = planned(fleet, {1})
    fleet.run(SOON_NS)
    assert isinstance(call.error, PlanMismatch)


def test_who_is_late_is_no_mismatch() -> None:
    """Rank 0 is in earlier native calls, or has begun later ones before its progress thread has taken its plan in."""
    fleet, natives = fleet_of(3)
    natives[0].latest = -1
    calls = planned(fleet, {1, 2})
    fleet.run(10**9)
    natives[0].latest = 5
    calls += planned(fleet, {0}, at_ns=fleet.now_ns + mixed.DOUBT_NS // 2)
    fleet.run(3 * 10**9)
    assert all(call.ended and call.error is None for call in calls)
    assert not any(host.stopped for host in fleet.hosts)


@pytest.mark.parametrize("timeout_s", [1.0, 10.0])
def test_who_is_still_in_an_earlier_native_call_is_not_said_to_be_missing(timeout_s: float) -> None:
    """All ranks wait, so nobody is blamed; who gives up tells what it knows of the others."""
    fleet, natives = fleet_of(2)
    fleet.hosts[0].sequences[fleet.world.id] = 5
    natives[0].latest = natives[1].latest = 4
    natives[1].unfinished = 4, "is still in call 4, barrier"
    call = fleet.call(0, "all_reduce", np.ones(10), timeout_s=timeout_s)
    fleet.run(30 * 10**9)
    assert isinstance(call.error, DeadlineMissed)
    assert "rank 1 (1 message; it is still in call 4, barrier)" in str(call.error)


def test_native_calls_count_among_those_that_a_rank_has_made() -> None:
    fleet, natives = fleet_of(2)
    fleet.hosts[0].sequences[fleet.world.id] = 5
    natives[0].latest = natives[1].latest = 4
    call = fleet.call(0, "all_reduce", np.ones(10), timeout_s=1.0)
    fleet.run(30 * 10**9)
    assert "which has not called it; the latest call that it made of this group is number 4" in str(call.error)


@pytest.mark.parametrize("make", [Fleet, partial(StoppingFleet, rendezvous=True)], ids=["told", "announced"])
def test_who_is_in_a_native_call_that_another_rank_refuses_ends_its_group(make: Callable[..., Fleet]) -> None:
    fleet, natives = fleet_of(3, make)
    natives[0].latest = 0
    fleet.refuse(1, UsageError("no such op"))
    fleet.run(SOON_NS)
    for host in fleet.hosts:
        ((_, error),) = host.stopped
        assert isinstance(error, UsageError)
        assert str(error) == "rank 1 refused the call: no such op"


def test_who_comes_to_a_refused_call_later_goes_on() -> None:
    fleet, natives = fleet_of(3)
    refused = fleet.engine(0).failures._groups[fleet.world.id].refused
    fleet.refuse(1, UsageError("no such op"))
    fleet.run(SOON_NS)
    assert str(refused[0].error()) == "rank 1 refused the call: no such op"
    for rank in (0, 2):  # as their runners do, which find it there
        natives[rank].latest = 0
        fleet.refuse(rank, refused[0].error())
    calls = planned(fleet, {0, 1, 2})
    fleet.run(2 * 10**9)
    assert all(call.ended and call.error is None for call in calls)
    assert not any(host.stopped for host in fleet.hosts)
