"""The SPI: what a transport gives, and what it may rely on.

A transport moves messages between the ranks of one job. It knows nothing of plans, collectives or calendars: it is
handed tagged sends and receives, and where it can hold a send until a window opens (``timed``), windows.

Guarantees that every transport gives, and that `detcoll.testing.TransportContract` checks:

- A message is matched by (source, tag). Two messages of one source with one tag match in the order they were sent;
  messages of different tags match in any order.
- A receive takes exactly the size it states; any other size fails the receive with FrameError.
- `Endpoint.send` borrows the view until its ticket ends. `Endpoint.recv` with ``into`` owns that memory until its
  ticket ends. A receive without ``into`` lends a read-only view of what arrived, until `Ticket.release`.
- Sends and receives never block. `Endpoint.poll` is the only wait, and never waits past its deadline.
- One thread at a time uses an endpoint; handing it to another thread needs a lock or a thread start between.
- After `Endpoint.close` or `Endpoint.abort` nothing of it is left: no process, no socket, no shared memory.

Times are nanoseconds of the endpoint's clock (`Clock.now_ns`, the local monotonic clock).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from detcoll.types import ReduceOp

SMALLEST_PART_BYTES = 16_384
"""A window with room for less of a message than this is left alone: two more frames would cost more than it holds."""

LARGEST_TAG = 2**31 - 1
"""Tags are whole numbers from 0 to this."""


class Scope(Enum):
    """How far apart ranks may be for a transport to join them."""

    HOST = "one host"
    SITE = "one site"
    ANYWHERE = "anywhere"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do, as data.

    ``timed``: holds a send until its window opens and ends it as MISSED when it no longer fits.
    ``splits``: sends what does fit of it; see `Ticket`.
    ``native``: names of collectives done by the transport itself, on ``native_dtypes`` with ``native_ops``.
    ``ordered``: its native collectives fold in the order of the groups that `NativeCollectives.arrange` was given and
    compare what ranks call, so no plan is needed for reproducible results.
    ``largest_message_bytes``: a larger send is a UsageError.
    """

    scope: Scope
    devices: frozenset[str] = frozenset({"cpu"})
    timed: bool = False
    splits: bool = False
    native: frozenset[str] = frozenset()
    native_dtypes: frozenset[str] = frozenset()
    native_ops: frozenset[ReduceOp] = frozenset()
    ordered: bool = False
    largest_message_bytes: int = 2**30


@dataclass(frozen=True, slots=True)
class Window:
    """When a send may use the line, in nanoseconds of the endpoint's clock, and how fast.

    A timed transport starts the send at or after ``not_before_ns``, and sends only what at ``rate_bytes_per_s``
    (payload) has left by ``not_after_ns``. ``not_after_ns`` None: no end, only the rate holds.
    """

    not_before_ns: int
    not_after_ns: int | None
    rate_bytes_per_s: float

    def takes_ns(self, nbytes: int) -> int:
        """Return how long ``nbytes`` are on the line."""
        return int(nbytes / self.rate_bytes_per_s * 1e9)

    def fitting_bytes(self, nbytes: int, begin_ns: int, frame_bytes: int) -> int:
        """Return how much of a message can leave from ``begin_ns`` on: all, a part that is worth a frame, or nothing.

        ``frame_bytes`` is what the transport adds to a message, and to a part of one.
        """
        begin_ns = max(begin_ns, self.not_before_ns)
        if self.not_after_ns is None or begin_ns + self.takes_ns(nbytes + frame_bytes) <= self.not_after_ns:
            return nbytes
        part = int((self.not_after_ns - begin_ns) * self.rate_bytes_per_s / 1e9) - frame_bytes
        return part if part >= SMALLEST_PART_BYTES else 0


class TicketKind(Enum):
    """What a ticket stands for."""

    SEND = "send"
    RECV = "recv"


class TicketStatus(Enum):
    """Where a send or receive stands; all but PENDING are final."""

    PENDING = "pending"
    DONE = "done"
    MISSED = "missed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class Ticket:
    """One send or receive under way.

    ``view`` : memoryview of bytes, for a finished receive without ``into``; valid until `release`.
    ``error`` : why it FAILED.  ``started_ns``/``left_ns``/``ended_ns`` : when a send was handed to the line, when at
    its pace the last byte had left, and when the ticket ended; 0 where the transport does not know.  ``context`` : the
    caller's own, never touched by a transport.
    ``sent_bytes`` : of a MISSED send, how many of its first bytes have left. The next send to the same peer with the
    same tag must bring the rest, and the receiver gets one message.
    """

    kind: TicketKind
    peer: int
    tag: int
    nbytes: int
    status: TicketStatus = TicketStatus.PENDING
    view: memoryview | None = None
    error: Exception | None = None
    started_ns: int = 0
    left_ns: int = 0
    ended_ns: int = 0
    sent_bytes: int = 0
    context: Any = None
    lender: Any = field(default=None, repr=False)

    def release(self) -> None:
        """Give back the lent view; the transport may reuse its memory. Harmless when there is none."""
        lender, self.lender, self.view = self.lender, None, None
        if lender is not None:
            lender.take_back(self)


class Clock(Protocol):
    """A monotonic clock."""

    def now_ns(self) -> int:
        """Return the time in nanoseconds."""


