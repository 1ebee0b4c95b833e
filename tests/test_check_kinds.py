"""The checker proves the plans of every kind, on topologies of any form, and sees each sort of mistake in each kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import Call, drawn

from detcoll.errors import PlanError
from detcoll.plan import Buffer, ChunkSize, Collective, Kind, Plan, Planner, Slotting, build_calendar, check
from detcoll.plan.collectives import declaration_of
from detcoll.plan.compiler import compile_plan
from detcoll.plan.staging import staged
from detcoll.signature import DECLARED
from detcoll.sim import simulate
from detcoll.testing.plans import all_parts, packed, sites_of, unpacked
from detcoll.topology import Link, Site, Topology
from detcoll.types import accumulation_dtype


def placed(sites: list[list[int]]) -> Topology:
    """Return a topology whose sites have these ranks; one site has no line."""
    rates = (1e8, 1e8) if len(sites) > 1 else ()
    made = tuple(Site(f"s{index}", tuple(ranks), *rates) for index, ranks in enumerate(sites))
    return Topology(made, tuple((pair, Link(5_000_000)) for pair in combinations(range(len(sites)), 2)))


def collectives_of(call: Call, size: int) -> list[Collective]:
    """Return what each rank's part of a call on one array depends on."""
    itemsize, folded = call.dtype.itemsize, accumulation_dtype(call.dtype).itemsize
    row = math.prod(call.tails[0])
    made = []
    for rank in range(size):
        counts: tuple[int, ...] = ()
        out_counts: tuple[int, ...] = ()
        rows = 1 if call.rows[0] is None else call.rows[0]
        count = rows * row * (size if declaration_of(call.kind).has_counts else 1)
        if call.counts is not None:
            mine = call.counts[rank] if call.kind == "all_to_all" else call.counts
            counts = tuple(n * row for n in mine)
            count = sum(counts)
            if call.kind == "all_to_all":
                out_counts = tuple(each[rank] * row for each in call.counts)
        made.append(Collective(call.kind, count, itemsize, folded, call.root, counts, out_counts))
    return made


@st.composite
def sites(draw: Any) -> list[list[int]]:
    """Draw sites of one rank or more, whose ranks lie among one another."""
    order = draw(st.permutations(range(draw(st.integers(1, 7)))))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(order) - 1)), max_size=3))) if len(order) > 1 else []
    return [sorted(order[begin:end]) for begin, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]


def call_of(kind: str, size: int, seed: int, largest: int) -> Call:
    """Draw a call of a kind on one array."""
    call = drawn(np.random.default_rng(seed), size, largest, kind=kind)
    return replace(call, rows=call.rows[:1], tails=call.tails[:1])


def on_devices(parts: list[Plan], seed: int) -> list[Plan]:
    """Return the parts with the arrays of some ranks on devices: those of all, of none, inputs or outputs alone."""
    drawn = np.random.default_rng(seed)
    ranks = [(drawn.random() < 0.6, drawn.random() < 0.6) for _ in parts]
    return [staged(part, source=source, output=output) for part, (source, output) in zip(parts, ranks, strict=True)]


@settings(max_examples=20)
@given(sites(), st.sampled_from(sorted(DECLARED)), st.integers(0, 2**31), st.integers(4, 40), st.integers(2, 5))
def test_every_plan_of_every_kind_proves_itself(
    ranks: list[list[int]], kind: str, seed: int, elems: int, depth: int
) -> None:
    topology = placed(ranks)
    every = collectives_of(call_of(kind, topology.size, seed, 300), topology.size)
    for algorithm in declaration_of(kind).algorithms:
        parts = [
            compile_plan(c, topology, rank, algorithm.name, ChunkSize(elems, depth)) for rank, c in enumerate(every)
        ]
        check(parts, topology, build_calendar(topology, list(Slotting)[seed % len(Slotting)]))
        check(on_devices(parts, seed), topology)


