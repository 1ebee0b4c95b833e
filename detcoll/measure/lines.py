"""What the lines saw of a run: bytes, drops, queues and delays of its class, and a co-tenant's round trip meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detcoll.emulation.lab import Lab, Service, Statistics
from detcoll.measure.kernel import parse_retransmits
from detcoll.measure.load import Spans


@dataclass(frozen=True, slots=True)
class CoTenant:
    """Round trips of somebody else's small best-effort packets on the same lines, in seconds.

    ``answered`` of ``sent`` came back, from the lab's opening on. The times are of what left while iterations were
    measured, of `detcoll bench` during timed calls; of scripts, which do not say when that was, of all. ``counted`` is
    how many those are.
    """

    median_s: float
    p99_s: float
    answered: int = 0
    sent: int = 0
    counted: int = 0


@dataclass(frozen=True, slots=True)
class LineUse:
    """What the router counted of a run, all directions together.

    ``wire_bytes`` and the segments are of the class that the ranks were in: those that found the queue full, exceeded
    the reserved rate, were lost at random, or were on their way when a link failed. In best effort others' TCP flows
    and probes count too. ``peak_queue_bytes`` is the longest queue of that class at an uplink, and ``delay_p99_s`` the
    greatest 99th percentile of a direction. ``router_late_s`` is how late the router handed a unit over at most, and
    ``router_cpu_share`` the part of a core that it took: what lies near one says that the machine decided.
    ``others_bytes_per_s`` is what others' TCP flows got through, payload, all sites together, at the times for which
    the co-tenant's round trips count; None where there are none.
    """

    wire_bytes: int = 0
    queue_dropped_segments: int | None = None
    policed_segments: int | None = None
    lost_segments: int = 0
    failed_segments: int = 0
    peak_queue_bytes: int | None = None
    delay_p50_s: float | None = None
    delay_p99_s: float | None = None
    co_tenant: CoTenant | None = None
    burst_offered_bytes: int = 0
    burst_dropped_bytes: int = 0
    router_late_s: float = 0.0
    router_cpu_share: float = 0.0
    others_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class LineRecord:
    """What is kept of one run in the lab."""

    service: Service
    statistics: Statistics
    retransmits: int | None


def read_lines(lab: Lab, service: Service) -> LineRecord:
    """Return what the lab's lines and its sites' kernels counted since it was opened."""
    sites = range(len(lab.topology.sites))
    known = [parse_retransmits(lab.call(site, _read_counters)) for site in sites]
    total = None if None in known else sum(count for count in known if count is not None)
    return LineRecord(service, lab.statistics(), total)


def _read_counters() -> str:
    return Path("/proc/thread-self/net/snmp").read_text(encoding="ascii")


def use_of(records: Sequence[LineRecord], spans_ns: Sequence[Spans | None]) -> LineUse:
    """Return what the lines saw of all rounds of a setting; a round's probes count within its spans, if it has any."""
    seen = [record.statistics for record in records]
    own = [entry for record in records for entry in record.statistics.directions if entry.service is record.service]
    is_reserved = records[0].service is Service.DETERMINISTIC
    peaks = [one.reserved_uplink_peak_bytes if is_reserved else one.uplink_peak_bytes for one in seen]
    elapsed_s = sum(one.elapsed_s for one in seen)
    return LineUse(
        wire_bytes=sum(entry.wire_bytes for entry in own),
        queue_dropped_segments=sum(entry.uplink_dropped_segments + entry.downlink_dropped_segments for entry in own),
        policed_segments=sum(entry.policed_segments for entry in own),
        lost_segments=sum(entry.lost_segments for entry in own),
        failed_segments=sum(entry.failed_segments for entry in own),
        peak_queue_bytes=max(peak for each in peaks for peak in each),
        delay_p50_s=_greatest_s([entry.delay_p50_ns for entry in own]),
        delay_p99_s=_greatest_s([entry.delay_p99_ns for entry in own]),
        co_tenant=_co_tenant(seen, spans_ns),
        burst_offered_bytes=sum(bursts.offered_bytes for one in seen for bursts in one.bursts),
        burst_dropped_bytes=sum(bursts.dropped_bytes for one in seen for bursts in one.bursts),
        router_late_s=max(one.late_peak_ns for one in seen) / 1e9,
        router_cpu_share=sum(one.cpu_s for one in seen) / elapsed_s,
        others_bytes_per_s=_others_bytes_per_s(seen, spans_ns),
    )


def _others_bytes_per_s(seen: Sequence[Statistics], spans_ns: Sequence[Spans | None]) -> float | None:
    """Return what others' TCP flows got through in the mean of all rounds."""
    rates = [
        one.flows_bytes_per_s(((one.flows_at_ns[0], one.flows_at_ns[-1]),) if spans is None else spans)
        for one, spans in zip(seen, spans_ns, strict=True)
        if one.flows_at_ns
    ]
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) if known else None


def _greatest_s(values_ns: Sequence[int | None]) -> float | None:
    known = [value for value in values_ns if value is not None]
    return max(known) / 1e9 if known else None


def _co_tenant(seen: Sequence[Statistics], spans_ns: Sequence[Spans | None]) -> CoTenant | None:
    took_ns: list[int] = []
    for one, spans in zip(seen, spans_ns, strict=True):
        pairs = zip(one.probe.sent_ns, one.probe.round_trip_ns, strict=True)
        took_ns += [took for sent, took in pairs if _is_within(sent, spans)]
    if not took_ns:
        return None
    median, p99 = (float(value) / 1e9 for value in np.percentile(took_ns, [50, 99]))
    answered = sum(len(one.probe.round_trip_ns) for one in seen)
    return CoTenant(median, p99, answered, sum(one.probe.sent for one in seen), len(took_ns))


def _is_within(time_ns: int, spans_ns: Spans | None) -> bool:
    return spans_ns is None or any(first <= time_ns <= last for first, last in spans_ns)
