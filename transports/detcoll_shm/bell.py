"""Doorbells: how a rank that waits is woken, and how it learns that a process ended.

A bell is a pipe. Peers open its reading end for writing through ``/proc``, which Linux allows for pipes (not for
eventfds), needs no name, works across network namespaces, and costs half of what a datagram socket does. One epoll
descriptor holds the pipe and a pidfd for each peer's process, so a caller can wait on it along with others.

Whoever waits takes what was rung, so each thread that may wait has a bell of its own: an endpoint has one for messages
and one for collectives. Both watch the same pidfds.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

from detcoll.errors import ConnectError, PeerLost

RECHECK_NS = 10 * 10**6
"""Nobody sleeps longer without another look, so that even a lost ring costs little."""

_PIPE_BYTES = 65536  # all that a pipe holds, so one read silences it
_LOWEST_UNFIT_FD = 1024  # select(2) takes descriptors below this


def process_ended(rank: int) -> PeerLost:
    """Return the error that the end of the process of ``rank`` means, by whatever it was noticed."""
    return PeerLost(f"the process of rank {rank} ended without closing its endpoint")


def open_process(rank: int, pid: int) -> int:
    """Return a pidfd of process ``pid`` of ``rank``, readable once it has ended.

    Raises
    ------
    ConnectError
        If it has ended, or the system refuses to tell.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise ConnectError(f"process {pid} of rank {rank} cannot be watched: {error.strerror}") from error


class Bell:
    """A doorbell of one rank: one thread waits, any thread of this process and all peers ring."""

    __slots__ = ("_closing", "_epoll", "_is_closed", "_processes", "reader", "writer")

    def __init__(self) -> None:
        # Holding the writing end too keeps the pipe from hanging up when the last peer leaves.
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self.reader, select.EPOLLIN)
        self._processes: dict[int, int] = {}
        self._closing = threading.Lock()
        self._is_closed = False

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._epoll.fileno()

    def watch(self, rank: int, process_fd: int) -> None:
        """Wake when the process of ``rank``, whose pidfd stays the caller's, ends."""
        self._processes[process_fd] = rank
        self._epoll.register(process_fd, select.EPOLLIN)

    def forget(self, rank: int) -> None:
        """Stop watching the process of ``rank``."""
        for fd in [fd for fd, watched in self._processes.items() if watched == rank]:
            del self._processes[fd]
            self._epoll.unregister(fd)

    def wake(self) -> None:
        """Ring this bell; harmless once it is closed."""
        with self._closing:
            if not self._is_closed:
                ring(self.writer)

    def wait(self, timeout_ns: int) -> list[int]:
        """Wait until rung or ``timeout_ns`` passed, or it is time for another look; return whose process ended."""
        timeout_ns = min(timeout_ns, RECHECK_NS)
        if timeout_ns >= 10**6:
            # epoll counts milliseconds and rounds up; the half keeps this from waiting one too many.
            events = self._epoll.poll((timeout_ns // 10**6 - 0.5) / 1e3)
        else:
            if timeout_ns > 0:
                self._wait_briefly(timeout_ns)
            events = self._epoll.poll(0)
        ended = []
        for fd, _ in events:
            if fd == self.reader:
                os.read(fd, _PIPE_BYTES)
            else:
                ended.append(self._processes[fd])
        return ended

    def _wait_briefly(self, timeout_ns: int) -> None:
        """Wait less than a millisecond, which epoll cannot count."""
        if self._epoll.fileno() < _LOWEST_UNFIT_FD:
            select.select([self._epoll], [], [], timeout_ns / 1e9)
        else:
            self._epoll.poll(0.001)

    def close(self) -> None:
        """Give all descriptors back; nobody may wait any more."""
        with self._closing:
            self._is_closed = True
            self._epoll.close()
            os.close(self.reader)
            os.close(self.writer)


class RemoteBell:
    """The doorbell of another rank, opened when it is first rung."""

    __slots__ = ("_fd", "_open")

    def __init__(self, open_fd: Callable[[], int]) -> None:
        self._open = open_fd
        self._fd = -1

    def ring(self) -> None:
        """Ring it; harmless if its owner has gone."""
        if self._fd < 0:
            try:
                self._fd = self._open()
            except ConnectError:
                return
        ring(self._fd)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)


def ring(fd: int) -> None:
    """Ring the bell whose pipe is open as ``fd``; harmless if it rings already or its owner has gone."""
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(fd, b"\0")
