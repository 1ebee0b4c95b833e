"""Programs about native collectives in company: beside messages of another thread, and interrupted by an exception."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detcoll.errors import Closed, PeerLost, TransportError
from detcoll.testing.fabric import Here, pattern
from detcoll.testing.natives import Natives
from detcoll.testing.programs.collectives import native_of
from detcoll.transport import Ticket
from detcoll.types import ReduceOp

SOON_NS = 3 * 10**8
WAITING_LINE = 400
"""A collective that has come so many lines without the others is waiting for them; one that waits in C ends late."""


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


def aborted_inside(here: Here) -> None:
    """Check that abort ends a collective that another thread is in, or begins."""
    native = native_of(here)
    native.barrier(here.deadline_ns())
    if here.rank == 0:
        errors: list[Exception] = []

        def reduce() -> None:
            try:
                native.all_reduce(np.ones(1000, np.float32), ReduceOp.SUM, here.deadline_ns())
            except TransportError as error:
                errors.append(error)

        thread = threading.Thread(target=reduce, name="rank 0 inside")
        thread.start()
        here.endpoint.abort()
        thread.join()
        assert [type(error) for error in errors] in ([Closed], [PeerLost]), errors
    here.meet()


class Interruption(BaseException):
    """What interrupts a collective, as KeyboardInterrupt does."""


def interrupted(here: Here, line: int, elems: int) -> None:
    """Rank 0 is interrupted at the ``line``-th line of Python inside a collective: no rank gets a wrong value.

    Each call, and each call after it, gives the right value or raises what says that ranks are not in step.
    """
    native = native_of(here)
    native.barrier(here.deadline_ns())
    for round_ in range(3):
        array = np.full(elems, here.rank + round_, np.float32)
        call = _call(here, native, array)
        ended_early = stopped(line, call) if here.rank == 0 and round_ == 0 else _refused(call)
        if not ended_early:
            assert (array == here.size * (here.size - 1) / 2 + here.size * round_).all(), f"round {round_}: {array}"
        here.meet()


def interrupted_while_it_waits(here: Here) -> None:
    """Rank 0 is interrupted while it waits for the others: its next collective raises Closed, whoever calls it."""
    native = native_of(here)
    native.barrier(here.deadline_ns())
    array = np.full(1000, here.rank, np.float32)
    if here.rank == 0:
        assert stopped(WAITING_LINE, _call(here, native, array))
        with pytest.raises(Closed):
            _call(here, native, array)()
        here.meet()
        with pytest.raises(Closed):
            _call(here, native, array)()
        return
    here.meet()
    if not _refused(_call(here, native, array)):
        assert (array == here.size * (here.size - 1) / 2).all()


def _call(here: Here, native: Natives, array: NDArray[np.float32]) -> Callable[[], None]:
    return lambda: native.all_reduce(array, ReduceOp.SUM, here.clock.now_ns() + SOON_NS)


def _refused(call: Callable[[], None]) -> bool:
    """Tell whether a call raises what says that ranks are not in step."""
    try:
        call()
    except TransportError:
        return True
    return False


def stopped(line: int, function: Callable[[], None]) -> bool:
    """Call ``function`` and interrupt it at its ``line``-th line of Python; False if it gave its result."""
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
    except (Interruption, TransportError):
        return True
    finally:
        sys.settrace(before)
    return False
