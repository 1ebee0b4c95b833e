"""Quantities as people write them: a number and a unit, with or without a space; and switches, which are on or off.

A bare number is refused, since a rate without a unit is off by eight as often as not. Decimal prefixes are powers of
ten and binary ones (Ki, Mi, Gi) powers of two.

All switches in the environment take the same words, in upper or lower case: 1, true, yes and on, or 0, false, no and
off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction

from detcoll.errors import UsageError

_SHAPE = re.compile(r"^\s*(-?)\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,2})?|\.[0-9]+)\s*([A-Za-z/µμ]*)\s*$", re.ASCII)

_TIME_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9}
_SIZE_BYTES = {"B": 1, "kB": 1000} | {
    f"{prefix}{middle}B": base ** (index + 1)
    for middle, base in (("", 1000), ("i", 1024))
    for index, prefix in enumerate("KMGT")
}
_RATES_BYTES_PER_S = {f"{unit}/s": Fraction(factor) for unit, factor in _SIZE_BYTES.items()} | {
    f"{prefix}{unit}": Fraction(factor, 8)
    for prefix, factor in (("", 1), ("k", 10**3), ("K", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12))
    for unit in ("bit/s", "bps")
}


_SPELLINGS = frozenset({"µs", "μs", "KB", "KB/s", "Kbit/s", "Kbps", "bps", "kbps", "Mbps", "Gbps", "Tbps"})
"""Other ways to write a unit, which are read as well."""

_FLAGS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)

LARGEST = 2**63 - 1
"""No quantity is larger, in nanoseconds, bytes or bytes per second: what a signed 64-bit integer holds."""

LONGEST_TIMEOUT_S = 10**6
"""No wait is longer, some eleven days: what poll(2) takes in milliseconds is not much more."""


def _parse(text: str, units: Mapping[str, int | Fraction], name: str, example: str) -> Fraction:
    match = _SHAPE.match(text) if isinstance(text, str) else None
    if match is None:
        raise UsageError(f"{name}={text!r} is not a quantity; expected a number and a unit such as {example!r}")
    sign, number, unit = match.groups()
    if unit not in units:
        lacks = f"has the unknown unit {unit!r}" if unit else "has no unit"
        known = ", ".join(each for each in units if each not in _SPELLINGS)
        raise UsageError(f"{name}={text!r} {lacks}; expected one of {known}, such as {example!r}")
    if sign:
        raise UsageError(f"{name}={text!r} must not be negative")
    value = Fraction(number) * units[unit]
    if value > LARGEST:
        smallest = min(units, key=lambda each: units[each])
        most = float(LARGEST / units[smallest])
        raise UsageError(f"{name}={text!r} is too large; expected at most {most:.3g} {smallest}")
    return value


def parse_duration_ns(text: str, name: str = "duration") -> int:
    """Return ``text`` such as ``"20 ms"`` in nanoseconds.

    Raises
    ------
    UsageError
        If it is not a number with a unit of time.
    """
    return round(_parse(text, _TIME_NS, name, "20 ms"))


def parse_timeout_s(text: str, name: str = "timeout") -> float:
    """Return how long to wait, ``text`` such as ``"10 min"``, in seconds.

    Raises
    ------
    UsageError
        If it is no duration, or not above zero and at most `LONGEST_TIMEOUT_S`.
    """
    duration_ns = parse_duration_ns(text, name)
    if duration_ns == 0:
        raise UsageError(f"{name}={text!r} must be greater than zero")
    if duration_ns > LONGEST_TIMEOUT_S * 10**9:
        raise UsageError(f"{name}={text!r} is too large; expected at most {LONGEST_TIMEOUT_S} s")
    return duration_ns / 1e9


def parse_size_bytes(text: str, name: str = "size") -> int:
    """Return ``text`` such as ``"64MiB"`` in bytes.

    Raises
    ------
    UsageError
        If it is not a number with a unit of size, or not a whole number of bytes.
    """
    size = _parse(text, _SIZE_BYTES, name, "64MiB")
    if size.denominator != 1:
        raise UsageError(f"{name}={text!r} is not a whole number of bytes")
    return int(size)


def parse_rate_bytes_per_s(text: str, name: str = "rate") -> float:
    """Return ``text`` such as ``"1 Gbit/s"`` in bytes per second.

    Raises
    ------
    UsageError
        If it is not a positive number with a unit of rate.
    """
    rate = float(_parse(text, _RATES_BYTES_PER_S, name, "1 Gbit/s"))
    if not rate > 0:
        raise UsageError(f"{name}={text!r} must be greater than zero")
    return rate


def format_bytes(size: float) -> str:
    """Return ``size`` in bytes with the largest binary unit that keeps it at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if float(size).is_integer() else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_duration(ns: float) -> str:
    """Return ``ns`` nanoseconds with a unit that keeps three or four digits."""
    for unit, factor in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(ns) >= factor:
            return f"{ns / factor:.4g} {unit}"
    return f"{ns:.0f} ns"


def format_rate(bytes_per_s: float) -> str:
    """Return a rate in bits per second with a decimal prefix, in the form that `parse_rate_bytes_per_s` reads."""
    bits = bytes_per_s * 8
    for unit, factor in (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits >= factor:
            return f"{bits / factor:.6g} {unit}"
    return f"{bits:.6g} bit/s"


def rounded_up(rate: float) -> float:
    """Return a positive rate with three significant digits, not less than it was."""
    step = 10.0 ** (math.floor(math.log10(rate)) - 2)
    return math.ceil(rate / step - 1e-9) * step


def format_count(count: int, noun: str) -> str:
    """Return ``count`` and the noun, in the plural but for 1: "1 row", "1,200 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def read_flag(text: str) -> bool | None:
    """Return whether a switch is on, or None if ``text`` is none of the words for it."""
    return _FLAGS.get(text.strip().lower())


def parse_flag(text: str, name: str, *, default: bool) -> bool:
    """Return whether a switch is on; an empty text gives ``default``.

    Raises
    ------
    UsageError
        If it is none of the words for on and off.
    """
    flag = read_flag(text) if text else default
    if flag is None:
        raise UsageError(f"{name}={text!r} is neither on nor off; expected one of {', '.join(_FLAGS)}")
    return flag
