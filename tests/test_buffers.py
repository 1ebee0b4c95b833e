"""Buffers: what `bind` accepts without a copy, what it stages, and what it refuses before anything moves."""

from __future__ import annotations

import numpy as np
import pytest

from detcoll.buffers import Pieces, bind
from detcoll.errors import UsageError
from detcoll.types import DTYPES


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
def test_a_numpy_array_is_viewed(dtype, shape):
    x = np.ones(shape, dtype)
    bound = bind(x)
    assert bound.array.shape == (x.size,)
    assert bound.array.dtype == bound.dtype == dtype
    assert bound.device == "cpu"
    assert not bound.staged
    bound.load()
    bound.array[:] = 0
    bound.store()
    assert (x == 0).all()


def test_a_fortran_array_of_one_row_is_contiguous_enough():
    x = np.ones((1, 4), order="F")
    bind(x).array[:] = 2
    assert (x == 2).all()


def test_an_unaligned_array_is_viewed():
    x = np.zeros(17, np.uint8)[1:].view(np.float32)
    bind(x).array[:] = 1
    assert x.tolist() == [1.0] * 4


def test_a_subclass_is_viewed_as_a_plain_array():
    class Tagged(np.ndarray):
        pass

    x = np.zeros(3).view(Tagged)
    bound = bind(x)
    assert type(bound.array) is np.ndarray
    bound.array[:] = 1
    assert x.tolist() == [1.0] * 3


def test_read_only_memory_serves_a_source_but_no_result():
    x = np.arange(3.0)
    x.flags.writeable = False
    with pytest.raises(UsageError, match=r"^x is read-only; expected"):
        bind(x)
    bound = bind(x, writable=False)
    bound.load()
    assert bound.array.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="writable=False"):
        bound.store()


def test_a_source_cannot_be_written_by_accident():
    x = np.arange(3.0)
    array = bind(x, writable=False).array
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 7
    assert x.flags.writeable


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (
            np.zeros((3, 2)).T,
            r"x is not C-contiguous \(shape \(2, 3\), strides \(8, 16\)\).*numpy.ascontiguousarray\(x\)",
        ),
        (np.zeros(6)[::2], r"strides \(16,\)"),
        (np.zeros(6)[::-1], r"strides \(-8,\)"),
        (np.broadcast_to(np.zeros(1), (4,)), "not C-contiguous"),
        (np.zeros((2, 2), order="F"), "not C-contiguous"),
        (np.zeros(2, "timedelta64[s]"), r"dtype timedelta64\[s\]; expected one of float16"),
        (np.zeros(2, np.clongdouble), "dtype"),
        (np.zeros(2, object), "dtype object"),
        (np.zeros(2, "U3"), "dtype <U3"),
        (np.zeros(2, "M8[s]"), "dtype datetime64"),
        (np.zeros(2, "f4,i4"), "expected one of"),
        (np.zeros(2, np.longdouble), "dtype"),
        (np.zeros(2, ">f4"), "dtype >f4 in foreign byte order"),
        (np.ma.masked_array([1.0], [True]), "masked array"),
        (3, r"x=3 is a scalar; .* numpy.array\(3\)"),
        (3.5, "is a scalar"),
        (True, "is a scalar"),
        (1j, "is a scalar"),
        (np.float32(2), "is a scalar"),
        (None, "x is a NoneType; expected a NumPy array"),
        ("text", "x is a str"),
        (b"bytes", "x is a bytes"),
        ({"a": np.zeros(2)}, "x is a dict"),
        ((np.zeros(2) for _ in range(2)), "x is a generator; .*list or tuple"),
        (np.ndarray, "x is a type"),
        ([], r"x=\[\] is empty"),
        ((), r"x=\(\) is empty"),
        ([1.0, 2.0], r"x\[0\]=1.0 is a scalar"),
        ([np.zeros(2), None], r"x\[1\] is a NoneType"),
        ([np.zeros(2), [np.zeros(2)]], r"x\[1\] is a list inside a list"),
        ([np.zeros(2), np.zeros(2, "f4")], r"x\[1\] has dtype float32, x\[0\] float64; expected one dtype"),
        ([np.zeros(2), np.zeros((2, 4))[:, 0]], r"x\[1\] is not C-contiguous"),
    ],
)
def test_what_cannot_be_used_is_refused(x, words):
    with pytest.raises(UsageError, match=words):
        bind(x)


