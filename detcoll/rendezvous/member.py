"""The rules of a rank's side: its pending exchanges and the events it received. No socket, no thread, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from detcoll.errors import ConnectError, PeerLost, UsageError
from detcoll.rendezvous import wire


@dataclass(frozen=True, slots=True)
class Lost:
    """``rank`` is gone without a goodbye; ``why`` is the reason."""

    rank: int
    why: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Aborted:
    """``rank`` called `Session.abort` for ``group``; 0 is the whole job."""

    rank: int
    kind: str
    text: str
    group: int = 0


Event = Lost | Aborted


class Member:
    """State of one rank in the rendezvous."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.greeting: wire.Welcome | wire.Refused | wire.Missing | None = None
        self.has_parted = False
        self.hub_loss: str | None = None
        self._turns: Counter[tuple[str, tuple[int, ...] | None]] = Counter()
        self._calls: dict[wire.Key, wire.Gathered | wire.Missing | None] = {}
        self._events: list[Event] = []
        self._trouble: list[str] = []

    @property
    def has_events(self) -> bool:
        """Whether `events` has something to return."""
        return bool(self._events)

    def events(self) -> list[Event]:
        """Return the losses and aborts of other ranks since the last call."""
        told, self._events = self._events, []
        return told

    def group_of(self, name: str, ranks: Sequence[int] | None) -> tuple[int, ...] | None:
        """Return the members of an exchange in rank order, None for all ranks.

        Raises
        ------
        UsageError
            If ``ranks`` has duplicates or invalid ranks, or does not contain this rank.
        """
        if ranks is None:
            return None
        group = tuple(sorted(set(ranks)))
        if len(group) != len(ranks) or not all(0 <= rank < self.size for rank in group):
            raise UsageError(
                f"exchange {name[:64]!r}: ranks={list(ranks)[:64]} must be different ranks from 0 to {self.size - 1}"
            )
        if self.rank not in group:
            raise UsageError(
                f"exchange {name[:64]!r}: ranks={list(ranks)[:64]} does not contain this rank, {self.rank}"
            )
        return None if len(group) == self.size else group

    def count(self, name: str, group: tuple[int, ...] | None) -> wire.Key:
        """Return the key of the next exchange with this name and these members."""
        key = wire.Key(name, group, self._turns[name, group])
        self._turns[name, group] += 1
        return key

    def begin(self, key: wire.Key) -> None:
        """Register a pending exchange.

        Raises
        ------
        PeerLost
            If no exchange can succeed any more.
        """
        self._raise_trouble(key)
        self._calls[key] = None

    def is_settled(self, key: wire.Key) -> bool:
        """Return whether `outcome` would return a result or raise."""
        return self._calls[key] is not None or bool(self._trouble)

    def end(self, key: wire.Key) -> None:
        """Remove a pending exchange."""
        del self._calls[key]

    def outcome(self, key: wire.Key) -> list[bytes] | None:
        """Return the payloads of an exchange in rank order, None while it is pending.

        Raises
        ------
        PeerLost
            If it failed because a rank is lost, rank 0 has left, or a rank aborted the job.
        ConnectError
            If not all members arrived in time, a member has left, or the hub refused the exchange.
        """
        answer = self._calls[key]
        if isinstance(answer, wire.Gathered):
            return answer.payloads
        self._raise_trouble(key)
        if answer is None:
            return None
        match answer.fault:
            case "lost":
                raise PeerLost(f"exchange {key.name!r}: {answer.text}")
            case "other":
                raise ConnectError(f"exchange {key.name!r}: {answer.text}")
            case "absent":
                raise ConnectError(f"exchange {key.name!r}: {absence(answer, 'did not arrive in time')}")

    def take(self, message: wire.FromHub) -> None:
        """Process a message of the hub."""
        match message:
            case wire.LostRank(rank, why):
                self._events.append(Lost(rank, why))
            case wire.AbortedRank(rank, kind, text, group):
                self._events.append(Aborted(rank, kind, text, group))
                told = f"rank {rank} gave up ({kind}): {text}"
                if not group and told not in self._trouble:
                    self._trouble.append(told)
            case wire.Closing():
                self.has_parted = True
                self._trouble.append("rank 0 has left")
            case wire.Gathered(key) | wire.Missing(wire.Key() as key):
                if key in self._calls:
                    self._calls[key] = message
            case wire.Refused() if isinstance(self.greeting, wire.Welcome):
                self.lose_hub(message.text)
            case _:
                self.greeting = message

    def lose_hub(self, why: str) -> None:
        """Record that rank 0 is lost or has given this rank up; all exchanges fail from now on."""
        if self.has_parted or self.hub_loss is not None:
            return
        self.hub_loss = why
        self._trouble.append(f"rank 0 is lost: {why}")
        self._events.append(Lost(0, why))

    def _raise_trouble(self, key: wire.Key) -> None:
        if self._trouble:
            raise PeerLost(f"exchange {key.name!r}: {'; '.join(self._trouble)}")


def absence(missing: wire.Missing, what: str) -> str:
    """Return a sentence that lists the missing ranks, followed by further details."""
    shown = ", ".join(str(rank) for rank in missing.ranks[:32])
    more = f" and {len(missing.ranks) - 32} more" if len(missing.ranks) > 32 else ""
    return f"rank {shown}{more} {what}" + (f"; {missing.text}" if missing.text else "")
