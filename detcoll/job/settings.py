"""What a job is started with: arguments of `detcoll.init`, overridden by the environment.

All ranks must agree on them. What a rank says about itself is exchanged at the rendezvous, and a difference is an
error that shows both sides.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from detcoll.errors import UsageError
from detcoll.plan.calendar import Slotting
from detcoll.quantities import LONGEST_TIMEOUT_S, parse_flag, parse_timeout_s
from detcoll.rendezvous.sockets import Address, is_loopback, parse_ports
from detcoll.topology import Topology

log = logging.getLogger("detcoll")

AUTO = "auto"
"""The transport that is chosen by itself."""

EXPEDITED_DSCP = 46
"""The code point of expedited forwarding (RFC 3246), which carriers give to what was reserved."""

LARGEST_DSCP = 63

LONGEST_CUT_S = 30.0
"""For which a silent connection is borne, unless DETCOLL_TOLERANCE or a shorter timeout says otherwise."""

DEFAULT_TIMEOUT_S = 600.0
"""Longer than a checkpoint takes to write, which other ranks may wait for."""


PREFIX = "DETCOLL_"
VARIABLES = frozenset(
    PREFIX + name
    for name in (
        "ADVERTISE", "COMPARE", "CONGESTION", "DSCP", "INSECURE", "INTERFACE", "JOB", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
        "LOG", "MARKS", "PORTS", "PROXY", "RANK", "REALTIME", "RECORD", "RENDEZVOUS", "RENDEZVOUS_FD", "SITE", "SITES",
        "SLOTTING", "TESTING_ORDER", "TESTING_WORLD", "TIMEOUT", "TOLERANCE", "TOPOLOGY",
        "TRACE", "TRANSPORT", "WORLD_SIZE",
    )
)  # fmt: skip
"""Every variable of the environment that means something to detcoll, its launchers and its tests."""

_warned: set[str] = set()


class Settings(msgspec.Struct, frozen=True):
    """Everything that decides how this rank opens its communicator.

    ``transport`` : a name or ``"auto"``.  ``timeout_s`` : for assembling, and for collectives without progress.
    ``reproducible`` : demand the promised fold order of any transport.  ``slotting`` : None for what the transport
    does best.  ``ports`` : range to bind in.  ``dscp`` : code point of what crosses lines.  ``trace`` : folder for
    trace files.  ``compare`` : whether Gloo's ranks compare what they call.  ``proxy`` : host:port of a SOCKS5 proxy
    through which the slotted transport reaches other sites; empty for none.  ``tolerance_s`` : how long a connection
    may be silent, or cut, before its peer counts as lost.  ``record`` : where flight records go, see `job.flight`.
    """

    transport: str
    topology: Topology
    timeout_s: float
    reproducible: bool
    slotting: Slotting | None
    insecure: bool
    ports: tuple[int, int] | None
    congestion: str
    dscp: int
    trace: str | None
    compare: bool = True
    proxy: str = ""
    tolerance_s: float = LONGEST_CUT_S
    record: str | None = None

    @property
    def options(self) -> dict[str, object]:
        """What transports are opened with; each takes what means something to it."""
        return {
            "insecure": self.insecure,
            "ports": self.ports,
            "congestion": self.congestion,
            "compare": self.compare,
            "dscp": self.dscp,
            "proxy": self.proxy,
            "tolerance_ns": round(self.tolerance_s * 1e9),
        }


class Facts(msgspec.Struct, frozen=True):
    """What a rank tells the others before anything is opened; rank 0's ``job`` is what all call it."""

    version: str
    transport: str
    topology: str
    reproducible: bool
    slotting: str
    congestion: str
    site: str
    host: str
    clock: str
    launcher: str
    cores: tuple[int, ...]
    compare: bool = True
    job: str = ""


_MUST_AGREE = ("version", "transport", "topology", "reproducible", "slotting", "congestion", "compare")


def read_settings(
    environ: Mapping[str, str],
    size: int,
    transport: str,
    topology: Topology | str | os.PathLike[str] | None,
    timeout: float | None,
    reproducible: bool | None,
) -> Settings:
    """Combine arguments and environment; what the environment says wins.

    Raises
    ------
    UsageError
        If one of them cannot be used.
    """
    timeout_s = _timeout(environ.get("DETCOLL_TIMEOUT"), timeout)
    if not isinstance(transport, str):
        raise UsageError(f"transport={transport!r} must be a name such as 'auto' or 'slotted'")
    asked = environ.get("DETCOLL_SLOTTING")
    slotting, where = Slotting.parse(asked) if asked else None, _topology(environ, size, topology)
    check_slotting(slotting, where)
    insecure = parse_flag(environ.get("DETCOLL_INSECURE", ""))
    return Settings(
        transport=environ.get("DETCOLL_TRANSPORT") or transport,
        topology=where,
        timeout_s=timeout_s,
        reproducible=bool(reproducible),
        slotting=slotting,
        insecure=insecure,
        ports=_ports(environ.get("DETCOLL_PORTS")),
        congestion=environ.get("DETCOLL_CONGESTION", "cubic"),
        dscp=_dscp(environ.get("DETCOLL_DSCP"), where),
        trace=environ.get("DETCOLL_TRACE") or None,
        compare=parse_flag(environ.get("DETCOLL_COMPARE") or "1"),
        proxy=_proxy(environ.get("DETCOLL_PROXY"), insecure=insecure),
        tolerance_s=read_tolerance_s(environ, timeout_s),
        record=environ.get("DETCOLL_RECORD"),
    )


