"""How ranks that share memory meet and part: addresses, deaths, goodbyes, and that nothing stays behind."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import detcoll_shm.bell
import detcoll_shm.endpoint
from detcoll.clock import MonotonicClock
from detcoll.errors import ConnectError, PeerLost, TransportError, UsageError
from detcoll.testing.fabric import LocalMeeting, ThreadFabric, in_threads, pattern
from detcoll.testing.natives import Natives
from detcoll.transport import Ticket, TicketStatus
from detcoll_shm import ShmEndpoint, ShmTransport
from detcoll_shm.layout import Address
from detcoll_shm.stage import ASLEEP, DIGEST
from detcoll_shm.verdict import TRYING

S = 10**9
MIB = 2**20
LATER_NS = 60 * S
"""So late that whoever is not woken misses its deadline."""


@pytest.fixture
def _no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detcoll_shm.bell, "RECHECK_NS", LATER_NS)


def soon_ns() -> int:
    return time.monotonic_ns() + 20 * S


def opened(rank: int, size: int, **options: Any) -> ShmEndpoint:
    return ShmTransport().open(rank, size, LocalMeeting(size).member(rank), MonotonicClock(), options)


def finish(endpoint: ShmEndpoint, *tickets: Ticket) -> None:
    deadline_ns = soon_ns()
    while any(ticket.status is TicketStatus.PENDING for ticket in tickets):
        assert endpoint.poll(deadline_ns) or time.monotonic_ns() < deadline_ns, tickets


def take(endpoint: ShmEndpoint, src: int, tag: int, nbytes: int) -> bytes:
    ticket = endpoint.recv(src, tag, nbytes)
    finish(endpoint, ticket)
    assert ticket.view is not None, ticket
    data = bytes(ticket.view)
    ticket.release()
    return data


def pair(options: Mapping[str, Any]) -> ThreadFabric:
    return ThreadFabric(ShmTransport(), 2, options)


def sides(fabric: ThreadFabric) -> tuple[ShmEndpoint, ShmEndpoint]:
    """The two endpoints, to be driven from this thread in turn."""
    first, second = fabric[0], fabric[1]
    assert isinstance(first, ShmEndpoint)
    assert isinstance(second, ShmEndpoint)
    return first, second


CHILD = """
import sys, time
from detcoll_shm import ShmTransport
class Clock:
    now_ns = staticmethod(time.monotonic_ns)
