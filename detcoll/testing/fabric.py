"""Fabrics: n connected endpoints, and a way to run one program on all of them.

A *program* is a function at the top level of a module, ``program(here, **arguments)``. Every rank runs it at the same
time with its own `Here`, and raises where something is wrong. Whether the ranks are threads (`ThreadFabric`) or
processes (`detcoll.testing.ProcessFabric`) makes no difference to it::

    def swap(here: Here, nbytes: int) -> None:
        other = 1 - here.rank
        ...

    with ThreadFabric(MemoryTransport(), 2) as fabric:
        fabric.run(swap, nbytes=100)
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from detcoll.clock import MonotonicClock
from detcoll.errors import ConnectError, TransportError
from detcoll.transport import Capabilities, Clock, Endpoint, Rendezvous, Ticket, TicketStatus, Transport

TIMEOUT_NS = 20 * 10**9
"""How long a program waits for anything before it fails."""

CLOSE_TIMEOUT_NS = 5 * 10**9

Program = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Here:
    """What a program knows on one rank. ``meet()`` returns once all ranks called it, by other means than the endpoint.

    While a rank waits in ``meet`` it does not poll, so a transport that moves data in `poll` alone stands still.
    """

    rank: int
    size: int
    endpoint: Endpoint
    capabilities: Capabilities
    meet: Callable[[], None]
    clock: Clock = field(default_factory=MonotonicClock)

    @property
    def others(self) -> list[int]:
        """All other ranks, beginning with the next one."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def part(self) -> None:
        """Poll until all ranks have called this, for what others still send or wait to be told."""
        with ThreadPoolExecutor(1) as pool:
            met = pool.submit(self.meet)
            while not met.done():
                self.endpoint.poll(self.clock.now_ns() + 1_000_000)
        met.result()

    def deadline_ns(self) -> int:
        """Return the deadline of a wait that begins now."""
        return self.clock.now_ns() + TIMEOUT_NS

    def send(self, dst: int, tag: int, data: bytes | bytearray | memoryview) -> Ticket:
        """Send bytes."""
        return self.endpoint.send(dst, tag, memoryview(data))

    def settle(self, *tickets: Ticket) -> None:
        """Poll until all ``tickets`` have ended, however they end."""
        deadline_ns = self.deadline_ns()
        while any(ticket.status is TicketStatus.PENDING for ticket in tickets):
            ended = self.endpoint.poll(deadline_ns)
            late = not ended and self.clock.now_ns() >= deadline_ns
            assert not late, f"rank {self.rank}: still pending at the deadline: {tickets}"

    def finish(self, *tickets: Ticket) -> None:
        """Poll until all ``tickets`` have ended, and check that each is DONE."""
        self.settle(*tickets)
        for ticket in tickets:
            assert ticket.status is TicketStatus.DONE, f"rank {self.rank}: {ticket}"

    def take(self, src: int, tag: int, nbytes: int) -> bytes:
        """Receive a message and return a copy of it."""
        ticket = self.endpoint.recv(src, tag, nbytes)
        self.finish(ticket)
        assert ticket.view is not None
        data = bytes(ticket.view)
        ticket.release()
        return data


def pattern(seed: int, nbytes: int) -> bytes:
    """Return bytes that tell ``seed`` and their own position, so that a wrong message names itself."""
    return (_of_positions(max(nbytes - 1, 0).bit_length())[:nbytes] + np.uint8((seed * 31 + 1) % 256)).tobytes()


