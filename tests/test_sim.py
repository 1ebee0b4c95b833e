from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import PlanError, UsageError
from detcoll.fold import reference
from detcoll.plan import (
    ChunkSize,
    Collective,
    Costs,
    Kind,
    Slotting,
    algorithms_for,
    build_calendar,
    choose_chunk,
)
from detcoll.plan.bounds import floor_ns
from detcoll.plan.calendar import LAID_OUT, flows_between
from detcoll.sim import Simulation, simulate
from detcoll.sim.simulator import STEPS_A_REPORT
from detcoll.testing.plans import all_parts, packed, sites_of, unpacked
from detcoll.testing.values import varied
from detcoll.topology import Topology
from detcoll.types import DTYPES as DTYPES_BY_NAME
from detcoll.types import ReduceOp, accumulation_dtype, operators_of

ALL_REDUCE = algorithms_for("all_reduce")
BROADCAST = algorithms_for("broadcast")

MS = 1_000_000
DTYPES = [
    DTYPES_BY_NAME[name]
    for name in (
        "float16", "bfloat16", "float32", "float64", "int32", "uint8", "bool", "complex64", "complex128",
    )
]  # fmt: skip


def contributions(size: int, count: int, dtype: np.dtype[Any]) -> list[np.ndarray[Any, Any]]:
    if dtype.kind in "bc":
        return [varied(dtype, count, rank) for rank in range(size)]
    rng = np.random.default_rng(size * 1000 + count)
    if dtype.kind in "iu":
        return [rng.integers(0, 100, count).astype(dtype) for _ in range(size)]
    return [rng.normal(1, 0.5, count).astype(dtype) for _ in range(size)]


def summed(
    topology: Topology, algorithm: str, dtype: np.dtype[Any], op: ReduceOp, count: int, chunk: ChunkSize, **more: Any
) -> Simulation:
    """Run an all-reduce with data and hold every rank's bits against the reference."""
    collective = Collective("all_reduce", count, dtype.itemsize, accumulation_dtype(dtype).itemsize)
    data = contributions(topology.size, count, dtype)
    kept = [array.tobytes() for array in data]
    calendar = build_calendar(topology, more.pop("mode", Slotting.TURNS))
    parts = all_parts(collective, topology, algorithm, chunk)
    result = simulate(parts, topology, calendar, data=data, op=op, **more)
    expected = reference(op, data, [site.ranks for site in topology.sites], dtype).tobytes()
    assert result.arrays is not None
    assert [array.tobytes() for array in result.arrays] == [expected] * topology.size
    assert [array.tobytes() for array in data] == kept
    return result


@settings(max_examples=100)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    algorithm=st.sampled_from(ALL_REDUCE),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(list(ReduceOp)),
    count=st.integers(0, 400),
    elems=st.integers(8, 64),
    depth=st.integers(1, 4),
    mode=st.sampled_from(list(Slotting)),
    whole=st.booleans(),
)
def test_an_all_reduce_gives_the_promised_bits(
    ranks: list[int], algorithm: str, dtype: np.dtype[Any], op: ReduceOp, count: int, elems: int, depth: int,
    mode: Slotting, whole: bool,
) -> None:  # fmt: skip
    if op not in operators_of(dtype):
        op = ReduceOp.BXOR if dtype.kind == "b" else ReduceOp.SUM
    summed(sites_of(ranks), algorithm, dtype, op, count, ChunkSize(elems, depth, whole), mode=mode)


@settings(max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    algorithm=st.sampled_from(BROADCAST),
    count=st.integers(0, 300),
    elems=st.integers(8, 64),
    data=st.data(),
)
def test_a_broadcast_gives_the_roots_bits(ranks: list[int], algorithm: str, count: int, elems: int, data: Any) -> None:
    topology = sites_of(ranks)
    root = data.draw(st.integers(0, topology.size - 1))
    parts = all_parts(Collective("broadcast", count, 4, 4, root), topology, algorithm, ChunkSize(elems, 2))
    given_arrays = contributions(topology.size, count, np.dtype(np.float32))
    result = simulate(parts, topology, build_calendar(topology), data=given_arrays)
    assert result.arrays is not None
    assert all(array.tobytes() == given_arrays[root].tobytes() for array in result.arrays)


