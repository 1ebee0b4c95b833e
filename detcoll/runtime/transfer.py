"""Sends and receives as the engine keeps them, and the notes that two ranks exchange about them.

A note is a record of `NOTE_BYTES`. Notes of one rank to another keep their order, so the announcements of messages
arrive in the order in which they were sent::

    ANNOUNCE  sender to receiver: number, key, tag, type, count; an eager message follows at once, or is in the note
    GRANT     receiver to sender: a receive waits for this message, send it; or, if it came unasked, it has found one
    TAKEN     receiver to sender: so many eager messages of so many bytes in all have found their receive; their keys
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from detcoll.errors import FrameError
from detcoll.runtime.group import MESSAGES, Group
from detcoll.runtime.operation import Span
from detcoll.runtime.ranges import Memory

ANY = -1
"""Instead of a rank: a receive takes a message of any source."""

LARGEST_TAG = 2**31 - 1

NOTE_BYTES = 128
_NOTE = struct.Struct("<BBBxIIQQQQ12s")
LARGEST_KEYS = (NOTE_BYTES - _NOTE.size) // 4
"""Keys that a note has room for."""
INLINE_BYTES = 64
"""A message of up to this size that has no name is a part of its announcement."""

_EAGER, _INLINE, _ASKS = 1, 2, 4

NEVER_NS = 2**63 - 1


class NoteKind(IntEnum):
    """What a note says; see the module."""

    ANNOUNCE = 0
    GRANT = 1
    TAKEN = 2


@dataclass(frozen=True, slots=True)
class Note:
    """A note about messages. ``number`` : counts the messages of the sender to the receiver.  ``key`` : its tags' own.

    ``tag``, ``dtype``, ``count``, ``name`` : of an announced message.  ``chunk_bytes`` : how it is cut.  ``is_eager`` :
    it is not waiting for a GRANT.  ``is_inline`` : it is ``payload``, in place of a name.  ``asks`` : its sender waits
    to hear that it has found its receive.  ``count``, ``nbytes``
    and ``keys`` of TAKEN: how many messages, their bytes, and the keys of those that had one.
    """

    kind: NoteKind
    number: int = 0
    tag: int = 0
    dtype: str = ""
    count: int = 0
    nbytes: int = 0
    chunk_bytes: int = 1
    is_eager: bool = False
    name: str = ""
    is_inline: bool = False
    payload: bytes = b""
    key: int = 0
    keys: tuple[int, ...] = ()
    asks: bool = False

    def pack(self, payload: bytes | memoryview = b"") -> bytes:
        """Encode the note as a record of `NOTE_BYTES`.  ``payload`` : the message, if it is a part of the note."""
        flags = self.is_eager * _EAGER | self.is_inline * _INLINE | self.asks * _ASKS
        tail = payload if self.is_inline else self.name.encode() or struct.pack(f"<{len(self.keys)}I", *self.keys)
        head = _NOTE.pack(
            self.kind, flags, len(tail), self.tag, self.key, self.number, self.count, self.nbytes, self.chunk_bytes,
            self.dtype.encode(),
        )  # fmt: skip
        return (head + tail).ljust(NOTE_BYTES, b"\0")

    @classmethod
    def unpack(cls, record: bytes) -> Note:
        """Decode a record.

        Raises
        ------
        FrameError
            If it holds no valid note.
        """
        try:
            kind, flags, length, tag, key, number, count, nbytes, chunk_bytes, dtype = _NOTE.unpack_from(record)
            tail, is_inline = record[_NOTE.size : _NOTE.size + length], bool(flags & _INLINE)
            keys: tuple[int, ...] = ()
            if kind == NoteKind.TAKEN:
                tail, keys = b"", struct.unpack(f"<{length // 4}I", tail)
            if is_inline and len(tail) != nbytes:
                raise ValueError(f"it holds {len(tail)} of {nbytes} bytes")
            name, payload = ("", tail) if is_inline else (tail.decode(), b"")
            of = dtype.rstrip(b"\0").decode()
            return cls(
                NoteKind(kind), number, tag, of, count, nbytes, chunk_bytes, bool(flags & _EAGER), name, is_inline,
                payload, key, keys, bool(flags & _ASKS),
            )  # fmt: skip
        except (struct.error, ValueError) as error:
            raise FrameError(f"invalid note about a message: {error}") from error


@dataclass(eq=False, slots=True)
class Transfer:
    """A call of send or recv. It has many fields because it holds the whole state of a call.

    ``peer`` : the rank of the job that it names, or `ANY`.  ``chunk_bytes`` : of a receive, as its sender says.
    ``memory`` : belongs to the driver; the engine does not use it.  ``spans``, ``order``, ``live_ns``, ``limit_ns``,
    ``reported``, ``over`` : as of an `Operation`.
    """

    group: Group
    is_send: bool
    peer: int
    tag: int
    dtype: str
    count: int
    nbytes: int
    timeout_ns: int
    called_ns: int
    chunk_bytes: int = 1
    ahead_bytes: int = 1
    spans: Sequence[Span] = ()
    name: str = ""
    memory: Any = None
    order: int = -1
    sequence: int = -1
    """Calls of collectives are numbered, transfers are not."""
    number: int = -1
    """Number of the message among those of its sender to its receiver, once it is known."""
    key: int = -1
    """Stands for the message in the tags of its chunks; of a receive once it has found its message."""
    source: int = -1
    """Of a receive that has found its message: the rank of the job that it comes from."""
    is_matched: bool = False
    """Whether a send was granted, or a receive has found its message."""
    is_eager: bool = False
    awaits_receive: bool = False
    """Of a send: its caller goes on when it has found its receive, however small it is."""
    is_free: bool = False
    """Whether no earlier call works on its memory any more."""
    is_on_device: bool = False
    """Whether the driver copies its values between a device and the host, which takes time: those of a send when it has
    begun, those of a receive when they have arrived."""
    is_copying: bool = False
    is_kept: bool = False
    """Whether the caller of a send goes on although the message, which was copied, has found no receive."""
    payload: bytes | None = None
    """Of a receive: the message, if it came in its announcement."""
    mate: Transfer | None = None
    """Of a matched message to this rank itself: the call at its other end."""
    next_chunk: int = 0
    done_bytes: int = 0
    queued: int = 0
    """Chunks that wait for the line."""
    under_way: dict[int, int] = field(default_factory=dict)
    """By chunk that is being sent or received, its bytes."""
    under_way_bytes: int = 0
    settled: set[int] = field(default_factory=set)
    """Chunks that will not arrive although they have not ended: their receive failed, or was never posted."""
    live_ns: int = 0
    limit_ns: int = NEVER_NS
    greets_ns: int = 0
    """Written by the line as for collectives; transfers greet nobody."""
    reported: bool = False
    over: bool = False

    @property
    def partner(self) -> int:
        """The rank of the job at the other end."""
        return self.peer if self.is_send or not self.is_matched else self.source

    @property
    def is_ready(self) -> bool:
        """Whether its memory may be sent from, or received into."""
        return self.is_free and not self.is_copying

    @property
    def what(self) -> str:
        """The call for people, without its group."""
        named = f" ({self.name})" if self.name else ""
        where = "any source" if self.peer == ANY else f"rank {self.peer}"
        way = f"send to {where}" if self.is_send else f"recv from {where}"
        return f"{way} of {self.count} {self.dtype}, tag {self.tag}{named}"

    @property
    def title(self) -> str:
        """The call's name in messages."""
        title = self.group.title
        return self.what + (f" of group {title}" if title else "")

    @property
    def awaits(self) -> str:
        """What it waits for."""
        if self.is_copying:
            return "what its caller queued on the device before, or the copy after that, has not ended"
        if not self.is_matched:
            who = "no rank of the group" if self.peer == ANY else f"rank {self.peer}"
            verb = "received" if self.is_send else "sent"
            return f"{who} has {'' if self.peer == ANY else 'not '}{verb} tag {self.tag}"
        if not self.is_free:
            return "an earlier call works on the same memory"
        done = f"{self.done_bytes} of {self.nbytes} bytes"
        if self.is_send:
            return f"rank {self.peer} has acknowledged {done} of tag {self.tag}"
        return f"rank {self.source} has sent {done} of tag {self.tag}"

    @property
    def open_receives(self) -> set[int]:
        """Chunks that may still be written into the caller's memory."""
        return set() if self.is_send else self.under_way.keys() - self.settled

    @property
    def written(self) -> Sequence[Span]:
        """The part of the caller's memory that the call may write to."""
        return () if self.is_send else self.spans

    def span(self, chunk: int) -> tuple[int, int]:
        """Return where a chunk begins and ends, in bytes."""
        begin = chunk * self.chunk_bytes
        return begin, min(begin + self.chunk_bytes, self.nbytes)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message that was announced and has found no receive. ``sender`` : the call, if it is one of this rank."""

    source: int
    note: Note
    sender: Transfer | None = None


@dataclass(eq=False, slots=True)
class Posting:
    """A note for ``peer``.  ``send`` : the transfer whose payload is a part of it, if one is."""

    mail: Mail
    group: Group
    peer: int
    note: Note
    send: Transfer | None = None
    sequence: int = -1

    @property
    def over(self) -> bool:
        """Whether its group has ended."""
        return self.mail.is_over


@dataclass(eq=False, slots=True)
class Pair:
    """What is under way between this rank and one other, in one group.

    ``sent`` : how many messages were announced to it.  ``heard`` : how many of it were taken in, in their order.
    ``ahead`` : by number, announcements that came before an earlier one.  ``awaiting`` : by number, sends that it has
    not granted.  ``unasked``, ``unasked_bytes`` : eager messages to it that have not found their receive there, as far
    as it has told.  ``owed``, ``owed_bytes``, ``owed_keys`` : eager messages of it that went to their receive here, and
    that it was not told of.  ``keys`` : those of messages to it that may be under way or wait there.  ``next_key`` :
    the first to be tried.  ``notes`` : how many notes to it had to wait for the line and are not acknowledged, so that
    further ones must wait behind them.
    """

    sent: int = 0
    heard: int = 0
    ahead: dict[int, Note] = field(default_factory=dict)
    awaiting: dict[int, Transfer] = field(default_factory=dict)
    unasked: int = 0
    unasked_bytes: int = 0
    owed: int = 0
    owed_bytes: int = 0
    owed_keys: list[int] = field(default_factory=list)
    keys: set[int] = field(default_factory=set)
    next_key: int = 0
    notes: int = 0

    def take_key(self) -> int:
        """Return a key that no message to the peer has, however long one of them has waited there.

        There are more keys than messages can wait, and each is used again as late as can be.
        """
        while self.next_key in self.keys:
            self.next_key = (self.next_key + 1) % MESSAGES
        key = self.next_key
        self.keys.add(key)
        self.next_key = (key + 1) % MESSAGES
        return key


@dataclass(eq=False, slots=True)
class Mail:
    """The messages of one group on one rank.

    ``pending`` : transfers that have not ended, in call order.  ``posted`` : by tag, receives that have found no
    message.  ``arrived`` : by tag, messages that have found no receive.  ``pairs`` : by rank; who is in it is listened
    to.  ``look_ns`` : no transfer is late before.  ``is_over`` : the group has ended.
    ``memory`` : that of ``pending``.
    """

    pending: dict[Transfer, None] = field(default_factory=dict)
    posted: dict[int, deque[Transfer]] = field(default_factory=dict)
    arrived: dict[int, deque[Arrived]] = field(default_factory=dict)
    pairs: dict[int, Pair] = field(default_factory=dict)
    look_ns: int = NEVER_NS
    is_over: bool = False
    memory: Memory = field(default_factory=Memory)

    def add(self, transfer: Transfer) -> None:
        """Take in a call, whose place in the order of calls is known."""
        self.pending[transfer] = None
        self.memory.add(transfer)

    def remove(self, transfer: Transfer) -> None:
        """Forget a call that has ended, if it is not forgotten yet."""
        if transfer in self.pending:
            del self.pending[transfer]
            self.memory.remove(transfer)

    def unended(self) -> Iterator[Transfer]:
        """Yield the transfers whose callers wait."""
        return (transfer for transfer in self.pending if not transfer.reported)

    def take_arrived(self, recv: Transfer) -> Arrived | None:
        """Take out the first message that fits a receive, if there is one."""
        letters = self.arrived.get(recv.tag)
        for at, letter in enumerate(letters or ()):
            if recv.peer in (ANY, letter.source):
                assert letters is not None
                del letters[at]
                if not letters:
                    del self.arrived[recv.tag]
                return letter
        return None

    def take_posted(self, source: int, tag: int) -> Transfer | None:
        """Take out the first receive that fits a message, if there is one."""
        receives = self.posted.get(tag)
        for at, recv in enumerate(receives or ()):
            if recv.peer in (ANY, source):
                assert receives is not None
                del receives[at]
                if not receives:
                    del self.posted[tag]
                return recv
        return None

    def progressed(self, transfer: Transfer, now_ns: int) -> None:
        """Restart the timeout of a transfer that has begun or made progress, if its caller still waits."""
        transfer.live_ns = now_ns
        if transfer.is_free and not transfer.reported:
            transfer.limit_ns = now_ns + transfer.timeout_ns
            self.look_ns = min(self.look_ns, transfer.limit_ns)

    def late(self, now_ns: int) -> Transfer | None:
        """Return a transfer whose time is over, or None; worth a call from `look_ns` on."""
        first = min(self.unended(), key=lambda transfer: transfer.limit_ns, default=None)
        self.look_ns = NEVER_NS if first is None else first.limit_ns
        return first if first is not None and first.limit_ns <= now_ns else None

    def clear(self) -> list[Transfer]:
        """Forget everything, since the group has ended; return the transfers that had not."""
        pending, self.is_over, self.look_ns = list(self.pending), True, NEVER_NS
        for held in (self.pending, self.posted, self.arrived, self.pairs, self.memory):
            held.clear()
        return pending
