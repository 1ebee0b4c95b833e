"""Traces in the Chrome trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process a site; in it a track for each of its ranks, with the collectives, and one for each line to another site, with
what was sent and, on a track above, what was planned. Slices of one track must lie apart or inside each other, so
where some overlap, as those of ranks that share a line do, a track goes on in further ones of the same name.

Source: "Trace Event Format" of the Chromium project; complete events (``X``), instants (``i``) and metadata (``M``),
times in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from detcoll.draw.timespace import name_of
from detcoll.draw.traces import RankTrace, TimedSend, TracedCall, timed_sends
from detcoll.quantities import format_bytes

Event = dict[str, Any]

FIRST_TRACK = 1000
"""Tracks are numbered through all processes, apart from those: readers take both for an operating system's."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """Something that lasted, in nanoseconds of the site's clock."""

    begin_ns: int
    end_ns: int
    name: str
    category: str
    args: dict[str, Any]


@dataclass(slots=True)
class _Writer:
    origin_ns: int
    events: list[Event] = field(default_factory=list)
    last_track: int = FIRST_TRACK

    def process(self, site: int, name: str) -> None:
        self._meta("process_name", site + 1, 0, {"name": name})
        self._meta("process_sort_index", site + 1, 0, {"sort_index": site})

    def track(self, site: int, name: str, slices: Iterable[_Slice]) -> int:
        """Write slices on a track, and on further ones while they overlap; returns the first one's number."""
        lanes = apart(sorted(slices, key=lambda one: (one.begin_ns, -one.end_ns)))
        first = self.last_track + 1
        for track, lane in enumerate(lanes or [[]], first):
            self.last_track = track
            self._meta("thread_name", site + 1, track, {"name": name})
            self._meta("thread_sort_index", site + 1, track, {"sort_index": track})
            self.events += [self._complete(site, track, one) for one in lane]
        return first

    def instant(self, site: int, track: int, at_ns: int, name: str, args: dict[str, Any]) -> None:
        self.events.append(
            {"ph": "i", "s": "t", "pid": site + 1, "tid": track, "ts": self._us(at_ns), "name": name, "args": args}
        )

    def _complete(self, site: int, track: int, one: _Slice) -> Event:
        return {
            "ph": "X", "pid": site + 1, "tid": track, "ts": self._us(one.begin_ns),
            "dur": max(one.end_ns - one.begin_ns, 0) / 1000, "name": one.name, "cat": one.category, "args": one.args,
        }  # fmt: skip

    def _meta(self, name: str, pid: int, tid: int, args: dict[str, Any]) -> None:
        self.events.append({"ph": "M", "pid": pid, "tid": tid, "name": name, "args": args})

    def _us(self, time_ns: int) -> float:
        """Return microseconds since the trace began, so that a double keeps the nanosecond."""
        return (time_ns - self.origin_ns) / 1000


def apart(slices: Sequence[_Slice]) -> list[list[_Slice]]:
    """Spread slices, in order of their begin, over lanes in which any two lie apart or one inside the other."""
    lanes: list[list[_Slice]] = []
    open_ns: list[list[int]] = []
    for one in slices:
        for lane, ends in zip(lanes, open_ns, strict=True):
            while ends and ends[-1] <= one.begin_ns:
                ends.pop()
            if not ends or one.end_ns <= ends[-1]:
                lane.append(one)
                ends.append(one.end_ns)
                break
        else:
            lanes.append([one])
            open_ns.append([one.end_ns])
    return lanes


