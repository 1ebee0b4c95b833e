"""How the TCP transport is opened."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from functools import partial
from typing import Any

from detcoll.errors import TransportUnavailable, UsageError
from detcoll.mailbox import HELD_BYTES, Mailbox
from detcoll.stream import HEADER
from detcoll.transport import Capabilities, Clock, Rendezvous, Scope, Transport
from detcoll_tcp.endpoint import TcpEndpoint

_OPEN_TIMEOUT_NS = 60_000_000_000
_BACKLOG = 1024


class TcpTransport(Transport):
    """Joins ranks by TCP.

    Option ``held_bytes`` is how much of a peer's mail is held before its receive is posted, and 32 times as much while
    another receive of that peer waits, which may be behind it; see `detcoll.mailbox`.
    """

    name = "tcp"
    capabilities = Capabilities(Scope.ANYWHERE, frame_bytes=HEADER.size)
    options = frozenset({"insecure", "ports", "held_bytes"})

    def open(
        self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]
    ) -> TcpEndpoint:
        """Listen on a port.

        Raises
        ------
        UsageError
            If an option is unknown, or an address off loopback is opened without ``insecure``.
        TransportUnavailable
            If there is no port to listen on.
        """
        # Before anything that may fail on one rank alone: the others wait for it here.
        token = rendezvous.exchange("tcp token", os.urandom(16), clock.now_ns() + _OPEN_TIMEOUT_NS)[0]
        unknown = sorted(set(options) - self.options)
        if unknown:
            raise UsageError(f"options of transport 'tcp' has unknown keys {', '.join(unknown)}")
        host = rendezvous.listen_host
        if not (options.get("insecure") or ipaddress.ip_address(host).is_loopback):
            raise UsageError(
                f"tcp would open {host}, which is not a loopback address, without encryption; "
                "set DETCOLL_INSECURE=1 (or pass --insecure) to allow it on a network you trust"
            )
        try:
            listener = _listen(host, *(options.get("ports") or (0, 0)))
        except OSError as error:
            raise TransportUnavailable(f"tcp cannot listen on {host}: {error}") from error
        mail = Mailbox(
            rank,
            largest_message_bytes=self.capabilities.largest_message_bytes,
            held_bytes=options.get("held_bytes", HELD_BYTES),
        )
        return TcpEndpoint(rank, token, listener, rendezvous.host, clock, mail)


def _listen(host: str, first: int, last: int) -> socket.socket:
    """Listen on the first port of a range that is free."""
    # All interfaces of IPv6 are those of IPv4 too: a name may lead others to either.
    listening = partial(
        socket.create_server, family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG,
        dualstack_ipv6=host == "::",
    )  # fmt: skip
    for port in range(first, last):
        try:
            return listening((host, port))
        except OSError:
            continue
    return listening((host, last))
