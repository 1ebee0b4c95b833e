"""One rank of a `detcoll.testing.worlds.World`: ``python -m detcoll.testing.worker``, started by the world."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Collection, Mapping
from multiprocessing.connection import Client, Connection
from typing import Any

from detcoll.clock import MonotonicClock
from detcoll.errors import ConnectError
from detcoll.testing.fabric import CLOSE_TIMEOUT_NS, TIMEOUT_NS, Here
from detcoll.testing.worlds import ADDRESS_VARIABLE, ORDER_VARIABLE
from detcoll.transport import Endpoint, Transport

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK")


class Worker:
    """Carries out the orders of a world on one rank."""

    def __init__(self, connection: Connection, rank: int) -> None:
        self._connection = connection
        self._rank = rank
        self._clock = MonotonicClock()
        self._transport: Transport | None = None
        self._endpoint: Endpoint | None = None
        self._size = 0

    host = listen_host = "127.0.0.1"

    def serve(self) -> None:
        """Carry out orders until the world hangs up."""
        while True:
            try:
                what, *details = self._connection.recv()
            except EOFError:
                return
            try:
                answer = ("answer", getattr(self, f"do_{what}")(*details))
            except BaseException:
                answer = ("error", traceback.format_exc())
            self._connection.send(answer)

    def exchange(self, name: str, payload: bytes, deadline_ns: int) -> list[bytes]:
        """Serve as the rendezvous of this rank."""
        self._connection.send(("exchange", name, payload))
        waits = self._connection.poll(max(0, deadline_ns - self._clock.now_ns()) / 1e9)
        answers: list[bytes] | None = self._connection.recv() if waits else None
        if answers is None:
            raise ConnectError(f"not every rank exchanged {name!r}")
        return answers

    def do_open(self, path: str, options: Mapping[str, Any], needed: Collection[int] | None) -> None:
        """Open and connect an endpoint of the transport at ``path``."""
        module, _, name = path.partition(":")
        self._transport = getattr(importlib.import_module(module), name)()
        assert isinstance(self._transport, Transport)
        deadline_ns = self._clock.now_ns() + TIMEOUT_NS
        self._size = len(self.exchange("size", b"", deadline_ns))
        self._endpoint = self._transport.open(self._rank, self._size, self, self._clock, options)
        addresses = self.exchange("addresses", self._endpoint.address.encode(), deadline_ns)
        self._endpoint.connect({rank: text.decode() for rank, text in enumerate(addresses)}, deadline_ns, needed)

    def do_run(self, module: str, file: str, name: str, arguments: Mapping[str, Any]) -> Any:
        """Run a program."""
        assert self._endpoint is not None
        assert self._transport is not None
        here = Here(self._rank, self._size, self._endpoint, self._transport.capabilities, self._meet, self._clock)
        return getattr(_imported(module, file), name)(here, **arguments)

    def do_close(self) -> None:
        """Close the endpoint."""
        if self._endpoint is not None:
            self._endpoint.close(self._clock.now_ns() + CLOSE_TIMEOUT_NS)

    def do_abort(self) -> None:
        """Abort the endpoint."""
        if self._endpoint is not None:
            self._endpoint.abort()

    def _meet(self) -> None:
        self.exchange("meet", b"", self._clock.now_ns() + TIMEOUT_NS)


def _imported(module: str, file: str) -> Any:
    """Return a module by name, or from its file where it is in no package."""
    if module in sys.modules:
        return sys.modules[module]
    if module.startswith("detcoll"):
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def main() -> None:
    """Join the world whose socket the environment names."""
    rank = int(next(os.environ[name] for name in RANK_VARIABLES if name in os.environ))
    order = os.environ.get(ORDER_VARIABLE)
    if order is not None:
        rank = int(order.split(",")[rank])
    connection = Client(os.environ[ADDRESS_VARIABLE], family="AF_UNIX")
    connection.send(rank)
    Worker(connection, rank).serve()


if __name__ == "__main__":
    main()
