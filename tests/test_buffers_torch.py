"""Buffers of torch: what is viewed, what is staged, and what has no plain memory."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest

from detcoll.buffers import bind
from detcoll.errors import UsageError
from detcoll.types import BFLOAT16, DTYPES

torch = pytest.importorskip("torch")


def test_a_list_may_mix_numpy_and_torch_on_the_host():
    a, b = np.zeros(2, np.float32), torch.ones(2)
    bound = bind([a, b])
    bound.load()
    bound.array[:] += 1
    bound.store()
    assert a.tolist() == [1, 1]
    assert b.tolist() == [2, 2]


def test_numpy_and_torch_that_share_memory_are_refused_in_a_list():
    x = np.zeros(10)
    with pytest.raises(UsageError, match="share memory"):
        bind([x, torch.from_numpy(x)])


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_a_torch_tensor_is_viewed(name, shape):
    x = torch.ones(shape, dtype=getattr(torch, name))
    bound = bind(x)
    assert bound.dtype == DTYPES[name]
    assert not bound.staged
    assert bound.array.tolist() == [1.0] * x.numel()
    bound.array[:] = 0
    assert not x.any()


def test_torch_bfloat16_keeps_its_bits():
    x = torch.tensor([1.5, -2.0, float("inf"), 3e38], dtype=torch.bfloat16)
    assert bind(x).array.astype(np.float32).tolist() == x.to(torch.float32).tolist()
    assert bind(x).dtype == BFLOAT16


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_parameters_and_gradients_are_viewed(name):
    parameter = torch.nn.Parameter(torch.ones(3, dtype=getattr(torch, name)))
    (parameter * 2).sum().backward()
    bind(parameter).array[:] = 5
    bind(parameter.grad).array[:] = 7
    assert parameter.tolist() == [5] * 3
    assert parameter.grad.tolist() == [7] * 3
    assert parameter.requires_grad


def test_a_bound_array_keeps_its_tensor_alive():
    bound = bind(torch.arange(1000.0))
    junk = [torch.zeros(1000) for _ in range(50)]
    assert bound.array.tolist() == list(range(1000))
    assert len(junk) == 50


class Wrapper(torch.Tensor):
    """A tensor subclass whose elements are elsewhere, as a sharded one's are."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("touched")


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is on its way out of torch
        return torch._empty_affine_quantized([3], scale=1.0, zero_point=0, dtype=torch.qint8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(3, device="meta"), "x is a meta tensor"),
        (lambda: torch.zeros(3).to_sparse(), "x is of layout torch.sparse_coo"),
        (quantized, "x is quantized"),
        (Wrapper, "x is a Wrapper"),
        (lambda: torch.Tensor, "x is a _TensorMeta; expected a NumPy array"),
        (lambda: torch.zeros(2, 3).t(), r"strides \(1, 3\)\).*x.contiguous\(\)"),
        (lambda: torch.zeros(3).expand(2, 3), "not C-contiguous"),
        (lambda: torch.zeros(3, dtype=torch.float8_e4m3fn), "dtype torch.float8_e4m3fn; expected one of float16"),
        (lambda: torch._neg_view(torch.ones(3)), "lazily negated"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), r"lazily conjugated view; pass x.resolve_conj\(\)"),
        (lambda: torch.ones(1, dtype=torch.complex128).conj().imag, "lazily negated"),
    ],
)
def test_tensors_without_plain_memory_are_refused(make, words):
    with pytest.raises(UsageError, match=words):
        bind(make())


class DeviceTensor(torch.Tensor):
    """Host memory that says it is on a device and refuses to be seen from the host."""

    device = torch.device("xpu", 1)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert xpu:1 device type tensor to numpy")

    __array__ = numpy
    __dlpack__ = numpy


class FakeStreams:
    """The streams of torch's module of a device."""

    def __init__(self):
        self.users, self.entered = object(), []

    def current_stream(self, device):
        assert device == DeviceTensor.device
        return self.users

    @contextlib.contextmanager
    def stream(self, stream):
        self.entered.append(stream)
        yield


@pytest.mark.parametrize("name", DTYPES)
def test_a_device_tensor_is_staged_by_torch_on_the_callers_stream(monkeypatch, name):
    streams = FakeStreams()
    monkeypatch.setattr(torch, "xpu", streams)
    given = torch.arange(6) % 2 if name == "bool" else torch.arange(6)
    x = given.to(getattr(torch, name)).reshape(2, 3).as_subclass(DeviceTensor)
    bound = bind(x)
    assert bound.staged
    assert bound.device == "xpu:1"
    assert bound.dtype == DTYPES[name]
    bound.load()
    assert bound.array.tolist() == given.tolist()
    bound.array[:] = 1
    assert x.as_subclass(torch.Tensor).reshape(-1).tolist() == given.tolist()
    bound.store()
    assert x.as_subclass(torch.Tensor).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert streams.entered == [streams.users, streams.users]


def test_a_tensor_of_rocm_is_staged_by_torch(monkeypatch):
    """Its device is called cuda, but there is no driver of CUDA."""
    streams = FakeStreams()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch, "cuda", streams)
    monkeypatch.setattr(DeviceTensor, "device", torch.device("cuda", 1))
    x = torch.arange(3).as_subclass(DeviceTensor)
    bound = bind(x)
    assert bound.device == "cuda:1"
    assert bound.buffer is None
    bound.load()
    bound.array[:] += 1
    bound.store()
    assert x.as_subclass(torch.Tensor).tolist() == [1, 2, 3]
    assert streams.entered == [streams.users, streams.users]


def test_a_device_without_streams_needs_none(monkeypatch):
    monkeypatch.setattr(torch, "xpu", object())
    x = torch.arange(3).as_subclass(DeviceTensor)
    bound = bind(x)
    bound.load()
    assert bound.array.tolist() == [0, 1, 2]


def test_host_and_device_do_not_mix_in_a_list(monkeypatch):
    monkeypatch.setattr(torch, "xpu", object())
    with pytest.raises(UsageError, match=r"x\[1\] is on xpu:1, x\[0\] on cpu; expected one device"):
        bind([torch.zeros(2), torch.zeros(2).as_subclass(DeviceTensor)])
