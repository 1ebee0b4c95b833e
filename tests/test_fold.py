"""Folds: order, bits, types, rounding, aliasing, blocking and what is refused."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detcoll import fold as fold_module
from detcoll.errors import UsageError
from detcoll.fold import fold, fold_step, folder, reference
from detcoll.testing.values import varied
from detcoll.types import BFLOAT16, DTYPES, FLOAT16, ReduceOp, is_complex, is_integer, operators_of, real_dtype

HALVES = [FLOAT16, BFLOAT16]
FLOATS = [*HALVES, np.dtype(np.float32), np.dtype(np.float64)]
NATIVE_FLOATS = FLOATS[2:]
INTEGERS = [dtype for dtype in DTYPES.values() if is_integer(dtype)]
F32 = np.dtype(np.float32)
COMPLEX = [dtype for dtype in DTYPES.values() if is_complex(dtype)]
OPS = [op for op in ReduceOp if op in operators_of(F32)]
DEFINED = [(dtype, op) for dtype in DTYPES.values() for op in ReduceOp if op in operators_of(dtype)]
REFUSED = [(dtype, op) for dtype in DTYPES.values() for op in ReduceOp if op not in operators_of(dtype)]
SEVERAL_BLOCKS = 3 * fold_module.BLOCK_BYTES // 4 + 13  # elements: over three blocks of float32


def draw(dtype: np.dtype, count: int, size: int, seed: int = 1) -> list[np.ndarray]:
    """Arrays that make order and rounding visible, with specials scattered in."""
    rng = np.random.default_rng(seed)
    if is_integer(dtype) or dtype.kind == "b":
        return [varied(dtype, size, seed, index) for index in range(count)]
    if is_complex(dtype):
        return [parts.view(dtype) for parts in draw(real_dtype(dtype), count, 2 * size, seed)]
    arrays = []
    for _ in range(count):
        with np.errstate(all="ignore"):
            array = (rng.standard_normal(size) * 10.0 ** rng.integers(-3, 4, size)).astype(dtype)
        specials = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 6e4, 1e-7], np.float64)
        with np.errstate(all="ignore"):
            array[rng.integers(0, size, size // 7)] = rng.choice(specials, size // 7).astype(dtype)
        arrays.append(array)
    return arrays


def bits(array: np.ndarray) -> np.ndarray:
    """The bits of ``array``, with every NaN made the same."""
    plain = np.ascontiguousarray(array).copy()
    plain = plain.view(real_dtype(plain.dtype))
    if not is_integer(plain.dtype):
        plain[plain != plain] = np.nan
    return plain.view(f"u{plain.dtype.itemsize}")


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(bits(actual), bits(expected))


def one_level(op: ReduceOp, arrays: list[np.ndarray]) -> np.ndarray:
    return reference(op, arrays, [list(range(len(arrays)))], arrays[0].dtype)


def run(op: ReduceOp, arrays: list[np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
    out = np.empty_like(arrays[0]) if out is None else out
    fold_step(op, arrays, [1] * len(arrays), out, len(arrays), final=True)
    return out


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("dtype", "op"), DEFINED, ids=str)
def test_fold_gives_the_bits_of_the_reference(dtype, op, count):
    arrays = draw(dtype, count, 1000)
    kept = [array.copy() for array in arrays]
    assert_same_bits(run(op, arrays), one_level(op, kept))
    for array, before in zip(arrays, kept, strict=True):
        assert_same_bits(array, before)


@pytest.mark.parametrize(
    ("dtype", "op"), [pair for pair in DEFINED if pair[0] in (*HALVES, F32, *COMPLEX, np.dtype(bool))], ids=str
)
def test_results_do_not_depend_on_length_or_blocking(dtype, op):
    arrays = draw(dtype, 3, SEVERAL_BLOCKS)
    assert_same_bits(run(op, arrays), one_level(op, arrays))


@pytest.mark.parametrize(("dtype", "op"), [pair for pair in DEFINED if not is_integer(pair[0])], ids=str)
def test_results_do_not_depend_on_offset_or_alignment(dtype, op):
    size = 67
    whole = draw(dtype, 3, size + 16)
    itemsize = dtype.itemsize
    for offset in range(9):
        memory = [np.zeros((size + 16) * itemsize + 8, np.uint8) for _ in whole]
        arrays = []
        for index, (space, source) in enumerate(zip(memory, whole, strict=True)):
            # odd byte offsets too: a chunk in a frame need not be aligned to its elements
            view = space[index + offset :][: size * itemsize].view(dtype)
            view[:] = source[:size]
            arrays.append(view)
        assert_same_bits(run(op, arrays), one_level(op, [source[:size] for source in whole]))


@given(cuts=st.lists(st.integers(0, 500), max_size=6), seed=st.integers(0, 2**16), count=st.integers(1, 5))
def test_any_split_into_chunks_gives_the_same_bits(cuts, seed, count):
    for dtype, op in ((F32, ReduceOp.SUM), (BFLOAT16, ReduceOp.AVG), (FLOAT16, ReduceOp.MAX)):
        arrays = draw(dtype, count, 500, seed)
        pieces = np.empty(500, dtype)
        for start, stop in pairwise(sorted({0, 500, *cuts})):
            run(op, [array[start:stop] for array in arrays], pieces[start:stop])
        assert_same_bits(pieces, run(op, arrays))


def test_the_order_is_from_the_left():
    values = [1e8, 1.0, -1e8, 1.0]  # float32 from the left: ((1e8 + 1) - 1e8) + 1 = 1
    arrays = [np.full(5, value, np.float32) for value in values]
    assert run(ReduceOp.SUM, arrays).tolist() == [1.0] * 5
    assert run(ReduceOp.SUM, arrays[::2] + arrays[1::2]).tolist() == [2.0] * 5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_fold_in_float32_and_round_once(dtype):
    tiny = 2.0 ** (-9 if dtype == BFLOAT16 else -12)  # lost when added to 1 in 16 bits, kept in float32
    arrays = [np.full(3, value).astype(dtype) for value in (1.0, *[tiny] * 8)]
    once = np.float32(1 + 8 * tiny).astype(dtype)
    assert once != 1
    assert_same_bits(run(ReduceOp.SUM, arrays), np.full(3, once))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_float32_accumulator_carries_a_fold_on(dtype, op):
    size = SEVERAL_BLOCKS
    arrays = draw(dtype, 6, size)
    total = np.empty(size, np.float32)
    fold_step(op, arrays[:3], [1, 1, 1], total, 6, final=False)
    fold_step(op, [total, arrays[3]], [3, 1], total, 6, final=False)
    fold_step(op, [total, arrays[4]], [4, 1], total, 6, final=False)
    out = np.empty(size, dtype)
    fold_step(op, [total, arrays[5]], [5, 1], out, 6, final=True)
    assert_same_bits(out, one_level(op, arrays))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_accumulator_can_stand_anywhere(dtype):
    half, other = draw(dtype, 2, 500)
    total = draw(F32, 1, 500, seed=9)[0]
    with np.errstate(all="ignore"):
        expected = (half.astype(F32) + total) + other.astype(F32)
    into_inputs = total.copy()
    fold(ReduceOp.SUM, [half, into_inputs, other], into_inputs)
    assert_same_bits(into_inputs, expected)
    out = np.empty(500, dtype)
    fold(ReduceOp.SUM, [half, total, other], out)
    with np.errstate(all="ignore"):
        assert_same_bits(out, expected.astype(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_accumulator_is_rounded_or_divided_and_rounded(dtype):
    total = np.array([1.0, 3.0, 1e30, np.nan, -0.0], np.float32)
    out = np.empty(5, dtype)
    fold(ReduceOp.SUM, [total], out)
    with np.errstate(all="ignore"):
        assert_same_bits(out, total.astype(dtype))
        fold_step(ReduceOp.AVG, [total], [3], out, 3, final=True)
        scaled = np.float32(0.75 if dtype == BFLOAT16 else 3)  # terms of bfloat16 were scaled by 1/4
        assert_same_bits(out, (total / scaled).astype(dtype))


@pytest.mark.parametrize("dtype", [*NATIVE_FLOATS, *COMPLEX], ids=str)
def test_avg_divides_only_when_told(dtype):
    arrays = [np.full(4, value, np.float32).astype(dtype) for value in (1, 2, 4)]
    out = np.empty(4, dtype)
    fold(ReduceOp.AVG, arrays, out)
    assert out.tolist() == [7.0] * 4
    fold(ReduceOp.AVG, arrays, out, 7)
    assert out.tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", NATIVE_FLOATS, ids=str)
def test_the_division_is_a_true_one(dtype):
    arrays = draw(dtype, 2, 2000)
    with np.errstate(all="ignore"):
        expected = (arrays[0] + arrays[1]) / dtype.type(7)
        product = (arrays[0] + arrays[1]) * dtype.type(1 / 7)
    assert not np.array_equal(bits(expected), bits(product))
    out = np.empty(2000, dtype)
    fold(ReduceOp.AVG, arrays, out, 7)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_an_average_of_complex_numbers_is_that_of_their_parts(dtype):
    real = real_dtype(dtype)
    for groups in ([[0, 1, 2]], [[0, 2], [1]]):
        arrays = draw(dtype, 3, 2000)
        parts = reference(ReduceOp.AVG, [array.view(real) for array in arrays], groups, real)
        assert_same_bits(reference(ReduceOp.AVG, arrays, groups, dtype), parts.view(dtype))
    assert_same_bits(
        run(ReduceOp.AVG, arrays), one_level(ReduceOp.AVG, [array.view(real) for array in arrays]).view(dtype)
    )
    infinite = np.array([complex(np.inf, 1), complex(1, -np.inf)], dtype)
    assert run(ReduceOp.AVG, [infinite, infinite]).tolist() == infinite.tolist()


@pytest.mark.parametrize("index", [None, 0, 1, 2])
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_each_operation_of_a_complex_product_rounds_by_itself(dtype, index):
    """Whatever the place in memory, and also where NumPy's own product fuses operations."""
    arrays = [varied(dtype, SEVERAL_BLOCKS, rank) for rank in range(3)]
    (a, b, c), real = arrays, real_dtype(dtype).type
    expected = []
    for x, y, z in zip(a[:500].tolist(), b[:500].tolist(), c[:500].tolist(), strict=True):
        re = real(real(real(x.real) * real(y.real)) - real(real(x.imag) * real(y.imag)))
        im = real(real(real(x.real) * real(y.imag)) + real(real(x.imag) * real(y.real)))
        expected.append(
            (
                real(real(re * real(z.real)) - real(im * real(z.imag))),
                real(real(re * real(z.imag)) + real(im * real(z.real))),
            )
        )
    result = run(ReduceOp.PROD, arrays, None if index is None else arrays[index])
    assert_same_bits(result[:500], np.array(expected, real).reshape(-1).view(dtype))


