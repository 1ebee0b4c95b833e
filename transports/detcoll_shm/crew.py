"""How ranks in a collective wait for each other, and how they learn that it will not end.

A rank that waits looks again for a while, offering the processor to others between looks, and then sleeps on its
doorbell. Where there are more ranks than processors it looks only a few times, since whoever it waits for needs one.
Every wait ends at the deadline of the collective, when a peer aborts, or when one that is waited for has gone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from detcoll.descriptor import Descriptor
from detcoll.errors import Closed, DeadlineMissed, PeerLost, TransportError
from detcoll_shm.bell import ring
from detcoll_shm.layout import State
from detcoll_shm.processor import awaited_processor, current_processor, leave
from detcoll_shm.regions import NOWHERE, Place
from detcoll_shm.stage import (
    ARRIVED,
    ASLEEP,
    DIGEST,
    FOLDED,
    PLACE,
    PLACE_WORDS,
    PROCESS,
    TAKEN,
    THREAD,
    TOLD,
    Stage,
)  # fmt: skip
from detcoll_shm.stores import Counts

RECHECK_NS = 10 * 10**6
APART_NS = 50_000
"""A rank with a processor of its own looks so long without offering it to others, who would keep it for milliseconds.
Then it makes sure that it is not the one that keeps its peer from running."""

LOOKS_A_GLANCE = 16
LOOKS_WHERE_CROWDED = 30
"""With more ranks than processors: each look lets another rank run. Alone on its processor a rank is through with them
in some 15 us, and sleeps."""

_LACKS = {ARRIVED: "has not called it", TOLD: "does not say what it called", TAKEN: "has not taken the result"}


@dataclass(frozen=True, slots=True)
class Mate:
    """Another rank of the crew."""

    rank: int
    stage: Stage
    bell_fd: int
    state: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Host:
    """What the crew needs of its endpoint.

    ``hear`` : waits on the doorbell for so many nanoseconds.  ``is_open`` : False once the endpoint was closed.
    ``why_lost`` : why a rank is gone, or None.
    """

    hear: Callable[[int], None]
    is_open: Callable[[], bool]
    why_lost: Callable[[int], TransportError | None]


class Crew:
    """All ranks, as one of them sees them."""

    def __init__(
        self, rank: int, stage: Stage, mates: Sequence[Mate], host: Host, wait_ns: int, counts: Counts
    ) -> None:
        self.rank, self.stage, self.mates = rank, stage, tuple(mates)
        self.sequence = 0
        self._host, self._counts = host, counts
        self._wait_ns = wait_ns
        self._is_crowded = len(mates) + 1 > len(os.sched_getaffinity(0))
        self._words = stage.words
        self._words[PROCESS] = os.getpid()
        self._mates = tuple((mate, mate.stage.words) for mate in mates)
        self._fence = threading.Lock()
        self._descriptor = Descriptor(0, "", "", "", 0, 0)
        self._digest = self._began_ns = self._deadline_ns = 0

    def arrive(self, descriptor: Descriptor, digest: int, deadline_ns: int, place: Place = NOWHERE) -> None:
        """Show that this rank is in its next collective, what it called, and where its array is."""
        self._descriptor, self._digest, self._deadline_ns = descriptor, digest, deadline_ns
        self._began_ns = time.monotonic_ns()
        self._words[THREAD] = threading.get_native_id()
        self.sequence = sequence = self.sequence + 1
        self._words[DIGEST + (sequence & 1)] = digest
        at = PLACE + PLACE_WORDS * (sequence & 1)
        self._words[at], self._words[at + 1], self._words[at + 2] = place
        self.publish(ARRIVED, sequence)

    def await_all_here(self) -> None:
        """Return once all ranks have arrived and have called the same.

        Raises
        ------
        PlanMismatch
            If one called something else.
        DeadlineMissed, PeerLost, Closed
            See `await_all`.
        """
        sequence, digest = self.sequence, self._digest
        word = DIGEST + (sequence & 1)
        for mate, words in self._mates:
            if words[ARRIVED] < sequence:
                self._wait(words, ARRIVED, sequence)
            if words[word] != digest:
                self._differ(mate)

    def places(self) -> list[Place]:
        """Return where the arrays of all ranks are, by rank, in the collective at which all have arrived."""
        at = PLACE + PLACE_WORDS * (self.sequence & 1)
        found = [Place(words[at], words[at + 1], words[at + 2]) for _, words in self._mates]
        found.insert(self.rank, Place(self._words[at], self._words[at + 1], self._words[at + 2]))
        return found

    def publish(self, word: int, value: int) -> None:
        """Write one of this rank's words, and wake those who sleep."""
        self._words[word] = value
        with self._fence:
            pass
        for mate, words in self._mates:
            if words[ASLEEP]:
                self._counts.bells_rung += 1
                ring(mate.bell_fd)

    def await_all(self, word: int, value: int) -> None:
        """Return once ``word`` of every other rank has reached ``value``.

        Raises
        ------
        DeadlineMissed
            If it does not before the deadline; names the ranks that are behind.
        PeerLost
            If a rank that is behind is gone, or any has aborted.
        Closed
            If this endpoint is closed meanwhile.
        """
        for _, words in self._mates:
            if words[word] < value:
                self._wait(words, word, value)

    def await_one(self, rank: int, word: int, value: int) -> None:
        """Do as `await_all` for one rank."""
        for mate, words in self._mates:
            if mate.rank == rank and words[word] < value:
                self._wait(words, word, value)

    def wake_all(self) -> None:
        """Ring every bell."""
        for mate in self.mates:
            ring(mate.bell_fd)

    def _wait(self, words: memoryview[int], word: int, value: int) -> None:
        if self._is_crowded:
            for _ in range(LOOKS_WHERE_CROWDED):
                os.sched_yield()
                if words[word] >= value:
                    return
        else:
            began_ns = now_ns = time.monotonic_ns()
            yields = False
            while now_ns - began_ns < self._wait_ns:
                if yields:
                    os.sched_yield()
                elif now_ns - began_ns >= APART_NS:
                    yields = True
                    self._move_apart(words)
                for _ in range(LOOKS_A_GLANCE):
                    if words[word] >= value:
                        return
                now_ns = time.monotonic_ns()
        self._sleep(words, word, value)

    def _move_apart(self, words: memoryview[int]) -> None:
        """Leave this processor if the rank that is waited for would run on it."""
        here = current_processor()
        if here == awaited_processor(words[PROCESS], words[THREAD]):
            leave(here)
            self._counts.moves += 1

    def _sleep(self, words: memoryview[int], word: int, value: int) -> None:
        own = self._words
        own[ASLEEP] = 1
        with self._fence:
            pass
        try:
            while words[word] < value:
                self._look_around(word, value)
                if words[word] >= value:
                    return
                self._counts.sleeps += 1
                self._host.hear(min(max(self._deadline_ns - time.monotonic_ns(), 0), RECHECK_NS))
        finally:
            own[ASLEEP] = 0

    def _look_around(self, word: int, value: int) -> None:
        """Raise why the wait for others has no end."""
        if not self._host.is_open():
            raise Closed("the endpoint was closed during a collective")
        aborted = [other.rank for other in self.mates if other.state() == State.ABORTED]
        if aborted:
            self._compare_with_those_here()
        # Who left or died comes before who aborted: often the one is the reason of the other.
        lost = [other.rank for other, theirs in self._mates if self._host.why_lost(other.rank) and theirs[word] < value]
        for rank in [*(rank for rank in lost if rank not in aborted), *aborted]:
            raise self._host.why_lost(rank) or PeerLost(f"rank {rank} aborted")
        if time.monotonic_ns() >= self._deadline_ns:
            raise DeadlineMissed(self._late(word, value))

    def _late(self, word: int, value: int) -> str:
        lack = _LACKS.get(word, "has not folded its part" if word == FOLDED else "has not given its part")
        behind = [mate.rank for mate, words in self._mates if words[word] < value]
        awaited = ", ".join(f"rank {rank}, which {lack}" for rank in behind)
        seconds = round((self._deadline_ns - self._began_ns) / 1e9, 2)
        return (
            f"rank {self.rank}: {self._descriptor.kind} number {self.sequence - 1} was not finished after "
            f"{seconds:g} s; it waits for {awaited or 'nobody'}"
        )

    def _compare_with_those_here(self) -> None:
        sequence = self.sequence
        for mate, words in self._mates:
            if words[ARRIVED] >= sequence and words[DIGEST + (sequence & 1)] != self._digest:
                self._differ(mate)

    def _differ(self, mate: Mate) -> None:
        """Exchange descriptors in full with ``mate``, whose digest differs, and raise."""
        sequence = self.sequence
        mine = msgspec.structs.replace(self._descriptor, sequence=sequence - 1)
        self.stage.write_text(mine.encode())
        self.publish(TOLD, sequence)
        words = mate.stage.words
        if words[TOLD] < sequence:
            self._await_text(mate)
        mine.compare(self.rank, mate.rank, mate.stage.read_text())

    def _await_text(self, mate: Mate) -> None:
        words, sequence, own = mate.stage.words, self.sequence, self._words
        own[ASLEEP] = 1
        with self._fence:
            pass
        try:
            while words[TOLD] < sequence:
                if not self._host.is_open():
                    raise Closed("the endpoint was closed during a collective")
                error = self._host.why_lost(mate.rank)
                if error is not None and words[TOLD] < sequence:
                    raise error
                if time.monotonic_ns() >= self._deadline_ns:
                    raise DeadlineMissed(self._late(TOLD, sequence))
                self._host.hear(min(max(self._deadline_ns - time.monotonic_ns(), 0), RECHECK_NS))
        finally:
            own[ASLEEP] = 0
