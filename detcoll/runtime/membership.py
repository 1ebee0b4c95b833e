"""A group as the engine of one rank keeps it: its calls, and what ended it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from detcoll.runtime.control import Cause
from detcoll.runtime.group import Group
from detcoll.runtime.operation import Operation


@dataclass(eq=False, slots=True)
class Membership:
    """See the module; ``active`` and ``waiting`` are in the order of their sequence.

    ``contacts`` : members that hear from this rank what ends calls.  ``latest`` : the latest call made here.
    ``refused`` : calls that some rank refused, by sequence.  ``dropped`` : calls whose messages endpoints drop.
    ``told`` : whether a caller was shown the failure.
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

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is under way."""
        return not self.waiting and not self.active

    @property
    def first(self) -> Operation | None:
        """The earliest call whose result is not there yet."""
        for operation in self.active:
            if not operation.reported:
                return operation
        return None
