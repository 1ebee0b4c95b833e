"""From torch's tensors to what a collective works on, and from torch's reductions to detcoll's.

A tensor without gaps is bound as it lies in memory. One with gaps, or a list that torch takes as one array, becomes
`Pieces`, which are staged. Types that detcoll has no arithmetic for travel as unsigned integers of their size; the name
of the call then says which type it is, so that ranks notice where it differs.

Tensors on CUDA stay tensors, whose memory detcoll copies from and to; `detcoll.torch.devices` says what becomes of gaps
there. What is checked is the same: an array stands for where their elements lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from detcoll.buffers import Joined, Pieces
from detcoll.errors import UsageError
from detcoll.torch import devices
from detcoll.types import BFLOAT16, is_complex, is_float, is_half

Array = NDArray[Any]
Buffer: TypeAlias = "Array | Pieces | Joined | torch.Tensor"
"""What `detcoll.buffers.bind` takes."""

_OWN = frozenset(
    {
        torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
        torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
    }
)  # fmt: skip
"""Types that NumPy has as well."""
_BY_SIZE = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


def name_of(dtype: torch.dtype) -> str:
    """Return how a call names a type that travels as bytes; empty for those that detcoll has itself."""
    return "" if dtype in _OWN or dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


def view_of(tensor: torch.Tensor, name: str = "tensor") -> Array:
    """Return the memory of a tensor as an array, with its gaps.

    Of a tensor on CUDA it only tells where elements lie, and must not be read; see `devices.is_far`.

    Raises
    ------
    UsageError
        If it has no plain memory.
    """
    if type(tensor) is not torch.Tensor:
        _check_kind(tensor, name)
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        _check_place(tensor, name)
    dtype, tensor = tensor.dtype, tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        raise UsageError(f"{name} is a lazily conjugated or negated view; pass {name}.resolve_conj().resolve_neg()")
    if tensor.is_cuda:
        return _shadow_of(tensor, name)
    if dtype in _OWN:
        return tensor.numpy()  # type: ignore[no-any-return]
    if dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)  # type: ignore[no-any-return]
    integer, own = _integers_of(dtype, name)
    return tensor.view(integer).numpy().view(own)  # type: ignore[no-any-return]


def _integers_of(dtype: torch.dtype, name: str) -> tuple[torch.dtype, Any]:
    if dtype.itemsize not in _BY_SIZE:
        raise UsageError(f"{name} has dtype {dtype}; expected one whose elements have 1, 2, 4, 8 or 16 bytes")
    return _BY_SIZE[dtype.itemsize]


class _Shadow:
    """What NumPy makes an array of that lies where a tensor does; it touches no element of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3, "data": (tensor.data_ptr(), False), "typestr": f"|V{size}", "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }  # fmt: skip


def _shadow_of(tensor: torch.Tensor, name: str) -> Array:
    if name_of(tensor.dtype):
        _integers_of(tensor.dtype, name)
    if not tensor.numel():
        return np.empty(tensor.shape, f"V{tensor.element_size()}")
    return np.asarray(_Shadow(tensor))


def _far(tensor: torch.Tensor, *, is_written: bool) -> torch.Tensor:
    """Return what a call binds instead of a tensor that is far: without gaps, of a type that detcoll has."""
    plain = devices.without_gaps(tensor, is_written=is_written).reshape(-1)
    if not name_of(tensor.dtype):
        return plain
    return plain.view(getattr(torch, np.dtype(_BY_SIZE[tensor.dtype.itemsize][1]).name))


