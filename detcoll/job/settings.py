"""Settings of a job: the arguments of `detcoll.init`, overridden by the environment.

Ranks exchange them at the rendezvous. A difference in a setting that must be the same on all ranks is an error that
shows both values.
"""

from __future__ import annotations

import difflib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from detcoll.errors import UsageError
from detcoll.plan.calendar import Slotting
from detcoll.quantities import LONGEST_TIMEOUT_S, parse_flag, parse_timeout_s
from detcoll.rendezvous.sockets import Address, accepts_insecurity, is_loopback, parse_ports
from detcoll.topology import Topology

log = logging.getLogger("detcoll")

AUTO = "auto"
"""Choose the transport automatically."""

EXPEDITED_DSCP = 46
"""The code point of expedited forwarding (RFC 3246), which carriers use for reserved traffic."""

LARGEST_DSCP = 63

LONGEST_CUT_S = 30.0
"""How long a silent or broken connection is tolerated, unless DETCOLL_TOLERANCE or a shorter timeout applies."""

DEFAULT_TIMEOUT_S = 600.0
"""Longer than it takes one rank to write a checkpoint while the others wait in a collective."""


_OFFERED = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")

PREFIX = "DETCOLL_"
VARIABLES = frozenset(
    PREFIX + name
    for name in (
        "ADVERTISE", "COMPARE", "CONGESTION", "DSCP", "HOST", "INSECURE", "IN_USER_NAMESPACE", "INTERFACE", "JOB",
        "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOG", "MARKS", "NCCL", "PORTS", "PROXY", "RANK", "REALTIME", "RECORD",
        "RENDEZVOUS", "RENDEZVOUS_FD", "REPORTS", "ROUTER", "SITE", "SITES", "SLOTTING", "TESTING_ORDER",
        "TESTING_WORLD", "TIMEOUT", "TOLERANCE", "TOPOLOGY", "TRACE", "TRANSPORT", "WORLD_SIZE",
    )
)  # fmt: skip
"""Every environment variable that detcoll, its launchers or its tests read."""

_warned: set[str] = set()


