"""Trace files of ranks (``DETCOLL_TRACE``), read for pictures; what a file has beyond this is passed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from detcoll.errors import UsageError

TRACE_SCHEMA = "detcoll.trace/1"


@dataclass(frozen=True, slots=True)
class Slots:
    """The rank's part of the calendar; windows are (start, end, destination site or -1) within the cycle."""

    cycle_ns: int
    windows: tuple[tuple[int, int, int], ...] = ()
    offset_ns: int = 0
    guard_ns: int = 0
    mode: str = ""
    rates_bytes_per_s: tuple[float, ...] = ()

    @property
    def is_always_open(self) -> bool:
        """Whether the rank may send at any time."""
        return not self.windows or self.windows == ((0, self.cycle_ns, -1),)


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One collective of one rank."""

    sequence: int
    called_ns: int
    ended_ns: int
    kind: str = ""
    nbytes: int = 0
    algorithm: str | None = None
    predicted_end_ns: int | None = None


@dataclass(frozen=True, slots=True)
class TracedSend:
    """One send over the wide area; ``not_after_ns`` 0: its window has no end."""

    sequence: int
    dst: int
    nbytes: int
    not_before_ns: int
    not_after_ns: int
    started_ns: int
    left_ns: int
    ended_ns: int
    trimmed: bool = False


@dataclass(frozen=True, slots=True)
class TracedMiss:
    """A window in which data waited and nothing was sent."""

    dst_site: int
    not_before_ns: int
    not_after_ns: int


@dataclass(frozen=True, slots=True)
class RankTrace:
    """What one rank did, times by its own clock; ``offset_ns`` turns them into those of its site's."""

    schema: str
    rank: int
    site: int
    calendar: Slots | None = None
    collectives: tuple[TracedCall, ...] = ()
    sends: tuple[TracedSend, ...] = ()
    misses: tuple[TracedMiss, ...] = ()

    @property
    def offset_ns(self) -> int:
        """What to add to a time of this rank."""
        return self.calendar.offset_ns if self.calendar is not None else 0

    def rate_bytes_per_s(self, site: int) -> float:
        """Return the rate reserved for a flow of this rank to ``site``; 0 where there is none."""
        rates = self.calendar.rates_bytes_per_s if self.calendar is not None else ()
        return rates[site] if 0 <= site < len(rates) else 0.0


def read_rank_traces(paths: Sequence[Path]) -> tuple[RankTrace, ...]:
    """Return the traces in ``paths``, by rank.

    Raises
    ------
    UsageError
        If one cannot be read, is no trace, or two are of one rank.
    """
    found: dict[int, RankTrace] = {}
    for path in paths:
        trace = _read(path)
        if trace.rank in found:
            raise UsageError(
                f"trace={str(path)!r} is of rank {trace.rank}, as another one is; give the files of one run"
            )
        found[trace.rank] = trace
    return tuple(found[rank] for rank in sorted(found))


def _read(path: Path) -> RankTrace:
    try:
        trace = msgspec.json.decode(path.read_bytes(), type=RankTrace)
    except OSError as error:
        raise UsageError(f"trace={str(path)!r} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"trace={str(path)!r} is no trace of a rank: {error}") from error
    if trace.schema != TRACE_SCHEMA:
        raise UsageError(f"trace={str(path)!r} has schema={trace.schema!r}; expected {TRACE_SCHEMA}")
    return trace