class Rendezvous(Protocol):
    """What a transport may ask of the meeting of all ranks while it opens."""

    @property
    def host(self) -> str:
        """The local IP address over which other ranks reach this one."""

    def exchange(self, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
        """Give ``payload`` under ``name`` and return every rank's, in rank order; all ranks must call it.

        Raises
        ------
        ConnectError
            If not every rank called it before the deadline; names those that did not.
        """


class Endpoint(ABC):
    """A rank's end of a transport."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where others reach this endpoint; opaque to all but its transport."""

    @abstractmethod
    def connect(self, addresses: Mapping[int, str], deadline_ns: int) -> None:
        """Join the ranks in ``addresses`` (this rank's own entry is ignored).

        Raises
        ------
        ConnectError
            If not all of them are joined at the deadline; names them.
        """

    @abstractmethod
    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Send ``view`` (contiguous bytes, borrowed until the ticket ends) to rank ``dst``.

        Raises
        ------
        UsageError
            If ``dst`` was not connected, ``tag`` is out of range or the message is too large.
        PeerLost, Closed
            If the peer is gone or the endpoint closed.
        """

    @abstractmethod
    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Receive exactly ``nbytes`` from rank ``src`` into writable ``into``, or lend a view of what arrives."""

    @abstractmethod
    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Return tickets that ended since the last call, waiting until there is one or the deadline passes.

        An empty answer means that the deadline passed, or that something woke the endpoint without ending a ticket.
        """

    @abstractmethod
    def cancel(self, ticket: Ticket) -> bool:
        """End a pending ticket as CANCELLED; False where it has ended or can no longer be stopped."""

    @abstractmethod
    def abort(self) -> None:
        """Drop everything at once, without telling anyone. Any later use raises Closed. Idempotent."""

    @abstractmethod
    def close(self, deadline_ns: int) -> None:
        """Finish what was sent, then give everything back; after the deadline drop what is left. Idempotent."""

    def fileno(self) -> int | None:
        """Return a descriptor that is readable when `poll` would return at once, or None where there is none.

        A caller that waits on several endpoints at once waits on these; one without is polled in turn.
        """
        return None

    def arm(self, deadline_ns: int) -> bool:
        """Prepare to be waited on through `fileno`: True if there is nothing to collect yet.

        ``deadline_ns`` is when the caller's wait ends. Between a True answer and the next call of any method, whatever
        `poll` would return makes the descriptor readable.
        """
        return True

    def keep_time(self) -> None:  # noqa: B027 - most have no windows
        """Send what is due now. Cheap and never blocks; callers that are busy do it between two pieces of work."""

    def counters(self) -> Mapping[str, int]:
        """Return what the transport counted (retransmits, missed windows, ...), by name."""
        return {}

    def connections(self) -> list[dict[str, object]]:
        """Return the network connections in use: ``dst``, ``lane``, ``local`` and ``remote`` as ``ip:port``."""
        return []


class NativeCollectives(ABC):
    """Collectives done by a transport itself; its endpoint is one of these too.

    Arrays are one-dimensional, contiguous, writable, and reduced in place. Calls block the calling thread until the
    collective is done or the deadline passes; one thread at a time calls. `Endpoint.abort` may come from another thread
    meanwhile. ``arrays`` says how many arrays the caller coalesced into one, for transports that compare calls.
    """

    def arrange(self, groups: Sequence[Sequence[int]]) -> None:  # noqa: B027 - most fold in an order of their own
        """Say how ranks are grouped, once, before the first collective; without it all ranks are one group.

        An ``ordered`` transport folds the ranks of each group in the order given, then the groups in theirs, always
        ``op(lower, higher)``. The ranks of a group are a level, the groups another. 16-bit floats fold in float32 and
        are rounded once a level; an average of them is a mean at each level, any other is divided once, after the last
        fold. `detcoll.fold.fold_groups` does all this.
        """

    def allocate(self, nbytes: int) -> memoryview | None:
        """Return writable memory that its collectives work on without staging; None if there is no such kind.

        It lives as long as something refers to it, and any part of it may be handed to a collective.
        """
        return None

    @abstractmethod
    def all_reduce(self, array: NDArray[Any], op: ReduceOp, deadline_ns: int, arrays: int = 1) -> None:
        """Reduce ``array`` over all ranks, in place.

        On every rank NaN comes out of a minimum or maximum where any rank has one; `detcoll.extrema.comparable` helps
        libraries whose own loses it. An average of 16-bit floats must be right where the mean can be represented, if
        the sum cannot; see `detcoll.fold.widened`.
        """

    @abstractmethod
    def broadcast(self, array: NDArray[Any], root: int, deadline_ns: int, arrays: int = 1) -> None:
        """Copy ``array`` of ``root`` to all ranks."""

    @abstractmethod
    def barrier(self, deadline_ns: int) -> None:
        """Return once every rank has called."""

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """What to call its algorithm in traces and results, such as ``"mpi-native"``."""


class Transport(ABC):
    """A kind of transport, found under the entry-point group ``detcoll.transports``."""

    name: str
    capabilities: Capabilities
    options: frozenset[str] = frozenset()
    """Names of the options that `open` takes; the job's own (``insecure``, ``ports``, ``congestion``) come to those
    transports that name them."""

    @abstractmethod
    def open(self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]) -> Endpoint:
        """Open this rank's endpoint. All ranks of the job call it, in the same order of transports.

        Raises
        ------
        TransportUnavailable
            If what it needs is not here; nothing is opened then.
        UsageError
            If an option is unknown or cannot be used.
        """


def byte_view(array: NDArray[Any]) -> memoryview:
    """Return the memory of a contiguous array as a flat memoryview of bytes, read-only where the array is."""
    return array.reshape(-1).view(np.uint8).data.cast("B")


def host_identity() -> str:
    """Return a string that is equal for processes which can share memory: same boot of the same kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename
