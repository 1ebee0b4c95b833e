"""Doorbells: how a rank that waits is woken, and how it learns that a process ended.

A bell is a pipe. Peers open its reading end for writing through ``/proc``, which Linux allows for pipes (not for
eventfds), needs no name, works across network namespaces, and costs half of what a datagram socket does. One epoll
descriptor holds the pipe and a pidfd for each peer's process, so a caller can wait on it along with others.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress

from detcoll.errors import ConnectError, PeerLost

_PIPE_BYTES = 65536  # all that a pipe holds, so one read silences it
_LOWEST_UNFIT_FD = 1024  # select(2) takes descriptors below this


def process_ended(rank: int) -> PeerLost:
    """Return the error that the end of the process of ``rank`` means, by whatever it was noticed."""
    return PeerLost(f"the process of rank {rank} ended without closing its endpoint")


class Bell:
    """The doorbell of one rank."""

    __slots__ = ("_epoll", "_processes", "reader", "writer")

    def __init__(self) -> None:
        # Holding the writing end too keeps the pipe from hanging up when the last peer leaves.
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self.reader, select.EPOLLIN)
        self._processes: dict[int, int] = {}

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._epoll.fileno()

    def watch(self, rank: int, pid: int) -> None:
        """Wake when process ``pid`` of ``rank`` ends.

        Raises
        ------
        ConnectError
            If it has ended, or the system refuses to tell.
        """
        try:
            fd = os.pidfd_open(pid)
        except OSError as error:
            raise ConnectError(f"process {pid} of rank {rank} cannot be watched: {error.strerror}") from error
        self._processes[fd] = rank
        self._epoll.register(fd, select.EPOLLIN)

    def forget(self, rank: int) -> None:
        """Stop watching the process of ``rank``."""
        for fd in [fd for fd, watched in self._processes.items() if watched == rank]:
            del self._processes[fd]
            self._epoll.unregister(fd)
            os.close(fd)

    def wait(self, timeout_ns: int) -> list[int]:
        """Wait until rung or ``timeout_ns`` passed; silence the bell and return ranks whose process ended."""
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
        """Give all descriptors back."""
        for fd in self._processes:
            os.close(fd)
        self._processes.clear()
        self._epoll.close()
        os.close(self.reader)
        os.close(self.writer)


def ring(fd: int) -> None:
    """Ring the bell whose pipe is open as ``fd``; harmless if it rings already or its owner has gone."""
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(fd, b"\0")
