"""Sites whose lines are much slower than those of others are homes of no chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from detcoll.plan import (
    Collective,
    Kind,
    Planner,
    Slotting,
    algorithms_for,
    build_calendar,
    check,
    compile_plan,
    predict_ns,
)
from detcoll.plan.collectives import declaration_of
from detcoll.plan.homes import home_sites
from detcoll.plan.layout import ChunkSize
from detcoll.plan.planner import predicted_chunk
from detcoll.sim import simulate
from detcoll.testing.plans import all_parts
from detcoll.topology import Topology

DIRECT = declaration_of("all_reduce").algorithm("direct")


def sites_with(*rates_mbit_per_s: float, ranks: int = 1) -> Topology:
    even = Topology.uniform(len(rates_mbit_per_s), ranks, 1.25e8, 10_000_000)
    sites = zip(even.sites, rates_mbit_per_s, strict=True)
    return replace(even, sites=tuple(replace(site, uplink_bytes_per_s=rate * 1.25e5) for site, rate in sites))


def homes_of(topology: Topology, mode: Slotting = Slotting.SHARE) -> tuple[int, ...]:
    sites = len(topology.sites)
    return home_sites(DIRECT.hops(sites, 0), build_calendar(topology, mode), sites)


@pytest.mark.parametrize(
    ("rates", "homes"),
    [
        ((1000, 500, 200), (0, 1)),
        ((200, 1000, 500), (1, 2)),
        ((1000, 1000, 1000, 100), (0, 1, 2)),
        ((1000, 1000, 1000), ()),
        ((1000, 900, 800), ()),
        ((1000, 200, 200), ()),
        ((1000, 200), ()),
    ],
)
def test_slow_sites_are_no_homes_where_that_helps(rates: tuple[float, ...], homes: tuple[int, ...]) -> None:
    assert homes_of(sites_with(*rates)) == homes


def test_all_sites_are_homes_where_windows_were_made_for_it() -> None:
    assert homes_of(sites_with(1000, 500, 200), Slotting.CALENDAR) == ()


def test_only_what_is_folded_at_home_has_homes() -> None:
    topology = sites_with(1000, 500, 200)
    exchange = declaration_of("all_reduce").algorithm("exchange")
    assert home_sites(exchange.hops(3, 0), build_calendar(topology, Slotting.SHARE), 3) == ()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("nbytes", [2**22])
def test_the_slowest_line_is_busy_nearly_all_the_time(ranks: int, nbytes: int) -> None:
    topology = sites_with(1000, 500, 200, ranks=ranks)
    calendar = build_calendar(topology, Slotting.SHARE)
    collective = Collective("all_reduce", nbytes // 4, 4, 4)
    planner = Planner(topology, 0, calendar)
    plans = [Planner(topology, rank, calendar).plan(collective) for rank in range(topology.size)]
    took_ns = simulate(plans, topology, calendar).slowest_ns
    floor_ns = planner.floor_ns(collective)
    assert floor_ns is not None
    assert took_ns < floor_ns / 0.85, "with all sites as homes it is a third more than the floor"
    assert planner.predict_ns(collective) == pytest.approx(took_ns, rel=0.01)


@pytest.mark.parametrize("nbytes", [2**16, 2**18, 2**19, 2**20, 2**22])
@pytest.mark.parametrize("rates", [(1000, 500, 200), (1000, 1000, 700, 300), (1000, 500, 500, 200, 200)])
def test_few_chunks_have_all_sites_as_homes_where_that_is_faster(rates: tuple[float, ...], nbytes: int) -> None:
    topology = sites_with(*rates)
    calendar = build_calendar(topology, Slotting.SHARE)
    collective = Collective("all_reduce", nbytes // 4, 4, 4)
    taken = predicted_chunk(collective, topology, calendar, "direct")
    all_ns = predict_ns(collective, topology, calendar, "direct", replace(taken, homes=()))
    assert predict_ns(collective, topology, calendar, "direct", taken) <= all_ns


@pytest.mark.parametrize("homes", [(0, 1), (2,), (1, 2), ()])
@pytest.mark.parametrize("algorithm", algorithms_for("all_reduce"))
def test_plans_with_any_homes_are_right(algorithm: str, homes: tuple[int, ...]) -> None:
    topology = sites_with(1000, 500, 200, ranks=2)
    collective = Collective("all_reduce", 333, 4, 4)
    size = ChunkSize(20, 3, homes=homes)
    check(all_parts(collective, topology, algorithm, size), topology, build_calendar(topology, Slotting.SHARE))


def test_a_site_that_is_no_home_sends_its_array_once() -> None:
    topology = sites_with(1000, 500, 200)
    collective = Collective("all_reduce", 90, 4, 4)
    of_some = compile_plan(collective, topology, 2, "direct", ChunkSize(10, 3, homes=(0, 1)))
    sent = of_some.steps[of_some.steps["kind"] == Kind.SEND]
    assert set(sent["peer"].tolist()) == {0, 1}
    assert len(sent) == 9, "each chunk leaves once, and no result"
