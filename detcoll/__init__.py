"""Collective communication for training that spans sites, with timing known before it starts.

>>> import numpy as np
>>> import detcoll
>>> comm = detcoll.init()
>>> gradients = np.ones(4, np.float32)
>>> detcoll.all_reduce(gradients, op="avg")
>>> detcoll.finalize()
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, Literal, overload

from detcoll import errors
from detcoll.communicator import Communicator, open_communicator
from detcoll.errors import DetcollError, UsageError
from detcoll.runtime import Work
from detcoll.topology import Topology
from detcoll.types import ReduceOp
from detcoll.uncaught import report_to_launcher, show_own_errors_short
from detcoll.version import VERSION

__version__ = VERSION

__all__ = [
    "Communicator",
    "DetcollError",
    "ReduceOp",
    "Topology",
    "Work",
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object",
    "communicator",
    "errors",
    "finalize",
    "gather",
    "init",
    "rank",
    "recv",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
    "size",
]

report_to_launcher()

_lock = threading.Lock()
_current: Communicator | None = None


def init(
    transport: str = "auto",
    topology: Topology | str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    reproducible: bool | None = None,
) -> Communicator:
    """Meet the other ranks of this job and open the communicator that the functions of this module use.

    The rank and the number of ranks are read from the environment variables of ``detcoll run``, ``mpirun``/``mpiexec``
    (MPICH and Open MPI), ``torchrun`` or ``srun``. A process without a launcher is a job of one rank.

    From here on, an error of detcoll that the program does not catch is shown in one line; ``DETCOLL_LOG=debug`` shows
    its traceback. A `sys.excepthook` of the program's own is left alone.

    Parameters
    ----------
    transport : str
        ``auto``, or a name: ``slotted``, ``shm``, ``mpi``, ``gloo``, ``tcp``. DETCOLL_TRANSPORT takes precedence.
    topology : Topology or path, optional
        Sites, their lines and delays; by default one site. DETCOLL_TOPOLOGY takes precedence.
    timeout : float, optional
        Seconds for opening the job, and for which a collective may make no progress once it has begun; 600 by default.
        DETCOLL_TIMEOUT takes precedence. A broken connection is tolerated for 30 s, or for this time if it is shorter.
    reproducible : bool, optional
        True: every transport keeps the documented fold order. By default a transport may use a faster order.

    Returns
    -------
    Communicator

    Raises
    ------
    UsageError
        If an argument or an environment variable is not valid, ranks disagree, or this process already has a
        communicator.
    ConnectError
        If not all ranks joined within ``timeout``; names the missing ones.
    TransportUnavailable
        If the transport cannot be used on this system; says what is missing.
    """
    global _current
    show_own_errors_short()
    with _lock:
        if _current is not None and _current.usable:
            raise UsageError("init() was called twice; call detcoll.finalize() first")
        _current = open_communicator(os.environ, transport, topology, timeout, reproducible)
        return _current


def communicator() -> Communicator:
    """Return the communicator that `init` opened.

    Raises
    ------
    UsageError
        If `init` was not called, or `finalize` was called since.
    """
    if _current is None:
        raise UsageError("call detcoll.init() first")
    return _current


@overload
def all_reduce(
    x: Any, op: str | ReduceOp = "sum", async_op: Literal[False] = False, *, timeout: float | None = None,
    name: str = "",
) -> None: ...  # fmt: skip
@overload
def all_reduce(
    x: Any, op: str | ReduceOp = "sum", *, async_op: Literal[True], timeout: float | None = None, name: str = ""
) -> Work: ...
@overload
def all_reduce(x: Any, op: str | ReduceOp, async_op: Literal[True]) -> Work: ...
@overload
def all_reduce(
    x: Any, op: str | ReduceOp = "sum", async_op: bool = False, *, timeout: float | None = None, name: str = ""
) -> Work | None: ...


def all_reduce(
    x: Any, op: str | ReduceOp = "sum", async_op: bool = False, *, timeout: float | None = None, name: str = ""
) -> Work | None:
    """Reduce ``x`` over all ranks, in place; see `Communicator.all_reduce`."""
    return communicator().all_reduce(x, op, async_op, timeout=timeout, name=name)


@overload
def broadcast(
    x: Any, root: int = 0, async_op: Literal[False] = False, *, timeout: float | None = None, name: str = ""
) -> None: ...
@overload
def broadcast(
    x: Any, root: int = 0, *, async_op: Literal[True], timeout: float | None = None, name: str = ""
) -> Work: ...
@overload
def broadcast(x: Any, root: int, async_op: Literal[True]) -> Work: ...
@overload
def broadcast(
    x: Any, root: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
) -> Work | None: ...


def broadcast(
    x: Any, root: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
) -> Work | None:
    """Copy ``x`` of rank ``root`` into ``x`` of all ranks; see `Communicator.broadcast`."""
    return communicator().broadcast(x, root, async_op, timeout=timeout, name=name)


@overload
def barrier(async_op: Literal[False] = False, *, timeout: float | None = None, name: str = "") -> None: ...
@overload
def barrier(async_op: Literal[True], *, timeout: float | None = None, name: str = "") -> Work: ...
@overload
def barrier(async_op: bool = False, *, timeout: float | None = None, name: str = "") -> Work | None: ...


def barrier(async_op: bool = False, *, timeout: float | None = None, name: str = "") -> Work | None:
    """Block until every rank has called it; see `Communicator.barrier`."""
    return communicator().barrier(async_op, timeout=timeout, name=name)


def reduce(
    x: Any, root: int = 0, op: str | ReduceOp = "sum", async_op: bool = False, *, timeout: float | None = None,
    name: str = "",
) -> Any:  # fmt: skip
    """Reduce ``x`` over all ranks into ``x`` of rank ``root``; see `Communicator.reduce`."""
    return communicator().reduce(x, root, op, async_op, timeout=timeout, name=name)


def all_gather(
    x: Any, out: Any = None, counts: Sequence[int] | None = None, async_op: bool = False, *,
    timeout: float | None = None, name: str = "",
) -> Any:  # fmt: skip
    """Concatenate ``x`` of all ranks on every rank; see `Communicator.all_gather`."""
    return communicator().all_gather(x, out, counts, async_op, timeout=timeout, name=name)


def reduce_scatter(
    x: Any, out: Any = None, op: str | ReduceOp = "sum", counts: Sequence[int] | None = None, async_op: bool = False,
    *, timeout: float | None = None, name: str = "",
) -> Any:  # fmt: skip
    """Reduce ``x`` over all ranks and give each its block of the result; see `Communicator.reduce_scatter`."""
    return communicator().reduce_scatter(x, out, op, counts, async_op, timeout=timeout, name=name)


def gather(
    x: Any, root: int = 0, out: Any = None, counts: Sequence[int] | None = None, async_op: bool = False, *,
    timeout: float | None = None, name: str = "",
) -> Any:  # fmt: skip
    """Concatenate ``x`` of all ranks on rank ``root``; see `Communicator.gather`."""
    return communicator().gather(x, root, out, counts, async_op, timeout=timeout, name=name)


def scatter(
    x: Any, root: int = 0, out: Any = None, counts: Sequence[int] | None = None, async_op: bool = False, *,
    timeout: float | None = None, name: str = "",
) -> Any:  # fmt: skip
    """Give each rank its block of ``x`` of rank ``root``; see `Communicator.scatter`."""
    return communicator().scatter(x, root, out, counts, async_op, timeout=timeout, name=name)


def all_to_all(
    x: Any, out: Any = None, counts: Sequence[int] | None = None, out_counts: Sequence[int] | None = None,
    async_op: bool = False, *, timeout: float | None = None, name: str = "",
) -> Any:  # fmt: skip
    """Send a block of ``x`` to every rank, and get one from each; see `Communicator.all_to_all`."""
    return communicator().all_to_all(x, out, counts, out_counts, async_op, timeout=timeout, name=name)


def broadcast_object(value: Any = None, root: int = 0, *, timeout: float | None = None, name: str = "") -> Any:
    """Return a small object of rank ``root`` on all ranks; see `Communicator.broadcast_object`."""
    return communicator().broadcast_object(value, root, timeout=timeout, name=name)


def all_gather_object(value: Any, *, timeout: float | None = None, name: str = "") -> list[Any]:
    """Return small objects of all ranks in rank order; see `Communicator.all_gather_object`."""
    return communicator().all_gather_object(value, timeout=timeout, name=name)


@overload
def send(
    x: Any, dst: int, tag: int = 0, async_op: Literal[False] = False, *, timeout: float | None = None, name: str = ""
) -> None: ...
@overload
def send(
    x: Any, dst: int, tag: int = 0, *, async_op: Literal[True], timeout: float | None = None, name: str = ""
) -> Work: ...
@overload
def send(x: Any, dst: int, tag: int, async_op: Literal[True]) -> Work: ...
@overload
def send(
    x: Any, dst: int, tag: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
) -> Work | None: ...


def send(
    x: Any, dst: int, tag: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
) -> Work | None:
    """Send ``x`` to rank ``dst``, which takes it with `recv`; see `Communicator.send`."""
    return communicator().send(x, dst, tag, async_op, timeout=timeout, name=name)


@overload
def recv(
    x: Any, src: int | None = None, tag: int = 0, async_op: Literal[False] = False, *, timeout: float | None = None,
    name: str = "",
) -> int: ...  # fmt: skip
@overload
def recv(
    x: Any, src: int | None = None, tag: int = 0, *, async_op: Literal[True], timeout: float | None = None,
    name: str = "",
) -> Work: ...  # fmt: skip
@overload
def recv(x: Any, src: int | None, tag: int, async_op: Literal[True]) -> Work: ...
@overload
def recv(
    x: Any, src: int | None = None, tag: int = 0, async_op: bool = False, *, timeout: float | None = None,
    name: str = "",
) -> Work | int: ...  # fmt: skip


def recv(
    x: Any, src: int | None = None, tag: int = 0, async_op: bool = False, *, timeout: float | None = None,
    name: str = "",
) -> Work | int:  # fmt: skip
    """Receive into ``x`` what rank ``src`` (None: any rank) sends; see `Communicator.recv`."""
    return communicator().recv(x, src, tag, async_op, timeout=timeout, name=name)


def rank() -> int:
    """Return the number of this rank in the job, from 0."""
    return communicator().rank


def size() -> int:
    """Return the number of ranks in the job."""
    return communicator().size


def finalize(timeout: float = 10.0) -> None:
    """Wait for all calls to end and release all resources; see `Communicator.finalize`. Does nothing without `init`."""
    global _current
    with _lock:
        current, _current = _current, None
    if current is not None:
        current.finalize(timeout)
