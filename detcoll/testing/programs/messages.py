"""Programs about matching: who gets which message, in which order, of what size."""

from __future__ import annotations

from collections.abc import Iterable

from detcoll.errors import FrameError
from detcoll.testing.fabric import Here, pattern
from detcoll.transport import LARGEST_TAG, Ticket, TicketStatus


def each_to_each(here: Here, nbytes: int) -> None:
    """Every rank sends to every other at once, under a tag that names both."""
    outgoing = {dst: pattern(here.rank * here.size + dst, nbytes) for dst in here.others}
    incoming = {src: bytearray(nbytes) for src in here.others}
    tickets = [
        here.endpoint.recv(src, src * here.size + here.rank, nbytes, memoryview(incoming[src])) for src in here.others
    ]
    tickets += [here.send(dst, here.rank * here.size + dst, outgoing[dst]) for dst in here.others]
    here.finish(*tickets)
    for src, data in incoming.items():
        assert data == pattern(src * here.size + here.rank, nbytes)


def there_and_back(here: Here, nbytes: int, lent: bool) -> None:
    """Rank 0 sends and rank 1 returns what it got, then roles are swapped."""
    for round_, first in enumerate((0, 1)):
        data = pattern(round_, nbytes)
        if here.rank == first:
            sent = here.send(1 - first, round_, data)
            assert _received(here, 1 - first, 10 + round_, nbytes, lent) == data
            here.finish(sent)
        elif here.rank == 1 - first:
            got = _received(here, first, round_, nbytes, lent)
            assert got == data
            here.finish(here.send(first, 10 + round_, got))


def _received(here: Here, src: int, tag: int, nbytes: int, lent: bool) -> bytes:
    if lent:
        return here.take(src, tag, nbytes)
    into = bytearray(nbytes)
    here.finish(here.endpoint.recv(src, tag, nbytes, memoryview(into)))
    return bytes(into)


TAGS = (
    0,
    1,
    2,
    77,
    LARGEST_TAG - 1,
    LARGEST_TAG,
    *(77 + 2**bits for bits in (8, 15, 16, 24, 28, 29, 30, 31, 32, 48, 63)),
)
"""Tags that differ in one bit, so that a transport that drops bits mixes them up."""


def tags_out_of_order(here: Here, tags: Iterable[int] = TAGS) -> None:
    """Rank 1 takes messages in the reverse of the order in which rank 0 sent them, one after the other."""
    tags = list(tags)
    if here.rank == 0:
        here.finish(*(here.send(1, tag, pattern(index, 64 + index)) for index, tag in enumerate(tags)))
    elif here.rank == 1:
        for index, tag in reversed(list(enumerate(tags))):
            assert here.take(0, tag, 64 + index) == pattern(index, 64 + index)


def same_tag_in_order(here: Here, count: int = 40) -> None:
    """Messages of one source with one tag arrive in the order in which they were sent."""
    if here.rank == 0:
        here.finish(*(here.send(1, 5, pattern(index, 100)) for index in range(count)))
    elif here.rank == 1:
        early = [here.endpoint.recv(0, 5, 100) for _ in range(count // 2)]
        here.finish(*early)
        late = [here.take(0, 5, 100) for _ in range(count - count // 2)]
        assert [_bytes(ticket) for ticket in early] + late == [pattern(index, 100) for index in range(count)]


def same_tag_sizes_in_order(here: Here, sizes: Iterable[int] = (3 * 2**20, 10, 100_000, 0, 70_000, 1)) -> None:
    """Small messages do not overtake large ones of the same tag."""
    sizes = list(sizes)
    if here.rank == 0:
        here.finish(*(here.send(1, 9, pattern(index, nbytes)) for index, nbytes in enumerate(sizes)))
    elif here.rank == 1:
        for index, nbytes in enumerate(sizes):
            assert here.take(0, 9, nbytes) == pattern(index, nbytes)


def flood(here: Here, count: int = 200) -> None:
    """All pairs exchange many messages of many sizes in both directions at once."""
    sizes = [(index * 7919) % 20_000 for index in range(count)]
    tickets = []
    received: dict[tuple[int, int], Ticket] = {}
    for index, nbytes in enumerate(sizes):
        for peer in here.others:
            tickets.append(here.send(peer, index, pattern(here.rank * count + index, nbytes)))
            received[peer, index] = here.endpoint.recv(peer, index, nbytes)
    here.finish(*tickets, *received.values())
    for (peer, index), ticket in received.items():
        assert _bytes(ticket) == pattern(peer * count + index, sizes[index])


def unexpected(here: Here, nbytes: int) -> None:
    """Rank 0 sends before rank 1 has posted anything."""
    if here.rank == 0:
        sent = [here.send(1, tag, pattern(tag, nbytes)) for tag in range(4)]
        here.meet()
        here.finish(*sent)
    else:
        here.meet()
        for tag in (2, 0, 3, 1) if here.rank == 1 else ():
            assert here.take(0, tag, nbytes) == pattern(tag, nbytes)


def notes_past_unasked(here: Here, count: int = 1024, nbytes: int = 4096, large_bytes: int = 3 * 2**20) -> None:
    """Rank 1 hears notes, each by a receive posted anew, past many messages and a large one that it asks for later.

    So do ranks tell each other about messages that have found no receive yet.
    """
    if here.rank == 0:
        sent = []
        for index in range(count):
            sent.append(here.send(1, 100 + index, pattern(index, nbytes)))
            sent.append(here.send(1, 7, pattern(index, 128)))
        sent.append(here.send(1, 8, pattern(3, large_bytes)))
        assert here.take(1, 9, 10) == pattern(9, 10)
        here.finish(*sent)
    elif here.rank == 1:
        for index in range(count):
            assert here.take(0, 7, 128) == pattern(index, 128)
        here.finish(here.send(0, 9, pattern(9, 10)))
        assert here.take(0, 8, large_bytes) == pattern(3, large_bytes)
        for index in reversed(range(count)):
            assert here.take(0, 100 + index, nbytes) == pattern(index, nbytes)


def wrong_size(here: Here, sent_bytes: int, stated_bytes: int, lent: bool, early: bool) -> None:
    """Check that a receive of another size than arrives fails with FrameError, posted before the send or after."""
    if here.rank == 0:
        if early:
            here.meet()
        sent = here.send(1, 3, pattern(0, sent_bytes))
        if not early:
            here.meet()
        here.settle(sent)
    elif here.rank == 1:
        if not early:
            here.meet()
        into = None if lent else memoryview(bytearray(stated_bytes))
        ticket = here.endpoint.recv(0, 3, stated_bytes, into)
        if early:
            here.meet()
        here.settle(ticket)
        assert ticket.status is TicketStatus.FAILED, ticket
        assert isinstance(ticket.error, FrameError), ticket
        assert ticket.view is None


def _bytes(ticket: Ticket) -> bytes:
    assert ticket.view is not None
    data = bytes(ticket.view)
    ticket.release()
    return data
