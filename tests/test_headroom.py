"""The budget of messages that leave at once, in virtual time."""

from __future__ import annotations

import pytest
from ranks import lines

from detcoll.plan.calendar import LAID_OUT, Slotting, build_calendar
from detcoll.plan.headroom import LEAST_BURST_BYTES, Express, burst_bytes, headroom_bytes_per_s
from detcoll.plan.layout import EXPRESS_BYTES, LARGEST_FRAME_BYTES

MS = 1_000_000
FRAMED = 1000
"""A message of this much on the line."""


def take(budget: Express, now_ns: int) -> int:
    """Return how many messages leave at once."""
    return sum(budget.take(FRAMED - LARGEST_FRAME_BYTES, now_ns) for _ in range(1000))


def test_a_burst_leaves_and_then_what_is_refilled() -> None:
    budget = Express(1e6, 4 * FRAMED, 4 * FRAMED)
    assert take(budget, 0) == 4
    assert take(budget, MS) == 1
    assert take(budget, 2 * MS - 1) == 0
    assert take(budget, 2 * MS) == 1
    assert take(budget, 100 * MS) == 4, "never more than a burst"
    assert take(budget, 50 * MS) == 0, "time does not go back"


def test_what_cannot_wait_is_a_debt_of_one_burst_at_most() -> None:
    budget = Express(1e6, 4 * FRAMED, 4 * FRAMED)
    for _ in range(100):
        budget.spend(FRAMED - LARGEST_FRAME_BYTES, 0)
    assert take(budget, 4 * MS) == 0
    assert take(budget, 5 * MS) == 1


@pytest.mark.parametrize("mode", [Slotting.CALENDAR, Slotting.TURNS, Slotting.SHARE])
def test_budgets_and_windows_together_fit_into_the_line(mode: Slotting) -> None:
    topology = lines(2, 2)
    calendar = build_calendar(topology, mode)
    reserved = calendar.rate_bytes_per_s(0, 1) * (1 if mode is Slotting.TURNS else 2)
    headroom = sum(headroom_bytes_per_s(topology, rank) for rank in (0, 1))
    assert reserved == pytest.approx(100e6 * topology.payload_share * LAID_OUT)
    assert reserved + headroom == pytest.approx(100e6 * topology.payload_share)
    budget = Express.of(topology, 0)
    assert budget.rate_bytes_per_s == headroom_bytes_per_s(topology, 0) / 2


def test_a_burst_is_a_millisecond_of_the_line_and_never_too_little_for_a_small_all_reduce() -> None:
    assert burst_bytes(lines(2, 2, rate_bytes_per_s=1e9), 3) == 500_000
    assert burst_bytes(lines(2, 2, rate_bytes_per_s=1e5), 3) == LEAST_BURST_BYTES == 4 * EXPRESS_BYTES
