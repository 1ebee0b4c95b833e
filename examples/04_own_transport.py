"""A transport of your own in one file: Unix sockets between the ranks of a host.

As a program it registers the transport and reduces over it; as a test module it runs the contract that detcoll's own
transports pass::

    detcoll run -n 4 examples/04_own_transport.py
    python -m pytest examples/04_own_transport.py

An installed package needs no `register`: it names its class under the entry-point group ``detcoll.transports``, as
``transports/detcoll_tcp`` does, which is this example for ranks anywhere. docs/guides/transports.md goes through it
step by step, and says what to write for a transport that does not move bytes by stream sockets.

Needs: ``pip install -e .``; its tests need pytest, which ``pip install -e ".[bench]"`` brings.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

import detcoll
from detcoll.mailbox import Mailbox
from detcoll.registry import register
from detcoll.stream import HEADER, StreamEndpoint
from detcoll.transport import Capabilities, Clock, Rendezvous, Scope, Transport

HELLO = struct.Struct("<I")  # the rank that connects


@register
class UnixTransport(Transport):
    """Joins the ranks of one host; `detcoll.init(transport="unix")`."""

    name = "unix"
    capabilities = Capabilities(scope=Scope.HOST, frame_bytes=HEADER.size)

    def open(
        self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]
    ) -> UnixEndpoint:
        """Listen on a socket in a directory that no other user can enter."""
        return UnixEndpoint(rank, size, clock)


class UnixEndpoint(StreamEndpoint):
    """A rank's sockets."""

    def __init__(self, rank: int, size: int, clock: Clock) -> None:
        self._directory = tempfile.mkdtemp(prefix="detcoll-")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.join(self._directory, "socket"))
        listener.listen(size)
        super().__init__(Mailbox(rank), clock, rank, listener, HELLO.pack(rank))

    @property
    def address(self) -> str:
        """The path of the socket that this endpoint listens on."""
        return os.path.join(self._directory, "socket")

    def reach(self, address: str) -> socket.socket:
        """Connect, which takes no time on one host."""
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(address)
        except OSError:
            made.close()
            raise
        return made

    def recognise(self, hello: bytes) -> int:
        """Return the rank: who can enter the directory is no stranger."""
        return int(HELLO.unpack(hello)[0])

    def leave(self) -> None:
        """Close all sockets, and remove the directory."""
        super().leave()
        shutil.rmtree(self._directory, ignore_errors=True)


if "pytest" in sys.modules:
    from detcoll.testing import ThreadFabric, TransportContract

    class TestUnix(TransportContract):
        """The contract, with ranks as threads."""

        capabilities = UnixTransport.capabilities

        def fabric(self, n: int) -> ThreadFabric:
            """Join ``n`` ranks."""
            return ThreadFabric(UnixTransport(), n)

        def clogged_fabric(self) -> ThreadFabric:
            """Join two ranks; a socket's buffer is all that one takes before it polls."""
            return ThreadFabric(UnixTransport(), 2)


if __name__ == "__main__":
    comm = detcoll.init(transport="unix")
    x = np.full(1000, comm.rank + 1, dtype=np.float32)
    detcoll.all_reduce(x, op="sum")
    if comm.rank == 0:
        print(f"{comm.size} ranks over {comm.transport}: every element is {x[0]:g}")
    detcoll.finalize()
