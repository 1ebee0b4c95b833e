"""Plans as data: layout, traffic, golden files.

The golden files say what a plan looked like when somebody last read it. After a change on purpose, read the difference:

    python tests/test_plan.py && git diff tests/golden
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import PlanError, UsageError
from detcoll.plan import (
    ChunkSize,
    Collective,
    Costs,
    Kind,
    Phase,
    Plan,
    Planner,
    Slotting,
    algorithms_for,
    build_calendar,
    check,
    choose_algorithm,
    choose_chunk,
    compile_plan,
    predict_ns,
    uses_window,
)  # fmt: skip
from detcoll.plan.collectives import declaration_of
from detcoll.plan.collectives.part import LOCAL_AHEAD
from detcoll.plan.ir import Buffer
from detcoll.plan.layout import (
    EXPRESS_BYTES,
    LARGEST_CHUNK_BYTES,
    LARGEST_FRAME_BYTES,
    LARGEST_SCRATCH_BYTES,
    SMALLEST_CHUNK_BYTES,
    chunks,
    cuts,
)  # fmt: skip
from detcoll.plan.planner import predicted_chunk
from detcoll.testing.plans import all_parts, sites_of
from detcoll.topology import Topology

ALL_REDUCE = algorithms_for("all_reduce")
BROADCAST = algorithms_for("broadcast")

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "exchange_2x2": ([2, 2], "exchange", Collective("all_reduce", 12, 4, 4), ChunkSize(3, 1)),
    "direct_3x1": ([1, 1, 1], "direct", Collective("all_reduce", 6, 4, 4), ChunkSize(2, 2)),
    "ring_2_1_2": ([2, 1, 2], "ring", Collective("all_reduce", 8, 2, 4), ChunkSize(4, 2)),
    "star_2x2": ([2, 2], "star", Collective("broadcast", 8, 4, 4, root=1), ChunkSize(4, 2)),
}


def parts_of(case: str) -> list[Plan]:
    ranks, algorithm, collective, chunk_size = CASES[case]
    return all_parts(collective, sites_of(ranks), algorithm, chunk_size)


def golden_text(case: str) -> str:
    """One line a step, so that a difference reads well."""
    blocks = []
    for plan in parts_of(case):
        head = json.loads(json.dumps(plan.to_json()))
        steps = ",\n".join("  " + json.dumps(step) for step in head.pop("steps"))
        blocks.append(json.dumps(head)[:-1] + ', "steps": [\n' + steps + "\n]}")
    return "[\n" + ",\n".join(blocks) + "\n]\n"


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    stored = (GOLDEN / f"{case}.json").read_text(encoding="utf-8")
    assert json.loads(stored) == json.loads(golden_text(case))
    check(parts_of(case), sites_of(CASES[case][0]))


def wide_bytes(plan: Plan, kind: Kind) -> int:
    return sum(plan.message_bytes(i) for i, r in enumerate(plan.steps) if r["kind"] == kind and r["wide"])


def local_bytes(plan: Plan, kind: Kind) -> int:
    return sum(plan.message_bytes(i) for i, r in enumerate(plan.steps) if r["kind"] == kind and not r["wide"])


def delays(parts: list[Plan]) -> int:
    """Return how many wide messages follow one another at most until the last result is there."""
    sent: dict[tuple[int, int, int], int] = {}
    depth = [[-1] * len(plan.steps) for plan in parts]
    left = sum(len(plan.steps) for plan in parts)
    while left:
        before = left
        for plan in parts:
            for step, row in enumerate(plan.steps):
                mine = depth[plan.rank]
                if mine[step] >= 0 or any(mine[s] < 0 for s in plan.after_of(step)):
                    continue
                key = (int(row["peer"]), plan.rank, int(row["tag"]))
                if row["kind"] == Kind.RECV and key not in sent:
                    continue
                after = [s for s in plan.after_of(step) if plan.steps["kind"][s] != Kind.SEND]
                mine[step] = max((mine[s] for s in after), default=0)
                if row["kind"] == Kind.RECV:
                    mine[step] = max(mine[step], sent[key] + int(row["wide"]))
                elif row["kind"] == Kind.SEND:
                    sent[plan.rank, int(row["peer"]), int(row["tag"])] = mine[step]
                left -= 1
        assert left < before
    return max(max(row) for row in depth)


@pytest.mark.parametrize("sites", [2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALL_REDUCE)
def test_all_reduce_moves_what_its_table_says(sites: int, ranks: int, algorithm: str) -> None:
    count = 96 * sites * ranks
    collective = Collective("all_reduce", count, 4, 4)
    topology = sites_of([ranks] * sites)
    parts = all_parts(collective, topology, algorithm, ChunkSize(8, 3))
    volume = collective.nbytes
    for plan in parts:
        assert local_bytes(plan, Kind.SEND) == local_bytes(plan, Kind.RECV) == 2 * volume * (ranks - 1) // ranks
    up = [sum(wide_bytes(parts[rank], Kind.SEND) for rank in site.ranks) for site in topology.sites]
    declared = declaration_of("all_reduce").algorithm(algorithm)
    assert max(up) == declared.uplink_share(sites) * volume
    if algorithm == "exchange":
        assert up == [(sites - 1) * volume] * sites
    elif algorithm == "direct":
        assert up == [2 * (sites - 1) * volume // sites] * sites
    else:
        assert max(up) <= 2 * volume
        assert sum(up) == 2 * (sites - 1) * volume
    one = all_parts(Collective("all_reduce", ranks, 4, 4), topology, algorithm, ChunkSize(8, 3))
    assert delays(one) == {"exchange": 1, "direct": 2, "ring": 2 * (sites - 1)}[algorithm] == declared.delays(sites)


@pytest.mark.parametrize("sites", [2, 3, 4])
@pytest.mark.parametrize("algorithm", BROADCAST)
def test_broadcast_moves_what_its_table_says(sites: int, algorithm: str) -> None:
    topology = sites_of([2] * sites)
    collective = Collective("broadcast", 256, 4, 4, root=3)
    parts = all_parts(collective, topology, algorithm, ChunkSize(16, 3))
    up = [sum(wide_bytes(parts[rank], Kind.SEND) for rank in site.ranks) for site in topology.sites]
    if algorithm == "star":
        assert up == [0, (sites - 1) * collective.nbytes, *[0] * (sites - 2)]
    else:
        assert max(up) == collective.nbytes
        assert sum(up) == (sites - 1) * collective.nbytes
    expected = 1 if algorithm == "star" or sites == 2 else 2
    assert delays(parts) == expected
    assert sites == 2 or expected == declaration_of("broadcast").algorithm(algorithm).delays(sites)


def test_direct_sends_results_from_scratch() -> None:
    """So that the caller need not wait for acknowledgements."""
    for plan in all_parts(Collective("all_reduce", 90, 4, 4), sites_of([1, 2, 1]), "direct", ChunkSize(8, 2)):
        sends = plan.steps[(plan.steps["kind"] == Kind.SEND) & (plan.steps["wide"] == 1)]
        assert set(sends["buffer"].tolist()) == {int(Buffer.PARTIAL)}
        assert set(sends["phase"].tolist()) == {int(Phase.WIDE_REDUCE), int(Phase.WIDE_GATHER)}


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3000), st.integers(1, 200))
def test_chunks_cover_the_array_once(ranks: list[int], count: int, elems: int) -> None:
    topology = sites_of(ranks)
    covered = sorted((chunk.offset, chunk.length) for chunk in chunks(topology, count, ChunkSize(elems, 1)))
    ends = [0]
    for offset, length in covered:
        assert offset == ends[-1]
        assert 0 < length <= elems
        ends.append(offset + length)
    assert ends[-1] == count
    for number, chunk in enumerate(chunks(topology, count, ChunkSize(elems, 1))):
        assert chunk.number == number
        assert all(owner in site.ranks for owner, site in zip(chunk.owners, topology.sites, strict=True))
    assert cuts(topology, count)[0] == 0


def test_small_arrays_are_not_cut() -> None:
    topology = sites_of([2, 3])
    for count, owners in ((1024, {(1, 4)}), (1025, {(0, 2), (0, 3), (1, 3), (1, 4)})):
        size = choose_chunk(topology, build_calendar(topology), Collective("all_reduce", count, 4, 4))
        assert {chunk.owners for chunk in chunks(topology, count, size)} == owners
    assert [chunk.length for chunk in chunks(topology, 100, ChunkSize(30, 1, whole=True))] == [30, 30, 30, 10]


@pytest.mark.parametrize(
    ("sites", "ranks", "cores", "count", "algorithm", "larger"),
    [(4, 4, 16, 2**18, "direct", -1), (2, 8, 2, 2**21, "exchange", 1), (2, 2, 2, 2**20, "exchange", 0)],
)
def test_a_chunk_is_the_one_predicted_to_be_fastest_where_much_is_gained(
    sites: int, ranks: int, cores: int, count: int, algorithm: str, larger: int
) -> None:
    topology = Topology.uniform(sites, ranks, 1.25e8, 10_000_000)
    calendar = build_calendar(topology, Slotting.SHARE if sites > 2 else None)
    costs = Costs.on_host(sites * ranks, cores)
    collective = Collective("all_reduce", count, 4, 4)
    rule = choose_chunk(topology, calendar, collective)
    taken = predicted_chunk(collective, topology, calendar, algorithm, costs)
    assert (taken.elems > rule.elems) - (taken.elems < rule.elems) == larger
    if larger:
        needs_ns = predict_ns(collective, topology, calendar, algorithm, taken, costs)
        assert needs_ns < 0.95 * predict_ns(collective, topology, calendar, algorithm, rule, costs)
        plan = Planner(topology, 0, calendar, costs).plan(collective, algorithm)
        assert plan.rows[0].length == taken.elems


def test_chunks_of_a_segment_take_turns_at_every_home() -> None:
    homes = [chunk.home for chunk in chunks(sites_of([1, 1, 1]), 90, ChunkSize(10, 1))]
    assert homes == [0, 1, 2] * 3


LARGE = Collective("all_reduce", 2**24, 4, 4)


@pytest.mark.parametrize("rate", [1e6, 1.25e7, 1.25e8, 1.25e9])
@pytest.mark.parametrize("ranks", [[2, 2], [4, 4], [1, 3]])
def test_a_whole_number_of_chunks_fills_a_window(ranks: list[int], rate: float) -> None:
    topology = sites_of(ranks, rate)
    calendar = build_calendar(topology, Slotting.TURNS)
    chunk = choose_chunk(topology, calendar, LARGE)
    nbytes = chunk.elems * LARGE.itemsize + LARGEST_FRAME_BYTES
    site = 1
    window = calendar.windows_of(site, topology.sites[site].ranks[0])[0]
    span_ns = window.end_ns - window.start_ns
    takes_ns = nbytes / calendar.rate_bytes_per_s(site, 0) * 1e9
    fit = span_ns // takes_ns
    if SMALLEST_CHUNK_BYTES < chunk.elems * LARGE.itemsize < LARGEST_CHUNK_BYTES:
        assert fit >= 1
        assert fit * takes_ns >= 0.98 * span_ns


@pytest.mark.parametrize("mode", list(Slotting))
@pytest.mark.parametrize("ranks", [[1, 1], [2, 3], [2, 2, 2], [8] * 10, [4]])
def test_chunks_and_scratch_stay_within_their_limits(ranks: list[int], mode: Slotting) -> None:
    topology = sites_of(ranks, 1.25e9, 50_000_000)
    calendar = build_calendar(topology, mode)
    for count in (1, 1000, 2**20, 2**28):
        collective = Collective("all_reduce", count, 2, 4)
        chunk = choose_chunk(topology, calendar, collective)
        assert 1 <= chunk.elems * 2 <= LARGEST_CHUNK_BYTES
        assert chunk.depth >= 4
        assert chunk.depth * chunk.elems * 4 <= max(LARGEST_SCRATCH_BYTES, 16 * LARGEST_CHUNK_BYTES)
    if len(ranks) <= 2:
        assert choose_chunk(topology, calendar, LARGE).elems * 4 >= SMALLEST_CHUNK_BYTES - 4


@pytest.mark.parametrize("ranks", [[1, 1], [2, 2], [1, 3]])
def test_chunks_of_large_arrays_grow_with_lines_that_are_faster_than_hosts(ranks: list[int]) -> None:
    def chosen(rate: float, nbytes: int, mode: Slotting = Slotting.SHARE) -> ChunkSize:
        topology = sites_of(ranks, rate, 50_000)
        return choose_chunk(topology, build_calendar(topology, mode), Collective("all_reduce", nbytes // 4, 4, 4))

    for rate in (1.25e8, 1.25e9):
        size = chosen(rate, 2**30)
        assert (size.elems * 4, size.in_place) == (LARGEST_CHUNK_BYTES, 0)
    size = chosen(5e9, 2**30)
    assert (size.elems * 4, size.in_place) == (4 * LARGEST_CHUNK_BYTES, 2)
    assert chosen(5e9, 2**24).elems * 4 == LARGEST_CHUNK_BYTES, "a flow has a few of them in any case"
    if max(ranks) > 1:
        assert chosen(5e9, 2**30, Slotting.TURNS).in_place == 0, "windows say what a chunk is"


def test_a_rank_alone_in_its_site_exchanges_in_place_of_its_array() -> None:
    topology, count = sites_of([1, 3]), 600
    alone, *others = all_parts(
        Collective("all_reduce", count, 4, 4), topology, "exchange", ChunkSize(50, 4, in_place=2)
    )
    check([alone, *others], topology)
    assert alone.partial_elems == 0
    assert {row.buffer for row in alone.rows} == {Buffer.OUT, Buffer.LENT}
    assert not any(alone.retained), "the caller's array is finished when all that was sent from it has arrived"
    assert all(part.partial_elems for part in others)
    folds = [step for step, row in enumerate(alone.rows) if row.kind == Kind.FOLD]
    sends = [step for step, row in enumerate(alone.rows) if row.kind == Kind.SEND]
    assert len(folds) == len(sends) >= count // 50
    for fold, sent in zip(folds, sends, strict=True):
        assert fold in alone.followers[sent], "what goes out must not be folded into"
    waits = [step for step, row in enumerate(alone.rows) if row.kind == Kind.RECV and alone.blocked_by[step]]
    assert len(waits) == len(folds) - 2, "as many receives are posted ahead as are folded at once"


def test_forty_sites_of_eight_stay_cheap() -> None:
    topology = Topology.uniform(40, 8, 125e6, 10_000_000)
    calendar = build_calendar(topology)
    collective = Collective("all_reduce", 2**28, 4, 4)
    plan = Planner(topology, 17, calendar).plan(collective)
    assert plan.algorithm == "direct"
    assert len(plan.steps) < 250_000


def test_express_is_for_small_collectives_not_for_small_chunks() -> None:
    calendar = build_calendar(sites_of([2, 2]))
    assert not uses_window(calendar, EXPRESS_BYTES)
    assert uses_window(calendar, EXPRESS_BYTES + 1)
    assert not uses_window(build_calendar(sites_of([2, 2]), Slotting.OFF), 10**9)


def test_the_wrong_algorithm_is_refused() -> None:
    topology = sites_of([2, 2])
    with pytest.raises(UsageError, match="algorithm='star' does not do all_reduce; expected one of exchange"):
        compile_plan(LARGE, topology, 0, "star", ChunkSize(1 << 16, 4))
    with pytest.raises(UsageError, match="rank=4 is in no site"):
        Planner(topology, 4, build_calendar(topology))


def test_too_many_chunks_for_the_tags_are_refused() -> None:
    with pytest.raises(PlanError, match="a plan has tags for"):
        compile_plan(Collective("all_reduce", 2**18, 4, 4), sites_of([1, 1]), 0, "exchange", ChunkSize(1, 4))


@pytest.mark.parametrize("ranks", [[2, 2], [3, 3], [3]])
def test_an_owner_is_given_little_more_than_it_has_scratch_for(ranks: list[int]) -> None:
    size = ChunkSize(1 << 10, 4)
    algorithm = "exchange"
    plan = compile_plan(Collective("all_reduce", 2**18, 4, 4), sites_of(ranks), 0, algorithm, size)
    given: dict[int, list[int]] = {}
    results: dict[int, list[int]] = {}
    for step, row in enumerate(plan.rows):
        if row.kind == Kind.SEND and row.phase == Phase.LOCAL_REDUCE:
            before = results.get(row.peer, [])
            assert len(before) == len(given.setdefault(row.peer, []))
            if len(before) >= size.depth + LOCAL_AHEAD:
                assert before[-size.depth - LOCAL_AHEAD] in plan.after_of(step)
            given[row.peer].append(step)
        elif row.kind == Kind.RECV and row.phase == Phase.LOCAL_GATHER:
            results.setdefault(row.peer, []).append(step)
    assert set(given) == set(range(1, ranks[0]))
    assert min(len(steps) for steps in given.values()) > size.depth + LOCAL_AHEAD


@pytest.mark.parametrize("one_way_ns", [250_000, 10_000_000, 40_000_000, 100_000_000])
@pytest.mark.parametrize("nbytes", [2**22, 2**26])
def test_scratch_holds_what_is_under_way_and_the_chunk_that_leaves(one_way_ns: int, nbytes: int) -> None:
    topology = sites_of([2, 2], 125e6, one_way_ns)
    calendar = build_calendar(topology, Slotting.SHARE)
    chunk = choose_chunk(topology, calendar, Collective("all_reduce", nbytes // 4, 4, 4))
    chunk_ns = chunk.elems * 4 / 62.5e6 * 1e9
    assert chunk.depth * chunk_ns >= 2 * one_way_ns + chunk_ns + 5_000_000


def test_chunks_of_large_arrays_are_larger_where_there_are_no_lines() -> None:
    topology = sites_of([2])
    sizes = [
        choose_chunk(topology, build_calendar(topology), Collective("all_reduce", count, 4, 4))
        for count in (2**10, 2**21, 2**24, 2**28)
    ]
    assert [size.elems * 4 for size in sizes] == [2**18, 2**18, 2**20, 2**20]
    assert [size.depth for size in sizes] == [8, 8, 8, 8]


def test_digests_tell_plans_apart() -> None:
    topology = sites_of([2, 2])
    one = compile_plan(LARGE, topology, 0, "exchange", ChunkSize(1 << 20, 4))
    assert one.digest == compile_plan(LARGE, topology, 0, "exchange", ChunkSize(1 << 20, 4)).digest
    others = [
        compile_plan(LARGE, topology, 1, "exchange", ChunkSize(1 << 20, 4)),
        compile_plan(LARGE, topology, 0, "exchange", ChunkSize(1 << 19, 4)),
        replace(one, partial_elems=one.partial_elems + 1),
    ]
    assert len({plan.digest for plan in [one, *others]}) == 4


def test_a_planner_compiles_once() -> None:
    topology = sites_of([2, 2])
    calendar = build_calendar(topology)
    planner = Planner(topology, 1, calendar)
    plan = planner.plan(LARGE)
    assert planner.plan(Collective("all_reduce", 2**24, 4, 4)) is plan
    assert planner.plan(LARGE, plan.algorithm) is plan
    assert planner.plan(LARGE, "ring") is not plan


def test_a_planner_forgets_what_was_used_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = sites_of([1, 1])
    planner = Planner(topology, 0, build_calendar(topology))
    asked = [Collective("all_reduce", 10**6 + i, 4, 4) for i in range(3)]
    steps = len(Planner(topology, 0, planner.calendar).plan(asked[0]).steps)
    monkeypatch.setattr("detcoll.plan.planner.LARGEST_KEPT_STEPS", 2 * steps + steps // 2)
    kept = [planner.plan(collective) for collective in asked]
    assert planner.plan(asked[2]) is kept[2]
    assert planner.plan(asked[0]) is not kept[0]


def test_a_planner_takes_the_smallest_prediction() -> None:
    topology = sites_of([2, 2, 2])
    calendar = build_calendar(topology)
    planner = Planner(topology, 0, calendar)
    small, large = Collective("all_reduce", 2, 4, 4), LARGE
    assert planner.algorithm(small) == "exchange"
    assert planner.algorithm(large) == "direct"
    for collective in (small, large):
        chosen = planner.predict_ns(collective)
        assert chosen <= min(planner.predict_ns(collective, name) for name in ALL_REDUCE)
    assert choose_algorithm(LARGE, sites_of([2, 2]), build_calendar(sites_of([2, 2]))) == "exchange"
    assert choose_algorithm(LARGE, sites_of([4]), build_calendar(sites_of([4]))) == "exchange"


def test_costs_reach_the_prediction() -> None:
    topology = sites_of([2])
    calendar = build_calendar(topology)
    slow = Planner(topology, 0, calendar, Costs(step_ns=10**6)).predict_ns(LARGE)
    chunk = choose_chunk(topology, calendar, LARGE)
    assert slow == predict_ns(LARGE, topology, calendar, "exchange", chunk, Costs(step_ns=10**6))
    assert slow > 2 * predict_ns(LARGE, topology, calendar, "exchange", chunk)


@settings(max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    count=st.integers(0, 5000),
    rate=st.sampled_from([1e6, 1e8, 1e10]),
    data=st.data(),
)
def test_what_a_planner_compiles_proves_itself(ranks: list[int], count: int, rate: float, data: Any) -> None:
    topology = sites_of(ranks, rate)
    calendar = build_calendar(topology, data.draw(st.sampled_from(list(Slotting))))
    kind = data.draw(st.sampled_from(["all_reduce", "broadcast"]))
    collective = Collective(kind, count, 2, 4, data.draw(st.integers(0, topology.size - 1)) * (kind == "broadcast"))
    check([Planner(topology, rank, calendar).plan(collective) for rank in range(topology.size)], topology, calendar)


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / f"{name}.json").write_text(golden_text(name), encoding="utf-8")
