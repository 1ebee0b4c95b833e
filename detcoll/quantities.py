"""Quantities as people write them: a number and a unit, with or without a space.

A bare number is refused, since a rate without a unit is off by eight as often as not. Decimal prefixes are powers of
ten and binary ones (Ki, Mi, Gi) powers of two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from detcoll.errors import UsageError

_SHAPE = re.compile(r"^\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,2})?|\.[0-9]+)\s*([A-Za-z/µμ]+)\s*$", re.ASCII)

_TIME_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9}
_SIZE_BYTES = {"B": 1} | {
    f"{prefix}{middle}B": base ** (index + 1)
    for middle, base in (("", 1000), ("i", 1024))
    for index, prefix in enumerate("KMGT")
}
_SIZE_BYTES["kB"] = 1000
_RATES_BYTES_PER_S = {f"{unit}/s": Fraction(factor) for unit, factor in _SIZE_BYTES.items()} | {
    f"{prefix}{unit}": Fraction(factor, 8)
    for prefix, factor in (("", 1), ("k", 10**3), ("K", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12))
    for unit in ("bit/s", "bps")
}


LARGEST = 2**63 - 1
"""No quantity is larger, in nanoseconds, bytes or bytes per second: what a signed 64-bit integer holds."""


def _parse(text: str, units: Mapping[str, int | Fraction], name: str, example: str) -> Fraction:
    match = _SHAPE.match(text) if isinstance(text, str) else None
    if match is None or match[2] not in units:
        raise UsageError(f"{name}={text!r} is not a quantity; expected a number and a unit such as {example!r}")
    value = Fraction(match[1]) * units[match[2]]
    if value > LARGEST:
        raise UsageError(f"{name}={text!r} is too large; expected at most 2**63 - 1 of the smallest unit")
    return value


def parse_duration_ns(text: str, name: str = "duration") -> int:
    """Return ``text`` such as ``"20 ms"`` in nanoseconds.

    Raises
    ------
    UsageError
        If it is not a number with a unit of time.
    """
    return round(_parse(text, _TIME_NS, name, "20 ms"))


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


def parse_flag(text: str) -> bool:
    """Return whether a switch in the environment is on; ``lab`` says so where nobody else can be on the network."""
    return text.strip().lower() in {"1", "true", "yes", "on", "lab"}
