"""Which size of packets reaches another host, found by trying.

A router that cannot pass a packet on should say so (ICMP, "fragmentation needed"), and TCP then sends smaller ones.
Where a firewall drops that message, a connection opens, small messages pass, and large ones hang. Here UDP packets that
may not be fragmented go to a port where nobody listens: the other host refuses those that reach it. RFC 4821 describes
what TCP can do by itself (``net.ipv4.tcp_mtu_probing``).
"""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass

from detcoll.errors import ConnectError

PORT = 33_434
"""Where traceroute sends to; nobody listens there."""
WAIT_S = 1.0
"""How long a probe may be on its way; hosts refuse no more than one a second for long."""
SMALL_BYTES = 576
_TRIES = 2
_USUAL_BYTES = (8942, 1492, 1480, 1450, 1420, 1400, 1380, 1350, 1280)
"""Path MTUs of tunnels, in falling order (PPPoE, GRE, VXLAN, WireGuard, IPsec, and the least of IPv6)."""
_IP_MTU, _IP_MTU_DISCOVER, _PROBE = 14, 10, 3
_IPV6_MTU, _IPV6_MTU_DISCOVER = 24, 23


@dataclass(frozen=True, slots=True)
class PathMtu:
    """The largest packets towards a host.

    ``device_bytes`` : what the interface of this host sends.  ``passed_bytes`` : the largest that was tried and came
    through, 0 if none did.  ``is_told`` : whether a router said that larger ones do not pass.
    """

    device_bytes: int
    passed_bytes: int
    is_told: bool = False


def probe(host: str, port: int = PORT) -> PathMtu:
    """Try the sizes of packets towards ``host``; takes some seconds where large packets vanish.

    Raises
    ------
    ConnectError
        If the host cannot be resolved, or there is no route to it.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probing:
            probing.connect(where)
            return _probe(probing, family)
    except (OSError, UnicodeError) as error:
        raise ConnectError(f"no packet can be sent to {host!r}: {error}") from error


def _probe(probing: socket.socket, family: socket.AddressFamily) -> PathMtu:
    is_6 = family == socket.AF_INET6
    level = socket.IPPROTO_IPV6 if is_6 else socket.IPPROTO_IP
    headers = (40 if is_6 else 20) + 8
    device = probing.getsockopt(level, _IPV6_MTU if is_6 else _IP_MTU)
    probing.setsockopt(level, _IPV6_MTU_DISCOVER if is_6 else _IP_MTU_DISCOVER, _PROBE)
    probing.settimeout(WAIT_S)
    device = min(device, 65_535)  # of loopback, which is one byte more than a packet may have
    if _end(probing, SMALL_BYTES - headers) != errno.ECONNREFUSED:
        return PathMtu(device, 0)
    is_told = False
    for size in (device, *(usual for usual in _USUAL_BYTES if usual < device)):
        end = _end(probing, size - headers)
        is_told |= end == errno.EMSGSIZE
        if end == errno.ECONNREFUSED:
            return PathMtu(device, size, is_told)
    return PathMtu(device, SMALL_BYTES, is_told)


def _end(probing: socket.socket, nbytes: int) -> int:
    """Send so many bytes; return ECONNREFUSED if the other host got them, EMSGSIZE if a router did not, else 0."""
    for _ in range(_TRIES):
        try:
            probing.send(bytes(nbytes))
            until_ns = time.monotonic_ns() + round(WAIT_S * 1e9)
            while time.monotonic_ns() < until_ns:
                probing.recv(1)
        except TimeoutError:
            continue
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.EMSGSIZE):
                raise
            return error.errno
    return 0
