"""What the engine tells its driver to do: tuples whose first entry is an `Act`."""

from __future__ import annotations

from enum import IntEnum


class Act(IntEnum):
    """What a driver is to do; the fields that follow in the action are given here."""

    OPEN = 0
    """operation: load the caller's values, lay out scratch."""
    RECV = 1
    """operation, step: post the receive."""
    SEND = 2
    """operation, step, queued or None, window or None: send, what of ``queued`` is left."""
    HELLO = 3
    """operation, peer: send the descriptor."""
    AWAIT_HELLO = 4
    """operation, peer: post the receive of the peer's descriptor."""
    COPY = 5
    """operation, step: copy what the RECV lent and give the loan back."""
    FINISH = 6
    """operation, error or None: the caller's array is finished, or the call failed."""
    CLOSE = 7
    """operation: scratch may be used again."""
    LISTEN = 8
    """peer: post a receive for its control messages."""
    TELL = 9
    """peer, message: send a control message."""
    ANNOUNCE = 10
    """cause: tell it to whomever the rendezvous reaches."""
    DISCARD = 11
    """tag, bits: drop what belongs to these tags."""
    RECORD = 12
    """reason: write the flight record, since a group has failed."""
    LIFT = 13
    """tag, ranks: stop discarding messages that these ranks send for the call of this tag."""
    MAIL = 14
    """verb of `detcoll.runtime.messages`, and its fields: something about send and recv."""
    STOP = 15
    """group, error: end its native collectives, since the group has failed."""
    ONSITE = 16
    """operation, step: let the site's devices do it; all ranks of the site have confirmed the call."""
