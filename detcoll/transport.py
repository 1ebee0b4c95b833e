"""The service provider interface (SPI) of transports: what a transport implements, and what it may rely on.

A transport moves messages between the ranks of one job. It knows nothing of plans, collectives or calendars. It gets
tagged sends and receives and, if it can hold a send until a window opens (``timed``), windows.

Every transport gives these guarantees, which `detcoll.testing.TransportContract` checks:

- A message is matched by (source, tag). Messages from one source with the same tag match in the order in which they
  were sent; messages with different tags match in any order.
- A receive accepts only messages of exactly its size; with any other size it fails with FrameError.
- `Endpoint.send` borrows the view until its ticket ends. `Endpoint.recv` with ``into`` owns that memory until its
  ticket ends. A receive without ``into`` lends a read-only view of the message until `Ticket.release`.
- Tags are whole numbers of 64 bits, and all bits are compared.
- Sends and receives never block. `Endpoint.poll` is the only wait, and never waits past its deadline.
- An endpoint holds a bounded number of bytes for which no receive was posted, so a send that its receiver does not take
  may stay pending. `detcoll.mailbox` has such a bound, and all else that receives need.
- Only one thread at a time uses an endpoint, and the caller synchronises threads. While one thread is inside a native
  collective, another may use the endpoint's send, recv, poll, arm, cancel and discard (one thread at a time), and
  neither waits for the other. Messages and collectives do not interfere.
- The loss of a peer affects only its own tickets: pending ones end FAILED with PeerLost, and later sends and receives
  raise PeerLost or end the same way. A receive still gets a message that had arrived before. `poll` does not raise for
  a lost peer, and messages of other peers go on.
- `Endpoint.discard` drops the data held for tags that will not be received any more.
- `Endpoint.close` and `Endpoint.abort` leave nothing behind: no process, no socket, no shared memory.

Times are nanoseconds of the endpoint's clock (`Clock.now_ns`, the local monotonic clock).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from detcoll.descriptor import Announcement, announce
from detcoll.errors import DetcollError, UsageError
from detcoll.signature import signature_of
from detcoll.types import DTYPES, ReduceOp, operators_of

SMALLEST_PART_BYTES = 16_384
"""A part of a message is sent only if it has at least this size; for less, two more frames would cost too much."""

LARGEST_TAG = 2**64 - 1
"""The largest tag; the smallest is 0."""

TAG_BITS = 64
"""The number of bits in a tag."""


class Scope(Enum):
    """How far apart the ranks that a transport connects may be."""

    HOST = "one host"
    SITE = "one site"
    ANYWHERE = "anywhere"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capabilities of a transport.

    ``timed``: it holds a send until its window opens, and ends the send as MISSED if it does not fit any more.
    ``splits``: it then sends the part that fits; see `Ticket`.
    ``native``: names of its native collectives. Those that reduce support ``native_dtypes`` with ``native_ops``, except
    for the pairs of a type's name and an operation in ``native_lacks``; see `supports`.
    ``native_uneven``: those of them that take blocks of different sizes.
    ``native_blocks_bytes``: the largest size of all blocks together that a native collective of blocks moves.
    ``native_groups``: it has native collectives for groups of its ranks too; see `NativeCollectives.group`.
    ``native_devices``: they take arrays on devices themselves; see `NativeCall`.
    ``ordered``: its native collectives fold in the order of the groups given to `NativeCollectives.arrange` and compare
    the calls of the ranks, so reproducible results need no plan.
    ``largest_message_bytes``: a larger send raises UsageError.
    ``frame_bytes``: largest overhead in bytes of a message, and of each part of one.
    """

    scope: Scope
    timed: bool = False
    splits: bool = False
    native: frozenset[str] = frozenset()
    native_dtypes: frozenset[str] = frozenset()
    native_ops: frozenset[ReduceOp] = frozenset()
    native_lacks: frozenset[tuple[str, ReduceOp]] = frozenset()
    native_uneven: frozenset[str] = frozenset()
    native_blocks_bytes: int = 2**31 - 1
    native_groups: bool = False
    native_devices: bool = False
    ordered: bool = False
    largest_message_bytes: int = 2**30
    frame_bytes: int = 128

    def supports(self, kind: str, dtype: np.dtype[Any], op: ReduceOp, nbytes: int = 0, *, uneven: bool = False) -> bool:
        """Return whether the transport has this native collective; if not, calling it raises UsageError.

        ``op`` applies to collectives that reduce; the others support all of `detcoll.types.DTYPES`. ``nbytes`` is the
        size of all blocks together, ``uneven`` says whether blocks differ in size. The result depends only on the
        arguments, which ranks compare, so that all ranks choose the same way to execute a call.
        """
        if kind not in self.native or (uneven and kind not in self.native_uneven):
            return False
        signature = signature_of(kind)
        if signature.has_out and nbytes > self.native_blocks_bytes:
            return False
        if not signature.has_op:
            return dtype.name in DTYPES
        if dtype.name not in self.native_dtypes or op not in self.native_ops:
            return False
        return op in operators_of(dtype) and (dtype.name, op) not in self.native_lacks


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which a send may use the line, in nanoseconds of the endpoint's clock, and its rate.

    A timed transport starts the send at or after ``not_before_ns``, and sends only as much as has left by
    ``not_after_ns`` at ``rate_bytes_per_s`` (of payload). ``not_after_ns`` None: no end, only the rate applies.
    """

    not_before_ns: int
    not_after_ns: int | None
    rate_bytes_per_s: float

    def takes_ns(self, nbytes: int) -> int:
        """Return the transmission time of ``nbytes`` at the window's rate."""
        return int(nbytes / self.rate_bytes_per_s * 1e9)

    def fitting_bytes(self, nbytes: int, begin_ns: int, frame_bytes: int) -> int:
        """Return how many bytes of a message fit into the window from ``begin_ns`` on.

        The result is ``nbytes``, a part of at least `SMALLEST_PART_BYTES`, or 0. ``frame_bytes`` is the overhead that
        the transport adds to a message, and to each part of one.
        """
        begin_ns = max(begin_ns, self.not_before_ns)
        if self.not_after_ns is None or begin_ns + self.takes_ns(nbytes + frame_bytes) <= self.not_after_ns:
            return nbytes
        part = int((self.not_after_ns - begin_ns) * self.rate_bytes_per_s / 1e9) - frame_bytes
        return part if part >= SMALLEST_PART_BYTES else 0