def large(ranks: list[int], algorithm: str = "exchange", mode: Slotting = Slotting.TURNS, **more: Any) -> Simulation:
    topology = sites_of(ranks)
    calendar = build_calendar(topology, mode)
    collective = Collective("all_reduce", 1_000_000, 4, 4)
    parts = all_parts(collective, topology, algorithm, choose_chunk(topology, calendar, collective))
    return simulate(parts, topology, calendar, **more)


@pytest.mark.parametrize("ranks", [[2, 2], [3, 3], [2, 4]])
@pytest.mark.parametrize("phase_ns", [0, 6 * MS, 9_950_000, 17 * MS])
def test_with_a_calendar_everything_leaves_in_its_owners_window_and_nothing_queues(
    ranks: list[int], phase_ns: int
) -> None:
    result = large(ranks, phase_ns=phase_ns)
    assert result.window_share == 1.0
    assert sum(result.misses) == sum(result.trimmed) == 0
    topology = sites_of(ranks)
    calendar = build_calendar(topology, Slotting.TURNS)
    window = calendar.sites[0].windows[0]
    window_bytes = (window.end_ns - window.start_ns) / 1e9 * calendar.rate_bytes_per_s(0, 1)
    assert 0 < max(result.peak_queue_bytes) <= 20_000 < window_bytes
    assert 0 < max(result.downlink_peak_bytes) <= 20_000


def test_uplinks_are_busy_only_inside_windows() -> None:
    calendar = build_calendar(sites_of([2, 2]), Slotting.TURNS)
    cycle_ns = calendar.sites[0].cycle_ns
    for busy in large([2, 2]).uplink_busy_ns:
        for begin, end in busy:
            turn = begin - begin % cycle_ns
            assert any(w.start_ns <= begin - turn and end - turn <= w.end_ns for w in calendar.sites[0].windows)


def test_without_a_calendar_flows_queue_at_their_uplink() -> None:
    paced, free = large([3, 3], mode=Slotting.SHARE), large([3, 3], mode=Slotting.OFF)
    assert free.window_share is None
    assert max(free.peak_queue_bytes) > 5 * max(paced.peak_queue_bytes)


def test_wire_bytes_are_payload_and_frames_over_the_payload_share() -> None:
    topology = sites_of([2, 2])
    calendar = build_calendar(topology, Slotting.TURNS)
    collective = Collective("all_reduce", 1_000_000, 4, 4)
    parts = all_parts(collective, topology, "exchange", choose_chunk(topology, calendar, collective))
    messages = sum(int(((p.steps["kind"] == Kind.SEND) & (p.steps["wide"] == 1)).sum()) for p in parts[:2])
    result = simulate(parts, topology, calendar, Costs(frame_bytes=100))
    expected = (collective.nbytes + 100 * messages) / topology.payload_share
    for wire_bytes, busy in zip(result.uplink_wire_bytes, result.uplink_busy_ns, strict=True):
        # A message that is cut where a window ends has another frame.
        cuts = (wire_bytes - expected) * topology.payload_share / 100
        assert cuts == pytest.approx(round(cuts))
        assert 0 <= cuts <= len(busy)
        assert sum(end - begin for begin, end in busy) == pytest.approx(wire_bytes / 1e8 * 1e9, rel=1e-4)


@pytest.mark.parametrize("algorithm", ALL_REDUCE)
def test_a_rank_that_calls_late_delays_all_and_changes_no_bit(algorithm: str) -> None:
    topology, chunk = sites_of([2, 2]), ChunkSize(4000, 8)
    plain = summed(topology, algorithm, np.dtype(np.float16), ReduceOp.AVG, 50_000, chunk)
    late = summed(topology, algorithm, np.dtype(np.float16), ReduceOp.AVG, 50_000, chunk, start_ns=[0, 0, 90 * MS, 0])
    assert min(late.finish_ns) > 90 * MS > plain.slowest_ns


