"""Error reports in the output of ranks: where they begin and end, and which ranks say the same.

A report begins with the first line of Python's traceback, or with ``detcoll: ``, and ends with the line that names the
exception. It is kept for a short time, so that equal reports of several ranks are told once, with their numbers. What a
rank prints after its report waits behind it. Nothing is dropped: reports that differ in a single byte are all told, and
of one that comes after its equal was told, the last line is, with the number of the rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

HOLD_NS = 10**9
"""How long a report waits for its equals: ranks that make the same mistake start within this time of each other."""

_LARGEST_BYTES = 2**20
_MOST_TOLD = 64
_MOST_NAMED = 16
_TRACEBACK = b"Traceback (most recent call last):"
_BEGIN = re.compile(rb"^(?:  \+ Exception Group )?(?:Traceback \(most recent call last\):|detcoll: )", re.MULTILINE)


@dataclass(eq=False, slots=True)
class Held:
    """What a rank has printed since its report began at ``since_ns``; ``is_over``: it prints no more."""

    rank: int
    since_ns: int
    text: bytearray = field(default_factory=bytearray)
    is_over: bool = False

    @property
    def report(self) -> bytes:
        """The report itself, without what was printed after it."""
        return bytes(self.text[: report_bytes(self.text)])


@dataclass(frozen=True, slots=True)
class Told:
    """A report as it is to be written: ``text`` without the note that says which ``ranks`` gave it."""

    ranks: tuple[int, ...]
    text: bytes
    note: str
    after: tuple[tuple[int, bytes], ...]
    """What ranks printed after it, in this order."""

    @property
    def line(self) -> bytes:
        """The report with the note at the end of its last line."""
        return self.text.removesuffix(b"\n") + f" ({self.note})\n".encode()


class Reports:
    """The reports of the ranks of a job that are not told yet.

    Parameters
    ----------
    ranks : int
        How many ranks there are.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._held: dict[int, Held] = {}
        self._told: dict[bytes, set[int]] = {}
        self.all_alike = False
        """Whether all ranks have given one and the same report."""

    def holds(self, rank: int) -> bool:
        """Return whether a report of ``rank`` is held."""
        return rank in self._held

    def begin(self, rank: int, now_ns: int) -> None:
        """Hold what ``rank`` prints from now on."""
        self._held[rank] = Held(rank, now_ns)

    def add(self, rank: int, data: bytes) -> None:
        """Add output of a rank whose report is held."""
        self._held[rank].text += data

    def over(self, rank: int) -> None:
        """Note that ``rank`` prints no more; an unfinished line is ended."""
        held = self._held[rank]
        held.is_over = True
        if not held.text.endswith(b"\n"):
            held.text += b"\n"

    def next_ns(self) -> int | None:
        """Return when `take` has something to return, None if nothing is held."""
        return min((held.since_ns + HOLD_NS for held in self._held.values()), default=None)

    def take(self, now_ns: int, *, everything: bool = False) -> list[Told]:
        """Return reports that are due, each with its equals, or all; they are no longer held."""
        groups: dict[bytes, list[Held]] = {}
        for held in sorted(self._held.values(), key=lambda held: held.rank):
            groups.setdefault(held.report, []).append(held)
        due = [
            (report, group)
            for report, group in groups.items()
            if everything or any(now_ns >= one.since_ns + HOLD_NS or len(one.text) > _LARGEST_BYTES for one in group)
        ]
        due.sort(key=lambda entry: min(one.since_ns for one in entry[1]))  # the cause comes before what follows from it
        for _, group in due:
            for one in group:
                del self._held[one.rank]
        return [self._tell(report, group) for report, group in due]

    def _tell(self, report: bytes, group: Sequence[Held]) -> Told:
        ranks = tuple(one.rank for one in group)
        before = self._told.setdefault(report, set())
        is_late = bool(before) and before.isdisjoint(ranks)
        before.update(ranks)
        self.all_alike = self.all_alike or len(before) == self._ranks
        if len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]
        after = [(one.rank, bytes(one.text[len(report) :])) for one in group]
        if all(one.is_over for one in group) and len({text for _, text in after}) == 1:
            after = after[:1]
        note = _named(ranks, self._ranks)
        if is_late:
            return Told(ranks, report.splitlines(keepends=True)[-1], f"{note} too", tuple(after))
        return Told(ranks, report, note, tuple(after))


def begin_of_report(text: bytes | bytearray, start: int, end: int) -> int:
    """Return where a report begins in whole lines, -1 if none does."""
    found = _BEGIN.search(text, start, end)
    return -1 if found is None else found.start()


def report_bytes(text: bytes | bytearray) -> int:
    """Return the length of the report at the beginning of ``text``; all of it if the report's end is not in it."""
    if not text.startswith((b" ", _TRACEBACK)):
        return text.find(b"\n") + 1 or len(text)
    at = text.find(b"\n", text.rfind(_TRACEBACK)) + 1  # the last of a chain of exceptions
    for line in bytes(text[at:]).splitlines(keepends=True):
        at += len(line)
        if not line.startswith((b" ", b"\n")):
            return at
    return len(text)


def _named(ranks: Iterable[int], size: int) -> str:
    numbers = list(ranks)
    if len(numbers) == size:
        return f"all {size} ranks"
    more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_MOST_NAMED]))}{more}"