def test_bool_combines_as_logic_does():
    a, b = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    for op, expected in (
        (ReduceOp.MIN, a & b), (ReduceOp.BAND, a & b), (ReduceOp.MAX, a | b), (ReduceOp.BOR, a | b),
        (ReduceOp.BXOR, a ^ b),
    ):  # fmt: skip
        assert run(op, [a, b]).tolist() == expected.tolist()
        assert run(op, [a, b, a]).tolist() == reference(op, [a, b, a], [[0, 1], [2]], a.dtype).tolist()
    assert run(ReduceOp.BXOR, [a, b, b]).tolist() == a.tolist()


@pytest.mark.parametrize(("dtype", "op"), REFUSED, ids=str)
@pytest.mark.parametrize("size", [0, 3])
def test_operations_that_a_type_does_not_have_are_refused(dtype, op, size):
    arrays, out = [np.ones(size, dtype)] * 2, np.zeros(size, dtype)
    for attempt in (
        lambda: fold(op, arrays, out),
        lambda: run(op, arrays, out),
        lambda: run(op, arrays[:1], out),
        lambda: reference(op, arrays, [[0, 1]], dtype),
    ):
        with pytest.raises(UsageError, match=f"op='{op.value}' of {dtype} is not defined"):
            attempt()
    assert not out.any()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_wrap_silently(dtype):
    info = np.iinfo(dtype)
    top, one = np.full(3, info.max, dtype), np.ones(3, dtype)
    assert run(ReduceOp.SUM, [top, one]).tolist() == [info.min] * 3
    assert run(ReduceOp.PROD, [top, top]).tolist() == [1] * 3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_overflow_silently(dtype):
    largest = np.full(3, np.finfo(dtype).max if dtype in NATIVE_FLOATS else 6e4, np.float64).astype(dtype)
    if dtype == BFLOAT16:
        largest[:] = 3e38
    for op, expected in ((ReduceOp.SUM, np.inf), (ReduceOp.PROD, np.inf)):
        assert run(op, [largest, largest]).astype(float).tolist() == [expected] * 3
    infinite = np.full(3, np.inf, np.float64).astype(dtype)
    assert np.isnan(run(ReduceOp.SUM, [infinite, -infinite]).astype(float)).all()


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_min_and_max_propagate_nan(dtype, op, position):
    for size in (1, 7, 64, 100):
        arrays = [np.full(size, value, np.float64).astype(dtype) for value in (1.0, 2.0, 3.0)]
        arrays[position][:] = np.nan
        assert np.isnan(run(op, arrays).astype(float)).all()


