"""Right values where they go wrong easily: averages near the largest number, and NaN in minimum and maximum."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from math import prod

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import grouped, launch, lines, run_ranks

from detcoll.errors import UsageError
from detcoll.extrema import comparable
from detcoll.fold import fold_groups, fold_step, reference, widened
from detcoll.plan import ChunkSize, Collective, Slotting, algorithms_for, build_calendar
from detcoll.plan.bounds import floor_ns
from detcoll.sim import simulate
from detcoll.testing.plans import all_parts, sites_of
from detcoll.testing.values import plain_bits, require, require_edges, require_types, varied
from detcoll.types import BFLOAT16, DTYPES, FLOAT16, ReduceOp

ALL_REDUCE = algorithms_for("all_reduce")

HALVES = {"float16": (FLOAT16, 40_000.0), "bfloat16": (BFLOAT16, 2.0**127)}
EXTREMA = (ReduceOp.MIN, ReduceOp.MAX)
FLOATS = ("float16", "bfloat16", "float32", "float64")
LARGE = 270_001
"""So many elements of any type are more than one chunk, of plans and of shared memory."""

WORLDS = {
    "shm4": ("shm", (4,), None),
    "shm2+2": ("shm", (2, 2), grouped(2, 2)),
    "shm1+3": ("shm", (1, 3), grouped(1, 3)),
    "shm2+3+2": ("shm", (2, 3, 2), grouped(2, 3, 2)),
    "slotted3": ("slotted", (3,), None),
    "slotted2+2": ("slotted", (2, 2), lines(2, 2)),
    "slotted1+3": ("slotted", (1, 3), lines(1, 3)),
    "slotted1+1, faster than hosts": ("slotted", (1, 1), lines(1, 1, rate_bytes_per_s=5e9, one_way_ns=50_000)),
    "slotted1+3, faster than hosts": ("slotted", (1, 3), lines(1, 3, rate_bytes_per_s=5e9, one_way_ns=50_000)),
    "slotted1+1+1": ("slotted", (1, 1, 1), lines(1, 1, 1)),
    "slotted2+3+2": ("slotted", (2, 3, 2), lines(2, 3, 2)),
    "gloo3": ("gloo", (3,), None),
    "gloo2+2": ("gloo", (2, 2), grouped(2, 2)),
}


@pytest.fixture(params=WORLDS)
def world(request):
    transport, sizes, topology = WORLDS[request.param]
    if transport == "gloo" and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    starts = np.cumsum([0, *sizes])
    groups = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
    return transport, groups, topology


def test_the_average_of_equal_large_numbers_is_that_number(world) -> None:
    transport, groups, topology = world

    def program(comm):
        for dtype, value in HALVES.values():
            for count in (1, 37, LARGE):
                mine = np.full(count, value).astype(dtype)
                comm.all_reduce(mine, op="avg")
                assert (mine.astype(np.float64) == value).all(), (dtype, count, mine[:4])

    run_ranks(sum(map(len, groups)), program, transport=transport, topology=topology)


def test_nan_on_one_rank_comes_out_on_every_rank(world) -> None:
    transport, groups, topology = world
    size = sum(map(len, groups))

    def program(comm):
        for dtype, op, bad in product(FLOATS, EXTREMA, range(size)):
            for count in (37, LARGE) if bad == size - 1 else (37,):
                mine = np.full(count, comm.rank + 1.0).astype(DTYPES[dtype])
                if comm.rank == bad:
                    mine[::2] = np.nan
                comm.all_reduce(mine, op=op)
                mine = mine.astype(np.float64)
                assert np.isnan(mine[::2]).all(), (dtype, op, bad, mine[:4])
                assert (mine[1::2] == (1 if op is ReduceOp.MIN else size)).all(), (dtype, op, bad, mine[:4])

    run_ranks(size, program, transport=transport, topology=topology)


def test_edge_values_give_what_the_oracle_gives(world) -> None:
    transport, groups, topology = world

    def program(comm):
        require_edges(
            lambda array, op: comm.all_reduce(array, op=op), comm.rank, groups, ordered=transport != "gloo",
            counts=(1, 37, 40_003 if comm.size < 5 else 9_001),
        )  # fmt: skip

    run_ranks(sum(map(len, groups)), program, transport=transport, topology=topology)


@pytest.mark.parametrize(
    "world", ["shm2+2", "shm1+3", "slotted3", "slotted1+3", "slotted1+1+1", "gloo3", "gloo2+2"], indirect=True
)
def test_every_type_has_its_operations_on_every_path(world) -> None:
    transport, groups, topology = world

    def program(comm):
        require_types(lambda array, op: comm.all_reduce(array, op=op), comm.rank, groups, ordered=transport != "gloo")
        for dtype in DTYPES.values():
            for shape in ((0,), (), (3, 167)):
                given = [varied(dtype, prod(shape), rank).reshape(shape) for rank in range(comm.size)]
                mine = given[comm.rank].copy()
                comm.broadcast(mine, root=comm.size - 1)
                assert mine.tobytes() == given[-1].tobytes(), (dtype, shape)

    run_ranks(sum(map(len, groups)), program, transport=transport, topology=topology)


def test_a_rank_alone_refuses_what_its_type_does_not_have() -> None:
    for transport in ("shm", "slotted", "gloo") if find_spec("torch") else ("shm", "slotted"):
        run_ranks(
            1,
            lambda comm: require_types(lambda array, op: comm.all_reduce(array, op=op), 0, [[0]], ordered=True),
            transport=transport,
        )


def test_values_by_mpi(mpiexec) -> None:
    ended = launch(4, "calls.py", "values", launcher=[*mpiexec, "-n", "4"])
    assert ended.code == 0, ended.err
    assert ended.said == {rank: [["mpi-native", []]] for rank in range(4)}


@st.composite
def halves(draw):
    """Ranks a site, and what each rank gives: any finite bits of one 16-bit type."""
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([FLOAT16, BFLOAT16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([2**16, 64, 4]))  # few exponents below the largest, or all
    top = ml_dtypes.finfo(dtype).max.view(np.uint16)
    arrays = []
    for _ in range(sum(ranks)):
        magnitude = np.maximum(int(top) - rng.integers(0, spread, 50), 0)
        signs = rng.integers(0, 2, 50) << 15 if draw(st.booleans()) else 0
        arrays.append((magnitude | signs).astype(np.uint16).view(dtype))
    return ranks, arrays


@settings(max_examples=150)
@given(halves(), st.sampled_from(ALL_REDUCE), st.integers(0, 2))
def test_plans_and_groups_average_any_16_bit_floats_as_the_oracle_does(drawn, algorithm: str, in_place: int) -> None:
    ranks, arrays = drawn
    dtype, count = arrays[0].dtype, arrays[0].size
    topology = sites_of(ranks)
    groups = [site.ranks for site in topology.sites]
    rooms = [np.empty(count, dtype) for _ in groups]
    out = np.empty(count, dtype)
    fold_groups(ReduceOp.AVG, arrays, groups, out, rooms)
    require(ReduceOp.AVG, arrays, groups, out, ordered=True)
    parts = all_parts(Collective("all_reduce", count, 2, 4), topology, algorithm, ChunkSize(16, 2, in_place=in_place))
    result = simulate(parts, topology, build_calendar(topology, Slotting.SHARE), data=arrays, op=ReduceOp.AVG)
    for array in result.arrays:
        np.testing.assert_array_equal(plain_bits(array), plain_bits(out))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=str)
def test_averages_of_wide_floats_divide_the_sum(dtype) -> None:
    """Their bits are those of a division after the last fold, so that a sum out of range is infinite."""
    largest = np.finfo(dtype).max
    arrays = [np.array([largest, 1, 3, largest]).astype(dtype) * sign for sign in (1, 1, 1, -1)]
    out, rooms = np.empty(4, dtype), [np.empty(4, dtype) for _ in range(2)]
    fold_groups(ReduceOp.AVG, arrays, [[0, 1], [2, 3]], out, rooms)
    assert out.tolist() == [np.inf, 0.5, 1.5, np.inf]
    assert reference(ReduceOp.AVG, arrays, [[0, 1], [2, 3]], dtype).tolist() == out.tolist()


def test_sums_of_16_bit_floats_overflow_as_before() -> None:
    arrays = [np.full(3, 40_000, np.float16)] * 4
    out, rooms = np.empty(3, np.float16), [np.empty(3, np.float16) for _ in range(2)]
    fold_groups(ReduceOp.SUM, arrays, [[0, 1], [2, 3]], out, rooms)
    assert np.isinf(out).all()


def test_means_are_weighted_by_their_ranks() -> None:
    arrays = [np.full(2, value, np.float16) for value in (8, 1, 2, 3)]
    out, rooms = np.empty(2, np.float16), [np.empty(2, np.float16) for _ in range(2)]
    fold_groups(ReduceOp.AVG, arrays, [[0], [1, 2, 3]], out, rooms)
    assert out.tolist() == [3.5, 3.5]


@pytest.mark.parametrize("ranks", [[1], [1, 0], [1, 2]])
def test_weights_that_do_not_fit_are_refused(ranks: list[int]) -> None:
    out = np.zeros(2, np.float16)
    with pytest.raises(UsageError, match="ranks="):
        fold_step(ReduceOp.AVG, [out, out], ranks, out, 2, final=True)


@pytest.mark.parametrize("op", EXTREMA)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_compare_as_integers(dtype, op: ReduceOp) -> None:
    info = np.finfo(dtype)
    rising = np.array(
        [-np.inf, info.min, -1, -info.smallest_subnormal, -0.0, 0.0, info.tiny, 2, info.max, np.inf], dtype
    )
    same = rising.copy()
    with comparable(op, same) as keys:
        assert keys.dtype.kind == "i"
        assert (np.diff(keys.astype(object)) > 0).all()
    assert same.tobytes() == rising.tobytes()
    quiet = np.array([np.nan, -np.nan, 1.0], dtype)
    with comparable(op, quiet) as keys:
        beyond = keys[:2] < keys[2] if op is ReduceOp.MIN else keys[:2] > keys[2]
        assert beyond.all()
    assert np.isnan(quiet[:2]).all()
    assert quiet[2] == 1


def test_floats_are_back_where_a_reduction_raised() -> None:
    values = np.array([-1.5, 2.0], np.float32)
    with pytest.raises(ZeroDivisionError), comparable(ReduceOp.MIN, values):
        raise ZeroDivisionError
    assert values.tolist() == [-1.5, 2.0]


def test_what_needs_no_integers_is_left_alone() -> None:
    for op, array in ((ReduceOp.SUM, np.ones(2)), (ReduceOp.MIN, np.ones(2, np.int16))):
        with comparable(op, array) as shown:
            assert shown is array


def test_bool_goes_as_bytes_and_sums_of_complex_numbers_as_floats() -> None:
    flags, pairs = np.array([True, False]), np.array([1 + 2j, 3 - 4j], np.complex64)
    for op in (ReduceOp.MIN, ReduceOp.MAX, ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR):
        with comparable(op, flags) as shown:
            assert (shown.dtype, shown.tolist()) == (np.uint8, [1, 0])
            assert np.shares_memory(shown, flags)
    for op in (ReduceOp.SUM, ReduceOp.AVG):
        with comparable(op, pairs) as shown:
            assert (shown.dtype, shown.tolist()) == (np.float32, [1, 2, 3, -4])
            assert np.shares_memory(shown, pairs)
    with comparable(ReduceOp.PROD, pairs) as shown:
        assert shown is pairs


def test_widened_averages_stay_in_range() -> None:
    array = np.full(3, ml_dtypes.finfo(BFLOAT16).max)
    total = sum(widened(ReduceOp.AVG, array, 5) for _ in range(5))
    fold_step(ReduceOp.AVG, [total], [5], out := np.empty_like(array), 5, final=True)
    assert (out == array).all()
    assert (widened(ReduceOp.MAX, array, 5) == array).all()


def test_an_unknown_collective_is_refused_wherever_one_is_looked_up() -> None:
    words = "kind='gossip' is not a collective known here; expected one of all_gather, all_reduce, all_to_all, barrier"
    with pytest.raises(UsageError, match=words):
        Collective("gossip", 1, 4, 4)
    with pytest.raises(UsageError, match=words):
        floor_ns(sites_of([1, 1]), "gossip", 8)

    def program(comm):
        for ask in (comm.predict, comm.bound, comm.algorithm):
            with pytest.raises(UsageError, match=words):
                ask("gossip", 8)

    run_ranks(1, program, transport="shm")