soon_ns = lambda: time.monotonic_ns() + 20 * 10**9
endpoint = ShmTransport().open(1, int(sys.argv[2]), None, Clock(), {"ring_bytes": 65536})
print(endpoint.address, flush=True)
endpoint.connect({0: sys.stdin.readline().strip()}, soon_ns())
exec(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
"""


class Child:
    """Rank 1 as a process: it connects to rank 0, does ``code``, and waits."""

    def __init__(self, code: str = "", size: int = 2) -> None:
        command = [sys.executable, "-c", CHILD, code, str(size)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self._read()

    def join(self, endpoint: ShmEndpoint) -> None:
        self._write(endpoint.address)
        endpoint.connect({1: self.address}, soon_ns())
        assert self._read() == "ready"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)

    def hears(self) -> str:
        """Return the next line that the child prints."""
        return self._read()

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def leave(self) -> None:
        self._write("")
        assert self._process.wait(30) == 0

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()


@pytest.fixture
def endpoint() -> Iterator[ShmEndpoint]:
    made = opened(0, 2, ring_bytes=65536)
    yield made
    made.abort()


@pytest.mark.usefixtures("_no_recheck")
class TestDeath:
    def test_ends_receives(self, endpoint: ShmEndpoint) -> None:
        with Child() as child:
            child.join(endpoint)
            small, large = endpoint.recv(1, 1, 8), endpoint.recv(1, 2, MIB)
            child.kill()
            finish(endpoint, small, large)
        for ticket in (small, large):
            assert ticket.status is TicketStatus.FAILED
            assert isinstance(ticket.error, PeerLost)
            assert "rank 1 ended" in str(ticket.error)

    def test_ends_collectives(self, endpoint: ShmEndpoint) -> None:
        with Child() as child:
            child.join(endpoint)
            killer = threading.Thread(target=child.kill)
            killer.start()
            with pytest.raises(PeerLost, match="rank 1 ended"):
                Natives(endpoint).barrier(soon_ns())
            killer.join()

    def test_ends_sends(self, endpoint: ShmEndpoint) -> None:
        with Child() as child:
            child.join(endpoint)
            sent = [endpoint.send(1, 1, memoryview(bytes(MIB))) for _ in range(2)]
            child.kill()
            finish(endpoint, *sent)
            assert all(isinstance(ticket.error, PeerLost) for ticket in sent)
            with pytest.raises(PeerLost, match="rank 1"):
                endpoint.send(1, 1, memoryview(b"x"))

    def test_wakes_who_waits_on_the_descriptor(self, endpoint: ShmEndpoint) -> None:
        with Child() as child:
            child.join(endpoint)
            ticket = endpoint.recv(1, 1, 8)
            fd = endpoint.fileno()
            assert fd is not None
            assert endpoint.arm(soon_ns())
            child.kill()
            assert select.select([fd], [], [], 20)[0]
            assert list(endpoint.poll(0)) == [ticket]
            assert endpoint.arm(soon_ns())
            assert not select.select([fd], [], [], 0)[0]

    def test_leaves_what_was_sent_before(self, endpoint: ShmEndpoint) -> None:
        with Child("endpoint.send(0, 1, memoryview(b'early')); endpoint.send(0, 2, memoryview(b'x' * 9000))") as child:
            child.join(endpoint)
            child.kill()
            while endpoint.poll(0):
                pass
            assert take(endpoint, 1, 2, 9000) == b"x" * 9000
            assert take(endpoint, 1, 1, 5) == b"early"
            with pytest.raises(PeerLost, match="rank 1"):
                endpoint.recv(1, 3, 8)

    def test_in_the_middle_of_a_message(self, endpoint: ShmEndpoint) -> None:
        with Child("endpoint.send(0, 1, memoryview(bytes(10**6)))") as child:
            child.join(endpoint)
            ticket = endpoint.recv(1, 1, 10**6)
            assert not endpoint.poll(time.monotonic_ns())
            child.kill()
            finish(endpoint, ticket)
        assert isinstance(ticket.error, PeerLost)
        assert ticket.view is None

    def test_exit_without_goodbye(self, endpoint: ShmEndpoint) -> None:
        with Child() as child:
            child.join(endpoint)
            ticket = endpoint.recv(1, 1, 8)
            child.leave()
            finish(endpoint, ticket)
        assert isinstance(ticket.error, PeerLost)
        assert "without closing" in str(ticket.error)

    def test_goodbye_is_told_apart(self, endpoint: ShmEndpoint) -> None:
        with Child("endpoint.send(0, 1, memoryview(b'x' * 500)); endpoint.close(soon_ns())") as child:
            child.join(endpoint)
            child.leave()
            assert take(endpoint, 1, 1, 500) == b"x" * 500
            while endpoint.poll(0):
                pass
            with pytest.raises(PeerLost, match="rank 1 closed its endpoint"):
                endpoint.recv(1, 1, 8)

    def test_before_connecting(self, endpoint: ShmEndpoint) -> None:
        with Child() as child:
            child.kill()
            with pytest.raises(ConnectError, match="rank 1"):
                endpoint.connect({1: child.address}, soon_ns())

    def test_while_connecting(self, endpoint: ShmEndpoint) -> None:
        with Child() as child:  # waits for an address, so it never joins
            killer = threading.Thread(target=child.kill)
            killer.start()
            with pytest.raises(ConnectError, match="rank 1"):
                endpoint.connect({1: child.address}, soon_ns())
            killer.join()

    def test_frees_the_memory(self, endpoint: ShmEndpoint) -> None:
        before = _shared_files()
        with Child("endpoint.send(0, 1, memoryview(bytes(20000)))") as child:
            child.join(endpoint)
            assert _shared_files() == before
            child.kill()
        assert _shared_files() == before


@pytest.fixture
def three() -> Iterator[tuple[ShmEndpoint, ShmEndpoint, Child]]:
    """Ranks 0 and 2 in this process, and rank 1 as a child that only rank 0 is connected to."""
    here, there = opened(0, 3, ring_bytes=65536), opened(2, 3, ring_bytes=65536)
    with Child(size=3) as child:
        child.join(here)
        in_threads(
            2, lambda i: (here, there)[i].connect({(2, 0)[i]: (there, here)[i].address}, time.monotonic_ns() + 20 * S)
        )
        yield here, there, child
        here.abort()
        there.abort()


@pytest.mark.usefixtures("_no_recheck")
class TestDeathOfOne:
    def test_costs_only_what_was_under_way_with_it(self, three: tuple[ShmEndpoint, ShmEndpoint, Child]) -> None:
        here, there, child = three
        lost = [here.recv(1, 1, 8), here.recv(1, 2, MIB), here.send(1, 1, memoryview(bytes(MIB)))]
        kept = [here.recv(2, 1, 8), here.recv(2, 2, MIB), here.send(2, 1, memoryview(bytes(MIB)))]
        child.kill()
        ended: list[Ticket] = []
        while len(ended) < len(lost):
            ended += here.poll(soon_ns())
        assert set(ended) == set(lost)
        assert all(ticket.status is TicketStatus.FAILED for ticket in lost)
        assert all(isinstance(ticket.error, PeerLost) for ticket in lost)
        assert {ticket.status for ticket in kept} == {TicketStatus.PENDING}
        assert not here.poll(0)
        sent = [there.send(0, 1, memoryview(pattern(1, 8))), there.send(0, 2, memoryview(pattern(2, MIB)))]
        taken = there.recv(0, 1, MIB)
        while any(ticket.status is TicketStatus.PENDING for ticket in (*kept, *sent, taken)):
            here.poll(0)
            there.poll(0)
        assert [bytes(ticket.view or b"") for ticket in kept[:2]] == [pattern(1, 8), pattern(2, MIB)]
        with pytest.raises(PeerLost, match="rank 1"):
            here.send(1, 1, memoryview(b"x"))
        here.send(2, 3, memoryview(b"still"))
        assert take(there, 0, 3, 5) == b"still"

    def test_does_not_hold_a_close_up(self, three: tuple[ShmEndpoint, ShmEndpoint, Child]) -> None:
        here, there, child = three
        sent = here.send(1, 1, memoryview(bytes(MIB)))
        closer = threading.Thread(target=here.close, args=(time.monotonic_ns() + LATER_NS,))
        closer.start()
        child.kill()
        closer.join(20)
        assert not closer.is_alive()
        assert sent.status is TicketStatus.FAILED
        ticket = there.recv(0, 1, 8)
        finish(there, ticket)
        assert str(ticket.error) == "rank 0 closed its endpoint"


AT_ITS_LAST_MOMENT = """
from detcoll.testing.natives import Natives
import os, signal
lockstep = endpoint._begin_collectives()._lockstep
give_up = lockstep._is_done_after_trying
lockstep._is_done_after_trying = lambda reason, is_done: give_up(reason, lambda: os.kill(os.getpid(), signal.SIGKILL))
print("ready", flush=True)
Natives(endpoint).barrier(1)
"""
"""Dies when it has asked whether to give up, and before it says that it does."""

IS_INTERRUPTED = """
from detcoll.testing.natives import Natives
from detcoll.errors import DetcollError
def collect():
    for _ in range(2):
        try:
            Natives(endpoint).barrier(soon_ns())
        except (KeyboardInterrupt, DetcollError) as error:
            print(type(error).__name__, error, flush=True)
print("ready", flush=True)
collect()
"""


class TestOneThatGivesUp:
    def test_and_dies_before_it_says_so(self, endpoint: ShmEndpoint) -> None:
        with Child(AT_ITS_LAST_MOMENT) as child:
            child.join(endpoint)
            words = endpoint._peers[1].stage.words
            while words[DIGEST + 1] != TRYING:
                os.sched_yield()
            with pytest.raises(PeerLost, match="rank 1 ended"):
                Natives(endpoint).barrier(soon_ns())

    def test_since_a_signal_came(self, endpoint: ShmEndpoint) -> None:
        with Child(IS_INTERRUPTED) as child:
            child.join(endpoint)
            words = endpoint._peers[1].stage.words
            while not words[ASLEEP]:
                os.sched_yield()
            child.interrupt()
            assert child.hears() == "KeyboardInterrupt"
            with pytest.raises(TransportError, match="rank 1 was interrupted in barrier number 0"):
                Natives(endpoint).barrier(soon_ns())
            assert child.hears() == "Closed an earlier collective failed: rank 1 was interrupted in barrier number 0"


def _shared_files() -> list[str]:
    """Return our files in shared memory, where other programs that run beside this test have theirs."""
    return sorted(name for name in os.listdir("/dev/shm") if "detcoll" in name)


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("n", [1, 3])
def test_closing_gives_all_descriptors_back(n: int) -> None:
    before = _descriptors()
    with ThreadFabric(ShmTransport(), n):
        assert _descriptors() > before
    assert _descriptors() == before
    assert "detcoll" not in "".join(os.listdir("/dev/shm"))


def test_a_failed_connect_gives_all_descriptors_back() -> None:
    before = _descriptors()
    here, there = opened(0, 3), opened(1, 3)
    with pytest.raises(ConnectError, match=r"ranks \[1\] did not join rank 0"):
        here.connect({0: here.address, 1: there.address}, time.monotonic_ns() + 1000)
    there.close(soon_ns())
    assert _descriptors() == before


def test_lent_views_outlive_the_endpoint() -> None:
    before = _descriptors()
    with pair({}) as fabric:
        here, there = sides(fabric)
        here.send(1, 1, memoryview(pattern(1, 100_000)))
        ticket = there.recv(0, 1, 100_000)
        assert there.counters()["messages_lent"] == 1
    view = ticket.view
    assert view is not None
    assert bytes(view) == pattern(1, 100_000)
    ticket.release()
    del view, ticket
    assert _descriptors() == before


def test_a_large_world_takes_little_memory() -> None:
    endpoint = opened(3, 512)
    address = Address.decode(3, endpoint.address)
    taken = Path(f"/proc/self/fd/{address.memory_fd}").stat()
    assert taken.st_size > 512 * 4 * MIB
    assert taken.st_blocks * 512 < MIB
    endpoint.close(soon_ns())


def _altered(text: str, **changes: Any) -> str:
    address = Address.decode(1, text)
    return Address(**{name: getattr(address, name) for name in address.__struct_fields__} | changes).encode()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"host": "elsewhere"}, "rank 1 is on another host"),
        ({"version": 99}, "version 99"),
        ({"key": "00" * 16}, "is not the memory of rank 1"),
        ({"memory_fd": 10**6}, "cannot be reached"),
        ({"pid": 2**22 - 1}, "process 4194303 of rank 1"),
        ({"ranks": 0}, "expects 0 ranks"),
        ({"pid_namespace": "pid:[1]"}, "rank 1 is in another PID namespace"),
    ],
)
def test_addresses_that_lead_nowhere(changes: dict[str, Any], reason: str) -> None:
    before = _descriptors()
    here, there = opened(0, 2), opened(1, 2)
    with pytest.raises(ConnectError, match=reason):
        here.connect({1: _altered(there.address, **changes)}, soon_ns())
    there.abort()
    assert _descriptors() == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"host": "elsewhere"}, "rank 1 is on another host"),
        ({"key": "00" * 16}, "is not the memory of rank 1"),
        ({"memory_fd": 10**6}, "cannot be reached"),
        ({"bell_fd": 10**6}, "cannot be reached"),
        ({"pid": 2**22 - 1}, "cannot be reached"),
        ({"pid_namespace": "pid:[1]"}, "rank 1 is in another PID namespace"),
    ],
)
def test_who_cannot_share_memory_is_found_by_trying(changes: dict[str, Any], reason: str) -> None:
    before = _descriptors()
    here, there = opened(0, 2), opened(1, 2)
    assert here.apart({1: there.address}) == {}
    found = here.apart({1: _altered(there.address, **changes)})
    assert reason in found[1]
    here.connect({}, soon_ns())  # it is as usable as before
    for endpoint in (here, there):
        endpoint.abort()
    assert _descriptors() == before


def test_an_address_of_another_transport() -> None:
    here = opened(0, 2)
    with pytest.raises(ConnectError, match="tcp://10"):
        here.connect({1: "tcp://10.0.0.1:99"}, soon_ns())


def test_memory_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = opened(0, 2), opened(1, 2)

    def refuse(path: str, *_: object) -> int:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ConnectError, match=r"not permitted.*one user"):
            here.connect({1: there.address}, soon_ns())
    there.abort()


def test_joins_some_of_the_ranks() -> None:
    made = [opened(rank, 5) for rank in (1, 3)]
    addresses = {rank: endpoint.address for rank, endpoint in zip((1, 3), made, strict=True)}
    in_threads(2, lambda i: made[i].connect(addresses, soon_ns()))
    made[0].send(3, 1, memoryview(b"there"))
    assert take(made[1], 1, 1, 5) == b"there"
    with pytest.raises(UsageError, match="dst=2"):
        made[0].send(2, 1, memoryview(b"x"))
    for endpoint in made:
        endpoint.close(soon_ns())
