"""How ranks in a collective wait for each other, and how they learn that it will not end.

A rank that waits looks again for a while, offering the processor to others between looks, and then sleeps on its
doorbell. Where there are more ranks than processors it looks only a few times, since whoever it waits for needs one.
Every wait ends at the deadline of the collective, when another rank has given up (`detcoll_shm.verdict`), or when one
that is waited for has gone.

A store must be seen before the loads that follow it. Taking a lock is the fence. It is a new lock each time, so that
nobody has to give it back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock, get_native_id, local

import msgspec

from detcoll.descriptor import Descriptor
from detcoll.errors import Closed, DeadlineMissed, DetcollError, TransportError
from detcoll_shm.call_layout import LARGEST_DIGEST
from detcoll_shm.processor import awaited_processor, current_processor, leave
from detcoll_shm.regions import Place
from detcoll_shm.stage import (
    ARRIVED,
    ASLEEP,
    BELL,
    CALLED,
    DIGEST,
    ENDED,
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
from detcoll_shm.verdict import GIVEN_UP, TRYING, Reason

APART_NS = 50_000
"""A rank with a processor of its own looks so long without offering it to others, who would keep it for milliseconds.
Then it makes sure that it is not the one that keeps its peer from running."""

LOOKS_A_GLANCE = 16
LOOKS_WHERE_CROWDED = 30
"""With more ranks than processors: each look lets another rank run. Alone on its processor a rank is through with them
in some 15 us, and sleeps."""

_LACKS = {ARRIVED: "has not begun it", TOLD: "does not say what it called", TAKEN: "has not taken the result"}


SHORTEST_PAUSE_NS, LONGEST_PAUSE_NS = 20_000, 10**6
"""Between two looks at a device, after as many looks without one as at a word."""

LONGEST_VERDICT_NS = 10**9
"""How long to wait for one that is about to say whether it gives up: two stores, if only it is allowed to run."""

NEVER = 2**62
"""What no word reaches."""


@dataclass(frozen=True, slots=True)
class PeerStage:
    """Another rank: its number in the group, and its name in errors. ``ring`` wakes it if it sleeps in a collective."""

    rank: int
    name: int
    stage: Stage
    ring: Callable[[], None]


@dataclass(frozen=True, slots=True)
class EndpointHooks:
    """What a wait needs of its endpoint.

    ``bell_fd`` : what others ring.  ``hear`` : waits on that doorbell for so many nanoseconds at most.  ``is_open`` :
    False once the endpoint was closed.  ``why_lost`` : why a rank is gone, or None.
    """

    bell_fd: int
    hear: Callable[[int], None]
    is_open: Callable[[], bool]
    why_lost: Callable[[int], TransportError | None]


PeerStages = Sequence[tuple[PeerStage, memoryview]]


class _Thread(local):
    """The calling thread's id, for which the kernel is asked once a thread."""

    def __init__(self) -> None:
        self.id = get_native_id()


