"""A double of NCCL on `detcoll.testing.device.StrictDevice`, for ranks that are threads of one process.

Data moves when all ranks of a clique have come to their calls on their streams, and only then, so a rank that does not
come leaves the others waiting, as NCCL would. What NCCL would answer with wrong values, or by hanging for a reason that
nobody sees, raises `Misuse`: ranks that start different calls, memory of another device or freed, a clique that another
thread uses, a call while an earlier one is in progress.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.device.nccl import TYPES, Clique, Library, Part
from detcoll.errors import TransportError
from detcoll.testing.device import StrictDevice
from detcoll.testing.device_memory import Misuse
from detcoll.testing.device_streams import Operation, Stream
from detcoll.types import DTYPES

_UFUNCS = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


@dataclass(eq=False, slots=True)
class _Turn:
    """One call of a clique: what each rank that has started it does, and on which stream."""

    started: dict[int, tuple[Sequence[Part], Stream, Operation]] = field(default_factory=dict)
    is_over: bool = False


class FakeNccl(Library):
    """NCCL of all ranks of this process.

    Parameters
    ----------
    cuda : StrictDevice
        Where their arrays are.

    ``cliques`` : all that were made, by id.  ``silent`` : whether what is started stays in progress, as where another
    rank does not connect.  ``calls`` : the names of all calls, in the order in which ranks made them.
    """

    def __init__(self, cuda: StrictDevice) -> None:
        self.cuda = cuda
        self.cliques: dict[bytes, _Meeting] = {}
        self.silent = False
        self.calls: list[str] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """See `Library.version`."""
        return 22809

    def unique_id(self) -> bytes:
        """See `Library.unique_id`."""
        return next(self._numbers).to_bytes(128, "big")

    def join(self, unique_id: bytes, size: int, place: int, device: int) -> Clique:
        """See `Library.join`."""
        with self._lock:
            meeting = self.cliques.setdefault(unique_id, _Meeting(self, size))
        made = FakeClique(meeting, place, device)
        meeting.members[place] = made
        return made

    def misuse(self, said: str) -> Misuse:
        """Return what to raise, and let the test know of it."""
        return self.cuda._misuse(said)


@dataclass(eq=False, slots=True)
class _Meeting:
    """A clique as all its ranks have it: ``turns`` in order, of which those that are over stay."""

    library: FakeNccl
    size: int
    members: dict[int, FakeClique] = field(default_factory=dict)
    turns: list[_Turn] = field(default_factory=list)

    def carry_out(self, turn: _Turn) -> None:
        """Move the data of a call that all ranks have come to; one that was aborted moves none."""
        if turn.is_over or any(member.is_aborted for member in self.members.values()):
            return
        turn.is_over = True
        lists = [turn.started[place][0] for place in range(self.size)]
        for parts in zip(*lists, strict=True):
            self._move(parts)

    def check(self, turn: _Turn) -> None:
        """Raise Misuse if ranks have started different calls."""
        said = {
            place: [(part.call, part.elems, part.dtype, part.op) for part in parts]
            for place, (parts, _, _) in turn.started.items()
        }
        first = next(iter(said.values()))
        if any(each != first for each in said.values()):
            raise self.library.misuse(f"ranks of a clique started different calls: {said}")

    def _move(self, parts: Sequence[Part]) -> None:
        call, elems, dtype = parts[0].call, parts[0].elems, DTYPES[parts[0].dtype]
        size, nbytes = self.size, parts[0].elems * dtype.itemsize
        taken = nbytes * size if call == "reduce_scatter" else nbytes
        given = [self._at(place, part.source, taken).copy().view(dtype) for place, part in enumerate(parts)]
        if call in ("all_gather", "broadcast"):
            whole = np.concatenate(given) if call == "all_gather" else given[0]
            for place, part in enumerate(parts):
                self._at(place, part.target, whole.nbytes)[:] = whole.view(np.uint8)
            return
        folded = given[0]
        for each in given[1:]:
            with np.errstate(all="ignore"):
                folded = _UFUNCS[parts[0].op](folded, each).astype(dtype)
        if call == "reduce_scatter":
            for place, part in enumerate(parts):
                self._at(place, part.target, nbytes)[:] = folded[place * elems :][:elems].view(np.uint8)
            return
        for place, part in enumerate(parts[:1] if call == "reduce" else parts):
            self._at(place, part.target, nbytes)[:] = folded.view(np.uint8)

    def _at(self, place: int, address: int, nbytes: int) -> NDArray[np.uint8]:
        return self.library.cuda._memory.bytes_at(address, nbytes, self.members[place].device)


class FakeClique(Clique):
    """One rank's end of a clique."""

    def __init__(self, meeting: _Meeting, place: int, device: int) -> None:
        self.device, self.is_aborted = device, False
        self._meeting, self._place = meeting, place
        self._count = 0
        self._thread = threading.get_ident()

    def is_settled(self) -> bool:
        """See `Clique.is_settled`: not before all ranks have joined."""
        self._check()
        meeting = self._meeting
        if any(member.is_aborted for member in meeting.members.values()):
            raise TransportError("NCCL failed with remote process exited or there was a network error (6)")
        return len(meeting.members) == meeting.size and not (meeting.library.silent and self._count)

    def start(self, parts: Sequence[Part], stream: int) -> None:
        """See `Clique.start`."""
        self._check()
        if not self.is_settled():
            raise self._meeting.library.misuse("a call while an earlier one is in progress")
        cuda, meeting = self._meeting.library.cuda, self._meeting
        with cuda._lock:
            cuda._check("nccl", self.device)
            while len(meeting.turns) <= self._count:
                meeting.turns.append(_Turn())
            turn = meeting.turns[self._count]
            self._count += 1
            found = cuda._streams.find(stream, self.device)
            operation = Operation(lambda: meeting.carry_out(turn), lambda: self._has_come(turn))
            turn.started[self._place] = (parts, found, operation)
            meeting.check(turn)
            meeting.library.calls += [part.call for part in parts]
            for part in parts:
                self._check_part(part)
            found.queue.append(operation)

    def abort(self) -> None:
        """See `Clique.abort`."""
        self._check()
        with self._meeting.library.cuda._lock:
            self.is_aborted = True

    def _has_come(self, turn: _Turn) -> bool:
        """Tell whether all ranks have come to a call on their streams, or it was aborted here."""
        if turn.is_over or self.is_aborted:
            return True
        return len(turn.started) == self._meeting.size and all(
            stream.queue and stream.queue[0] is operation for _, stream, operation in turn.started.values()
        )

    def _check(self) -> None:
        if self.is_aborted:
            raise self._meeting.library.misuse("a clique is used after it was aborted")
        if self._thread != threading.get_ident():
            raise self._meeting.library.misuse("a clique is used by another thread")

    def _check_part(self, part: Part) -> None:
        nbytes: Any = part.elems * DTYPES[part.dtype].itemsize
        times = self._meeting.size
        self._meeting._at(self._place, part.source, nbytes * (times if part.call == "reduce_scatter" else 1))
        self._meeting._at(self._place, part.target, nbytes * (times if part.call == "all_gather" else 1))
        if part.dtype not in TYPES:
            raise self._meeting.library.misuse(f"NCCL has no type {part.dtype}")
