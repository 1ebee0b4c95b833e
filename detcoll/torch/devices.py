"""Tensors in the memory of CUDA devices: what a call binds instead of them, and what is left to do after it.

A tensor without gaps is bound as it lies there. What a call cannot use so is copied on the current stream of the thread
that makes the call: inputs with gaps, values that a reduction changes before they are folded. Where a result has to be
changed or copied into place, `later` keeps that for the end of the call. It is done once the call has ended, by who
waits first, or else by a thread that completes a future; never by the thread that carries out calls. A call has done
with its memory when it ends, so this runs on streams that wait for nothing, and is over when it returns. So nobody has
to be ordered after it, and the allocator needs no `record_stream`: owners live until the device has done its part.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

Change = Callable[[torch.Tensor], torch.Tensor]

TAKES_CUDA = torch.version.hip is None
"""Whether tensors that torch says are on "cuda" are so; ROCm's are on "cuda" too."""


def is_far(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on a device that calls copy from and to."""
    return bool(tensor.is_cuda)


def of(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """Return the devices of those tensors that are on CUDA, each once, as a future needs them."""
    return sorted({each.device for each in tensors if each.is_cuda}, key=lambda device: device.index)


class Leftover:
    """What is left to do with the results of one call once it has ended: targets, what is copied there, how changed."""

    def __init__(self) -> None:
        self._steps: list[tuple[torch.Tensor, torch.Tensor, Change | None]] = []

    def add(self, target: torch.Tensor, source: torch.Tensor, change: Change | None) -> None:
        """Take in a copy; a later one may write what an earlier one reads, so the last one is done first."""
        self._steps.append((target, source, change))

    def finish(self) -> None:
        """Do what is left, and return when the devices have done it."""
        devices = of(target for target, _, _ in self._steps)
        with contextlib.ExitStack() as streams, torch.no_grad():
            own = [torch.cuda.Stream(device) for device in devices]
            for stream in own:
                streams.enter_context(torch.cuda.stream(stream))
            for target, source, change in reversed(self._steps):
                target.copy_(source if change is None else change(source), non_blocking=True)
            for stream in own:
                stream.synchronize()
        self._steps = []


class _Here(threading.local):
    leftover: Leftover | None = None


_here = _Here()


def begin() -> None:
    """Forget what is left of a call of this thread that was refused."""
    _here.leftover = None


def taken() -> Leftover | None:
    """Return what is left to do after the call that this thread has made since `begin`, or None."""
    leftover, _here.leftover = _here.leftover, None
    return leftover


def later(target: torch.Tensor, source: torch.Tensor, change: Change | None = None) -> None:
    """Copy ``source``, changed, into ``target`` when the call that this thread makes has ended."""
    if _here.leftover is None:
        _here.leftover = Leftover()
    _here.leftover.add(target.detach(), source.detach(), change)


def without_gaps(tensor: torch.Tensor, *, is_written: bool) -> torch.Tensor:
    """Return a tensor that a call can bind in place of ``tensor``: itself, or a copy that results come back from."""
    if tensor.is_contiguous():
        return tensor.detach()
    copied = tensor.detach().contiguous()
    if is_written:
        later(tensor, copied)
    return copied


def changed(tensor: torch.Tensor, enter: Change, leave: Change | None, *, is_written: bool) -> torch.Tensor:
    """Return a tensor of its own with the values of ``tensor`` as a reduction takes them; results come back changed."""
    with torch.no_grad():
        values = enter(tensor)
    if is_written:
        later(tensor, values, leave)
    return values


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host, once what the current stream holds is done; in pinned memory."""
    host = _host_like(tensor)
    with torch.no_grad():
        host.copy_(tensor, non_blocking=True)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return host


def from_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return memory on the host, from which ``tensor`` gets its values when the call has ended."""
    host = _host_like(tensor)
    later(tensor, host)
    return host


@contextlib.contextmanager
def streams(devices: Sequence[torch.device]) -> Iterator[None]:
    """Run a body on a thread of detcoll with a stream of its own for each device, of which the first is current.

    What a future records there holds nothing of others' work. The current device of the thread stays, since a thread
    that names none would make a context on device 0.
    """
    try:
        for device in reversed(devices):
            torch.cuda.set_stream(torch.cuda.Stream(device))
        yield
    finally:
        for device in reversed(devices):
            torch.cuda.set_stream(torch.cuda.default_stream(device))
