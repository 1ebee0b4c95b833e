"""Buffers in device memory: CuPy through a strict double, the CUDA array interface, DLPack, and real devices."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from detcoll.buffers import bind
from detcoll.errors import UsageError
from detcoll.types import BFLOAT16

SHARED = np.zeros(4)


class FakeStream:
    """Copies are queued and happen when it is waited for, as late as CUDA allows."""

    def __init__(self):
        self.queue = []
        self.waits = 0

    def synchronize(self):
        self.waits += 1
        while self.queue:
            self.queue.pop(0)()


class FakeDevice:
    def __init__(self, number, cupy):
        self.id = number
        self._cupy = cupy
        self._outer = []

    def __enter__(self):
        self._outer.append(self._cupy.local.device)
        self._cupy.local.device = self.id

    def __exit__(self, *_):
        self._cupy.local.device = self._outer.pop()


class FakeCupy(ModuleType):
    """What detcoll uses of CuPy, refusing implicit host access, wrong devices and unsuited outputs as CuPy does."""

    def __init__(self):
        super().__init__("cupy")
        fake = self
        self.local = threading.local()
        self.local.device = 0
        self.streams = {0: FakeStream(), 1: FakeStream()}

        class FakeNdarray:
            def __init__(self, memory, device=0):
                self._memory = memory
                self.device = FakeDevice(device, fake)
                self.dtype, self.shape, self.strides = memory.dtype, memory.shape, memory.strides
                self.size = memory.size
                self.flags = SimpleNamespace(c_contiguous=memory.flags.c_contiguous)
                self.data = SimpleNamespace(ptr=memory.__array_interface__["data"][0])

            def __array__(self, *args, **kwargs):
                raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

            def reshape(self, shape):
                return FakeNdarray(self._memory.reshape(shape), self.device.id)

            def set(self, array, stream=None):
                fake.check(self, array, stream)
                stream.queue.append(lambda: np.copyto(self._memory, array))

        self.ndarray = FakeNdarray
        self.cuda = SimpleNamespace(get_current_stream=lambda: self.streams[self.local.device])

    def asnumpy(self, array, stream=None, order="C", out=None):
        self.check(array, out, stream)
        stream.queue.append(lambda: np.copyto(out, array._memory))
        return out

    def asarray(self, x):
        return self.ndarray(x.memory, 0)

    from_dlpack = asarray

    def check(self, array, host, stream):
        assert type(host) is np.ndarray
        assert host.dtype == array.dtype
        assert host.shape == array.shape
        assert host.flags.c_contiguous
        assert self.local.device == array.device.id, "the copy runs on another device than the array is on"
        assert stream is self.streams[array.device.id]


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("i8"), np.dtype("c16"), BFLOAT16], ids=str)
def test_a_cupy_array_is_staged_on_its_device_and_stream(cupy, dtype, device):
    memory = np.arange(6).astype(dtype).reshape(2, 3)
    bound = bind(cupy.ndarray(memory, device))
    assert bound.device == f"cuda:{device}"
    bound.load()
    assert cupy.streams[device].waits == 1
    assert bound.array.tolist() == [0, 1, 2, 3, 4, 5]
    bound.array[:] = 7
    bound.store()
    assert memory.tolist() == [[7, 7, 7], [7, 7, 7]]
    assert cupy.local.device == 0


def test_a_list_of_cupy_arrays_is_coalesced(cupy):
    memories = [np.full(2, 1.0), np.empty(0), np.full((2, 1), 2.0)]
    bound = bind([cupy.ndarray(memory) for memory in memories])
    bound.load()
    bound.array[:] *= 10
    bound.store()
    assert [memory.ravel().tolist() for memory in memories] == [[10, 10], [], [20, 20]]


def test_the_stream_is_that_of_the_caller_of_bind(cupy):
    """A progress thread has a current stream of its own; work of the user is on the user's."""
    memory = np.arange(3.0)
    bound = bind(cupy.ndarray(memory))
    users = cupy.streams[0]

    def progress() -> None:
        cupy.local.device = 0
        bound.load()

    thread = threading.Thread(target=progress)
    cupy.cuda.get_current_stream = FakeStream
    thread.start()
    thread.join(30)
    assert users.waits == 1
    assert bound.array.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda cupy: cupy.ndarray(np.zeros((2, 3)).T), r"strides \(8, 24\)\).*cupy.ascontiguousarray"),
        (lambda cupy: cupy.ndarray(np.zeros(3, "m8[s]")), "dtype timedelta64"),
        (lambda cupy: [cupy.ndarray(np.zeros(3), 0), cupy.ndarray(np.zeros(3), 1)], "on cuda:1, .* on cuda:0"),
        (lambda cupy: [cupy.ndarray(np.zeros(3)), np.zeros(3)], "on cpu, .* on cuda:0"),
        (lambda cupy: [cupy.ndarray(SHARED), cupy.ndarray(SHARED[1:])], "share memory"),
    ],
)
def test_cupy_arrays_that_cannot_be_used_are_refused(cupy, make, words):
    with pytest.raises(UsageError, match=words):
        bind(make(cupy))


