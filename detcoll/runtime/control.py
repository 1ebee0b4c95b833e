"""Control messages between ranks: causes of failures, questions and answers about late calls, what was called.

Every message is a record of `CONTROL_BYTES` with tag `CONTROL_TAG`, sent directly between two ranks that exchange data.
So causes do not depend on rank 0, which may be the lost rank.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from detcoll.errors import DeadlineMissed, DetcollError, FrameError, PeerLost, PlanMismatch, TransportError, UsageError

CONTROL_BYTES = 1024
CONTROL_TAG = 0
LARGEST_TEXT_BYTES = 800
WHOLE_GROUP = -1
JOB_ID = 0
"""The group id in a `Cause` that ends all groups of the job."""

_KINDS = {kind.__name__: kind for kind in (DeadlineMissed, PeerLost, PlanMismatch, UsageError)}


class Cause(msgspec.Struct, frozen=True, tag="cause"):
    """Why a call (``sequence``), a whole group (`WHOLE_GROUP`) or the job (`JOB_ID`) ended, as found out by ``rank``.

    ``lost`` : the lost rank, if that is the cause; all groups with it end. Otherwise -1.
    """

    group: int
    sequence: int
    kind: str
    text: str
    rank: int
    lost: int = -1

    @classmethod
    def of(cls, group: int, sequence: int, error: Exception, rank: int, lost: int = -1) -> Cause:
        """Return the cause for ``error``; its text is truncated to `LARGEST_TEXT_BYTES`."""
        text = str(error).encode()[:LARGEST_TEXT_BYTES].decode(errors="ignore")
        return cls(group, sequence, type(error).__name__, text, rank, lost)

    def error(self) -> DetcollError:
        """Return the error to raise on a rank that receives this cause: of the same kind if that applies there too."""
        if self.kind in (PlanMismatch.__name__, PeerLost.__name__):
            return _KINDS[self.kind](self.text)
        kind = _KINDS.get(self.kind, TransportError)
        name = "" if self.kind == kind.__name__ else f"{self.kind}: "
        if kind is UsageError:
            return UsageError(f"rank {self.rank} refused the call: {self.text}")
        return kind(f"rank {self.rank} gave up: {name}{self.text.removeprefix(f'rank {self.rank}: ')}")


class State(Enum):
    """State of a rank in a call."""

    ABSENT = "absent"
    """The rank has not made the call, and is in no earlier call of the group."""
    AWAY = "away"
    """The rank is not in the group: it has closed it, or has not opened it yet."""
    WAITING = "waiting"
    """The rank is in this call or an earlier one of the group."""
    QUEUED = "queued"
    """The rank has made the call, which is queued behind another that uses the same memory."""
    ENDED = "ended"
    """The call has ended on the rank."""


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Asks for a rank's state in a call that has made no progress on the sender for ``timeout_ns``."""

    group: int
    sequence: int
    timeout_ns: int


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """The answer to an `Ask`.

    ``idle_ns`` : if WAITING or QUEUED, the time since the last known progress.  ``latest`` : sequence of the rank's
    latest call.  ``doing`` : if WAITING in an earlier call or QUEUED, what the rank does instead, for people.
    """

    group: int
    sequence: int
    state: State
    idle_ns: int = 0
    latest: int = -1
    doing: str = ""


class Planned(msgspec.Struct, frozen=True, tag="planned"):
    """Says that the sender's call of this number goes through a plan, and waits to hear what the receiver called.

    ``called`` : what it is, for people.
    """

    group: int
    sequence: int
    called: str


Message = Cause | Ask | Answer | Planned


def pack(message: Message) -> bytes:
    """Encode a message as a record of `CONTROL_BYTES`."""
    body = msgspec.msgpack.encode(message)
    return (len(body).to_bytes(2, "little") + body).ljust(CONTROL_BYTES, b"\0")


def unpack(record: bytes) -> Message:
    """Decode a record.

    Raises
    ------
    FrameError
        If it holds no valid message.
    """
    try:
        body = record[2 : 2 + int.from_bytes(record[:2], "little")]
        message: Message = msgspec.msgpack.decode(body, type=Message)
    except msgspec.MsgspecError as error:
        raise FrameError(f"invalid control message: {error}") from error
    return message
