"""The rules of the hub: membership, exchanges and lost ranks. No socket, no thread, no clock.

The hub welcomes the ranks once all have joined. It collects the payloads of an exchange and sends them to its members.
When a rank is lost or aborts, the hub tells all others and fails the exchanges that need the rank. It reports missing
ranks shortly before the earliest deadline of the waiting ranks, so that they learn who is missing before they time out.

A process whose hello does not match is refused, and the others go on waiting: it may be a stray, or a leftover of an
earlier job. If the meeting later fails because a rank is missing, the error lists the refusals.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from detcoll.rendezvous import wire

_KEPT_FAILURES = 4096
_KEPT_STRAYS = 8
_SHOWN_RANKS = 32
_SHOWN_CHARS = 256


@dataclass(eq=False, slots=True)
class _Exchange:
    """Payloads received for an exchange, and the time by which it succeeds or fails."""

    answer_by_ns: int
    payloads: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Gone:
    """How a rank left; ``text`` is the predicate of a sentence that begins with "rank N"."""

    text: str
    is_lost: bool


class Hub:
    """The state of one world.

    Methods process events; `answers` returns the messages to send as a result.

    Parameters
    ----------
    size, job, epoch
        Values that a hello must match for its rank to be admitted.
    """

    def __init__(self, size: int, job: str, epoch: int) -> None:
        self.size, self.job, self.epoch = size, job, epoch
        self.reach = ""
        self.is_assembled = False
        self._present: set[int] = set()
        self._gone: dict[int, _Gone] = {}
        self._join_by_ns = 2**63
        self._failure: wire.Missing | wire.Refused | None = None
        self._told: set[int] = set()
        self._strays: dict[str, None] = {}
        self._exchanges: dict[wire.Key, _Exchange] = {}
        self._failed: dict[wire.Key, wire.Missing] = {}
        self._answers: list[tuple[int, wire.FromHub]] = []

    @property
    def is_over(self) -> bool:
        """Whether every rank has left, or was told why the meeting failed."""
        return not self._present if self.is_assembled else len(self._told) == self.size

    def answers(self) -> list[tuple[int, wire.FromHub]]:
        """Return pending (destination rank, message) pairs and clear them."""
        made, self._answers = self._answers, []
        return made

    def next_ns(self) -> int | None:
        """Return the time of the next `on_time` call, or None if no timer is running."""
        times = [exchange.answer_by_ns for exchange in self._exchanges.values()]
        if self._present and not self.is_assembled and self._failure is None:
            times.append(self._join_by_ns)
        return min(times, default=None)

    def on_time(self, now_ns: int) -> None:
        """Fail the meeting and the exchanges that are due, and tell their members which ranks are missing."""
        if self._present and not self.is_assembled and self._failure is None and now_ns >= self._join_by_ns:
            absent = tuple(rank for rank in range(self.size) if rank not in self._present)
            self._fail_meeting(wire.Missing(None, "absent", absent, "; ".join(self._strays)))
        for key in [key for key, exchange in self._exchanges.items() if now_ns >= exchange.answer_by_ns]:
            came = self._exchanges[key].payloads
            absent = tuple(rank for rank in self._members(key) if rank not in came)
            failure = wire.Missing(key, "absent", absent, self._elsewhere(key, absent))
            self._fail(key, failure)
            self._failed[key] = failure
            if len(self._failed) > _KEPT_FAILURES:
                del self._failed[next(iter(self._failed))]

    def greet(self, hello: wire.Hello, now_ns: int) -> wire.Refused | wire.Missing | None:
        """Admit a rank and return None, or return the reason for refusing it."""
        refusal = self._refusal(hello)
        if refusal is not None:
            self._note_stray(hello, refusal)
            return refusal
        if self._failure is not None:
            self._told.add(hello.rank)
            return self._failure
        self._present.add(hello.rank)
        self._join_by_ns = min(self._join_by_ns, _answer_by_ns(hello.remaining_ms, now_ns))
        if len(self._present) == self.size:
            self.is_assembled = True
        return None

    def welcome(self) -> None:
        """Welcome all ranks; called once, after the last one was admitted."""
        self._tell(self._present, wire.Welcome(self.reach))

    def gather(self, rank: int, gather: wire.Gather, now_ns: int) -> None:
        """Process a rank's contribution to an exchange."""
        key = gather.key
        members = self._members(key)
        gone = {other: self._gone[other] for other in members if other in self._gone}
        if rank not in members or any(not 0 <= member < self.size for member in members):
            self._tell([rank], wire.Missing(key, "other", (), f"rank {rank} cannot take part in it"))
        elif gone:
            self._tell([rank], _without(key, gone))
        elif key in self._failed:
            self._tell([rank], self._failed[key])
        else:
            exchange = self._exchanges.setdefault(key, _Exchange(2**63))
            exchange.payloads[rank] = gather.payload
            exchange.answer_by_ns = min(exchange.answer_by_ns, _answer_by_ns(gather.remaining_ms, now_ns))
            if len(exchange.payloads) == len(members):
                del self._exchanges[key]
                self._tell(members, wire.Gathered(key, [exchange.payloads[member] for member in members]))

    def abort(self, rank: int, abort: wire.Abort) -> None:
        """Forward a rank's abort to all other ranks."""
        told = wire.AbortedRank(rank, abort.kind, abort.text[: wire.TEXT_CHARS], abort.group)
        self._tell(self._present - {rank}, told)

    def leave(self, rank: int) -> None:
        """Process the goodbye of a rank."""
        self._present.discard(rank)
        self._go(rank, _Gone("has left", is_lost=False))

    def lose(self, rank: int, why: str) -> None:
        """Process the loss of a rank that sent no goodbye, and tell all other ranks."""
        if rank not in self._present:
            return
        self._present.remove(rank)
        if self.is_assembled:
            self._tell(self._present, wire.LostRank(rank, why))
        self._go(rank, _Gone(f"is lost: {why}", is_lost=True))

    def close(self) -> None:
        """Tell the remaining ranks that rank 0 has left and the hub closes."""
        if self.is_assembled:
            self._tell(self._present, wire.Closing())

    def _members(self, key: wire.Key) -> tuple[int, ...] | range:
        return range(self.size) if key.ranks is None else key.ranks

    def _tell(self, ranks: Iterable[int], message: wire.FromHub) -> None:
        self._answers += [(rank, message) for rank in sorted(ranks)]

    def _go(self, rank: int, gone: _Gone) -> None:
        self._gone[rank] = gone
        if not self.is_assembled:
            if self._failure is None:
                self._fail_meeting(wire.Refused("world", f"rank {rank} joined, but left before all ranks had joined"))
            return
        for key in [key for key in self._exchanges if rank in self._members(key)]:
            self._fail(key, _without(key, {rank: gone}))

    def _fail(self, key: wire.Key, failure: wire.Missing) -> None:
        came = self._exchanges.pop(key).payloads
        self._tell(self._present & came.keys(), failure)

    def _fail_meeting(self, failure: wire.Missing | wire.Refused) -> None:
        self._failure = failure
        self._told |= self._present
        self._tell(self._present, failure)

    def _refusal(self, hello: wire.Hello) -> wire.Refused | None:
        """Return the reason for refusing this hello, or None."""
        if hello.version != wire.VERSION:
            return wire.Refused(
                "usage", f"rank {hello.rank} has version {hello.version} of the rendezvous, rank 0 has {wire.VERSION}"
            )
        if hello.job != self.job:
            return wire.Refused("world", "it belongs to another job; set DETCOLL_RENDEZVOUS to an address of your own")
        if hello.size != self.size:
            return wire.Refused(
                "usage", f"rank {hello.rank} says that the world has {hello.size} ranks, rank 0 says {self.size}"
            )
        if not 0 <= hello.rank < self.size:
            return wire.Refused("usage", f"rank {hello.rank} is not in a world of {self.size} ranks")
        if hello.epoch > self.epoch:
            return wire.Refused("later", "the previous meeting is not over yet")
        if hello.epoch < self.epoch:
            return wire.Refused("world", "the ranks of this job have already met, without this process")
        if self._failure is not None:
            return None
        if hello.rank in self._gone:
            return wire.Refused("usage", f"rank {hello.rank} was here before and {self._gone[hello.rank].text}")
        if hello.rank in self._present:
            return wire.Refused("usage", f"two processes say that they are rank {hello.rank}")
        return None

    def _note_stray(self, hello: wire.Hello, refusal: wire.Refused) -> None:
        if refusal.fault != "later" and len(self._strays) < _KEPT_STRAYS:
            who = f"a process that says it is rank {hello.rank} of {hello.size} was refused"
            self._strays[f"{who}: {refusal.text}"] = None

    def _elsewhere(self, missed: wire.Key, absent: Iterable[int]) -> str:
        """Return as text which other exchanges the absent ranks wait in, or have waited in with the same members."""
        came = {key: frozenset(exchange.payloads) for key, exchange in self._exchanges.items()}
        for key, failure in self._failed.items():
            if key.ranks == missed.ranks:
                before = frozenset(self._members(key)).difference(failure.ranks)
                if before.issubset(absent):  # not the same exchange, tried again
                    came[key] = before
        found = [
            f"rank {rank} came to {key.name[:_SHOWN_CHARS]!r} of {_list(key.ranks)}"
            for rank in absent
            for key, ranks in came.items()
            if rank in ranks
        ]
        return "; ".join(found[:_KEPT_STRAYS])


def _answer_by_ns(remaining_ms: int, now_ns: int) -> int:
    """Return when to answer a rank: up to 0.5 s before its deadline, so that the answer arrives in time."""
    patience_ns = max(0, remaining_ms - min(500, remaining_ms // 10)) * 10**6
    return now_ns + min(patience_ns, 2**62)


def _without(key: wire.Key, gone: dict[int, _Gone]) -> wire.Missing:
    text = ", ".join(f"rank {rank} {how.text}" for rank, how in sorted(gone.items())[:_KEPT_STRAYS])
    fault: Literal["lost", "other"] = "lost" if any(how.is_lost for how in gone.values()) else "other"
    return wire.Missing(key, fault, tuple(sorted(gone)), text)


def _list(ranks: tuple[int, ...] | None) -> str:
    if ranks is None:
        return "all ranks"
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"ranks {', '.join(map(str, ranks[:_SHOWN_RANKS]))}{more}"
