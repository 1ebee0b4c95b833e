"""What the lines of a lab do to traffic, beside rate and delay: queues, loss, classes, others' traffic, failures.

Two kinds of network share a line. The **deterministic class** goes first, up to a rate that was reserved for it between
two sites (`detcoll.topology.Link.reserved_bytes_per_s`); a policer, a token bucket of that rate and of ``burst_bytes``,
drops what exceeds it, and nothing else ever drops it. The **best-effort class** gets the rest: a drop-tail queue,
jitter and random loss, shared with whatever others send.

Which class a packet is in says its DSCP, 46 (expedited forwarding, RFC 3246) for the deterministic one, or a rule of
the router: `Service.DETERMINISTIC` puts in it whatever the ranks send, so that any program can be measured there, and
`Service.BEST_EFFORT` nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from math import isfinite

from detcoll.errors import UsageError
from detcoll.quantities import format_duration, format_rate, parse_duration_ns
from detcoll.topology import Topology

DEFAULT_QUEUE_BYTES = 2_500_000

LARGEST_CROSS_TRAFFIC = 2.0

_LARGEST_QUEUE_BYTES = 2**32 - 1
# A burst holds what the reserved rate carries in this time: the kernel paces in lumps of up to a millisecond, and the
# router sees in one lump what came while the machine kept it waiting.
_BURST_NS = 5_000_000
_SMALLEST_BURST_BYTES = 131_072
_RESERVED_SHARE = 0.8


class Service(Enum):
    """A class of traffic, and the rule that puts all that the ranks send in it."""

    BEST_EFFORT = "best-effort"
    DETERMINISTIC = "deterministic"

    @classmethod
    def parse(cls, text: str) -> Service:
        """Return the service that ``text`` names.

        Raises
        ------
        UsageError
            If there is no such service.
        """
        try:
            return cls(text)
        except ValueError:
            raise UsageError(
                f"service={text!r} is not known; expected {' or '.join(one.value for one in cls)}"
            ) from None


class CrossTrafficKind(Enum):
    """What others' traffic is made of.

    BURSTS mind nobody: the router makes them up, and real TCP flows are a small part beside them. TCP flows give way.
    """

    BURSTS = "bursts"
    TCP = "tcp"

    @classmethod
    def parse(cls, text: str) -> CrossTrafficKind:
        """Return the kind that ``text`` names.

        Raises
        ------
        UsageError
            If there is no such kind.
        """
        try:
            return cls(text)
        except ValueError:
            kinds = " or ".join(one.value for one in cls)
            raise UsageError(f"cross_traffic_kind={text!r} is not known; expected {kinds}") from None


@dataclass(frozen=True, slots=True)
class Failure:
    """A time in which a link, or with None every link, loses all that is on its way; counted from the lab's opening."""

    start_ns: int
    end_ns: int
    between: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str, topology: Topology) -> Failure:
        """Return the failure that ``"5 s to 7 s"`` or ``"guiyang and nanjing: 5 s to 7 s"`` describes.

        Raises
        ------
        UsageError
            If it is not of this form, ends before it starts, or names no two sites of the topology.
        """
        where, colon, when = text.rpartition(":")
        start, to, end = when.partition(" to ")
        if not to:
            raise UsageError(f"failure={text!r} must be of the form '5 s to 7 s', or 'SITE and SITE: 5 s to 7 s'")
        start_ns, end_ns = (parse_duration_ns(part, "failure") for part in (start, end))
        if end_ns <= start_ns:
            raise UsageError(f"failure={text!r} ends before it starts")
        if not colon:
            return cls(start_ns, end_ns)
        names = [site.name for site in topology.sites]
        for low, high in combinations(range(len(names)), 2):
            if where.strip() in (f"{names[low]} and {names[high]}", f"{names[high]} and {names[low]}"):
                return cls(start_ns, end_ns, (low, high))
        raise UsageError(f"failure={text!r} names no two sites; the sites are {', '.join(names)}")

    def concerns(self, source: int, destination: int) -> bool:
        """Tell whether traffic between these sites is lost."""
        return self.between is None or set(self.between) == {source, destination}


