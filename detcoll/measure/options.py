"""What the options of `detcoll measure` and `detcoll bench` mean: the lines, and the transports to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detcoll.errors import UsageError
from detcoll.measure.results import LeftOut
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s
from detcoll.registry import load, names, why_missing
from detcoll.topology import Topology
from detcoll.transport import Scope

SITES, RANKS_PER_SITE, RATE, ROUND_TRIP = 2, 2, "1 Gbit/s", "20 ms"


def wide_topology(
    topology: Path | None,
    sites: int | None,
    ranks_per_site: int | None,
    rate: str | None,
    round_trip: str | None,
) -> Topology:
    """Return the sites and lines that the options describe: a file, or equal sites.

    Raises
    ------
    UsageError
        If both ways are used at once, there are fewer than two sites, or a value cannot be used.
    """
    given = {"sites": sites, "ranks_per_site": ranks_per_site, "rate": rate, "round_trip": round_trip}
    if topology is not None:
        also = [name for name, value in given.items() if value is not None]
        if also:
            raise UsageError(f"topology={str(topology)!r} already says what {', '.join(also)} would")
        wide = Topology.from_file(topology)
    else:
        wide = Topology.uniform(
            SITES if sites is None else sites,
            RANKS_PER_SITE if ranks_per_site is None else ranks_per_site,
            parse_rate_bytes_per_s(RATE if rate is None else rate, "rate"),
            parse_duration_ns(ROUND_TRIP if round_trip is None else round_trip, "round_trip") // 2,
        )
    if not wide.is_wide:
        raise UsageError(f"sites={len(wide.sites)}: the wide area needs at least two sites, each with an uplink")
    return wide


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the parts of ``text`` between commas; none for an empty text or ``"none"``."""
    if text.strip() in ("", "none"):
        return ()
    return tuple(part.strip() for part in text.split(",") if part.strip())


def present(transports: Sequence[str], name: str) -> tuple[tuple[str, ...], tuple[LeftOut, ...]]:
    """Part ``transports`` in those that can be used here and those that cannot, with the reason.

    Raises
    ------
    UsageError
        If no transport has one of the names, or it joins ranks of one host only: the lab's sites are apart, and what
        went past the lines would measure nothing. ``name`` is the option's.
    """
    for transport in transports:
        if transport not in names():
            raise UsageError(f"{name}={transport!r} is not known; expected some of {', '.join(names())}")
    reasons = {transport: why_missing(transport) for transport in transports}
    here = tuple(transport for transport in transports if reasons[transport] is None)
    for transport in here:
        if load(transport).capabilities.scope is Scope.HOST:
            raise UsageError(f"{name}={transport!r} joins ranks of one host only; it cannot cross the lines")
    return here, tuple(LeftOut(transport, why) for transport, why in reasons.items() if why is not None)