def test_a_host_that_wakes_up_late_misses_or_trims_windows_and_changes_no_bit() -> None:
    def lateness(rank: int, opens_ns: int) -> int:
        if rank == 0:
            return 3 * MS
        return 12 * MS if rank == 3 and opens_ns < 48 * MS else 0

    topology, chunk = sites_of([2, 2]), ChunkSize(50_000, 8)
    float32 = np.dtype(np.float32)
    on_time = summed(topology, "exchange", float32, ReduceOp.SUM, 1_000_000, chunk)
    assert on_time.misses == on_time.trimmed == (0, 0, 0, 0)
    late = summed(topology, "exchange", float32, ReduceOp.SUM, 1_000_000, chunk, lateness=lateness)
    assert late.trimmed[0] >= 2
    assert late.misses[3] == 2
    assert (late.misses[1], late.trimmed[1], late.misses[2], late.trimmed[2]) == (0, 0, 0, 0)
    assert late.window_share == 1.0
    assert late.slowest_ns > on_time.slowest_ns


def test_a_little_lateness_costs_no_more_than_itself() -> None:
    on_time, late = large([2, 2]), large([2, 2], lateness=lambda rank, opens_ns: 90_000)
    assert sum(late.misses) == 0
    windows = len(on_time.uplink_busy_ns[0])
    assert late.slowest_ns - on_time.slowest_ns <= 90_000 * windows + 10_000


def test_a_host_that_is_always_too_late_reaches_the_deadline() -> None:
    with pytest.raises(PlanError, match="rank 0 came to a halt"):
        large([2, 2], lateness=lambda rank, opens_ns: 11_850_000, deadline_ns=10**9)


def test_the_result_is_there_before_acknowledgements() -> None:
    for algorithm in ("exchange", "direct"):
        result = large([1, 1, 1], algorithm)
        assert min(result.drained_ns) > result.slowest_ns


def test_express_messages_leave_at_once() -> None:
    topology = sites_of([2, 2])
    calendar = build_calendar(topology, Slotting.TURNS)
    parts = all_parts(Collective("barrier", 1, 1, 1), topology, "exchange", ChunkSize(1, 4))
    finishes = {simulate(parts, topology, calendar, phase_ns=phase).slowest_ns for phase in (0, 5 * MS, 12 * MS)}
    assert len(finishes) == 1
    assert finishes.pop() < 6 * MS


def test_a_single_cluster_has_no_lines_and_the_same_bits() -> None:
    wide = sites_of([2, 3])
    for topology in (wide, wide.as_single_cluster()):
        result = summed(topology, "exchange", np.dtype(np.float32), ReduceOp.SUM, 5000, ChunkSize(500, 4))
    assert result.uplink_busy_ns == ()
    assert result.slowest_ns < 5 * MS


@pytest.mark.parametrize(
    ("ranks", "algorithm", "mode"),
    [
        ([2, 2], "exchange", Slotting.CALENDAR),
        ([2, 2], "exchange", Slotting.TURNS),
        ([1, 2, 3], "direct", Slotting.SHARE),
    ],
)
def test_as_a_fluid_messages_take_as_long_as_in_parcels_and_change_no_bit(
    ranks: list[int], algorithm: str, mode: Slotting
) -> None:
    topology, chunk = sites_of(ranks), ChunkSize(20_000, 64)
    dtype = np.dtype(np.float32)
    parcels, fluid = (
        summed(topology, algorithm, dtype, ReduceOp.SUM, 1_000_000, chunk, mode=mode, fluid=fluid)
        for fluid in (False, True)
    )
    assert fluid.slowest_ns == pytest.approx(parcels.slowest_ns, rel=0.02)
    assert fluid.uplink_wire_bytes == pytest.approx(parcels.uplink_wire_bytes, rel=1e-3)
    assert fluid.window_share == parcels.window_share
    assert (fluid.misses, fluid.trimmed) == (parcels.misses, parcels.trimmed)


def test_a_fluid_takes_its_rate_and_its_delay() -> None:
    topology = sites_of([1, 1])
    calendar = build_calendar(topology)
    parts = all_parts(Collective("all_reduce", 1_000_000, 4, 4), topology, "exchange", ChunkSize(1_000_000, 4))
    costs = Costs(step_ns=0, copy_bytes_per_s=1e18, wake_ns=0, frame_bytes=0)
    result = simulate(parts, topology, calendar, costs, fluid=True)
    assert result.slowest_ns == pytest.approx(4e6 / calendar.rate_bytes_per_s(0, 1) * 1e9 + 5 * MS, abs=10)
    assert max(result.peak_queue_bytes) == 0


def test_without_pacing_a_fluid_is_none() -> None:
    assert large([2, 2], mode=Slotting.OFF, fluid=True) == large([2, 2], mode=Slotting.OFF)


