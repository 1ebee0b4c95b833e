"""The set of discarded prefixes: what it covers, what lifts it, and that it is bounded."""

from __future__ import annotations

import detcoll.discarding
from detcoll.discarding import LARGEST_COUNT, Discarded, has_prefix


def test_a_prefix_covers_its_tags_alone() -> None:
    discarded = Discarded()
    assert not discarded
    assert not discarded.covers(0)
    discarded.add(0x1234_5678, 8)
    assert discarded
    assert all(discarded.covers(tag) for tag in (0x1234_5600, 0x1234_5678, 0x1234_56FF))
    assert not any(discarded.covers(tag) for tag in (0x1234_55FF, 0x1234_5700, 0x56, 2**63 + 0x1234_5678))


def test_prefixes_of_several_lengths() -> None:
    discarded = Discarded()
    discarded.add(5, 0)
    discarded.add(2**40, 32)
    discarded.add(2**63, 63)
    assert [discarded.covers(tag) for tag in (5, 4, 2**40 + 7, 2**63 + 1)] == [True, False, True, True]
    discarded.add(0, 64)
    assert discarded.covers(4)


def test_lifting_ends_every_prefix_that_covers_the_tag() -> None:
    discarded = Discarded()
    discarded.add(0x100, 8)
    discarded.add(0x100, 4)
    discarded.add(0x200, 8)
    discarded.lift(0x105)
    assert not discarded.covers(0x1FF)
    assert discarded.covers(0x2FF)
    discarded.lift(0x200)
    assert not discarded
    discarded.lift(0x200)


def test_lifting_leaves_prefixes_of_other_lengths() -> None:
    discarded = Discarded()
    discarded.add(2**64 - 1, 64)
    discarded.add(7, 0)
    discarded.lift(12)
    assert not discarded.covers(12)
    assert discarded.covers(7)


def test_the_oldest_prefix_is_forgotten_first() -> None:
    discarded = Discarded()
    for number in range(LARGEST_COUNT):
        discarded.add(number << 8, 8)
    discarded.add(0, 8)  # discarded again, so it is the newest
    discarded.add(LARGEST_COUNT << 8, 8)
    assert len(discarded) == detcoll.discarding.LARGEST_COUNT
    assert discarded.covers(0)
    assert not discarded.covers(1 << 8)
    assert discarded.covers(LARGEST_COUNT << 8)


def test_has_prefix() -> None:
    assert has_prefix(0x12FF, 0x1200, 8)
    assert not has_prefix(0x13FF, 0x1200, 8)
