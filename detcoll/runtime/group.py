"""Groups: who takes part in a call, and how its messages are told from those of other groups.

A group is named by a hash, which every member computes for itself. Messages carry a tag of 64 bits::

    63       32 31        20 19          0
    |  number  |  sequence  |  plan tag  |

``number`` is the lower half of the group's id, ``sequence`` counts the group's calls, modulo `SEQUENCES`, and the plan
tag tells the messages of one call apart. Descriptors of calls hold the whole id, so two groups of equal number do not
mix unnoticed; ranks that would be in both refuse to make the second. Number 0 belongs to the job: causes of failures
and questions between ranks. The number with all bits set belongs to what keeps the time.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from detcoll.runtime.routes import acquaintances

PLAN_BITS, SEQUENCE_BITS, NUMBER_BITS = 20, 12, 32
SEQUENCES = 1 << SEQUENCE_BITS
"""Calls of a group that tags tell apart, far more than may be under way."""

WORLD_ID = 1
JOB_NUMBER, TIME_NUMBER = 0, (1 << NUMBER_BITS) - 1
_OWN_NUMBERS = (JOB_NUMBER, WORLD_ID, TIME_NUMBER)


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks of the job, in the order that numbers them inside the group.

    ``id`` : whole number below 2**64.  ``ranks`` : ranks of the job.  ``sites`` : the site of each of them.
    ``name`` : what messages call it.
    """

    id: int
    ranks: tuple[int, ...]
    sites: tuple[int, ...]
    name: str = ""
    members: frozenset[int] = field(init=False)
    number: int = field(init=False)
    """What tells its messages from those of other groups."""

    def __post_init__(self) -> None:
        """Keep the members as a set, and the number."""
        object.__setattr__(self, "members", frozenset(self.ranks))
        object.__setattr__(self, "number", self.id & TIME_NUMBER)

    @property
    def title(self) -> str:
        """Its name, or its ranks, for messages; empty for the world."""
        if self.id == WORLD_ID:
            return ""
        shown = ", ".join(map(str, self.ranks[:8])) + (", ..." if len(self.ranks) > 8 else "")
        return f"{self.name!r}" if self.name else f"of ranks {shown}"

    def acquaintances(self, rank: int) -> frozenset[int]:
        """Return the ranks of the job with which ``rank`` compares every call of this group."""
        if len(self.ranks) < 2:
            return frozenset()
        own = self.ranks.index(rank)
        return frozenset(self.ranks[member] for member in acquaintances(own, self.sites))

    def neighbours(self, rank: int) -> frozenset[int]:
        """Return the ranks of the job before and behind ``rank``: a ring that no one lost rank cuts in two."""
        own = self.ranks.index(rank)
        return frozenset({self.ranks[own - 1], self.ranks[(own + 1) % len(self.ranks)]} - {rank})

    def partners(self, rank: int) -> frozenset[int]:
        """Return the ranks of the job that a large all-reduce brings together with ``rank``.

        They are those of its site and, in each other site, the one at its place.
        """
        members: dict[int, list[int]] = {}
        for member, site in zip(self.ranks, self.sites, strict=True):
            members.setdefault(site, []).append(member)
        mates = members.pop(self.sites[self.ranks.index(rank)])
        place = mates.index(rank)
        return frozenset({*mates, *(others[place % len(others)] for others in members.values())} - {rank})

    def tag(self, sequence: int, plan_tag: int) -> int:
        """Return the tag of a message of call ``sequence``."""
        return self.call_prefix(sequence) | plan_tag

    def call_prefix(self, sequence: int) -> int:
        """Return what all tags of call ``sequence`` begin with; their last `PLAN_BITS` bits differ."""
        return (self.number << SEQUENCE_BITS | sequence % SEQUENCES) << PLAN_BITS

    @property
    def prefix(self) -> int:
        """What all tags of this group begin with; their last ``PLAN_BITS + SEQUENCE_BITS`` bits differ."""
        return self.number << (SEQUENCE_BITS + PLAN_BITS)


def world(site_of: Sequence[int]) -> Group:
    """Return the group of all ranks of a job."""
    return Group(WORLD_ID, tuple(range(len(site_of))), tuple(site_of))


def group_id(parent: int, ranks: Sequence[int], kind: str, earlier: int) -> int:
    """Return the id of a group, a hash below 2**64 that every member computes for itself.

    ``kind`` : how it was made and what it is called.  ``earlier`` : how many groups of this kind with exactly these
    ranks were made before, so that no id is used twice.
    """
    for attempt in itertools.count():
        told = repr((parent, tuple(ranks), kind, earlier, attempt)).encode()
        hashed = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big")
        if hashed & TIME_NUMBER not in _OWN_NUMBERS:
            break
    return hashed
