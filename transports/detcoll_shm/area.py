"""Where a producer places records in the area of a ring.

Records are placed in a circle, each after the one before, and are found free again in about the order in which they
were placed; so the oldest is the next one ahead, and one look per message is enough. A record that the consumer has
lent for longer is an obstacle that the circle passes by. Whoever wants more than any gap holds gets nothing: FULL
where the consumer has records to take (so waiting helps), STUCK where all that is in the way is lent.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from detcoll_shm.layout import WORD_BYTES, Record


class NoRoom(Enum):
    """Why there is no place for a record."""

    FULL = "the consumer has not taken what is there"
    STUCK = "what is in the way is lent"


class Area:
    """The producer's account of the records in one area.

    ``words`` : the ring's words.  ``at_bytes``, ``size_bytes`` : where in the ring the area lies.
    """

    __slots__ = ("_ahead", "_cursor", "_first_word", "_size", "_words")

    def __init__(self, words: memoryview[int], at_bytes: int, size_bytes: int) -> None:
        self._words = words
        self._first_word = at_bytes // WORD_BYTES
        self._size = size_bytes
        self._cursor = 0
        # Start and end of the records in use, in the order in which the circle meets them from the cursor on.
        self._ahead: deque[tuple[int, int]] = deque()

    def place(self, nbytes: int) -> int | NoRoom:
        """Return where a record of ``nbytes`` goes, and count it as used, or say why there is no room."""
        ahead, words, first = self._ahead, self._words, self._first_word
        while ahead and words[first + ahead[0][0] // WORD_BYTES] == Record.FREE:
            ahead.popleft()
        if not ahead:
            self._cursor = 0  # the start of the area is the warmest in the cache
        cursor = self._cursor
        limit = ahead[0][0] if ahead and ahead[0][0] >= cursor else self._size
        if limit - cursor < nbytes:
            found = self._search(nbytes)
            if isinstance(found, NoRoom):
                return found
            cursor = found
        self._cursor = cursor + nbytes
        ahead.append((cursor, self._cursor))
        return cursor

    def _search(self, nbytes: int) -> int | NoRoom:
        """Go round once from the cursor, past what is lent, to a gap of ``nbytes``."""
        ahead, words, first = self._ahead, self._words, self._first_word
        ends_left, wraps_left = len(ahead), 2
        while True:
            if not ahead:
                self._cursor = 0
                return 0 if nbytes <= self._size else NoRoom.STUCK
            start, end = ahead[0]
            if start < self._cursor:
                if self._size - self._cursor >= nbytes:
                    return self._cursor
                if wraps_left == 0:
                    return NoRoom.STUCK
                wraps_left -= 1
                self._cursor = 0
            elif start - self._cursor >= nbytes:
                return self._cursor
            elif (state := words[first + start // WORD_BYTES]) == Record.FREE:
                ahead.popleft()
            elif state == Record.FULL:
                return NoRoom.FULL
            elif ends_left < 0:
                return NoRoom.STUCK
            else:
                ends_left -= 1
                self._cursor = end
                ahead.rotate(-1)
