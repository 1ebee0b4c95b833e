"""Messages through shared memory: random traffic, lent views, what is bounded, and who is woken when."""

from __future__ import annotations

import random
import select
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

import detcoll_shm.bell
from detcoll.errors import PeerLost
from detcoll.testing.fabric import Here, ThreadFabric, pattern
from detcoll.testing.worlds import ProcessFabric, Worlds
from detcoll.transport import Ticket, TicketStatus
from detcoll_shm import ShmEndpoint, ShmTransport
from detcoll_shm.layout import (
    INLINE_BYTES,
)

S = 10**9
MIB = 2**20
TINY = {"ring_bytes": 4096, "slots": 4, "fragment_bytes": 320, "spin_ns": 0}
SMALL = {"ring_bytes": "64 KiB", "slots": 64, "spin_ns": 0}
LATER_NS = 60 * S
"""So late that whoever is not woken misses its deadline."""


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    made = Worlds()
    yield made
    made.end()


@pytest.fixture
def _no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detcoll_shm.bell, "RECHECK_NS", LATER_NS)


def soon_ns() -> int:
    return time.monotonic_ns() + 20 * S


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


def _message_sizes(seed: int, src: int, dst: int, count: int, largest: int) -> list[tuple[int, int]]:
    """Tag and size of each message from ``src`` to ``dst``, in the order of sending."""
    chance = random.Random(f"{seed} {src} {dst}")
    edges = [0, 1, INLINE_BYTES, INLINE_BYTES + 1, 1024, 1025, 4096]
    return [
        (chance.randrange(4), chance.choice([chance.choice(edges), chance.randrange(2000), chance.randrange(largest)]))
        for _ in range(count)
    ]


class Traffic:
    """One rank's part of a random exchange between all pairs."""

    def __init__(self, here: Here, seed: int, count: int, largest: int) -> None:
        self.here = here
        self.chance = random.Random(f"{seed} {here.rank}")
        self.outgoing = {dst: _message_sizes(seed, here.rank, dst, count, largest) for dst in here.others}
        self.incoming = {src: _message_sizes(seed, src, here.rank, count, largest) for src in here.others}
        self.to_send = deque((dst, i) for i in range(count) for dst in here.others)
        self.to_receive: defaultdict[tuple[int, int], deque[int]] = defaultdict(deque)
        for src, messages in self.incoming.items():
            for i, (tag, _) in enumerate(messages):
                self.to_receive[src, tag].append(i)
        self.sends: list[Ticket] = []
        self.pending: dict[Ticket, tuple[int, int, bytearray | None]] = {}
        self.held: list[tuple[Ticket, bytes]] = []

    @property
    def is_posted(self) -> bool:
        return not self.to_send and not any(self.to_receive.values())

    @property
    def is_over(self) -> bool:
        return not self.pending and all(ticket.status is TicketStatus.DONE for ticket in self.sends)

    def send(self) -> None:
        if self.to_send:
            dst, i = self.to_send.popleft()
            tag, nbytes = self.outgoing[dst][i]
            self.sends.append(self.here.send(dst, tag, pattern(self.here.rank * 1000 + i, nbytes)))

    def receive(self) -> None:
        keys = [key for key, waiting in self.to_receive.items() if waiting]
        if keys:
            src, tag = key = self.chance.choice(keys)
            i = self.to_receive[key].popleft()
            nbytes = self.incoming[src][i][1]
            into = bytearray(nbytes) if self.chance.random() < 0.5 else None
            ticket = self.here.endpoint.recv(src, tag, nbytes, None if into is None else memoryview(into))
            self.pending[ticket] = (src, i, into)

    def collect(self, deadline_ns: int | None = None) -> None:
        if deadline_ns is None:
            deadline_ns = self.here.clock.now_ns() + self.chance.choice([0, 50_000])
        for ticket in self.here.endpoint.poll(deadline_ns):
            assert ticket.status is TicketStatus.DONE, ticket
            if ticket in self.pending:
                src, i, into = self.pending.pop(ticket)
                expected = pattern(src * 1000 + i, self.incoming[src][i][1])
                assert bytes(ticket.view or into or b"") == expected, f"message {i} from {src}"
                self.held.append((ticket, expected))

    def release(self) -> None:
        if self.held:
            ticket, expected = self.held.pop(self.chance.randrange(len(self.held)))
            assert ticket.view is None or bytes(ticket.view) == expected
            ticket.release()


