"""Limits on buffered bytes: those sent to peers that have not called yet, and those held in a transport's memory.

Both are counted for each peer over all groups, so that a stuck call cannot use up the buffers that others need.
"""

from __future__ import annotations

from detcoll.runtime.operation import Operation

LARGEST_UNASKED_BYTES = 8 * 2**20
"""Limit of bytes sent, over all groups, to a peer that has not called the same collective yet. It is half of what the
slotted transport lets a peer buffer, so that the messages of an earlier collective always get through."""

LARGEST_UNTOLD_BYTES = 65_536
"""Bytes of messages that a peer may have taken without having told so. They do not count against collectives: the rest
of a few messages would else hold chunks of the next call back for a round trip."""

LARGEST_LENT_BYTES = 8 * 2**20
"""Limit of received bytes of one peer that stay in the transport's memory until they can be folded. Beyond it they are
copied, so that a stuck call does not use up the transport's credit for others."""

LARGEST_COPIED_BYTES = 128 * 2**20
"""Limit of bytes in such copies, over all peers; beyond it the bytes stay in the transport's memory."""


class Credit:
    """Counts for one rank the bytes that it sent unasked, and the received bytes that wait to be folded."""

    def __init__(self) -> None:
        self._unasked_bytes: dict[int, int] = {}
        self._message_bytes: dict[int, int] = {}
        self._lent_bytes: dict[int, int] = {}
        self._copied_bytes = 0

    def unasked_bytes(self, peer: int) -> int:
        """Return the bytes sent to a peer in calls that it has not confirmed yet, and in messages likewise."""
        return self._unasked_bytes.get(peer, 0) + self._message_bytes.get(peer, 0)

    def lent_bytes(self, peer: int) -> int:
        """Return the bytes received from a peer that wait in the transport's memory to be folded."""
        return self._lent_bytes.get(peer, 0)

    @property
    def copied_bytes(self) -> int:
        """The bytes held in copies."""
        return self._copied_bytes

    def may_send_unasked(self, operation: Operation, peer: int, nbytes: int) -> bool:
        """Count a send to a peer that has not called yet, and return True; return False if the send has to wait."""
        called_bytes = self._unasked_bytes.get(peer, 0)
        held_bytes = called_bytes + max(self._message_bytes.get(peer, 0) - LARGEST_UNTOLD_BYTES, 0)
        if operation.unsent.get(peer) or (held_bytes and held_bytes + nbytes > LARGEST_UNASKED_BYTES):
            return False
        self._unasked_bytes[peer] = called_bytes + nbytes
        operation.unasked_bytes[peer] = operation.unasked_bytes.get(peer, 0) + nbytes
        return True

    def has_called(self, operation: Operation, peer: int) -> None:
        """Release the credit for a peer that has now made this call."""
        nbytes = operation.unasked_bytes.pop(peer, 0)
        if nbytes:
            self._unasked_bytes[peer] -= nbytes

    def take_unasked(self, peer: int, nbytes: int) -> bool:
        """Count a message that a peer may not have asked for, and return True; False if there is no room for it."""
        if self.unasked_bytes(peer) + nbytes > LARGEST_UNASKED_BYTES:
            return False
        self._message_bytes[peer] = self._message_bytes.get(peer, 0) + nbytes
        return True

    def return_unasked(self, peer: int, nbytes: int) -> None:
        """Stop counting bytes of such messages."""
        self._message_bytes[peer] = self._message_bytes.get(peer, 0) - nbytes

    def lend(self, operation: Operation, step: int) -> bool:
        """Count the lent bytes of a RECV that cannot be folded yet; True if the caller must copy and release them."""
        peer, nbytes = operation.peer(step), operation.columns.nbytes[step]
        is_much = self.lent_bytes(peer) + nbytes > LARGEST_LENT_BYTES
        if is_much and self._copied_bytes + nbytes <= LARGEST_COPIED_BYTES:
            self._copied_bytes += nbytes
            operation.lent[step] = -nbytes
            return True
        self._lent_bytes[peer] = self.lent_bytes(peer) + nbytes
        operation.lent[step] = nbytes
        return False

    def give_back(self, operation: Operation, step: int) -> None:
        """Stop counting the bytes of a RECV, which are not needed any more."""
        nbytes = operation.lent.pop(step, 0)
        if nbytes < 0:
            self._copied_bytes += nbytes
        elif nbytes:
            self._lent_bytes[operation.peer(step)] -= nbytes

    def drop(self, operation: Operation) -> None:
        """Stop counting all bytes of a call that has ended early."""
        for peer in list(operation.unasked_bytes):
            self.has_called(operation, peer)
        for step in list(operation.lent):
            self.give_back(operation, step)