@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_of_different_sign_give_the_same_zero_in_every_lane(dtype, op):
    """Vector loops and their scalar tails must agree, in place or not."""
    for signs in ((0.0, -0.0), (-0.0, 0.0)):
        seen = set()
        for size in (*range(1, 70), 1000):
            arrays = [np.full(size, sign, np.float64).astype(dtype) for sign in signs]
            seen |= set(np.signbit(run(op, arrays).astype(F32)).tolist())
            for index in (0, 1):
                kept = [array.copy() for array in arrays]
                seen |= set(np.signbit(run(op, kept, kept[index]).astype(F32)).tolist())
        assert len(seen) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.PROD])
@pytest.mark.parametrize("dtype", [np.dtype(np.int32), F32, *HALVES, *COMPLEX], ids=str)
def test_out_may_be_any_of_the_inputs(dtype, op, count):
    for index in range(count):
        arrays = draw(dtype, count, SEVERAL_BLOCKS if count == 3 else 100)
        expected = one_level(op, arrays)
        assert_same_bits(run(op, arrays, arrays[index]), expected)


def test_out_may_be_several_inputs_at_once():
    a, b = draw(F32, 2, 100)
    expected = one_level(ReduceOp.SUM, [a, b, a, b, a])
    assert_same_bits(run(ReduceOp.SUM, [a, b, a, b, a], a), expected)


