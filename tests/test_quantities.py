"""Quantities: a number and a unit, exactly, or an error that names what was given."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detcoll.errors import UsageError
from detcoll.quantities import (
    format_bytes,
    format_duration,
    format_rate,
    parse_duration_ns,
    parse_flag,
    parse_rate_bytes_per_s,
    parse_size_bytes,
    parse_timeout_s,
    rounded_up,
)

PARSERS = [parse_duration_ns, parse_size_bytes, parse_rate_bytes_per_s]


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("20 ms", 20_000_000),
        ("20ms", 20_000_000),
        ("  1.5  us ", 1_500),
        ("1.5 µs", 1_500),
        ("1.5 μs", 1_500),
        ("7 ns", 7),
        ("0 s", 0),
        ("2 min", 120 * 10**9),
        ("1e3 ms", 10**9),
        ("2.5E-3 s", 2_500_000),
        (".5 s", 500_000_000),
        ("3. s", 3 * 10**9),
        ("9007199.254740993 s", 9_007_199_254_740_993),  # more digits than a float64 has
    ],
)
def test_durations(text, ns):
    assert parse_duration_ns(text) == ns
    assert isinstance(parse_duration_ns(text), int)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 * 2**20),
        ("64 MiB", 64 * 2**20),
        ("64 MB", 64 * 10**6),
        ("1 kB", 1000),
        ("1 KB", 1000),
        ("1 KiB", 1024),
        ("1.5 KiB", 1536),
        ("2 GiB", 2**31),
        ("1 TB", 10**12),
        ("0 B", 0),
        ("9007199254740993 B", 2**53 + 1),
    ],
)
def test_sizes(text, size):
    assert parse_size_bytes(text) == size
    assert isinstance(parse_size_bytes(text), int)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1 Gbit/s", 125e6),
        ("1Gbps", 125e6),
        ("800 Mbit/s", 100e6),
        ("8 kbit/s", 1000),
        ("8 Kbit/s", 1000),
        ("8 bit/s", 1),
        ("1 Tbit/s", 125e9),
        ("1 GB/s", 1e9),
        ("1 MiB/s", 2**20),
        ("5 B/s", 5),
    ],
)
def test_rates(text, rate):
    assert parse_rate_bytes_per_s(text) == rate
    assert isinstance(parse_rate_bytes_per_s(text), float)


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    "text",
    ["", " ", "ms", "Gbit/s", "MiB", "+5 ms", "--5 ms", "1,5 ms", "1 2 ms", "0x10 B",
     "nan s", "inf B", "1e400 s", "1e999999999 B", "٣ ms", 20, 2.5, None, b"20 ms", ["20 ms"]],
)  # fmt: skip
def test_what_is_no_quantity_is_refused(parse, text):
    with pytest.raises(
        UsageError, match=r"^speed=.* is not a quantity; expected a number and a unit such as"
    ) as caught:
        parse(text, "speed")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("parse", "known", "example"),
    [
        (parse_duration_ns, "ns, us, ms, s, min", "20 ms"),
        (parse_size_bytes, "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB", "64MiB"),
        (
            parse_rate_bytes_per_s,
            "B/s, kB/s, MB/s, GB/s, TB/s, KiB/s, MiB/s, GiB/s, TiB/s, bit/s, kbit/s, Mbit/s, Gbit/s, Tbit/s",
            "1 Gbit/s",
        ),
    ],
)
def test_a_unit_that_is_missing_or_unknown_is_told_with_those_known(parse, known, example):
    for text, lacks in (
        ("0", "has no unit"),
        ("1e9", "has no unit"),
        ("5 parsec", "has the unknown unit 'parsec'"),
        ("1PiB", "has the unknown unit 'PiB'"),
        ("5 gib", "has the unknown unit 'gib'"),
    ):
        with pytest.raises(UsageError) as caught:
            parse(text, "speed")
        assert str(caught.value) == f"speed={text!r} {lacks}; expected one of {known}, such as {example!r}"


@pytest.mark.parametrize(("parse", "text"), [(parse_duration_ns, "-5s"), (parse_size_bytes, "-0 B"),
                                             (parse_rate_bytes_per_s, "- 1 Gbit/s")])  # fmt: skip
def test_negative_quantities_are_told_to_be_negative(parse, text):
    with pytest.raises(UsageError, match=f"speed='{text}' must not be negative"):
        parse(text, "speed")


def test_waits_are_above_zero_and_have_an_end():
    assert parse_timeout_s("1.5 ms") == 0.0015
    assert parse_timeout_s("1e6 s") == 1e6
    for text, why in (("0 s", "must be greater than zero"), ("1e6 min", "is too large; expected at most 1000000 s")):
        with pytest.raises(UsageError, match=f"--timeout='{text}' {why}"):
            parse_timeout_s(text, "--timeout")


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_duration_ns, "64 MiB"),
        (parse_duration_ns, "1 Gbit/s"),
        (parse_size_bytes, "20 ms"),
        (parse_size_bytes, "1 Mbit"),
        (parse_size_bytes, "64 MiB/s"),
        (parse_rate_bytes_per_s, "1 Gbit"),
        (parse_rate_bytes_per_s, "1 Gb/s"),  # bits or bytes? nobody knows
        (parse_rate_bytes_per_s, "20 ms"),
    ],
)
def test_units_of_another_kind_are_refused(parse, text):
    with pytest.raises(UsageError, match="has the unknown unit"):
        parse(text)


@pytest.mark.parametrize(
    ("parse", "text", "most"),
    [
        (parse_duration_ns, "1e12 s", "9.22e+18 ns"),
        (parse_size_bytes, "1e99 B", "9.22e+18 B"),
        (parse_rate_bytes_per_s, "1e9 TB/s", "7.38e+19 bit/s"),
    ],
)
def test_quantities_beyond_64_bits_are_refused(parse, text, most):
    with pytest.raises(UsageError, match=f"is too large; expected at most {re.escape(most)}"):
        parse(text)


def test_sizes_are_whole_and_rates_are_not_zero():
    with pytest.raises(UsageError, match=r"size='1.5 B' is not a whole number of bytes"):
        parse_size_bytes("1.5 B")
    with pytest.raises(UsageError, match=r"rate='0 Gbit/s' must be greater than zero"):
        parse_rate_bytes_per_s("0 Gbit/s")


@pytest.mark.parametrize("default", [True, False])
def test_switches(default):
    for text, flag in (("1", True), ("on", True), ("YES", True), (" True ", True), ("", default),
                       ("0", False), ("off", False), ("No", False), ("false", False)):  # fmt: skip
        assert parse_flag(text, "SWITCH", default=default) is flag
    for text in ("2", "lab", "-", " ", "o ff"):
        with pytest.raises(UsageError) as caught:
            parse_flag(text, "SWITCH", default=default)
        expected = "expected one of 1, true, yes, on, 0, false, no, off"
        assert str(caught.value) == f"SWITCH={text!r} is neither on nor off; {expected}"


@given(st.integers(0, 2**63 - 1))
def test_whole_numbers_are_exact(value):
    assert parse_duration_ns(f"{value} ns") == value
    assert parse_size_bytes(f"{value}B") == value


@given(st.floats(1e-3, 1e15))
def test_a_formatted_rate_is_read_back(rate):
    assert parse_rate_bytes_per_s(format_rate(rate)) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(0), "0 B"),
        (format_bytes(1023), "1023 B"),
        (format_bytes(1024), "1 KiB"),
        (format_bytes(1536), "1.5 KiB"),
        (format_bytes(64 * 2**20), "64 MiB"),
        (format_bytes(5000 * 2**30), "5000 GiB"),
        (format_bytes(-2048), "-2 KiB"),
        (format_duration(0), "0 ns"),
        (format_duration(999), "999 ns"),
        (format_duration(1500), "1.5 us"),
        (format_duration(20_000_000), "20 ms"),
        (format_duration(-3 * 10**9), "-3 s"),
        (format_rate(125e6), "1 Gbit/s"),
        (format_rate(100), "800 bit/s"),
        (format_rate(1000), "8 kbit/s"),
    ],
)
def test_formats(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("rate", "wanted"), [(48_641_600.0, 48.7e6), (918e9, 918e9), (999.1e6, 1e9), (0.0123, 0.0123), (1000.1, 1010.0)]
)
def test_rates_are_rounded_up_to_three_digits(rate: float, wanted: float) -> None:
    assert rounded_up(rate) == pytest.approx(wanted)
