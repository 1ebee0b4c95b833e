"""What a collective was called with: equal on all ranks, or the call is an error."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from detcoll.errors import PlanMismatch, UsageError
from detcoll.signature import signature_of
from detcoll.types import ReduceOp

HELLO_BYTES = 256
"""Size of the record that ranks compare about every collective."""

LARGEST_KEPT_ANNOUNCEMENTS = 1024

FIELDS = {
    "sequence": "the number of the call", "kind": "the kind", "op": "the operation", "dtype": "the type",
    "count": "the number of elements", "root": "the root", "arrays": "the number of arrays", "group": "the group",
    "name": "the name", "counts": "the sizes of blocks (counts)", "pair": "what they send each other",
    "cut": "the sizes of the arrays in their lists", "shape": "the shape", "by": "who reduces inside a site",
}  # fmt: skip
"""What errors call the fields of a descriptor."""


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a collective was called with; equal on all ranks, or the call is an error.

    ``group`` : the id of the group in hexadecimal, empty for the world.  ``name`` : what the caller calls it.
    ``counts`` : `digest_of` the sizes of the ranks' blocks, empty if they are equal.
    ``pair`` : where each rank states its own sizes, those for the rank that is told: the elements that this rank sends
    to it, and gets from it.
    ``cut`` : of a list of arrays, `digest_of` their elements in a block; empty for one array.
    ``shape`` : for people, and empty where shapes may differ; what is too long for the record is a digest there.
    ``by`` : ``NCCL`` where the devices of a site reduce, otherwise empty.
    """

    sequence: int
    kind: str
    op: str
    dtype: str
    count: int
    root: int
    arrays: int = 1
    group: str = ""
    name: str = ""
    counts: str = ""
    pair: tuple[int, ...] = ()
    cut: str = ""
    shape: str = ""
    by: str = ""

    @property
    def brief(self) -> str:
        """What was called, for people: the same for calls that fit together."""
        said = brief(self.kind, self.op, self.dtype, self.count, self.root, self.arrays, self.name, self.shape)
        return f"{said} by {self.by}" if self.by else said

    @property
    def told(self) -> str:
        """What was called, as mismatches tell it: also what this rank and the other one send each other."""
        if not self.pair:
            return self.brief
        named = f" ({self.name})" if self.name else ""
        return f"{self.kind} with {self.pair[0]} {self.dtype} for the other and {self.pair[1]} from it{named}"

    def encode(self) -> bytes:
        """Return the record that ranks compare: its length, its text, and padding."""
        text = msgspec.json.encode(self)
        if len(text) > HELLO_BYTES - 2:  # control characters of a name take six bytes each
            text = msgspec.json.encode(msgspec.structs.replace(self, name=shortened(self.name)))
        if len(text) > HELLO_BYTES - 2 and self.shape:
            digests = {"name": _digest(self.name, 8), "shape": _digest(self.shape, 4)}
            text = msgspec.json.encode(msgspec.structs.replace(self, **digests))
        if len(text) > HELLO_BYTES - 2:
            raise UsageError(f"{self} is too long to describe")
        return (len(text).to_bytes(2, "little") + text).ljust(HELLO_BYTES, b"\0")

    def compare(self, rank: int, other: int, record: bytes) -> None:
        """Hold this rank's descriptor against the record that rank ``other`` sent.

        Raises
        ------
        PlanMismatch
            If they differ; tells both and in what they differ.
        """
        expected = self if not self.pair else msgspec.structs.replace(self, pair=self.pair[::-1])
        if record != expected.encode():
            called, differences = _decode(expected.encode())._against(record)
            raise PlanMismatch(
                f"ranks called different collectives: rank {rank} called {self.told}, rank {other} called {called}"
                f"{differences}"
            )

    def _against(self, record: bytes) -> tuple[str, str]:
        """Say for people what another rank called and what differs; of some sizes there are only digests."""
        try:
            other = _decode(record)
            called = other.told
        except (msgspec.MsgspecError, UsageError, ValueError):
            return "something that this rank cannot read", ""
        differing = [field for field in FIELDS if getattr(self, field) != getattr(other, field)]
        if {"kind", "count"} & {*differing}:  # so shapes differ as well
            differing = [field for field in differing if field != "shape"]
        found = [FIELDS[field] for field in differing]
        if self.sequence != other.sequence:
            found[0] += f" (here {self.sequence}, there {other.sequence})"
        return called, f"; they differ in {' and '.join(found)}" if found else ""