def _check_kind(tensor: Any, name: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise UsageError(f"{name} is a {type(tensor).__name__}, which has no plain memory; expected a dense tensor")


def _check_place(tensor: torch.Tensor, name: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        what = "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
        raise UsageError(f"{name} is {what}; expected a dense tensor, such as {name}.to_dense()")
    if not (tensor.is_cuda and devices.TAKES_CUDA):
        where = tensor.device if devices.TAKES_CUDA else f"{tensor.device} of ROCm"
        raise UsageError(
            f"{name} is on {where}, and the backend 'detcoll' takes tensors on the CPU and on CUDA; use tensor.cpu(), "
            "or another backend for this group"
        )


def readable(tensor: torch.Tensor, name: str = "tensor") -> Buffer:
    """Return a tensor as one flat array that is only read."""
    array = view_of(tensor, name)
    return _far(tensor, is_written=False) if devices.is_far(tensor) else _one(array)


def writable(tensor: torch.Tensor, name: str = "tensor") -> Buffer:
    """Return a tensor as one flat array that takes a result."""
    array = view_of(tensor, name)
    _check_writable(array, name)
    return _far(tensor, is_written=True) if devices.is_far(tensor) else _one(array)


def sent(tensor: torch.Tensor) -> Array:
    """Return the values of a tensor as one flat array on the host, which is its memory if that has no gaps."""
    array = view_of(tensor)
    if devices.is_far(tensor):
        array = view_of(devices.to_host(tensor))
    return np.ascontiguousarray(array).reshape(-1)


def received(tensor: torch.Tensor) -> Buffer:
    """Return where a message for a tensor is received, on the host; calls on the same memory do not wait for it."""
    array = view_of(tensor)
    _check_writable(array, "tensor")
    if devices.is_far(tensor):
        array = view_of(devices.from_host(tensor))
    return _one(array, is_ordered=False)


def all_writable(tensors: Sequence[torch.Tensor], name: str) -> list[Buffer]:
    """Return tensors of one type as flat arrays that take results."""
    if len(tensors) == 1:
        return [writable(tensors[0], name)]
    arrays = [view_of(each, f"{name}[{index}]") for index, each in enumerate(tensors)]
    for index, array in enumerate(arrays):
        _check_writable(array, f"{name}[{index}]")
    _check_apart(arrays, name)
    pairs = zip(tensors, arrays, strict=True)
    return [_far(each, is_written=True) if devices.is_far(each) else _one(array) for each, array in pairs]


def _one(array: Array, is_ordered: bool = True) -> Buffer:
    if array.flags.c_contiguous:
        return array.reshape(-1)
    return Pieces((array,), array.dtype, is_ordered=is_ordered)


def _check_writable(array: Array, name: str) -> None:
    """Raise UsageError if elements of an array share memory."""
    if array.flags.c_contiguous:
        return
    reach = array.itemsize
    for stride, length in sorted(zip(array.strides, array.shape, strict=True)):
        if length == 1:
            continue
        if stride == 0:
            raise UsageError(
                f"{name} is expanded, so several elements share one place; expected one that can be written"
            )
        if stride < reach:  # they may interleave
            if _collide([array]):
                raise UsageError(
                    f"{name} has elements that share memory (shape {array.shape}, strides {array.strides} bytes); "
                    "expected one that can be written"
                )
            return
        reach += stride * (length - 1)


def _check_apart(arrays: Sequence[Array], name: str) -> None:
    """Raise UsageError if several arrays share memory; the elements of each are known not to."""
    spans = sorted((*byte_bounds(array), index) for index, array in enumerate(arrays) if array.size)
    reach = 0
    near: list[list[int]] = []
    for low, high, index in spans:
        if low < reach:
            near[-1].append(index)
        else:
            near.append([index])
        reach = max(reach, high)
    for group in near:
        if len(group) > 1 and _collide([arrays[each] for each in group]):
            pairs = itertools.combinations(group, 2)
            first, second = next(pair for pair in pairs if _collide([arrays[each] for each in pair]))
            raise UsageError(f"{name}[{first}] and {name}[{second}] share memory; expected tensors that do not overlap")


def _collide(arrays: Sequence[Array]) -> bool:
    """Tell whether elements share memory: mark the bytes of each one, and count those that are marked."""
    bounds = [byte_bounds(array) for array in arrays]
    begin = min(low for low, _ in bounds)
    marks = np.zeros(max(high for _, high in bounds) - begin, np.uint8)
    for array, (low, _) in zip(arrays, bounds, strict=True):
        elements = np.ndarray(array.shape, f"V{array.itemsize}", marks, low - begin, array.strides)
        elements[...] = np.void(b"\1" * array.itemsize)
    return int(np.count_nonzero(marks)) < sum(array.nbytes for array in arrays)


def joined(tensors: Sequence[torch.Tensor], name: str, *, is_written: bool) -> Buffer:
    """Return a list of tensors of one type as one flat array, one after another.

    Raises
    ------
    UsageError
        Also if they are not of one type, or there are none.
    """
    if not tensors:
        raise UsageError(f"{name}=[] is empty; expected at least one tensor")
    _alike(tensors, name)
    arrays = [view_of(each, f"{name}[{index}]") for index, each in enumerate(tensors)]
    if is_written:
        for index, array in enumerate(arrays):
            _check_writable(array, f"{name}[{index}]")
    whole = tensors[0] if len(arrays) == 1 else _adjacent(tensors, arrays)
    if whole is not None:
        return _far(whole, is_written=is_written) if devices.is_far(whole) else _one(view_of(whole))
    if is_written:
        _check_apart(arrays, name)
    if devices.is_far(tensors[0]):
        return Joined([_far(each, is_written=is_written) for each in tensors])
    return Pieces(arrays, arrays[0].dtype)


def _alike(tensors: Sequence[torch.Tensor], name: str) -> None:
    """Raise UsageError if a list has tensors of several types, or on several devices."""
    first = tensors[0]
    for index, each in enumerate(tensors):
        if each.dtype != first.dtype:
            raise UsageError(f"{name}[{index}] has dtype {each.dtype}, {name}[0] {first.dtype}; expected one type")
        if each.device != first.device:
            raise UsageError(f"{name}[{index}] is on {each.device}, {name}[0] on {first.device}; expected one device")


def _adjacent(tensors: Sequence[torch.Tensor], arrays: Sequence[Array]) -> torch.Tensor | None:
    """Return one view of tensors that lie behind each other in one storage, as those of `chunk`, else None."""
    begin = expected = tensors[0].data_ptr()
    for tensor, array in zip(tensors, arrays, strict=True):
        if not array.flags.c_contiguous or tensor.data_ptr() != expected:
            return None
        expected += array.nbytes
    first = tensors[0].detach()
    storage = first.untyped_storage()
    if expected > storage.data_ptr() + storage.nbytes():
        return None
    count = (expected - begin) // first.element_size()
    return first.as_strided((count,), (1,), first.storage_offset())


class Reduction(NamedTuple):
    """How detcoll reduces what torch asks for.

    ``op`` : the name of detcoll's operator.  ``name`` : told to other ranks where the operator alone does not tell
    calls apart.  ``enter``, ``leave``, ``dtype`` : what the values become before and after; see `Pieces`.
    ``far_enter``, ``far_leave`` : the same of tensors on devices, as tensors of their own.
    """

    op: str
    name: str = ""
    enter: Callable[[Array], Array] | None = None
    leave: Callable[[Array], Array] | None = None
    dtype: np.dtype[Any] | None = None
    far_enter: devices.Change | None = None
    far_leave: devices.Change | None = None

    def of(self, buffer: Buffer, *, is_written: bool = True) -> Buffer:
        """Return a buffer as this reduction takes it."""
        if self.enter is None and self.leave is None:
            return buffer
        if isinstance(buffer, torch.Tensor):
            return self._far(buffer, is_written)
        if isinstance(buffer, Joined):
            return Joined([self._far(each, is_written) for each in buffer.arrays])
        pieces = buffer if isinstance(buffer, Pieces) else Pieces((buffer,), buffer.dtype)
        return Pieces(pieces.arrays, self.dtype or pieces.dtype, self.enter, self.leave)

    def _far(self, tensor: torch.Tensor, is_written: bool) -> torch.Tensor:
        assert self.far_enter is not None
        return devices.changed(tensor, self.far_enter, self.far_leave, is_written=is_written)


_OPS = {
    dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg", dist.ReduceOp.PRODUCT: "prod", dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max", dist.ReduceOp.BAND: "band", dist.ReduceOp.BOR: "bor", dist.ReduceOp.BXOR: "bxor",
}  # fmt: skip
_OF_BOOL = {"sum": "bor", "prod": "band"}


def reduction_of(op: Any, dtype: torch.dtype, size: int) -> Reduction:
    """Return how detcoll does a reduction of torch over ``size`` ranks.

    Raises
    ------
    UsageError
        If elements of ``dtype`` have no such reduction.
    """
    # `isinstance` takes the bare operators for a ReduceOp too, which alone has a factor.
    kind, factor = op.__getstate__() if type(op) is dist.ReduceOp else (op, None)
    if name_of(dtype):
        raise UsageError(f"{dtype} has no arithmetic here; expected a reduction of another type, such as float32")
    if kind == dist.ReduceOp.PREMUL_SUM:
        return _premultiplied(factor, dtype)
    name = _OPS.get(kind)
    if name is None:
        raise UsageError(f"op={op} is not a reduction known here; expected one of {', '.join(sorted(_OPS.values()))}")
    if dtype == torch.bool and name in _OF_BOOL:
        return Reduction(_OF_BOOL[name], name)
    if name == "avg" and not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool:
        return _integer_average(dtype, size)
    return Reduction(name)


def _integer_average(dtype: torch.dtype, size: int) -> Reduction:
    """Return an average of integers: their sum, in 64 bits, divided by the number of ranks and rounded to zero."""

    def divide(total: Array) -> Array:
        if total.dtype.kind == "u":
            return total // np.uint64(size)
        floor = total // size
        return np.where((total < 0) & (floor * size != total), floor + 1, floor)

    def far_divide(total: torch.Tensor) -> torch.Tensor:
        if dtype != torch.uint64:
            return torch.div(total, size, rounding_mode="trunc")
        signed = total.view(torch.int64)  # torch does not divide unsigned numbers: divide half of each one, and mend it
        quotient = (signed >> 1 & 2**63 - 1) // size << 1
        return (quotient + (signed - quotient * size >= size)).view(torch.uint64)

    wide = torch.uint64 if dtype == torch.uint64 else torch.int64
    return Reduction(
        "sum", "avg", lambda values: values, divide, np.dtype(str(wide).removeprefix("torch.")),
        lambda values: values.to(wide, copy=True), far_divide,
    )  # fmt: skip


def _premultiplied(factor: Any, dtype: torch.dtype) -> Reduction:
    if not (dtype.is_floating_point or dtype.is_complex):
        raise UsageError(f"op=PREMUL_SUM of {dtype} is not defined; expected a float or complex type")
    if isinstance(factor, torch.Tensor):
        if factor.numel() != 1:
            raise UsageError(f"op=PREMUL_SUM with a factor of {factor.numel()} elements; expected one")
        factor = factor.item()

    def multiply(values: Array) -> Array:
        if is_half(values.dtype):
            return (values.astype(np.float32) * np.float32(factor)).astype(values.dtype)
        assert is_float(values.dtype) or is_complex(values.dtype)
        return values * values.dtype.type(factor)  # type: ignore[no-any-return]

    def far_multiply(values: torch.Tensor) -> torch.Tensor:
        wide = values.to(torch.float32) if dtype in (torch.float16, torch.bfloat16) else values
        return (wide * factor).to(dtype)

    return Reduction("sum", "premul_sum", multiply, far_enter=far_multiply)