def chrome_trace(traces: Sequence[RankTrace], site_names: Sequence[str] = ()) -> dict[str, Any]:
    """Return traces of ranks as the JSON object of a Chrome trace.

    Parameters
    ----------
    traces : sequence of RankTrace
        Of one run; times of sites stand side by side as the sites' clocks tell them.
    site_names : sequence of str, optional
        By site number.
    """
    writer = _Writer(_origin_ns(traces))
    site_of = {trace.rank: trace.site for trace in traces}
    for site in sorted(set(site_of.values())):
        mine = [trace for trace in traces if trace.site == site]
        writer.process(site, name_of(site_names, site))
        for trace in mine:
            _write_rank(writer, trace, site_names)
        sends = [(trace, timed) for trace in mine for timed in timed_sends(trace, site_of)]
        for dst_site in sorted({timed.dst_site for _, timed in sends}):
            goal = "elsewhere" if dst_site < 0 else name_of(site_names, dst_site)
            _write_line(writer, site, goal, [(trace, timed) for trace, timed in sends if timed.dst_site == dst_site])
    told = {"schema": "detcoll.trace/1", "origin_ns": writer.origin_ns, "ranks": len(traces)}
    return {"traceEvents": writer.events, "displayTimeUnit": "ms", "otherData": told}


def _origin_ns(traces: Sequence[RankTrace]) -> int:
    times = [call.called_ns + trace.offset_ns for trace in traces for call in trace.collectives]
    times += [min(send.not_before_ns, send.started_ns) + trace.offset_ns for trace in traces for send in trace.sends]
    times += [miss.not_before_ns + trace.offset_ns for trace in traces for miss in trace.misses]
    return min(times, default=0)


def _write_rank(writer: _Writer, trace: RankTrace, names: Sequence[str]) -> None:
    offset_ns = trace.offset_ns
    track = writer.track(trace.site, f"rank {trace.rank}", [_call(call, offset_ns) for call in trace.collectives])
    for call in trace.collectives:
        if call.predicted_end_ns is not None:
            at_ns, which = call.predicted_end_ns + offset_ns, {"sequence": call.sequence}
            writer.instant(trace.site, track, at_ns, "predicted end", which)
    for miss in trace.misses:
        goal = "any site" if miss.dst_site < 0 else name_of(names, miss.dst_site)
        args = {"to": goal, "window_us": (miss.not_after_ns - miss.not_before_ns) / 1000}
        writer.instant(trace.site, track, miss.not_before_ns + offset_ns, "missed window", args)


def _call(call: TracedCall, offset_ns: int) -> _Slice:
    late = None if call.predicted_end_ns is None else (call.ended_ns - call.predicted_end_ns) / 1000
    args = {
        "sequence": call.sequence,
        "bytes": call.nbytes,
        "algorithm": call.algorithm,
        "after_predicted_end_us": late,
    }
    name = f"{call.kind} {format_bytes(call.nbytes)}"
    return _Slice(call.called_ns + offset_ns, call.ended_ns + offset_ns, name, "collective", args)


def _write_line(writer: _Writer, site: int, goal: str, sends: Sequence[tuple[RankTrace, TimedSend]]) -> None:
    planned = (_planned(trace, timed) for trace, timed in sends if timed.planned_end_ns > timed.planned_begin_ns)
    writer.track(site, f"to {goal}, planned", planned)
    writer.track(site, f"to {goal}", (_sent(trace, timed) for trace, timed in sends))


def _planned(trace: RankTrace, timed: TimedSend) -> _Slice:
    name = f"rank {trace.rank} \N{RIGHTWARDS ARROW} {timed.send.dst}"
    args = {"sequence": timed.send.sequence, "bytes": timed.send.nbytes}
    return _Slice(timed.planned_begin_ns, timed.planned_end_ns, name, "planned", args)


def _sent(trace: RankTrace, timed: TimedSend) -> _Slice:
    send = timed.send
    args = {
        "sequence": send.sequence,
        "bytes": send.nbytes,
        "began_after_due_us": (timed.begin_ns - timed.planned_begin_ns) / 1000,
        "handed_over_before_us": (timed.begin_ns - trace.offset_ns - send.started_ns) / 1000,
        "acknowledged_after_us": (send.ended_ns + trace.offset_ns - timed.end_ns) / 1000,
        "is_late": timed.is_late,
    }
    name = f"rank {trace.rank} \N{RIGHTWARDS ARROW} {send.dst}, {format_bytes(send.nbytes)}"
    return _Slice(timed.begin_ns, timed.end_ns, name, "send", args)
