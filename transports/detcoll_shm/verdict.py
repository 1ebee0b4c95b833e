"""How all ranks agree whether a collective that one of them gave up has failed.

A collective ends in a round in which every rank publishes a word and waits for that word of all others. A rank that
gives up (its deadline passed, a peer is gone) must not do so while the last word arrives at another rank: the one would
raise and the other return. So it first asks, in the place of its digest::

    gives up                                    comes late
    DIGEST = TRYING                             publishes its word
    fence                                       fence
    looks for the words of all once more        has seen the words of all; looks at every DIGEST
      all there: DIGEST as it was, goes on        own digest: the collective is done
      else: DIGEST = GIVEN_UP, raises             TRYING: waits until it changes
                                                  GIVEN_UP: raises

Each side writes, passes a fence and then reads what the other wrote, so one of them sees the other (Dekker; see
`detcoll_shm.layout`). If the rank that gives up sees all words, all go on. If it misses one, whoever publishes that
word, and whoever sees it, finds the mark, since x86-64 shows stores to all processors in one order. A mark of one
collective is not taken for one of another: there are two digests in turn, as ranks are at most one call apart.

A rank that dies, or is stopped beyond the deadline of the others, between the two stores leaves the others without a
verdict. They raise, though one that had passed before returned.

Whoever gives up, for whatever reason, takes part in no collective from then on: ENDED is the number of the first one
without it, and its stage shows why. Those who wait, or come later, raise for the same reason.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from detcoll.errors import Closed, DeadlineMissed, DetcollError, PeerLost, PlanMismatch, TransportError
from detcoll_shm.stage import REASON_BYTES

TRYING, GIVEN_UP = -1, -2
"""Marks in the place of a digest; digests are not negative."""

_LENGTH_BYTES = 2
Cause = Literal["late", "lost", "differs", "failed"]


class Reason(msgspec.Struct, frozen=True):
    """Why a rank takes part in no collective any more, as it shows it to others."""

    cause: Cause
    text: str

    @classmethod
    def of(cls, error: BaseException, rank: int, call: str) -> Reason:
        """Return the reason for which ``rank`` gives up ``call``, because of ``error``."""
        if isinstance(error, DeadlineMissed):
            return cls("late", str(error))
        if isinstance(error, PlanMismatch):
            return cls("differs", str(error))
        if isinstance(error, PeerLost):
            return cls("lost", str(error))
        if isinstance(error, Closed):
            return cls("lost", f"rank {rank} left during {call}")
        if isinstance(error, KeyboardInterrupt):
            return cls("failed", f"rank {rank} was interrupted in {call}")
        return cls("failed", f"rank {rank} failed in {call}: {error!r}")

    def error(self, rank: int, call: str) -> DetcollError:
        """Return what ``rank`` raises in ``call`` when it finds this reason at another rank."""
        if self.cause == "late":
            return DeadlineMissed(f"rank {rank}: {call} cannot be finished, since others gave up: {self.text}")
        if self.cause == "differs":
            return PlanMismatch(self.text)
        return PeerLost(self.text) if self.cause == "lost" else TransportError(self.text)

    def encode(self) -> bytes:
        """Return the record for a stage; a long text is cut."""
        text = self.text.encode(errors="replace").decode()
        while True:
            record = msgspec.json.encode(Reason(self.cause, text))
            if len(record) <= REASON_BYTES - _LENGTH_BYTES:
                return len(record).to_bytes(_LENGTH_BYTES, "little") + record
            text = text[: len(text) * 3 // 4]

    @classmethod
    def decode(cls, record: bytes) -> Reason:
        """Return the reason that a stage shows."""
        nbytes = int.from_bytes(record[:_LENGTH_BYTES], "little")
        return msgspec.json.decode(record[_LENGTH_BYTES : _LENGTH_BYTES + nbytes], type=cls)