@settings(max_examples=12)
@given(sites(), st.sampled_from(sorted(set(DECLARED) - {"barrier"})), st.integers(0, 2**31), st.integers(16, 400))
def test_simulated_data_has_the_promised_bits(ranks: list[list[int]], kind: str, seed: int, elems: int) -> None:
    topology = placed(ranks)
    size, groups = topology.size, [site.ranks for site in topology.sites]
    call, calendar = call_of(kind, size, seed, 3000), build_calendar(topology)
    has_input = [kind != "scatter" or rank == call.root for rank in range(size)]
    data = [call.given(size, rank)[0].reshape(-1)[: None if has_input[rank] else 0] for rank in range(size)]
    kept = [array.tobytes() for array in data]
    for algorithm in declaration_of(kind).algorithms:
        parts = [
            compile_plan(c, topology, rank, algorithm.name, ChunkSize(elems, 3))
            for rank, c in enumerate(collectives_of(call, size))
        ]
        result = simulate(on_devices(parts, seed), topology, calendar, data=data, op=call.op)
        assert result.arrays is not None
        for rank, array in enumerate(result.arrays):
            if rank == call.root or kind not in ("gather", "reduce"):
                expected = call.expected(groups, size, rank)
                assert array.tobytes() == expected[0].tobytes(), f"rank {rank}, {algorithm.name}, {call}"
    assert [array.tobytes() for array in data] == kept


def test_planners_of_all_ranks_agree_where_each_knows_only_its_own_sizes() -> None:
    topology = placed([[0, 3], [1, 4, 5], [2]])
    matrix = np.random.default_rng(3).integers(0, 60_000, (6, 6)).tolist()
    matrix[2] = [0] * 6
    parts = []
    for rank in range(6):
        counts, out_counts = tuple(matrix[rank]), tuple(row[rank] for row in matrix)
        collective = Collective("all_to_all", sum(counts), 4, 4, 0, counts, out_counts)
        parts.append(Planner(topology, rank, build_calendar(topology)).plan(collective))
    check([replace(part, algorithm=parts[0].algorithm) for part in parts], topology)


TOPOLOGY = placed([[0, 2], [1, 3, 4]])
Change = Callable[[list[dict[str, Any]], int], bool]


def parts_of(kind: str, root: int, counts: tuple[int, ...] = ()) -> list[Plan]:
    size = TOPOLOGY.size
    count = sum(counts) or (8 * size if declaration_of(kind).has_counts else 40)
    collective = Collective(kind, count, 4, 4, root, counts)
    algorithm = declaration_of(kind).algorithms[0].name
    return [compile_plan(collective, TOPOLOGY, rank, algorithm, ChunkSize(32, 4)) for rank in range(size)]


def drop(rows: list[dict[str, Any]], step: int) -> bool:
    """Leave a step out."""
    del rows[step]
    for row in rows:
        row["after"] = [s - (s > step) for s in row["after"] if s != step]
        row["inputs"] = [(b, o - (b == Buffer.LENT and o > step), n) for b, o, n in row["inputs"]]
    return True


def shift(rows: list[dict[str, Any]], step: int) -> bool:
    """Let a step touch the elements beside its own."""
    rows[step]["offset"] += 1 if rows[step]["offset"] == 0 else -1
    return bool(rows[step]["buffer"] != Buffer.LENT)


def shift_input(rows: list[dict[str, Any]], step: int) -> bool:
    """Let a fold read the elements beside its own."""
    for place, (buffer, offset, ranks) in enumerate(rows[step]["inputs"]):
        if buffer != Buffer.LENT:
            rows[step]["inputs"][place] = (buffer, offset + 1 if offset == 0 else offset - 1, ranks)
            return True
    return False


def write_input(rows: list[dict[str, Any]], step: int) -> bool:
    """Let a step write to the caller's input."""
    had = rows[step]["buffer"], rows[step]["offset"]
    rows[step]["buffer"], rows[step]["offset"] = int(Buffer.IN), 0
    return bool(rows[step]["kind"] != Kind.SEND and had != (Buffer.IN, 0))