class TicketKind(Enum):
    """The operation that a ticket represents."""

    SEND = "send"
    RECV = "recv"


class TicketStatus(Enum):
    """Status of a send or receive; all but PENDING are final."""

    PENDING = "pending"
    DONE = "done"
    MISSED = "missed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class Ticket:
    """A send or receive.

    ``view`` : of a finished receive without ``into``, a memoryview of bytes that is valid until `release`.
    ``error`` : why it FAILED.  ``started_ns``/``left_ns``/``ended_ns`` : when a send was passed to the network, when
    its last byte had left at its pace, and when the ticket ended; 0 if the transport does not know.  ``context`` :
    belongs to the caller; transports do not use it.
    ``sent_bytes`` : of a MISSED send, how many of its first bytes were sent. The next send to the same peer with the
    same tag must send the rest, and the receiver gets a single message.
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
        """Return the lent view to the transport, which may reuse its memory. Does nothing if there is none."""
        lender, self.lender, self.view = self.lender, None, None
        if lender is not None:
            lender.take_back(self)


class Clock(Protocol):
    """A monotonic clock."""

    def now_ns(self) -> int:
        """Return the time in nanoseconds."""


class Rendezvous(Protocol):
    """The part of the rendezvous that a transport may use while it opens."""

    @property
    def host(self) -> str:
        """The address or host name to give to other ranks, which reach this one there."""

    @property
    def listen_host(self) -> str:
        """The numeric address to listen at; that of all interfaces where others reach this rank at another one."""

    def exchange(self, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
        """Contribute ``payload`` and return the payloads of all ranks in rank order; all ranks must call it.

        Calls are matched by ``name``, and calls with the same name in the order in which each rank makes them.

        Raises
        ------
        ConnectError
            If not all ranks called it before the deadline; names the missing ones.
        PeerLost
            If a rank is lost.
        """


class Endpoint(ABC):
    """The endpoint of one rank in a transport."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The address of this endpoint for other ranks; its format is private to the transport."""

    @abstractmethod
    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Store the addresses of other ranks, and connect to those in ``needed``.

        Parameters
        ----------
        addresses : Mapping of int to str
            `address` of each rank that messages may be exchanged with. An entry for this rank is ignored.
        deadline_ns : int
            When to give up.
        needed : Collection of int, optional
            The ranks to connect to before this returns; by default all. The others are connected when a send or receive
            first needs them. That does not block: its ticket stays pending until then. Messages from ranks that are not
            connected yet arrive as well. A transport that always connects to all ranks ignores ``needed``.

        Raises
        ------
        ConnectError
            If not all needed ranks are connected at the deadline; names the missing ones.
        """

    def apart(self, addresses: Mapping[int, str]) -> Mapping[int, str]:
        """Try which of these ranks cannot be connected from here, and return them, each with the reason.

        Called before `connect`, of transports for ranks of one host: there, containers may keep ranks from each other.
        """
        return {}

    @abstractmethod
    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Send ``view`` (contiguous bytes, borrowed until the ticket ends) to rank ``dst``.

        Raises
        ------
        UsageError
            If ``dst`` was not connected, ``tag`` is out of range or the message is too large.
        PeerLost, Closed
            If the peer is lost or the endpoint is closed.
        """

    @abstractmethod
    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Receive exactly ``nbytes`` from rank ``src`` into writable ``into``; without it, lend a view of the message.

        Raises
        ------
        UsageError
            If ``src`` was not connected, ``tag`` is out of range, or ``into`` does not fit.
        PeerLost, Closed
            If the peer is lost or the endpoint is closed.
        """

    @abstractmethod
    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Return the tickets that ended since the last call; wait until there is one or the deadline passes.

        The result is empty if the deadline passed, or if the endpoint woke up without a ticket having ended. Failures
        of single peers or messages are reported by tickets and never raised here.

        Raises
        ------
        Closed
            If the endpoint was closed or aborted.
        """

    @abstractmethod
    def cancel(self, ticket: Ticket) -> bool:
        """End a pending ticket as CANCELLED and return True; False if it has ended or cannot be stopped any more.

        `poll` does not return a ticket that was cancelled this way.
        """

    @abstractmethod
    def discard(self, tag: int, bits: int) -> None:
        """Drop messages from any peer whose tags equal ``tag`` in all but their lowest ``bits`` bits.

        Pending receives of such tags end as CANCELLED (the next poll returns them). Messages that have arrived without
        a receive are dropped, and their memory or credit is released. Messages that arrive later are dropped as well.
        The sender does not notice: its ticket ends as if the message had been received. Pending sends and lent views
        of this endpoint are not affected. If a message is just being written into the memory of a receive, the receive
        ends only afterwards, so that the memory belongs to the caller once the ticket has ended.

        A later receive or send with such a tag ends the dropping for that prefix. The endpoint remembers the last 4,096
        discarded prefixes; `detcoll.discarding.Discarded` implements such a set.

        Raises
        ------
        UsageError
            If ``tag`` is out of range or ``bits`` is not from 0 to 64.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop everything at once, without notice to peers. Any later use raises Closed. Idempotent."""

    @abstractmethod
    def close(self, deadline_ns: int) -> None:
        """Finish pending sends and release all resources; at the deadline drop the remaining sends. Idempotent."""

    def fileno(self) -> int | None:
        """Return a file descriptor that is readable when `poll` would return at once, or None if there is none.

        A caller with several endpoints waits on their descriptors, and polls endpoints without one periodically.
        """
        return None

    def arm(self, deadline_ns: int) -> bool:
        """Prepare for a wait on `fileno`; return True if `poll` has nothing to return yet.

        ``deadline_ns`` is the end of the caller's wait. After True, until the next call of any method, the descriptor
        becomes readable as soon as `poll` would return a ticket.
        """
        return True

    def keep_time(self) -> None:  # noqa: B027 - most transports have no windows
        """Start the sends that are due. Cheap and non-blocking; a busy caller calls it between pieces of work."""

    def counters(self) -> Mapping[str, int]:
        """Return the transport's counters (retransmits, missed windows, ...), by name."""
        return {}

    def connections(self) -> list[dict[str, object]]:
        """Return the network connections in use: ``dst``, ``lane``, ``local`` and ``remote`` as ``ip:port``."""
        return []


