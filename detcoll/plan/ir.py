"""The plan: one rank's part of a collective, as data.

A plan is a directed acyclic graph of steps. A step starts when all steps it comes ``after`` have ended:

- SEND    moves ``length`` elements at ``offset`` of ``buffer`` to ``peer``; ends when that memory may be written again
- RECV    takes ``length`` elements from ``peer``: into ``buffer`` (receive-copy), or, with ``buffer`` LENT, as a view
          that a later FOLD reads where it arrived (receive-fold)
- FOLD    folds its inputs, in the order given, into ``buffer``; with one input it is a copy

Steps are rows of a structured array, what they come after and what they read are two flat arrays beside it: a quarter
of a million steps stay cheap, and the digest is a hash of their bytes. Lengths and offsets count elements, so one plan
serves every element type of one width.

Buffers: IN is the caller's input, OUT its output; a collective that works in place has OUT alone. PARTIAL is scratch in
the array's own type, ACCUMULATOR scratch in the type that folds use (float32 for 16-bit floats). Scratch is a ring of
chunk-sized places that steps reuse in turn, so memory does not grow with the array.

Where the caller's arrays lie on a device they are DEVICE_IN and DEVICE_OUT, and IN and OUT are memory of the host.
FOLDs of one input copy between them; no other step touches a device (`detcoll.plan.staging`). Where the devices of a
site reduce among themselves, FOLDs from a device to a device are what they do (`detcoll.plan.rails`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detcoll.signature import signature_of


class Kind(IntEnum):
    """What a step does."""

    SEND = 0
    RECV = 1
    FOLD = 2


class Buffer(IntEnum):
    """Where elements live."""

    OUT = 0
    PARTIAL = 1
    ACCUMULATOR = 2
    LENT = 3
    IN = 4
    DEVICE_OUT = 5
    DEVICE_IN = 6


_DEVICES = [Buffer.DEVICE_OUT, Buffer.DEVICE_IN]


class Phase(IntEnum):
    """Which stage of the collective a step belongs to."""

    LOCAL_REDUCE = 0
    WIDE_REDUCE = 1
    WIDE_GATHER = 2
    LOCAL_GATHER = 3


STEP = np.dtype(
    [
        ("kind", "u1"),
        ("phase", "u1"),
        ("buffer", "u1"),
        ("wide", "u1"),
        ("final", "u1"),
        ("accumulated", "u1"),
        ("peer", "i4"),
        ("tag", "u4"),
        ("offset", "i8"),
        ("length", "i8"),
        ("after_end", "i4"),
        ("inputs_end", "i4"),
    ]
)
"""One step. ``wide``: the peer is in another site. ``final``: this FOLD completes the result; an average of other than
16-bit floats divides here. ``accumulated``: the message is in the accumulation type. ``after_end``, ``inputs_end``:
where this step's rows end in `Plan.after`, `Plan.inputs`."""

INPUT = np.dtype([("buffer", "u1"), ("offset", "i8"), ("ranks", "i4")])
"""One input of a FOLD; with buffer LENT, ``offset`` is the index of the RECV step that lends it. ``ranks``: how many
ranks' contributions it holds, which is its weight in an average of 16-bit floats."""

LARGEST_PLAN_TAG = 2**20 - 1
"""Tags inside a plan stay below 20 bits; the rest of a transport's tag tells collectives apart."""


