"""Addresses and sockets of the rendezvous: parse, resolve, listen, connect, and recognise loopback addresses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import resource
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from detcoll.errors import ConnectError, UsageError
from detcoll.names import is_temporary, look_up
from detcoll.quantities import parse_flag

SHORTEST_NAP_S, LONGEST_NAP_S = 0.02, 0.5
_ATTEMPT_S = 3.0
_SIOCGIFADDR = 0x8915

TRUSTED_NETWORK = "lab"
"""The value of DETCOLL_INSECURE where nobody else can be on the network, so that nobody is warned."""

EVERYWHERE = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
"""The address of all interfaces, for each family."""

Where = tuple[str, int] | tuple[str, int, int, int]
"""A socket address of IPv4 (host, port) or IPv6 (host, port, flow, scope)."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A hub that answered: its numeric socket address, and the local address of the connection to it."""

    where: Where
    local: str


@dataclass(frozen=True, slots=True)
class Address:
    """A host name or IP address, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, name: str = "DETCOLL_RENDEZVOUS") -> Address:
        """Parse ``host:port`` or ``[IPv6]:port``.

        Parameters
        ----------
        text : str
            What to parse.
        name : str
            The setting that ``text`` comes from, for the error message.

        Raises
        ------
        UsageError
            If it is neither.
        """
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:\s]+)):(\d{1,5})", text)
        if match is None or not 0 < int(match[3]) < 65536:
            raise UsageError(f"{name}={text!r} must be host:port or [IPv6 address]:port, with a port from 1 to 65535")
        return cls(match[1] or match[2], int(match[3]))

    @classmethod
    def of(cls, bound: socket.socket) -> Address:
        """Return the local address of a bound socket."""
        host, port = bound.getsockname()[:2]
        return cls(host, port)

    def resolve(self) -> list[tuple[socket.AddressFamily, Where]]:
        """Return address families and socket addresses, in the resolver's order of preference.

        Raises
        ------
        ConnectError
            If the name cannot be resolved.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ConnectError(f"cannot resolve the host of rendezvous {self}: {error}") from error
        return [(family, _where(where)) for family, _, _, _, where in found]


