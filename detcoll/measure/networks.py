"""The kinds of network that settings are measured on: a class of service, and what others offer beside it.

Best effort runs on lines with nothing reserved, so plans and pacing may use all of them; deterministic on the same
lines with a rate reserved, which is then what plans, pacing and bounds count on. Programs that mark nothing are put in
the deterministic class by a rule of the router, so every transport meets the same network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from detcoll.emulation.lab import Conditions, Service
from detcoll.emulation.lab.conditions import CrossTrafficKind, default_reservation
from detcoll.errors import UsageError
from detcoll.quantities import parse_rate_bytes_per_s
from detcoll.topology import Topology

PROBE_GAP_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class Network:
    """A class of service, and what others offer each uplink as a share of its rate, of which kind."""

    service: Service = Service.BEST_EFFORT
    cross_traffic: float = 0.0
    cross_traffic_kind: CrossTrafficKind = CrossTrafficKind.BURSTS

    @property
    def label(self) -> str:
        """What tells it from others."""
        if not self.cross_traffic:
            return self.service.value
        kind = " over TCP" if self.cross_traffic_kind is CrossTrafficKind.TCP else ""
        return f"{self.service.value}, others offer {self.cross_traffic:.0%}{kind}"

    def topology(self, lines: Topology) -> Topology:
        """Return the lines as this network grants them."""
        return lines if self.service is Service.DETERMINISTIC else lines.with_reserved(None)

    def conditions(self, given: Conditions) -> Conditions:
        """Return the lab's conditions on this network, with a co-tenant's probe."""
        return replace(
            given, service=self.service, cross_traffic=self.cross_traffic, cross_traffic_kind=self.cross_traffic_kind,
            probe_gap_ns=PROBE_GAP_NS,
        )  # fmt: skip


QUIET = Network()
"""An ordinary network that nobody else uses."""


def parse_networks(services: Sequence[str], shares: Sequence[str]) -> tuple[Network, ...]:
    """Return every service with every share of cross traffic.

    Raises
    ------
    UsageError
        If a service is not known, a share is no number, or there is none of either or one twice.
    """
    parsed = [Network(Service.parse(service), _share(share)) for service in services for share in shares]
    if not parsed:
        raise UsageError("service and cross_traffic need at least one value each")
    if len(set(parsed)) < len(parsed):
        raise UsageError(f"service={','.join(services)!r}, cross_traffic={','.join(shares)!r}: each value once")
    return tuple(parsed)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"cross_traffic={text!r} must be a number, the share of the line's rate") from error


def reserve(lines: Topology, networks: Sequence[Network], reserved: str | None) -> Topology:
    """Return the lines with a rate reserved on every link: as asked for, as they say, or four fifths.

    Raises
    ------
    UsageError
        If a rate is asked for that nobody would use, or it cannot be reserved.
    """
    if all(network.service is not Service.DETERMINISTIC for network in networks):
        if reserved is not None:
            raise UsageError(f"reserved={reserved!r} needs service=deterministic: nobody else would use it")
        return lines
    if reserved is not None:
        return lines.with_reserved(parse_rate_bytes_per_s(reserved, "reserved"))
    return lines if lines.has_reservations else lines.with_reserved(default_reservation(lines))


def require_usable(lines: Topology, networks: Sequence[Network], conditions: Conditions) -> None:
    """Refuse networks that the lab cannot be, before anything runs.

    Raises
    ------
    UsageError
        Naming the argument, its value and what was expected.
    """
    for network in networks:
        network.conditions(conditions).validate(network.topology(lines))
