"""What is Gloo's own: who may join, which types it reduces, what is lost when, and that nothing stays behind."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import FrameType
from typing import Any

import numpy as np
import pytest

import detcoll_gloo.agreement
from detcoll.errors import (
    Closed,
    ConnectError,
    DeadlineMissed,
    PeerLost,
    TransportUnavailable,
    UsageError,
)
from detcoll.testing import Here, LocalMeeting, MonotonicClock, ProcessFabric, ThreadFabric, WorldError, Worlds, pattern
from detcoll.testing.fabric import in_threads
from detcoll.testing.natives import Natives
from detcoll.testing.programs import beside, collectives, messages
from detcoll.transport import TicketStatus
from detcoll.types import ReduceOp
from detcoll_gloo import GlooTransport

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def average(here: Here) -> None:
    """Averages of 16-bit floats do not overflow on the way."""
    array = np.full(1000, 40_000, np.float16)
    Natives(here.endpoint).all_reduce(array, ReduceOp.AVG, here.deadline_ns())
    assert (array == 40_000).all()


def uncompared(here: Here) -> None:
    """Without comparing, calls of equal size and different operations are not told apart, and a barrier still waits."""
    array = np.full(3, here.rank + 1.0)
    Natives(here.endpoint).all_reduce(array, ReduceOp.SUM if here.rank else ReduceOp.MAX, here.deadline_ns())
    collectives.late_collective(here, "barrier")


def unknown_types(here: Here) -> None:
    """Types that Gloo does not know are refused, and the endpoint serves on."""
    for dtype in (np.uint16, np.int16, np.uint64):
        with pytest.raises(UsageError, match=np.dtype(dtype).name):
            Natives(here.endpoint).all_reduce(np.ones(3, dtype), ReduceOp.SUM, here.deadline_ns())
    Natives(here.endpoint).barrier(here.deadline_ns())


def die(here: Here) -> None:
    """Rank 1 ends without a word; rank 0 learns it in a receive, in a send, and in a collective."""
    Natives(here.endpoint).barrier(here.deadline_ns())
    if here.rank == 1:
        os._exit(3)
    ticket = here.endpoint.recv(1, 1, 1)
    here.settle(ticket)
    assert isinstance(ticket.error, PeerLost)
    with pytest.raises(PeerLost):
        here.send(1, 1, b"x")
    with pytest.raises(PeerLost):
        Natives(here.endpoint).all_reduce(np.ones(3), ReduceOp.SUM, here.deadline_ns())
    print("rank 0 learnt it", file=sys.stderr, flush=True)


def unexpected_is_bounded(here: Here) -> None:
    """What exceeds ``unexpected_bytes`` stays with its sender until a receive is posted."""
    messages.each_to_each(here, 10)  # what was never asked for a message reads none
    for _ in range(3):
        if here.rank == 0:
            sent = [here.send(1, tag, pattern(tag, 4000)) for tag in range(4)]
            here.finish(*sent[:2])
            while here.endpoint.poll(here.clock.now_ns() + 10**7):
                pass
            assert sent[2].status is sent[3].status is TicketStatus.PENDING
            assert here.endpoint.cancel(sent[3])
        here.meet()
        if here.rank == 0:
            here.finish(sent[2])
        else:
            assert [here.take(0, tag, 4000) for tag in (1, 2, 0)] == [pattern(tag, 4000) for tag in (1, 2, 0)]


def discarded_gives_room_back(here: Here) -> None:
    """What was held and is discarded takes no room of ``unexpected_bytes`` any more."""
    messages.each_to_each(here, 10)
    for round_ in range(3):
        if here.rank == 0:
            here.finish(*(here.send(1, round_ * 256 + tag, pattern(tag, 4000)) for tag in range(2)))
            here.meet()
        else:
            here.meet()
            here.endpoint.discard(round_ * 256, 8)
        here.meet()


def interrupted_early(here: Here, line: int) -> None:
    """Who is interrupted before the others come calls no more, and the others learn at once that it is gone."""
    array = np.ones(10)
    if here.rank == 0:
        soon_ns = here.clock.now_ns() + 10**9
        assert beside.stopped(line, lambda: Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, soon_ns))
        with pytest.raises(Closed):
            Natives(here.endpoint).barrier(here.deadline_ns())
        here.meet()
    else:
        here.meet()
        with pytest.raises(PeerLost):
            Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())


def interrupted_between_records(here: Here) -> None:
    """Who is interrupted when some have told what they call, and others may have, does not wait for them again."""
    array = np.ones(10)
    here.meet()
    if here.rank == 0:
        native = Natives(here.endpoint)
        assert stopped_after_first_record(lambda: native.all_reduce(array, ReduceOp.SUM, here.deadline_ns()))
        with pytest.raises(Closed):
            Natives(here.endpoint).barrier(here.deadline_ns())
    else:
        with pytest.raises(PeerLost):
            Natives(here.endpoint).all_reduce(array, ReduceOp.SUM, here.deadline_ns())


def stopped_after_first_record(function: Callable[[], None]) -> bool:
    """Interrupt ``function`` where it has waited for the first record of another rank."""
    lines: list[int] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code is detcoll_gloo.agreement._All.wait.__code__ and event == "line":
            lines.append(frame.f_lineno)
            if len(lines) > 1 and lines.count(lines[-1]) == 2:  # back at the head of the loop
                raise beside.Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except beside.Interruption:
        return True
    finally:
        sys.settrace(before)
    return False


def one_misses_it(here: Here) -> str:
    """Tell how a collective ended that rank 1 did not come to."""
    Natives(here.endpoint).barrier(here.deadline_ns())
    if here.rank == 1:
        here.meet()
        return ""
    with pytest.raises((DeadlineMissed, PeerLost)) as ended:
        Natives(here.endpoint).barrier(here.clock.now_ns() + 10**9 // 2)
    here.meet()
    return str(ended.value)


def cancelled_while_it_arrives(here: Here, nbytes: int) -> None:
    """Of receives that are cancelled at any moment, the next one of the tag gets the message."""
    if here.rank == 0:
        for tag in range(20):
            sent = here.send(1, tag, pattern(tag, nbytes))
            here.meet()
            here.finish(sent)
    else:
        for tag in range(20):
            first, second = here.endpoint.recv(0, tag, nbytes), here.endpoint.recv(0, tag, nbytes)
            cancelled = here.endpoint.cancel(first)
            here.meet()
            got = second if cancelled else first
            here.finish(got)
            assert bytes(got.view) == pattern(tag, nbytes)
            assert cancelled or here.endpoint.cancel(second)


@needs_torch
def test_average_of_half_floats() -> None:
    with ThreadFabric(GlooTransport(), 3) as fabric:
        fabric.run(average)


@needs_torch
def test_without_comparing() -> None:
    with ThreadFabric(GlooTransport(), 2, {"compare": False}) as fabric:
        fabric.run(uncompared)


@needs_torch
def test_unknown_types() -> None:
    with ThreadFabric(GlooTransport(), 2) as fabric:
        fabric.run(unknown_types)


@needs_torch
def test_interrupted_between_records() -> None:
    with ThreadFabric(GlooTransport(), 2) as fabric:
        fabric.run(interrupted_between_records)


@needs_torch
def test_a_rank_that_does_not_come_is_named() -> None:
    with ThreadFabric(GlooTransport(), 3) as fabric:
        assert any("it waits for rank 1, which has not begun it" in text for text in fabric.run(one_misses_it))


@needs_torch
def test_unexpected_is_bounded() -> None:
    with ThreadFabric(GlooTransport(), 2, {"unexpected_bytes": 8000}) as fabric:
        fabric.run(unexpected_is_bounded)


@needs_torch
@pytest.mark.parametrize("line", [120, 130, 140, 150, 160])
def test_interrupted_early(line: int) -> None:
    with ThreadFabric(GlooTransport(), 2) as fabric:
        fabric.run(interrupted_early, line=line)


@needs_torch
def test_discarded_gives_room_back() -> None:
    with ThreadFabric(GlooTransport(), 2, {"unexpected_bytes": 8000}) as fabric:
        fabric.run(discarded_gives_room_back)


@needs_torch
@pytest.mark.parametrize("nbytes", [100, 300_000])
def test_cancelled_while_it_arrives(nbytes: int) -> None:
    with ThreadFabric(GlooTransport(), 2) as fabric:
        fabric.run(cancelled_while_it_arrives, nbytes=nbytes)


@needs_torch
def test_no_thread_and_no_descriptor_stays() -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with ThreadFabric(GlooTransport(), 3) as fabric:  # the first use loads what stays loaded
        fabric.run(messages.flood, count=10)
    before = count()
    for _ in range(3):
        with ThreadFabric(GlooTransport(), 3) as fabric:
            fabric.run(messages.flood, count=10)

    def more() -> bool:
        return any(now > then for now, then in zip(count(), before, strict=True))

    deadline = time.monotonic() + 20
    while more() and time.monotonic() < deadline:  # Gloo closes sockets a moment later, in its own thread
        os.sched_yield()
    assert not more(), f"{before} before, {count()} now"


@needs_torch
def test_nothing_starts_once_connections_are_closed() -> None:
    """Gloo may neither do nor fail a send that starts while it closes connections, and its thread would stay."""
    with ThreadFabric(GlooTransport(), 2) as fabric:
        fabric.run(messages.each_to_each, nbytes=10)
        group = fabric[0]._mail._group
        group.end()
        for start in (group.start_send, group.start_recv):
            with pytest.raises(RuntimeError, match="the connections are closed"):
                start(group.bytes_tensor(memoryview(bytearray(8))), 1, 5)


@needs_torch
def test_processes() -> None:
    crews = Worlds()
    try:
        with ProcessFabric(crews.of(2), "detcoll_gloo:GlooTransport") as fabric:
            fabric.run(messages.flood, count=20)
            fabric.run(collectives.all_reduce, counts=[1001])
            with pytest.raises(WorldError, match="rank 1 died"):
                fabric.run(die)
    finally:
        crews.end()


@needs_torch
def test_a_program_that_never_closes_ends() -> None:
    program = """
