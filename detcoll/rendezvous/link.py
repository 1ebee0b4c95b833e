"""Exactly-once, in-order message delivery across reconnects.

Each side numbers its pieces and keeps them until the other side acknowledges them. Each new connection begins with a
note that acknowledges what has arrived, and unacknowledged pieces are sent again. Duplicates, and pieces that follow a
gap, are dropped. At most `WINDOW` pieces are in flight; the rest waits here, so that ZeroMQ's queues stay short. This
is go-back-N without retransmission timers, because ZeroMQ loses messages only when a connection ends.
"""

from __future__ import annotations

from collections import deque

from detcoll.errors import FrameError
from detcoll.rendezvous import wire

WINDOW = 16


class Link:
    """One side of a link, without a socket.

    Parameters
    ----------
    largest_bytes : int
        The largest message accepted from the other side.
    backlog_bytes : int
        `is_full` is set once more than this is queued or unacknowledged.
    """

    def __init__(self, largest_bytes: int, backlog_bytes: int = 2 * wire.MESSAGE_BYTES) -> None:
        self._largest_bytes, self._backlog_bytes = largest_bytes, backlog_bytes
        self._waiting: deque[tuple[int, int, memoryview]] = deque()
        self._flying: deque[tuple[int, int, memoryview]] = deque()
        self._kept_bytes = 0
        self._number = self._received = self.acknowledged = 0
        self._partial = bytearray()
        self._owes_note = False

    @property
    def is_full(self) -> bool:
        """Whether the backlog exceeds its limit because the other side acknowledges too slowly."""
        return self._kept_bytes > self._backlog_bytes

    @property
    def has_waiting(self) -> bool:
        """Whether pieces wait to be sent."""
        return bool(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether the other side has acknowledged everything."""
        return not self._waiting and not self._flying

    def send(self, message: bytes) -> int:
        """Queue a message and return the number of its last piece; it has arrived once `acknowledged` reaches that."""
        view = memoryview(message)
        starts = range(0, len(view), wire.PIECE_BYTES)
        for start in starts:
            self._number += 1
            piece = view[start : start + wire.PIECE_BYTES]
            self._waiting.append((self._number, wire.CONTINUES if start != starts[-1] else 0, piece))
            self._kept_bytes += len(piece)
        return self._number

    def frames(self) -> list[bytes]:
        """Return the frames that the window allows to send now, or a bare acknowledgement if only that is due."""
        made = []
        while self._waiting and len(self._flying) < WINDOW:
            number, flags, piece = self._waiting.popleft()
            self._flying.append((number, flags, piece))
            made.append(wire.frame(wire.Header(flags, number, self._received), piece))
        if self._owes_note and not made:
            made.append(self.note())
        self._owes_note = False
        return made

    def note(self, flags: int = 0) -> bytes:
        """Return a frame that only acknowledges what has arrived."""
        return wire.frame(wire.Header(flags, 0, self._received))

    def restart(self) -> None:
        """Requeue all unacknowledged pieces: they may have been lost with the old connection."""
        self._waiting.extendleft(reversed(self._flying))
        self._flying.clear()
        self._owes_note = True

    def take(self, header: wire.Header, piece: bytes) -> bytes | None:
        """Process a received frame; return the message that it completes, if any.

        Raises
        ------
        FrameError
            If a message is too large, or the other side acknowledges a piece that was never sent.
        """
        self._acknowledge(header.received)
        if header.number == 0:
            return None
        self._owes_note = True
        if header.number != self._received + 1:
            return None
        self._received += 1
        self._partial += piece
        if len(self._partial) > self._largest_bytes:
            raise FrameError(f"a message exceeds {self._largest_bytes} bytes")
        if header.flags & wire.CONTINUES:
            return None
        message, self._partial = bytes(self._partial), bytearray()
        return message

    def _acknowledge(self, received: int) -> None:
        if received > self._number:
            raise FrameError(f"piece {received} is acknowledged, but {self._number} is the last that was sent")
        self.acknowledged = max(self.acknowledged, received)
        for queue in (self._flying, self._waiting):
            while queue and queue[0][0] <= received:
                self._kept_bytes -= len(queue.popleft()[2])
