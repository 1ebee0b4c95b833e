"""Messages in order, each once, over connections that come and go.

Each side numbers its pieces and keeps them until the other says that it has them. A new connection begins with a note
that says what has arrived; whatever is missing is handed over again. What arrives twice, or out of order because
something before it was lost, is dropped. At most `WINDOW` pieces are on their way at a time: the rest waits here, so
that ZeroMQ's queues stay short. This is the go-back-N protocol, without timers, since ZeroMQ loses messages only with
their connection.
"""

from __future__ import annotations

from collections import deque

from detcoll.errors import FrameError
from detcoll.rendezvous import wire

WINDOW = 16


class Link:
    """One side of a link; it knows no socket.

    Parameters
    ----------
    largest_bytes : int
        The largest message that is taken from the other side.
    backlog_bytes : int
        How much may wait to be acknowledged before `is_full`.
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
        """Whether the other side takes in too little."""
        return self._kept_bytes > self._backlog_bytes

    @property
    def has_waiting(self) -> bool:
        """Whether something has yet to be handed to the connection."""
        return bool(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether the other side has everything."""
        return not self._waiting and not self._flying

    def send(self, message: bytes) -> int:
        """Queue a message, and return the number that `acknowledged` has once the other side has it."""
        view = memoryview(message)
        starts = range(0, len(view), wire.PIECE_BYTES)
        for start in starts:
            self._number += 1
            piece = view[start : start + wire.PIECE_BYTES]
            self._waiting.append((self._number, wire.CONTINUES if start != starts[-1] else 0, piece))
            self._kept_bytes += len(piece)
        return self._number

    def frames(self) -> list[bytes]:
        """Return the frames to hand to the connection now."""
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
        """Return a frame that only says what has arrived."""
        return wire.frame(wire.Header(flags, 0, self._received))

    def restart(self) -> None:
        """Hand over again what is not acknowledged: it may have gone down with a connection."""
        self._waiting.extendleft(reversed(self._flying))
        self._flying.clear()
        self._owes_note = True

    def take(self, header: wire.Header, piece: bytes) -> bytes | None:
        """Take a frame in; return the message that it completes, if any.

        Raises
        ------
        FrameError
            If a message grows too large, or the other side acknowledges what was never sent.
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
