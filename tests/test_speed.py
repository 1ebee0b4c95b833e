"""How slow hosts are, as predictions take it."""

from __future__ import annotations

from itertools import cycle

import pytest

from detcoll.job.settings import Facts
from detcoll.job.speed import LARGEST_SLOWNESS, STEPS, USUAL_STEP_NS, costs_of, slowness
from detcoll.plan.costs import Costs


def test_the_slowest_host_sets_what_calls_cost() -> None:
    def fact(host: str) -> Facts:
        return Facts("0.1", "auto", "digest", False, "", "cubic", "", host, "clock", "", (0, 1))

    facts = [fact(host) for host in "aabbb"]
    assert costs_of(facts, [1.0, 1.0, 1.0, 1.0, 4.0]) == Costs.on_host(3, 2)  # one rank was disturbed
    assert costs_of(facts, [2.0, 2.0, 1.0, 1.0, 1.0]) == Costs.on_host(2, 2, 2.0)


@pytest.mark.parametrize(
    ("step_ns", "expected"),
    [(10, 1.0), (USUAL_STEP_NS, 1.0), (2 * USUAL_STEP_NS, 2.0), (10**6, LARGEST_SLOWNESS)],
)
def test_slowness_leaves_out_rounds_that_were_interrupted(step_ns: int, expected: float) -> None:
    now_ns = 0
    steps = cycle([0, STEPS * step_ns, 0, STEPS * step_ns, 0, 50 * STEPS * step_ns])  # a third of the rounds

    def clock() -> int:
        nonlocal now_ns
        now_ns += next(steps)
        return now_ns

    assert slowness(clock) == pytest.approx(expected)