@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.PROD])
@pytest.mark.parametrize("dtype", [F32, *HALVES, *COMPLEX], ids=str)
def test_partial_overlap_is_right_or_refused(dtype, op):
    memory = draw(dtype, 1, 300)[0]
    other = draw(dtype, 1, 200, seed=5)[0]
    for inputs, out in (
        ([memory[:200], other], memory[50:250]),
        ([memory[50:250], other, other], memory[:200]),
        ([other, other, memory[50:250]], memory[:200]),
        ([memory[:200]], memory[3:203]),
    ):
        before, expected = memory.copy(), one_level(op, [array.copy() for array in inputs])
        try:
            fold(op, inputs, out)
        except UsageError as error:
            assert "overlaps input" in str(error)  # noqa: PT017
            assert_same_bits(memory, before)
        else:
            assert_same_bits(out, expected)
        memory[:] = before


def test_an_input_of_another_stride_at_the_same_address_is_refused():
    memory = np.zeros(2 * SEVERAL_BLOCKS, np.float32)
    plain, spread = memory[:SEVERAL_BLOCKS], memory[::2]
    with pytest.raises(UsageError, match="overlaps input 2"):
        fold(ReduceOp.SUM, [np.ones_like(plain), np.ones_like(plain), plain], spread)


def test_an_accumulator_over_its_own_16_bit_input_is_refused():
    memory = np.zeros(400, np.uint8)
    half, wide = memory[:200].view(FLOAT16), memory.view(F32)
    with pytest.raises(UsageError, match="overlaps input 0"):
        fold(ReduceOp.SUM, [half, half], wide)


