"""Collectives of groups: each group has stages of its own, and a doorbell.

A member makes its stage in a region (`detcoll_shm.regions`) and shows in a table on the words page of its first stage
where it is. The others look there until all members show theirs, and map them. The table has room for `ENTRIES` groups
at a time, and one entry more, in which a rank that cannot make a stage says so, with region 0::

    key of the group    number of the region    its descriptor

An entry counts once its key is there, which is written last and taken away first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from detcoll.errors import Closed, ConnectError, TransportError, UsageError
from detcoll.transport import NativeCall, NativeCollectives
from detcoll_shm.collectives import Collectives
from detcoll_shm.natives import Natives
from detcoll_shm.regions import Place
from detcoll_shm.stage import TABLE, TABLE_WORDS

ENTRY_WORDS = 3
ENTRIES = TABLE_WORDS // ENTRY_WORDS - 1
REFUSAL = TABLE + ENTRIES * ENTRY_WORDS
_END = REFUSAL + ENTRY_WORDS
LOOK_S = 0.0005
"""Members make a group at about the same time; so long passes between two looks at their tables."""

Make = Callable[[Sequence[Sequence[int]]], Natives]


def show(words: memoryview[int], key: int, place: Place) -> None:
    """Show where this rank's stage of group ``key`` is. One thread at a time.

    Raises
    ------
    TransportError
        If there is no room in the table.
    """
    for at in range(TABLE, REFUSAL, ENTRY_WORDS):
        if not words[at]:
            words[at + 1], words[at + 2] = place.region, place.fd
            words[at] = _signed(key)
            return
    refuse(words, key)
    raise TransportError(f"this rank has {ENTRIES} groups with shared memory of their own, which is the limit")


def refuse(words: memoryview[int], key: int) -> None:
    """Show that this rank makes no stage of group ``key``. One thread at a time."""
    words[REFUSAL] = 0
    words[REFUSAL + 1] = 0
    words[REFUSAL] = _signed(key)


def find(words: memoryview[int], key: int) -> Place | None:
    """Return where a rank's stage of group ``key`` is, or None if it does not show one."""
    for at in range(TABLE, _END, ENTRY_WORDS):
        if words[at] == _signed(key):
            return Place(words[at + 1], words[at + 2], 0)
    return None


def hide(words: memoryview[int], key: int) -> None:
    """Show no stage of group ``key`` any more. One thread at a time."""
    for at in range(TABLE, _END, ENTRY_WORDS):
        if words[at] == _signed(key):
            words[at] = 0


def await_members(
    members: dict[int, memoryview[int]], key: int, why_lost: Callable[[int], TransportError | None],
    deadline_ns: int,
) -> dict[int, Place]:  # fmt: skip
    """Return where the stages of all ``members`` are, given the words of their first stages.

    Raises
    ------
    ConnectError
        If not all of them show theirs before the deadline, or one is gone or cannot.
    """
    found: dict[int, Place] = {}
    while True:
        for rank in members.keys() - found.keys():
            place = find(members[rank], key)
            if place is not None and not place.region:
                raise ConnectError(f"rank {rank} cannot make another group with shared memory")
            if place is not None:
                found[rank] = place
        missing = sorted(members.keys() - found.keys())
        if not missing:
            return found
        lost = next((error for rank in missing if (error := why_lost(rank)) is not None), None)
        if lost is not None:
            raise ConnectError(f"{lost} before it joined the group") from lost
        if time.monotonic_ns() >= deadline_ns:
            raise ConnectError(f"ranks {missing} did not join the group over shared memory in time")
        time.sleep(LOOK_S)


def _signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


class GroupCollectives(NativeCollectives):
    """The collectives of one group, made when the first is called.

    Parameters
    ----------
    size : int
        The number of members.
    make : callable
        Makes them, given the groups of the fold order.
    forget : callable
        Called once this rank has left.
    """

    algorithm = "shared-memory"

    def __init__(self, size: int, make: Make, forget: Callable[[], None]) -> None:
        self._size = size
        self._make: Make | None = make
        self._forget: Callable[[], None] | None = forget
        self._groups: Sequence[Sequence[int]] = [range(size)]
        self._natives: Natives | None = None
        self._collectives: Collectives | None = None
        self._making = threading.Lock()

    def arrange(self, groups: Sequence[Sequence[int]]) -> None:
        """Fold the ranks of each group in its order, then the groups; see `NativeCollectives.arrange`."""
        if sorted(rank for group in groups for rank in group) != list(range(self._size)) or not all(groups):
            raise UsageError(f"groups={groups} must hold each of {self._size} ranks once")
        self._groups = [list(group) for group in groups]

    def run(self, call: NativeCall, deadline_ns: int) -> None:
        """Carry out a collective, reductions in the promised order."""
        (self._collectives or self._begin()).run(call, deadline_ns)

    def stop(self) -> None:
        """Take no more calls, and end one under way on another thread."""
        with self._making:
            self._make, natives = None, self._natives
        if natives is not None:
            natives.stop()

    def wake(self) -> None:
        """Let a collective under way on another thread see that the endpoint was closed."""
        with self._making:
            natives = self._natives
        if natives is not None:
            natives.wake()

    def leave(self, *, clean: bool) -> None:
        """Take no more calls, and give the stage and the doorbell back."""
        with self._making:
            forget, self._make, self._forget = self._forget, None, None  # they hold the stages
            natives, self._natives, self._collectives = self._natives, None, None
        if natives is not None:
            natives.close()
        if forget is not None:
            forget()

    def _begin(self) -> Collectives:
        with self._making:
            if self._make is None:
                raise Closed("the group was closed")
            if self._natives is None:
                self._natives = self._make(self._groups)
            self._collectives = self._natives.collectives
            return self._collectives
