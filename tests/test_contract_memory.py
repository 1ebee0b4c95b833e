"""The in-memory fabric keeps the transport contract, driven by threads and from one thread."""

from __future__ import annotations

import threading
import time

import pytest

from detcoll.errors import ConnectError, TransportUnavailable, UsageError
from detcoll.testing import LocalMeeting, MemoryTransport, MonotonicClock, ThreadFabric, TransportContract, pattern
from detcoll.transport import TicketStatus


class TestMemory(TransportContract):
    capabilities = MemoryTransport.capabilities
    clogged_bytes = 2**20

    def fabric(self, n: int) -> ThreadFabric:
        return ThreadFabric(MemoryTransport(), n)

    def clogged_fabric(self) -> ThreadFabric:
        return ThreadFabric(MemoryTransport(), 2, {"capacity_bytes": 0})


class TestTimedMemory(TestMemory):
    capabilities = MemoryTransport(timed=True).capabilities

    def fabric(self, n: int) -> ThreadFabric:
        return ThreadFabric(MemoryTransport(timed=True), n)


def test_one_thread_drives_all_ranks() -> None:
    with ThreadFabric(MemoryTransport(), 4) as fabric:
        tickets = {}
        for rank in range(4):
            tickets[rank] = fabric[rank].recv((rank - 1) % 4, 1, 100)
            fabric[rank].send((rank + 1) % 4, 1, memoryview(pattern(rank, 100)))
        for rank in range(4):
            assert len(fabric[rank].poll(time.monotonic_ns())) == 2
            assert bytes(tickets[rank].view) == pattern((rank - 1) % 4, 100)


def test_released_view_is_spoilt() -> None:
    with ThreadFabric(MemoryTransport(), 2) as fabric:
        fabric[0].send(1, 1, memoryview(b"abc"))
        ticket = fabric[1].recv(0, 1, 3)
        late_reader = ticket.view
        assert late_reader == b"abc"
        ticket.release()
        assert late_reader == b"\xdd" * 3


def test_capacity_bounds_what_is_held() -> None:
    with ThreadFabric(MemoryTransport(), 2, {"capacity_bytes": 100}) as fabric:
        sends = [fabric[0].send(1, tag, memoryview(bytes(40))) for tag in range(4)]
        assert [ticket.status is TicketStatus.DONE for ticket in sends] == [True, True, False, False]
        fabric[1].recv(0, 0, 40)
        assert [ticket.status is TicketStatus.DONE for ticket in sends] == [True, True, True, False]
        fabric[1].recv(0, 3, 40)
        assert all(ticket.status is TicketStatus.DONE for ticket in sends)


def test_discarded_messages_give_their_room_back() -> None:
    with ThreadFabric(MemoryTransport(), 2, {"capacity_bytes": 100}) as fabric:
        sends = [fabric[0].send(1, tag, memoryview(bytes(40))) for tag in (256, 257, 258, 5)]
        assert [ticket.status is TicketStatus.DONE for ticket in sends] == [True, True, False, False]
        fabric[1].discard(256, 8)
        assert all(ticket.status is TicketStatus.DONE for ticket in sends)
        sends = [fabric[0].send(1, tag, memoryview(bytes(40))) for tag in (300, 5, 6)]
        assert [ticket.status is TicketStatus.DONE for ticket in sends] == [True, True, False]


def test_unknown_option() -> None:
    with pytest.raises(UsageError, match="capcity"), ThreadFabric(MemoryTransport(), 1, {"capcity": 1}):
        pass


def test_another_process_is_refused() -> None:
    class Elsewhere:
        host = "127.0.0.1"

        def exchange(self, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
            return [b"made-in-another-process", payload]

    with pytest.raises(TransportUnavailable):
        MemoryTransport().open(1, 2, Elsewhere(), MonotonicClock(), {})


def test_a_failing_program_fails_the_run_with_its_own_error() -> None:
    def program(here):
        if here.rank == 1:
            raise ValueError("the cause")
        here.meet()

    with ThreadFabric(MemoryTransport(), 3) as fabric, pytest.raises(ValueError, match="the cause"):
        fabric.run(program)


def test_meeting_names_those_who_did_not_come() -> None:
    meeting = LocalMeeting(3)
    with pytest.raises(ConnectError, match=r"\[1, 2\]"):
        meeting.member(0).exchange("x", b"", time.monotonic_ns())


def test_nothing_is_left_behind() -> None:
    before = threading.active_count()
    with ThreadFabric(MemoryTransport(), 3):
        pass
    assert threading.active_count() <= before
