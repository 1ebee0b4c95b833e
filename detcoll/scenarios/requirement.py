"""What must be reserved for an efficiency.

Times of a bucket fall with the rate B of every site's line about as a + b / B: delays and hosts, and bytes. So from two
simulated rates follow a and b, from them the rate at which an iteration takes as long as it may, and the simulation at
that rate says how far off that is. The answer is kept between a rate known to be too low and one known to be enough;
where the next guess does not lie between them (hosts, not lines, may hold an iteration up), the middle is taken. Every
site of an all-reduce between more than two sites sends the same 2 (S-1)/S V bytes, so all need the same rate, whatever
they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from detcoll.errors import UsageError
from detcoll.scenarios.workload import BucketTimes, Workload, iteration_ns

CLOSE_ENOUGH = 1.002
"""Rates this near are one."""

LARGEST_TRIES = 30
LARGEST_RATE_BYTES_PER_S = 1e18

TimesAt = Callable[[float], BucketTimes]
"""Bucket times where every site's line carries so many bytes a second."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """``rate_bytes_per_s`` : None where no rate gives the efficiency.  ``reached`` : what that, or no limit, gives."""

    efficiency: float
    rate_bytes_per_s: float | None
    reached: float


def required_rate(
    work: Workload, baseline_ns: float, efficiency: float, times_at: TimesAt, guess_bytes_per_s: float
) -> Requirement:
    """Return the least rate of every site's line that gives ``efficiency``.

    Parameters
    ----------
    work : Workload
        One iteration.
    baseline_ns : float
        What it takes in a single cluster.
    efficiency : float
        Above 0, at most 1: single-cluster iteration over this one.
    times_at : callable
        Simulates a rate.
    guess_bytes_per_s : float
        Where to begin.

    Raises
    ------
    UsageError
        If the efficiency is not above 0 and at most 1.
    """
    require_efficiency(efficiency)

    def reached(times: BucketTimes) -> float:
        return baseline_ns / iteration_ns(work, times)

    known = {rate: times_at(rate) for rate in (guess_bytes_per_s, 2 * guess_bytes_per_s)}
    endless = reached(times_at(LARGEST_RATE_BYTES_PER_S))
    if endless < efficiency:
        return Requirement(efficiency, None, endless)
    low = max((rate for rate, times in known.items() if reached(times) < efficiency), default=1.0)
    high = min((rate for rate, times in known.items() if rate > low and reached(times) >= efficiency), default=0.0)
    high = high or LARGEST_RATE_BYTES_PER_S
    for _ in range(LARGEST_TRIES):
        if high / low < CLOSE_ENOUGH:
            break
        guess = _least_rate(work, baseline_ns, efficiency, _fitted(known)) * (1 + (CLOSE_ENOUGH - 1) / 4)
        rate = guess if low * CLOSE_ENOUGH**0.5 < guess < high else max(low * CLOSE_ENOUGH**0.5, (low * high) ** 0.5)
        known = {rate: times_at(rate), **known}
        low, high = (low, rate) if reached(known[rate]) >= efficiency else (rate, high)
        if high == rate and reached(known[rate]) - efficiency < (CLOSE_ENOUGH - 1) / 4:
            break
    return Requirement(efficiency, high, reached(known[high]))


def require_efficiency(efficiency: float) -> None:
    """Refuse an efficiency that is not above 0 and at most 1."""
    if not 0 < efficiency <= 1:
        raise UsageError(f"efficiency={efficiency} must be above 0 and at most 1")


def _fitted(known: dict[float, BucketTimes]) -> TimesAt:
    """Return times as a + b / rate through the first two rates known."""
    (one, at_one), (two, at_two) = list(known.items())[:2]

    def line(first: float, second: float, rate: float) -> float:
        slope = (first - second) / (1 / one - 1 / two)
        return max(first + slope * (1 / rate - 1 / one), 0.0)

    return lambda rate: BucketTimes(
        line(at_one.first_ns, at_two.first_ns, rate), line(at_one.interval_ns, at_two.interval_ns, rate)
    )


def _least_rate(work: Workload, baseline_ns: float, efficiency: float, model: TimesAt) -> float:
    """Return the least rate with which the model keeps to the efficiency, or the largest, by halving."""
    low, high = 1.0, LARGEST_RATE_BYTES_PER_S

    def keeps(rate: float) -> bool:
        return baseline_ns / iteration_ns(work, model(rate)) >= efficiency

    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high
