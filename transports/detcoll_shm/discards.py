"""Which tags are dropped as they come: those that begin with the bits of a tag that was discarded."""

from __future__ import annotations

from collections import Counter, OrderedDict

LARGEST_KEPT_DISCARDS = 4096


class Discards:
    """The prefixes that were discarded last; True while there is any."""

    __slots__ = ("_prefixes", "_widths")

    def __init__(self) -> None:
        self._prefixes: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._widths: Counter[int] = Counter()
        """How many prefixes leave out so many bits; in practice there is one such number."""

    def __bool__(self) -> bool:
        """Tell whether any tag is dropped."""
        return bool(self._prefixes)

    def add(self, tag: int, bits: int) -> None:
        """Drop tags that equal ``tag`` in all but their lowest ``bits`` bits; the oldest prefix may be forgotten."""
        self._remove(tag, bits)
        if len(self._prefixes) >= LARGEST_KEPT_DISCARDS:
            oldest_bits, oldest = next(iter(self._prefixes))
            self._remove(oldest << oldest_bits, oldest_bits)
        self._prefixes[bits, tag >> bits] = None
        self._widths[bits] += 1

    def covers(self, tag: int) -> bool:
        """Tell whether ``tag`` is dropped."""
        return any((bits, tag >> bits) in self._prefixes for bits in self._widths)

    def end(self, tag: int) -> None:
        """Drop ``tag``, and all that begins like it, no longer."""
        for bits in list(self._widths):
            self._remove(tag, bits)

    def _remove(self, tag: int, bits: int) -> None:
        if (bits, tag >> bits) in self._prefixes:
            del self._prefixes[bits, tag >> bits]
            self._widths[bits] -= 1
            if not self._widths[bits]:
                del self._widths[bits]
