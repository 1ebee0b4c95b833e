from __future__ import annotations

import pytest

from detcoll.plan import Collective, Planner, algorithms_for, build_calendar, floor_ns
from detcoll.signature import DECLARED
from detcoll.testing.plans import sites_of
from detcoll.topology import Link, Site, Topology

G = (1500 - 52) / 1500


def test_all_reduce_of_equal_sites() -> None:
    two = Topology.uniform(2, 4, 125e6, 10_000_000)
    assert floor_ns(two, "all_reduce", 10**6) == pytest.approx(1e6 / 125e6 / G * 1e9 + 10_000_000)
    four = Topology.uniform(4, 1, 125e6, 10_000_000)
    assert floor_ns(four, "all_reduce", 10**6) == pytest.approx(6 / 4 * 1e6 / 125e6 / G * 1e9 + 10_000_000)


def test_the_slowest_uplink_or_all_together_set_the_floor() -> None:
    def topology(slow: float) -> Topology:
        sites = tuple(Site(f"s{i}", (i,), rate, rate) for i, rate in enumerate((100e6, 100e6, slow)))
        links = (((0, 1), Link(1_000_000)), ((0, 2), Link(4_000_000)), ((1, 2), Link(2_000_000)))
        return Topology(sites, links)

    slow = floor_ns(topology(10e6), "all_reduce", 10**6)
    assert slow == pytest.approx(1e6 / 10e6 / G * 1e9 + 4_000_000)
    even = floor_ns(topology(100e6), "all_reduce", 10**6)
    assert even == pytest.approx(4 * 1e6 / 300e6 / G * 1e9 + 4_000_000)


def test_broadcast_leaves_its_root_once() -> None:
    sites = tuple(Site(f"s{i}", (2 * i, 2 * i + 1), rate, rate) for i, rate in enumerate((100e6, 50e6, 100e6)))
    links = (((0, 1), Link(1_000_000)), ((0, 2), Link(9_000_000)), ((1, 2), Link(2_000_000, asymmetry_ns=-400_000)))
    topology = Topology(sites, links)
    assert floor_ns(topology, "broadcast", 10**6, root=3) == pytest.approx(1e6 / 50e6 / G * 1e9 + 1_800_000)
    # All of it enters the slowest site too.
    assert floor_ns(topology, "broadcast", 10**6, root=0) == pytest.approx(1e6 / 50e6 / G * 1e9 + 1_000_000)
    assert floor_ns(topology, "broadcast", 10**4, root=0) == pytest.approx(1e4 / 100e6 / G * 1e9 + 9_000_000)


@pytest.mark.parametrize(
    ("kind", "uplink_share", "delays_ms"),
    [
        ("reduce", 1, 7), ("all_gather", 3 / 4, 7), ("reduce_scatter", 3 / 4, 7), ("gather", 3 / 4, 7),
        ("scatter", 3 / 4, 7), ("all_to_all", 3 / 4, 7),
    ],
)  # fmt: skip
def test_blocks_leave_and_enter_sites_once(kind: str, uplink_share: float, delays_ms: int) -> None:
    topology = Topology.uniform(4, 1, 100e6, delays_ms * 1_000_000)
    expected = uplink_share * 4e6 / 100e6 / G * 1e9 + delays_ms * 1e6
    assert floor_ns(topology, kind, 4 * 10**6, root=2) == pytest.approx(expected)


def test_asymmetry_counts() -> None:
    sites = tuple(Site(f"s{i}", (i,), 1e8, 1e8) for i in range(2))
    topology = Topology(sites, (((0, 1), Link(5_000_000, asymmetry_ns=2_000_000)),))
    assert floor_ns(topology, "barrier", 4) == 6_000_000


def test_no_line_has_no_floor() -> None:
    assert floor_ns(Topology.single_site(4), "all_reduce", 10**6) is None
    assert floor_ns(Topology.uniform(2, 2, 1e8, 10**6).as_single_cluster(), "all_reduce", 10**6) is None


@pytest.mark.parametrize("ranks", [[1, 1], [2, 2], [3, 1], [2, 2, 2], [1, 2, 3, 1]])
@pytest.mark.parametrize("count", [1, 10_000, 1_000_000])
def test_no_prediction_beats_the_floor(ranks: list[int], count: int) -> None:
    topology = sites_of(ranks)
    planner = Planner(topology, 0, build_calendar(topology))
    for kind in DECLARED:
        for algorithm in algorithms_for(kind):
            collective = Collective(kind, count // topology.size * topology.size or topology.size, 4, 4)
            floor = planner.floor_ns(collective)
            assert floor is not None
            assert planner.predict_ns(collective, algorithm) > floor, (kind, algorithm)
