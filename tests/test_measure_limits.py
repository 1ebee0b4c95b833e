"""What of the lab limited a row: the router, the processors, the baseline. Each is played with figures of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from detcoll.draw import html_text
from detcoll.measure.limits import (
    Scale,
    doubts,
    limit_word,
    limits_of_row,
    limits_of_run,
    scale_of,
    with_doubts,
)
from detcoll.measure.load import Load, Readings, Watch, load_of, parse_processors, parse_wanted_s
from detcoll.measure.quota import find_quota
from detcoll.measure.results import (
    BENCH_SCHEMA,
    MEASURE_SCHEMA,
    SINGLE_CLUSTER,
    BenchResult,
    Limit,
    LimitKind,
    Measurement,
    Row,
    Run,
)
from detcoll.measure.statistics import Summary
from detcoll.measure.tables import bench_table, measurement_table, network_costs, slot_gains
from detcoll.report import report
from detcoll.report.cells import remarks
from detcoll.report.inputs import ReportInputs
from detcoll.report.reported import ReportedResult
from detcoll.report.rows import row_headline, row_tiles
from detcoll.report.runs import run_headline, run_tiles
from detcoll.topology import Topology

MS, SECOND = 10**6, 10**9
QUIET = Load(cores=8, processors_share=0.4, router_share=0.2, router_full_share=0.0, router_late_s=1e-4, others_share=0)
EIGHT = scale_of(Topology.uniform(8, 1, 250e6 / 8, 10 * MS))
DIGITS = scale_of(Topology.uniform(2, 2, 125e6, 10 * MS))


def run(name: str = "slotted", efficiency: float = 0.8, wide: bool = True, **changes: object) -> Run:
    times = Summary(0.1, 0.09, 0.11, (0.1,))
    one = Run(name, name, *(() if wide else (SINGLE_CLUSTER,)), iteration_s=times, efficiency=efficiency, limits=())
    return replace(one, **changes)  # type: ignore[arg-type]


CLUSTER = run("single cluster", 1.0, wide=False, load=replace(QUIET, router_share=None), round_s=(0.1, 0.11))


def test_idle_time_is_read_of_our_cores_alone() -> None:
    text = (
        "cpu  400 0 0 9 0 0 0 0 0 0\ncpu0 100 2 30 700 10 1 2 5 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\n"
        "cpu2 10 0 0 100 0 0 0 0 0 0\nintr 5 6\n"
    )
    assert parse_processors(text, frozenset({0, 2}), 0.01) == pytest.approx((8.10, 1.47))
    assert parse_processors(text, frozenset({0, 7}), 0.01) is None
    assert parse_processors("", frozenset(), 0.01) is None
    assert parse_wanted_s("1500000000 500000000 77\n") == 2.0


def test_load_counts_within_the_measured_time() -> None:
    """Two cores: idle for 1 s of 2, then busy; a router that has no time in the third second alone."""
    seen = Readings(
        2, tuple(at * SECOND for at in range(5, 10)), (7.0, 8.0, 8.0, 8.0, 10.0), (0.0, 0.2, 0.3, 1.25, 1.25), 0.8, 2e-3
    )
    whole = load_of([seen], [None])
    assert (whole.cores, whole.router_late_s) == (2, 2e-3)
    assert whole.processors_share == pytest.approx(1 - 3 / 8)
    assert whole.router_share == pytest.approx(1.25 / 4)
    assert whole.router_full_share == pytest.approx(1 / 4)
    assert whole.others_share == pytest.approx(0.8 / 8)
    middle = load_of([seen], [[(6 * SECOND, 7 * SECOND), (7 * SECOND, 7 * SECOND + SECOND // 2)]])
    assert middle.processors_share == 1.0
    assert middle.router_share == pytest.approx((0.1 + 0.475) / 1.5)
    assert middle.router_full_share == pytest.approx(1 / 3)
    twice = load_of([seen, seen], [None, [(6 * SECOND, 8 * SECOND)]])
    assert twice.processors_share == pytest.approx(1 - 3 / 12)
    outside = load_of([seen], [[(0, SECOND)]])
    assert (outside.processors_share, outside.router_full_share) == (None, None)


def test_what_the_system_does_not_tell_is_not_known() -> None:
    nothing = load_of([Readings(2, (), (), ())], [None])
    assert nothing == Load(2)
    assert limits_of_row(0.3, nothing, EIGHT) is None, "nobody knows"
    alone = load_of([Readings(2, (0, SECOND), (0.0, 2.0), (0.0, 0.0))], [None])
    assert (alone.router_share, alone.others_share, alone.processors_share) == (None, None, 0.0)


def test_a_watch_reads_what_is_there() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("needs /proc/stat of Linux")
    with Watch() as watch:
        watch.router_pid = os.getpid()
        watch.router_late_s = 1e-3
    seen = watch.readings()
    assert len(seen.at_ns) == len(seen.idle_s) == len(seen.router_s) >= 1
    assert seen.cores == len(os.sched_getaffinity(0))
    assert seen.router_s[-1] > 0
    assert seen.router_late_s == 1e-3
    assert seen.others_s is not None


def test_a_quota_is_read_in_both_forms(tmp_path: Path) -> None:
    """Of a group inside another one; a container may see its own as the root, and its path from outside."""

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert find_quota(tmp_path) is None
    write("proc/self/cgroup", "0::/outer/inner\n")
    write("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n")
    assert find_quota(tmp_path) is None
    write("sys/fs/cgroup/outer/cpu.max", "150000 50000\n")
    write("sys/fs/cgroup/outer/cpu.stat", "usage_usec 7\nnr_periods 90\nnr_throttled 12\nthrottled_usec 9\n")
    quota = find_quota(tmp_path)
    assert quota is not None
    assert (quota.cores, quota.period_s) == (3.0, 0.05)
    assert quota.stopped_s() == pytest.approx(0.6)
    write("proc/self/cgroup", "4:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n0::/\n")
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "50000\n")
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    quota = find_quota(tmp_path)
    assert quota is not None
    assert (quota.cores, quota.stopped_s()) == (0.5, 0.0)
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert find_quota(tmp_path) is None


def test_a_quota_that_runs_out_limits_a_row_though_cores_are_idle() -> None:
    idle = tuple(15.0 * at for at in range(5))
    seen = Readings(
        16, tuple(at * SECOND for at in range(5)), idle, (0.0,) * 5, 0.0, None, (3.0, 3.0, 3.9, 4.9, 4.9), 1.0
    )
    load = load_of([seen], [[(SECOND, 3 * SECOND)]])
    assert load.processors_share == pytest.approx(1 / 16)
    assert (load.quota_cores, load.whole_cores) == (1.0, 1)
    assert load.quota_out_share == pytest.approx(0.95)
    [limit] = limits_of_row(0.5, load, DIGITS) or ()
    assert limit.by is LimitKind.PROCESSORS
    assert limit.why == "a container's quota of 1 core ran out in 95% of the measured time with 4 ranks"
    assert limit.fits == "lines of 200 Mbit/s, or 5 cores"
    [both] = limits_of_row(0.5, replace(load, processors_share=0.95, others_share=0.4), DIGITS) or ()
    assert both.why == f"16 cores were 95% busy, 40% with programs other than 4 ranks; {limit.why}"
    across = replace(load, quota_out_share=0.05)
    [crowded] = limits_of_run(across, load, DIGITS, computes=True)
    assert crowded.why == (
        "4 ranks compute on a container's quota of 1 core, which ran out in 95% of the time in one cluster"
    )
    assert limits_of_row(0.5, across, DIGITS) == ()
    assert limits_of_row(0.5, replace(load, quota_cores=2.5, quota_out_share=0.2), DIGITS)[0].why.startswith(  # type: ignore[index]
        "a container's quota of 2.5 cores ran out in 20%"
    )


def test_a_router_without_time_limits_a_row() -> None:
    busy = replace(QUIET, router_share=1.0, router_full_share=0.95)
    [limit] = limits_of_row(0.34, busy, EIGHT)
    assert limit.by is LimitKind.ROUTER
    assert "no time left in 95%" in limit.why
    assert limit.fits == "lines of 22 Mbit/s or 3 sites"
    assert limits_of_row(0.34, replace(busy, router_full_share=0.1), EIGHT) == ()
    assert limits_of_row(0.93, busy, EIGHT) == (), "the lines were the limit"
    assert limits_of_row(None, busy, EIGHT)[0].by is LimitKind.ROUTER, "a barrier has no floor"


def test_what_fits_the_router_is_in_its_units() -> None:
    """At 1 ms of pace a unit, fewer bytes are fewer units only up to two segments a millisecond and flow."""
    assert EIGHT.units_per_s == pytest.approx(8 * 7 * 1000, rel=0.01)
    assert replace(EIGHT, rate_bytes_per_s=EIGHT.rate_bytes_per_s * 0.9).units_per_s == pytest.approx(56_000, rel=0.01)
    assert replace(EIGHT, rate_bytes_per_s=10e6 / 8).units_per_s < 4_000
    assert replace(DIGITS, rate_bytes_per_s=8 * 125e6).units_per_s > 8 * DIGITS.units_per_s / 1.1


def test_a_late_router_limits_a_row() -> None:
    [limit] = limits_of_row(0.5, replace(QUIET, router_late_s=3e-3), EIGHT)
    assert (limit.by, limit.why) == (LimitKind.ROUTER, "the router was 3 ms late in the mean, 30% of the one-way delay")
    assert limits_of_row(0.5, replace(QUIET, router_late_s=1e-3), EIGHT) == ()


def test_busy_processors_limit_a_row() -> None:
    busy = replace(QUIET, cores=2, processors_share=0.97)
    [limit] = limits_of_row(0.5, busy, DIGITS)
    assert limit.by is LimitKind.PROCESSORS
    assert limit.why == "2 cores were 97% busy with 4 ranks and the router"
    assert limit.fits == "lines of 200 Mbit/s or 1 rank a site, or 5 cores"
    [others] = limits_of_row(0.5, replace(busy, others_share=0.3), DIGITS)
    assert others.why.endswith("97% busy, 30% with programs other than 4 ranks and the router")
    assert others.fits == f"a quiet machine, and {limit.fits}"
    [enough] = limits_of_row(0.5, replace(busy, cores=4, others_share=0.3), DIGITS)
    assert enough.fits == "a quiet machine"
    assert limits_of_row(0.5, replace(busy, processors_share=0.89), DIGITS) == ()
    assert [one.by for one in limits_of_row(0.5, replace(busy, router_full_share=0.5), DIGITS)] == [
        LimitKind.ROUTER, LimitKind.PROCESSORS,
    ]  # fmt: skip


def test_ranks_that_compute_on_too_few_cores_limit_training() -> None:
    """Although the run across sites is not busy all the time: it waits for its lines in between."""
    single = Load(cores=2, processors_share=0.99, others_share=0.0)
    across = replace(QUIET, cores=2, processors_share=0.7)
    [own] = limits_of_run(single, None, DIGITS, computes=True)
    [limit] = limits_of_run(across, single, DIGITS, computes=True)
    assert limit.by is own.by is LimitKind.PROCESSORS
    assert limit.why == "4 ranks compute on 2 cores, 99% busy in one cluster"
    assert limit.fits == own.fits == "1 rank a site, or 5 cores, or a workload that waits instead of computing"
    two = replace(DIGITS, ranks_per_site=1)
    assert limits_of_run(single, None, two, computes=True) == ()
    assert limits_of_run(across, single, two, computes=True) == ()
    [full] = limits_of_run(replace(across, processors_share=0.95), single, two, computes=True)
    assert full.fits == "3 cores, or a workload that waits instead of computing"
    assert limits_of_run(across, replace(single, processors_share=0.2), DIGITS, computes=False) == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"arithmetic_ratio": 1.026}, "2.6 % above its own arithmetic"),
        ({"iteration_s": Summary(0.1, 0.1, 0.25, (0.1,))}, "its p99 is 2.5 times its median"),
        ({"round_s": (0.1, 0.24)}, "its median was 100 ms in one round and 240 ms in another"),
        ({"load": replace(QUIET, others_share=0.43)}, "other programs took 43% of the processors beside it"),
    ],
)
def test_a_disturbed_baseline_is_in_doubt(changes: dict[str, object], told: str | None) -> None:
    runs = [replace(CLUSTER, **changes), run(load=QUIET)]  # type: ignore[arg-type]
    found = doubts(runs)
    assert found == [] if told is None else told in found[0]
    marked = with_doubts(runs)
    assert marked[0] == runs[0]
    assert [limit.by for limit in marked[1].limits or ()] == ([] if told is None else [LimitKind.BASELINE])


def test_other_load_and_runs_that_are_too_fast_are_doubts() -> None:
    assert doubts([CLUSTER, run(load=replace(QUIET, others_share=0.2))]) == [
        "other programs took 0% of the processors beside it and 20% beside slotted"
    ]
    assert doubts([CLUSTER, run(efficiency=1.67), run("gloo", 1.004)]) == [
        "slower than slotted (167%), though lines make nothing faster"
    ]
    assert doubts([run(efficiency=2.0)]) == []


LIMITED = (Limit(LimitKind.ROUTER, "the router had no time left in 95% of the measured time", "4 sites"),)
ROW = Row("all_reduce", "slotted", bytes=2**22, median_s=0.5, bound_s=0.4, fraction_of_bound=0.8, limits=())


def _printed(result: Measurement | BenchResult) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(bench_table(result) if isinstance(result, BenchResult) else measurement_table(result))
    return captured.get()


def test_each_row_tells_its_limit_before_any_figure() -> None:
    rows = (replace(ROW, fraction_of_bound=None, limits=LIMITED), replace(ROW, fraction_of_bound=0.97), ROW)
    shown = _printed(BenchResult(BENCH_SCHEMA, {}, rows))
    wanted = (
        "limited by the lab's router: all_reduce of 4 MiB. The router had no time left in 95% of the measured time. "
        "What would fit: 4 sites"
    )
    assert shown.startswith(wanted)
    assert [limit_word(row.limits, row.fraction_of_bound) for row in rows] == ["router", "lines", "transport"]
    assert [line.split()[-1] for line in shown.splitlines() if "500 ms" in line] == ["router", "lines", "transport"]
    assert limit_word((), None) == "lines or transport", "without a floor they are not told apart"
    assert "limit" not in _printed(BenchResult(BENCH_SCHEMA, {}, (replace(ROW, limits=None),)))


def test_a_measurement_tells_doubts_and_limits_first_and_keeps_the_efficiency() -> None:
    runs = with_doubts([replace(CLUSTER, round_s=(0.1, 0.24)), run(limits=LIMITED)])
    shown = _printed(Measurement(MEASURE_SCHEMA, {}, {}, runs, (), None))
    first, second, *_ = shown.splitlines()
    assert first.startswith(
        "the single cluster, which all are compared with, is in doubt: its median was 100 ms in one round and 240 ms"
    )
    assert second.startswith("limited by the lab's router: slotted. The router had no time left")
    assert "router, baseline" in shown
    assert "80.0%" in shown


def test_what_slots_add_is_told_where_nothing_else_was_the_limit() -> None:
    plain = run("same plans, plain TCP", transport="tcp", iteration_s=Summary(0.125, 0.1, 0.13, (0.125,)))
    slotted = run(transport="slotted")
    told = "what slots change: an iteration takes 0.80 times as long as with the same plans over plain TCP"
    assert slot_gains([CLUSTER, slotted, plain]) == [told]
    busy = replace(slotted, cross_traffic=1.0)
    both = slot_gains([CLUSTER, slotted, plain, busy, replace(plain, cross_traffic=1.0)])
    assert both == [told, f"{told}, best-effort, others 100%"]
    assert told in _printed(Measurement(MEASURE_SCHEMA, {}, {}, (CLUSTER, slotted, plain), (), None))
    assert told in remarks(_measured(CLUSTER, slotted, plain))
    assert slot_gains([CLUSTER, slotted]) == slot_gains([CLUSTER, replace(slotted, limits=LIMITED), plain]) == []
    assert slot_gains([CLUSTER, replace(slotted, without="overlap"), plain]) == []
    doubtful = with_doubts([replace(CLUSTER, round_s=(0.1, 0.24)), replace(slotted, limits=None), plain])
    assert [run.limits is None or len(run.limits) for run in doubtful] == [0, 1, 1]
    assert slot_gains(doubtful) == [told], "nothing is compared with the single cluster"
    assert slot_gains([CLUSTER, slotted, replace(doubtful[2], limits=(*(doubtful[2].limits or ()), *LIMITED))]) == []


def test_what_each_network_costs_an_iteration_is_told() -> None:
    slotted = run(iteration_s=Summary(0.125, 0.1, 0.13, (0.125,)))
    told = (
        "an iteration takes 100 ms in one cluster and 125 ms across sites: the lines cost it 25 ms, 20.0% of its time"
    )
    assert network_costs([CLUSTER, slotted, replace(slotted, transport="tcp")]) == [told]
    assert told in _printed(Measurement(MEASURE_SCHEMA, {}, {}, (CLUSTER, slotted), (), None))
    assert told in remarks(_measured(CLUSTER, slotted))
    busy = replace(slotted, service="deterministic", cross_traffic=1.0, limits=LIMITED)
    assert network_costs([CLUSTER, busy]) == [
        "an iteration takes 100 ms in one cluster and 125 ms across sites, deterministic, others 100%: the lines cost "
        "it 25 ms, 20.0% of its time (limited by the lab's router)"
    ]
    [quick] = network_costs([CLUSTER, replace(slotted, iteration_s=Summary(0.09, 0.09, 0.09, (0.09,)))])
    assert quick.endswith("the lines cost it nothing")
    near = replace(CLUSTER, sync_s=Summary(0.001, 0.001, 0.001, (0.001,)))
    for sync_s, cost in (
        (0.014, "the lines cost it 25 ms, 20.0% of its time"),
        (0.011, "25 ms more, 20.0% of its time; 10 ms of that is waiting for the lines, the rest computing"),
        (0.0005, "25 ms more, 20.0% of its time; none of that is waiting for the lines, the rest computing"),
    ):
        [cost_told] = network_costs([near, replace(slotted, sync_s=Summary(sync_s, sync_s, sync_s, (sync_s,)))])
        assert cost_told.endswith(f"across sites: {cost}")
    assert network_costs([CLUSTER, replace(slotted, without="overlap")]) == network_costs([slotted]) == []


def _measured(*runs: Run) -> ReportedResult:
    return ReportedResult(MEASURE_SCHEMA, workload={"sites": 2}, runs=runs)


def test_a_doubtful_or_limited_run_is_no_headline() -> None:
    def title(*runs: Run) -> str | None:
        return run_headline(_measured(*runs))

    fine, limited = run(), run(limits=LIMITED)
    assert "slotted trains at 80" in (title(CLUSTER, fine) or "")
    assert title(CLUSTER, limited) == "No figure to quote: the router limited it, not the lines"
    assert title(CLUSTER, run(efficiency=1.67)) == "No figure to quote: the times of the single cluster are in doubt"
    assert title(replace(CLUSTER, round_s=(1.0, 2.0)), fine) == title(CLUSTER, run(efficiency=1.67))
    assert "at 100\N{NO-BREAK SPACE}%" in (title(CLUSTER, run(efficiency=1.004)) or "")
    both = title(CLUSTER, fine, replace(limited, cross_traffic=1.0)) or ""
    assert both.endswith("speed, without 1 of 2 networks, where this machine was the limit")
    assert len(run_tiles(_measured(CLUSTER, fine, run("gloo", limits=LIMITED)))) == 1
    assert run_tiles(_measured(CLUSTER, run(efficiency=1.67))) == []


def test_the_page_tells_doubts_and_limits_before_any_picture() -> None:
    doubtful = with_doubts([replace(CLUSTER, round_s=(0.1, 0.24)), run(limits=LIMITED)])
    for result, told in (
        (
            _measured(*doubtful),
            "The single cluster, which all are compared with, is in doubt: its median was 100 ms in one round",
        ),
        (_measured(*doubtful), "Limited by the lab&#x27;s router: slotted"),
        (
            ReportedResult(BENCH_SCHEMA, rows=(replace(ROW, limits=LIMITED),)),
            "Limited by the lab&#x27;s router: all_re",
        ),
    ):
        text = html_text(report(ReportInputs(results=(result,)))).replace("'", "&#x27;")
        assert "No figure to quote" in text or result.rows
        assert 0 < text.index(told) < text.index("<svg")
    assert "80.0\N{NO-BREAK SPACE}%, limited" in html_text(report(ReportInputs(results=(_measured(*doubtful),))))


def test_a_limited_row_is_no_headline() -> None:
    limited = replace(ROW, fraction_of_bound=None, limits=LIMITED)
    result = ReportedResult(BENCH_SCHEMA, rows=(limited,))
    assert row_headline(result) == "No figure to quote: the router limited it, not the lines"
    assert row_tiles(result) == []
    both = ReportedResult(BENCH_SCHEMA, rows=(limited, replace(ROW, bytes=2**20)))
    assert "1 MiB over slotted reaches 80" in (row_headline(both) or "")


def test_sites_that_differ_count_as_the_largest() -> None:
    sites = Topology.uniform(2, 3, 1e6, 7 * MS).sites
    lines = Topology.uniform(2, 3, 1e6, 7 * MS)
    unequal = replace(lines, sites=(sites[0], replace(sites[1], uplink_bytes_per_s=2e6)))
    assert scale_of(unequal) == Scale(2, 3, 2e6, 7e-3, lines.mtu_bytes, has_one_rate=False)
    [limit] = limits_of_row(0.5, Load(4, 0.95), scale_of(unequal))
    assert limit.fits is not None
    assert limit.fits.startswith("lines at 20% of their rates or 2 ranks a site")
