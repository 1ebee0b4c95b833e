"""Makes one result of what all ranks of a setting recorded; what the figures mean stands in `detcoll.measure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detcoll.marks import Marks
from detcoll.measure.lines import LineRecord, use_of
from detcoll.measure.networks import QUIET, Network
from detcoll.measure.records import RankRecord
from detcoll.measure.results import WIDE_AREA, Run
from detcoll.measure.statistics import Summary, ratio, summarize
from detcoll.topology import Topology


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a workload runs: ``single-cluster`` or ``wide-area``, by which transport, and over which network.

    ``without`` : what is switched off, of `detcoll.measure.gains.MEANS`.
    """

    name: str
    transport: str
    where: str
    network: Network = QUIET
    without: str | None = None

    @property
    def is_wide(self) -> bool:
        """Whether the ranks are apart."""
        return self.where == WIDE_AREA

    @property
    def title(self) -> str:
        """The name, and the network where it is not a quiet ordinary one."""
        return self.name if self.network == QUIET else f"{self.name}, {self.network.label}"


Round = Sequence[RankRecord]
"""The records of all ranks of one round, in rank order."""


@dataclass(frozen=True, slots=True)
class ScriptRound:
    """One round of a user's script: how long it ran, and its ranks' marks where it left any."""

    total_s: float
    marks: tuple[Marks, ...]


Lines = Sequence[LineRecord]
"""What the lab's lines saw of each round; empty for a single cluster."""


def iteration_times_s(records: Round) -> list[float]:
    """Return the time of each iteration: from the last rank's end of one to the last rank's end of the next."""
    start_ns = max(record.start_ns for record in records)
    ends_ns = _stamps(records, "end_ns").max(axis=0)
    return [float(step) for step in np.diff(ends_ns, prepend=start_ns) / 1e9]


def sync_times_s(records: Round) -> list[float]:
    """Return, of each iteration, the time from the last backward pass's end until the last rank has the gradient."""
    waits_ns = _stamps(records, "reduced_ns").max(axis=0) - _stamps(records, "backward_end_ns").max(axis=0)
    return [float(wait) for wait in waits_ns / 1e9]


def wire_busy_fraction(rounds: Sequence[Round], topology: Topology) -> float | None:
    """Return the share of the backward passes in which the busiest site's line was busy; None without a line."""
    if not topology.is_wide:
        return None
    busy_s = [_site_busy_s(rounds, topology, site) for site in range(len(topology.sites))]
    known_s = [value for value in busy_s if value is not None]
    backward_ns = sum(_backward_ns(records) for records in rounds)
    return min(1.0, max(known_s) * 1e9 / backward_ns) if known_s and backward_ns > 0 else None


def make_run(
    setting: Setting,
    rounds: Sequence[Round],
    topology: Topology,
    baseline: Run | None,
    arithmetic_s: float | None,
    lines: Lines = (),
) -> Run:
    """Return the result of ``setting`` on the lines of ``topology``; ``baseline`` is None for the single cluster."""
    iteration_s = summarize([time_s for records in rounds for time_s in iteration_times_s(records)])
    efficiency, low, high = ratio(baseline.iteration_s if baseline else iteration_s, iteration_s)
    last = rounds[-1]
    return Run(
        name=setting.name,
        transport=setting.transport,
        setting=setting.where,
        service=setting.network.service.value,
        cross_traffic=setting.network.cross_traffic,
        iteration_s=iteration_s,
        sync_s=summarize([time_s for records in rounds for time_s in sync_times_s(records)]),
        efficiency=efficiency,
        efficiency_spread=(low, high),
        wire_busy_fraction=wire_busy_fraction(rounds, topology.granted) if setting.is_wide else None,
        algorithm=last[0].algorithm,
        result_digest=common_digest(last),
        retransmits=_retransmits(rounds, topology) if setting.is_wide else None,
        slot_misses=_total([record.slot_misses for records in rounds for record in records]),
        slot_trims=_total([record.slot_trims for records in rounds for record in records]),
        arithmetic_ratio=iteration_s.median / arithmetic_s if arithmetic_s else None,
        losses=tuple(loss for records in rounds for loss in mean_losses(records)) or None,
        accuracy=last[0].accuracy,
        line=use_of(lines, [[measured_span_ns(records)] for records in rounds]) if lines else None,
        without=setting.without,
        round_s=tuple(float(np.median(iteration_times_s(records))) for records in rounds),
    )


