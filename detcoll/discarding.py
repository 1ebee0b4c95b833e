"""Which tags an endpoint drops: the memory behind `detcoll.transport.Endpoint.discard`.

A prefix stands for all tags that are equal but for their lowest ``bits`` bits. Few lengths are in use at a time, so a
tag is looked up once for each length. The set is bounded: the prefix that was discarded first is forgotten first.
"""

from __future__ import annotations

LARGEST_COUNT = 4096
"""How many discarded prefixes are remembered."""


class Discarded:
    """The prefixes of tags that are dropped. It is false while there are none, so that a caller need not look a tag up.

    Not thread-safe: guard it with what guards the endpoint.
    """

    __slots__ = ("_counts", "_prefixes")

    def __init__(self) -> None:
        self._prefixes: dict[tuple[int, int], None] = {}
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    def add(self, tag: int, bits: int) -> None:
        """Drop the tags that equal ``tag`` in all but their lowest ``bits`` bits from now on."""
        prefix = bits, tag >> bits
        if prefix in self._prefixes:
            self._remove(prefix)
        elif len(self._prefixes) == LARGEST_COUNT:
            self._remove(next(iter(self._prefixes)))
        self._prefixes[prefix] = None
        self._counts[bits] = self._counts.get(bits, 0) + 1

    def covers(self, tag: int) -> bool:
        """Tell whether ``tag`` is dropped."""
        return any((bits, tag >> bits) in self._prefixes for bits in self._counts)

    def lift(self, tag: int) -> None:
        """Drop ``tag`` no more, nor any other tag of the prefixes that cover it."""
        for bits in [bits for bits in self._counts if (bits, tag >> bits) in self._prefixes]:
            self._remove((bits, tag >> bits))

    def _remove(self, prefix: tuple[int, int]) -> None:
        del self._prefixes[prefix]
        bits = prefix[0]
        self._counts[bits] -= 1
        if not self._counts[bits]:
            del self._counts[bits]


def has_prefix(tag: int, prefix_of: int, bits: int) -> bool:
    """Tell whether ``tag`` equals ``prefix_of`` in all but the lowest ``bits`` bits."""
    return tag >> bits == prefix_of >> bits
