"""NCCL, ``libnccl.so.2``, through ctypes: reductions between the devices of a site.

Whichever library brought it serves: the one that torch or CuPy has loaded, the wheel ``nvidia-nccl-cu12`` or ``-cu13``,
or the system's. Everything here is asked for without blocking, so a rank that does not come hangs nobody: a call may be
in progress when it returns, and `Clique.is_settled` tells when it is on its stream. Each clique is used by one thread,
with its device current (`Driver.on`).
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from detcoll.errors import TransportError, TransportUnavailable, UsageError

LIBRARY = "libnccl.so.2"
OLDEST = 21400
"""NCCL 2.14 was the first that need not block."""
ID_BYTES = 128

TYPES = {
    "int8": 0, "uint8": 1, "int32": 2, "uint32": 3, "int64": 4, "uint64": 5, "float16": 6, "float32": 7, "float64": 8,
    "bfloat16": 9,
}  # fmt: skip
OPERATORS = {"sum": 0, "prod": 1, "max": 2, "min": 3}

_SUCCESS, _IN_PROGRESS = 0, 7
_MAGIC = 0xCAFEBEEF


class Part(NamedTuple):
    """One call of NCCL: from ``source`` to ``target``, addresses on the device.

    ``call`` : ``reduce_scatter``, ``all_gather``, ``all_reduce``, ``reduce`` or ``broadcast``, the latter two with rank
    0 as root.  ``elems`` : elements, as that call counts them.  ``dtype`` : one of `TYPES`.  ``op`` : of `OPERATORS`.
    """

    call: str
    source: int
    target: int
    elems: int
    dtype: str
    op: str = "sum"


class Clique(ABC):
    """Ranks that reduce together, which NCCL calls a communicator."""

    @abstractmethod
    def is_settled(self) -> bool:
        """Tell whether nothing is in progress any more: it is ready, and what was started is on its stream.

        Raises
        ------
        TransportError
            If something failed, such as the connection to another rank.
        """

    @abstractmethod
    def start(self, parts: Sequence[Part], stream: int) -> None:
        """Queue calls on a stream, all of them together. All ranks start the same, in the same order.

        Raises
        ------
        TransportError
            If NCCL refuses.
        """

    @abstractmethod
    def abort(self) -> None:
        """End what is under way, and give all up. No other method may be called any more."""


class Library(ABC):
    """NCCL in this process."""

    @property
    @abstractmethod
    def version(self) -> int:
        """The version, such as 22809 for 2.28.9."""

    @abstractmethod
    def unique_id(self) -> bytes:
        """Return the id of a new clique, `ID_BYTES`, which its first rank tells the others."""

    @abstractmethod
    def join(self, unique_id: bytes, size: int, place: int, device: int) -> Clique:
        """Begin to join a clique as number ``place`` of ``size``, with ``device``, which is current."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * ID_BYTES),)


class _Config(ctypes.Structure):
    """``ncclConfig_t`` of NCCL 2.14, which later versions take too; what it lacks has the usual values there."""

    _fields_ = (("size", c_size_t), ("magic", c_uint), ("version", c_uint), ("blocking", c_int))


_BUFFERS = (c_void_p, c_void_p, c_size_t, c_int)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (POINTER(c_int),),
    "ncclGetUniqueId": (POINTER(_UniqueId),),
    "ncclCommInitRankConfig": (POINTER(c_void_p), c_int, _UniqueId, c_int, POINTER(_Config)),
    "ncclCommGetAsyncError": (c_void_p, POINTER(c_int)),
    "ncclCommAbort": (c_void_p,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclReduceScatter": (*_BUFFERS, c_int, c_void_p, c_void_p),
    "ncclAllGather": (*_BUFFERS, c_void_p, c_void_p),
    "ncclAllReduce": (*_BUFFERS, c_int, c_void_p, c_void_p),
    "ncclReduce": (*_BUFFERS, c_int, c_int, c_void_p, c_void_p),
    "ncclBroadcast": (*_BUFFERS, c_int, c_void_p, c_void_p),
}
_TEXTS: dict[str, tuple[Any, ...]] = {"ncclGetErrorString": (c_int,), "ncclGetLastError": (c_void_p,)}
_CALLS = {
    "reduce_scatter": ("ncclReduceScatter", True, False), "all_gather": ("ncclAllGather", False, False),
    "all_reduce": ("ncclAllReduce", True, False), "reduce": ("ncclReduce", True, True),
    "broadcast": ("ncclBroadcast", False, True),
}  # fmt: skip
"""By `Part.call` the function, whether it takes an operator, and whether it takes a root."""


