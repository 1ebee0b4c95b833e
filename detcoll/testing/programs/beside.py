"""Programs about native collectives in company: beside messages of another thread, and interrupted by an exception."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

from detcoll.errors import Closed, DeadlineMissed, PeerLost
from detcoll.testing.fabric import Here, pattern
from detcoll.testing.programs.collectives import native_of
from detcoll.transport import ReduceOp, Ticket

SOON_NS = 10**9


def natives_beside_messages(here: Here, rounds: int = 200, large_elems: int = 300_001) -> None:
    """One thread does collectives of checked values while another exchanges messages over the same endpoint."""
    errors: list[BaseException] = []

    def exchange() -> None:
        try:
            for index in range(rounds):
                _exchange(here, index)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=exchange, name=f"messages of rank {here.rank}")
    thread.start()
    try:
        _reduce(here, rounds, large_elems)
    finally:
        thread.join()
    if errors:
        raise errors[0]


def _reduce(here: Here, rounds: int, large_elems: int) -> None:
    native = native_of(here)
    for index in range(rounds):
        array = np.full(large_elems if index % 50 == 49 else 1 + index * 7, here.rank + index, np.float32)
        native.all_reduce(array, ReduceOp.SUM, here.deadline_ns())
        assert (array == here.size * (here.size - 1) / 2 + here.size * index).all(), f"round {index}: {array}"


def _exchange(here: Here, index: int) -> None:
    """Exchange a message with every other rank, and sometimes cancel a receive or discard one."""
    nbytes = 200_000 if index % 20 == 19 else index * 5
    incoming: dict[int, Ticket] = {src: here.endpoint.recv(src, index, nbytes) for src in here.others}
    if index % 10 == 0:
        assert here.endpoint.cancel(here.endpoint.recv(here.others[0], 2**40 + index, 8))
        discarded = here.endpoint.recv(here.others[0], 2**41 + index, 8)
        here.endpoint.discard(2**41, 16)
        here.settle(discarded)
    here.endpoint.arm(here.deadline_ns())
    here.finish(*incoming.values(), *(here.send(dst, index, pattern(here.rank + index, nbytes)) for dst in here.others))
    for src, ticket in incoming.items():
        assert ticket.view is not None
        assert bytes(ticket.view) == pattern(src + index, nbytes), f"message {index} of rank {src}"
        ticket.release()


class Interruption(BaseException):
    """What interrupts a collective, as KeyboardInterrupt does."""


def interrupted(here: Here, line: int, elems: int) -> None:
    """Rank 0 is interrupted inside a collective, at its ``line``-th line of Python: what it calls next is not poisoned.

    Either the collective finishes, or it raises, and the next one of this rank raises Closed at once. The others finish
    it, or come to a deadline, or see that rank 0 is gone; none gets a wrong value.
    """
    native = native_of(here)
    native.barrier(here.deadline_ns())
    array = np.full(elems, here.rank + 1, np.float32)
    again = np.full(elems, here.rank + 2, np.float32)
    total, total_again = here.size * (here.size + 1) / 2, here.size * (here.size + 3) / 2
    if here.rank == 0:
        stopped = _stopped(line, lambda: native.all_reduce(array, ReduceOp.SUM, here.clock.now_ns() + SOON_NS))
        here.meet()
        if not stopped:
            native.all_reduce(again, ReduceOp.SUM, here.deadline_ns())
            assert (array == total).all()
            assert (again == total_again).all()
            return
        try:
            native.all_reduce(again, ReduceOp.SUM, here.clock.now_ns() + SOON_NS)
        except Closed:
            return
        assert (again == total_again).all(), f"interrupted at line {line}: {again}"
        return
    try:
        native.all_reduce(array, ReduceOp.SUM, here.clock.now_ns() + SOON_NS)
        assert (array == total).all()
    except (DeadlineMissed, PeerLost, Closed):
        pass
    here.meet()
    try:
        native.all_reduce(again, ReduceOp.SUM, here.clock.now_ns() + SOON_NS)
    except (DeadlineMissed, PeerLost, Closed):
        return
    assert (again == total_again).all()


def _stopped(line: int, function: Callable[[], None]) -> bool:
    """Call ``function`` and interrupt it at its ``line``-th line; False if it ended before."""
    left = line

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except Interruption:
        return True
    finally:
        sys.settrace(before)
    return False