def read_tolerance_s(environ: Mapping[str, str], timeout_s: float) -> float:
    """Return how long a cut of the network is borne: DETCOLL_TOLERANCE, else the timeout, `LONGEST_CUT_S` at most."""
    asked = environ.get("DETCOLL_TOLERANCE")
    return _seconds(asked, "DETCOLL_TOLERANCE") if asked else min(timeout_s, LONGEST_CUT_S)


def _seconds(text: str, name: str) -> float:
    """Return a duration in seconds; a bare number is one."""
    return parse_timeout_s(f"{text} s" if text.replace(".", "", 1).isdecimal() else text, name)


def _timeout(asked: str | None, given: float | None) -> float:
    """Return the timeout in seconds: the environment's, else the caller's, else `DEFAULT_TIMEOUT_S`."""
    if asked:
        return _seconds(asked, "DETCOLL_TIMEOUT")
    if given is None:
        return DEFAULT_TIMEOUT_S
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 < given <= LONGEST_TIMEOUT_S:
        raise UsageError(f"timeout={given!r} must be a number of seconds above 0 and at most {LONGEST_TIMEOUT_S}")
    return float(given)


def check_slotting(slotting: Slotting | None, topology: Topology) -> None:
    """Refuse a way to share lines that ``topology`` does not allow: who asks for one by name wants to see that one.

    Raises
    ------
    UsageError
        If ranks are to take turns between more than two sites.
    """
    if slotting is Slotting.TURNS and topology.is_wide and len(topology.sites) > 2:
        raise UsageError(
            f"slotting='turns' is for two sites, and the topology has {len(topology.sites)}; "
            "expected calendar, share or off"
        )


def configure_logging(level: str | None) -> None:
    """Show detcoll's log on standard error from ``level`` up, for DETCOLL_LOG."""
    if not level:
        return
    number = log_level(level)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("detcoll %(levelname)s: %(message)s"))
        log.addHandler(handler)
    log.setLevel(number)


def log_level(name: str) -> int:
    """Return the number of a level of DETCOLL_LOG.

    Raises
    ------
    UsageError
        If there is no such level.
    """
    number = logging.getLevelName(name.upper())
    if not isinstance(number, int):
        raise UsageError(f"DETCOLL_LOG={name!r} must be one of debug, info, warning, error")
    return number


def warn_of_unknown(environ: Mapping[str, str]) -> None:
    """Warn of variables that look like detcoll's and mean nothing to it, once each, and name the nearest that does."""
    for name in sorted(name for name in environ if name.startswith(PREFIX) and name not in VARIABLES | _warned):
        _warned.add(name)
        nearest = difflib.get_close_matches(name, sorted(VARIABLES), 1, cutoff=0.0)[0]
        log.warning("%s is set and means nothing to detcoll; did you mean %s?", name, nearest)


def agree(facts: Sequence[Facts]) -> None:
    """Compare what all ranks say.

    Raises
    ------
    UsageError
        If two ranks differ in something that must be the same; names both and their values.
    """
    for rank, other in enumerate(facts):
        for name in _MUST_AGREE:
            ours, theirs = getattr(facts[0], name), getattr(other, name)
            if ours != theirs:
                raise UsageError(f"ranks disagree about {name}: rank 0 has {ours!r}, rank {rank} has {theirs!r}")


def place(topology: Topology, sites: Sequence[str]) -> Topology:
    """Return ``topology`` with ranks in the sites that they say they are in; as numbered where none says.

    Raises
    ------
    UsageError
        If only some say, or the sites do not add up.
    """
    if not any(sites):
        return topology
    silent = [rank for rank, site in enumerate(sites) if not site]
    if silent:
        raise UsageError(f"DETCOLL_SITE must be set on all ranks or on none; ranks {silent} lack it")
    return topology.placed(sites)


def _topology(environ: Mapping[str, str], size: int, given: Topology | str | os.PathLike[str] | None) -> Topology:
    path = environ.get("DETCOLL_TOPOLOGY")
    if path:
        return Topology.from_file(path, size)
    groups = environ.get("DETCOLL_SITES")
    if groups and given is None:
        return _grouping(groups, size)
    if given is None:
        return Topology.single_site(size)
    if not isinstance(given, Topology):
        return Topology.from_file(Path(given), size)
    if given.size != size:
        raise UsageError(f"topology declares {given.size} ranks but the world has {size}")
    return given


def _grouping(text: str, size: int) -> Topology:
    count = int(text) if text.isdecimal() else 0
    if not 1 <= count <= size or size % count:
        raise UsageError(f"DETCOLL_SITES={text!r} must divide the world of {size} ranks")
    return Topology.uniform(count, size // count, 1.0, 0).as_single_cluster()


def _dscp(text: str | None, topology: Topology) -> int:
    """Return the code point to mark packets with: as asked for, else expedited forwarding where rates are reserved."""
    if not text:
        return EXPEDITED_DSCP if topology.has_reservations else 0
    if not text.isdecimal() or int(text) > LARGEST_DSCP:
        raise UsageError(f"DETCOLL_DSCP={text!r} must be a number from 0 to {LARGEST_DSCP}")
    return int(text)


def _ports(text: str | None) -> tuple[int, int] | None:
    if not text:
        return None
    ports = parse_ports(text)
    return ports[0], ports[-1]


def _proxy(text: str | None, *, insecure: bool) -> str:
    """Return where the proxy is; one off loopback would carry what is neither encrypted nor authenticated."""
    if not text:
        return ""
    address = Address.parse(text, "DETCOLL_PROXY")
    if not (insecure or is_loopback(address.host)):
        raise UsageError(
            f"DETCOLL_PROXY={text!r} is not a loopback address, and nothing would be encrypted on the way to it; "
            "set DETCOLL_INSECURE=1 to allow it on a network you trust"
        )
    return str(address)
