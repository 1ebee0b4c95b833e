"""How far a remote clock is off, and how far that can be wrong. Time is an argument here.

A two-way exchange notes four times: t0 sent here, t1 arrived there, t2 answered there, t3 returned here. Since nothing
arrives before it was sent, the offset (remote minus local) lies between two edges::

    (t2 - t3) + least delay back  <=  offset  <=  (t1 - t0) - least delay there

With nothing known about the path both least delays are 0, and the interval is the round trip wide: a two-way exchange
cannot see asymmetry. Edges of several exchanges are intersected, each moved to the same instant by the range in which
the relative rate (skew) of the two clocks can lie; so queueing in either direction falls out of the bound, since the
exchange with the least delay gives the narrowest edge of each side (Zhang, Liu, Xia, "Clock synchronization algorithms
for network measurements", INFOCOM 2002; Mills, RFC 5905, for the minimum filter). Inside that interval the estimate
follows a line fitted through the exchanges of least delay.

The bound is honest as long as the rates of the two clocks differ by no more than `ClockFilter`'s ``skew_limit_ppm``,
the rate wanders within the window by no more than ``wander_ppm``, and no clock steps unseen. An exchange whose
interval misses the predicted one altogether is a step: what came before is dropped and the filter resynchronises.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError

_PPM = 1e-6
_FIT_SAMPLES = 8
_FIT_SPAN_NS = 4 * 10**9
_ROUNDING_NS = 2


@dataclass(frozen=True, slots=True)
class Exchange:
    """One two-way exchange: t0 and t3 on the local clock, t1 and t2 on the remote one."""

    t0_ns: int
    t1_ns: int
    t2_ns: int
    t3_ns: int

    @property
    def offset_ns(self) -> int:
        """Remote minus local, if both ways took equally long."""
        return (self.t1_ns - self.t0_ns + self.t2_ns - self.t3_ns) // 2

    @property
    def delay_ns(self) -> int:
        """Time on the way, there and back."""
        return (self.t3_ns - self.t0_ns) - (self.t2_ns - self.t1_ns)

    @property
    def at_ns(self) -> int:
        """The local time that the offset belongs to."""
        return (self.t0_ns + self.t3_ns) // 2


class SyncState(Enum):
    """How much the filter knows."""

    EMPTY = "empty"
    RESYNCHRONISING = "resynchronising"
    SYNCHRONISED = "synchronised"


class Verdict(Enum):
    """What became of an exchange."""

    ACCEPTED = "accepted"
    STEP = "step"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class _Sample:
    at_ns: int
    low_ns: int
    high_ns: int
    offset_ns: int
    delay_ns: int


@dataclass(frozen=True, slots=True)
class _Solution:
    """All at ``at_ns``; skews are ns per ns, edges and estimate are relative to ``base_ns``."""

    at_ns: int
    base_ns: int
    low_ns: float
    high_ns: float
    estimate_ns: float
    skew_low: float
    skew_high: float
    skew: float

    def at(self, now_ns: int) -> tuple[int, int, int]:
        """Return the least, the estimated and the greatest offset at ``now_ns``."""
        age_ns = now_ns - self.at_ns
        drifts = (self.skew_low * age_ns, self.skew_high * age_ns)
        low_ns, high_ns = self.low_ns + min(drifts), self.high_ns + max(drifts)
        estimate_ns = min(max(self.estimate_ns + self.skew * age_ns, low_ns), high_ns)
        return self.base_ns + floor(low_ns), self.base_ns + round(estimate_ns), self.base_ns + ceil(high_ns)


class ClockFilter:
    """Offset of one remote clock, from exchanges with it.

    Parameters
    ----------
    window : int
        How many exchanges are kept.
    settle : int
        How many it takes, at the start and after a step, to be synchronised.
    skew_limit_ppm : float
        How far the two clocks' rates can be apart: two free-running crystals of 100 ppm each.
    wander_ppm : float
        How far the relative rate can change while an exchange stays in the window.
    least_there_ns, least_back_ns : int
        One-way delays that no message undercuts, where they are known for certain; they narrow the bound.
    """

    def __init__(
        self,
        *,
        window: int = 64,
        settle: int = 4,
        skew_limit_ppm: float = 200.0,
        wander_ppm: float = 1.0,
        least_there_ns: int = 0,
        least_back_ns: int = 0,
    ) -> None:
        if not 1 <= settle <= window:
            raise UsageError(f"settle={settle} must be from 1 to window={window}")
        if not (skew_limit_ppm > 0 and wander_ppm >= 0):
            raise UsageError(f"skew_limit_ppm={skew_limit_ppm}, wander_ppm={wander_ppm} must be positive")
        if least_there_ns < 0 or least_back_ns < 0:
            raise UsageError(f"least_there_ns={least_there_ns}, least_back_ns={least_back_ns} must not be negative")
        self._window = window
        self._settle = settle
        self._limit = skew_limit_ppm * _PPM
        self._wander = wander_ppm * _PPM
        self._least_there_ns = least_there_ns
        self._least_back_ns = least_back_ns
        self._samples: list[_Sample] = []
        self._solution: _Solution | None = None
        self.steps = 0
        self.refused = 0
        self.last_step_ns = 0

    @property
    def state(self) -> SyncState:
        """How much is known; windows should be trusted in SYNCHRONISED only."""
        if not self._samples:
            return SyncState.EMPTY
        return SyncState.SYNCHRONISED if len(self._samples) >= self._settle else SyncState.RESYNCHRONISING

    @property
    def skew_ppm(self) -> float:
        """How much faster the remote clock runs, by the fit; 0 until there is enough to fit."""
        return self._known().skew / _PPM

    def offset_ns(self, now_ns: int) -> int:
        """Return remote minus local time at local time ``now_ns``.

        Raises
        ------
        UsageError
            If there was no exchange yet (`state` is EMPTY).
        """
        return self._known().at(now_ns)[1]

    def bound_ns(self, now_ns: int) -> int:
        """Return how far `offset_ns` can be wrong at ``now_ns``, at most; see the module for what that rests on."""
        low_ns, estimate_ns, high_ns = self._known().at(now_ns)
        return max(high_ns - estimate_ns, estimate_ns - low_ns)

    def add(self, exchange: Exchange) -> Verdict:
        """Take an exchange into account.

        Returns
        -------
        Verdict
            REFUSED if its times contradict themselves or the least delays; STEP if it fits nothing that came before,
            which is dropped then; else ACCEPTED.
        """
        sample = self._sample(exchange)
        if sample is None:
            self.refused += 1
            return Verdict.REFUSED
        verdict = Verdict.ACCEPTED
        if self._solution is not None:
            low_ns, estimate_ns, high_ns = self._solution.at(sample.at_ns)
            if sample.low_ns > high_ns or sample.high_ns < low_ns:
                self.forget()
                self.steps += 1
                self.last_step_ns = sample.offset_ns - estimate_ns
                verdict = Verdict.STEP
        self._samples.append(sample)
        self._samples.sort(key=lambda kept: kept.at_ns)
        del self._samples[: -self._window]
        self._solve()
        return verdict

    def forget(self) -> None:
        """Drop all exchanges, as after a suspend of this host."""
        self._samples.clear()
        self._solution = None

    def _known(self) -> _Solution:
        if self._solution is None:
            raise UsageError("the remote clock is not known: there was no exchange yet")
        return self._solution

    def _sample(self, exchange: Exchange) -> _Sample | None:
        """Return the edges of an exchange, widened by what the clocks can drift apart during it."""
        elapsed_ns = exchange.t3_ns - exchange.t0_ns
        excess_ns = exchange.delay_ns - self._least_there_ns - self._least_back_ns
        slack_ns = ceil(self._limit * max(elapsed_ns, 0)) + _ROUNDING_NS
        if elapsed_ns < 0 or exchange.t2_ns < exchange.t1_ns or excess_ns < -2 * slack_ns:
            return None
        return _Sample(
            exchange.at_ns,
            exchange.t2_ns - exchange.t3_ns + self._least_back_ns - slack_ns,
            exchange.t1_ns - exchange.t0_ns - self._least_there_ns + slack_ns,
            exchange.offset_ns,
            exchange.delay_ns,
        )

    def _solve(self) -> None:
        """Work out the interval, dropping the oldest exchanges while they fit no common rate."""
        while (solution := _solved(self._samples, self._limit, self._wander)) is None:
            del self._samples[0]
        self._solution = solution


def _solved(samples: list[_Sample], limit: float, wander: float) -> _Solution | None:
    """Return what ``samples`` (in time order) say together, or None if they contradict each other."""
    newest = samples[-1]
    base_ns = newest.offset_ns
    ages = _array(newest.at_ns - sample.at_ns for sample in samples)
    lows = _array(sample.low_ns - base_ns for sample in samples)
    highs = _array(sample.high_ns - base_ns for sample in samples)
    skew_low, skew_high = _skew_range(ages, lows, highs, limit, wander)
    low_ns = float(np.max(lows + skew_low * ages))
    high_ns = float(np.min(highs + skew_high * ages))
    if skew_low > skew_high or low_ns > high_ns:
        return None
    offsets = _array(sample.offset_ns - base_ns for sample in samples)
    delays = _array(sample.delay_ns for sample in samples)
    skew = min(max(_fitted_skew(ages, offsets, delays), skew_low), skew_high)
    estimate_ns = float(np.max(lows + skew * ages) + np.min(highs + skew * ages)) / 2
    return _Solution(newest.at_ns, base_ns, low_ns, high_ns, estimate_ns, skew_low, skew_high, skew)


def _array(values: Iterable[int]) -> NDArray[np.float64]:
    return np.fromiter(values, np.float64)


def _skew_range(
    ages: NDArray[np.float64], lows: NDArray[np.float64], highs: NDArray[np.float64], limit: float, wander: float
) -> tuple[float, float]:
    """Return the rates that join every earlier interval with every later one, within ``limit``."""
    elapsed = ages[:, None] - ages[None, :]  # from sample i to sample j
    later = elapsed > 0
    if not later.any():
        return -limit, limit
    apart = elapsed[later]
    least = float(np.max((lows[None, :] - highs[:, None])[later] / apart)) - wander
    most = float(np.min((highs[None, :] - lows[:, None])[later] / apart)) + wander
    return max(least, -limit), min(most, limit)


def _fitted_skew(ages: NDArray[np.float64], offsets: NDArray[np.float64], delays: NDArray[np.float64]) -> float:
    """Return the slope of a weighted line: exchanges that queued least weigh most."""
    if len(ages) < _FIT_SAMPLES or ages[0] - ages[-1] < _FIT_SPAN_NS:
        return 0.0
    queued = delays - delays.min()
    weights = 1 / (1000 + np.median(queued) / 4 + queued) ** 2
    weights /= weights.sum()
    times = -ages - np.dot(weights, -ages)
    return float(np.dot(weights * times, offsets) / np.dot(weights * times, times))
