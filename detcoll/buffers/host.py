"""Arrays in host memory: NumPy, torch tensors on the CPU, and what DLPack hands over."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.buffers.part import Part, check_dtype, not_contiguous
from detcoll.errors import UsageError
from detcoll.types import BFLOAT16, DTYPES


def numpy_part(x: NDArray[Any], name: str, writable: bool) -> Part:
    """Return an array of NumPy."""
    if isinstance(x, np.ma.MaskedArray):
        raise UsageError(f"{name} is a masked array, whose mask would be ignored; pass {name}.data or fill it")
    check_dtype(x.dtype, name)
    if not x.flags.c_contiguous:
        raise not_contiguous(name, x.shape, x.strides, f"numpy.ascontiguousarray({name})")
    if writable and not x.flags.writeable:
        raise UsageError(f"{name} is read-only; expected an array that the result can be written to, such as a copy")
    return _host_part(np.asarray(x).reshape(-1), name)


def _host_part(flat: NDArray[Any], name: str) -> Part:
    def load(piece: NDArray[Any]) -> None:
        np.copyto(piece, flat)

    def store(piece: NDArray[Any]) -> None:
        np.copyto(flat, piece)

    address: int = flat.__array_interface__["data"][0]
    return Part(name, flat.dtype, flat.size, "cpu", address, flat.nbytes, flat, load, store)


def torch_part(x: Any, name: str, writable: bool) -> Part:
    """Return a tensor of torch that is on the CPU."""
    torch = sys.modules["torch"]
    check_torch(torch, x, name)
    flat = x.detach().reshape(-1)
    if x.dtype == torch.bfloat16:  # numpy() does not know it; it does know int16, with the same bytes
        return _host_part(flat.view(torch.int16).numpy().view(BFLOAT16), name)
    return _host_part(flat.numpy(), name)


def check_torch(torch: ModuleType, x: Any, name: str) -> None:
    """Raise UsageError if a tensor has no plain memory, or a type or gaps that nothing here takes."""
    wrapper = type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if x.device.type == "meta" or x.is_quantized or wrapper or x.layout != torch.strided:
        kind = (
            "a meta tensor" if x.device.type == "meta"
            else "quantized" if x.is_quantized
            else f"a {type(x).__name__}" if wrapper
            else f"of layout {x.layout}"
        )  # fmt: skip
        raise UsageError(f"{name} is {kind}, which has no plain memory; expected a dense tensor")
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UsageError(f"{name} has dtype {x.dtype}; expected one of {', '.join(DTYPES)}")
    if not x.is_contiguous():
        raise not_contiguous(name, x.shape, x.stride(), f"{name}.contiguous()")
    if x.is_conj():
        raise UsageError(f"{name} is a lazily conjugated view; pass {name}.resolve_conj() and copy the result back")
    if x.is_neg():
        raise UsageError(f"{name} is a lazily negated view; pass {name}.resolve_neg() and copy the result back")
