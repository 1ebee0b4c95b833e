"""Plans for arrays that lie on a device: copies to and from the host become steps, so that they hide behind the line.

`staged` takes a finished plan, in which IN and OUT are the caller's arrays, and returns one in which they are memory of
the host, and DEVICE_IN and DEVICE_OUT are the caller's arrays. What moves between ranks stays as it is, so a rank whose
array is on a device and one whose array is not fit together.

::

    DEVICE_OUT --FOLD of one input--> OUT --SEND, FOLD, ...--> OUT --FOLD of one input--> DEVICE_OUT
                 (to the host)        (the steps of the plan)       (to the device)

Ranges of an array that steps touch are joined where they overlap; the result are its cells, which are chunks in most
plans. A cell is copied to the host before the first step that touches it, if it is read before all of it is written. It
is copied to the device after the last step that writes to it. Copies stand in the order of the steps that need them.
Where a kind may have input and output in one array, its plan reads each element before it writes there; so the copy of
an element to the host comes before the copy of a result to its place, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from detcoll.plan.collectives import declaration_of
from detcoll.plan.ir import Buffer, Kind, Phase, Plan, PlanBuilder

DEVICE_OF = {Buffer.IN: Buffer.DEVICE_IN, Buffer.OUT: Buffer.DEVICE_OUT}


@dataclass(eq=False, slots=True)
class _Cell:
    """Elements ``[begin, end)`` of a buffer.

    ``first`` : the first step that touches it.  ``writers`` : those that write to it, in order.  ``loads`` : whether
    what the caller's array holds there is needed.  ``copied`` : the step of the new plan that copies it to the host,
    or -1.
    """

    buffer: Buffer
    begin: int
    end: int
    first: int = -1
    writers: list[int] = field(default_factory=list)
    loads: bool = False
    copied: int = -1


class _Touch(NamedTuple):
    """A step reads or writes elements ``[begin, end)`` of a buffer."""

    begin: int
    end: int
    step: int
    writes: bool


def staged(plan: Plan, *, source: bool, output: bool, disturbs: bool = False) -> Plan:
    """Return ``plan`` for arrays that lie on a device.

    Parameters
    ----------
    plan : Plan
        For arrays of the host.
    source, output : bool
        Whether the caller's input, and whether its output, is on a device. Of a kind with one array, ``output`` says
        it.
    disturbs : bool
        Whether input and output share memory in another way than the kind allows in one array, so that all input is
        copied before any output.

    Returns
    -------
    Plan
        With ``device_in`` and ``device_out`` set where an array is on a device; ``plan`` itself if none is.
    """
    declared = declaration_of(plan.collective.kind)
    source = source and not declared.has_one_array
    if not declared.has_array or not (source or output):
        return plan
    buffers = [buffer for buffer, is_there in ((Buffer.IN, source), (Buffer.OUT, output)) if is_there]
    return _Staging(plan, buffers, disturbs).build()


class _Staging:
    """A plan that is being rewritten: its cells, those that each step touches, and the new numbers of steps."""

    def __init__(self, plan: Plan, buffers: Sequence[Buffer], disturbs: bool) -> None:
        self._plan, self._buffers, self._builder = plan, buffers, PlanBuilder()
        declared = declaration_of(plan.collective.kind)
        self._has_one_array = declared.has_one_array
        self._weight = plan.size if declared.has_op else 1
        self._disturbs = disturbs
        self._moved: list[int] = []
        self._touched: dict[int, list[_Cell]] = {}
        self._cells = [cell for buffer in buffers for cell in self._cut(buffer)]
        self._inputs = [cell for cell in self._cells if cell.buffer is Buffer.IN]

    def build(self) -> Plan:
        plan = self._plan
        stores: dict[int, list[_Cell]] = {}
        for cell in self._cells:
            if cell.writers and cell.buffer is Buffer.OUT:
                stores.setdefault(cell.writers[-1], []).append(cell)
        for step in range(len(plan.steps)):
            cells = self._touched.get(step, ())
            for cell in cells:
                if cell.first == step:
                    self._load(cell)
            self._move(step, [cell.copied for cell in cells if cell.copied >= 0])
            for cell in stores.get(step, ()):
                after = [self._moved[writer] for writer in cell.writers]
                if self._disturbs:
                    after += self._loads_of_all()
                self._copy(cell, cell.buffer, DEVICE_OF[cell.buffer], self._weight, after)
        built = self._builder.build(
            plan.collective, plan.algorithm, plan.rank, plan.size, plan.out_elems, plan.in_elems, plan.partial_elems,
            plan.accumulator_elems,
        )  # fmt: skip
        return replace(built, device_in=Buffer.IN in self._buffers, device_out=Buffer.OUT in self._buffers)

    def _cut(self, buffer: Buffer) -> list[_Cell]:
        cells: list[_Cell] = []
        touches: list[tuple[_Cell, _Touch]] = []
        for touch in sorted(self._touches(buffer)):
            if not cells or touch.begin >= cells[-1].end:
                cells.append(_Cell(buffer, touch.begin, touch.end))
            cells[-1].end = max(cells[-1].end, touch.end)
            touches.append((cells[-1], touch))
        has_content = buffer is Buffer.IN or self._has_one_array
        for cell, touch in sorted(touches, key=lambda each: each[1].step):
            whole = (touch.begin, touch.end) == (cell.begin, cell.end)
            if cell.first < 0:
                cell.first = touch.step
                cell.loads = has_content and not (touch.writes and whole)
            if touch.step == cell.first and not touch.writes:
                cell.loads = has_content
            if touch.writes:
                cell.writers.append(touch.step)
            mine = self._touched.setdefault(touch.step, [])
            if cell not in mine:
                mine.append(cell)
        return cells

    def _touches(self, buffer: Buffer) -> Iterator[_Touch]:
        for step, row in enumerate(self._plan.rows):
            if row.buffer == buffer:
                yield _Touch(row.offset, row.offset + row.length, step, row.kind != Kind.SEND)
            if row.kind == Kind.FOLD:
                for used, offset in self._plan.inputs_of(step):
                    if used == buffer:
                        yield _Touch(offset, offset + row.length, step, False)

    def _loads_of_all(self) -> list[int]:
        """Return the copies of all input to the host."""
        for cell in self._inputs:
            self._load(cell)
        return [cell.copied for cell in self._inputs]

    def _load(self, cell: _Cell) -> None:
        if cell.loads and cell.copied < 0:
            cell.copied = self._copy(cell, DEVICE_OF[cell.buffer], cell.buffer, 1, [])

    def _move(self, step: int, copied: Sequence[int]) -> None:
        """Add a step of the old plan, which also comes after the copies ``copied``."""
        plan, builder, row = self._plan, self._builder, self._plan.rows[step]
        after = [*(self._moved[earlier] for earlier in plan.after_of(step)), *copied]
        place = (Buffer(row.buffer), row.offset)
        phase, wide, accumulated = Phase(row.phase), bool(row.wide), bool(row.accumulated)
        if row.kind == Kind.FOLD:
            inputs = [
                (buffer, self._moved[offset] if buffer == Buffer.LENT else offset, ranks)
                for (buffer, offset), ranks in zip(plan.inputs_of(step), plan.ranks_of(step), strict=True)
            ]
            number = builder.fold(phase, inputs, place, row.length, after, final=bool(row.final))
        else:
            add = builder.send if row.kind == Kind.SEND else builder.recv
            number = add(phase, row.peer, row.tag, place, row.length, after, wide=wide, accumulated=accumulated)
        self._moved.append(number)

    def _copy(self, cell: _Cell, source: Buffer, target: Buffer, ranks: int, after: Sequence[int]) -> int:
        """Add a step that copies a cell between the host and the device."""
        phase = Phase.LOCAL_GATHER if after else Phase.LOCAL_REDUCE
        inputs = [(source, cell.begin, ranks)]
        return self._builder.fold(phase, inputs, (target, cell.begin), cell.end - cell.begin, after)