def test_empty_arrays_fold():
    for dtype, op in DEFINED:
        for count in (1, 2, 3):
            assert run(op, [np.empty(0, dtype)] * count, np.empty(0, dtype)).size == 0


def test_threads_do_not_share_scratch():
    inputs = [draw(BFLOAT16, 4, SEVERAL_BLOCKS, seed) for seed in (1, 2)]
    results: list[list[np.ndarray]] = [[], []]

    def work(index: int) -> None:
        results[index] = [run(ReduceOp.SUM, inputs[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index in (0, 1):
        expected = one_level(ReduceOp.SUM, inputs[index])
        assert len(results[index]) == 5
        for result in results[index]:
            assert_same_bits(result, expected)


def test_a_fold_of_two_native_arrays_is_one_numpy_call(monkeypatch):
    calls = []

    def add(*args, **kwargs):
        calls.append(args)
        return np.add(*args, **kwargs)

    monkeypatch.setitem(fold_module._UFUNCS, ReduceOp.SUM, add)
    a, b = draw(F32, 2, SEVERAL_BLOCKS)
    out = np.empty_like(a)
    fold(ReduceOp.SUM, [a, b], out)
    assert len(calls) == 1
    assert calls[0][0] is a
    assert calls[0][1] is b


def test_numpy_error_state_is_left_alone():
    before = np.geterr()
    run(ReduceOp.SUM, draw(FLOAT16, 3, 50))
    assert np.geterr() == before


@pytest.mark.parametrize(
    ("op", "inputs", "out", "divisor", "words"),
    [
        ("sum", [], np.zeros(2), None, "at least one input"),
        ("sum", [np.zeros((2, 2))], np.zeros((2, 2)), None, "one-dimensional"),
        ("sum", [np.zeros(2), np.zeros(1)], np.zeros(2), None, r"shape \(1,\)"),
        ("sum", [np.zeros(2), np.zeros(2, "f4")], np.zeros(2), None, "float32 into float64"),
        ("sum", [np.zeros(2, "f2"), np.zeros(2, BFLOAT16)], np.zeros(2, "f4"), None, "bfloat16 into float32"),
        ("sum", [np.zeros(2, "f2")], np.zeros(2, "f8"), None, "float16 into float64"),
        ("sum", [np.zeros(2, "g")], np.zeros(2, "g"), None, "not supported"),
        ("sum", [np.zeros(2, "f4")] * 2, np.zeros(2, "c8"), None, "float32 into complex64"),
        ("prod", [np.zeros(2, "c8")] * 2, np.zeros(2, "c16"), None, "complex64 into complex128"),
        ("max", [np.zeros(2, "u1")], np.zeros(2, "?"), None, "uint8 into bool"),
        ("avg", [np.zeros(2, "i4")], np.zeros(2, "i4"), None, "avg.*int32"),
        ("avg", [np.zeros(2, "u1")], np.zeros(2, "u1"), 2, "avg.*uint8"),
        ("sum", [np.zeros(2)], np.zeros(2), 2, "divisor=2 with op='sum'"),
        ("avg", [np.zeros(2)], np.zeros(2), 0, "divisor=0"),
        ("avg", [np.zeros(2, "f2")], np.zeros(2, "f2"), 2, "divisor=2 for float16; .* by fold_step"),
    ],
)
def test_what_does_not_fit_is_refused(op, inputs, out, divisor, words):
    with pytest.raises(UsageError, match=words):
        fold(ReduceOp(op), inputs, out, divisor)


def test_reference_of_two_levels_rounds_at_each():
    """bfloat16 has 8 bits: 256 + 1 is a tie that rounds to 256, so grouping shows."""
    values = [256.0, 1.0, 1.0, 1.0]
    arrays = [np.full(2, value, np.float32).astype(BFLOAT16) for value in values]

    def result(op: ReduceOp, groups: list[list[int]]) -> float:
        return float(reference(op, arrays, groups, BFLOAT16)[0])

    assert result(ReduceOp.SUM, [[0, 1, 2, 3]]) == 260.0  # 259 rounds to even, once
    assert result(ReduceOp.SUM, [[0, 1], [2, 3]]) == 258.0  # 257 -> 256, then 256 + 2
    assert result(ReduceOp.SUM, [[0], [1, 2, 3]]) == 260.0  # a single rank's level is a copy; 256 + 3 -> 260
    assert result(ReduceOp.AVG, [[0, 1], [2, 3]]) == 64.5  # 128 and 1: means of the sites, 64.5 of both


def test_reference_matches_integers_in_python():
    arrays = draw(np.dtype(np.int16), 5, 50)
    expected = sum(array.astype(np.int64) for array in arrays)
    actual = reference(ReduceOp.SUM, arrays, [[0, 1], [2], [3, 4]], np.dtype(np.int16))
    assert actual.tolist() == [(int(value) + 2**15) % 2**16 - 2**15 for value in expected]


def test_reference_refuses_an_average_of_integers():
    with pytest.raises(UsageError, match="avg"):
        reference(ReduceOp.AVG, [np.zeros(2, np.int32)], [[0]], np.dtype(np.int32))


@pytest.mark.parametrize(("dtype", "op"), DEFINED, ids=str)
def test_two_levels_by_fold_match_the_reference(dtype, op):
    arrays = draw(dtype, 7, 300)
    groups = [[0, 1, 2], [3], [4, 5, 6]]
    sites = []
    for group in groups:
        site = np.empty(300, dtype)
        fold_step(op, [arrays[rank] for rank in group], [1] * len(group), site, 7, final=False)
        sites.append(site)
    out = np.empty(300, dtype)
    fold_step(op, sites, [3, 1, 3], out, 7, final=True)
    assert_same_bits(out, reference(op, arrays, groups, dtype))


@pytest.mark.parametrize("groups", [[[0, 1]], [[0], [1]], [[1], [0]], [[0]], [[0, 1, 2]], [[0, 2], [1]]], ids=str)
@pytest.mark.parametrize(("dtype", "op"), DEFINED, ids=str)
def test_a_prepared_fold_matches_the_reference_silently(dtype, op, groups):
    arrays = draw(dtype, sum(map(len, groups)), 300)
    if not is_integer(dtype) and dtype.kind != "b":
        for rank, array in enumerate(arrays):
            array[7] = -np.inf if rank else np.inf  # an invalid sum
    rooms = [np.empty(300, dtype) for _ in groups]
    out = np.empty(300, dtype)
    before = np.geterr()
    folder(op, groups, dtype)(arrays, out, rooms)
    assert np.geterr() == before
    assert_same_bits(out, reference(op, arrays, groups, dtype))
