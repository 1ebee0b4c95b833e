"""The synchroniser: when it asks, what it makes of answers, and once for real against a clock that is off."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from detcoll.clock import RECORD_BYTES, MonotonicClock, Synchroniser, SyncState, Verdict, answer_ping, clock_domain
from detcoll.errors import FrameError, UsageError
from detcoll.testing.fake_clock import FakePath

US, MS, S = 10**3, 10**6, 10**9


def simulate(path: FakePath, synchroniser: Synchroniser, until_ns: int, lose: float = 0.0) -> list[int]:
    """Carry messages until ``until_ns`` and return when pings were sent."""
    events: list[tuple[int, int, str, bytes]] = []
    rng = np.random.default_rng(11)
    sent: list[int] = []
    while True:
        now_ns = path.local.now_ns()
        if synchroniser.due(now_ns):
            sent.append(now_ns)
            ping = synchroniser.make_ping(now_ns)
            assert len(ping) == RECORD_BYTES == 32
            if rng.random() >= lose:
                events.append((path.time.now_ns() + 10 * MS, len(sent), "ping", ping))
        due_ns = path.local.when_ns(synchroniser.next_ns(now_ns))
        next_ns = min([due_ns, *(event[0] for event in events)])
        if next_ns > until_ns:
            return sent
        path.time.advance_to(next_ns)
        for event in sorted(event for event in events if event[0] <= next_ns):
            events.remove(event)
            if event[2] == "ping":
                pong = answer_ping(event[3], path.remote.now_ns(), path.remote.now_ns())
                events.append((path.time.now_ns() + 10 * MS, event[1], "pong", pong))
            else:
                synchroniser.handle_pong(event[3], path.local.now_ns())


def test_the_synchroniser_asks_in_a_burst_then_at_an_interval():
    path, synchroniser = FakePath(offset_ns=9 * S, drift_ppm=10), Synchroniser(burst=4)
    start_ns = path.time.now_ns()
    sent = simulate(path, synchroniser, start_ns + 3 * S)
    assert [at - start_ns for at in sent] == [0, 2 * MS, 4 * MS, 6 * MS, S + 6 * MS, 2 * S + 6 * MS]
    assert synchroniser.state is SyncState.SYNCHRONISED
    now_ns = path.local.now_ns()
    error_ns = abs(synchroniser.offset_ns(now_ns) - path.offset_ns)
    assert error_ns <= 100 * US
    assert 10 * MS <= synchroniser.bound_ns(now_ns) <= 11 * MS


def test_the_synchroniser_asks_at_once_after_a_step():
    path, synchroniser = FakePath(), Synchroniser(burst=4)
    simulate(path, synchroniser, path.time.now_ns() + S)
    path.remote.step(-S)
    sent = simulate(path, synchroniser, path.time.now_ns() + S + 500 * MS)
    gaps = np.diff(sent)
    assert gaps[:3].tolist() == [20 * MS, 2 * MS, 2 * MS], "the answer came a round trip later, then three more"
    assert synchroniser.filter.steps == 1, "answers on their way at the step are not taken for steps"
    assert synchroniser.state is SyncState.SYNCHRONISED


def test_answers_under_way_at_a_step_do_not_count():
    path, synchroniser = FakePath(), Synchroniser(burst=8)
    simulate(path, synchroniser, path.time.now_ns() + 3 * S)
    now_ns = path.local.now_ns()
    before, after = synchroniser.make_ping(now_ns), synchroniser.make_ping(now_ns + 1)
    stepped = answer_ping(after, now_ns + S, now_ns + S)
    assert synchroniser.handle_pong(stepped, now_ns + 20 * MS) is Verdict.STEP
    stale = answer_ping(before, now_ns + 10 * MS, now_ns + 10 * MS)
    assert synchroniser.handle_pong(stale, now_ns + 21 * MS) is Verdict.REFUSED
    assert synchroniser.filter.steps == 1


def test_the_synchroniser_lives_with_loss():
    path, synchroniser = FakePath(offset_ns=S), Synchroniser()
    simulate(path, synchroniser, path.time.now_ns() + 60 * S, lose=0.5)
    assert synchroniser.state is SyncState.SYNCHRONISED
    assert len(synchroniser._pending) <= 16
    assert abs(synchroniser.offset_ns(path.local.now_ns()) - S) <= 100 * US


def test_a_restart_forgets_and_asks_anew():
    path, synchroniser = FakePath(), Synchroniser()
    simulate(path, synchroniser, path.time.now_ns() + 2 * S)
    now_ns = path.local.now_ns()
    pong = answer_ping(synchroniser.make_ping(now_ns), now_ns, now_ns)
    synchroniser.restart()
    assert synchroniser.state is SyncState.EMPTY
    assert synchroniser.due(now_ns)
    assert synchroniser.handle_pong(pong, now_ns + 1) is Verdict.REFUSED


def test_one_clock_needs_no_asking():
    synchroniser = Synchroniser(same_clock=True)
    assert synchroniser.state is SyncState.SYNCHRONISED
    assert synchroniser.next_ns(5) is None
    assert not synchroniser.due(5)
    assert (synchroniser.offset_ns(5), synchroniser.bound_ns(5)) == (0, 0)


def test_doubled_and_foreign_answers_are_refused():
    synchroniser = Synchroniser()
    ping = synchroniser.make_ping(1000)
    pong = answer_ping(ping, 2000, 2001)
    assert synchroniser.handle_pong(pong, 3000) is Verdict.ACCEPTED
    assert synchroniser.handle_pong(pong, 3001) is Verdict.REFUSED
    synchroniser.make_ping(5000)
    other = Synchroniser()
    other.make_ping(7)
    assert synchroniser.handle_pong(answer_ping(other.make_ping(8), 2000, 2001), 6000) is Verdict.REFUSED


def test_bytes_that_are_no_record_break_the_protocol():
    ping = Synchroniser().make_ping(5)
    for wrong in (b"", ping[:-1], ping + b"x", bytes(32)):
        with pytest.raises(FrameError, match="no ping"):
            answer_ping(wrong, 0, 0)
        with pytest.raises(FrameError, match="no pong"):
            Synchroniser().handle_pong(wrong, 0)
    with pytest.raises(FrameError, match="no pong"):
        Synchroniser().handle_pong(ping, 0)


@pytest.mark.parametrize("arguments", [{"burst": 0}, {"spacing_ns": 0}, {"interval_ns": 0}])
def test_synchroniser_arguments_are_checked(arguments):
    with pytest.raises(UsageError, match="must be at least 1"):
        Synchroniser(**arguments)


KNOWN_OFFSET_NS = 12_345 * S + 678

PEER = """
import ctypes, os, socket, sys, time
from detcoll.clock import MonotonicClock, answer_ping, clock_domain