def random_traffic(here: Here, seed: int, count: int, largest: int) -> None:
    """All pairs exchange messages; sends, receives and releases happen in a random order on every rank."""
    detcoll_shm.bell.RECHECK_NS = LATER_NS
    traffic = Traffic(here, seed, count, largest)
    steps: list[Callable[[], None]] = [traffic.send, traffic.receive, traffic.release, traffic.collect]
    while not traffic.is_posted:
        traffic.chance.choice(steps)()
    deadline_ns = here.deadline_ns()
    while not traffic.is_over:
        assert here.clock.now_ns() < deadline_ns, f"rank {here.rank}: {list(traffic.pending)}"
        traffic.collect(deadline_ns)
    while traffic.held:
        traffic.release()


def chain(here: Here, seed: int, rounds: int, largest: int) -> None:
    """Each rank waits for the one before it and then sends to the one after, so a lost wake-up stops all."""
    detcoll_shm.bell.RECHECK_NS = LATER_NS
    chance = random.Random(seed)
    after, before = (here.rank + 1) % here.size, (here.rank - 1) % here.size
    for round_ in range(rounds):
        nbytes = chance.choice([0, 8, 500, chance.randrange(largest)])
        sent = here.send(after, round_, pattern(round_, nbytes)) if here.rank == 0 else None
        assert here.take(before, round_, nbytes) == pattern(round_, nbytes)
        here.finish(sent or here.send(after, round_, pattern(round_, nbytes)))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("options", "largest"), [(TINY, 6000), (SMALL, 100_000)], ids=["tiny", "small"])
