"""Matching what arrives with what was asked for, by source and tag, without any I/O.

A receive waits until its message comes, a message that came unasked until its receive is posted. Both queue in order.

A *discarded prefix* stands for all tags that are equal but for their lowest bits. What belongs to it is dropped, and
goes on being dropped as it arrives, until somebody uses such a tag again. The last `REMEMBERED_PREFIXES` are known.
"""

from __future__ import annotations

from collections import Counter, deque

from detcoll.transport import Ticket

REMEMBERED_PREFIXES = 4_096

Key = tuple[int, int]
"""Source and tag."""


class Prefixes:
    """Discarded prefixes, the oldest first."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], None] = {}
        self._widths: Counter[int] = Counter()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._known)

    def __contains__(self, tag: int) -> bool:
        """Whether a tag belongs to one of them."""
        return any((tag >> bits, bits) in self._known for bits in self._widths)

    def add(self, tag: int, bits: int) -> None:
        """Remember a prefix as the newest."""
        self._forget(tag, bits)
        self._known[tag >> bits, bits] = None
        self._widths[bits] += 1
        if len(self._known) > REMEMBERED_PREFIXES:
            oldest, its_bits = next(iter(self._known))
            self._forget(oldest << its_bits, its_bits)

    def revive(self, tag: int) -> None:
        """Forget all prefixes to which a tag belongs."""
        for bits in list(self._widths):
            self._forget(tag, bits)

    def _forget(self, tag: int, bits: int) -> None:
        if (tag >> bits, bits) in self._known:
            del self._known[tag >> bits, bits]
            self._widths[bits] -= 1
            if not self._widths[bits]:
                del self._widths[bits]


class Mailbox:
    """Receives without a message, and messages without a receive."""

    def __init__(self) -> None:
        self.discarded = Prefixes()
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
        posted = [key for key in self._posted if key[1] >> bits == tag >> bits]
        early = [key for key in self._early if key[1] >> bits == tag >> bits]
        tickets = [ticket for key in posted for ticket, _ in self._posted.pop(key)]
        held = [(key[0], len(payload)) for key in early for payload, counts in self._early.pop(key) if counts]
        return tickets, held

    def clear(self) -> None:
        """Drop everything."""
        self._posted.clear()
        self._early.clear()
