"""Which messages under way use the same memory as a later call, found without a look at each of them.

Ranges of addresses lie in a list by where they begin. One that has a byte in common with another begins before the
other's end, and after its begin less the longest range. So with messages of about one size a look costs the logarithm
of their number. Sends only read, so only receives are in the way of a send.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detcoll.runtime.operation import Operation, Span

if TYPE_CHECKING:
    from detcoll.runtime.transfer import Transfer

Entry = tuple[int, int, int, "Transfer"]
"""Where a range begins, the order of its call, where the range ends, and the call."""


class Ranges:
    """The memory of calls, by address."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._longest = 0

    def add(self, transfer: Transfer) -> None:
        """Take in the memory of a call."""
        for begin, end in transfer.spans:
            insort(self._entries, (begin, transfer.order, end, transfer), key=_place)
            self._longest = max(self._longest, end - begin)

    def remove(self, transfer: Transfer) -> None:
        """Forget the memory of a call that was taken in."""
        for begin, _ in transfer.spans:
            del self._entries[bisect_left(self._entries, (begin, transfer.order), key=_place)]
        if not self._entries:
            self._longest = 0

    def clear(self) -> None:
        """Forget all calls."""
        self._entries.clear()
        self._longest = 0

    def find(self, spans: Sequence[Span], order: int) -> Transfer | None:
        """Return a call before ``order`` that has not been reported and uses some of these addresses, or None."""
        for low, high in spans:
            at = bisect_right(self._entries, low - self._longest, key=_begin)
            while at < len(self._entries) and self._entries[at][0] < high:
                _, other, end, transfer = self._entries[at]
                if low < end and other < order and not transfer.reported:
                    return transfer
                at += 1
        return None


class Memory:
    """The memory of messages under way: what is read and what is written."""

    def __init__(self) -> None:
        self._read, self._written = Ranges(), Ranges()

    def add(self, transfer: Transfer) -> None:
        """Take in a message."""
        (self._read if transfer.is_send else self._written).add(transfer)

    def remove(self, transfer: Transfer) -> None:
        """Forget a message that was taken in."""
        (self._read if transfer.is_send else self._written).remove(transfer)

    def clear(self) -> None:
        """Forget all messages."""
        self._read.clear()
        self._written.clear()

    def find(self, call: Operation | Transfer) -> Transfer | None:
        """Return an earlier message that shares memory with this call, which one of them writes, or None."""
        return self._written.find(call.spans, call.order) or self._read.find(call.written, call.order)


def _place(entry: Entry) -> tuple[int, int]:
    return entry[:2]


def _begin(entry: Entry) -> int:
    return entry[0]
