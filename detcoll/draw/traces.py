"""Trace files of ranks (``DETCOLL_TRACE``), read for pictures; what a file has beyond this is passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """One send over the wide area; ``not_after_ns`` 0: its window has no end; ``left_ns`` 0: it left at once."""

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


@dataclass(frozen=True, slots=True)
class TimedSend:
    """A send beside its plan, in nanoseconds of the site's clock; ``dst_site`` -1: not known.

    Planned is its window; where that has no end, the time that its reserved rate gives it, behind what its flow sent
    before; without a window, as small messages may go, its begin. ``begin_ns`` and ``end_ns`` are when it was on the
    line: a flow's messages leave one after another, so one begins when it was handed over or, if later, when the one
    before had left.
    """

    send: TracedSend
    dst_site: int
    planned_begin_ns: int
    planned_end_ns: int
    begin_ns: int
    end_ns: int

    @property
    def is_late(self) -> bool:
        """Whether it left after its window, or only a part of it within."""
        return self.send.trimmed or 0 < self.send.not_after_ns < self.send.left_ns


def timed_sends(trace: RankTrace, site_of: Mapping[int, int]) -> list[TimedSend]:
    """Return the sends of a trace beside their plans, in order of their begin; ``site_of`` tells where ranks are."""
    timed: list[TimedSend] = []
    free_ns: dict[int, int] = {}
    planned_free_ns: dict[int, int] = {}
    for send in sorted(trace.sends, key=lambda each: each.started_ns):
        dst_site = site_of.get(send.dst, -1)
        begin_ns, end_ns = send.started_ns, max(send.left_ns, send.started_ns)
        if end_ns >= free_ns.get(send.dst, 0):  # else it went past the others, as small messages may
            begin_ns = min(max(begin_ns, free_ns.get(send.dst, 0)), end_ns)
            free_ns[send.dst] = end_ns
        planned_ns = send.not_before_ns, send.not_after_ns
        if not any(planned_ns):  # without a window: due when it was handed over
            planned_ns = begin_ns, begin_ns
        elif not send.not_after_ns:
            planned_ns = _at_rate(send, trace.rate_bytes_per_s(dst_site), planned_free_ns)
        timed.append(TimedSend(send, dst_site, *(at + trace.offset_ns for at in (*planned_ns, begin_ns, end_ns))))
    return timed


def _at_rate(send: TracedSend, rate_bytes_per_s: float, free_ns: dict[int, int]) -> tuple[int, int]:
    """Return when a send in a window without end is due at its flow's rate; ``free_ns`` is when its flow is free."""
    if not (send.left_ns and rate_bytes_per_s):
        return send.not_before_ns, send.not_before_ns
    begin_ns = max(send.not_before_ns, free_ns.get(send.dst, 0))
    free_ns[send.dst] = begin_ns + round(send.nbytes / rate_bytes_per_s * 1e9)
    return begin_ns, free_ns[send.dst]


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
