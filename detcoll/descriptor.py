"""What a collective was called with: equal on all ranks, or the call is an error."""

from __future__ import annotations

import msgspec

from detcoll.errors import PlanMismatch, UsageError

HELLO_BYTES = 256
"""Size of the record that ranks compare about every collective."""


class Descriptor(msgspec.Struct, frozen=True):
    """What a collective was called with; equal on all ranks, or the call is an error."""

    sequence: int
    kind: str
    op: str
    dtype: str
    count: int
    root: int
    arrays: int = 1

    def encode(self) -> bytes:
        """Return the record that ranks compare: its length, its text, and padding."""
        text = msgspec.json.encode(self)
        if len(text) > HELLO_BYTES - 2:
            raise UsageError(f"{self} is too long to describe")
        return (len(text).to_bytes(2, "little") + text).ljust(HELLO_BYTES, b"\0")

    def compare(self, rank: int, other: int, record: bytes) -> None:
        """Hold this rank's descriptor against the record that rank ``other`` sent.

        Raises
        ------
        PlanMismatch
            If they differ; shows both in full.
        """
        if record != self.encode():
            text = record[2 : 2 + int.from_bytes(record[:2], "little")].decode(errors="replace")
            raise PlanMismatch(
                f"ranks called different collectives: rank {rank} called {msgspec.json.encode(self).decode()}, "
                f"rank {other} called {text}"
            )