@dataclass(frozen=True, slots=True)
class Collective:
    """What is to be done, in terms that a plan depends on.

    ``count`` : elements of the largest array that a rank has.  ``itemsize`` : bytes of one, which folds in
    ``accumulator_itemsize`` bytes.  ``root`` : where the kind has one.
    ``counts`` : by rank, the elements of its block where blocks differ; of an all-to-all, what this rank sends to each.
    ``out_counts`` : of an all-to-all whose blocks differ, what this rank gets from each.

    Raises
    ------
    UsageError
        If no collective has the name ``kind``.
    """

    kind: str
    count: int
    itemsize: int
    accumulator_itemsize: int
    root: int = 0
    counts: tuple[int, ...] = ()
    out_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no reader of a plan knows."""
        signature_of(self.kind)

    @property
    def nbytes(self) -> int:
        """Size V of the largest array in bytes."""
        return self.count * self.itemsize

    def evened(self, size: int) -> Collective:
        """Return the same with equal blocks where this rank knows only its own sizes, for what needs those of all."""
        if not self.out_counts:
            return self
        most = max(sum(self.counts), sum(self.out_counts))
        return replace(self, count=-(-most // size) * size, counts=(), out_counts=())

    def blocks(self, size: int) -> tuple[int, ...]:
        """Return the elements of each rank's block."""
        return self.counts or (self.count // size,) * size


class Step(NamedTuple):
    """A row of `STEP` as Python numbers, which are quicker to read one by one than an array's."""

    kind: int
    phase: int
    buffer: int
    wide: int
    final: int
    accumulated: int
    peer: int
    tag: int
    offset: int
    length: int
    after_end: int
    inputs_end: int


class Columns:
    """What carrying out a plan asks of its steps, a list a field: a million steps take a quarter of what rows take.

    ``kind``, ``buffer``, ``peer`` : as in `STEP`.  ``nbytes`` : what a step moves or writes.
    """

    __slots__ = ("buffer", "kind", "nbytes", "peer")

    def __init__(self, steps: NDArray[Any], collective: Collective) -> None:
        widths = np.where(steps["accumulated"] == 1, collective.accumulator_itemsize, collective.itemsize)
        self.kind: list[int] = steps["kind"].tolist()
        self.buffer: list[int] = steps["buffer"].tolist()
        self.peer = shared(steps["peer"])
        self.nbytes = shared(steps["length"] * widths)


def shared(values: NDArray[Any]) -> list[int]:
    """Return whole numbers as a list in which equal ones are one object."""
    distinct, places = np.unique(values, return_inverse=True)
    few: list[int] = distinct.tolist()
    return [few[place] for place in places]


@dataclass(frozen=True, eq=False)
class Plan:
    """One rank's part.

    ``in_elems``, ``out_elems``, ``partial_elems``, ``accumulator_elems`` : how many elements the buffers hold.
    ``device_in``, ``device_out`` : whether the caller's input and output lie on a device.
    ``mates`` : the other ranks whose devices reduce with this one's; none if devices do not reduce.
    """

    collective: Collective
    algorithm: str
    rank: int
    size: int
    steps: NDArray[Any]
    after: NDArray[np.int32]
    inputs: NDArray[Any]
    out_elems: int
    in_elems: int = 0
    partial_elems: int = 0
    accumulator_elems: int = 0
    device_in: bool = False
    device_out: bool = False
    mates: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """Hexadecimal hash of everything in this part."""
        hashed = hashlib.blake2b(digest_size=16)
        elems = (self.out_elems, self.in_elems, self.partial_elems, self.accumulator_elems)
        head = (self.collective, self.algorithm, self.rank, self.size, *elems, self.device_in, self.device_out)
        hashed.update(repr((*head, self.mates) if self.mates else head).encode())
        for part in (self.steps, self.after, self.inputs):
            hashed.update(np.ascontiguousarray(part).tobytes())
        return hashed.hexdigest()

    @cached_property
    def rows(self) -> list[Step]:
        """The steps as Python numbers."""
        return [Step._make(row) for row in self.steps.tolist()]

    @cached_property
    def columns(self) -> Columns:
        """The steps as the engine reads them."""
        return Columns(self.steps, self.collective)

    @cached_property
    def blocked_by(self) -> list[int]:
        """For each step how many it comes after."""
        counts: list[int] = np.diff(self.steps["after_end"], prepend=0).tolist()
        return counts

    @cached_property
    def retained(self) -> list[bool]:
        """For each step whether a transport may still keep its scratch when the caller's array is finished."""
        sends, buffer = self.steps["kind"] == Kind.SEND, self.steps["buffer"]
        from_caller = ((buffer == Buffer.OUT) & (not self.device_out)) | ((buffer == Buffer.IN) & (not self.device_in))
        kept: list[bool] = (sends & ~from_caller).tolist()
        return kept

    @cached_property
    def copies(self) -> frozenset[int]:
        """The steps that copy between a device and the host."""
        if not (self.device_in or self.device_out):
            return frozenset()
        from_device, to_device = self._on_devices
        return frozenset(np.flatnonzero(from_device ^ to_device).tolist())

    @cached_property
    def onsite(self) -> frozenset[int]:
        """The steps in which the devices of a site reduce or gather among themselves."""
        if not self.mates:
            return frozenset()
        from_device, to_device = self._on_devices
        return frozenset(np.flatnonzero(from_device & to_device).tolist())

    @property
    def _on_devices(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For each step, whether it is a FOLD of one input that is on a device, and whether it writes to a device."""
        firsts = np.diff(self.steps["inputs_end"], prepend=0) == 1
        from_device = np.zeros(len(self.steps), bool)
        from_device[firsts] = np.isin(self.inputs["buffer"][self.steps["inputs_end"][firsts] - 1], _DEVICES)
        return from_device, np.isin(self.steps["buffer"], _DEVICES)

    @cached_property
    def followers(self) -> list[list[int]]:
        """For each step those that come after it."""
        followers: list[list[int]] = [[] for _ in range(len(self.steps))]
        after = self.after.tolist()
        begin = 0
        for step, end in enumerate(self.steps["after_end"].tolist()):
            for earlier in after[begin:end]:
                followers[earlier].append(step)
            begin = end
        return followers

    @cached_property
    def peers(self) -> frozenset[int]:
        """The ranks that this part sends to, receives from, or reduces with on devices."""
        return frozenset(np.unique(self.steps["peer"][self.steps["kind"] != Kind.FOLD]).tolist()).union(self.mates)

    @cached_property
    def _input_rows(self) -> list[tuple[int, int]]:
        return [(int(buffer), int(offset)) for buffer, offset, _ in self.inputs.tolist()]

    @cached_property
    def _input_ranks(self) -> list[int]:
        ranks: list[int] = self.inputs["ranks"].tolist()
        return ranks

    @cached_property
    def _lenders(self) -> tuple[array[int], array[int]]:
        lent = self.inputs["buffer"] == Buffer.LENT
        ends = np.concatenate(([0], np.cumsum(lent)))[self.steps["inputs_end"]]
        return _compact(self.inputs["offset"][lent]), _compact(np.concatenate(([0], ends)))

    def after_of(self, step: int) -> list[int]:
        """Return the steps that ``step`` comes after."""
        begin = self.rows[step - 1].after_end if step else 0
        return [int(earlier) for earlier in self.after[begin : self.rows[step].after_end]]

    def inputs_of(self, step: int) -> list[tuple[int, int]]:
        """Return the (buffer, offset) pairs that FOLD ``step`` reads, in fold order."""
        begin = self.rows[step - 1].inputs_end if step else 0
        return self._input_rows[begin : self.rows[step].inputs_end]

    def lenders_of(self, step: int) -> Sequence[int]:
        """Return the RECV steps whose loans FOLD ``step`` reads."""
        lenders, ends = self._lenders
        return lenders[ends[step] : ends[step + 1]]

    def ranks_of(self, step: int) -> list[int]:
        """Return how many ranks' contributions each input of FOLD ``step`` holds."""
        begin = self.rows[step - 1].inputs_end if step else 0
        return self._input_ranks[begin : self.rows[step].inputs_end]

    def message_bytes(self, step: int) -> int:
        """Return the size of what SEND or RECV ``step`` moves."""
        return self.columns.nbytes[step]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain lists, for golden files and other programs."""
        names = [name for name in STEP.names or () if not name.endswith("_end")]
        return {
            "schema": "detcoll.plan/1",
            "collective": {name: getattr(self.collective, name) for name in Collective.__slots__},
            "algorithm": self.algorithm,
            "rank": self.rank,
            "size": self.size,
            "out_elems": self.out_elems,
            "in_elems": self.in_elems,
            "partial_elems": self.partial_elems,
            "accumulator_elems": self.accumulator_elems,
            "device_in": self.device_in,
            "device_out": self.device_out,
            "steps": [
                {name: int(row[name]) for name in names}
                | {"kind": Kind(row["kind"]).name, "buffer": Buffer(row["buffer"]).name}
                | {"phase": Phase(row["phase"]).name, "after": self.after_of(i)}
                | {"inputs": self.inputs_of(i), "ranks": self.ranks_of(i)}
                for i, row in enumerate(self.steps)
            ],
        }


@dataclass(slots=True)
class PlanBuilder:
    """Collects steps in any order that respects ``after`` and freezes them into a `Plan`.

    ``rows`` and ``inputs`` are flat, field after field, since a quarter of a million tuples would take 60 MB. ``count``
    steps were added so far.
    """

    rows: array[int] = field(default_factory=partial(array, "q"))
    after: array[int] = field(default_factory=partial(array, "i"))
    inputs: array[int] = field(default_factory=partial(array, "q"))
    count: int = 0

    def send(
        self, phase: Phase, peer: int, tag: int, source: tuple[Buffer, int], length: int, after: Sequence[int],
        *, wide: bool = False, accumulated: bool = False,
    ) -> int:  # fmt: skip
        """Add a SEND of ``source`` (buffer, offset) and return its index."""
        buffer, offset = source
        return self._add(Kind.SEND, phase, buffer, wide, False, accumulated, peer, tag, offset, length, after)

    def recv(
        self, phase: Phase, peer: int, tag: int, target: tuple[Buffer, int], length: int, after: Sequence[int] = (),
        *, wide: bool = False, accumulated: bool = False,
    ) -> int:  # fmt: skip
        """Add a RECV into ``target`` (buffer, offset), or lent, and return its index."""
        buffer, offset = target
        return self._add(Kind.RECV, phase, buffer, wide, False, accumulated, peer, tag, offset, length, after)

    def fold(
        self, phase: Phase, inputs: Sequence[tuple[int, int, int]], target: tuple[Buffer, int], length: int,
        after: Sequence[int], *, final: bool = False,
    ) -> int:  # fmt: skip
        """Add a FOLD of ``inputs`` (buffer, offset, ranks) into ``target`` and return its index."""
        for one in inputs:
            self.inputs.extend(one)
        buffer, offset = target
        return self._add(Kind.FOLD, phase, buffer, False, final, False, -1, 0, offset, length, after)

    def _add(
        self, kind: Kind, phase: Phase, buffer: Buffer, wide: bool, final: bool, accumulated: bool, peer: int,
        tag: int, offset: int, length: int, after: Sequence[int],
    ) -> int:  # fmt: skip
        self.after.extend(after)
        ends = (len(self.after), len(self.inputs) // len(INPUT.names or ()))
        self.rows.extend((kind, phase, buffer, wide, final, accumulated, peer, tag, offset, length, *ends))
        self.count += 1
        return self.count - 1

    def build(
        self, collective: Collective, algorithm: str, rank: int, size: int, out_elems: int, in_elems: int = 0,
        partial_elems: int = 0, accumulator_elems: int = 0,
    ) -> Plan:  # fmt: skip
        """Return the finished plan."""
        return Plan(
            collective, algorithm, rank, size,
            _structured(self.rows, STEP), np.array(self.after, dtype=np.int32), _structured(self.inputs, INPUT),
            out_elems, in_elems, partial_elems, accumulator_elems,
        )  # fmt: skip


def _compact(values: NDArray[Any]) -> array[int]:
    return array("i", values.astype(np.intc).tobytes())


def _structured(flat: array[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return rows of ``dtype`` whose fields follow one another in ``flat``."""
    names = dtype.names or ()
    columns = np.frombuffer(flat, np.int64).reshape(-1, len(names)) if flat else np.empty((0, len(names)), np.int64)
    rows = np.empty(len(columns), dtype)
    for index, name in enumerate(names):
        rows[name] = columns[:, index]
    return rows
