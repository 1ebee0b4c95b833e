"""How the ranks of a site divide arrays on their devices, and what each asks of NCCL for that.

Of every piece of memory each rank takes an equal share, in the order of ranks; what is left over, fewer elements than
there are ranks, goes to the first rank. Shares lie where the whole lies, so nothing needs memory of its own::

    before reduce        a0 a1 a2 | a3 a4 a5 | a6       of each rank, which differ
    after, on rank 0     s0 s1 s2 |  -  -  - | s6       sums
    after, on rank 1      -  -  - | s3 s4 s5 |  -
"""

from __future__ import annotations

from collections.abc import Iterator

from detcoll.device.copies import DeviceBuffer, Segment
from detcoll.device.nccl import Part


def share_of(buffer: DeviceBuffer, size: int, place: int) -> DeviceBuffer:
    """Return what the rank number ``place`` of ``size`` takes of a buffer; it may be empty."""
    segments, first = [], 0
    for segment in buffer.segments:
        each, left = divmod(segment.elems, size)
        begins = [(segment.address + place * each * buffer.itemsize, each)]
        if not place:
            begins.append((segment.address + size * each * buffer.itemsize, left))
        for address, elems in begins:
            if elems:
                segments.append(Segment(first, elems, address))
                first += elems
    return DeviceBuffer(tuple(segments), buffer.device, buffer.owner, buffer.itemsize)


def parts_to_reduce(buffer: DeviceBuffer, size: int, place: int, dtype: str, op: str) -> Iterator[Part]:
    """Yield what leaves each rank with the sums of its share, or of ``op``."""
    for address, each, left in _cut(buffer, size):
        if each:
            yield Part("reduce_scatter", address, address + place * each * buffer.itemsize, each, dtype, op)
        if left:
            rest = address + size * each * buffer.itemsize
            yield Part("reduce", rest, rest, left, dtype, op)


def parts_to_gather(buffer: DeviceBuffer, size: int, place: int, dtype: str) -> Iterator[Part]:
    """Yield what gives every rank the shares of all."""
    for address, each, left in _cut(buffer, size):
        if each:
            yield Part("all_gather", address + place * each * buffer.itemsize, address, each, dtype)
        if left:
            rest = address + size * each * buffer.itemsize
            yield Part("broadcast", rest, rest, left, dtype)


def parts_to_all_reduce(buffer: DeviceBuffer, dtype: str, op: str) -> Iterator[Part]:
    """Yield what leaves all ranks with the sums of the whole, or of ``op``."""
    for segment in buffer.segments:
        yield Part("all_reduce", segment.address, segment.address, segment.elems, dtype, op)


def _cut(buffer: DeviceBuffer, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield of each piece of memory its address, the elements of a share, and those that are left over."""
    for segment in buffer.segments:
        yield segment.address, *divmod(segment.elems, size)