def make_script_run(setting: Setting, rounds: Sequence[ScriptRound], baseline: Run | None, lines: Lines = ()) -> Run:
    """Return the result of a user's script: times between its marks, or of whole runs where it left none."""
    iteration_s = _script_times(rounds)
    efficiency, low, high = ratio(baseline.iteration_s if baseline else iteration_s, iteration_s)
    return Run(
        name=setting.name,
        transport=setting.transport,
        setting=setting.where,
        service=setting.network.service.value,
        cross_traffic=setting.network.cross_traffic,
        iteration_s=iteration_s,
        sync_s=None,
        efficiency=efficiency,
        efficiency_spread=(low, high),
        wire_busy_fraction=None,
        algorithm=None,
        result_digest=None,
        retransmits=_total([record.retransmits for record in lines]),
        slot_misses=None,
        line=use_of(lines, [marked_span_ns(one.marks) for one in rounds]) if lines else None,
        without=setting.without,
        total_s=float(np.median([one.total_s for one in rounds])),
        round_s=tuple(_script_times([one]).median for one in rounds),
    )


def measured_span_ns(records: Round) -> tuple[int, int]:
    """Return when the measured iterations of a round began and ended, by the host's monotonic clock."""
    return min(record.start_ns for record in records), int(_stamps(records, "end_ns").max())


def marked_span_ns(marks: Sequence[Marks]) -> list[tuple[int, int]] | None:
    """Return when the marked iterations of a script's round began and ended; None where it left no two marks a rank."""
    if not marked_times_s(marks):
        return None
    fewest = min(len(mark.marks_ns) for mark in marks)
    return [(max(mark.marks_ns[0] for mark in marks), max(mark.marks_ns[fewest - 1] for mark in marks))]


def common_digest(records: Round) -> str | None:
    """Return the digest that all ranks share; None where they differ."""
    digests = {record.digest for record in records}
    return digests.pop() if len(digests) == 1 else None


def mean_losses(records: Round) -> list[float]:
    """Return the mean loss over ranks, one an iteration, added in rank order."""
    losses = [record.losses for record in records]
    return [sum(step) / len(losses) for step in zip(*losses, strict=True)]


def marked_times_s(marks: Sequence[Marks]) -> list[float]:
    """Return the time between marks, from the last rank's one to the last rank's next; none below two marks a rank."""
    fewest = min((len(mark.marks_ns) for mark in marks), default=0)
    if fewest < 2:
        return []
    ends_ns = np.array([mark.marks_ns[:fewest] for mark in marks], np.int64).max(axis=0)
    return [float(step) for step in np.diff(ends_ns) / 1e9]


def _script_times(rounds: Sequence[ScriptRound]) -> Summary:
    marked = [time_s for one in rounds for time_s in marked_times_s(one.marks)]
    return summarize(marked or [one.total_s for one in rounds])


def _stamps(records: Round, name: str) -> NDArray[np.int64]:
    """Return one mark of all iterations of all ranks: (ranks, iterations)."""
    return np.array([[getattr(stamp, name) for stamp in record.stamps] for record in records], np.int64)


def _backward_ns(records: Round) -> float:
    """Return the time that the backward passes of a round took, mean over ranks."""
    durations = _stamps(records, "backward_end_ns") - _stamps(records, "backward_begin_ns")
    return float(durations.sum(axis=1).mean())


def _site_busy_s(rounds: Sequence[Round], topology: Topology, site: int) -> float | None:
    """Return how long the uplink of ``site`` needs for what the site sent, as its first rank read it."""
    rate_bytes_per_s = topology.sites[site].uplink_bytes_per_s
    sent_bytes = _total([_first_of(records, topology, site).sent_bytes for records in rounds])
    if rate_bytes_per_s is None or sent_bytes is None:
        return None
    return sent_bytes / (rate_bytes_per_s * topology.payload_share)


def _retransmits(rounds: Sequence[Round], topology: Topology) -> int | None:
    sites = range(len(topology.sites))
    return _total([_first_of(records, topology, site).retransmits for records in rounds for site in sites])


def _first_of(records: Round, topology: Topology, site: int) -> RankRecord:
    return records[topology.sites[site].ranks[0]]


def _total(counts: Sequence[int | None]) -> int | None:
    """Return the sum of what is known; None where nothing is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
