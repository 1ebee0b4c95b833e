"""What ranks tell each other beside their calls: why something ended, and whom a late call waits for.

Every message is a record of `CONTROL_BYTES` between two ranks that have to do with each other, under `CONTROL_TAG`. So
causes travel without rank 0, which may be the one that is gone.
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
"""In a `Cause`: all groups of the job."""

_KINDS = {kind.__name__: kind for kind in (DeadlineMissed, PeerLost, PlanMismatch, UsageError)}


class Cause(msgspec.Struct, frozen=True, tag="cause"):
    """Why a call (``sequence``), a whole group or the job (``group`` 0) ended, as ``rank`` found out first.

    ``lost`` : the rank that is gone, if that is why; every group with it ends.
    """

    group: int
    sequence: int
    kind: str
    text: str
    rank: int
    lost: int = -1

    @classmethod
    def of(cls, group: int, sequence: int, error: Exception, rank: int, lost: int = -1) -> Cause:
        """Return the cause that ``error`` is; a long text is cut."""
        text = str(error).encode()[:LARGEST_TEXT_BYTES].decode(errors="ignore")
        return cls(group, sequence, type(error).__name__, text, rank, lost)

    def error(self) -> DetcollError:
        """Return what it means on a rank that is told: an error of the same kind where that holds there too."""
        if self.kind in (PlanMismatch.__name__, PeerLost.__name__):
            return _KINDS[self.kind](self.text)
        kind = _KINDS.get(self.kind, TransportError)
        name = "" if self.kind == kind.__name__ else f"{self.kind}: "
        if kind is UsageError:
            return UsageError(f"rank {self.rank} refused the call: {self.text}")
        return kind(f"rank {self.rank} gave up: {name}{self.text.removeprefix(f'rank {self.rank}: ')}")


class State(Enum):
    """Where a rank stands in a call."""

    ABSENT = "absent"
    """It has not called it, and waits in no earlier call of the group."""
    AWAY = "away"
    """It is not in the group: it has closed it, or not opened it yet."""
    WAITING = "waiting"
    """It waits in this call or an earlier one of the group."""
    ENDED = "ended"
    """It has its result."""


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Asks where a rank stands in a call that has made no progress for ``timeout_ns`` where this comes from."""

    group: int
    sequence: int
    timeout_ns: int


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """``idle_ns`` : for how long one that waits has known of no progress.  ``latest`` : its latest call."""

    group: int
    sequence: int
    state: State
    idle_ns: int = 0
    latest: int = -1


Message = Cause | Ask | Answer


def pack(message: Message) -> bytes:
    """Return the record of a message."""
    body = msgspec.msgpack.encode(message)
    return (len(body).to_bytes(2, "little") + body).ljust(CONTROL_BYTES, b"\0")


def unpack(record: bytes) -> Message:
    """Return the message of a record.

    Raises
    ------
    FrameError
        If it is none.
    """
    try:
        body = record[2 : 2 + int.from_bytes(record[:2], "little")]
        message: Message = msgspec.msgpack.decode(body, type=Message)
    except msgspec.MsgspecError as error:
        raise FrameError(f"a control message that cannot be read: {error}") from error
    return message
