"""Equal parameters on all ranks at the start of a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from detcoll import Communicator
from detcoll.errors import UsageError
from detcoll.torch.hook import communicator_of

_LARGEST_STAGED = 64 << 20
"""Tensors are coalesced up to so many bytes a call, since a list is staged; larger ones go alone, without a copy."""


def broadcast_parameters(
    of: torch.nn.Module | Mapping[str, Any] | Iterable[torch.Tensor], root: int = 0, comm: Communicator | None = None
) -> None:
    """Copy parameters and buffers of one rank to all others, so that all start with the same model.

    Parameters
    ----------
    of : module, state dict, or tensors
        Of a module: its parameters and buffers. Of a state dict: its tensors; other entries are left alone. Any dtype
        and shape; tensors with gaps in memory are copied. Shapes and order are the same on all ranks.
    root : int
        The rank of the communicator whose values all get.
    comm : Communicator, optional
        The world of `detcoll.init` if None.

    Raises
    ------
    UsageError
        If an argument is not valid. Tensors before the faulty one may have been copied.
    PlanMismatch, PeerLost, DeadlineMissed, Closed
        As for `Communicator.broadcast`.
    """
    group = communicator_of(comm)
    tensors = list(_tensors_of(of))
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"of has a {type(tensor).__name__}; expected tensors, a module or a state dict")
    with torch.no_grad():
        for batch in _batches(tensors):
            plain = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in batch]
            flat = [each.detach().reshape(-1).view(torch.uint8) for each in plain]
            group.broadcast(flat if len(flat) > 1 else flat[0], root, name="parameters")
            for tensor, copied in zip(batch, plain, strict=True):
                if copied is not tensor:
                    tensor.copy_(copied)


def _tensors_of(of: Any) -> Iterator[Any]:
    if isinstance(of, torch.nn.Module):
        yield from of.parameters()
        yield from of.buffers()
    elif isinstance(of, Mapping):
        yield from (value for value in of.values() if isinstance(value, torch.Tensor))
    elif isinstance(of, torch.Tensor):
        yield of
    else:
        try:
            yield from of
        except TypeError:
            raise UsageError(
                f"of is a {type(of).__name__}; expected a module, a state dict, or a sequence of tensors"
            ) from None


def _batches(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield tensors with elements, each memory once, in lists of up to `_LARGEST_STAGED` bytes of one device."""
    seen: set[tuple[Any, ...]] = set()
    batch: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if not tensor.numel() or place in seen:
            continue
        seen.add(place)
        nbytes = tensor.numel() * tensor.element_size()
        if batch and (size + nbytes > _LARGEST_STAGED or tensor.device != batch[0].device):
            yield batch
            batch, size = [], 0
        batch.append(tensor)
        size += nbytes
    if batch:
        yield batch
