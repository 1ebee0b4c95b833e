"""Calls that have failed while messages may still be written into their arrays.

A receive that an endpoint is in the middle of ends only once that message is there, although its tags are dropped.
Until then the caller's array is not its own, so it hears of the failure only after that; but soon in any case, since
the sender may be gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.plan.ir import Buffer, Kind
from detcoll.runtime.operation import Operation

LONGEST_NS = 1_000_000_000
"""How long a caller waits for that at most."""


@dataclass(eq=False, slots=True)
class _Held:
    receives: set[int]
    error: Exception
    until_ns: int


class Endings:
    """Holds failed calls until their receives into the caller's array have ended."""

    def __init__(self) -> None:
        self._held: dict[Operation, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, operation: Operation, error: Exception, now_ns: int) -> bool:
        """Keep a call that has failed; False where nothing is written into its array any more."""
        kinds, buffers = operation.columns.kind, operation.columns.buffer
        receives = {
            step for step in operation.machine.under_way if kinds[step] == Kind.RECV and buffers[step] == Buffer.USER
        }
        receives -= operation.settled.union(operation.held)
        if receives:
            self._held[operation] = _Held(receives, error, now_ns + LONGEST_NS)
        return bool(receives)

    def ended(self, operation: Operation, step: int) -> Exception | None:
        """Take note that a receive has ended; return the error of its call if that was the last."""
        held = self._held.get(operation)
        if held is None:
            return None
        held.receives.discard(step)
        if held.receives:
            return None
        del self._held[operation]
        return held.error

    def overdue(self, now_ns: int | None = None) -> list[tuple[Operation, Exception]]:
        """Give out calls that were kept for long enough, without a time all of them, each with its error."""
        due = [
            (operation, held.error) for operation, held in self._held.items()
            if now_ns is None or now_ns >= held.until_ns
        ]  # fmt: skip
        for operation, _ in due:
            del self._held[operation]
        return due