@cache
def _of_positions(bits: int) -> NDArray[np.uint8]:
    """Return what is the same in the first ``2**bits`` bytes of every pattern; it takes longer than to add a seed."""
    positions = np.arange(2**bits, dtype=np.uint32)
    return np.asarray(positions * 7 + positions // 251, np.uint8)


class Fabric(ABC):
    """Connected endpoints of ``size`` ranks; open between ``__enter__`` and ``__exit__``.

    ``needed``, set before it is entered, goes to `Endpoint.connect` of every rank.
    """

    size: int
    needed: Collection[int] | None = None

    @abstractmethod
    def run(self, program: Program, **arguments: Any) -> list[Any]:
        """Run ``program(here, **arguments)`` on every rank at once; return what each returned, in rank order.

        Raises
        ------
        Exception
            What a rank raised (a `RuntimeError` with its text where ranks are processes).
        """

    @abstractmethod
    def __enter__(self) -> Self:
        """Open and connect all endpoints."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all endpoints, or abort them if the body raised."""


class ThreadFabric(Fabric, AbstractContextManager["ThreadFabric"]):
    """Ranks as threads of this process; ``fabric[rank]`` is an endpoint, to be driven from any one thread.

    Parameters
    ----------
    transport : Transport
        What joins them.
    size : int
        Number of ranks.
    options : Mapping
        Passed to `Transport.open` on every rank.
    clock : Clock
        Passed to `Transport.open`; the monotonic clock if not given.
    """

    def __init__(
        self, transport: Transport, size: int, options: Mapping[str, Any] | None = None, clock: Clock | None = None
    ) -> None:
        self.size = size
        self._transport = transport
        self._options = dict(options or {})
        self._clock = clock or MonotonicClock()
        self._endpoints: dict[int, Endpoint] = {}

    def __getitem__(self, rank: int) -> Endpoint:
        """Return the endpoint of ``rank``."""
        return self._endpoints[rank]

    def run(self, program: Program, **arguments: Any) -> list[Any]:
        """Run ``program`` in one thread for each rank; see `Fabric.run`."""
        barrier = threading.Barrier(self.size, timeout=TIMEOUT_NS / 1e9)

        def run_rank(rank: int) -> Any:
            here = Here(rank, self.size, self[rank], self._transport.capabilities, lambda: _wait(barrier), self._clock)
            try:
                return program(here, **arguments)
            except BaseException:
                barrier.abort()
                raise

        return in_threads(self.size, run_rank)

    def __enter__(self) -> Self:
        """Open and connect all endpoints, each in its own thread."""
        meeting = LocalMeeting(self.size, self._clock)

        def open_rank(rank: int) -> None:
            rendezvous = meeting.member(rank)
            endpoint = self._transport.open(rank, self.size, rendezvous, self._clock, self._options)
            self._endpoints[rank] = endpoint
            deadline_ns = self._clock.now_ns() + TIMEOUT_NS
            addresses = rendezvous.exchange("addresses", endpoint.address.encode(), deadline_ns)
            endpoint.connect({peer: text.decode() for peer, text in enumerate(addresses)}, deadline_ns, self.needed)

        try:
            in_threads(self.size, open_rank)
        except BaseException:
            self._abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all endpoints at once, or abort them if the body raised."""
        if kind is not None:
            self._abort()
            return
        in_threads(self.size, lambda rank: self[rank].close(self._clock.now_ns() + CLOSE_TIMEOUT_NS))

    def _abort(self) -> None:
        for endpoint in self._endpoints.values():
            endpoint.abort()


def _wait(barrier: threading.Barrier) -> None:
    barrier.wait()


def in_threads(size: int, function: Callable[[int], Any]) -> list[Any]:
    """Call ``function(rank)`` in one thread for each rank and return the answers.

    Raises
    ------
    Exception
        The first failure that is not the mere consequence of another rank's.
    """
    answers: list[Any] = [None] * size
    errors: list[BaseException] = []

    def call(rank: int) -> None:
        try:
            answers[rank] = function(rank)
        except BaseException as error:
            error.add_note(f"on rank {rank} of {size}")
            errors.append(error)

    threads = [threading.Thread(target=call, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=_is_consequence)
    return answers


def _is_consequence(error: BaseException) -> int:
    """Sort what is caused by another rank's failure behind that failure."""
    if isinstance(error, threading.BrokenBarrierError):
        return 2
    return 1 if isinstance(error, TransportError) else 0


class LocalMeeting:
    """A rendezvous of threads."""

    def __init__(self, size: int, clock: Clock | None = None) -> None:
        self.size = size
        self._clock = clock or MonotonicClock()
        self._given: dict[str, dict[int, bytes]] = {}
        self._changed = threading.Condition()

    def member(self, rank: int) -> Rendezvous:
        """Return what ``rank`` holds of the meeting."""
        return _LocalRendezvous(self, rank)

    def exchange(self, rank: int, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
        """See `Rendezvous.exchange`; a name serves once."""
        with self._changed:
            given = self._given.setdefault(name, {})
            assert rank not in given, f"rank {rank} exchanges {name!r} twice"
            given[rank] = payload
            self._changed.notify_all()
            remaining_s = (deadline_ns - self._clock.now_ns()) / 1e9
            if not self._changed.wait_for(lambda: len(given) == self.size, max(0.0, remaining_s)):
                missing = sorted(set(range(self.size)) - set(given))
                raise ConnectError(f"ranks {missing} did not exchange {name!r}")
            return [given[peer] for peer in range(self.size)]


class _LocalRendezvous:
    """One rank's part of a `LocalMeeting`."""

    host = listen_host = "127.0.0.1"

    def __init__(self, meeting: LocalMeeting, rank: int) -> None:
        self._meeting = meeting
        self._rank = rank

    def exchange(self, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
        return self._meeting.exchange(self._rank, name, payload, deadline_ns)
