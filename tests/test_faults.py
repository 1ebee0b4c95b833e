"""Fault rules happen where they say, the same in every run, and a faulty endpoint is an ordinary endpoint."""

from __future__ import annotations

import pytest

from detcoll.errors import Closed, PeerLost, UsageError
from detcoll.testing import (
    Delay,
    Drop,
    Faults,
    FaultyTransport,
    Kill,
    MemoryTransport,
    Pass,
    ThreadFabric,
    TransportContract,
    pattern,
)
from detcoll.transport import TicketStatus


class TestFaultyMemory(TransportContract):
    """Delays may happen to any message and break no promise."""

    transport = FaultyTransport(MemoryTransport(), Faults(seed=3, delay=0.3))
    capabilities = transport.capabilities

    def fabric(self, n: int) -> ThreadFabric:
        return ThreadFabric(self.transport, n)

    def clogged_fabric(self) -> ThreadFabric:
        return ThreadFabric(self.transport, 2, {"capacity_bytes": 0})


class StillClock:
    def __init__(self) -> None:
        self.time_ns = 0

    def now_ns(self) -> int:
        return self.time_ns


def faulty(rules, clock) -> ThreadFabric:
    return ThreadFabric(FaultyTransport(MemoryTransport(), Faults(rules)), 2, clock=clock)


def send_three(endpoint, tag=1):
    return [endpoint.send(1, tag, memoryview(pattern(index, 10))) for index in range(3)]


def test_rules_come_before_chance() -> None:
    faults = Faults({(0, 1): Pass(), (1, 0): Kill()}, drop=1.0)
    assert [faults.at(0, 0), faults.at(0, 1), faults.at(1, 0)] == [Drop(), Pass(), Kill()]


def test_chance_is_fixed_by_the_seed() -> None:
    def drawn(seed: int) -> list[object]:
        faults = Faults(seed=seed, delay=0.3, drop=0.2, kill=0.1)
        return [faults.at(rank, step) for rank in range(4) for step in range(100)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    kinds = [type(fault) for fault in drawn(1)]
    assert 80 < kinds.count(Delay) < 160
    assert 50 < kinds.count(Drop) < 110
    assert 20 < kinds.count(Kill) < 60


def test_chances_are_checked() -> None:
    with pytest.raises(UsageError, match="at most 1"):
        Faults(drop=0.7, kill=0.4)


def test_dropped_message_never_arrives() -> None:
    clock = StillClock()
    with faulty({(0, 1): Drop()}, clock) as fabric:
        tickets = send_three(fabric[0])
        assert {ticket.status for ticket in tickets} == {TicketStatus.DONE}
        assert set(fabric[0].poll(0)) == set(tickets)
        received = [fabric[1].recv(0, 1, 10) for _ in range(3)]
        assert [bytes(ticket.view) for ticket in received[:2]] == [pattern(0, 10), pattern(2, 10)]
        assert received[2].status is TicketStatus.PENDING
        assert fabric[0].counters()["fault_drops"] == 1


def test_delayed_message_holds_back_those_behind_it() -> None:
    clock = StillClock()
    with faulty({(0, 0): Delay(1000)}, clock) as fabric:
        tickets = send_three(fabric[0])
        aside = fabric[0].send(1, 2, memoryview(b"aside"))
        assert fabric[0].poll(0) == [aside]
        clock.time_ns = 999
        assert not fabric[0].poll(0)
        clock.time_ns = 1000
        assert fabric[0].poll(0) == tickets
        assert [bytes(fabric[1].recv(0, 1, 10).view) for _ in range(3)] == [pattern(index, 10) for index in range(3)]


def test_delayed_message_can_be_cancelled() -> None:
    clock = StillClock()
    with faulty({(0, 0): Delay(1000)}, clock) as fabric:
        first, *others = send_three(fabric[0])
        assert fabric[0].cancel(first)
        clock.time_ns = 1000
        assert fabric[0].poll(0) == others
        assert bytes(fabric[1].recv(0, 1, 10).view) == pattern(1, 10)


def test_killed_endpoint_is_lost_to_others() -> None:
    clock = StillClock()
    with faulty({(0, 1): Kill()}, clock) as fabric:
        waiting = fabric[1].recv(0, 9, 10)
        fabric[0].send(1, 1, memoryview(b"x"))
        with pytest.raises(Closed, match="killed rank 0 at step 1"):
            fabric[0].send(1, 1, memoryview(b"y"))
        with pytest.raises(Closed):
            fabric[0].send(1, 1, memoryview(b"z"))
        assert fabric[1].poll(0) == [waiting]
        assert isinstance(waiting.error, PeerLost)
