"""Collectives of shared memory on one thread, messages of the same endpoint on another, and endings from a third."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import detcoll_shm.bell
from detcoll.errors import Closed, PeerLost
from detcoll.testing.fabric import Here, ThreadFabric, in_threads, pattern
from detcoll.testing.natives import Natives
from detcoll.testing.worlds import ProcessFabric, Worlds
from detcoll.transport import TicketStatus
from detcoll.types import ReduceOp
from detcoll_shm import ShmEndpoint, ShmTransport
from detcoll_shm.stage import ASLEEP

LATER_NS = 60 * 10**9
"""So late that whoever is not woken misses its deadline."""

TINY = {"ring_bytes": 4096, "slots": 4, "fragment_bytes": 320, "spin_ns": 0, "wait_ns": 0, "chunk_bytes": 64}


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    made = Worlds()
    yield made
    made.end()


def of(here: Here) -> ShmEndpoint:
    assert isinstance(here.endpoint, ShmEndpoint)
    return here.endpoint


def natives(here: Here, rounds: int) -> None:
    """Collectives of all kinds, with values that tell the round."""
    endpoint, total = of(here), sum(range(here.size))
    for round_ in range(rounds):
        array = np.full(1 + 37 * (round_ % 9), 10 * round_ + here.rank, np.int64)
        Natives(endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())
        assert (array == 10 * round_ * here.size + total).all(), f"round {round_}"
        root = round_ % here.size
        array[:] = round_ if here.rank == root else -1
        Natives(endpoint).broadcast(array, root, here.deadline_ns())
        assert (array == round_).all(), f"round {round_}"
        Natives(endpoint).barrier(here.deadline_ns())


def messages(here: Here, rounds: int) -> None:
    """Each rank sends to all and receives from all, by `poll` and by `arm` in turn."""
    fd = here.endpoint.fileno()
    assert fd is not None
    for round_ in range(rounds):
        nbytes = (8, 300, 3000)[round_ % 3]
        received = {peer: here.endpoint.recv(peer, round_, nbytes) for peer in here.others}
        sent = [here.send(peer, round_, pattern(round_ + here.rank, nbytes)) for peer in here.others]
        tickets, deadline_ns = [*received.values(), *sent], here.deadline_ns()
        while any(ticket.status is TicketStatus.PENDING for ticket in tickets):
            if round_ % 2 and here.endpoint.arm(deadline_ns):
                assert select.select([fd], [], [], (deadline_ns - time.monotonic_ns()) / 1e9)[0], f"round {round_}"
            assert here.endpoint.poll(0 if round_ % 2 else deadline_ns) or time.monotonic_ns() < deadline_ns
        for peer, ticket in received.items():
            assert ticket.view is not None
            assert bytes(ticket.view) == pattern(round_ + peer, nbytes), f"round {round_} from {peer}"
            ticket.release()


def both(here: Here, rounds: int) -> None:
    """Nothing is looked at again unless it was rung for, so a ring that the other thread took would be missed."""
    detcoll_shm.bell.RECHECK_NS = LATER_NS
    in_threads(2, lambda index: (natives, messages)[index](here, rounds))


@pytest.mark.parametrize("options", [{}, TINY], ids=["usual", "tiny"])
def test_collectives_and_messages_run_beside_each_other(options: dict[str, int], worlds: Worlds) -> None:
    with ProcessFabric(worlds.of(3), "detcoll_shm:ShmTransport", options) as fabric:
        fabric.run(both, rounds=300)


def until(is_true: Callable[[], bool]) -> None:
    """Wait for what another thread does, which has no event to tell by."""
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        os.sched_yield()


def ends(here: Here, how: str) -> None:
    """Rank 0 ends its endpoint while one of its threads waits in a collective and another one for a message."""
    endpoint = of(here)
    if here.rank == 1:
        here.meet()
        with pytest.raises(PeerLost, match=r"rank 0 (left during barrier number 0|closed its endpoint|aborted)"):
            Natives(endpoint).barrier(here.deadline_ns() + LATER_NS)
        return
    words = endpoint._begin_collectives()._lockstep.stage.words
    ticket = endpoint.recv(1, 1, 8)

    def wait(index: int) -> None:
        deadline_ns = time.monotonic_ns() + LATER_NS
        if index == 2:
            until(lambda: words[ASLEEP] == 1 and endpoint._asleep)
            endpoint.abort() if how == "abort" else endpoint.close(deadline_ns)
            return
        with pytest.raises(Closed):
            Natives(endpoint).barrier(deadline_ns) if index else endpoint.poll(deadline_ns)

    in_threads(3, wait)
    assert ticket.status is TicketStatus.CANCELLED
    here.meet()


@pytest.mark.parametrize("how", ["abort", "close"])
def test_an_ending_from_another_thread_ends_both(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detcoll_shm.bell, "RECHECK_NS", LATER_NS)
    with ThreadFabric(ShmTransport(), 2) as fabric:
        fabric.run(ends, how=how)


def test_an_abort_cuts_a_close_on_another_thread_short() -> None:
    """The close waits for a peer that takes nothing."""
    with ThreadFabric(ShmTransport(), 2, {"ring_bytes": 4096}) as fabric:
        here = fabric[0]
        assert isinstance(here, ShmEndpoint)
        sent = here.send(1, 1, memoryview(bytes(100_000)))
        closer = threading.Thread(target=here.close, args=(time.monotonic_ns() + LATER_NS,))
        closer.start()
        until(lambda: here._asleep)
        here.abort()
        closer.join(30)
        assert not closer.is_alive()
        assert sent.status is TicketStatus.CANCELLED


def test_collectives_take_no_ring_that_is_meant_for_messages() -> None:
    """A waiter on the descriptor is woken though a collective of the same endpoint hears its own bell meanwhile."""

    def program(here: Here) -> Any:
        endpoint = of(here)
        Natives(endpoint).barrier(here.deadline_ns())
        if here.rank:
            here.meet()
            sent = here.send(0, 1, b"x")
            here.finish(sent)
            Natives(endpoint).barrier(here.deadline_ns())
            return
        ticket = endpoint.recv(1, 1, 1)
        assert endpoint.arm(here.deadline_ns())
        here.meet()
        Natives(endpoint).barrier(here.deadline_ns())
        assert select.select([endpoint.fileno()], [], [], 0)[0]
        here.finish(ticket)

    with ThreadFabric(ShmTransport(), 2, {"wait_ns": 0}) as fabric:
        fabric.run(program)


def test_a_collective_that_begins_after_an_ending_is_refused() -> None:
    """Its thread had taken hold of the collectives before."""
    with ThreadFabric(ShmTransport(), 2) as fabric:
        here = fabric[0]
        assert isinstance(here, ShmEndpoint)
        taken = here._begin_collectives()
        here.abort()
        with pytest.raises(Closed, match="the endpoint was closed"):
            Natives(taken).barrier(time.monotonic_ns() + LATER_NS, "")