_LOOPBACK_NAMES = {"localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback"}
"""RFC 6761, and what distributions write into /etc/hosts."""


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is a loopback address (127.0.0.0/8 or ::1) or a name that means one on every host."""
    if host.lower() in _LOOPBACK_NAMES or host.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def accepts_insecurity(environ: Mapping[str, str]) -> bool:
    """Return whether DETCOLL_INSECURE, a switch or `TRUSTED_NETWORK`, accepts unencrypted traffic off loopback.

    Raises
    ------
    UsageError
        If it is neither.
    """
    text = environ.get("DETCOLL_INSECURE", "")
    return text.strip().lower() == TRUSTED_NETWORK or parse_flag(text, "DETCOLL_INSECURE", default=False)


def listen(address: Address, environ: Mapping[str, str], *, everywhere: bool = False) -> socket.socket:
    """Return a socket that listens at ``address``; port 0 takes a free port, from DETCOLL_PORTS where that is set.

    With ``everywhere`` it listens on all interfaces. That is needed where others reach this host at an address that is
    not its own (DETCOLL_ADVERTISE), or by a name that resolves to loopback on this host only.

    Raises
    ------
    ConnectError
        If the port is taken, or the address is not one of this host.
    """
    ports = [address.port] if address.port else list(parse_ports(environ.get("DETCOLL_PORTS", "")))
    failures: list[OSError] = []
    for family, where in address.resolve():
        host = EVERYWHERE[family] if everywhere else where[0]
        for port in ports:
            try:
                return _bind(family, at_port(where, port, host))
            except OSError as error:
                failures.append(error)
    raise _cannot_listen(address, failures, environ) from failures[0]


def parse_ports(text: str) -> range:
    """Parse a port range ``first-last``; empty text gives ``range(1)``: port 0 only, which means any free port.

    Raises
    ------
    UsageError
        If it is not such a range.
    """
    if not text:
        return range(1)
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
    if match is None or not 0 < int(match[1]) <= int(match[2]) < 65536:
        raise UsageError(f"DETCOLL_PORTS={text!r} must be first-last, such as 5000-5100")
    return range(int(match[1]), int(match[2]) + 1)


def adopt(descriptor: str | None, address: Address) -> socket.socket | None:
    """Return the listening socket inherited from the launcher as ``descriptor``, None if it is not there any more."""
    if descriptor is None or not descriptor.isdigit():
        return None
    try:
        found = socket.socket(fileno=int(descriptor))
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if (
            found.family in (socket.AF_INET, socket.AF_INET6)
            and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            and found.getsockname()[1] == address.port
        ):
            found.set_inheritable(False)
            return found
    found.detach()  # another file now has this descriptor
    return None


def reach(address: Address, deadline_ns: int, *, is_known: bool = False) -> Reached:
    """Return how to connect to the hub at ``address``; retry until it answers with a ZeroMQ greeting.

    Parameters
    ----------
    address : Address
        The address of the hub.
    deadline_ns : int
        In this process's `time.monotonic_ns`.
    is_known : bool
        Whether rank 0 announced the address after it had begun to listen; then a refused connection means that rank 0
        is gone.

    Raises
    ------
    ConnectError
        If nothing answers in time, or another service does.
    """
    nap_s, why = SHORTEST_NAP_S, "the deadline passed before the first attempt"
    while (left_s := left(deadline_ns)) > 0:
        try:
            found = address.resolve()
        except ConnectError as error:  # a name may not resolve until its host has started
            found, why = [], str(error)
        for family, where in found:
            try:
                return _reach_once(family, where, min(left_s, _ATTEMPT_S))
            except _Foreign as error:
                raise ConnectError(f"the service at {address} is not a detcoll rendezvous: {error}") from error
            except OSError as error:
                why = error.strerror or str(error)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise too_few_descriptors("the connection to rank 0", 1) from error
                if is_known and error.errno == errno.ECONNREFUSED:
                    raise ConnectError(
                        f"rank 0 is gone: it was at {address}, but nobody listens there any more"
                    ) from error
        time.sleep(min(nap_s, left(deadline_ns)))
        nap_s = min(2 * nap_s, LONGEST_NAP_S)
    raise ConnectError(
        f"the rendezvous at {address} did not answer: rank 0 has not started, has left, or is unreachable ({why})"
    )


def resolve_in_time(address: Address, deadline_ns: int) -> list[tuple[socket.AddressFamily, Where]]:
    """Resolve an address; retry until the deadline, since a name may not resolve until its host has started."""
    while True:
        try:
            return address.resolve()
        except ConnectError:
            if left(deadline_ns) == 0:
                raise
        time.sleep(min(LONGEST_NAP_S, left(deadline_ns)))


def left(deadline_ns: int) -> float:
    """Return the seconds until ``deadline_ns``, at least 0."""
    return max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)


def open_life_port(host: str, environ: Mapping[str, str], ranks: int) -> socket.socket:
    """Return a listening socket on ``host`` that others probe to learn whether this process lives.

    Its port is taken from DETCOLL_PORTS if that range is more than twice the number of local ``ranks``; a smaller range
    is left to the transports, and any free port is used.

    Raises
    ------
    OSError
        If no descriptor or no port is available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.getaddrinfo(host, 0, family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    where = _where(found[0][4])
    ports = parse_ports(environ.get("DETCOLL_PORTS", ""))
    spare = reversed(ports) if len(ports) > 2 * ranks + 1 else range(0)
    for port in (*spare, 0):
        try:
            made = _bind(family, at_port(where, port))
        except OSError as error:
            if port == 0 or error.errno in (errno.EMFILE, errno.ENFILE):
                raise
        else:
            made.setblocking(False)
            return made
    raise AssertionError("port 0 is always tried")


def require_descriptors(what: str, count: int) -> None:
    """Check that ``count`` more file descriptors can be opened, because ZeroMQ aborts the process when they run out.

    Raises
    ------
    ConnectError
        If fewer are available.
    """
    free = 0
    try:
        with contextlib.ExitStack() as opened:
            for free in range(count):  # noqa: B007 - the error reports how many were free
                opened.callback(os.close, os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise too_few_descriptors(what, count, free) from error


def too_few_descriptors(what: str, count: int, free: int = 0) -> ConnectError:
    """Return the error for a lack of file descriptors; ``what`` needs ``count`` more, and ``free`` are available."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ConnectError(
        f"too few file descriptors: {what} needs {count} more, and {free} are left of the {limit} that this process "
        "may have; raise the limit (ulimit -n)"
    )


def close_inherited(is_ours: Callable[[socket.socket], bool]) -> None:
    """In a forked child, close the TCP sockets for which ``is_ours`` holds; ZeroMQ does not report its descriptors."""
    for name in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=int(name))
        except OSError:
            continue
        with contextlib.suppress(OSError):
            if found.family in (socket.AF_INET, socket.AF_INET6) and is_ours(found):
                found.close()
                continue
        found.detach()


@dataclass(frozen=True, slots=True)
class OwnHost:
    """How this rank is reached.

    ``told`` : what others connect to, a name or an address; where addresses are translated, none of this host.
    ``listen`` : the numeric address to listen at, which may be that of all interfaces.
    """

    told: str
    listen: str


def own_host(environ: Mapping[str, str], deadline_ns: int = 0, *, is_local: bool = False) -> OwnHost | None:
    """Return this rank's address from DETCOLL_ADVERTISE and DETCOLL_INTERFACE (a name or an address), None if neither.

    Parameters
    ----------
    environ : mapping
        Where the variables are.
    deadline_ns : int
        Until when a name is looked up again whose resolver fails for now, in this process's `time.monotonic_ns`.
    is_local : bool
        Whether all ranks are known to run on this host, so that a name which leads to loopback serves all of them.

    Raises
    ------
    UsageError
        If the interface does not exist or has no address, or there is no such name.
    ConnectError
        If the resolver failed for now until the deadline.
    """
    interface, advertised = _interface(environ.get("DETCOLL_INTERFACE")), environ.get("DETCOLL_ADVERTISE")
    if not advertised:
        return None if interface is None else OwnHost(interface, interface)
    try:
        found = look_up(advertised, 0, left(deadline_ns))
    except OSError as error:
        if is_temporary(error):
            raise ConnectError(f"DETCOLL_ADVERTISE={advertised!r} could not be resolved in time: {error}") from error
        raise UsageError(
            f"DETCOLL_ADVERTISE={advertised!r} must be an address, or a name that this host can resolve: {error}"
        ) from error
    if interface is not None:
        return OwnHost(advertised, interface)
    serves = is_local or is_loopback(advertised)
    for family, where in found:
        host = str(where[0])
        if (serves or not is_loopback(host)) and _is_here(family, _where(where)):
            return OwnHost(advertised, host)
    # All interfaces of IPv6 are those of IPv4 too.
    wants_both = len({family for family, _ in found}) > 1 and _is_here(socket.AF_INET6, ("::", 0))
    return OwnHost(advertised, EVERYWHERE[socket.AF_INET6 if wants_both else found[0][0]])


def source_address(towards: Address) -> str:
    """Return the local source address of the route to ``towards``.

    Raises
    ------
    ConnectError
        If there is no route.
    """
    why = ""
    for family, where in towards.resolve():
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(where)  # on UDP this only selects the route
                return str(probe.getsockname()[0])
        except OSError as error:
            why = why or error.strerror or str(error)
    raise ConnectError(f"there is no route to {towards}: {why}")


def _interface(name: str | None) -> str | None:
    if not name:
        return None
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    return _interface_address(name)


def _is_here(family: socket.AddressFamily, where: Where) -> bool:
    """Return whether this host has an address."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind(where)
        return True
    return False


def _interface_address(name: str) -> str:
    """Return the IPv4 address of an interface, else its first global or loopback IPv6 address."""
    if name not in (known for _, known in socket.if_nameindex()):
        names = ", ".join(known for _, known in socket.if_nameindex())
        raise UsageError(f"DETCOLL_INTERFACE={name!r} is neither an address nor an interface here; there are {names}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(OSError):
        answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", os.fsencode(name)))
        return socket.inet_ntoa(answer[20:24])
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as table:
        for digits, _, _, scope, _, interface in (line.split() for line in table):
            if interface == name and scope in ("00", "10"):  # global, or loopback itself
                return str(ipaddress.IPv6Address(bytes.fromhex(digits)))
    raise UsageError(f"DETCOLL_INTERFACE={name!r} has no IPv4 address and no global IPv6 address")


def _bind(family: socket.AddressFamily, where: Where) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener


def _cannot_listen(address: Address, failures: list[OSError], environ: Mapping[str, str]) -> ConnectError:
    codes = {error.errno for error in failures}
    if errno.EADDRINUSE in codes and not address.port:
        return ConnectError(f"no port of DETCOLL_PORTS={environ.get('DETCOLL_PORTS')!r} is free on {address.host}")
    if errno.EADDRINUSE in codes:
        hint = "perhaps by another job; set DETCOLL_RENDEZVOUS to a free one"
        return ConnectError(f"rendezvous {address}: the port is already in use, {hint}")
    if errno.EADDRNOTAVAIL in codes:
        hint = "if others reach this host there all the same (NAT, a service), set DETCOLL_ADVERTISE to it on rank 0"
        return ConnectError(f"rendezvous {address}: not an address of this host, where rank 0 runs; {hint}")
    return ConnectError(f"rendezvous {address}: cannot listen there: {failures[0].strerror}")


def _where(found: tuple[Any, ...]) -> Where:
    if len(found) == 4:
        return str(found[0]), int(found[1]), int(found[2]), int(found[3])
    return str(found[0]), int(found[1])


def at_port(where: Where, port: int, host: str | None = None) -> Where:
    """Return ``where`` with the given port, and with the given host unless None."""
    host = where[0] if host is None else host
    return (host, port, where[2], where[3]) if len(where) == 4 else (host, port)


class _Foreign(Exception):
    """A service answered that does not speak ZeroMQ."""


def _reach_once(family: socket.AddressFamily, where: Where, timeout_s: float) -> Reached:
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(where)
        if connection.getsockname() == connection.getpeername():
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")  # TCP connected to itself
        begin = connection.recv(1)  # in ZeroMQ both sides send a greeting at once
        if not begin:
            raise ConnectionResetError(errno.ECONNRESET, "the connection ended at once")
        if begin != b"\xff":
            raise _Foreign("it does not speak ZeroMQ")
        return Reached(_where(connection.getpeername()), str(connection.getsockname()[0]))