class Lockstep:
    """All ranks, as one of them sees them.

    It has many fields since all of them are read in every collective, where a further lookup shows in the latency.

    ``rank`` : this rank's number in the group.  ``name`` : its rank in the job.  ``sequence`` : number of the
    collective under way, from 1.  ``number`` : what its caller counts it as, which ranks compare too, or -1.
    ``timeout_ns`` : what its caller allows it, or 0.
    ``last_word`` : with which word and value the collective under way ends, where that is not its ARRIVED.
    """

    def __init__(
        self, rank: int, name: int, stage: Stage, peers: Sequence[PeerStage], hooks: EndpointHooks, wait_ns: int,
        counts: Counts,
    ) -> None:  # fmt: skip
        self.rank, self.name, self.stage, self.peers = rank, name, stage, tuple(peers)
        self.sequence = 0
        self.number, self.timeout_ns = -1, 0
        self.last_word: tuple[int, int] | None = None
        self._hooks, self._counts = hooks, counts
        self._wait_ns = wait_ns
        self._is_crowded = len(peers) + 1 > len(os.sched_getaffinity(0))
        self._words = stage.words
        self._words[PROCESS], self._words[BELL] = os.getpid(), hooks.bell_fd
        self._peers = tuple((peer, peer.stage.words) for peer in peers)
        self._descriptor = Descriptor(0, "", "", "", 0, 0)
        self._digest = self._deadline_ns = 0
        self._coming = 0
        self._thread = _Thread()
        self._relayed: Reason | None = None
        """Why another rank gave up, once that was found to end a collective of this rank."""

    def arrive(self, descriptor: Descriptor, digest: int, deadline_ns: int, place: Place | None = None) -> None:
        """Show that this rank is in its next collective, what it called, and where its array is if others look."""
        digest = digest + self.number & LARGEST_DIGEST
        self._descriptor, self._digest, self._deadline_ns = descriptor, digest, deadline_ns
        self._words[THREAD] = self._thread.id
        self.sequence = sequence = self.sequence + 1
        self._words[DIGEST + (sequence & 1)] = digest
        if place is not None:
            at = PLACE + PLACE_WORDS * (sequence & 1)
            self._words[at], self._words[at + 1], self._words[at + 2] = place
        self.publish(ARRIVED, sequence)

    def prepare(self, descriptor: Descriptor, deadline_ns: int) -> None:
        """Say what the next collective is, for waits for a device that come before `arrive`."""
        self._descriptor, self._deadline_ns = descriptor, deadline_ns
        self._coming = self.sequence + 1

    def await_device(self, is_past: Callable[[], bool], what: str) -> None:
        """Return once ``is_past``, for which the device is asked; ``what`` : what this rank waits for.

        Raises
        ------
        DeviceError
            If ``is_past`` raises it.
        DeadlineMissed
            If it is not before the deadline.
        PeerLost, TransportError
            If a rank that the collective still needs is gone, or another rank gave up.
        Closed
            If this endpoint is closed meanwhile.
        """
        began_ns, pause_ns = time.monotonic_ns(), SHORTEST_PAUSE_NS
        while not is_past():
            if time.monotonic_ns() - began_ns < self._wait_ns:
                os.sched_yield()
                continue
            error = self._trouble_beside_device(what)
            if error is not None:
                raise error
            self._hooks.hear(pause_ns)
            pause_ns = min(2 * pause_ns, LONGEST_PAUSE_NS)

    def await_all_here(self) -> None:
        """Return once all ranks have arrived and have called the same.

        Raises
        ------
        PlanMismatch
            If one called something else.
        DeadlineMissed, PeerLost, TransportError, Closed
            See `await_all`.
        """
        sequence, digest = self.sequence, self._digest
        for _, words in self._peers:
            if words[ARRIVED] < sequence:
                self._wait(words, ARRIVED, sequence, self._peers)
        word = DIGEST + (sequence & 1)  # as in `confirm`, for less
        for peer, words in self._peers:
            if words[word] != digest:
                self._look_into(peer, words, word)

    def confirm(self) -> None:
        """Make sure, after the last wait of a round, that no rank has given the collective up.

        Raises
        ------
        PlanMismatch
            If one called something else.
        DeadlineMissed, PeerLost, TransportError, Closed
            See `await_all`.
        """
        digest = self._digest
        word = DIGEST + (self.sequence & 1)
        for peer, words in self._peers:
            if words[word] != digest:
                self._look_into(peer, words, word)

    def places(self) -> list[Place]:
        """Return where the arrays of all ranks are, by rank, in the collective at which all have arrived."""
        at = PLACE + PLACE_WORDS * (self.sequence & 1)
        found = [Place(words[at], words[at + 1], words[at + 2]) for _, words in self._peers]
        found.insert(self.rank, Place(self._words[at], self._words[at + 1], self._words[at + 2]))
        return found

    def anyone_is(self, region: int) -> bool:
        """Tell whether the array of a rank is in ``region``, in the collective at which all have arrived."""
        at = PLACE + PLACE_WORDS * (self.sequence & 1)
        return self._words[at] == region or any(words[at] == region for _, words in self._peers)

    def publish(self, word: int, value: int) -> None:
        """Write one of this rank's words, and wake those who sleep."""
        self._words[word] = value
        Lock().acquire()  # a fence
        for peer, words in self._peers:
            if words[ASLEEP]:
                self._counts.bells_rung += 1
                peer.ring()

    def await_all(self, word: int, value: int) -> None:
        """Return once ``word`` of every other rank has reached ``value``.

        Raises
        ------
        DeadlineMissed
            If it does not before the deadline, or another rank gave up at its own; names the ranks that are behind.
        PeerLost
            If a rank that is behind is gone, or another rank gave up because one is.
        TransportError
            If another rank gave up for some other reason.
        PlanMismatch
            If a rank has called something else.
        Closed
            If this endpoint is closed meanwhile.
        """
        for _, words in self._peers:
            if words[word] < value:
                self._wait(words, word, value, self._peers)

    def await_one(self, rank: int, word: int, value: int) -> None:
        """Do as `await_all` for one rank."""
        for peer, words in self._peers:
            if peer.rank == rank and words[word] < value:
                self._wait(words, word, value, ((peer, words),))

    def resign(self, error: BaseException, kind: str, before: int) -> str:
        """Take part in no collective any more because of ``error``, tell the others, and return why.

        ``before`` is `sequence` as it was when the collective of that ``kind`` was called. May be repeated where it was
        interrupted.
        """
        own, has_arrived = self._words, self.sequence != before
        number = self.number if self.number >= 0 else before
        reason = Reason.of(error, self.name, f"{kind} number {number}") if self._relayed is None else self._relayed
        if not own[ENDED]:
            goes_on = True
            if has_arrived and own[DIGEST + (self.sequence & 1)] != GIVEN_UP:
                goes_on = self._is_done_after_trying(reason, self._has_ended)
            elif has_arrived:
                goes_on = False
            else:
                self.stage.write_reason(reason.encode())
            own[ENDED] = self.sequence + goes_on
        for peer in self.peers:
            peer.ring()
        return reason.text

    def _wait(self, words: memoryview[int], word: int, value: int, awaited: PeerStages) -> None:
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
        self._sleep(words, word, value, awaited)

    def _move_apart(self, words: memoryview[int]) -> None:
        """Leave this processor if the rank that is waited for would run on it."""
        here = current_processor()
        if here == awaited_processor(words[PROCESS], words[THREAD]):
            leave(here)
            self._counts.moves += 1

    def _sleep(self, words: memoryview[int], word: int, value: int, awaited: PeerStages) -> None:
        """Wait on the doorbell; give the collective up where it has no end, unless it has one in that very moment."""
        error = self._hear_until(lambda: words[word] >= value, lambda: self._trouble(word, value))
        if error is None:
            return
        if self._relayed is not None:
            raise error
        reason = Reason.of(error, self.name, self._call)
        if not self._is_done_after_trying(reason, lambda: all(theirs[word] >= value for _, theirs in awaited)):
            raise error

    def _hear_until(
        self, is_over: Callable[[], bool], trouble: Callable[[], DetcollError | None]
    ) -> DetcollError | None:
        """Sleep until ``is_over``, and return None, or what ``trouble`` finds while it is not."""
        own = self._words
        own[ASLEEP] = 1
        Lock().acquire()  # a fence
        try:
            while not is_over():
                error = trouble()
                if is_over():
                    break
                if error is not None:
                    return error
                self._counts.sleeps += 1
                self._hooks.hear(max(self._deadline_ns - time.monotonic_ns(), 0))
        finally:
            own[ASLEEP] = 0
        return None

    def _is_done_after_trying(self, reason: Reason, is_done: Callable[[], bool]) -> bool:
        """Give the collective up, unless it ``is_done`` after this rank asked to; see `detcoll_shm.verdict`."""
        own, half = self._words, self.sequence & 1
        self.stage.write_reason(reason.encode())
        own[CALLED + half] = self._digest
        own[DIGEST + half] = TRYING
        Lock().acquire()  # a fence
        done = is_done()
        self.publish(DIGEST + half, self._digest if done else GIVEN_UP)
        return done

    def _has_ended(self) -> bool:
        """Tell whether all ranks have published the last word of the collective, so that others may have returned."""
        word, value = self.last_word or (ARRIVED, self.sequence)
        return self._words[word] >= value and all(words[word] >= value for _, words in self._peers)

    def _trouble(self, word: int, value: int) -> DetcollError | None:
        """Return why the wait for others has no end."""
        if not self._hooks.is_open():
            return Closed("the endpoint was closed during a collective")
        self._compare_with_those_here()
        # Who left or died comes before who gave up: often the one is the reason of the other.
        for peer, theirs in self._peers:
            error = self._hooks.why_lost(peer.rank)
            if error is not None and theirs[word] < value:
                return error
        for peer, theirs in self._peers:
            if 0 < theirs[ENDED] <= self.sequence:
                return self._relay(peer)
        return self._late(word, value) if time.monotonic_ns() >= self._deadline_ns else None

    def _trouble_with(self, peer: PeerStage, deadline_ns: int, word: int) -> DetcollError | None:
        """Return why nothing more will come from ``peer``."""
        if not self._hooks.is_open():
            return Closed("the endpoint was closed during a collective")
        error = self._hooks.why_lost(peer.rank)
        if error is None and 0 < peer.stage.words[ENDED] <= self.sequence:
            return self._relay(peer)
        if error is None and time.monotonic_ns() >= deadline_ns:
            return self._late(word, self.sequence)
        return error

    def _trouble_beside_device(self, what: str) -> DetcollError | None:
        """Return why this rank waits for its device in vain."""
        if not self._hooks.is_open():
            return Closed("the endpoint was closed during a collective")
        word, value = self.last_word or (ARRIVED, self._coming)
        if value == NEVER:
            word, value = ARRIVED, self._coming
        for peer, theirs in self._peers:
            error = self._hooks.why_lost(peer.rank)
            if error is not None and theirs[word] < value:
                return error
        for peer, theirs in self._peers:
            if 0 < theirs[ENDED] <= self._coming:
                return self._relay(peer)
        return self._missed(what) if time.monotonic_ns() >= self._deadline_ns else None

    def _relay(self, peer: PeerStage) -> DetcollError:
        """Return why ``peer`` gave up, as this rank raises it; those who look here are told the same."""
        self._relayed = Reason.decode(peer.stage.read_reason())
        return self._relayed.error(self.name, self._call)

    @property
    def _call(self) -> str:
        named = f" ({self._descriptor.name})" if self._descriptor.name else ""
        return f"{self._descriptor.kind} number {self._number}{named}"

    @property
    def _number(self) -> int:
        return self.number if self.number >= 0 else self.sequence - 1

    def _late(self, word: int, value: int) -> DeadlineMissed:
        lack = _LACKS.get(word, "has not folded its part" if word == FOLDED else "has not given its part")
        behind = [peer.name for peer, words in self._peers if words[word] < value]
        awaited = ", ".join(f"rank {rank}, which {lack}" for rank in behind)
        return self._missed(awaited or "nobody")

    def _missed(self, awaited: str) -> DeadlineMissed:
        until = f"after {self.timeout_ns / 1e9:g} s (the timeout of the call)" if self.timeout_ns else "by its deadline"
        return DeadlineMissed(f"rank {self.name}: {self._call} was not finished {until}; it waits for {awaited}")

    def _compare_with_those_here(self) -> None:
        sequence, half = self.sequence, self.sequence & 1
        for peer, words in self._peers:
            if words[ARRIVED] >= sequence:
                digest = words[DIGEST + half]
                if (words[CALLED + half] if digest < 0 else digest) != self._digest:
                    self._differ(peer)

    def _look_into(self, peer: PeerStage, words: memoryview[int], word: int) -> None:
        """Find out why the digest of ``peer`` is not this rank's; return if it is after all."""
        if words[word] == TRYING:
            deadline_ns = max(self._deadline_ns, time.monotonic_ns() + LONGEST_VERDICT_NS)
            error = self._hear_until(
                lambda: words[word] != TRYING, lambda: self._trouble_with(peer, deadline_ns, ARRIVED)
            )
            if error is not None:
                raise error
        if words[word] == self._digest:
            return
        if words[word] == GIVEN_UP and words[CALLED + (self.sequence & 1)] == self._digest:
            raise self._relay(peer)
        self._differ(peer)

    def _differ(self, peer: PeerStage) -> None:
        """Exchange descriptors in full with ``peer``, whose digest differs, and raise."""
        sequence = self.sequence
        mine = msgspec.structs.replace(self._descriptor, sequence=self._number)
        self.stage.write_text(mine.encode())
        self.publish(TOLD, sequence)
        words = peer.stage.words

        def trouble() -> DetcollError | None:
            error = self._trouble_with(peer, self._deadline_ns, TOLD)
            # Who heard of a difference from another rank may have done so after all had arrived, and counts this
            # collective as done: it ends with the next one, and tells nothing here.
            return self._relay(peer) if error is None and words[ENDED] > 0 else error

        error = self._hear_until(lambda: words[TOLD] >= sequence, trouble)
        if error is not None:
            raise error
        mine.compare(self.name, peer.name, peer.stage.read_text())
