"""Jobs that once did not start, or were broken by strangers; each test runs programs as users write them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from forked import Rank, launch_forked
from jobs import PROGRAM, free_port
from ranks import launch

pytestmark = pytest.mark.timeout(120)

SIGNATURE = b"\xff"
"""The first byte of a greeting (RFC 37/ZMTP 3.1)."""
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04PUSH"
"""What a sender without a name or password begins with in ZeroMQ's protocol (RFC 23)."""


@pytest.mark.parametrize("limit", [20, 26, 32])
def test_too_few_descriptors_are_told_and_not_waited_for(limit: int) -> None:
    port = free_port()
    with Rank(0, 2, port, "starved", limit) as first, Rank(1, 2, port, "starved", 500):
        end = first.hears()
    assert end is not None, "it hangs"
    assert end.startswith("ConnectError: too few file descriptors")
    assert f"of the {limit} that this process may have" in end


def test_few_descriptors_are_enough() -> None:
    """Ranks connect to those that their calls need, and few descriptors go to each."""
    ended = launch_forked(6, PROGRAM, "low_limit", 75, 75, environ={"DETCOLL_SITES": "2"})
    assert {rank: said[-1] for rank, said in ended.said.items()} == dict.fromkeys(range(6), 6.0), ended.err


def test_a_process_raises_its_own_limit_of_descriptors() -> None:
    ended = launch_forked(4, PROGRAM, "low_limit", 48, 4096, environ={"DETCOLL_SITES": "2"})
    assert {rank: said[-1] for rank, said in ended.said.items()} == dict.fromkeys(range(4), 4.0), ended.err


def test_a_process_of_another_job_does_not_break_the_meeting() -> None:
    """It says that it is rank 1 of three, comes before rank 1 of two, and is refused alone."""
    port = free_port()
    with Rank(0, 2, port, "meet") as first:
        with Rank(1, 3, port, "meet") as stray:
            assert "the world has 3 ranks, rank 0 says 2" in stray.hears()
        with Rank(1, 2, port, "meet") as second:
            assert [(rank.hears(), rank.hears()) for rank in (first, second)] == [("done", 2.0)] * 2


def test_ranks_in_containers_of_their_own_meet_over_the_network() -> None:
    container = ["unshare", "-pf", "--mount-proc"]
    if subprocess.run([*container, "true"], capture_output=True, check=False).returncode:
        pytest.skip("PID namespaces cannot be made here")
    started = [sys.executable, "-m", "detcoll", "run", "-n", "2", *container]
    ended = launch(2, "calls.py", "small", launcher=started, environ={"DETCOLL_LOG": "warning"})
    assert {rank: (said[0][0], said[0][2]) for rank, said in ended.said.items()} == dict.fromkeys(
        range(2), ("slotted", 3.0)
    ), ended.err
    assert "ranks 0 and 1 cannot share memory: rank 1 is in another PID namespace" in ended.err


def listening_ports(pid: int) -> list[int]:
    """Return the TCP ports on which a process listens."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            inodes.add(re.sub(r"socket:\[(\d+)\]", r"\1", os.readlink(descriptor)))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes]


def stranger(port: int) -> socket.socket:
    """Return a connection to a port that speaks ZeroMQ's protocol, whose handshake was begun without any token.

    Whoever asks for a token ends the connection during the handshake, so what is sent over it may raise OSError.
    """
    connection = socket.create_connection(("127.0.0.1", port))
    try:
        if connection.recv(1) != SIGNATURE:  # a listener sends its signature at once
            raise ConnectionResetError(f"port {port} does not speak ZeroMQ's protocol")
        with suppress(OSError):
            connection.sendall(GREETING)
            connection.recv(63, socket.MSG_WAITALL)
            connection.sendall(READY)
            connection.recv(2, socket.MSG_WAITALL)
    except OSError:
        connection.close()
        raise
    return connection


@contextmanager
def attacked() -> Iterator[tuple[Rank, list[int]]]:
    """Rank 1 of two, which makes a call alone when it may go on, and the ports on which it listens."""
    port = free_port()
    with Rank(0, 2, port, "alone_in_a_call") as first, Rank(1, 2, port, "alone_in_a_call") as second:
        assert [first.hears(), second.hears()] == ["ready", "ready"]
        ports = listening_ports(second.pid)
        assert ports
        yield second, ports


def test_a_flood_of_foreign_messages_delays_no_deadline() -> None:
    """It lasts until the rank has met its deadline; one that reads on while there is something never does."""
    block = (b"\x00\x40" + bytes(64)) * 10_000
    under_way, over = threading.Semaphore(0), threading.Event()
    begun, lasted = [], []

    def flood(port: int) -> None:
        with suppress(OSError), stranger(port) as connection:
            begun.append(port)
            for number in range(200):
                if number == 100:
                    under_way.release()
                if over.is_set():
                    break
                connection.sendall(block)
            else:
                lasted.append(port)
        under_way.release()

    with attacked() as (rank, ports):
        threads = [threading.Thread(target=flood, args=(port,)) for port in ports]
        for thread in threads:
            thread.start()
        for _ in threads:
            under_way.acquire()
        rank.go_on()
        end = rank.hears()
        over.set()
        exhausted = list(lasted)
    assert begun, "no port answered a stranger"
    for thread in threads:
        thread.join()
    assert end is not None, "it hangs"
    assert end.startswith("DeadlineMissed")
    assert not exhausted


def test_messages_without_an_end_are_not_kept() -> None:
    """64 MiB of parts, each with a promise of more, cost a rank no memory."""
    part = b"\x03" + (2**20).to_bytes(8, "big") + bytes(2**20)
    with attacked() as (rank, ports):
        before, begun = most_memory(rank.pid), 0
        for port in ports:
            with suppress(OSError), stranger(port) as connection:
                begun += 1
                for _ in range(64):
                    connection.sendall(part)
        assert begun, "no port answered a stranger"
        assert most_memory(rank.pid) - before < 32 * 2**20


def most_memory(pid: int) -> int:
    """Return the most memory that a process has had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
