"""The process group of torch on CUDA tensors: with a device, and without one as far as it can be.

What becomes of gaps, types, lists and reductions of tensors on a device is done by torch wherever they are. So it is
tried on tensors of the CPU too, by programs that take them for tensors on a device. Streams need a device.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from forked import TORCH, launch_forked
from ranks import Ended, launch

from detcoll.buffers import Joined, bind
from detcoll.device import cuda, now
from detcoll.errors import UsageError
from detcoll.testing.device import StrictDevice

torch = pytest.importorskip("torch")

ENVIRON = {"OMP_NUM_THREADS": "1"}


def on_cuda(*values: Any) -> Any:
    """Mark parameters of a test that needs a device."""
    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="no device of CUDA, or a torch without CUDA")
    return pytest.param(*values, marks=[pytest.mark.gpu, skipped])


def run(size: int, device: str, program: str, *arguments: object) -> Ended:
    """Run a program on ranks, without a device as if tensors were on one."""
    if device == "cuda":
        return launch(size, program, *arguments, environ=ENVIRON, timeout_s=200.0)
    return launch_forked(size, "torch_far.py", program, *arguments, modules=TORCH, environ=ENVIRON, timeout_s=200.0)


@pytest.mark.parametrize(("size", "device"), [(2, "cpu"), on_cuda(2, "cuda")])
def test_drawn_calls_give_what_numpy_gives(size: int, device: str) -> None:
    cases = 204 if device == "cuda" else 102
    ended = run(size, device, "torch_kinds.py", f"far {size}", cases, device)
    assert ended.said == {rank: [f"{cases} cases"] for rank in range(size)}, ended.err


@pytest.mark.parametrize("device", [on_cuda("cuda")])
def test_trainings_and_streams_give_what_torchs_own_backend_gives(device: str) -> None:
    own = run(2, device, "torch_cuda.py", device, "detcoll")
    other = launch(
        2, "torch_cuda.py", device, "nccl" if device == "cuda" else "gloo", environ=ENVIRON, timeout_s=200.0
    )  # fmt: skip
    assert own.code == 0, own.err
    assert sorted(other.said) == [0, 1], other.err  # whatever its code: Gloo may abort when the interpreter ends
    different = [
        f"{case} on rank {rank}: {got}, expected {wanted}"
        for rank in range(2)
        for (case, got), (_, wanted) in zip(own.said[rank], other.said[rank], strict=True)
        if not alike(got, wanted)
    ]
    assert different == []
    assert len(own.said[0]) > 8


@pytest.mark.parametrize("device", [on_cuda("cuda")])
def test_hsdp_trains_the_same_with_nccl_inside_the_sites(device: str) -> None:
    own = run(4, device, "torch_cuda.py", device, "detcoll", "hsdp")
    mixed = launch(4, "torch_cuda.py", device, "nccl", "hsdp", environ=ENVIRON, timeout_s=200.0)
    assert (own.code, mixed.code) == (0, 0), own.err + mixed.err
    assert sorted(own.said) == [0, 1, 2, 3]
    assert alike([own.said[rank] for rank in range(4)], [mixed.said[rank] for rank in range(4)])


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    return bool(one == other)


WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", WHOLE)
def test_averages_of_integers_by_torch_have_the_bits_of_those_by_numpy(name: str, size: int) -> None:
    from detcoll.torch.tensors import reduction_of

    dtype = getattr(torch, name)
    reduction = reduction_of(torch.distributed.ReduceOp.AVG, dtype, size)
    limits = np.iinfo(name)
    drawn = np.random.default_rng(size).integers(limits.min, limits.max, 1000, name, endpoint=True)
    values = np.concatenate([drawn, np.array([limits.min, limits.max, 0, 1, limits.max - 1], name)])
    entered = reduction.far_enter(torch.from_numpy(values.copy()))
    totals = values.astype(reduction.dtype)
    assert entered.numpy().dtype == reduction.dtype
    assert (entered.numpy() == reduction.enter(values)).all()
    wide = np.iinfo(reduction.dtype)
    totals = np.concatenate([totals, np.array([wide.min, wide.max, wide.max // 2 + 1, wide.min // 2], totals.dtype)])
    left = torch.zeros(len(totals), dtype=dtype).copy_(reduction.far_leave(torch.from_numpy(totals)))
    expected = np.zeros(len(totals), name)
    np.copyto(expected, reduction.leave(totals), casting="unsafe")
    assert (left.numpy() == expected).all()
    exact = [abs(int(total)) // size * (-1 if total < 0 else 1) for total in totals]
    assert reduction.leave(totals).tolist() == exact


FLOATS, COMPLEX = ["float16", "bfloat16", "float32", "float64"], ["complex64", "complex128"]


@pytest.mark.parametrize(
    ("name", "factor"),
    [*itertools.product([*FLOATS, *COMPLEX], [0.5, 1 / 3, 1e30]), *itertools.product(COMPLEX, [2.5 - 1.5j])],
    ids=str,
)
def test_scaled_values_by_torch_have_the_bits_of_those_by_numpy(name: str, factor: complex) -> None:
    from detcoll.torch.tensors import reduction_of, view_of

    dtype = getattr(torch, name)
    reduction = reduction_of(torch.distributed._make_nccl_premul_sum(torch.tensor([factor])), dtype, 2)
    drawn = torch.randn(1001, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    values = torch.cat([drawn, torch.tensor([0.0, -0.0, 1e-7, 65504.0, float("inf")], dtype=drawn.dtype)]).to(dtype)
    with np.errstate(all="ignore"):
        expected = reduction.enter(view_of(values))
    found = view_of(reduction.far_enter(values))
    assert found.dtype == expected.dtype
    if isinstance(factor, complex):  # sums of two products, which compilers may fuse
        assert np.allclose(found, expected, rtol=1e-5, equal_nan=True)
    else:
        assert np.array_equal(found.astype(complex), expected.astype(complex), equal_nan=True)


def test_where_elements_lie_is_told_without_touching_them() -> None:
    from detcoll.torch import tensors

    base = torch.arange(120, dtype=torch.float32)
    for tensor in (
        base, base[3:17], base[::7], base.view(2, 3, 4, 5).permute(3, 1, 0, 2), base.view(10, 12)[2:5, 1:9:2],
        base.view(2, 3, 4, 5).to(memory_format=torch.channels_last), base[:0], base[5], base[:1].expand(3, 4),
        base.to(torch.float8_e5m2)[::3],
    ):  # fmt: skip
        real, shadow = tensors.view_of(tensor), tensors._shadow_of(tensor, "x")
        assert (shadow.shape, shadow.itemsize, shadow.nbytes) == (real.shape, real.itemsize, real.nbytes)
        assert shadow.flags.c_contiguous == real.flags.c_contiguous
        if real.size:
            assert shadow.__array_interface__["data"][0] == real.__array_interface__["data"][0]
            assert shadow.strides == real.strides
    with pytest.raises(UsageError, match="share memory"):
        tensors._check_writable(tensors._shadow_of(base.as_strided((2, 9), (1, 1)), "x"), "x")
    with pytest.raises(UsageError, match=r"x\[0\] and x\[1\] share memory"):
        tensors._check_apart([tensors._shadow_of(each, "x") for each in (base[:7], base[6:9])], "x")
    tensors._check_apart([tensors._shadow_of(each, "x") for each in (base[::2], base[1::2])], "x")


def test_joined_arrays_are_one_flat_array() -> None:
    parts = [torch.arange(6.0).view(2, 3), torch.zeros(0), torch.tensor(7.0)]
    bound = bind(Joined(parts), blocks=7)
    bound.load()
    assert bound.array.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert Joined(parts).shape == (7,)
    bound.array[:] += 1
    bound.store()
    assert [part.tolist() for part in parts] == [[[1, 2, 3], [4, 5, 6]], [], 8]
    twice = [parts[0], parts[0]]
    assert bind(Joined(twice), writable=False).array.size == 12
    with pytest.raises(UsageError, match="share memory"):
        bind(Joined(twice))
    with pytest.raises(UsageError, match="at least one array"):
        bind(Joined([]))


def test_joined_arrays_on_a_device_are_copied_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = StrictDevice()
    monkeypatch.setattr(cuda, "_driver", strict)
    now._shared.forget()
    arrays = [strict.array(np.arange(n, dtype=np.float32), 0, 1) for n in (4, 2)]
    buffer = bind(Joined(arrays), blocks=2).buffer
    now._shared.forget()
    assert buffer is not None
    assert [(each.first, each.elems) for each in buffer.segments] == [(0, 4), (4, 2)]


@pytest.mark.parametrize("on", [[], ["meta:0"]], ids=["host", "device"])
def test_a_future_that_failed_raises_its_error_wherever_its_tensors_are(on: list[str]) -> None:
    from detcoll.torch.work import Future

    future = Future(None, on=[torch.device(each) for each in on])
    future.set_exception(UsageError("no such rank"))
    with pytest.raises(UsageError, match="no such rank"):
        future.wait()


def test_the_value_of_a_failed_future_raises_where_others_look_for_tensors_in_it() -> None:
    """A future with devices looks there itself, when it gets the value."""
    from torch._jit_internal import _extract_tensors

    from detcoll.torch.work import _Failure

    failure = _Failure(UsageError("no such rank"), is_looked_at=True)
    assert _extract_tensors(failure) == []
    for value in (failure, _Failure(UsageError("no such rank"))):
        with pytest.raises(UsageError, match="no such rank"):
            _extract_tensors(value)


def test_copies_into_place_are_done_last_first_and_once() -> None:
    from detcoll.torch import devices

    a, b, c = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)
    devices.begin()
    devices.later(a, b)
    devices.later(b, c, lambda values: values * 5)
    leftover = devices.taken()
    assert leftover is not None
    assert devices.taken() is None
    leftover.finish()
    assert a.tolist() == b.tolist() == [10.0, 10.0]
    c.fill_(0)
    leftover.finish()
    assert a.tolist() == [10.0, 10.0]


def test_what_a_refused_call_left_is_forgotten() -> None:
    from detcoll.torch import devices

    devices.later(torch.zeros(1), torch.ones(1))
    devices.begin()
    assert devices.taken() is None


def test_groups_have_cuda_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from detcoll.torch import ProcessGroup

    for has_cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_cuda=has_cuda: has_cuda)
        group = ProcessGroup.__new__(ProcessGroup)
        expected = ["cpu", "cuda"] if has_cuda else ["cpu"]
        assert [each.type for each in ProcessGroup._device_types.fget(group)] == expected