class DeviceCopy(Protocol):
    """A copy between a device and the host that was begun."""

    @property
    def error(self) -> DetcollError | None:
        """Why it failed, once it is past; then its target holds unspecified values."""

    def is_past(self) -> bool:
        """Ask the device whether the copy ended, so that its memory may be used again; never blocks."""


class DeviceArray(Protocol):
    """An array of a call where it lies on a device. One thread at a time uses it, and only during `run`.

    Methods raise DeviceError if the device is of no use any more.
    """

    def is_ready(self) -> bool:
        """Tell whether what the caller had queued on the device before the call is done; no copy begins before."""

    def begin(self, begin: int, end: int, host: NDArray[np.uint8], *, to_device: bool) -> DeviceCopy:
        """Copy bytes ``[begin, end)``, which are whole elements, to or from ``host``; in each direction in order.

        ``host`` is used until the copy is past. If it is not pinned, this blocks.
        """

    def pin(self, memory: NDArray[np.uint8]) -> Callable[[], None]:
        """Pin memory that copies use, and return what ends that; until then the memory stays alive.

        It must not be ended while a copy uses the memory. Memory that the system does not pin stays as it is.
        """


class NativeCall(msgspec.Struct, frozen=True):
    """One call of a native collective.

    Arrays are one-dimensional, contiguous and of one type. ``array`` is writable and gets the result; a collective on
    one array reads it too. ``source`` is the input of a collective that has another, maybe read-only, else None. It may
    be the same memory as ``array``, or the part of it (or hold as a part what) this rank contributes or gets; otherwise
    the two do not overlap. Where a rank has no input or no output, that array is empty.

    ``count`` : elements of the whole collective, the same on all ranks: of ``array`` where there is no ``source``, of
    the input of a reduction, of all blocks together where each rank has one.  ``counts``, ``out_counts`` : elements of
    the ranks' blocks where they differ in size, see `detcoll.plan.Collective`.  ``root`` : a rank of the group.
    ``arrays`` : how many arrays the caller coalesced into one.  ``name`` : what the caller calls it.  ``sequence`` :
    number of the call in its group, or -1 where calls are not numbered; calls of different numbers do not fit together.
    ``cut`` : the elements that each array of a list has in a block; empty for one array.  ``shape`` : what ranks
    compare of the shapes of their arrays, for people; empty where these may differ.
    ``device`` : where the values are, if they are on a device and the transport says ``native_devices``; only a
    collective on one array has it. Then ``array`` has only the type and the size, and no memory behind its elements.
    Before `run` returns or raises, all copies are past, as long as the device ends them at all.
    ``timeout_ns`` : what the caller allows the call, 0 if that is not known; for people, `run` has the deadline.
    """

    kind: str
    array: NDArray[Any]
    count: int
    op: ReduceOp = ReduceOp.SUM
    root: int = 0
    source: NDArray[Any] | None = None
    counts: tuple[int, ...] = ()
    out_counts: tuple[int, ...] = ()
    arrays: int = 1
    name: str = ""
    sequence: int = -1
    cut: Sequence[int] = ()
    shape: str = ""
    device: DeviceArray | None = None
    timeout_ns: int = 0

    @property
    def announcement(self) -> Announcement:
        """What ranks compare about the call, but for its number; see `Announcement.numbered`."""
        return announce(
            self.kind,
            self.op.value,
            self.array.dtype,
            self.count,
            self.root,
            self.arrays,
            self.name,
            self.counts,
            tuple(self.cut),
            self.shape,
        )


