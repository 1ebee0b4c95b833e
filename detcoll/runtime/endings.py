"""Failed calls whose arrays may still be written to by receives.

If an endpoint is in the middle of receiving a message, the receive ends only once the message is complete, although its
tag was discarded. Until then the array does not belong to the caller, so the failure is reported only afterwards. The
wait is bounded, because the sender may be gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.runtime.operation import Operation
from detcoll.runtime.transfer import Transfer

LONGEST_NS = 1_000_000_000
"""Longest delay of the report of a failure."""


@dataclass(eq=False, slots=True)
class _Held:
    receives: set[int]
    error: Exception
    until_ns: int


class Endings:
    """Holds failed calls until their receives into the caller's array have ended."""

    def __init__(self) -> None:
        self._held: dict[Operation | Transfer, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, operation: Operation | Transfer, error: Exception, now_ns: int) -> bool:
        """Hold a failed call and return True, or return False if no receive into its array is pending."""
        receives = operation.open_receives
        if receives:
            self._held[operation] = _Held(receives, error, now_ns + LONGEST_NS)
        return bool(receives)

    def ended(self, operation: Operation | Transfer, step: int) -> Exception | None:
        """Process the end of a receive; return the error of its call if it was the last one."""
        held = self._held.get(operation)
        if held is None:
            return None
        held.receives.discard(step)
        if held.receives:
            return None
        del self._held[operation]
        return held.error

    def overdue(self, now_ns: int | None = None) -> list[tuple[Operation | Transfer, Exception]]:
        """Remove and return the calls held for `LONGEST_NS`, or all if ``now_ns`` is None, each with its error."""
        due = [
            (operation, held.error) for operation, held in self._held.items()
            if now_ns is None or now_ns >= held.until_ns
        ]  # fmt: skip
        for operation, _ in due:
            del self._held[operation]
        return due
