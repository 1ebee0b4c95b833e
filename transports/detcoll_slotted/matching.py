"""Matching what arrives with what was asked for, by source and tag, without any I/O.

A receive waits until its message comes, a message that came unasked until its receive is posted. Both queue in order.

A *discarded prefix* stands for all tags that are equal but for their lowest bits. What belongs to it is dropped, and
goes on being dropped as it arrives, until somebody uses such a tag again.
"""

from __future__ import annotations

from collections import deque

from detcoll.discarding import Discarded, has_prefix
from detcoll.transport import Ticket

Key = tuple[int, int]
"""Source and tag."""


class Mailbox:
    """Receives without a message, and messages without a receive."""

    def __init__(self) -> None:
        self.discarded = Discarded()
        self._posted: dict[Key, deque[tuple[Ticket, memoryview | None]]] = {}
        self._early: dict[Key, deque[tuple[memoryview, bool]]] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether a receive waits for its message."""
        return bool(self._posted)

    def has_early(self, key: Key) -> bool:
        """Tell whether a message waits for its receive."""
        return key in self._early

    def held_bytes(self) -> int:
        """Return the payload of all that came unasked."""
        return sum(len(payload) for queue in self._early.values() for payload, _ in queue)

    def post(self, ticket: Ticket, into: memoryview | None) -> tuple[memoryview, bool] | None:
        """Return the message for a receive and whether it counts against credit, or None: then the receive waits."""
        key = ticket.peer, ticket.tag
        early = self._early.get(key)
        if early is None:
            self._posted.setdefault(key, deque()).append((ticket, into))
            return None
        arrived = early.popleft()
        if not early:
            del self._early[key]
        return arrived

    def arrive(self, key: Key, payload: memoryview, counts: bool) -> tuple[Ticket, memoryview | None] | None:
        """Return the receive for a message, or None: then the message waits, counting against credit or not."""
        posted = self._posted.get(key)
        if posted is None:
            self._early.setdefault(key, deque()).append((payload, counts))
            return None
        first = posted.popleft()
        if not posted:
            del self._posted[key]
        return first

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a waiting receive out; False if it does not wait."""
        key = ticket.peer, ticket.tag
        posted = self._posted.get(key, deque())
        kept = deque(entry for entry in posted if entry[0] is not ticket)
        if len(kept) == len(posted):
            return False
        if kept:
            self._posted[key] = kept
        else:
            del self._posted[key]
        return True

    def withdraw_all(self, source: int) -> list[Ticket]:
        """Take out all receives from one source."""
        keys = [key for key in self._posted if key[0] == source]
        return [ticket for key in keys for ticket, _ in self._posted.pop(key)]

    def discard(self, tag: int, bits: int) -> tuple[list[Ticket], list[tuple[int, int]]]:
        """Drop a prefix from now on; returns the receives taken out, and sources with the credit that they get back."""
        self.discarded.add(tag, bits)
        posted = [key for key in self._posted if has_prefix(key[1], tag, bits)]
        early = [key for key in self._early if has_prefix(key[1], tag, bits)]
        tickets = [ticket for key in posted for ticket, _ in self._posted.pop(key)]
        held = [(key[0], len(payload)) for key in early for payload, counts in self._early.pop(key) if counts]
        return tickets, held

    def clear(self) -> None:
        """Drop everything."""
        self._posted.clear()
        self._early.clear()