class NativeCollectives(ABC):
    """Native collectives of one group of ranks; the endpoint implements this class too, for all ranks.

    `run` blocks until the collective is done or the deadline passes; only one thread at a time calls it. Those of
    different groups are called by different threads at a time, and none waits for another. Transports that compare
    calls compare `NativeCall.announcement` and the number of the call. Ranks in calls are numbered within the group.

    During a collective, another thread may use the endpoint's send, recv, poll, arm, cancel and discard.
    `Endpoint.abort` may be called from any thread; it ends the collectives of all groups, which then raise.

    Errors of a collective:

    - UsageError, before any data has moved: the arguments are not valid. No other call is affected, and the next
      collective of all ranks works. `Capabilities.supports` tells in advance which kinds, types and operators are
      supported.
    - Anything else, including KeyboardInterrupt and every other BaseException: ranks may be out of step. A collective
      that raises ensures that every later collective of this group raises Closed at once, so that it does not match
      the rest of this one. The content of the array is undefined, and a transport that cannot stop its library keeps
      the memory alive for it. Messages of the endpoint and collectives of other groups go on unless the transport says
      otherwise.

    A collective that raises need not tell the other ranks: on any error but UsageError its caller (the runner in
    detcoll) fails the group on all ranks and tells them which rank gave up, and why.

    What the collectives promise: what `Capabilities.supports` does not name is refused before anything moves;
    `detcoll.types.check_op` says which operations a type has. A minimum or maximum gives NaN on all ranks if any rank
    has one, and libraries may know neither bool nor complex numbers; `detcoll.extrema.comparable` is for both. An
    average of 16-bit floats is correct if the mean can
    be represented, even if the sum cannot; see `detcoll.fold.widened`. An input that is not also the output keeps its
    values.
    """

    def arrange(self, groups: Sequence[Sequence[int]]) -> None:  # noqa: B027 - most have a fold order of their own
        """Set the groups of ranks for the fold order, once, before the first collective; by default one group.

        An ``ordered`` transport folds the ranks of each group in the given order, then the groups in their order,
        always as ``op(lower, higher)``. Folds inside groups are one level, folds between groups another. 16-bit floats
        are folded in float32 and rounded once for each level. Their average is a mean at each level; that of other
        types is divided once, after the last fold. `detcoll.fold.fold_groups` implements this.
        """

    def allocate(self, nbytes: int) -> memoryview | None:
        """Return writable memory that collectives use without staging, or None if the transport has none.

        The memory lives as long as it is referenced, and any part of it may be passed to a collective.
        """
        return None

    def group(self, ranks: Sequence[int], key: int, deadline_ns: int) -> NativeCollectives:
        """Return the native collectives of a group; `Capabilities.native_groups` says that there are some.

        All members call it once with the same arguments. Several groups may be made at a time, by different threads.

        Parameters
        ----------
        ranks : sequence of int
            The members as they are numbered here, in the order of their numbers in the group.
        key : int
            From 0 to 2**64 - 1, different for each group.
        deadline_ns : int
            When to give up.

        Raises
        ------
        UsageError
            If the transport has none for groups.
        TransportError
            If they cannot be made. Other members may have made theirs; they `leave` them.
        """
        raise UsageError("this transport has no native collectives for groups")

    def leave(self, *, clean: bool) -> None:  # noqa: B027 - of the endpoint itself, `close` and `abort` do this
        """Give the resources of a group back; no later call is taken. Idempotent.

        ``clean`` : no collective is under way or has failed, and all members call this. Otherwise what cannot be given
        back safely is kept until the process ends. The end of the endpoint ends its groups as well.
        """

    def stop(self) -> None:  # noqa: B027 - without it, a call under way ends at its deadline
        """End the call of this group that is under way on another thread, which then raises, and take no later one.

        The caller of `run` knows why. Messages and collectives of other groups go on unless the transport says
        otherwise. Any thread may call it; it does not wait for the call.
        """

    @abstractmethod
    def run(self, call: NativeCall, deadline_ns: int) -> None:
        """Carry out one call, and return when this rank has its result and may use its input again."""

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """The name of its algorithm in traces and results, such as ``"mpi-native"``."""


class Transport(ABC):
    """A transport; registered under the entry-point group ``detcoll.transports``."""

    name: str
    capabilities: Capabilities
    options: frozenset[str] = frozenset()
    """Names of the options that `open` accepts; options of the job (``insecure``, ``ports``, ``congestion``, ...) are
    passed to the transports that list them."""

    @abstractmethod
    def open(self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]) -> Endpoint:
        """Open this rank's endpoint. All ranks of the job call it, in the same order of transports.

        Raises
        ------
        TransportUnavailable
            If something that it needs is missing; nothing is left open.
        UsageError
            If an option is unknown or not valid.
        """


def byte_view(array: NDArray[Any]) -> memoryview:
    """Return the memory of a contiguous array as a flat memoryview of bytes; read-only if the array is."""
    return array.reshape(-1).view(np.uint8).data.cast("B")


def host_identity() -> str:
    """Return a string that is equal for processes of one kernel: the boot id, or else the host name.

    Only these can share memory. Whether they may is found by trying, see `Endpoint.apart`.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename
