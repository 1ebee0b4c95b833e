"""Buffers in device memory: CuPy, torch, the CUDA array interface and DLPack over a double, and real devices."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detcoll.buffers import bind
from detcoll.device import cuda, now
from detcoll.errors import DeadlineMissed, UsageError
from detcoll.testing.device import StrictDevice
from detcoll.types import BFLOAT16


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictDevice]:
    """Let this process have fake devices, whose streams are driven by whoever asks for an event."""
    strict = StrictDevice()
    strict.seeded(3)
    monkeypatch.setattr(cuda, "_driver", strict)
    now._shared.forget()
    yield strict
    now._shared.forget()
    assert not strict.misuses
    assert not strict.unpinned


def own_stream(device: StrictDevice, number: int = 0) -> int:
    with device.on(number):
        return device.stream(number)


def use(bound: Any, device: StrictDevice, *arrays: Any) -> list[list[Any]]:
    """Add 10 to what was bound, and return what the arrays hold then."""
    bound.load()
    bound.array[:] += 10
    bound.store()
    return [device.peek(array).reshape(-1).tolist() for array in arrays]


class FakeCupy(ModuleType):
    """What detcoll uses of CuPy: where an array is, and the current stream of each device."""

    def __init__(self, strict: StrictDevice) -> None:
        super().__init__("cupy")
        self.streams = {number: own_stream(strict, number) for number in (0, 1)}

        class FakeNdarray:
            def __init__(self, values: np.ndarray, number: int = 0, memory: Any = None) -> None:
                self.memory = strict.array(np.ascontiguousarray(values), number) if memory is None else memory
                self.device = SimpleNamespace(id=number)
                self.dtype, self.shape, self.strides, self.size = (
                    values.dtype, values.shape, values.strides, values.size,
                )  # fmt: skip
                self.flags = SimpleNamespace(c_contiguous=values.flags.c_contiguous)
                self.data = SimpleNamespace(ptr=self.memory.address)

            def __array__(self, *_: object, **__: object) -> None:
                raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

        self.ndarray = FakeNdarray
        self.cuda = SimpleNamespace(
            get_current_stream=lambda number: SimpleNamespace(ptr=self.streams[number]),
            runtime=SimpleNamespace(is_hip=False),
        )

    def from_dlpack(self, x: Any) -> Any:
        return self.ndarray(x.memory, 0, x.there)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, device: StrictDevice) -> FakeCupy:
    fake = FakeCupy(device)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return fake


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("i8"), np.dtype("c16"), BFLOAT16], ids=str)
def test_a_cupy_array_is_staged_from_its_device_after_its_stream(
    device: StrictDevice, cupy: FakeCupy, dtype: np.dtype[Any], number: int
) -> None:
    x = cupy.ndarray(np.zeros((2, 3), dtype), number)
    device.kernel(cupy.streams[number], lambda: device.poke(x.memory, np.arange(6).astype(dtype).reshape(2, 3)))
    bound = bind(x)
    assert bound.staged
    assert bound.device == f"cuda:{number}"
    assert bound.streams == {(number, cupy.streams[number])}
    assert use(bound, device, x.memory) == [[10, 11, 12, 13, 14, 15]]


def test_a_list_of_cupy_arrays_is_coalesced(device: StrictDevice, cupy: FakeCupy) -> None:
    arrays = [cupy.ndarray(values) for values in (np.full(2, 1.0), np.empty(0), np.full((2, 1), 2.0))]
    bound = bind(arrays)
    assert use(bound, device, *(each.memory for each in arrays)) == [[11, 11], [], [12, 12]]


def test_the_stream_is_that_of_the_caller_of_bind(device: StrictDevice, cupy: FakeCupy) -> None:
    """A progress thread has a current stream of its own; work of the user is on the user's."""
    x, users = cupy.ndarray(np.zeros(3)), cupy.streams[0]
    device.kernel(users, lambda: device.poke(x.memory, np.arange(3.0)))
    bound = bind(x)
    cupy.streams[0] = own_stream(device)
    thread = threading.Thread(target=bound.load)
    thread.start()
    thread.join(30)
    assert bound.array.tolist() == [0, 1, 2]