from detcoll.testing import ThreadFabric
from detcoll.testing.programs import messages
from detcoll_gloo import GlooTransport
fabric = ThreadFabric(GlooTransport(), 2).__enter__()
fabric.run(messages.flood, count=5)
print("leaving")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "leaving\n"), ended.stderr


@needs_torch
def test_interfaces_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with ThreadFabric(GlooTransport(), 2) as fabric:
        fabric.run(messages.each_to_each, nbytes=10)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(TransportUnavailable, match="nowhere0"), ThreadFabric(GlooTransport(), 2):
        pass


@needs_torch
def test_connect_names_who_never_came() -> None:
    meeting, clock = LocalMeeting(3), MonotonicClock()
    endpoints = in_threads(3, lambda rank: GlooTransport().open(rank, 3, meeting.member(rank), clock, {}))
    addresses = {rank: endpoint.address for rank, endpoint in enumerate(endpoints)}
    with pytest.raises(UsageError, match=r"lacks ranks \[2\]"):
        endpoints[0].connect({0: addresses[0], 1: addresses[1]}, clock.now_ns())

    def connect(rank: int) -> None:
        with pytest.raises(ConnectError, match=r"ranks \[1\] never came"):
            endpoints[rank].connect(addresses, clock.now_ns() + 3 * 10**9)

    in_threads(3, lambda rank: rank == 1 or connect(rank))
    for endpoint in endpoints:
        endpoint.close(clock.now_ns())


def test_missing_torch_is_said_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def refuse(name: str) -> Any:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return imported(name)

    monkeypatch.setattr("detcoll_gloo.transport.importlib.import_module", refuse)
    with (
        pytest.raises(TransportUnavailable, match=r"No module named 'torch'.*pip install .*\[gloo\]"),
        ThreadFabric(GlooTransport(), 2),
    ):
        pass


@pytest.mark.parametrize(
    "options", [{"unexpected": 1}, {"unexpected_bytes": "1 MiB"}, {"open_timeout_ns": -1}, {"compare": 1}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))), ThreadFabric(GlooTransport(), 1, options):
        pass
