"""The SPI: what a transport gives, and what it may rely on.

A transport moves messages between the ranks of one job. It knows nothing of plans, collectives or calendars: it is
handed tagged sends and receives, and where it can hold a send until a window opens (``timed``), windows.

Guarantees that every transport gives, and that `detcoll.testing.TransportContract` checks:

- A message is matched by (source, tag). Two messages of one source with one tag match in the order they were sent;
  messages of different tags match in any order.
- A receive takes exactly the size it states; any other size fails the receive with FrameError.
- `Endpoint.send` borrows the view until its ticket ends. `Endpoint.recv` with ``into`` owns that memory until its
  ticket ends. A receive without ``into`` lends a read-only view of what arrived, until `Ticket.release`.
- Tags are whole numbers of 64 bits, matched in full. Two tags that differ in any bit never meet.
- Sends and receives never block. `Endpoint.poll` is the only wait, and never waits past its deadline.
- One thread at a time uses an endpoint; handing it to another thread needs a lock or a thread start between. While
  one thread is inside a native collective, another may use the endpoint's send, recv, poll, arm, cancel and discard
  (one thread at a time), and neither waits for the other. Messages and collectives never mix.
- A peer that is lost costs its own tickets only: pending ones end FAILED with PeerLost, and sends and receives that
  are posted afterwards raise PeerLost or end so. A receive still gets what the peer had sent before, if that has
  arrived. `poll` does not raise for it, and the other peers' messages go on.
- What an endpoint holds for a tag that nobody will ask for again can be dropped: `Endpoint.discard`.
- After `Endpoint.close` or `Endpoint.abort` nothing of it is left: no process, no socket, no shared memory.

Times are nanoseconds of the endpoint's clock (`Clock.now_ns`, the local monotonic clock).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from detcoll.types import DTYPES, ReduceOp, is_integer

SMALLEST_PART_BYTES = 16_384
"""A window with room for less of a message than this is left alone: two more frames would cost more than it holds."""

LARGEST_TAG = 2**64 - 1
"""Tags are whole numbers from 0 to this."""

TAG_BITS = 64
"""How many bits a tag has."""

REDUCING = frozenset({"all_reduce", "reduce", "reduce_scatter"})
"""Names of the collectives that reduce; the others only move bytes."""


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
    ``native``: names of collectives done by the transport itself. Those that reduce do so on ``native_dtypes`` with
    ``native_ops``; see `supports`.
    ``ordered``: its native collectives fold in the order of the groups that `NativeCollectives.arrange` was given and
    compare what ranks call, so no plan is needed for reproducible results.
    ``largest_message_bytes``: a larger send is a UsageError.
    ``frame_bytes``: at most so many bytes travel with a message, and with each part of one, beside its own.
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
    frame_bytes: int = 128

    def supports(self, kind: str, dtype: np.dtype[Any], op: ReduceOp) -> bool:
        """Tell whether the transport does a collective itself; where it says no, calling it is a UsageError.

        ``op`` counts for collectives that reduce; the others move bytes, of any of `detcoll.types.DTYPES`. Equal on all
        ranks that ask the same, so that it may decide how a call is done.
        """
        if kind not in self.native:
            return False
        if kind not in REDUCING:
            return dtype.name in DTYPES
        averages_integers = op is ReduceOp.AVG and is_integer(dtype)
        return dtype.name in self.native_dtypes and op in self.native_ops and not averages_integers


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
    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Learn the addresses of the ranks in ``addresses`` (this rank's own entry is ignored) and join them.

        Parameters
        ----------
        addresses : Mapping of int to str
            `address` of each rank that may be sent to or received from.
        deadline_ns : int
            When to give up.
        needed : Collection of int, optional
            Which of them to join before this returns; all by default. The others are joined when a send or receive
            first needs them, without blocking it: its ticket stays pending until then. What such a rank sends arrives
            all the same. A transport that joins everybody anyway ignores ``needed``.

        Raises
        ------
        ConnectError
            If not all that are needed are joined at the deadline; names them.
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
        What becomes of one peer, or of one message, is told by tickets and never raised here.

        Raises
        ------
        Closed
            If the endpoint was closed or aborted.
        """

    @abstractmethod
    def cancel(self, ticket: Ticket) -> bool:
        """End a pending ticket as CANCELLED; False where it has ended or can no longer be stopped.

        `poll` does not return a ticket that was cancelled so.
        """

    @abstractmethod
    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to tags that equal ``tag`` in all but their lowest ``bits`` bits, from any peer.

        Pending receives of such tags end as CANCELLED (they come out of the next poll), what has arrived unasked is
        dropped and its memory or credit given back, and what arrives later is dropped as well. A sender cannot tell:
        its ticket ends as if the message had been received. Pending sends of this endpoint and views that it has lent
        are left alone. A receive into whose memory a message is being written ends once that is over, so that memory
        is the caller's again when its ticket has ended.

        Posting a receive, or sending, with such a tag later on ends the dropping for that prefix. The last 4,096
        discarded prefixes are remembered. `detcoll.discarding.Discarded` keeps such a set.

        Raises
        ------
        UsageError
            If ``tag`` is out of range or ``bits`` is not from 0 to 64.
        """

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
    collective is done or the deadline passes; one thread at a time calls. ``arrays`` says how many arrays the caller
    coalesced into one, and ``name`` what it is called; transports that compare calls compare both.

    While a collective is under way, another thread may use the endpoint's send, recv, poll, arm, cancel and discard,
    and `Endpoint.abort` may come from any thread: it ends the collective, which then raises.

    What a collective raises, and what that means:

    - UsageError, before anything has moved: this call could not be used. It costs no other call, and the next
      collective of all ranks works. `Capabilities.supports` tells beforehand which kinds, types and operations can.
    - Anything else, KeyboardInterrupt and every other BaseException included: ranks may no longer be in step. The
      collective either finishes, or raises and takes care that every later one of this endpoint raises Closed at once
      instead of meeting what is left of this one. What the array holds is not defined, and a transport that cannot stop
      its library keeps that memory alive for it. The endpoint's messages go on unless the transport says otherwise.

    A collective that raises need not tell the other ranks: if it raises anything but UsageError, its caller (in
    detcoll the runner) fails the group on all ranks, and says which rank gave up and why.
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
    def all_reduce(self, array: NDArray[Any], op: ReduceOp, deadline_ns: int, arrays: int = 1, name: str = "") -> None:
        """Reduce ``array`` over all ranks, in place.

        On every rank NaN comes out of a minimum or maximum where any rank has one; `detcoll.extrema.comparable` helps
        libraries whose own loses it. An average of 16-bit floats must be right where the mean can be represented, if
        the sum cannot; see `detcoll.fold.widened`.
        """

    @abstractmethod
    def broadcast(self, array: NDArray[Any], root: int, deadline_ns: int, arrays: int = 1, name: str = "") -> None:
        """Copy ``array`` of ``root`` to all ranks."""

    @abstractmethod
    def barrier(self, deadline_ns: int, name: str = "") -> None:
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
