"""A group in the engine of one rank: its calls, and the failure that ended it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from detcoll.runtime.control import Cause
from detcoll.runtime.group import Group
from detcoll.runtime.operation import Operation
from detcoll.runtime.transfer import Mail


@dataclass(eq=False, slots=True)
class Membership:
    """State of a group on one rank; ``active`` and ``waiting`` are in order of sequence.

    ``contacts`` : members to which this rank sends causes.  ``latest`` : sequence of the latest call made here, or -1.
    ``refused`` : calls that a rank refused, by sequence.  ``dropped`` : calls whose messages the endpoints discard.
    ``told`` : whether the failure was raised to a caller.  ``mail`` : sends and receives.
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
        self.active, self.work = [], []
        self.waiting.clear()
