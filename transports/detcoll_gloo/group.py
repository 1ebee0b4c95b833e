"""One process group of torch: how it is made, how memory becomes its tensors, and what its errors mean."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import Closed, ConnectError, DeadlineMissed, PeerLost, TransportError
from detcoll.transport import Clock
from detcoll.types import BFLOAT16

FOREVER = timedelta(days=365)
_END_TAG = 2**30
"""A tag that no message has."""


class Group:
    """The ranks of a job, joined by Gloo.

    Parameters
    ----------
    torch : module
        torch, with ``torch.distributed``.
    devices : list
        What Gloo connects over; see `make_devices`.
    store : Store or None
        The server of the store on rank 0; None elsewhere.
    ranks : sequence of int, optional
        The members as errors name them.
    """

    def __init__(
        self, torch: Any, rank: int, size: int, devices: list[Any], store: Any, clock: Clock,
        ranks: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.torch = torch
        self.ranks = tuple(range(size) if ranks is None else ranks)
        self.rank = rank
        self.size = size
        self._devices = devices
        self._store = store
        self._clock = clock
        self._group: Any = None
        self._starting = threading.Lock()
        self._has_ended = False

    @property
    def gloo(self) -> Any:
        """The process group itself.

        Raises
        ------
        Closed
            If the endpoint was closed, maybe by another thread.
        """
        if self._group is None:
            raise Closed("the Gloo endpoint is closed")
        return self._group

    def join(self, address: str, deadline_ns: int) -> None:
        """Connect to all other ranks.

        Raises
        ------
        ConnectError
            If not all of them are there at the deadline; names them.
        """
        distributed = self.torch.distributed
        try:
            if self._store is None:
                host, _, port = address.rpartition(":")
                timeout = self.timeout(deadline_ns)
                self._store = distributed.TCPStore(host, int(port), None, False, timeout, wait_for_workers=False)
            self._store.set(f"here/{self.rank}", b"1")
            kind = distributed.ProcessGroupGloo
            options = kind._Options()
            options._devices = self._devices
            options._timeout = self.timeout(deadline_ns)
            options._threads = 2
            self._group = kind(self._store, self.rank, self.size, options)
        except RuntimeError as error:
            missing = self._missing()
            raise ConnectError(f"Gloo did not join all ranks before the deadline; {missing}: {error}") from error

    def part(self, ranks: Sequence[int], key: int, deadline_ns: int) -> Group:
        """Connect some ranks to each other, on connections of their own; all of them call it.

        Raises
        ------
        Closed
            If this group was closed.
        ConnectError
            If not all of them are there at the deadline; names them.
        """
        if self._store is None:
            raise Closed("the Gloo endpoint is closed")
        store = self.torch.distributed.PrefixStore(f"group/{key:016x}", self._store)
        names = [self.ranks[rank] for rank in ranks]
        own = list(ranks).index(self.rank)
        part = Group(self.torch, own, len(names), self._devices, store, self._clock, names)
        part.join("", deadline_ns)
        return part

    def start_send(self, tensor: Any, peer: int, tag: int) -> Any:
        """Return a send under way; a RuntimeError, as Gloo's own, once the connections are closed."""
        with self._starting:
            self._require_open()
            return self._group.send([tensor], peer, tag)

    def start_recv(self, tensor: Any, peer: int, tag: int) -> Any:
        """Return a receive under way; a RuntimeError, as Gloo's own, once the connections are closed."""
        with self._starting:
            self._require_open()
            return self._group.recv([tensor], peer, tag)

    def end(self) -> None:
        """Close all connections: whatever waits for Gloo here fails, and the peers see that this rank is gone.

        Gloo closes a group's connections when a wait times out, and in no other way that wakes all waits up. What is
        started meanwhile may neither be done nor fail, so nothing is.
        """
        with self._starting:
            self._has_ended = True
            self._close_connections()

    def _require_open(self) -> None:
        if self._has_ended:
            raise RuntimeError("the connections are closed")

    def _close_connections(self) -> None:
        group = self._group  # another thread may forget it
        for step in range(1, self.size if group is not None else 0):
            with contextlib.suppress(RuntimeError):
                nothing = self.torch.empty(1, dtype=self.torch.uint8)
                group.recv([nothing], (self.rank + step) % self.size, _END_TAG).wait(timedelta(milliseconds=1))

    def forget(self) -> None:
        """Give the group and the store back; no one may use them any more."""
        self._group = self._store = None

    def tensor(self, array: NDArray[Any]) -> Any:
        """Return a tensor of the memory of ``array``."""
        if array.dtype == BFLOAT16:
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def bytes_tensor(self, view: memoryview) -> Any:
        """Return a tensor of the memory of ``view``, also where that is read-only: Gloo only reads what it sends."""
        return self.torch.from_numpy(np.asarray(_Memory(view)))

    def wait(self, start: Callable[[], Any], deadline_ns: int) -> None:
        """Start a collective and wait until it is done.

        Raises
        ------
        DeadlineMissed, PeerLost
            All connections are closed then, as after any other exception, and the memory of the collective is no longer
            in use.
        """
        work = None
        try:
            work = start()
            work.wait(self.timeout(deadline_ns))
        except BaseException as error:  # an interruption, too, would leave a collective that nobody waits for
            self.end()
            if work is not None:
                with contextlib.suppress(RuntimeError):
                    work.wait(FOREVER)  # ends at once, since its connections are closed
            if isinstance(error, RuntimeError):
                raise self.error(error) from error
            raise

    def error(self, error: RuntimeError, peer: int | None = None) -> TransportError:
        """Return what an error of Gloo means."""
        if "timed out" in str(error).lower():
            return DeadlineMissed(f"Gloo did not end before the deadline; at least one rank did not take part: {error}")
        return PeerLost(f"Gloo lost {'a rank' if peer is None else f'rank {peer}'}: {error}")

    def timeout(self, deadline_ns: int) -> timedelta:
        """Return the time left, in the form that torch takes; it counts milliseconds, and 0 means no limit."""
        return timedelta(milliseconds=max(1, (deadline_ns - self._clock.now_ns()) // 10**6))

    def _missing(self) -> str:
        """Say who never came, as far as the store can be asked."""
        if self._store is None:
            return "rank 0 has no store"
        with contextlib.suppress(RuntimeError):
            missing = [name for rank, name in enumerate(self.ranks) if not self._store.check([f"here/{rank}"])]
            return f"ranks {missing} never came" if missing else "all came, but not all connected"
        return "the store of rank 0 does not answer"


class _Memory:
    """Memory in the form that NumPy takes, without its being read-only."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        address = np.frombuffer(view, np.uint8).ctypes.data
        self.__array_interface__ = {"shape": (view.nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def make_devices(torch: Any, host: str) -> list[Any]:
    """Return what Gloo connects over: the interfaces in ``GLOO_SOCKET_IFNAME``, or the one that has ``host``.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    kind = torch.distributed.ProcessGroupGloo
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if names:
        return [kind.create_device(interface=name) for name in names]
    return [kind.create_device(hostname=host)]


def open_store(torch: Any, host: str, told: str) -> tuple[Any, str]:
    """Return the server of a store that listens at ``host`` alone, and the address at which others reach it."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    port = listener.getsockname()[1]
    store = torch.distributed.TCPStore(
        host, port, None, True, timedelta(seconds=60), wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, f"{told}:{port}"
