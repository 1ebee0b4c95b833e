"""What a list of times says: median and tails, and the ratio of two of them.

A ratio of medians is quoted with its spread: the baseline's median over the other's p99 and p01. That is wider than a
confidence interval of the median, on purpose: it tells what single iterations do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detcoll.errors import UsageError


@dataclass(frozen=True, slots=True)
class Summary:
    """Times in seconds: median, first and last percentile, and every sample in the order it was taken."""

    median: float
    p01: float
    p99: float
    samples: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tails:
    """Times in seconds: median, least, greatest and 99th percentile."""

    median: float
    least: float
    greatest: float
    p99: float


def summarize(samples_s: Sequence[float]) -> Summary:
    """Return the summary of at least one sample.

    Raises
    ------
    UsageError
        If there is no sample.
    """
    if not samples_s:
        raise UsageError("samples_s=[] has no sample to summarize")
    median, p01, p99 = (float(value) for value in np.percentile(samples_s, [50, 1, 99]))
    return Summary(median, p01, p99, tuple(float(sample) for sample in samples_s))


def tails(samples_s: Sequence[float]) -> Tails:
    """Return median, least, greatest and p99 of at least one sample."""
    if not samples_s:
        raise UsageError("samples_s=[] has no sample to summarize")
    median, p99 = (float(value) for value in np.percentile(samples_s, [50, 99]))
    return Tails(median, float(min(samples_s)), float(max(samples_s)), p99)


def ratio(baseline: Summary, other: Summary) -> tuple[float, float, float]:
    """Return the ratio of medians, baseline over other, and the range it moves in: (ratio, low, high)."""
    return (
        baseline.median / other.median,
        baseline.median / other.p99,
        baseline.median / other.p01,
    )