CLONE_NEWTIME = 0x80
peer = socket.socket(fileno=int(sys.argv[1]))
peer.settimeout(60)
libc = ctypes.CDLL(None, use_errno=True)
try:
    if libc.unshare(CLONE_NEWTIME) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with open("/proc/self/timens_offsets", "w") as offsets:
        offsets.write("monotonic 12345 678")
except OSError as error:
    peer.send(f"refused: {error}".encode())
    sys.exit()
child = os.fork()  # only children enter the new namespace
if child:
    peer.close()
    os.waitpid(child, 0)
    sys.exit()
peer.send(clock_domain().encode())
clock = MonotonicClock()
while ping := peer.recv(64):
    received_ns = clock.now_ns()
    peer.send(answer_ping(ping, received_ns, clock.now_ns()))
"""


def test_a_real_clock_that_is_off_is_recovered():
    """The peer lives in a time namespace, so its monotonic clock is off by an amount that is known to the digit."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", textwrap.dedent(PEER), str(far.fileno())]
    with subprocess.Popen(command, pass_fds=[far.fileno()]) as peer, near:
        far.close()
        near.settimeout(60)
        try:
            domain = near.recv(200).decode()
            if domain.startswith("refused"):
                pytest.skip(f"no time namespace here: {domain}")
            assert domain != clock_domain()
            clock, synchroniser = MonotonicClock(), Synchroniser(spacing_ns=1, interval_ns=1)
            for _ in range(200):
                near.send(synchroniser.make_ping(clock.now_ns()))
                pong = near.recv(64)
                assert synchroniser.handle_pong(pong, clock.now_ns()) is Verdict.ACCEPTED
            now_ns = clock.now_ns()
            assert synchroniser.state is SyncState.SYNCHRONISED
            error_ns = abs(synchroniser.offset_ns(now_ns) - KNOWN_OFFSET_NS)
            assert error_ns <= synchroniser.bound_ns(now_ns) < S
        finally:
            near.close()
            assert peer.wait(60) == 0
