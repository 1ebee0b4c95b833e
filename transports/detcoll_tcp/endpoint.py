"""A rank's sockets."""

from __future__ import annotations

import hmac
import socket
import struct
import time
from collections.abc import Collection, Mapping
from errno import EINPROGRESS
from os import strerror

from detcoll.mailbox import Mailbox
from detcoll.names import ANSWER_S, answering
from detcoll.stream import StreamEndpoint
from detcoll.transport import Clock

_HELLO = struct.Struct("<16sI")
"""The job's token, and the rank that connects."""

IDLE_S = 10
"""How long a connection is idle before the kernel asks for the peer; firewalls forget after 30 s or more."""


class TcpEndpoint(StreamEndpoint):
    """Connects to the ports of other ranks; who shows the job's token is one of them."""

    def __init__(
        self, rank: int, token: bytes, listener: socket.socket, host: str, clock: Clock, mail: Mailbox
    ) -> None:
        super().__init__(mail, clock, rank, listener, _HELLO.pack(token, rank))
        self._token, self._host = token, host
        self._joined_by_ns = 0  # of the monotonic clock: until then names are looked up again

    @property
    def address(self) -> str:
        """Host and port at which others reach this rank."""
        return f"{self._host}:{self.listener.getsockname()[1]}"

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Say hello to the ranks that are needed; see `Endpoint.connect`."""
        self._joined_by_ns = time.monotonic_ns() + int(self.left_s(deadline_ns) * 1e9)
        super().connect(addresses, deadline_ns, needed)

    def reach(self, address: str) -> socket.socket:
        """Begin to connect, which a firewall may keep from ending for minutes."""
        host, _, port = address.rpartition(":")
        left_s = max((self._joined_by_ns - time.monotonic_ns()) / 1e9, ANSWER_S)
        family, where = answering(host, int(port), left_s)
        made = socket.socket(family)
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a small message waits for the one before
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # else a firewall forgets an idle connection
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, IDLE_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 127)  # the most: a cut of 20 minutes ends nothing
        code = made.connect_ex(where)
        if code not in (0, EINPROGRESS):
            made.close()
            raise OSError(code, strerror(code))
        return made

    def recognise(self, hello: bytes) -> int:
        """Return the rank; the comparison takes the same time for any token, so a stranger cannot guess by bytes."""
        token, rank = _HELLO.unpack(hello)
        if not hmac.compare_digest(token, self._token):
            raise ConnectionError("a stranger")
        return int(rank)