def test_what_a_caller_queued_and_does_not_end_is_no_reason_to_wait_for_ever(cupy: FakeCupy) -> None:
    strict = StrictDevice()
    cupy.streams[0] = own_stream(strict)
    strict.kernel(cupy.streams[0], lambda: None)
    cuda._driver = strict  # type: ignore[assignment]  # undone by the fixture
    bound = bind(cupy.ndarray(np.zeros(3)))
    with pytest.raises(DeadlineMissed, match="the work queued ahead of it"):
        bound.load(0)


SHARED = np.zeros(4)


def overlapping(cupy: FakeCupy) -> list[Any]:
    whole = cupy.ndarray(SHARED)
    part = SimpleNamespace(address=whole.memory.address + 8)
    return [whole, cupy.ndarray(SHARED[1:], 0, part)]


def of_rocm(cupy: FakeCupy) -> Any:
    cupy.cuda.runtime.is_hip = True
    return cupy.ndarray(SHARED)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda cupy: cupy.ndarray(np.zeros((2, 3)).T), r"strides \(8, 24\)\).*cupy.ascontiguousarray"),
        (lambda cupy: cupy.ndarray(np.zeros(3, "m8[s]")), "dtype timedelta64"),
        (lambda cupy: [cupy.ndarray(np.zeros(3), 0), cupy.ndarray(np.zeros(3), 1)], "on cuda:1, .* on cuda:0"),
        (lambda cupy: [cupy.ndarray(np.zeros(3)), np.zeros(3)], "on cpu, .* on cuda:0"),
        (overlapping, "share memory"),
        (of_rocm, "x is an array of CuPy on a device of ROCm; expected one of CUDA, or a tensor of torch"),
    ],
)
def test_cupy_arrays_that_cannot_be_used_are_refused(
    cupy: FakeCupy, make: Callable[[FakeCupy], Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        bind(make(cupy))


class CudaInterface:
    """An array of some library on a CUDA device; fields of its description may be told otherwise."""

    def __init__(self, device: StrictDevice, values: np.ndarray, number: int = 0, **other: Any) -> None:
        self.memory = device.array(values, number)
        interface = {**self.memory.__cuda_array_interface__, **other}
        self.__cuda_array_interface__ = {name: value for name, value in interface.items() if value is not ...}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let neither CuPy nor torch be there."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.parametrize("number", [0, 1])
def test_the_cuda_array_interface_needs_no_other_library(alone: None, device: StrictDevice, number: int) -> None:
    stream = own_stream(device, number)
    x = CudaInterface(device, np.zeros(3), number, stream=stream)
    device.kernel(stream, lambda: device.poke(x.memory, np.arange(3.0)))
    bound = bind(x)
    assert bound.device == f"cuda:{number}"
    assert use(bound, device, x.memory) == [[10, 11, 12]]


@pytest.mark.parametrize("read_only", [False, True])
def test_the_cuda_array_interface_says_whether_it_is_read_only(
    alone: None, device: StrictDevice, read_only: bool
) -> None:
    x = CudaInterface(device, np.arange(3.0))
    x.__cuda_array_interface__["data"] = (x.memory.address, read_only)
    with pytest.raises(UsageError, match="read-only") if read_only else nullcontext():
        bind(x)
    bound = bind(x, writable=False)
    bound.load()
    assert bound.array.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="writable=False"):
        bound.store()


@pytest.mark.parametrize(
    ("stated", "used"),
    [(0, 0), (1, 1), (2, 1), (None, 1), (..., 1), (0x70_0000_0000, 0x70_0000_0000)],
    ids=["0", "legacy", "per thread", "none", "absent", "own"],
)
def test_the_stream_that_the_cuda_array_interface_states(
    alone: None, device: StrictDevice, stated: Any, used: int
) -> None:
    """The default stream of a thread is another one on another thread, so the one that waits for it is used."""
    assert bind(CudaInterface(device, np.zeros(3), 1, stream=stated)).streams == {(1, used)}


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 3), (24, 8)), ((1, 3), (99, 8)), ((3,), (8,)), ((0, 3), (7, 7)), ((), ()), ((3, 1), (8, 0))],
)
def test_strides_of_an_array_without_gaps(
    alone: None, device: StrictDevice, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    values = np.arange(float(np.prod(shape, dtype=int))).reshape(shape)
    x = CudaInterface(device, values, strides=strides)
    assert use(bind(x), device, x.memory) == [(values + 10).reshape(-1).tolist()]


@pytest.mark.parametrize(("shape", "strides"), [((2, 3), (8, 16)), ((3,), (16,)), ((3,), (-8,)), ((2,), (0,))])
def test_strides_of_an_array_with_gaps_are_refused(
    alone: None, device: StrictDevice, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError, match="not C-contiguous"):
        bind(CudaInterface(device, np.zeros(6), shape=shape, strides=strides))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"mask": np.zeros(2)}, "mask"),
        ({"typestr": ">f8"}, "foreign byte order"),
        ({"data": (4096, False)}, "address 0x1000, which no device of CUDA has"),
    ],
)
def test_the_cuda_array_interface_is_checked(
    alone: None, device: StrictDevice, other: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        bind(CudaInterface(device, np.zeros(2), **other))


def test_arrays_without_elements_are_nowhere(alone: None, device: StrictDevice) -> None:
    """Their address may be none, and their device is not known."""
    empty = CudaInterface(device, np.zeros((0, 3)), data=(0, False))
    full = CudaInterface(device, np.arange(2.0), 1)
    bound = bind([empty, full, empty])
    assert bound.device == "cuda:1"
    assert bound.spans == ((full.memory.address, full.memory.address + 16),)
    assert bound.cut == (0, 2, 0)
    assert use(bound, device, full.memory) == [[10, 11]]
    nothing = bind([empty, empty])
    assert nothing.buffer is None
    assert not nothing.streams
    assert use(nothing, device) == []
    with pytest.raises(UsageError, match="expected one dtype"):
        bind([CudaInterface(device, np.zeros(0, np.int8)), full])


def test_blocks_of_a_list_lie_one_after_another(alone: None, device: StrictDevice) -> None:
    """As the buffer of a plan and as a staging array alike."""
    arrays = [CudaInterface(device, np.arange(float(n)) + 100 * n) for n in (4, 0, 2)]
    bound = bind(arrays, blocks=2)
    bound.load()
    assert bound.array.tolist() == [400, 401, 200, 402, 403, 201]
    assert bound.buffer is not None
    assert use(bound, device, *(each.memory for each in arrays)) == [[410, 411, 412, 413], [], [210, 211]]


class Exporter:
    """An array of some other library that speaks DLPack."""

    def __init__(self, memory: np.ndarray, device: tuple[int, int] = (1, 0), there: Any = None) -> None:
        self.memory, self.there = memory, there
        self._device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.memory.__dlpack__(**kwargs)


class OldExporter(Exporter):
    """One that knows DLPack before 1.0, whose capsules cannot say whether they may be written to."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.memory.__dlpack__()


class Refusing(Exporter):
    """One whose elements cannot be exported, as bfloat16 cannot to NumPy."""

    def __dlpack__(self, **kwargs: Any) -> Any:
        raise BufferError("not today")


def test_dlpack_on_the_host_is_viewed() -> None:
    x = Exporter(np.arange(6.0).reshape(2, 3))
    bound = bind(x)
    assert not bound.staged
    bound.array[:] = 4
    assert (x.memory == 4).all()


def test_old_dlpack_serves_a_source_but_no_result() -> None:
    with pytest.raises(UsageError, match="read-only"):
        bind(OldExporter(np.arange(3.0)))
    assert bind(OldExporter(np.arange(3.0)), writable=False).array.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [2, 13], ids=["device", "managed"])
@pytest.mark.parametrize("through", ["cupy", "torch", "torch that sees no device"])
def test_dlpack_on_a_device_goes_through_what_is_loaded(
    monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy, device: StrictDevice, kind: int, through: str
) -> None:
    there = device.array(np.arange(3.0))
    x = Exporter(np.arange(3.0), (kind, 0), there)
    if through != "cupy":
        monkeypatch.setitem(sys.modules, "torch", FakeTorch(cupy.streams[0], through == "torch"))
    if through == "torch":
        monkeypatch.setitem(sys.modules, "cupy", None)
    bound = bind(x)
    assert bound.streams == {(0, cupy.streams[0])}
    assert use(bound, device, there) == [[10, 11, 12]]


def test_dlpack_on_a_device_with_neither_says_what_to_install(alone: None) -> None:
    with pytest.raises(UsageError, match=r"needs torch or CuPy here.*pip install .*\[cuda12\].*\[cuda13\]"):
        bind(Exporter(np.arange(3.0), (2, 0)))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (Refusing(np.zeros(3)), "x is a Refusing that DLPack does not hand over: not today"),
        (Exporter(np.zeros(3), device=(8, 0)), "on DLPack device 8; expected the host or CUDA, or a tensor of torch"),
        (Exporter(np.zeros(3), device=(10, 0)), "on DLPack device 10; expected the host or CUDA"),
        (Exporter(np.zeros(3, np.longdouble)), "DLPack|dtype"),
        (Exporter(np.zeros((2, 3)).T), "not C-contiguous"),
    ],
)
def test_dlpack_that_cannot_be_used_is_refused(x: Exporter, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        bind(x)


class FakeTorch(ModuleType):
    """What detcoll uses of a torch that has CUDA: tensors of float64 on ``cuda:0``, and the current stream."""

    def __init__(self, stream: int, is_available: bool = True, has_raw: bool = True) -> None:
        super().__init__("torch")
        fake = self
        self.strided = object()
        self.version = SimpleNamespace(hip=None)
        self.cuda = SimpleNamespace(is_available=lambda: is_available)
        self._C = SimpleNamespace()
        if has_raw:
            self._C._cuda_getCurrentRawStream = {0: stream}.__getitem__
        else:
            self.cuda.current_stream = lambda device: {0: SimpleNamespace(cuda_stream=stream)}[device.index]

        class Tensor:
            __torch_dispatch__ = None
            layout, dtype, is_quantized, shape = self.strided, "torch.float64", False, (3,)
            device = SimpleNamespace(type="cuda", index=0)
            detach = is_contiguous = lambda self: self
            is_conj = is_neg = lambda self: False
            reshape = lambda self, shape: self  # noqa: E731

            def __init__(self, there: Any) -> None:
                self.there = there

            def numel(self) -> int:
                return 3

            def data_ptr(self) -> int:
                return self.there.address

        fake.Tensor = Tensor

    def from_dlpack(self, x: Exporter) -> Any:
        assert self.cuda.is_available()
        return self.Tensor(x.there)


@pytest.mark.parametrize("has_raw", [True, False])
def test_a_torch_tensor_on_cuda_needs_no_cupy(
    monkeypatch: pytest.MonkeyPatch, alone: None, device: StrictDevice, has_raw: bool
) -> None:
    stream = own_stream(device)
    torch, there = FakeTorch(stream, has_raw=has_raw), device.array(np.zeros(3))
    monkeypatch.setitem(sys.modules, "torch", torch)
    device.kernel(stream, lambda: device.poke(there, np.arange(3.0)))
    bound = bind(torch.Tensor(there))
    assert bound.device == "cuda:0"
    assert bound.streams == {(0, stream)}
    assert use(bound, device, there) == [[10, 11, 12]]


@pytest.mark.gpu
def test_real_device_memory_is_staged() -> None:
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
def test_real_torch_device_memory_is_staged(name: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros(1000, dtype=getattr(torch, name), device="cuda")
        bound = bind(x)
        bound.load()
        assert not bound.array.any()
        bound.array[:] = 1
        bound.store()
        assert bool((x == 1).all())