class CudaInterface:
    """An array of some other library on a CUDA device."""

    def __init__(self, memory, read_only=False, mask=None):
        self.memory = memory
        address = memory.__array_interface__["data"][0]
        self.__cuda_array_interface__ = {
            "shape": memory.shape,
            "typestr": memory.dtype.str,
            "data": (address, read_only),
            "version": 3,
            "mask": mask,
        }


def test_the_cuda_array_interface_goes_through_cupy(cupy):
    x = CudaInterface(np.arange(3.0))
    bound = bind(x)
    bound.load()
    bound.array[:] += 1
    bound.store()
    assert x.memory.tolist() == [1, 2, 3]


def test_the_cuda_array_interface_is_checked(cupy):
    with pytest.raises(UsageError, match="read-only"):
        bind(CudaInterface(np.zeros(2), read_only=True))
    assert bind(CudaInterface(np.zeros(2), read_only=True), writable=False).array.size == 2
    with pytest.raises(UsageError, match="mask"):
        bind(CudaInterface(np.zeros(2), mask=np.zeros(2)))


def test_without_cupy_the_hint_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UsageError, match=r"pip install .*\[cuda12\].*\[cuda13\]"):
        bind(CudaInterface(np.zeros(2)))


@pytest.mark.gpu
def test_real_device_memory_is_staged():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    x = cupy.arange(1000, dtype=cupy.float32)
    with cupy.cuda.Stream(non_blocking=True):
        x += 1
        bound = bind(x)
        bound.load()
        np.testing.assert_array_equal(bound.array, np.arange(1, 1001))
        bound.array[:] *= 2
        bound.store()
        np.testing.assert_array_equal(cupy.asnumpy(x), 2 * np.arange(1, 1001))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bfloat16", "bool", "complex64", "complex128"])
def test_real_torch_device_memory_is_staged(name):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    x = torch.zeros(1000, dtype=getattr(torch, name), device="cuda")
    bound = bind(x)
    bound.load()
    bound.array[:] = 1
    bound.store()
    assert bool((x == 1).all())


class Exporter:
    """An array of some other library that speaks DLPack."""

    def __init__(self, memory, device=(1, 0)):
        self.memory = memory
        self._device = device

    def __dlpack_device__(self):
        return self._device

    def __dlpack__(self, **kwargs):
        return self.memory.__dlpack__(**kwargs)


class OldExporter(Exporter):
    """One that knows DLPack before 1.0, whose capsules cannot say whether they may be written to."""

    def __dlpack__(self, stream=None):
        return self.memory.__dlpack__()


class Refusing(Exporter):
    """One whose elements cannot be exported, as bfloat16 cannot to NumPy."""

    def __dlpack__(self, **kwargs):
        raise BufferError("not today")


def test_dlpack_on_the_host_is_viewed():
    x = Exporter(np.arange(6.0).reshape(2, 3))
    bound = bind(x)
    assert not bound.staged
    bound.array[:] = 4
    assert (x.memory == 4).all()


def test_old_dlpack_serves_a_source_but_no_result():
    with pytest.raises(UsageError, match="read-only"):
        bind(OldExporter(np.arange(3.0)))
    assert bind(OldExporter(np.arange(3.0)), writable=False).array.tolist() == [0, 1, 2]


def test_dlpack_on_a_device_goes_through_cupy(cupy):
    x = Exporter(np.arange(3.0), device=(2, 0))
    bound = bind(x)
    bound.load()
    bound.array[:] += 1
    bound.store()
    assert x.memory.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (Refusing(np.zeros(3)), "x is a Refusing that DLPack does not hand over: not today"),
        (Exporter(np.zeros(3), device=(8, 0)), "on DLPack device 8; expected the host, CUDA or ROCm"),
        (Exporter(np.zeros(3, np.longdouble)), "DLPack|dtype"),
        (Exporter(np.zeros((2, 3)).T), "not C-contiguous"),
    ],
)
def test_dlpack_that_cannot_be_used_is_refused(x, words):
    with pytest.raises(UsageError, match=words):
        bind(x)