@pytest.mark.usefixtures("_no_recheck")
def test_random_traffic_of_threads(n: int, options: Mapping[str, Any], largest: int) -> None:
    with ThreadFabric(ShmTransport(), n, options) as fabric:
        fabric.run(random_traffic, seed=n, count=120 // n, largest=largest)


@pytest.mark.parametrize("n", [2, 4, 7])
@pytest.mark.parametrize(("options", "largest"), [(TINY, 6000), (SMALL, 100_000)], ids=["tiny", "small"])
def test_random_traffic_of_processes(worlds: Worlds, n: int, options: Mapping[str, Any], largest: int) -> None:
    with ProcessFabric(worlds.of(n), "detcoll_shm:ShmTransport", options) as fabric:
        fabric.run(random_traffic, seed=100 + n, count=300 // n, largest=largest)


@pytest.mark.parametrize("n", [2, 4, 7])
@pytest.mark.parametrize("spin_ns", [0, 20_000])
def test_chain_of_processes(worlds: Worlds, n: int, spin_ns: int) -> None:
    with ProcessFabric(worlds.of(n), "detcoll_shm:ShmTransport", TINY | {"spin_ns": spin_ns}) as fabric:
        fabric.run(chain, seed=n, rounds=100, largest=9000)


@pytest.mark.parametrize("nbytes", [64 * 2**10, 256 * 2**10, MIB])
def test_folding_from_the_ring_copies_nothing(nbytes: int) -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        total = np.zeros(nbytes, np.uint8)
        for i in range(20):  # round the ring several times
            ticket = there.recv(0, i, nbytes)
            sent = here.send(1, i, memoryview(pattern(i, nbytes)))
            assert sent.status is TicketStatus.DONE
            finish(there, ticket)
            assert ticket.view is not None
            total += np.frombuffer(ticket.view, np.uint8)
            ticket.release()
        sent_bytes = np.stack([np.frombuffer(pattern(i, nbytes), np.uint8) for i in range(20)])
        np.testing.assert_array_equal(total, sent_bytes.sum(axis=0, dtype=np.uint8))
        assert there.counters()["messages_lent"] == 20
        assert there.counters()["bytes_lent"] == 20 * nbytes
        assert here.counters()["waits_for_room"] == 0


def test_lent_views_stay_while_the_ring_goes_round() -> None:
    nbytes, count = 1000, 200
    with pair({"ring_bytes": 8192, "slots": 8}) as fabric:
        here, there = sides(fabric)
        kept: list[tuple[int, Ticket]] = []
        for i in range(count):
            ticket = there.recv(0, i, nbytes)
            here.send(1, i, memoryview(pattern(i, nbytes)))
            finish(there, ticket)
            here.poll(0)
            if i in (0, 20, 21, 100):
                kept.append((i, ticket))
            else:
                ticket.release()
            for j, held in kept:
                assert held.view is not None
                assert bytes(held.view) == pattern(j, nbytes), f"message {j} after {i}"
        assert there.counters()["messages_lent"] > count / 2


def test_held_views_do_not_stop_the_peer() -> None:
    """The receiver keeps all views of much more than a ring holds; what cannot be lent is copied."""
    nbytes, count = 1024, 64
    with pair({"ring_bytes": 4096, "slots": 4}) as fabric:
        here, there = sides(fabric)
        sent = [here.send(1, 1, memoryview(pattern(i, nbytes))) for i in range(count)]
        received = [there.recv(0, 1, nbytes) for _ in range(count)]
        alternate(here, there, *sent, *received)
        assert [bytes(ticket.view or b"") for ticket in received] == [pattern(i, nbytes) for i in range(count)]
        assert 0 < there.counters()["messages_lent"] < count
        for ticket in received:
            ticket.release()


def alternate(here: ShmEndpoint, there: ShmEndpoint, *tickets: Ticket, steps: int = 1000) -> None:
    """Poll both in turn until all ``tickets`` are DONE, or for so many steps."""
    for _ in range(steps):
        if tickets and all(ticket.status is TicketStatus.DONE for ticket in tickets):
            return
        here.poll(0)
        there.poll(0)
    assert not tickets, tickets


@pytest.mark.parametrize("nbytes", [8, 1000])
def test_unexpected_messages_are_bounded(nbytes: int) -> None:
    with pair({"ring_bytes": 4096, "slots": 4, "unexpected_bytes": 3 * (nbytes + 512)}) as fabric:
        here, there = sides(fabric)
        for _ in range(2):
            kept = there.counters()["messages_kept"]
            sent = [here.send(1, 1, memoryview(pattern(i, nbytes))) for i in range(20)]
            last = here.send(1, 2, memoryview(b"last"))
            wanted = there.recv(0, 2, 4)
            alternate(here, there, steps=50)
            assert wanted.status is TicketStatus.PENDING
            assert there.counters()["messages_kept"] == kept + 3
            assert sum(ticket.status is TicketStatus.DONE for ticket in sent) < 12
            for i in range(20):
                ticket = there.recv(0, 1, nbytes)
                alternate(here, there, ticket)
                assert bytes(ticket.view or b"") == pattern(i, nbytes)
                ticket.release()
            alternate(here, there, wanted, last)


def test_what_the_bound_held_back_outlives_its_sender() -> None:
    with pair({"ring_bytes": 4096, "unexpected_bytes": 0}) as fabric:
        here, there = sides(fabric)
        early = there.recv(0, 9, 4)
        here.send(1, 1, memoryview(b"one"))
        here.send(1, 9, memoryview(b"nine"))
        here.close(soon_ns())
        alternate(there, there, steps=5)
        assert early.status is TicketStatus.PENDING
        assert take(there, 0, 1, 3) == b"one"
        finish(there, early)
        assert bytes(early.view or b"") == b"nine"


def test_nothing_is_kept_while_no_receive_waits() -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        for i in range(20):
            here.send(1, i, memoryview(bytes(i)))
        assert take(there, 0, 0, 0) == b""
        assert there.counters()["messages_kept"] == 0
        assert take(there, 0, 5, 5) == bytes(5)
        assert there.counters()["messages_kept"] == 4


def test_room_is_wanted_only_while_a_send_waits() -> None:
    with pair({"ring_bytes": 65536}) as fabric:
        here, there = sides(fabric)
        sent = [here.send(1, 1, memoryview(bytes(10_000))) for _ in range(10)]
        for _ in sent:
            ticket = there.recv(0, 1, 10_000)
            alternate(here, there, ticket)
            ticket.release()
        alternate(here, there, *sent)
        assert here.counters()["waits_for_room"] == 1
        here.send(1, 2, memoryview(bytes(10_000)))
        there.recv(0, 3, 1)
        alternate(here, there, steps=5)
        assert there.counters()["messages_kept"] == 0


def test_a_send_that_has_begun_is_not_cancelled() -> None:
    with pair({"ring_bytes": 4096}) as fabric:
        here, there = sides(fabric)
        sent = here.send(1, 1, memoryview(pattern(1, 20_000)))
        assert not here.cancel(sent)
        ticket = there.recv(0, 1, 20_000)
        assert not there.cancel(ticket)
        alternate(here, there, sent, ticket)
        assert bytes(ticket.view or b"") == pattern(1, 20_000)


@pytest.mark.parametrize("leave", ["close", "abort"])
@pytest.mark.usefixtures("_no_recheck")
def test_leaving_wakes_the_others(leave: str) -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        ticket = here.recv(1, 1, 8)
        fd = here.fileno()
        assert fd is not None
        assert here.arm(soon_ns())
        there.close(soon_ns()) if leave == "close" else there.abort()
        assert select.select([fd], [], [], 20)[0]
        assert list(here.poll(0)) == [ticket]
        assert isinstance(ticket.error, PeerLost)
        assert leave in str(ticket.error)


def test_unwanted_messages_stay_with_the_sender() -> None:
    with pair({"ring_bytes": 4096}) as fabric:
        here, there = sides(fabric)
        sent = [here.send(1, 1, memoryview(bytes(1000))) for _ in range(20)]
        alternate(here, there, steps=20)
        assert there.counters()["messages_kept"] == 0
        assert sent[-1].status is TicketStatus.PENDING
        assert here.cancel(sent[-1])
        for _ in range(19):
            ticket = there.recv(0, 1, 1000)
            alternate(here, there, ticket)
            ticket.release()
        late = there.recv(0, 1, 1000)
        alternate(here, there, steps=5)
        assert late.status is TicketStatus.PENDING


def test_rings_no_bell_unless_the_peer_sleeps() -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        before = here.counters()["bells_rung"]
        for _ in range(10):
            here.send(1, 1, memoryview(b"x" * 1000))
        assert here.counters()["bells_rung"] == before
        fd = there.fileno()
        assert fd is not None
        assert there.arm(soon_ns())
        here.send(1, 1, memoryview(b"x" * 1000))
        here.send(1, 1, memoryview(b"x" * 1000))
        assert here.counters()["bells_rung"] == before + 1
        assert select.select([fd], [], [], 0)[0]


@pytest.mark.parametrize("nbytes", [8, 1000, 40_000])
def test_tags_keep_all_their_bits(nbytes: int) -> None:
    tags = [5, *(5 + 2**bits for bits in range(31, 64)), 2**64 - 1]
    with pair({}) as fabric:
        here, there = sides(fabric)
        for index, tag in enumerate(tags):
            here.send(1, tag, memoryview(pattern(index, nbytes)))
        for index, tag in reversed(list(enumerate(tags))):
            assert take(there, 0, tag, nbytes) == pattern(index, nbytes)
