"""How fast hosts run Python while the job opens, and what they cost in predictions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from detcoll.job.settings import Facts
from detcoll.plan.costs import Costs

ROUNDS = 16

STEPS = 300

USUAL_STEP_NS = 290
"""What a step of the loop below takes where `detcoll.plan.costs` took its costs: an idle core of an Intel Xeon."""

LARGEST_SLOWNESS = 4.0


class _Thing:
    __slots__ = ("first", "second")

    def __init__(self, first: int, second: int) -> None:
        self.first, self.second = first, second


def costs_of(facts: Sequence[Facts], slownesses: Sequence[float]) -> Costs:
    """Return the costs of the slowest host, which sets the pace of a call; the same on all ranks.

    ``slownesses`` : of each rank, see `slowness`; that of a host is the median of its ranks.
    """
    ranks_on: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        ranks_on.setdefault(fact.host, []).append(rank)
    hosts = []
    for ranks in ranks_on.values():
        cores = set[int]().union(*(facts[rank].cores for rank in ranks))
        hosts.append(Costs.on_host(len(ranks), len(cores), median(slownesses[rank] for rank in ranks)))
    return max(hosts, key=lambda costs: costs.call_ns)


def slowness(clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """Return how many times as long as usual Python takes here now, from 1 to `LARGEST_SLOWNESS`.

    Takes some 2 ms. All ranks measure at the same time, so that ranks whose cores are threads of one core slow each
    other down as they do in a collective: on a virtual machine of two such threads that is 1.6 times, and nothing else
    tells of it. The median of `ROUNDS` leaves out rounds in which another process had the core.
    """
    took_ns = []
    for _ in range(ROUNDS):
        begun_ns = clock()
        _work()
        took_ns.append(clock() - begun_ns)
    return min(max(median(took_ns) / (STEPS * USUAL_STEP_NS), 1.0), LARGEST_SLOWNESS)


def _work() -> None:
    """Do what progress is made of: small objects, dictionaries, attributes, integers."""
    things: dict[int, _Thing] = {}
    for number in range(STEPS):
        things[number & 31] = _Thing(number, number + 1)
        other = things.get(number * 7 & 31)
        if other is not None:
            other.second += other.first
