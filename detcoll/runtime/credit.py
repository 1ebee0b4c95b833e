"""What peers hold for each other: bytes sent to one that has not called yet, and bytes lent by a transport.

Both are counted for each peer over all groups, so that a call that is stuck never uses up what others need.
"""

from __future__ import annotations

from detcoll.runtime.operation import Operation

LARGEST_UNASKED_BYTES = 8 * 2**20
"""What a rank sends to one that has not called the same collective yet, over all groups: half of what the slotted
transport lets peers hold for each other, so that what an earlier collective needs always gets through."""

LARGEST_LENT_BYTES = 8 * 2**20
"""Of one peer, what may lie in its transport's memory; what cannot be folded yet and comes beyond it is copied, so that
a call that is stuck does not use up the credit of others."""

LARGEST_COPIED_BYTES = 128 * 2**20
"""What copies of lent bytes may take, over all peers; beyond it they stay with the transport."""


class Credit:
    """Counts for one rank what it sent unasked, and what others' messages take here until they are folded."""

    def __init__(self) -> None:
        self._unasked_bytes: dict[int, int] = {}
        self._lent_bytes: dict[int, int] = {}
        self._copied_bytes = 0

    def unasked_bytes(self, peer: int) -> int:
        """Return what was sent to a peer that has not said yet what it called."""
        return self._unasked_bytes.get(peer, 0)

    def lent_bytes(self, peer: int) -> int:
        """Return what came from a peer, waits for a fold and lies in the transport's memory."""
        return self._lent_bytes.get(peer, 0)

    @property
    def copied_bytes(self) -> int:
        """What copies take."""
        return self._copied_bytes

    def may_send_unasked(self, operation: Operation, peer: int, nbytes: int) -> bool:
        """Take note of a send to a rank that has not called yet; False if it holds enough already."""
        held_bytes = self.unasked_bytes(peer)
        if operation.unsent.get(peer) or (held_bytes and held_bytes + nbytes > LARGEST_UNASKED_BYTES):
            return False
        self._unasked_bytes[peer] = held_bytes + nbytes
        operation.unasked_bytes[peer] = operation.unasked_bytes.get(peer, 0) + nbytes
        return True

    def has_called(self, operation: Operation, peer: int) -> None:
        """Take note that a peer has called what this rank called."""
        nbytes = operation.unasked_bytes.pop(peer, 0)
        if nbytes:
            self._unasked_bytes[peer] -= nbytes

    def lend(self, operation: Operation, step: int) -> bool:
        """Count what a RECV lent and nothing can fold yet; True where it must be copied and the loan given back."""
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
        """Take note that what a RECV lent is not needed any more."""
        nbytes = operation.lent.pop(step, 0)
        if nbytes < 0:
            self._copied_bytes += nbytes
        elif nbytes:
            self._lent_bytes[operation.peer(step)] -= nbytes

    def drop(self, operation: Operation) -> None:
        """Take note that a call has ended early."""
        for peer in list(operation.unasked_bytes):
            self.has_called(operation, peer)
        for step in list(operation.lent):
            self.give_back(operation, step)