class Nccl(Library):
    """NCCL; see `Library`.

    Parameters
    ----------
    library : str
        Its path, or a name for the linker.

    Raises
    ------
    TransportUnavailable
        If it cannot be loaded, or is too old.
    """

    def __init__(self, library: str) -> None:
        try:
            loaded = ctypes.CDLL(library)
            self._functions = {name: getattr(loaded, name) for name in (*_FUNCTIONS, *_TEXTS)}
        except (OSError, AttributeError) as error:
            raise TransportUnavailable(
                f"NCCL 2.14 or newer cannot be loaded from {library}: {error}; it comes with torch for CUDA, or with "
                "pip install nvidia-nccl-cu13 (or -cu12)"
            ) from error
        for name, argtypes in {**_FUNCTIONS, **_TEXTS}.items():
            function = self._functions[name]
            function.argtypes, function.restype = argtypes, c_char_p if name in _TEXTS else c_int
        found = c_int()
        self.call("ncclGetVersion", byref(found))
        self._version = found.value
        if self._version < OLDEST:
            raise TransportUnavailable(f"{library} is NCCL {self._version}; expected {OLDEST} or newer")

    @property
    def version(self) -> int:
        """See `Library.version`."""
        return self._version

    def unique_id(self) -> bytes:
        """See `Library.unique_id`."""
        made = _UniqueId()
        self.call("ncclGetUniqueId", byref(made))
        return bytes(made)

    def join(self, unique_id: bytes, size: int, place: int, device: int) -> Clique:
        """See `Library.join`."""
        config = _Config(ctypes.sizeof(_Config), _MAGIC, OLDEST, 0)
        handle = c_void_p()
        named = _UniqueId.from_buffer_copy(unique_id)
        self.call("ncclCommInitRankConfig", byref(handle), size, named, place, byref(config))
        return _NcclClique(self, handle)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function; raise TransportError if it fails. In progress is no failure."""
        code = self._functions[name](*arguments)
        if code not in (_SUCCESS, _IN_PROGRESS):
            raise self.error(name, code)

    def error(self, call: str, code: int, comm: c_void_p | None = None) -> TransportError:
        """Return the error of a call, in NCCL's words."""
        said = (self._functions["ncclGetErrorString"](code) or b"no description").decode(errors="replace")
        last = (self._functions["ncclGetLastError"](comm) or b"").decode(errors="replace").strip()
        return TransportError(f"{call} failed with {said} ({code})" + (f": {last}" if last else ""))


class _NcclClique(Clique):
    def __init__(self, library: Nccl, handle: c_void_p) -> None:
        self._library, self._handle = library, handle

    def is_settled(self) -> bool:
        """See `Clique.is_settled`."""
        state = c_int()
        self._library.call("ncclCommGetAsyncError", self._handle, byref(state))
        if state.value not in (_SUCCESS, _IN_PROGRESS):
            raise self._library.error("NCCL", state.value, self._handle)
        return state.value == _SUCCESS

    def start(self, parts: Sequence[Part], stream: int) -> None:
        """See `Clique.start`."""
        call = self._library.call
        call("ncclGroupStart")
        try:
            for part in parts:
                name, has_op, has_root = _CALLS[part.call]
                more = [OPERATORS[part.op]] * has_op + [0] * has_root
                call(name, part.source, part.target, part.elems, TYPES[part.dtype], *more, self._handle, stream)
        finally:
            call("ncclGroupEnd")

    def abort(self) -> None:
        """See `Clique.abort`."""
        handle, self._handle = self._handle, c_void_p()
        self._library.call("ncclCommAbort", handle)


def host_id() -> str:
    """Return what NCCL tells hosts apart by."""
    given = os.environ.get("NCCL_HOSTID")
    return given or f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text('ascii').strip()}"


def load() -> Library:
    """Return NCCL in this process.

    Raises
    ------
    TransportUnavailable
        See `Nccl`.
    UsageError
        If NCCL is told to launch in the order of the program, of which there is none here.
    """
    order = os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT", "")
    if order not in ("", "0"):
        raise UsageError(
            f"NCCL_LAUNCH_ORDER_IMPLICIT={order!r} with DETCOLL_NCCL: expected 0 or none, since several threads "
            "launch, in an order that differs between ranks"
        )
    return Nccl(next(_places(Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace"))))


def _places(maps: str) -> Iterator[str]:
    """Yield where NCCL is: in a process with such ``maps``, and in wheels."""
    for line in maps.splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.search(r"/libnccl\.so[.\d]*$", path):
            yield path
    for folder in sys.path:
        wheel = Path(folder or ".", "nvidia", "nccl", "lib", LIBRARY)
        if wheel.exists():
            yield str(wheel)
    yield LIBRARY