def test_messages_call_the_argument_by_its_name():
    with pytest.raises(UsageError, match=r"^output\[1\] has dtype bool"):
        bind([np.zeros(2), np.zeros(2, bool)], name="output")


def test_a_list_is_coalesced_in_order_and_given_back():
    arrays = [np.full((2, 2), 1.0), np.empty(0), np.array(2.0), np.full(3, 3.0)]
    bound = bind(tuple(arrays))
    assert bound.staged
    bound.load()
    assert bound.array.tolist() == [1, 1, 1, 1, 2, 3, 3, 3]
    bound.array[:] += 10
    assert arrays[0].tolist() == [[1, 1], [1, 1]], "nothing is given back before store"
    bound.store()
    assert arrays[0].tolist() == [[11, 11], [11, 11]]
    assert arrays[2].item() == 12
    assert arrays[3].tolist() == [13] * 3


def test_a_list_of_one_host_array_is_viewed():
    x = np.zeros(3)
    bound = bind([x])
    assert not bound.staged
    assert np.shares_memory(bound.array, x)


def test_arrays_that_overlap_are_refused_in_a_list():
    x = np.zeros(10)
    for pair in ([x, x], [x[:6], x[5:]], [x[5:], x[:6]], [x, x.reshape(2, 5)]):
        with pytest.raises(UsageError, match="share memory"):
            bind(pair)
    assert bind([x[:5], x[5:], x[2:2]]).array.size == 10


def test_arrays_that_are_only_read_may_overlap_in_a_list():
    x = np.arange(4)
    bound = bind([x[1:], x[:2], x], writable=False)
    bound.load()
    assert bound.array.tolist() == [1, 2, 3, 0, 1, 0, 1, 2, 3]


def test_pieces_are_staged_in_their_order() -> None:
    whole = np.arange(24, dtype=np.int32).reshape(4, 6)
    pieces = Pieces((whole[:, ::2], whole[:2, 1::2]), whole.dtype)
    bound = bind(pieces)
    assert bound.staged
    assert bound.array.size == 18
    bound.load()
    assert bound.array.tolist() == [*whole[:, ::2].reshape(-1), *whole[:2, 1::2].reshape(-1)]
    bound.array[:] = -np.arange(18)
    untouched = whole[2:, 1::2].copy()
    bound.store()
    assert whole[:, ::2].reshape(-1).tolist() == [-number for number in range(12)]
    assert whole[:2, 1::2].reshape(-1).tolist() == [-number for number in range(12, 18)]
    assert (whole[2:, 1::2] == untouched).all()


def test_pieces_use_the_memory_between_their_first_and_last_byte() -> None:
    whole = np.zeros((4, 6), np.int16)
    [(begin, end)] = bind(Pieces((whole[:, 1], whole[3, :4]), whole.dtype)).spans
    address = whole.__array_interface__["data"][0]
    assert (begin - address, end - address) == (2, 2 * (3 * 6 + 4))
    assert bind(Pieces((whole[:, 1],), whole.dtype, is_ordered=False)).spans == ()
    assert bind(Pieces((whole[:0],), whole.dtype)).spans == ()


def test_values_of_pieces_change_on_their_way() -> None:
    values = np.array([3, -3], np.int8)
    pieces = Pieces((values,), np.dtype(np.int64), lambda given: given * 2, lambda found: found // 4)
    bound = bind([pieces, Pieces((np.zeros(1, np.int8),), np.dtype(np.int64))])
    bound.load()
    assert bound.array.tolist() == [6, -6, 0]
    bound.array[:] = 40, 8, 0
    bound.store()
    assert values.tolist() == [10, 2]
