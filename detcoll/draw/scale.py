"""From figures to places: scales, round ticks, and how their labels read."""

from __future__ import annotations

import math
from dataclasses import dataclass

NARROW_BELOW = 600
"""A picture narrower than this is meant for a phone: labels stand above what they name instead of beside it."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps figures from ``low`` to ``high`` to places from ``begin`` to ``end``, by their logarithms or straight."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of ``value``."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        share = (at - low) / (high - low) if high > low else 0.0
        return self.begin + share * (self.end - self.begin)

    def ticks(self, most: int) -> list[float]:
        """Return at most ``most`` round figures within the scale (at least one, where it has any)."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``."""
    if not high > low:
        return [low]
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return 1, 2 and 5 times powers of ten from ``low`` to ``high``, or only those powers where these are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


def percent(share: float, digits: int = 1, signed: bool = False) -> str:
    """Return a share in per cent, with a space before the sign that does not break; ``signed`` puts + before gains."""
    value = _unsigned_zero(100 * share, digits)
    return f"{'+' if signed and value > 0 else ''}{value:.{digits}f}\N{NO-BREAK SPACE}%"


def _unsigned_zero(value: float, digits: int) -> float:
    """Return ``value``, or 0 if it is shown as zero: a rounded-off figure has no sign."""
    return value if round(value, digits) else 0.0


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which ``seconds`` reads well, and how many seconds it has."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("\N{MICRO SIGN}s", 1e-6)):
        if abs(seconds) >= size:
            return unit, size
    return "ns", 1e-9


def time_text(seconds: float) -> str:
    """Return a time with three significant digits and its unit."""
    unit, size = time_unit(seconds)
    value = _unsigned_zero(seconds / size, 3)
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 3)}f}\N{NO-BREAK SPACE}{unit}"


def plain(value: float) -> str:
    """Return the figure of a tick, without zeros that say nothing."""
    return f"{value or 0.0:.10g}"