class Settings(msgspec.Struct, frozen=True):
    """All settings with which this rank opens its communicator.

    ``transport`` : a name or ``"auto"``.  ``timeout_s`` : for opening the job, and for collectives without progress.
    ``reproducible`` : keep the documented fold order on every transport.  ``slotting`` : None for the default of the
    transport and topology.  ``ports`` : range of ports to bind, first and last.  ``congestion`` : TCP congestion
    control, ``"auto"`` for what suits the path, empty for the kernel's default.  ``dscp`` : code point of packets that
    cross lines.  ``trace`` : folder for trace files.  ``compare`` : whether ranks compare their calls under Gloo.
    ``proxy`` : host:port of a SOCKS5 proxy through which the slotted transport reaches other sites; empty for none.
    ``tolerance_s`` : how long a connection may be silent or down before its peer counts as lost.  ``record`` : where
    flight records go, see `job.flight`.  ``host`` : what the user calls this host; empty where the system's
    own identity serves. Ranks of different hosts do not share memory.  ``nccl`` : whether arrays on devices are reduced
    inside the sites by NCCL.
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
    host: str = ""
    nccl: bool = False

    @property
    def options(self) -> dict[str, object]:
        """Options for opening a transport; each transport is passed those that it knows."""
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
    """Facts about a rank, exchanged before endpoints are opened.

    ``job`` of rank 0 is the name of the job.  ``topology`` : its digest, and ``sites`` what it has, for people.
    """

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
    nccl: bool = False
    sites: str = ""


_MUST_AGREE = ("version", "transport", "topology", "reproducible", "slotting", "congestion", "compare", "nccl")


def read_settings(
    environ: Mapping[str, str],
    size: int,
    transport: str,
    topology: Topology | str | os.PathLike[str] | None,
    timeout: float | None,
    reproducible: bool | None,
) -> Settings:
    """Combine the arguments with the environment, which takes precedence.

    Raises
    ------
    UsageError
        If a value is not valid.
    """
    timeout_s = _timeout(environ.get("DETCOLL_TIMEOUT"), timeout)
    if not isinstance(transport, str):
        raise UsageError(f"transport={transport!r} must be a name such as 'auto' or 'slotted'")
    asked = environ.get("DETCOLL_SLOTTING")
    slotting, where = Slotting.parse(asked) if asked else None, read_topology(environ, size, topology)
    check_slotting(slotting, where)
    insecure = accepts_insecurity(environ)
    parse_flag(environ.get("DETCOLL_REALTIME", ""), "DETCOLL_REALTIME", default=True)  # for `detcoll.priority`
    return Settings(
        transport=environ.get("DETCOLL_TRANSPORT") or transport,
        topology=where,
        timeout_s=timeout_s,
        reproducible=bool(reproducible),
        slotting=slotting,
        insecure=insecure,
        ports=_ports(environ.get("DETCOLL_PORTS")),
        congestion=_congestion(environ.get("DETCOLL_CONGESTION", AUTO)),
        dscp=_dscp(environ.get("DETCOLL_DSCP"), where),
        trace=environ.get("DETCOLL_TRACE") or None,
        compare=parse_flag(environ.get("DETCOLL_COMPARE", ""), "DETCOLL_COMPARE", default=True),
        proxy=_proxy(environ.get("DETCOLL_PROXY"), insecure=insecure),
        tolerance_s=read_tolerance_s(environ, timeout_s),
        record=environ.get("DETCOLL_RECORD"),
        host=environ.get("DETCOLL_HOST", ""),
        nccl=_nccl(environ.get("DETCOLL_NCCL", ""), bool(reproducible)),
    )


def _nccl(text: str, reproducible: bool) -> bool:
    is_asked = parse_flag(text, "DETCOLL_NCCL", default=False)
    if is_asked and reproducible:
        raise UsageError(
            f"DETCOLL_NCCL={text!r} with reproducible=True: NCCL adds in an order of its own; expected one of them"
        )
    return is_asked


def read_tolerance_s(environ: Mapping[str, str], timeout_s: float) -> float:
    """Return how long a connection may be down: DETCOLL_TOLERANCE, else the timeout, but at most `LONGEST_CUT_S`."""
    asked = environ.get("DETCOLL_TOLERANCE")
    return _seconds(asked, "DETCOLL_TOLERANCE") if asked else min(timeout_s, LONGEST_CUT_S)


def _seconds(text: str, name: str) -> float:
    """Parse a duration in seconds; a number without a unit is in seconds."""
    is_number = text.removeprefix("-").replace(".", "", 1).isdecimal()
    return parse_timeout_s(f"{text} s" if is_number else text, name)


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
    """Raise if ``topology`` does not permit an explicitly requested slotting mode, instead of choosing another mode.

    Raises
    ------
    UsageError
        If the mode is TURNS and there are more than two sites.
    """
    if slotting is Slotting.TURNS and topology.is_wide and len(topology.sites) > 2:
        raise UsageError(
            f"slotting='turns' is for two sites, and the topology has {len(topology.sites)}; "
            "expected calendar, share or off"
        )


def configure_logging(level: str | None) -> None:
    """Log to standard error from ``level`` (the value of DETCOLL_LOG) up; do nothing if it is empty."""
    if not level:
        return
    number = log_level(level)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("detcoll %(levelname)s: %(message)s"))
        log.addHandler(handler)
    log.setLevel(number)


def log_level(name: str) -> int:
    """Return the number of a logging level by name.

    Raises
    ------
    UsageError
        If there is no level of that name.
    """
    number = logging.getLevelName(name.upper())
    if not isinstance(number, int):
        raise UsageError(f"DETCOLL_LOG={name!r} must be one of debug, info, warning, error")
    return number


def warn_of_unknown(environ: Mapping[str, str]) -> None:
    """Warn, once each, of DETCOLL_ variables that detcoll does not know; suggest the closest known name."""
    for name in sorted(name for name in environ if name.startswith(PREFIX) and name not in VARIABLES | _warned):
        _warned.add(name)
        nearest = difflib.get_close_matches(name, sorted(VARIABLES), 1, cutoff=0.0)[0]
        log.warning("%s is set, but detcoll has no such variable; did you mean %s?", name, nearest)


def agree(facts: Sequence[Facts]) -> None:
    """Check that the facts of all ranks agree where they must.

    Raises
    ------
    UsageError
        If two ranks differ; names both and their values.
    """
    for rank, other in enumerate(facts):
        for name in _MUST_AGREE:
            ours, theirs = getattr(facts[0], name), getattr(other, name)
            if ours != theirs:
                if name == "topology":
                    raise _other_topology(facts[0].sites, rank, other.sites)
                raise UsageError(f"ranks disagree about {name}: rank 0 has {ours!r}, rank {rank} has {theirs!r}")


def _other_topology(ours: str, rank: int, theirs: str) -> UsageError:
    if theirs == ours:
        theirs = "the same with other ranks in them, rates or delays"
    return UsageError(
        f"ranks disagree about topology: rank 0 has {ours}, rank {rank} has {theirs}; give all ranks the same, such as "
        "one file on all hosts by DETCOLL_TOPOLOGY"
    )


def place(topology: Topology, sites: Sequence[str]) -> Topology:
    """Return ``topology`` with each rank in the site that it reports; unchanged if no rank reports one.

    Raises
    ------
    UsageError
        If only some ranks report a site, or the number of ranks of a site does not match.
    """
    if not any(sites):
        return topology
    silent = [rank for rank, site in enumerate(sites) if not site]
    if silent:
        raise UsageError(f"DETCOLL_SITE must be set on all ranks or on none; ranks {silent} lack it")
    return topology.placed(sites)


def read_topology(environ: Mapping[str, str], size: int, given: Topology | str | os.PathLike[str] | None) -> Topology:
    """Return the topology of a world of ``size``: the environment's, else the caller's, else one site."""
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
    """Return the DSCP for packets: the requested one, else expedited forwarding if rates are reserved, else 0."""
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


def _congestion(name: str) -> str:
    """Return the congestion control to use; empty for the kernel's default."""
    if name in ("", AUTO):
        return name
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as error:
            offered = ", ".join(_OFFERED.read_text(encoding="ascii").split()) if _OFFERED.exists() else "others"
            raise UsageError(
                f"DETCOLL_CONGESTION={name!r} cannot be used here ({error.strerror}); expected {AUTO!r}, or one that "
                f"this system offers: {offered}"
            ) from error
    return name


def _proxy(text: str | None, *, insecure: bool) -> str:
    """Return the address of the proxy; one off loopback needs ``insecure``, since traffic to it is not encrypted."""
    if not text:
        return ""
    address = Address.parse(text, "DETCOLL_PROXY")
    if not (insecure or is_loopback(address.host)):
        raise UsageError(
            f"DETCOLL_PROXY={text!r} is not a loopback address, and nothing would be encrypted on the way to it; "
            "set DETCOLL_INSECURE=1 to allow it on a network you trust"
        )
    return str(address)
