"""Scenarios: distances, TCP, the time of an iteration, files, and what a study makes of them."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import UsageError
from detcoll.plan import Slotting, check_calendar, floor_ns
from detcoll.scenarios import Scenario, changed, load, parse, shipped, study
from detcoll.scenarios.buckets import Buckets, Together, default_calendar, taken_together
from detcoll.scenarios.geography import great_circle_km, one_way_ns
from detcoll.scenarios.requirement import required_rate
from detcoll.scenarios.scenario import from_topology, with_rate
from detcoll.scenarios.study import DETERMINISTIC, ORDINARY, SINGLE, need
from detcoll.scenarios.tcp import CONTROLS, throughput_bytes_per_s
from detcoll.scenarios.tcp import Path as TcpPath
from detcoll.scenarios.workload import BucketTimes, Workload, iteration_ns
from detcoll.topology import Topology

S = 1_000_000_000
MS = 1_000_000

SMALL = """
ranks = 2
uplink = "10 Gbit/s"
reserved = "8 Gbit/s"
[model]
parameters = 100_000_000
[training]
compute = "1 s"
buckets = 10
[local]
bandwidth = "20 GB/s"
[ordinary]
cross_traffic = 0.5
[sensitivity]
reserved = ["2 Gbit/s", "20 Gbit/s"]
loss = [1e-4]
cross_traffic = [0.0]
[[site]]
name = "a"
latitude = 30.0
longitude = 110.0
[[site]]
name = "b"
latitude = 30.0
longitude = 115.0
[[site]]
name = "c"
latitude = 35.0
longitude = 110.0
"""


@pytest.fixture(scope="module")
def small() -> Scenario:
    return parse(SMALL, "small.toml")


# Where things are


def test_a_degree_of_latitude_is_a_degree() -> None:
    assert great_circle_km((0.0, 0.0), (1.0, 0.0)) == pytest.approx(111.195, abs=0.001)
    assert great_circle_km((60.0, 0.0), (60.0, 1.0)) == pytest.approx(111.195 / 2, abs=0.01)
    assert great_circle_km((0.0, 0.0), (0.0, 180.0)) == pytest.approx(20015.1, abs=0.1)


def test_known_cities_are_as_far_apart_as_atlases_say() -> None:
    beijing, shanghai = (39.908, 116.397), (31.222, 121.458)
    assert great_circle_km(beijing, shanghai) == pytest.approx(1067, abs=2)
    assert great_circle_km(shanghai, beijing) == great_circle_km(beijing, shanghai)


def test_fibre_takes_five_microseconds_a_kilometre() -> None:
    assert one_way_ns(1000, 1.0, 1.468) == pytest.approx(4_896_700, abs=100)
    assert one_way_ns(1000, 1.4, 1.468) == pytest.approx(1.4 * 4_896_700, abs=100)


# What TCP makes of loss


def path(loss: float, round_trip_s: float = 0.02, window_bytes: int = 2**40) -> TcpPath:
    return TcpPath(loss, round_trip_s, 1448, window_bytes, 0.2)


def test_models_say_what_their_papers_say() -> None:
    assert throughput_bytes_per_s("mathis", path(1e-4)) == pytest.approx(1448 / 0.02 * sqrt(1.5) / 1e-2)
    # RFC 9438 gives 1.054 (RTT / p)^(3/4) segments; at 0.1 s and 1e-6 that is 5,927.
    assert throughput_bytes_per_s("cubic", path(1e-6, 0.1)) == pytest.approx(1448 / 0.1 * 5927, rel=1e-3)
    # Padhye with p so small that timeouts do not count is Mathis with an acknowledgement for two segments.
    assert throughput_bytes_per_s("padhye", path(1e-9)) == pytest.approx(
        throughput_bytes_per_s("mathis", path(1e-9)) / sqrt(2), rel=1e-3
    )
    p, timeout_s = 0.05, 0.2
    full = 0.02 * sqrt(4 * p / 3) + timeout_s * 3 * sqrt(6 * p / 8) * p * (1 + 32 * p**2)
    assert throughput_bytes_per_s("padhye", path(p)) == pytest.approx(1448 / full)


def test_cubic_is_never_slower_than_reno() -> None:
    for loss in (1e-2, 1e-4, 1e-6, 1e-8):
        assert throughput_bytes_per_s("cubic", path(loss)) >= throughput_bytes_per_s("mathis", path(loss))


@settings(max_examples=50)
@given(control=st.sampled_from(sorted(CONTROLS)), loss=st.floats(1e-9, 0.3), more=st.floats(1.1, 3.0))
def test_loss_and_distance_never_help(control: str, loss: float, more: float) -> None:
    here = throughput_bytes_per_s(control, path(loss))
    assert throughput_bytes_per_s(control, path(loss * more)) < here
    assert throughput_bytes_per_s(control, path(loss, 0.02 * more)) < here


def test_the_window_is_a_cap() -> None:
    for control in CONTROLS:
        assert throughput_bytes_per_s(control, path(0.0, 0.02, 10**6)) == pytest.approx(5e7)
        assert throughput_bytes_per_s(control, path(1e-12, 0.02, 10**6)) == pytest.approx(5e7)


def test_other_models_and_losses_are_refused() -> None:
    with pytest.raises(UsageError, match="control='bbr' must be one of mathis, padhye, cubic"):
        throughput_bytes_per_s("bbr", path(0.1))
    with pytest.raises(UsageError, match=r"loss=1\.0 must be from 0 to below 1"):
        throughput_bytes_per_s("mathis", path(1.0))


# An iteration


WORK = Workload(1_000_000, "float32", S, backward=0.5, buckets=10)


def test_what_fits_beside_the_backward_pass_costs_its_last_bucket() -> None:
    assert iteration_ns(WORK, BucketTimes(30 * MS, 20 * MS)) == S + 30 * MS


def test_what_does_not_fit_is_exposed() -> None:
    # The first is ready at 550 ms and ends at 680; nine more follow, 100 ms each.
    assert iteration_ns(WORK, BucketTimes(130 * MS, 100 * MS)) == 680 * MS + 900 * MS


def test_without_overlap_all_of_it_is_exposed() -> None:
    none = replace(WORK, overlap=0.0)
    assert iteration_ns(none, BucketTimes(30 * MS, 20 * MS)) == S + 30 * MS + 9 * 20 * MS
    # Half of ten: five go beside the backward pass, five after it.
    half = replace(WORK, overlap=0.5)
    assert iteration_ns(half, BucketTimes(30 * MS, 20 * MS)) == S + 30 * MS + 4 * 20 * MS


def test_nothing_to_sum_is_nothing_to_wait_for() -> None:
    assert iteration_ns(WORK, BucketTimes(0, 0)) == S


@settings(max_examples=50)
@given(first=st.integers(0, S), interval=st.integers(0, S), backward=st.floats(0, 1), overlap=st.floats(0, 1))
def test_an_iteration_lies_between_its_parts_and_their_sum(
    first: int, interval: int, backward: float, overlap: float
) -> None:
    work = replace(WORK, backward=backward, overlap=overlap)
    times = BucketTimes(first, interval)
    takes = iteration_ns(work, times)
    assert takes >= max(S, times.all_ns(10)) - 1
    assert takes <= S + first + 10 * max(first, interval) + 1
    assert iteration_ns(work, BucketTimes(first, interval + MS)) >= takes - 1
    assert iteration_ns(replace(work, overlap=1.0), times) <= takes + 1


def test_workloads_are_checked() -> None:
    assert Workload(10, "bfloat16", 1, buckets=4).gradient_bytes == 20
    for change, message in (
        ({"parameters": 0}, "parameters=0 must be at least 1"),
        ({"overlap": 1.5}, r"overlap=1\.5 must be from 0 to 1"),
        ({"backward": -0.1}, r"backward=-0\.1 must be from 0 to 1"),
        ({"precision": "float8"}, "float8"),
        ({"buckets": 2_000_000}, "must not exceed parameters"),
        ({"buckets": 100_001, "parameters": 10**9}, "buckets=100001 must be at most 100000"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(WORK, **change)


@pytest.mark.parametrize("connections", [0, -1])
def test_a_network_without_connections_is_refused(small: Scenario, connections: int) -> None:
    with pytest.raises(UsageError, match=f"connections={connections} must be at least 1"):
        changed(small, connections=connections)


# Files


def test_a_file_becomes_lines_and_delays(small: Scenario) -> None:
    assert small.name == "small"
    assert [site.uplink_bytes_per_s for site in small.lines.sites] == [1.25e9] * 3
    assert [site.uplink_bytes_per_s for site in small.reserved.sites] == [1e9] * 3
    assert small.lines.size == 6
    assert small.longest_km == pytest.approx(720, abs=20)
    km = great_circle_km((30, 110), (30, 115))
    assert small.lines.one_way_ns(0, 1) == small.lines.one_way_ns(1, 0) == one_way_ns(km, 1.4, 1.468)
    assert small.work == Workload(100_000_000, "bfloat16", S, buckets=10)
    assert small.costs.copy_bytes_per_s == 2e10


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ranks = 2", "ranks = 2\ncolour = 1", "small: Object contains unknown field `colour`"),
        ("[model]", "[model]\nlayers = 3", r"unknown field `layers` - at `\$.model`"),
        ("latitude = 35.0", "latitude = 95.0", r"Expected `float` <= 90.0 - at `\$.site\[2\].latitude`"),
        ('compute = "1 s"', "", r"missing required field `compute` - at `\$.training`"),
        ('compute = "1 s"', 'compute = "1"', "compute='1' has no unit"),
        ('uplink = "10 Gbit/s"', 'uplink = "10"', "site 'a': uplink='10' has no unit"),
        ('reserved = "8 Gbit/s"', 'reserved = "11 Gbit/s"', "site 'a': reserved must not exceed uplink"),
        ('name = "b"', 'name = "a"', "two sites of one name"),
        ("cross_traffic = 0.5", 'control = "bbr"', "ordinary.control='bbr' must be one of mathis, padhye, cubic"),
        ("loss = [1e-4]", "loss = [1.5]", r"sensitivity.loss=1\.5 must be from 0"),
        ("buckets = 10", "buckets = 0", r"Expected `int` >= 1 - at `\$.training.buckets`"),
        ("ranks = 2", "ranks = ", "small is not TOML"),
    ],
)
def test_bad_files_are_refused(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(UsageError, match=message):
        parse(SMALL.replace(old, new, 1), "small")


def test_sites_may_differ(tmp_path: Path) -> None:
    own = 'name = "a"\nranks = 5\nuplink = "40 Gbit/s"\nreserved = "1 Gbit/s"'
    (tmp_path / "x.toml").write_text(SMALL.replace('name = "a"', own))
    scenario = load(str(tmp_path / "x.toml"))
    assert [len(site.ranks) for site in scenario.lines.sites] == [5, 2, 2]
    assert scenario.lines.sites[0].uplink_bytes_per_s == 5e9
    assert scenario.reserved.sites[0].uplink_bytes_per_s == 1.25e8


def test_what_is_no_scenario_is_named() -> None:
    with pytest.raises(UsageError, match=r"scenario='nowhere' is neither a file .* forty-cities, two-cities"):
        load("nowhere")


def test_shipped_scenarios_are_what_they_say() -> None:
    assert shipped() == ("forty-cities", "two-cities")
    forty = load("forty-cities")
    assert len(forty.lines.sites) == 40
    assert forty.lines.size == 320
    assert 2000 <= forty.longest_km <= 2100
    assert 200e9 <= forty.work.parameters < 1000e9
    for name in shipped():
        assert load(name).description


def test_what_is_changed_is_changed_and_no_more(small: Scenario) -> None:
    other = changed(small, reserved_bytes_per_s=5e8, loss=0.01, overlap=0.5)
    assert other.reserved == with_rate(small.reserved, 5e8)
    assert (other.lines, other.ordinary.loss, other.work.overlap) == (small.lines, 0.01, 0.5)
    assert changed(small) == small
    assert changed(small, line_bytes_per_s=5e8).reserved == with_rate(small.reserved, 5e8)
    with pytest.raises(UsageError, match="must not exceed the line"):
        changed(small, reserved_bytes_per_s=1e10)
    with pytest.raises(UsageError, match="cross_traffic=1 must be"):
        changed(small, cross_traffic=1)


# Networks


def test_the_ordinary_network_shares_what_is_left(small: Scenario) -> None:
    calendar = small.ordinary.calendar(small.lines)
    assert calendar.mode is Slotting.SHARE
    # Half of the line is taken; two other sites, two flows to each.
    assert calendar.rate_bytes_per_s(0, 1) == pytest.approx(0.5 * 1.25e9 * small.lines.payload_share / 4)
    check_calendar(calendar, small.lines)
    lossy = replace(small.ordinary, loss=1e-3, connections=3)
    round_trip_s = 2 * small.lines.one_way_ns(0, 1) / 1e9
    one = throughput_bytes_per_s("cubic", TcpPath(1e-3, round_trip_s, 1448, 2**26, 0.2))
    assert lossy.calendar(small.lines).rate_bytes_per_s(0, 1) == pytest.approx(3 * one)
    check_calendar(lossy.calendar(small.lines), small.lines)


def test_two_buckets_are_enough_to_know_many(small: Scenario) -> None:
    buckets = Buckets(small.work, small.reserved, small.costs)
    calendar = default_calendar(small.reserved)
    local = buckets.in_one_cluster()
    together = Together(small.work, small.reserved, small.costs, local)
    topology = taken_together(small.reserved)
    alone = together.alone(topology, default_calendar(topology))
    times = buckets.across_sites(small.reserved, calendar, alone.interval_ns)
    for number in (3, 5):
        ends_ns = buckets.end_ns(number, small.reserved, calendar)
        assert times.all_ns(number) == pytest.approx(ends_ns, rel=0.01)
    # What is inside a site overlaps in part with what is not.
    assert alone.first_ns < times.first_ns < together.about(topology, default_calendar(topology)).first_ns
    floor = floor_ns(small.reserved, "all_reduce", small.work.bucket().nbytes)
    assert floor is not None
    assert times.first_ns > floor


def test_a_study_ranks_the_networks_as_they_are(small: Scenario) -> None:
    told: list[tuple[str, float]] = []
    result = study(small, 0.95, say=lambda what, share: told.append((what, share)))
    single, deterministic, ordinary = result.runs
    assert (single.setting, deterministic.setting, ordinary.setting) == (SINGLE, DETERMINISTIC, ORDINARY)
    assert single.efficiency == 1.0
    assert single.iteration_s < deterministic.iteration_s < ordinary.iteration_s
    assert (single.line_bit_per_s, deterministic.line_bit_per_s, ordinary.line_bit_per_s) == (None, 8e9, 1e10)
    for run in (deterministic, ordinary):
        assert run.efficiency == pytest.approx(single.iteration_s / run.iteration_s)
        assert run.exposed_s == pytest.approx(run.iteration_s - 1)
    points = {(point.changed, point.value): point for point in result.sensitivity}
    slow, fast = points["reserved_bit_per_s", 2e9], points["reserved_bit_per_s", 2e10]
    assert slow.efficiency < deterministic.efficiency < fast.efficiency
    assert points["loss", 1e-4].efficiency < ordinary.efficiency < points["cross_traffic", 0.0].efficiency
    assert abs(result.together_error) < 0.03
    given, micro, none = result.needed
    assert given.target == 0.95
    assert given.line_bit_per_s is not None
    assert none.line_bit_per_s is not None
    assert given.line_bit_per_s < none.line_bit_per_s
    assert micro.ordinary_efficiency is not None
    assert micro.ordinary_efficiency < micro.efficiency
    assert told[-1] == ("what 95% needs", 1.0)


def test_the_line_that_is_asked_for_gives_what_was_asked(small: Scenario) -> None:
    answer = need(small, 0.97)
    assert answer.line_bit_per_s is not None
    assert 0.97 <= answer.efficiency < 0.9705
    lines = with_rate(small.lines, answer.line_bit_per_s / 8)
    result = study(replace(small, lines=lines, reserved=lines), variants=False)
    assert result.needed == result.sensitivity == ()
    assert result.runs[1].efficiency == pytest.approx(0.97, abs=0.01)
    slower = with_rate(small.lines, answer.line_bit_per_s / 8 / 1.05)
    assert study(replace(small, lines=slower, reserved=slower), variants=False).runs[1].efficiency < 0.97


def test_an_efficiency_beyond_reach_is_said_to_be() -> None:
    far = from_topology(Topology.uniform(2, 1, 1e9, 5 * S), Workload(10**6, "float32", S, buckets=1), "far")
    answer = need(far, 0.9)
    assert answer.line_bit_per_s is None
    assert answer.efficiency == pytest.approx(1 / 6, rel=0.02)
    with pytest.raises(UsageError, match=r"efficiency=1\.2 must be above 0"):
        need(far, 1.2)


@pytest.mark.parametrize("efficiency", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("plateau_ns", [0, 40 * MS])
def test_required_rates_are_the_least(efficiency: float, plateau_ns: int) -> None:
    work = replace(WORK, overlap=0.0)

    def times(rate: float) -> BucketTimes:
        return BucketTimes(10 * MS + 1e15 / rate, max(1e15 / rate, plateau_ns))

    baseline_ns = iteration_ns(work, BucketTimes(MS, plateau_ns))
    answer = required_rate(work, baseline_ns, efficiency, times, 1e5)
    assert answer.rate_bytes_per_s is not None
    assert answer.reached >= efficiency
    assert baseline_ns / iteration_ns(work, times(answer.rate_bytes_per_s / 1.01)) < efficiency


def test_windows_far_apart_carry_no_more_than_they_are_open(small: Scenario) -> None:
    pytest.importorskip("ortools")
    shared = study(small, variants=False).runs[1]
    windowed = study(small, mode=Slotting.CALENDAR, variants=False).runs[1]
    assert windowed.interval_s >= shared.interval_s


def test_slow_lines_take_as_long_as_they_take(small: Scenario) -> None:
    slow = study(changed(small, line_bytes_per_s=1e3), variants=False).runs[1]
    assert slow.iteration_s == pytest.approx(2 * 2 / 3 * 2e8 / (1e3 * small.lines.payload_share * 0.99), rel=0.02)


def test_a_topology_without_lines_is_no_scenario() -> None:
    with pytest.raises(UsageError, match="no lines between sites"):
        from_topology(Topology.single_site(4), WORK, "x")
