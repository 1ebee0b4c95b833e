"""Virtual time: clocks that move only when told, each with an offset and a rate of its own."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from detcoll.clock import Exchange


class VirtualTime:
    """The true time that all fake clocks of a test are driven by."""

    def __init__(self, now_ns: int = 0) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        """Return the true time in nanoseconds."""
        return self._now_ns

    def advance(self, ns: int) -> int:
        """Let ``ns`` nanoseconds pass and return the new time."""
        if ns < 0:
            raise ValueError(f"ns={ns}: time does not go back")
        self._now_ns += ns
        return self._now_ns

    def advance_to(self, now_ns: int) -> int:
        """Let time pass until ``now_ns``, if that is still to come, and return the new time."""
        return self.advance(max(now_ns - self._now_ns, 0))


class FakeClock:
    """A clock over a `VirtualTime` (its own, if none is given) that is off, runs fast or slow, and can step.

    Satisfies `detcoll.transport.Clock`.
    """

    def __init__(self, time: VirtualTime | None = None, *, offset_ns: int = 0, drift_ppm: float = 0.0) -> None:
        self.time = VirtualTime() if time is None else time
        self._since_ns = self.time.now_ns()
        self._at_ns = Fraction(self._since_ns + offset_ns)
        self._rate = _rate(drift_ppm)

    def now_ns(self) -> int:
        """Return what the clock shows."""
        return int(self._exactly() // 1)

    def advance(self, ns: int) -> int:
        """Let ``ns`` nanoseconds of true time pass, for all clocks over it, and return what this one shows."""
        self.time.advance(ns)
        return self.now_ns()

    def step(self, ns: int) -> None:
        """Jump by ``ns`` nanoseconds, forward or back."""
        self._at_ns += ns

    def set_drift(self, drift_ppm: float) -> None:
        """Run this much too fast from now on."""
        self._at_ns, self._since_ns = self._exactly(), self.time.now_ns()
        self._rate = _rate(drift_ppm)

    def when_ns(self, shown_ns: int) -> int:
        """Return the earliest true time at which the clock shows ``shown_ns``, if nothing touches it until then."""
        return self._since_ns + int(-(-(shown_ns - self._at_ns) / self._rate // 1))

    def _exactly(self) -> Fraction:
        return self._at_ns + (self.time.now_ns() - self._since_ns) * self._rate


def _rate(drift_ppm: float) -> Fraction:
    return 1 + Fraction(drift_ppm) / 10**6


class FakePath:
    """Two clocks over one true time, and the two ways between them, with queueing drawn from a seed."""

    def __init__(
        self,
        *,
        offset_ns: int = 0,
        drift_ppm: float = 0.0,
        there_ns: int = 10_000_000,
        back_ns: int = 10_000_000,
        jitter_ns: int = 0,
        seed: int = 0,
    ) -> None:
        self.time = VirtualTime(10**12)
        self.local = FakeClock(self.time)
        self.remote = FakeClock(self.time, offset_ns=offset_ns, drift_ppm=drift_ppm)
        self.there_ns = there_ns
        self.back_ns = back_ns
        self._jitter_ns = jitter_ns
        self._rng = np.random.default_rng(seed)

    @property
    def offset_ns(self) -> int:
        """Remote minus local, as it truly is now."""
        return self.remote.now_ns() - self.local.now_ns()

    def exchange(self) -> Exchange:
        """Let a message travel there and back, and return the times that were noted."""
        t0_ns = self.local.now_ns()
        self.time.advance(self.there_ns + self._queued_ns())
        t1_ns = self.remote.now_ns()
        self.time.advance(int(self._rng.integers(1, 50_000)))
        t2_ns = self.remote.now_ns()
        self.time.advance(self.back_ns + self._queued_ns())
        return Exchange(t0_ns, t1_ns, t2_ns, self.local.now_ns())

    def _queued_ns(self) -> int:
        return int(self._rng.exponential(self._jitter_ns)) if self._jitter_ns else 0
