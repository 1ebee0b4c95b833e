"""The way from one site to another for one class: the delay, what is lost on it, and what is counted.

Random loss takes single segments; the gaps between losses are geometric, so a unit without one costs nothing. Jitter
keeps the order. While the link is down, whatever is on its way is lost, and since the timetable is known beforehand,
that is decided when a unit leaves its uplink.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from detcoll.emulation.lab.conditions import Conditions, Failure, Service
from detcoll.emulation.lab.port import Policer, Port
from detcoll.emulation.lab.statistics import DirectionStatistics

_NEVER = 1 << 62
_BUCKET_BITS = 14
"""Delays are counted in buckets of 2**14 ns, 16 us."""


class Losses:
    """Draws which segments are lost."""

    __slots__ = ("_loss", "_random", "gap")

    def __init__(self, loss: float, seed: str) -> None:
        self._loss = loss
        self._random = random.Random(seed)
        self.gap = self.draw()

    @property
    def any(self) -> bool:
        """Whether anything is ever lost."""
        return self._loss > 0

    def draw(self) -> int:
        """Return how many segments pass before the next one that is lost."""
        if self._loss <= 0:
            return _NEVER
        if self._loss >= 1:
            return 0
        return int(math.log(1.0 - self._random.random()) / math.log1p(-self._loss))

    def take(self, segments: int) -> list[int]:
        """Return which of the next ``segments`` are lost, in rising order."""
        lost = []
        at = self.gap
        while at < segments:
            lost.append(at)
            at += 1 + self.draw()
        self.gap = at - segments
        return lost


class Delays:
    """Counts delays, so that any percentile can be told to within a bucket."""

    __slots__ = ("counts", "longest_ns")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.longest_ns = 0.0

    def add(self, delay_ns: float) -> None:
        """Count one."""
        bucket = int(delay_ns) >> _BUCKET_BITS
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        if delay_ns > self.longest_ns:
            self.longest_ns = delay_ns

    def percentile_ns(self, percent: float) -> int | None:
        """Return the least bucket's end that ``percent`` of the delays do not exceed; None if nothing was counted."""
        wanted = math.ceil(sum(self.counts.values()) * percent / 100)
        for bucket in sorted(self.counts):
            wanted -= self.counts[bucket]
            if wanted <= 0:
                return min((bucket + 1) << _BUCKET_BITS, math.ceil(self.longest_ns))
        return None


class Path:
    """One class of one direction: from site ``source`` to site ``destination``.

    Half of its fields are what it counts, which statistics read by name.
    """

    __slots__ = ("_failures", "_last_due_ns", "delay_ns", "delays", "destination", "down", "down_drops", "failed",
                 "jitter", "jitter_ns", "losses", "lost", "payload_bytes", "policed", "policer", "segments", "service",
                 "source", "units", "up", "up_drops", "wire_bytes")  # fmt: skip

    def __init__(
        self, source: int, destination: int, delay_ns: int, ports: tuple[Port[Piece], Port[Piece]],
        conditions: Conditions, reserved_bytes_per_s: float | None = None,
    ) -> None:  # fmt: skip
        self.source, self.destination, self.delay_ns = source, destination, delay_ns
        self.up, self.down = ports
        self.service, self.policer = Service.BEST_EFFORT, None
        if reserved_bytes_per_s is not None:
            self.service = Service.DETERMINISTIC
            self.policer = Policer(reserved_bytes_per_s, conditions.burst_for(reserved_bytes_per_s))
        name = f"{conditions.seed}:{source}:{destination}"
        is_reserved = self.policer is not None
        self.losses = Losses(0.0 if is_reserved else conditions.loss, name)
        self.jitter_ns = 0 if is_reserved else conditions.jitter_ns
        self.jitter = random.Random(f"{name}:jitter")
        self._failures: Sequence[Failure] = [
            failure for failure in conditions.failures if failure.concerns(source, destination)
        ]
        self._last_due_ns = 0.0
        self.delays = Delays()
        self.units = self.segments = self.wire_bytes = self.payload_bytes = 0
        self.up_drops = self.policed = self.lost = self.failed = self.down_drops = 0

    def arrival_ns(self, left_ns: float) -> float:
        """Return when the last bit arrives of something that left the uplink at ``left_ns``."""
        due_ns = left_ns + self.delay_ns
        if self.jitter_ns:
            due_ns = max(self._last_due_ns, due_ns + self.jitter.random() * self.jitter_ns)
            self._last_due_ns = due_ns
        return due_ns

    def is_down(self, left_ns: float, due_ns: float) -> bool:
        """Tell whether the link fails while something is on its way; times are since the lab's opening."""
        return any(failure.start_ns <= due_ns and left_ns < failure.end_ns for failure in self._failures)

    def statistics(self) -> DirectionStatistics:
        """Return what was counted."""
        return DirectionStatistics(
            source=self.source,
            destination=self.destination,
            units=self.units,
            segments=self.segments,
            wire_bytes=self.wire_bytes,
            payload_bytes=self.payload_bytes,
            uplink_dropped_segments=self.up_drops,
            lost_segments=self.lost,
            downlink_dropped_segments=self.down_drops,
            service=self.service,
            policed_segments=self.policed,
            failed_segments=self.failed,
            delay_p50_ns=self.delays.percentile_ns(50),
            delay_p99_ns=self.delays.percentile_ns(99),
            delay_max_ns=self.delays.percentile_ns(100),
        )


Piece = tuple[Path, bytes, int, int]
"""A unit or what is left of it: its path, the bytes, how many on the wire, and when it reached its uplink."""
