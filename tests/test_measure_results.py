"""What is made of the ranks' records: statistics, efficiency, digests, the result file, the options."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from detcoll import marks
from detcoll.cli import main
from detcoll.cli.lines import LineOptions, NetworkOptions, SiteOptions, comma_separated, present
from detcoll.emulation.lab import Conditions, DirectionStatistics, Service, Statistics
from detcoll.emulation.lab.conditions import CrossTrafficKind
from detcoll.emulation.lab.statistics import BurstStatistics, FlowStatistics, ProbeStatistics
from detcoll.errors import DetcollError, UsageError
from detcoll.installation import install_command
from detcoll.launch import processes
from detcoll.marks import Marks
from detcoll.measure import experiment, step
from detcoll.measure.aggregate import (
    ScriptRound,
    Setting,
    iteration_times_s,
    make_run,
    make_script_run,
    marked_span_ns,
    marked_times_s,
    sync_times_s,
    wire_busy_fraction,
)
from detcoll.measure.experiment import Experiment, run_experiment
from detcoll.measure.gains import MEANS
from detcoll.measure.host import host_facts
from detcoll.measure.kernel import network_counts, parse_retransmits, parse_sent_bytes
from detcoll.measure.lines import CoTenant, LineRecord, use_of
from detcoll.measure.load import Readings, Watch
from detcoll.measure.networks import parse_networks, reserve
from detcoll.measure.records import RankRecord, read_config, read_marks, write_json
from detcoll.measure.results import SINGLE_CLUSTER, LeftOut, Measurement, write_result
from detcoll.measure.runner import Runner
from detcoll.measure.statistics import ratio, summarize, tails
from detcoll.measure.tables import measurement_table
from detcoll.topology import Topology
from detcoll.trace import TRACE_VARIABLE
from detcoll.transport import Capabilities, Scope
from detcoll.workloads.workload import Stamps, WorkloadSpec

MS = 10**6
SECOND = 10**9
WIDE = Topology.uniform(2, 1, 1e8, 10 * MS)
SINGLE = Setting("single cluster", "shm", "single-cluster")
SLOTTED = Setting("slotted", "slotted", "wide-area")
SYNTHETIC = WorkloadSpec("synthetic", bucket_bytes=4096, compute_ns=30 * MS, gradient_bytes=8192)


def record(
    rank: int, iteration_ms: float = 40, iterations: int = 4, digest: str = "same", **changes: Any
) -> RankRecord:
    """Iterations of equal length; backward from a fourth to a half, rank 1 one millisecond behind."""
    step_ns, late_ns = round(iteration_ms * MS), rank * MS
    stamps = tuple(
        Stamps(
            begin_ns + step_ns // 4 + late_ns,
            begin_ns + step_ns // 2 + late_ns,
            begin_ns + step_ns - 2 * MS + late_ns,
            begin_ns + step_ns + late_ns,
        )
        for begin_ns in range(0, iterations * step_ns, step_ns)
    )
    whole = RankRecord(
        rank, late_ns, stamps, (), None, digest, "exchange", None, sent_bytes=None, retransmits=rank, slot_misses=3
    )
    return replace(whole, **changes)


def rounds(iteration_ms: float = 40, **changes: Any) -> list[list[RankRecord]]:
    return [[record(rank, iteration_ms, **changes) for rank in range(2)]]


def test_summary_and_tails() -> None:
    samples = [3.0, 1.0, 2.0]
    summary = summarize(samples)
    assert (summary.median, summary.samples) == (2.0, (3.0, 1.0, 2.0))
    assert 1 <= summary.p01 < 1.1
    assert 2.9 < summary.p99 <= 3
    assert (tails(samples).least, tails(samples).greatest) == (1.0, 3.0)
    with pytest.raises(UsageError):
        summarize([])
    with pytest.raises(UsageError):
        tails([])


def test_ratio_has_the_spread_of_the_other() -> None:
    efficiency, low, high = ratio(summarize([1.0]), summarize([1.0, 2.0, 4.0]))
    assert efficiency == 0.5
    assert 0.25 <= low < efficiency < high <= 1.0


def test_iterations_run_from_last_end_to_last_end() -> None:
    [records] = rounds()
    assert iteration_times_s(records) == pytest.approx([0.04] * 4)
    assert sync_times_s(records) == pytest.approx([0.018] * 4)
    late = [records[0], replace(records[1], start_ns=0)]
    assert iteration_times_s(late)[0] == pytest.approx(0.041)


def test_wire_busy_fraction_is_the_busiest_sites() -> None:
    line_bytes_per_s = 1e8 * WIDE.payload_share
    backward_s = 4 * 0.010
    half = round(line_bytes_per_s * backward_s / 2)
    [records] = rounds()
    for counts, expected in (((half, half // 2), 0.5), ((half, 9 * half), 1.0), ((0, half // 5), 0.1)):
        seen = [replace(one, sent_bytes=count) for one, count in zip(records, counts, strict=True)]
        assert wire_busy_fraction([seen], WIDE) == pytest.approx(expected, rel=1e-3)
    assert wire_busy_fraction([records], WIDE) is None
    assert wire_busy_fraction([records], WIDE.as_single_cluster()) is None


def test_run_is_compared_with_its_baseline() -> None:
    baseline = make_run(SINGLE, rounds(30), WIDE, None, 0.03)
    run = make_run(SLOTTED, rounds(40), WIDE, baseline, 0.03)
    assert (baseline.efficiency, baseline.arithmetic_ratio) == pytest.approx((1.0, 1.0))
    assert run.efficiency == pytest.approx(0.75)
    assert run.arithmetic_ratio == pytest.approx(4 / 3)
    assert run.retransmits == 0 + 1
    assert run.slot_misses == 6
    assert baseline.retransmits is None
    assert run.result_digest == "same"


def test_counts_that_nobody_knows_are_null() -> None:
    run = make_run(SLOTTED, rounds(retransmits=None, slot_misses=None), WIDE, None, None)
    assert (run.retransmits, run.slot_misses, run.losses, run.arithmetic_ratio) == (None, None, None, None)


def test_ranks_that_differ_have_no_digest() -> None:
    [records] = rounds()
    run = make_run(SLOTTED, [[records[0], replace(records[1], digest="other")]], WIDE, None, None)
    assert run.result_digest is None


def test_losses_are_means_over_ranks_through_all_rounds() -> None:
    first = [record(rank, losses=(1.0 + rank, 2.0)) for rank in range(2)]
    second = [record(rank, losses=(4.0, 6.0 * rank)) for rank in range(2)]
    assert make_run(SLOTTED, [first, second], WIDE, None, None).losses == (1.5, 2.0, 4.0, 3.0)


def test_script_is_timed_by_marks_where_it_leaves_any() -> None:
    marked = (Marks(0, (0, 10 * MS, 30 * MS)), Marks(1, (1 * MS, 12 * MS, 31 * MS, 99 * MS)))
    assert marked_times_s(marked) == pytest.approx([0.011, 0.019])
    assert marked_times_s((Marks(0, (1, 2)), Marks(1, (1,)))) == []
    assert marked_span_ns(marked) == [(1 * MS, 31 * MS)]
    assert marked_span_ns((Marks(0, (1, 2)), Marks(1, (1,)))) is None
    baseline = make_script_run(SINGLE, [ScriptRound(2.0, marked)], None)
    assert baseline.iteration_s.samples == pytest.approx((0.011, 0.019))
    assert baseline.total_s == 2.0
    whole = make_script_run(SLOTTED, [ScriptRound(4.0, ()), ScriptRound(8.0, ())], baseline)
    assert whole.iteration_s.samples == (4.0, 8.0)
    shown = {
        heading: _printed(Measurement("detcoll.measure/1", {}, {}, (run,), (), None))
        for heading, run in (("iteration", baseline), ("whole run", whole))
    }
    assert all(f" {heading} " in printed for heading, printed in shown.items())
    assert "step()" not in shown["iteration"]
    assert "start-up and imports included" in shown["whole run"]


def test_step_leaves_marks_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []
    monkeypatch.setattr(marks.atexit, "register", lambda *call: left.append(call))
    step()
    assert not left
    monkeypatch.setenv("DETCOLL_MARKS", str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    step()
    step()
    [(leave, directory)] = left
    leave(directory)
    seen = read_marks(tmp_path / "marks2.json")
    assert seen.rank == 2
    assert len(seen.marks_ns) == 2
    assert seen.marks_ns[0] <= seen.marks_ns[1]


def test_optimizers_leave_marks_unless_the_script_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Optimizer: ...

    marker = marks._Marker()
    monkeypatch.setattr(marks, "_marker", marker)
    monkeypatch.setattr(marks.atexit, "register", lambda *call: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    first, other = Optimizer(), Optimizer()
    marks.optimizer_stepped(first)
    assert not marker.stepped, "nobody measures"
    monkeypatch.setenv("DETCOLL_MARKS", str(tmp_path))
    for optimizer in (first, other, first, other):
        marks.optimizer_stepped(optimizer)
    assert len(marker.stepped) == 2, "of the first one alone"
    del first, optimizer
    marks.optimizer_stepped(other)
    assert len(marker.stepped) == 3, "the first one is gone"
    stepped = tuple(marker.stepped)
    marker.leave(tmp_path)
    assert read_marks(tmp_path / "marks0.json").marks_ns == stepped
    step()
    marks.optimizer_stepped(other)
    [called] = marker.called
    marker.leave(tmp_path)
    assert read_marks(tmp_path / "marks0.json").marks_ns == (called,)


def test_kernel_counters() -> None:
    device = (
        "Inter-|   Receive                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop\n"
        "    lo:   11339      96    0    0    0     0          0         0    11339      96    0    0\n"
        "  wan0: 79459253    2022    0    0    0     0          0         0   151315    1239    0    0\n"
    )
    assert parse_sent_bytes(device) == 151315
    assert parse_sent_bytes("") is None
    assert parse_retransmits("Ip: 1\nTcp: OutSegs RetransSegs InErrs\nTcp: 100 7 0\n") == 7
    assert parse_retransmits("Tcp: OutSegs\nTcp: 100\n") is None
    assert parse_retransmits("") is None
    counts = network_counts()
    assert counts.since(counts).retransmits in (0, None)


def test_host_facts_name_versions_and_nobody() -> None:
    facts = host_facts()
    assert {"cpu", "cores", "kernel", "python", "numpy", "pyzmq", "libzmq", "torch", "mpi4py", "mpi"} <= set(facts)
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert socket.gethostname() not in json.dumps(facts)


@pytest.mark.parametrize("command", [["lab", "true"], ["bench", "--lab"], ["measure"], ["plan"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "/nowhere.toml"], "topology='/nowhere.toml' cannot be read"),
        (
            ["--topology", "/nowhere.toml", "--sites", "2", "--rate", "1 Gbit/s"],
            "topology='/nowhere.toml' already says what sites, rate would",
        ),
        (["--sites", "1"], "sites=1"),
        (["--sites", "0"], "sites=0"),
        (["--ranks-per-site", "0"], "ranks_per_site=0"),
        (["--rate", "1"], "rate='1'"),
        (["--rate", "-1 Gbit/s"], "rate='-1 Gbit/s'"),
        (["--round-trip", "20"], "round_trip='20'"),
    ],
)
def test_commands_refuse_lines_that_cannot_be_in_the_same_words(
    command: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], *options, *command[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"detcoll: {message}")


def test_commands_explain_lines_in_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("sites", "ranks-per-site", "rate", "round-trip")
    wanted = {"lab": (*names, "queue", "topology"), "bench": (*names, "queue", "topology"), "plan": names}
    told: dict[str, set[str]] = {}
    for command in ("lab", "bench", "measure", "plan"):
        assert main([command, "--help"]) == 0
        shown = " ".join(word for word in capsys.readouterr().out.split() if word != "\u2502")
        for name in wanted.get(command, wanted["bench"]):
            said = re.search(rf"--{name} [A-Z]+ (.*?) (\u2570|--[a-z-]+ ([A-Z]{{3}}|--no))", shown)
            assert said is not None
            told.setdefault(name, set()).add(said[1])
    assert {name: len(texts) for name, texts in told.items()} == dict.fromkeys(told, 1)
    assert told["ranks-per-site"] == {"Ranks in each site; 2 unless given."}


def test_lines_from_options() -> None:
    options = SiteOptions(sites=3, ranks_per_site=1, rate="100 Mbit/s", round_trip="5 ms")
    assert options.wide_topology() == Topology.uniform(3, 1, 12.5e6, 2_500_000)
    assert LineOptions().wide_topology() == Topology.uniform(2, 2, 125e6, 10 * MS)
    assert LineOptions().queue_bytes() == 2_500_000


class _Anywhere:
    capabilities = Capabilities(scope=Scope.ANYWHERE)


def test_transports_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detcoll.registry._NEEDS", {"gloo": ("no_such_package", "gloo")})
    for room in ("registry", "cli.lines"):
        monkeypatch.setattr(f"detcoll.{room}.load", lambda name: _Anywhere)
    monkeypatch.setattr("detcoll.registry.find_mpiexec", lambda: "/bin/mpiexec")
    here, left_out = present(("gloo", "mpi"), "against")
    assert here == ("mpi",)
    assert left_out == (
        LeftOut("gloo", f"no_such_package is not installed; install it with: {install_command('gloo')}"),
    )
    monkeypatch.setattr("detcoll.registry.find_mpiexec", lambda: None)
    assert present(("mpi",), "against")[1][0].why.startswith("there is no mpiexec")
    with pytest.raises(UsageError, match="against='carrier-pigeon'"):
        present(("carrier-pigeon",), "against")
    assert comma_separated(" a, b,") == ("a", "b")
    assert comma_separated("none") == comma_separated("") == ()


def test_what_is_reserved() -> None:
    [ordinary], [reserved] = parse_networks(("best-effort",), ("0",)), parse_networks(("deterministic",), ("1",))
    assert reserve(WIDE, [ordinary], None) == WIDE
    assert reserve(WIDE, [ordinary, reserved], None) == WIDE.with_reserved(8e7)
    assert reserve(WIDE, [reserved], "240 Mbit/s") == WIDE.with_reserved(3e7)
    assert reserve(WIDE.with_reserved(2e7), [reserved], None) == WIDE.with_reserved(2e7)
    assert reserve(Topology.uniform(3, 1, 1e8, MS), [reserved], None).granted.sites[0].uplink_bytes_per_s == 8e7
    lines = WIDE.with_reserved(8e7)
    assert (ordinary.topology(lines), reserved.topology(lines)) == (WIDE, lines)
    assert reserved.conditions(Conditions(loss=0.1)).cross_traffic == 1.0
    assert reserved.conditions(Conditions(loss=0.1)).loss == 0.1


def counted(**changes: Any) -> Statistics:
    """Two directions in both classes, 100 of everything that can be dropped but 3 policed, and four probes."""
    directions = tuple(
        DirectionStatistics(
            source,
            1 - source,
            10,
            1000,
            10**6,
            9 * 10**5,
            20,
            30,
            40,
            service,
            3 * source,
            7,
            11 * MS,
            12 * MS,
            13 * MS,
        )
        for service in Service
        for source in range(2)
    )
    whole = Statistics(
        directions, (500, 600), (1, 2), (50, 60), (3, 4), (BurstStatistics(1000, 100),) * 2,
        ProbeStatistics(5, (0, 10 * MS, 20 * MS, 500 * MS), (20 * MS, 40 * MS, 40 * MS, 99 * MS)), 0, 0, 1e3, 2 * MS,
        0.5, 2.0,
    )  # fmt: skip
    return replace(whole, **changes)


def test_what_the_lines_saw_is_of_the_class_that_was_used() -> None:
    kept = [LineRecord(Service.BEST_EFFORT, counted(), 5)]
    use = use_of(kept, [None])
    assert (use.wire_bytes, use.queue_dropped_segments, use.policed_segments) == (2 * 10**6, 120, 3)
    assert (use.lost_segments, use.failed_segments, use.peak_queue_bytes) == (60, 14, 600)
    assert (use.delay_p50_s, use.delay_p99_s) == (0.011, 0.012)
    assert (use.burst_offered_bytes, use.burst_dropped_bytes) == (2000, 200)
    assert (use.router_late_s, use.router_cpu_share) == (0.002, 0.25)
    reserved = use_of([LineRecord(Service.DETERMINISTIC, counted(), 5)] * 2, [None, None])
    assert (reserved.wire_bytes, reserved.peak_queue_bytes) == (4 * 10**6, 60)


def test_what_others_get_through_counts_while_it_was_measured() -> None:
    flows = (FlowStatistics(0, 900, (0, 100, 300)), FlowStatistics(1, 900, (0, 100, 500)))
    one = counted(flows=flows, flows_at_ns=(SECOND, 2 * SECOND, 3 * SECOND))
    kept = LineRecord(Service.BEST_EFFORT, one, 5)
    assert use_of([kept], [None]).others_bytes_per_s == pytest.approx(400)
    assert use_of([kept], [[(2 * SECOND, 3 * SECOND)]]).others_bytes_per_s == pytest.approx(600)
    halves = [(SECOND // 2, SECOND + SECOND // 2), (2 * SECOND + SECOND // 2, 9 * SECOND)]
    assert use_of([kept], [halves]).others_bytes_per_s == pytest.approx(400)
    assert use_of([kept, kept], [None, [(2 * SECOND, 3 * SECOND)]]).others_bytes_per_s == pytest.approx(500)
    assert use_of([kept], [[(4 * SECOND, 5 * SECOND)]]).others_bytes_per_s is None
    assert use_of([LineRecord(Service.BEST_EFFORT, counted(), 5)], [None]).others_bytes_per_s is None


def test_the_kind_of_others_traffic_reaches_the_lab() -> None:
    options = NetworkOptions(service="best-effort,deterministic", cross_traffic="0,1", cross_traffic_kind="tcp")
    kinds = [network.conditions(Conditions()).cross_traffic_kind for network in options.networks()]
    assert kinds == [CrossTrafficKind.TCP] * 4
    assert [network.label for network in options.networks()][:2] == [
        "best-effort", "best-effort, others offer 100% over TCP",
    ]  # fmt: skip
    assert NetworkOptions(cross_traffic="1").networks()[0].cross_traffic_kind is CrossTrafficKind.BURSTS


def test_a_co_tenant_counts_while_it_was_measured() -> None:
    [kept] = [LineRecord(Service.BEST_EFFORT, counted(), 5)]
    meanwhile = use_of([kept], [[(5 * MS, 30 * MS)]]).co_tenant
    assert meanwhile == CoTenant(0.04, 0.04, 4, 5, 2)
    whole = use_of([kept], [None]).co_tenant
    assert whole is not None
    assert whole.p99_s > 0.09
    assert use_of([kept], [[(600 * MS, 700 * MS)]]).co_tenant is None
    run = make_run(SLOTTED, rounds(40), WIDE, None, None, [kept])
    assert run.line is not None
    assert run.line.co_tenant == CoTenant(0.04, 0.04, 4, 5, 3)


class FakePlaces:
    """Writes the records that ranks would; ``faults`` name what goes wrong for which transport."""

    calls: list[tuple[str, str]]
    faults: dict[str, str]
    traced: list[tuple[str, str, Path]]

    def __init__(self, topology: Topology, deadline_s: float) -> None:
        self.topology = topology

    def run(
        self, setting: Setting, argv: list[str], logs: Path, env: dict[str, str] | None = None, lab: Any = None
    ) -> float:
        self.calls.append((setting.name, Path(argv[-1]).name))
        assert (lab is not None) == setting.is_wide
        fault = self.faults.get(setting.transport)
        if fault == "fails":
            raise DetcollError("a rank ended with exit code 3")
        if TRACE_VARIABLE in (env or {}):
            self.traced.append((setting.name, logs.name, Path((env or {})[TRACE_VARIABLE])))
        if marks.MARKS_VARIABLE in (env or {}):
            write_json(logs / "marks0.json", Marks(0, (0, MS, 3 * MS)))
            if fault != "no job":
                (logs / "opened").touch()
            return 2.0
        config = read_config(logs / "config.json")
        assert config.topology.is_wide == setting.is_wide
        assert config.topology.has_reservations == (setting.network.service is Service.DETERMINISTIC)
        goes_on = config.first_iteration > 0 and config.workload.name == "digits"
        assert (config.resume_path is not None) == goes_on
        for rank in range(self.topology.size):
            made = record(rank, 30 if setting == SINGLE else 40, config.iterations, digest=fault or "same")
            write_json(config.record_path(rank), made)
        return 1.0


class QuietWatch(Watch):
    """A watch of two cores that nobody else uses and that are half idle."""

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None: ...

    def readings(self) -> Readings:
        return Readings(2, (0, SECOND), (0.0, 1.0), (0.0, 0.1), 0.0, self.router_late_s)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> type[FakePlaces]:
    @contextmanager
    def no_lab(topology: Topology, conditions: Conditions) -> Iterator[Any]:
        conditions.validate(topology)
        yield SimpleNamespace(router_pid=0)

    monkeypatch.setattr(experiment, "Watch", QuietWatch)
    monkeypatch.setattr(experiment, "Lab", no_lab)
    monkeypatch.setattr(experiment, "why_unavailable", lambda: None)
    monkeypatch.setattr(experiment, "read_lines", lambda lab, service: LineRecord(service, counted(), 7))
    monkeypatch.setattr(experiment, "Runner", FakePlaces)
    monkeypatch.setattr(experiment, "save_digits", lambda path: None)
    FakePlaces.calls, FakePlaces.faults, FakePlaces.traced = [], {}, []
    return FakePlaces


def an_experiment(**changes: Any) -> Experiment:
    return replace(
        Experiment(WIDE, SYNTHETIC, (), 5, 2, ("gloo",), (LeftOut("mpi", "not here"),), Conditions()), **changes
    )


def test_settings_take_turns(places: type[FakePlaces]) -> None:
    said: list[str] = []
    result = run_experiment(an_experiment(), said.append)
    names = ["single cluster", "slotted", "gloo"]
    assert [name for name, _ in places.calls] == names + names[::-1]
    assert [len(run.iteration_s.samples) for run in result.runs] == [5, 5, 5]
    assert [run.setting for run in result.runs] == ["single-cluster", "wide-area", "wide-area"]
    assert result.digests_equal is True
    assert len(said) == 6
    assert "round 2 of 2: gloo" in said


def test_plain_tcp_is_called_what_it_is_compared_for(places: type[FakePlaces]) -> None:
    result = run_experiment(an_experiment(against=("tcp",)), lambda line: None)
    assert [(run.name, run.transport) for run in result.runs[1:]] == [
        ("slotted", "slotted"), ("same plans, plain TCP", "tcp"),
    ]  # fmt: skip
    assert "same plans, plain TCP" in _printed(result)


def test_every_network_is_measured(places: type[FakePlaces]) -> None:
    networks = parse_networks(("best-effort", "deterministic"), ("0", "1.0"))
    result = run_experiment(an_experiment(networks=networks, topology=WIDE.with_reserved(6e7)), lambda line: None)
    assert [(run.transport, run.service, run.cross_traffic) for run in result.runs] == [
        ("shm", "best-effort", 0.0),
        *((name, service, share) for service in ("best-effort", "deterministic") for share in (0.0, 1.0)
          for name in ("slotted", "gloo")),
    ]  # fmt: skip
    assert [run.line is None for run in result.runs] == [True] + [False] * 8
    assert result.digests_equal is True
    assert result.workload["reserved_bytes_per_s"] == [6e7]
    assert result.workload["burst_bytes"] == [300_000]
    shown = _printed(result)
    assert "slotted, deterministic, others 100%: segments dropped: 6 by the policer" in shown
    assert "p99 40 ms" in shown


def test_one_slotted_run_with_other_bits_is_enough() -> None:
    same = make_run(SINGLE, rounds(), WIDE, None, None)
    fine, other = (make_run(SLOTTED, rounds(digest=digest), WIDE, same, None) for digest in ("same", "other"))
    assert experiment.digests_equal([same, fine, fine]) is True
    assert experiment.digests_equal([same, fine, other, fine]) is False
    assert experiment.digests_equal([same]) is None


@pytest.mark.parametrize("script", [(), (__file__,)])
def test_only_the_last_slotted_round_is_traced_and_only_for_a_report(
    places: type[FakePlaces], tmp_path: Path, script: tuple[str, ...]
) -> None:
    made = an_experiment(workload=None if script else SYNTHETIC, script=script)
    run_experiment(made, lambda line: None)
    assert places.traced == []
    run_experiment(replace(made, traces=tmp_path / "traces"), lambda line: None)
    ((name, logs, folder),) = places.traced
    assert name == "slotted"
    assert logs.endswith("-1"), "rounds count from zero"
    assert folder == tmp_path / "traces" / logs


def test_each_run_is_told_what_is_switched_off(
    places: type[FakePlaces], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: dict[str, dict[str, str]] = {}
    overlaps: dict[str, bool] = {}
    flat: dict[str, list[int]] = {}
    inner = places.run

    def run(self: FakePlaces, setting: Setting, argv: list[str], logs: Path, env: Any = None, lab: Any = None) -> float:
        told[setting.name] = dict(env or {})
        overlaps[setting.name] = read_config(logs / "config.json").workload.overlap
        if "DETCOLL_TOPOLOGY" in (env or {}):
            flat[setting.name] = [len(s.ranks) for s in Topology.from_file(env["DETCOLL_TOPOLOGY"]).sites]
        return inner(self, setting, argv, logs, env, lab)

    monkeypatch.setattr(places, "run", run)
    lines = Topology.uniform(2, 2, 1e8, 10 * MS).with_reserved(6e7)
    networks = parse_networks(("deterministic",), ("1.0",))
    result = run_experiment(
        an_experiment(topology=lines, networks=networks, without=MEANS, rounds=1, against=()), lambda line: None
    )
    assert [run.without for run in result.runs] == [None, None, *MEANS]
    assert {name for name, sizes in flat.items() if sizes == [1, 1, 1, 1]} == {"slotted without topology"}
    assert told["slotted without topology"]["DETCOLL_SITE"] == ""
    assert {name for name, env in told.items() if env.get("DETCOLL_SLOTTING") == "off"} == {"slotted without slots"}
    assert {name for name, overlap in overlaps.items() if not overlap} == {"slotted without overlap"}
    assert result.runs[-1].service == "best-effort"


def test_digits_go_on_in_the_next_round(places: type[FakePlaces]) -> None:
    result = run_experiment(an_experiment(workload=WorkloadSpec("digits", 4096), iterations=4), lambda line: None)
    assert result.workload["gradient_bytes"] > 2**21
    assert all(len(run.iteration_s.samples) == 4 for run in result.runs)


@pytest.mark.parametrize(
    ("error", "code", "why"),
    [
        (KeyboardInterrupt(), 130, "the command was interrupted"),
        (SystemExit(143), 143, "the command was interrupted"),
        (DetcollError("slotted: not done within 5 s"), 1, "slotted: not done within 5 s"),
    ],
)
def test_what_is_ended_early_gives_the_rounds_that_are_whole(
    places: type[FakePlaces], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    error: BaseException, code: int, why: str,
) -> None:  # fmt: skip
    inner = places.run

    def run(self: FakePlaces, setting: Setting, argv: list[str], logs: Path, env: Any = None, lab: Any = None) -> float:
        if setting.is_wide and logs.name.endswith("-2"):
            raise error
        return inner(self, setting, argv, logs, env, lab)

    monkeypatch.setattr(places, "run", run)
    given = ["measure", "--workload", "synthetic", "--compute", "30 ms", "--against", "none", "--ranks-per-site", "1",
             "--iterations", "10", "--json", str(tmp_path / "x.json"), "--report", str(tmp_path / "page")]  # fmt: skip
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit) as ended:
            main(given)
        assert ended.value.code == code
    else:
        assert main(given) == code
    told = f"ended early, after 2 of 4 rounds: {why}. All figures are of whole rounds"
    assert told in " ".join(capsys.readouterr().out.split())
    data = json.loads((tmp_path / "x.json").read_text())
    assert [len(run["iteration_s"]["samples"]) for run in data["runs"]] == [6, 6], "what round 3 had is left out"
    assert (data["workload"]["rounds"], data["workload"]["iterations"]) == (2, 6)
    assert data["digests_equal"] is True
    assert why in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert not list((tmp_path / "page").rglob("rank*.json")), "a trace of a round that is not whole"


def test_an_end_before_the_first_round_is_whole_gives_nothing(
    places: type[FakePlaces], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*given: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(places, "run", run)
    assert main(["measure", "--workload", "synthetic", "--against", "none", "--json", str(tmp_path / "x.json")]) == 130
    assert not (tmp_path / "x.json").exists()


def test_result_file_has_the_promised_keys(places: type[FakePlaces], tmp_path: Path) -> None:
    result = run_experiment(an_experiment(), lambda line: None)
    write_result(tmp_path / "results.json", result)
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["schema"] == "detcoll.measure/1"
    assert {"host", "workload", "runs"} <= set(data)
    for run in data["runs"]:
        assert {
            "name", "transport", "setting", "service", "cross_traffic", "iteration_s", "sync_s", "efficiency",
            "wire_busy_fraction", "algorithm", "result_digest", "retransmits", "slot_misses",
        } <= set(run)  # fmt: skip
        assert set(run["iteration_s"]) == {"median", "p01", "p99", "samples"}
    assert data["workload"]["name"] == "synthetic"
    assert data["left_out"] == [{"transport": "mpi", "why": "not here", "network": None}]
    assert data["runs"][0]["retransmits"] is None


def test_other_bits_are_told(places: type[FakePlaces]) -> None:
    places.faults = {"slotted": "other"}
    result = run_experiment(an_experiment(), lambda line: None)
    assert result.digests_equal is False
    assert "DIFFERS" in _printed(result)
    places.faults = {"gloo": "other"}
    result = run_experiment(an_experiment(), lambda line: None)
    assert result.digests_equal is True
    assert "bit for bit" in _printed(result)
    assert "left out: mpi: not here" in _printed(result)


def test_baseline_that_cannot_be_trusted_is_told() -> None:
    steady = make_run(SINGLE, rounds(40), WIDE, None, 0.04)
    slow = make_run(SINGLE, rounds(40), WIDE, None, 0.039)
    uneven = make_run(SINGLE, [*rounds(40), *rounds(90, iterations=1)], WIDE, None, None)
    for run, words in (
        (steady, None),
        (slow, "2.6 % above its own arithmetic"),
        (uneven, "its p99 is 2.2 times its median"),
    ):
        shown = _printed(Measurement("detcoll.measure/1", {}, {}, (run,), (), None))
        assert ("is in doubt" in shown) == (words is not None)
        assert words is None or words in shown


def test_peer_that_fails_is_left_out(places: type[FakePlaces]) -> None:
    places.faults = {"gloo": "fails"}
    result = run_experiment(an_experiment(), lambda line: None)
    assert [run.name for run in result.runs] == ["single cluster", "slotted"]
    assert result.left_out[-1] == LeftOut("gloo", "it failed: a rank ended with exit code 3", "best-effort")
    places.faults = {"slotted": "fails"}
    with pytest.raises(DetcollError, match="exit code 3"):
        run_experiment(an_experiment(), lambda line: None)


def test_slotted_may_fail_in_best_effort_beside_others_alone(places: type[FakePlaces]) -> None:
    places.faults = {"slotted": "fails"}
    busy = an_experiment(networks=parse_networks(("best-effort",), ("1.0",)))
    result = run_experiment(busy, lambda line: None)
    assert [run.name for run in result.runs] == ["single cluster", "gloo"]
    assert result.left_out[-1].network == "best-effort, others offer 100%"
    reserved = an_experiment(networks=parse_networks(("deterministic",), ("1.0",)), topology=WIDE.with_reserved(6e7))
    with pytest.raises(DetcollError, match="exit code 3"):
        run_experiment(reserved, lambda line: None)


def test_script_runs_under_every_setting(places: type[FakePlaces], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    wanted = an_experiment(workload=None, script=(str(script),), rounds=1)
    result = run_experiment(wanted, lambda line: None)
    assert result.digests_equal is None
    assert [run.iteration_s.samples for run in result.runs] == [(0.001, 0.002)] * 3
    assert [run.retransmits for run in result.runs] == [None, 7, 7]
    assert result.workload["name"] == "script"


def test_script_that_opens_no_job_is_refused_at_once(places: type[FakePlaces], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    places.faults = {SINGLE.transport: "no job"}
    wanted = an_experiment(workload=None, script=(str(script),), rounds=1)
    with pytest.raises(DetcollError, match=r"train\.py does not use detcoll, .* init_process_group"):
        run_experiment(wanted, lambda line: None)
    assert len(places.calls) == 1


def test_an_interrupt_reaches_ranks_as_what_ends_them_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    supervise = processes.supervise

    def noted(crew: Any, **options: Any) -> int:
        given.update(options)
        return supervise(crew, **options)

    monkeypatch.setattr("detcoll.launch.ranks.supervise", noted)
    Runner(Topology.single_site(1), 30.0).run(Setting("alone", "shm", SINGLE_CLUSTER), ["true"], tmp_path)
    assert given["on_interrupt"] == signal.SIGTERM


def test_experiment_that_cannot_be_is_refused() -> None:
    for changes, message in (
        ({"rounds": 0}, "rounds=0"),
        ({"iterations": 1}, "iterations=1"),
        ({"against": ("slotted",)}, "measured anyway"),
        ({"against": ("gloo", "gloo")}, "each other once"),
        ({"workload": None, "script": ("/no/such.py",)}, "script='/no/such.py'"),
    ):
        with pytest.raises(UsageError, match=message):
            an_experiment(**changes).validate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--service", "perfect"], "service='perfect' is not known"),
        (["--service", ""], "at least one value"),
        (["--service", "deterministic,deterministic"], "each value once"),
        (["--cross-traffic", "much"], "cross_traffic='much'"),
        (["--cross-traffic", "1", "--cross-traffic-kind", "udp"], "'udp' is not known; expected bursts or tcp"),
        (["--cross-traffic", "0", "--cross-traffic-kind", "tcp"], "expected with --cross-traffic above 0"),
        (["--report", __file__], "expected a folder"),
        (["--cross-traffic", "0,2.5", "--against", "none"], "cross_traffic=2.5 must be a share from 0 to 2"),
        (["--reserved", "800 Mbit/s"], "reserved='800 Mbit/s' needs service=deterministic"),
        (["--service", "deterministic", "--reserved", "800"], "reserved='800'"),
        (["--service", "deterministic", "--reserved", "1 Gbit/s", "--against", "none"], "must be less than its uplink"),
        (["--json", "/no/such/directory/x.json"], "no directory"),
        (["--against", "pigeon"], "against='pigeon'"),
        (["--against", "shm"], "against='shm' joins ranks of one host only"),
        (["--sites", "1"], "sites=1"),
        (["--rate", "1"], "rate='1'"),
        (["--workload", "synthetic", "--compute", "400"], "compute='400'"),
        (["--workload", "synthetic", "--gradient-bytes", "10B"], "gradient_bytes=10"),
        (["--bucket-bytes", "2B"], "bucket_bytes=2"),
        (["--batches", "0"], "batches=0 must be at least 1"),
        (["--batches", "2", "--workload", "synthetic"], "batches=2: of no use to workload='synthetic'"),
        (["--batches", "2", __file__], "batches=2: of no use to a script"),
        (["--rounds", "0", "--against", "none"], "rounds=0"),
        (["--compute", "5 ms"], "compute='5 ms': of no use to workload='digits'; expected with --workload synthetic"),
        (["--compute-kind", "python"], "compute_kind='python': of no use to workload='digits'"),
        (["--gradient-bytes", "1MiB", __file__], "gradient_bytes='1MiB': of no use to a script"),
        (["--bucket-bytes", "1MiB", "--warmup", "2", __file__], "warmup=2, bucket_bytes='1MiB': of no use to a script"),
        (["/no/such/script.py", "--against", "none"], "is not a file"),
        (["--iteration", "3"], "script='--iteration' is no option of measure"),
        (["--workload", "digits", "--against", "none", __file__], "two workloads"),
    ],
)
def test_measure_refuses_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_measure_prints_and_writes(
    places: type[FakePlaces], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "results.json"
    given = ["measure", "--workload", "synthetic", "--against", "none", "--ranks-per-site", "1", "--iterations", "4"]
    assert main([*given, "--compute", "30 ms", "--json", str(path)]) == 0
    captured = capsys.readouterr()
    assert "75.0%" in captured.out
    assert "bit for bit" in captured.out
    assert "round 1 of 4: single cluster\n" in captured.err
    runs = json.loads(path.read_text())["runs"]
    assert [run["arithmetic_ratio"] for run in runs] == pytest.approx([1.0, 4 / 3])
    places.faults = {"slotted": "other"}
    assert main(given) == 1


def test_the_default_measurement_and_its_report_have_plain_tcp(places: type[FakePlaces], tmp_path: Path) -> None:
    given = ["measure", "--workload", "synthetic", "--compute", "30 ms", "--ranks-per-site", "1"]
    assert main([*given, "--report", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["name"] for run in runs][:3] == ["single cluster", "slotted", "same plans, plain TCP"]
    assert "same plans, plain TCP" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_settings_take_turns_as_often_as_there_are_iterations_for(
    places: type[FakePlaces], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.touch()
    seen: list[int] = []

    def keep(wanted: Experiment, say: Any) -> Any:
        seen.append(wanted.rounds)
        return run_experiment(wanted, say)

    monkeypatch.setattr("detcoll.cli.measure.run_experiment", keep)
    builtin = ["--against", "none", "--workload", "synthetic", "--compute", "30 ms"]
    for given in (
        builtin,
        [*builtin, "--iterations", "3"],
        [*builtin, "--rounds", "6"],
        ["--against", "none", str(script)],
    ):
        main(["measure", "--ranks-per-site", "1", *given])
    assert seen == [4, 3, 6, 2]


def test_unknown_options_belong_to_the_script(
    places: type[FakePlaces], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.touch()
    seen: list[Experiment] = []

    def keep(wanted: Experiment, say: Any) -> Any:
        seen.append(wanted)
        return run_experiment(wanted, say)

    monkeypatch.setattr("detcoll.cli.measure.run_experiment", keep)
    given = ["measure", str(script), "--epochs", "3", "--sites", "3", "--against", "none", "--rounds", "1"]
    assert main(given) == 0
    assert seen[0].script == (str(script), "--epochs", "3")
    assert len(seen[0].topology.sites) == 3


def _printed(result: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(measurement_table(result))
    return captured.get()
