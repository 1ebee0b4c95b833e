"""Opens endpoints of Gloo."""

from __future__ import annotations

import importlib
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detcoll.errors import TransportUnavailable, UsageError
from detcoll.installation import install_command
from detcoll.transport import Capabilities, Clock, Rendezvous, Scope, Transport
from detcoll.types import DTYPES, ReduceOp
from detcoll_gloo.endpoint import GlooEndpoint
from detcoll_gloo.group import Group, make_devices, open_store
from detcoll_gloo.mail import FRAME_BYTES

_DTYPES = frozenset(DTYPES) - {"int16", "uint16", "uint32", "uint64"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of the transport. ``compare`` : whether ranks compare what they call, which costs a round trip a call."""

    unexpected_bytes: int = 2**26
    open_timeout_ns: int = 60 * 10**9
    compare: bool = True


class GlooTransport(Transport):
    """Gloo's collectives, and messages over its connections; see the package's text."""

    name = "gloo"
    options = frozenset({"compare"})
    capabilities = Capabilities(
        scope=Scope.ANYWHERE,
        native=frozenset(
            {"all_reduce", "broadcast", "barrier", "reduce", "all_gather", "gather", "scatter", "all_to_all"}
        ),
        native_groups=True,
        native_dtypes=_DTYPES,
        native_ops=frozenset(ReduceOp),
        native_lacks=frozenset({("complex64", ReduceOp.PROD), ("complex128", ReduceOp.PROD)}),
        frame_bytes=FRAME_BYTES,
    )

    def open(
        self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]
    ) -> GlooEndpoint:
        """Open this rank's endpoint.

        Raises
        ------
        UsageError
            If an option is unknown or no whole number.
        TransportUnavailable
            On all ranks, if one of them lacks torch or its Gloo backend.
        ConnectError
            If not all ranks come before ``open_timeout_ns`` have passed.
        """
        settings = _settings(options)
        torch, devices, trouble = _load(rendezvous.listen_host)
        answers = rendezvous.exchange("gloo", trouble.encode(), clock.now_ns() + settings.open_timeout_ns)
        for peer, answer in enumerate(answers):
            if answer:
                raise TransportUnavailable(f"transport 'gloo' cannot be used: on rank {peer}, {answer.decode()}")
        store, address = open_store(torch, rendezvous.listen_host, rendezvous.host) if rank == 0 else (None, "")
        group = Group(torch, rank, size, devices, store, clock)
        return GlooEndpoint(
            group, address, clock, self.capabilities, settings.unexpected_bytes, compare=settings.compare
        )  # fmt: skip


def _settings(options: Mapping[str, Any]) -> Settings:
    unknown = sorted(set(options) - {"unexpected_bytes", "open_timeout_ns", "compare"})
    if unknown:
        raise UsageError(f"options of transport 'gloo' has unknown keys {', '.join(unknown)}")
    if not isinstance(options.get("compare", True), bool):
        raise UsageError(f"compare={options['compare']!r} must be True or False")
    for name, value in options.items():
        if name != "compare" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UsageError(f"{name}={value!r} must be a whole number, 0 or more")
    return Settings(**options)


def _load(host: str) -> tuple[Any, list[Any], str]:
    """Return torch and what Gloo connects over, or why it cannot be used."""
    try:
        torch = importlib.import_module("torch")
        distributed = importlib.import_module("torch.distributed")
    except ImportError as error:
        return None, [], f"torch does not import ({error}); install it with: {install_command('gloo')}"
    if not (distributed.is_available() and distributed.is_gloo_available()):
        return None, [], f"torch was built without Gloo; install it with: {install_command('gloo')}"
    if ipaddress.ip_address(host).is_unspecified and not os.environ.get("GLOO_SOCKET_IFNAME"):
        return None, [], "Gloo tells others the address it listens at; DETCOLL_ADVERTISE must be one of this host"
    try:
        return torch, make_devices(torch, host), ""
    except RuntimeError as error:
        where = os.environ.get("GLOO_SOCKET_IFNAME") or host
        return None, [], f"Gloo cannot use the network at {where}: {error}"