def test_progress_is_told_and_collection_goes_on() -> None:
    topology = sites_of([4, 4])
    parts = all_parts(Collective("all_reduce", 200_000, 4, 4), topology, "exchange", ChunkSize(100, 64))
    told: list[float] = []
    simulate(parts, topology, build_calendar(topology), fluid=True, progress=told.append)
    assert len(told) == sum(len(part.steps) for part in parts) // STEPS_A_REPORT > 0
    assert told == sorted(told)
    assert told[-1] <= 1
    assert gc.isenabled()


def test_collection_goes_on_when_the_last_of_several_simulations_has_ended() -> None:
    topology = sites_of([4, 4])
    parts = all_parts(Collective("all_reduce", 200_000, 4, 4), topology, "exchange", ChunkSize(100, 64))
    inside, released = threading.Event(), threading.Event()

    def second(share: float) -> None:
        inside.set()
        assert released.wait(20)

    def run(progress: Callable[[float], Any]) -> None:
        simulate(parts, topology, build_calendar(topology), fluid=True, progress=progress)

    other = threading.Thread(target=run, args=(second,))
    run(lambda share: inside.is_set() or other.start() or inside.wait(20))
    try:
        assert not gc.isenabled()
    finally:
        released.set()
        other.join(20)
    assert gc.isenabled()


def test_equal_runs_are_equal() -> None:
    assert large([2, 3]) == large([2, 3])


def test_a_plan_that_comes_to_a_halt_is_an_error() -> None:
    topology = sites_of([2])
    parts = all_parts(Collective("all_reduce", 64, 4, 4), topology, "exchange", ChunkSize(64, 4))
    rows = unpacked(parts[1])
    send = next(i for i, row in enumerate(rows) if row["kind"] == Kind.SEND)
    rows[send]["tag"] += 7
    parts[1] = packed(parts[1], rows)
    with pytest.raises(PlanError, match=r"rank 0 came to a halt; it waits for \{1: 1\}"):
        simulate(parts, topology, build_calendar(topology))


def test_arguments_are_checked() -> None:
    topology = sites_of([2, 2])
    calendar = build_calendar(topology, Slotting.TURNS)
    parts = all_parts(Collective("all_reduce", 64, 4, 4), topology, "exchange", ChunkSize(64, 4))
    with pytest.raises(UsageError, match="plans has 3 entries; expected one for each of 4 ranks"):
        simulate(parts[:3], topology, calendar)
    with pytest.raises(UsageError, match="start_ns has 1 entries"):
        simulate(parts, topology, calendar, start_ns=[1])
    with pytest.raises(UsageError, match="data of rank 0: shape and item sizes"):
        simulate(parts, topology, calendar, data=[np.zeros(63, np.float32)] * 4)
    with pytest.raises(UsageError, match="data of rank 0"):
        simulate(parts, topology, calendar, data=[np.zeros(64, np.float16)] * 4)


@pytest.mark.parametrize(
    ("topology", "count"),
    [
        (Topology.uniform(8, 1, 1.25e6, 10 * MS), 2**20),
        (Topology.uniform(4, 1, 31.25e6, 10 * MS), 2**23),
        (Topology.uniform(4, 4, 125e6, 10 * MS), 2**22),
        (Topology.uniform(4, 3, 125e6, 10 * MS), 3_000_000),
    ],
    ids=["8 slow", "4", "4 of 4", "4 of 3"],
)
def test_scratch_keeps_no_line_waiting(topology: Topology, count: int) -> None:
    """Sites that share their lines come within 4 % of the floor in large messages, however their chunks divide.

    Or as near as flows so slow that they leave more of the line than others can come.
    """
    collective, calendar = Collective("all_reduce", count, 4, 4), build_calendar(topology, Slotting.SHARE)
    parts = all_parts(collective, topology, "direct", choose_chunk(topology, calendar, collective))
    result = simulate(parts, topology, calendar)
    flows = (len(topology.sites) - 1) * flows_between(topology, 0, 1)
    uplink_bytes_per_s = topology.sites[0].uplink_bytes_per_s or 0.0
    given = calendar.rate_bytes_per_s(0, 1) * flows / (uplink_bytes_per_s * topology.payload_share)
    assert floor_ns(topology, "all_reduce", collective.nbytes, 0) / result.slowest_ns > 0.96 * given / LAID_OUT
