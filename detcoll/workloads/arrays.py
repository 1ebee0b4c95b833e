"""The arrays that are timed and computed with: of NumPy on the host, of torch or CuPy on a CUDA device.

Values are written and checked on the host. `Arrays.upload` and `Arrays.download` move them, outside of what is timed.
What workloads compute has the same names and arguments in all three libraries (`Arrays.functions`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.installation import install_command
from detcoll.transport import host_identity
from detcoll.types import BFLOAT16

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)


class Arrays(ABC):
    """Makes arrays of one library on one device. Each stands for an array of the host, of the same size and type."""

    device: str
    """What rows of results say."""

    functions: Any
    """The library, whose functions compute with its arrays."""

    def put(self, host: NDArray[Any]) -> Any:
        """Return an array with the values of ``host``, C-contiguous; on the host that array itself."""
        array = self.array(host)
        self.upload(host, array)
        return array

    def get(self, array: Any) -> NDArray[np.float32]:
        """Return the values of an array of float32 on the host, once what was queued on the device is done."""
        host = np.empty(tuple(array.shape), np.float32)
        self.download(array, host)
        return host

    def total(self, array: Any) -> int:
        """Return the sum of the bits of float32 elements, (n,), taken as numbers of 32 bits."""
        return int(array.view(np.uint32).sum(dtype=np.uint64))

    @abstractmethod
    def array(self, host: NDArray[Any]) -> Any:
        """Return a new array like ``host``, C-contiguous; its values are unspecified."""

    @abstractmethod
    def upload(self, host: NDArray[Any], array: Any) -> None:
        """Write the values of ``host`` to ``array``, and return when they are there."""

    @abstractmethod
    def download(self, array: Any, host: NDArray[Any]) -> None:
        """Write the values of ``array`` to ``host``, once what was queued on the device is done."""

    @abstractmethod
    def settle(self) -> None:
        """Return when the device has done what was queued on it."""


class HostArrays(Arrays):
    """Arrays of NumPy: the array of the host itself."""

    device = CPU
    functions = np

    def put(self, host: NDArray[Any]) -> Any:
        """See `Arrays.put`."""
        return host

    def get(self, array: Any) -> NDArray[np.float32]:
        """See `Arrays.get`."""
        return array  # type: ignore[no-any-return]

    def array(self, host: NDArray[Any]) -> Any:
        """See `Arrays.array`."""
        return host

    def upload(self, host: NDArray[Any], array: Any) -> None:
        """Do nothing: they are the same."""

    def download(self, array: Any, host: NDArray[Any]) -> None:
        """Do nothing: they are the same."""

    def settle(self) -> None:
        """Do nothing: calls on the host are over when they return."""


class TorchArrays(Arrays):
    """Tensors of torch.

    Parameters
    ----------
    place : int
        Of the devices that this process may use, the one with this number, counted round and round.
    """

    device = CUDA

    def __init__(self, place: int) -> None:
        self.functions = self._torch = import_module("torch")
        self._device = self._torch.device(CUDA, place % self._torch.cuda.device_count())

    def total(self, array: Any) -> int:
        """See `Arrays.total`; torch adds up no unsigned numbers."""
        numbers = array.view(self._torch.int32).to(self._torch.int64)
        return int((numbers & 0xFFFFFFFF).sum())

    def array(self, host: NDArray[Any]) -> Any:
        """See `Arrays.array`."""
        return self._torch.empty(host.shape, dtype=getattr(self._torch, str(host.dtype)), device=self._device)

    def upload(self, host: NDArray[Any], array: Any) -> None:
        """See `Arrays.upload`."""
        array.copy_(self._tensor(host, array))
        self.settle()

    def download(self, array: Any, host: NDArray[Any]) -> None:
        """See `Arrays.download`."""
        self._tensor(host, array).copy_(array)

    def settle(self) -> None:
        """See `Arrays.settle`."""
        self._torch.cuda.synchronize(self._device)

    def _tensor(self, host: NDArray[Any], array: Any) -> Any:
        return self._torch.from_numpy(host.view(np.uint8)).view(array.dtype)


class CupyArrays(Arrays):
    """Arrays of CuPy; ``place`` as in `TorchArrays`. The device becomes current, since CuPy computes there."""

    device = CUDA

    def __init__(self, place: int) -> None:
        self.functions = self._cupy = import_module("cupy")
        self._device = self._cupy.cuda.Device(place % self._cupy.cuda.runtime.getDeviceCount())
        self._device.use()

    def array(self, host: NDArray[Any]) -> Any:
        """See `Arrays.array`."""
        with self._device:
            return self._cupy.empty(host.shape, host.dtype)

    def upload(self, host: NDArray[Any], array: Any) -> None:
        """See `Arrays.upload`."""
        with self._device:
            array.set(host)
        self.settle()

    def download(self, array: Any, host: NDArray[Any]) -> None:
        """See `Arrays.download`."""
        with self._device:
            array.get(out=host)

    def settle(self) -> None:
        """See `Arrays.settle`."""
        self._device.synchronize()


def torch_lacks() -> str | None:
    """Return why torch makes no arrays on CUDA devices here, or None if it does."""
    if find_spec("torch") is None:
        return "torch is not installed"
    try:
        torch = import_module("torch")
    except Exception as error:  # import fails in many ways where libraries of CUDA are missing
        return f"torch cannot be used: {error}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def cupy_lacks() -> str | None:
    """Return why CuPy makes no arrays here, or None if it does."""
    if find_spec("cupy") is None:
        commands = f"{install_command('cuda12')} or {install_command('cuda13')}"
        return f"CuPy is not installed; install it with: {commands}"
    try:
        is_available = import_module("cupy").cuda.is_available()
    except Exception as error:  # as for torch
        return f"CuPy cannot be used: {error}"
    return None if is_available else "CuPy finds no CUDA device"


def require_device(device: str, dtype: np.dtype[Any]) -> None:
    """Refuse a device on which this process can make no arrays of ``dtype``.

    Raises
    ------
    UsageError
        Naming what is missing.
    """
    if device not in DEVICES:
        raise UsageError(f"device={device!r} is not known; expected {' or '.join(DEVICES)}")
    if device == CPU or (no_torch := torch_lacks()) is None:
        return
    if (no_cupy := cupy_lacks()) is not None:
        raise UsageError(f"device={CUDA!r} needs torch or CuPy with a CUDA device: {no_torch}; {no_cupy}")
    if dtype == BFLOAT16:
        raise UsageError(f"device={CUDA!r} with dtype='bfloat16' needs torch, since CuPy lacks the type: {no_torch}")


def arrays_on(device: str, comm: Any) -> Arrays:
    """Return what makes arrays on a device that `require_device` accepted: by torch if it can, else by CuPy.

    All ranks call it. A rank uses the device with its number among the ranks of its host, counted round and round.
    """
    return HostArrays() if device == CPU else arrays_of(place_on_host(comm))


def arrays_of(place: int) -> Arrays:
    """Return what makes arrays on the CUDA device with this number, counted round and round."""
    return CupyArrays(place) if torch_lacks() else TorchArrays(place)


def host_number() -> int:
    """Return a number that is equal for processes of one host."""
    return int.from_bytes(hashlib.blake2b(host_identity().encode(), digest_size=7).digest(), "big")


def place_on_host(comm: Any) -> int:
    """Return how many ranks before this one are on its host; all ranks call it."""
    hosts = np.zeros(comm.size, np.int64)
    hosts[comm.rank] = host_number()
    comm.all_reduce(hosts, op="sum")
    return int(np.count_nonzero(hosts[: comm.rank] == hosts[comm.rank]))
