"""How the slotted transport is opened."""

from __future__ import annotations

import ipaddress
import os
import platform
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import zmq

from detcoll.errors import TransportUnavailable, UsageError
from detcoll.transport import Capabilities, Clock, Endpoint, Rendezvous, Scope, Transport
from detcoll_slotted.descriptors import is_shortage, shortage
from detcoll_slotted.endpoint import SlottedEndpoint
from detcoll_slotted.options import Options
from detcoll_slotted.roads import OWN_DESCRIPTORS

_OPEN_TIMEOUT_NS = 60_000_000_000
_LARGEST_KEPT_BYTES = 2**25 - 2**16


class SlottedTransport(Transport):
    """ZeroMQ over TCP, with windows and kernel pacing."""

    name = "slotted"
    capabilities = Capabilities(Scope.ANYWHERE, timed=True, splits=True, largest_message_bytes=2**30)
    options = frozenset(Options.__struct_fields__)

    def open(self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]) -> Endpoint:
        """Bind this rank's socket.

        Raises
        ------
        TransportUnavailable
            If this is not Linux, whose pacing and timers it needs.
        UsageError
            If an option is unknown or of the wrong type, or an address off loopback is opened without ``insecure``.
        """
        # Before anything that may fail on one rank alone: the others wait for it here.
        token = rendezvous.exchange("slotted token", os.urandom(8), clock.now_ns() + _OPEN_TIMEOUT_NS)[0]
        if platform.system() != "Linux":
            raise TransportUnavailable(f"slotted needs Linux for pacing and timers, this is {platform.system()}")
        try:
            parsed = msgspec.convert(dict(options), Options)
        except msgspec.ValidationError as error:
            raise UsageError(f"options of slotted: {error}") from error
        keep_freed_memory()
        host = rendezvous.listen_host
        if not (parsed.insecure or ipaddress.ip_address(host).is_loopback):
            raise UsageError(
                f"slotted would open {host}, which is not a loopback address, without encryption; "
                "set DETCOLL_INSECURE=1 (or pass --insecure) to allow it on a network you trust"
            )
        lacking = shortage(OWN_DESCRIPTORS)
        if lacking:
            raise TransportUnavailable(f"slotted cannot open: {lacking}")
        try:
            return SlottedEndpoint(rank, host, rendezvous.host, int.from_bytes(token, "little"), clock, parsed)
        except (OSError, zmq.ZMQError) as error:
            if is_shortage(error):
                lacking = shortage(OWN_DESCRIPTORS) or f"{error}; raise the limit with ulimit -n"
                raise TransportUnavailable(f"slotted cannot open: {lacking}") from error
            ports = "a free port" if parsed.ports is None else "a port from {} to {}".format(*parsed.ports)
            raise TransportUnavailable(f"slotted cannot bind {ports} on {host}: {error}") from error


def keep_freed_memory() -> None:
    """Let the C library keep what is freed instead of giving it back to the system.

    ZeroMQ allocates each message that it receives, and the kernel clears every page that a process gets, which took as
    long as a quarter of receiving it. glibc learns from the first block that it unmaps: from then on it keeps blocks of
    that size, and up to twice as much free memory (M_MMAP_THRESHOLD in mallopt(3)). This is the largest that it learns.
    """
    np.empty(_LARGEST_KEPT_BYTES, np.uint8)