def _decode(record: bytes) -> Descriptor:
    """Return what a record tells of a descriptor."""
    return msgspec.json.decode(record[2 : 2 + int.from_bytes(record[:2], "little")], type=Descriptor)


def is_out_of_step(error: Exception) -> bool:
    """Tell by its text, which is all that ranks pass on, whether an error says that calls have different numbers."""
    return isinstance(error, PlanMismatch) and FIELDS["sequence"] in str(error)


def shortened(name: str) -> str:
    """Return 41 plain characters, or fewer, that differ for different names, by all odds."""
    plain = "".join(letter for letter in name if letter.isalnum() and letter.isascii())
    return f"{plain[:24]}~{_digest(name, 8)}"


def digest_of(counts: Sequence[int]) -> str:
    """Return eight hexadecimal digits that differ for different ``counts``, by all odds; none for no counts."""
    return _digest(repr(tuple(counts)), 4) if counts else ""


def _digest(text: str, nbytes: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=nbytes).hexdigest()


def brief(
    kind: str, op: ReduceOp | str, dtype: np.dtype[Any] | str, count: int, root: int, arrays: int, name: str,
    shape: str = "",
) -> str:  # fmt: skip
    """Return what was called, for people: the same for calls that fit together."""
    named = f" ({name})" if name else ""
    signature = signature_of(kind)
    if not signature.has_array:
        return f"{kind}{named}"
    several = f" in {arrays} arrays" if arrays > 1 else ""
    shaped = f" of shape {shape}" if shape else ""
    operation = f", {ReduceOp(op).value}" if signature.has_op else ""
    source = f", root {root}" if signature.has_root else ""
    return f"{kind} of {count} {dtype}{several}{shaped}{operation}{source}{named}"


@dataclass(frozen=True, slots=True)
class Announcement:
    """A call as ranks compare it where a transport does it whole: its record, and a digest from 0 to 2**62 - 1.

    With the number of a call the digest is greater by that.
    """

    descriptor: Descriptor
    record: bytes
    digest: int

    def numbered(self, sequence: int) -> Announcement:
        """Return the announcement of the same call with its number in the group; -1 where it has none."""
        if sequence <= 0:
            return self
        descriptor = msgspec.structs.replace(self.descriptor, sequence=sequence)
        return Announcement(descriptor, descriptor.encode(), self.digest + sequence)

    def compare(self, rank: int, records: Sequence[bytes], ranks: Sequence[int] | None = None) -> None:
        """Hold it against the records of all ranks of a group.

        ``ranks`` : how errors name them, by default as they are numbered in the group.

        Raises
        ------
        PlanMismatch
            If one differs; tells it and this rank's.
        """
        names = range(len(records)) if ranks is None else ranks
        for other, record in zip(names, records, strict=True):
            self.descriptor.compare(names[rank], other, record)


@lru_cache(LARGEST_KEPT_ANNOUNCEMENTS)
def announce(
    kind: str, op: str, dtype: np.dtype[Any], count: int, root: int, arrays: int, name: str = "",
    counts: tuple[int, ...] = (), cut: tuple[int, ...] = (), shape: str = "",
) -> Announcement:  # fmt: skip
    """Return the announcement of a call without its number, which differs from call to call."""
    descriptor = Descriptor(
        0, kind, op, dtype.name, count, root, arrays, name=name, counts=digest_of(counts), cut=digest_of(cut),
        shape=shape,
    )  # fmt: skip
    record = descriptor.encode()
    return Announcement(
        descriptor, record, int.from_bytes(hashlib.blake2b(record, digest_size=8).digest(), "big") >> 2
    )  # fmt: skip
