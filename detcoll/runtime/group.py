"""Groups: their members, and the tags that keep their messages apart from those of other groups.

The id of a group is a hash that every member computes for itself. Messages carry a tag of 64 bits::

    63       32 31 30         20 19          0
    |  number  | 0 | sequence   |  plan tag  |    collectives
    |  number  | 1 | message      |  chunk   |    send and recv, 18 and 13 bits

``number`` is the lower half of the group's id, ``sequence`` counts the group's calls modulo `SEQUENCES`, and the plan
tag distinguishes the messages of one call. ``message`` is 1 plus the key of what one rank sends to one other; two
messages that wait there have different keys. Descriptors of calls contain the whole id, so a collision of two numbers
does not go unnoticed; a rank that would be in both groups refuses to make the second. Number 0 is reserved for control
messages of the job, and the number with all bits set for clock synchronisation.

Message 0 is for the notes of send and recv: chunk 0 for those that leave at once, chunk 1 for those that wait for the
line. Messages with one tag keep their order. So with one tag for both, a transport would let a note that waited for the
line follow those that left at once, past the line's pace.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from detcoll.runtime.routes import acquaintances

PLAN_BITS, SEQUENCE_BITS, NUMBER_BITS = 20, 11, 32
SEQUENCES = 1 << SEQUENCE_BITS
"""Number of calls of a group that tags distinguish; far more than can be pending at a time."""

_MESSAGE_BIT, _MESSAGE_BITS, CHUNK_BITS = 1 << 31, 18, 13
MESSAGES = (1 << _MESSAGE_BITS) - 1
"""Number of messages from one rank to another that tags distinguish; more than can wait at a time."""

WORLD_ID = 1
JOB_NUMBER, TIME_NUMBER = 0, (1 << NUMBER_BITS) - 1
_OWN_NUMBERS = (JOB_NUMBER, WORLD_ID, TIME_NUMBER)


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks of the job, in the order of their numbers inside the group.

    ``id`` : whole number below 2**64.  ``ranks`` : ranks of the job.  ``sites`` : the site of each of them.
    ``name`` : shown in messages.
    """

    id: int
    ranks: tuple[int, ...]
    sites: tuple[int, ...]
    name: str = ""
    members: frozenset[int] = field(init=False)
    number: int = field(init=False)
    """Distinguishes its messages from those of other groups."""

    def __post_init__(self) -> None:
        """Derive the set of members and the number."""
        object.__setattr__(self, "members", frozenset(self.ranks))
        object.__setattr__(self, "number", self.id & TIME_NUMBER)

    @property
    def title(self) -> str:
        """The group's name, or else its ranks, for messages; empty for the world."""
        if self.id == WORLD_ID:
            return ""
        shown = ", ".join(map(str, self.ranks[:8])) + (", ..." if len(self.ranks) > 8 else "")
        return f"{self.name!r}" if self.name else f"of ranks {shown}"

    @property
    def in_full(self) -> str:
        """What members must agree on, for messages: the ranks in their order, and the name."""
        shown = ", ".join(map(str, self.ranks[:32])) + (", ..." if len(self.ranks) > 32 else "")
        return f"with ranks in the order {shown}" + (f" and the name {self.name!r}" if self.name else "")

    def acquaintances(self, rank: int) -> frozenset[int]:
        """Return the ranks of the job with which ``rank`` compares every call of this group."""
        if len(self.ranks) < 2:
            return frozenset()
        own = self.ranks.index(rank)
        return frozenset(self.ranks[member] for member in acquaintances(own, self.sites))

    def neighbours(self, rank: int) -> frozenset[int]:
        """Return the ranks of the job before and after ``rank`` in a ring, which one lost rank does not split."""
        own = self.ranks.index(rank)
        return frozenset({self.ranks[own - 1], self.ranks[(own + 1) % len(self.ranks)]} - {rank})

    def partners(self, rank: int) -> frozenset[int]:
        """Return the ranks of the job that exchange data with ``rank`` in a large all-reduce.

        These are the ranks of its site and, in each other site, the rank at the same position, modulo the site's size.
        """
        members: dict[int, list[int]] = {}
        for member, site in zip(self.ranks, self.sites, strict=True):
            members.setdefault(site, []).append(member)
        mates = members.pop(self.sites[self.ranks.index(rank)])
        place = mates.index(rank)
        return frozenset({*mates, *(others[place % len(others)] for others in members.values())} - {rank})

    def call_prefix(self, sequence: int) -> int:
        """Return the common prefix of all tags of call ``sequence``, with the lowest `PLAN_BITS` bits zero."""
        return self.prefix | sequence % SEQUENCES << PLAN_BITS

    def message_tag(self, key: int, chunk: int) -> int:
        """Return the tag of a chunk of the message with this key, from 0, that one rank sends to another."""
        return self.note_tag | (key % MESSAGES + 1) << CHUNK_BITS | chunk & (1 << CHUNK_BITS) - 1

    @property
    def note_tag(self) -> int:
        """The tag of what two ranks tell each other about their messages at once."""
        return self.prefix | _MESSAGE_BIT

    @property
    def paced_note_tag(self) -> int:
        """The tag of notes that wait for the line."""
        return self.note_tag | 1

    @property
    def prefix(self) -> int:
        """The common prefix of all tags of this group, with all bits but the highest `NUMBER_BITS` zero."""
        return self.number << (64 - NUMBER_BITS)


def world(site_of: Sequence[int]) -> Group:
    """Return the group of all ranks of a job."""
    return Group(WORLD_ID, tuple(range(len(site_of))), tuple(site_of))


def group_id(parent: int, ranks: Sequence[int], kind: str, earlier: int) -> int:
    """Return the id of a new group, a hash below 2**64 that every member computes for itself.

    ``kind`` : how the group was made, and its name.  ``earlier`` : the number of groups of this kind with exactly these
    ranks that were made before, so that no id is used twice.
    """
    for attempt in itertools.count():
        told = repr((parent, tuple(ranks), kind, earlier, attempt)).encode()
        hashed = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big")
        if hashed & TIME_NUMBER not in _OWN_NUMBERS:
            break
    return hashed