def send_output(rows: list[dict[str, Any]], step: int) -> bool:
    """Send from the output what should come from the input, before anything was written there."""
    is_sent = rows[step]["kind"] == Kind.SEND and rows[step]["buffer"] == Buffer.IN
    rows[step]["buffer"], rows[step]["after"] = int(Buffer.OUT), []
    return bool(is_sent)


def hurry(rows: list[dict[str, Any]], step: int) -> bool:
    """Let a step wait for nothing."""
    had = rows[step]["after"]
    rows[step]["after"] = []
    return bool(had)


CHANGES = [drop, shift, shift_input, write_input, send_output, hurry]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("counts", [(), (0, 70, 5, 0, 1)])
@pytest.mark.parametrize("kind", DECLARED)
def test_every_mistake_in_any_step_is_seen(kind: str, counts: tuple[int, ...], change: Change, on_device: bool) -> None:
    if counts and (not declaration_of(kind).has_counts or declaration_of(kind).is_pairwise):
        pytest.skip("blocks of this kind do not differ like this")
    parts, changed = parts_of(kind, 3, counts), 0
    if on_device:
        parts = [staged(part, source=True, output=True) for part in parts]
    check(parts, TOPOLOGY)
    for rank in (1, 2, 3):  # each is an owner of something, and 3 is the root
        part = parts[rank]
        for step in range(len(part.steps)):
            rows = unpacked(part)
            needless = on_device and change is hurry and not part.copies & {step, *part.after_of(step)}
            if needless or not change(rows, step):  # copies order what the order of steps in one array had to
                continue
            changed += 1
            try:
                check([*parts[:rank], packed(part, rows), *parts[rank + 1 :]], TOPOLOGY)
            except PlanError:
                continue
            pytest.fail(f"{change.__name__} of rank {rank}, step {step} was not seen: {unpacked(part)[step]}")
    assert changed or change in (shift_input, send_output, write_input, hurry)


def test_a_step_that_breaks_the_form_in_place_is_seen() -> None:
    """An all-gather may get its input as its own block of the output; so the block may be sent after it was written."""
    topology = placed([[0, 1]])
    collective = Collective("all_gather", 8, 4, 4)
    parts = [compile_plan(collective, topology, rank, "direct", ChunkSize(32, 4)) for rank in range(2)]
    rows = unpacked(parts[0])
    received = next(row for row in rows if row["kind"] == Kind.RECV)
    copied = next(row for row in rows if row["kind"] == Kind.FOLD)
    received["offset"], copied["offset"] = copied["offset"], received["offset"]
    with pytest.raises(PlanError, match="touch the same elements of OUT"):
        check([packed(parts[0], rows), parts[1]], topology)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("ranks", [(5, 6, 7), (3, 4, 5, 7)])
def test_pieces_of_two_blocks_share_no_tag_where_many_sites_cut_a_block_at_other_places(
    kind: str, ranks: tuple[int, ...]
) -> None:
    topology = sites_of(ranks)
    counts = (2_000, 3) + (0,) * (topology.size - 2)
    check(all_parts(Collective(kind, sum(counts), 4, 4, 0, counts), topology, "direct", ChunkSize(10**6, 4)), topology)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "gather", "scatter", "all_to_all"])
def test_a_site_of_hundreds_of_ranks_has_tags_enough(kind: str) -> None:
    size = 320
    part = compile_plan(Collective(kind, size, 4, 4, 0), sites_of([size]), size - 1, "direct", ChunkSize(65_536, 4))
    assert len(part.steps) > 0


@pytest.mark.parametrize("kind", ["broadcast", "reduce"])
def test_inside_one_site_all_ranks_share_the_work_of_a_root(kind: str) -> None:
    topology, count = sites_of([8]), 8 << 17
    planners = [Planner(topology, rank, build_calendar(topology)) for rank in range(8)]
    moved = []
    for planner in planners:
        steps = planner.plan(Collective(kind, count, 4, 4, 3)).steps
        moved.append(int(steps["length"][steps["kind"] != Kind.FOLD].sum()))
    assert max(moved) <= 3 * count