@dataclass(frozen=True, slots=True)
class Conditions:
    """What happens on the lines of a lab.

    ``queue_bytes`` : drop-tail queue of each class at each uplink and each downlink.
    ``loss`` : probability with which a best-effort segment is lost on its path.
    ``jitter_ns`` : best-effort units take up to this much longer, evenly distributed, and do not overtake each other.
    ``seed`` : of losses, jitter, bursts and probes; each has a sequence of its own.
    ``service`` : which class the ranks are in; None where DSCP decides.
    ``burst_bytes`` : of the policer; None for what the reserved rate carries in 5 ms, and at least 128 KiB.
    ``cross_traffic`` : what others offer each uplink's best-effort class, as a share of its rate, 0 to 2.
    ``cross_traffic_kind`` : bursts, or real TCP flows alone, which from a share of 1 on send as much as TCP lets them.
    ``cross_tcp_share`` : how much of the kind ``bursts`` real TCP flows offer; what the router makes up is the rest.
    ``failures`` : when links are down.
    ``probe_gap_ns`` : mean time between a co-tenant's small packets on each link, 0 for none.
    """

    queue_bytes: int = DEFAULT_QUEUE_BYTES
    loss: float = 0.0
    jitter_ns: int = 0
    seed: int = 0
    service: Service | None = None
    burst_bytes: int | None = None
    cross_traffic: float = 0.0
    cross_traffic_kind: CrossTrafficKind = CrossTrafficKind.BURSTS
    cross_tcp_share: float = 0.05
    failures: tuple[Failure, ...] = ()
    probe_gap_ns: int = 0

    def validate(self, topology: Topology) -> None:
        """Refuse what cannot be emulated on the lines of ``topology``.

        Raises
        ------
        UsageError
            Naming the argument, its value and what was expected.
        """
        least = topology.mtu_bytes
        if not least <= self.queue_bytes <= _LARGEST_QUEUE_BYTES:
            raise UsageError(
                f"queue_bytes={self.queue_bytes} must be from one packet of {least} bytes to {_LARGEST_QUEUE_BYTES}"
            )
        if self.burst_bytes is not None and not least <= self.burst_bytes <= _LARGEST_QUEUE_BYTES:
            raise UsageError(f"burst_bytes={self.burst_bytes} must be from one packet of {least} bytes to 2**32 - 1")
        for name, value in (("loss", self.loss), ("cross_tcp_share", self.cross_tcp_share)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name}={value} must be from 0 to 1")
        for name, time_ns in (("jitter_ns", self.jitter_ns), ("probe_gap_ns", self.probe_gap_ns)):
            if time_ns < 0:
                raise UsageError(f"{name}={time_ns} must not be negative")
        if not 0 <= self.cross_traffic <= LARGEST_CROSS_TRAFFIC:
            raise UsageError(f"cross_traffic={self.cross_traffic} must be a share from 0 to {LARGEST_CROSS_TRAFFIC:g}")
        _check_reservations(topology)
        if self.service is Service.DETERMINISTIC and any(
            link.reserved_bytes_per_s is None for _, link in topology.links
        ):
            raise UsageError("service='deterministic' needs a rate reserved between all sites; set reserved")

    @property
    def tcp_share(self) -> float:
        """What others' TCP flows offer each uplink, as a share of its rate."""
        return self.cross_traffic * (1.0 if self.cross_traffic_kind is CrossTrafficKind.TCP else self.cross_tcp_share)

    def burst_for(self, reserved_bytes_per_s: float) -> int:
        """Return the burst that the policer of a reserved rate lets pass."""
        if self.burst_bytes is not None:
            return self.burst_bytes
        return max(_SMALLEST_BURST_BYTES, round(reserved_bytes_per_s * _BURST_NS / 1e9))


def _check_reservations(topology: Topology) -> None:
    """Refuse reservations that leave a line nothing for others."""
    for index, site in enumerate(topology.sites):
        promised = sum(link.reserved_bytes_per_s or 0.0 for ends, link in topology.links if index in ends)
        for name, rate in (("uplink", site.uplink_bytes_per_s), ("downlink", site.downlink_bytes_per_s)):
            if rate is not None and isfinite(rate) and promised >= rate:
                raise UsageError(
                    f"reserved: {format_rate(promised)} in all at site {site.name!r} must be less than its {name} of "
                    f"{format_rate(rate)}"
                )


def default_reservation(topology: Topology) -> float:
    """Return what each link reserves where nobody says: four fifths of the slowest line, shared by a site's links."""
    rates = [rate for site in topology.sites for rate in (site.uplink_bytes_per_s, site.downlink_bytes_per_s) if rate]
    return _RESERVED_SHARE * min(rates) / (len(topology.sites) - 1)


def describe(failures: Sequence[Failure], topology: Topology) -> list[str]:
    """Return failures as people write them."""
    texts = []
    for failure in failures:
        names = " and ".join(topology.sites[site].name for site in failure.between or ())
        when = f"{format_duration(failure.start_ns)} to {format_duration(failure.end_ns)}"
        texts.append(f"{names}: {when}" if names else when)
    return texts
