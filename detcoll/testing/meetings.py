"""Ranks of one job that meet in threads of one process, or in processes of their own."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from detcoll.launch.launchers import World
from detcoll.rendezvous import Address, Event, Session, meet

CHILD = """
import os, sys, time
from detcoll.launch.launchers import read_environment
from detcoll.rendezvous import meet
ahead = lambda: time.monotonic_ns() + 20 * 10**9
session = meet(read_environment(os.environ), ahead(), tolerance_ns=int(sys.argv[1]))
if "fork" in sys.argv and os.fork() == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print("here", session.exchange("hello", b"child", ahead()), flush=True)
if sys.stdin.readline() == "die\\n":
    session.abort("error", "last words")
    os.kill(os.getpid(), 9)
session.close(ahead())
"""
TOLERANCE_NS = 30 * 10**9

_given: set[Address] = set()


def ahead(seconds: float = 20.0) -> int:
    """Return a deadline."""
    return time.monotonic_ns() + round(seconds * 1e9)


def free_address(host: str = "127.0.0.1") -> str:
    """Return an address where nobody listens and that was not returned before in this process.

    Its port is none that Linux gives to sockets which ask for any, such as those of other tests until this one listens.

    Ranks count their meetings at each address, and the counts of one job must agree. They would differ if an earlier
    job used the address and a rank of the next one reached it through a relay, under another address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        address = Address(host, random.randrange(10_000, 32_000))
        if address in _given:
            continue
        try:
            socket.create_server((host, address.port), family=family).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        _given.add(address)
        return str(address)


def world_at(rank: int, size: int, address: str | None, **changes: Any) -> World:
    """Return the place of a rank whose job meets at ``address``."""
    return World(rank, size, None, None, "environment", "address", address, **changes)


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return what each call returned or raised."""
    with ThreadPoolExecutor(max(1, len(calls))) as pool:
        futures: list[Future[Any]] = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def meet_all(
    worlds: Sequence[World],
    seconds: float = 20.0,
    environ: Mapping[str, str] | None = None,
    tolerance_ns: int = TOLERANCE_NS,
) -> list[Any]:
    """Let all of ``worlds`` meet, and return sessions or errors."""

    def call(world: World) -> Session:
        return meet(world, ahead(seconds), environ or {}, None, tolerance_ns)

    return in_threads([lambda world=world: call(world) for world in worlds])  # type: ignore[misc]


def exchange_all(met: Sequence[Session], payload: bytes = b"", seconds: float = 20.0) -> list[Any]:
    """Let all of ``met`` exchange ``payload`` and their rank, and return what each got."""

    def call(session: Session) -> list[bytes]:
        return session.exchange("x", payload + b"%d" % session.rank, ahead(seconds))

    return in_threads([lambda session=session: call(session) for session in met])  # type: ignore[misc]


def close_all(met: Sequence[Session], seconds: float = 20.0) -> list[Any]:
    """Let all leave, and return what `Session.close` returned or raised."""
    return in_threads([lambda session=session: session.close(ahead(seconds)) for session in met])  # type: ignore[misc]


def wait_for_events(session: Session) -> list[Event]:
    """Return what is told next, waiting on the descriptor as a progress thread would."""
    poll = select.poll()
    poll.register(session.fileno(), select.POLLIN)
    while poll.poll(20_000):
        if told := session.events():
            return told
    raise AssertionError("nothing was told in time")


def wait_for_event(session: Session) -> Event:
    """Return the first of `wait_for_events`."""
    return wait_for_events(session)[0]


def start_child(world: World, *arguments: str, tolerance_ns: int = TOLERANCE_NS) -> subprocess.Popen[str]:
    """Start a rank as a process; "fork" among the arguments lets it fork a worker."""
    environ = dict(os.environ) | {"RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    environ["DETCOLL_RENDEZVOUS"] = world.rendezvous or ""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tolerance_ns), *arguments],
        env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip


def end_child(child: subprocess.Popen[str]) -> None:
    """Kill a rank and what it forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
