"""A group in the engine of one rank: its calls, and the failure that ended it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from detcoll.runtime.control import Cause
from detcoll.runtime.group import Group
from detcoll.runtime.operation import Operation
from detcoll.runtime.transfer import Mail

LARGEST_KEPT_NUMBERS = 256


class NativeCalls(Protocol):
    """The calls of a group that a transport does by itself, as the engine sees them."""

    @property
    def latest(self) -> int:
        """The number of the latest call that was begun, or -1."""

    @property
    def unfinished(self) -> tuple[int, str] | None:
        """The number of the earliest call that has not ended and its state, for people; None if all have ended."""

    def called(self, sequence: int) -> str:
        """Return what was called with this number, for people."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """What will end the group if the call of this number turns out to be native; see `detcoll.runtime.mixed`."""

    sequence: int
    until_ns: int
    error: Exception
    cause: Cause | None = None


@dataclass(eq=False, slots=True)
class Membership:
    """State of a group on one rank; ``active`` and ``waiting`` are in order of sequence.

    ``contacts`` : members to which this rank sends causes.  ``latest`` : sequence of the latest call made here, or -1.
    ``refused`` : calls that a rank refused, by sequence.  ``dropped`` : calls whose messages the endpoints discard.
    ``told`` : whether the failure was raised to a caller.  ``mail`` : sends and receives.  ``natives`` : the calls that
    a transport does, None if all are planned.  ``numbers`` : of the latest calls that were planned or refused here,
    kept where others are native.  ``doubts`` : what may end the group because of its native calls.
    ``is_bound`` : whether a call that one rank refuses ends the group.
    """

    group: Group
    acquaintances: frozenset[int]
    contacts: set[int]
    waiting: deque[Operation] = field(default_factory=deque)
    active: list[Operation] = field(default_factory=list)
    work: list[tuple[int, int, Operation]] = field(default_factory=list)
    latest: int = -1
    refused: dict[int, Cause] = field(default_factory=dict)
    dropped: deque[int] = field(default_factory=deque)
    failure: Exception | None = None
    cause: Cause | None = None
    told: bool = False
    mail: Mail = field(default_factory=Mail)
    natives: NativeCalls | None = None
    numbers: deque[int] = field(default_factory=lambda: deque(maxlen=LARGEST_KEPT_NUMBERS))
    doubts: list[Doubt] = field(default_factory=list)
    is_bound: bool = False

    def made(self, sequence: int) -> None:
        """Take note that a call of this number was planned or refused here."""
        self.latest = max(self.latest, sequence)
        if self.natives is not None:
            self.numbers.append(sequence)

    def has_made(self, sequence: int) -> bool:
        """Whether a call of this number was planned or refused here."""
        if self.natives is None:
            return sequence <= self.latest
        numbers = self.numbers
        return sequence in numbers or (len(numbers) == LARGEST_KEPT_NUMBERS and sequence < numbers[0])

    def is_native(self, sequence: int) -> bool:
        """Whether a call of this number was native here, as far as the engine knows all calls."""
        return self.natives is not None and self.natives.latest >= sequence and not self.has_made(sequence)

    @property
    def idle(self) -> bool:
        """Whether no call is waiting or active."""
        return not self.waiting and not self.active and not self.mail.pending

    @property
    def first(self) -> Operation | None:
        """The earliest active call without a result, or None."""
        for operation in self.active:
            if not operation.reported:
                return operation
        return None

    def clear(self) -> None:
        """Forget all calls."""
        self.active, self.work, self.doubts = [], [], []
        self.waiting.clear()
