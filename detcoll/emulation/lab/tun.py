"""The device through which a site reaches the wide area.

A TUN device with a virtio header and segmentation offload: the kernel hands over whole runs of segments and leaves
their checksums open, as it would to a network card. The device exists as long as its descriptor is open. Source:
Linux ``Documentation/networking/tuntap.rst`` and ``include/uapi/linux/if_tun.h``.
"""

from __future__ import annotations

import fcntl
import os
import platform
import struct
from pathlib import Path
from types import ModuleType

from detcoll.errors import TransportUnavailable
from detcoll.installation import install_command

DEVICE = "wan0"
PREFIX_LENGTH = 16

_TUN_PATH = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_OFFLOAD_CSUM_TSO4_TSO6 = 1 | 2 | 4
# Units that the router has not read yet. It reads at once; what overflows here would be lost uncounted.
_DEVICE_QUEUE_UNITS = 10_000
_OFFER = "--relay gives rate and delay alone without it"


def why_unavailable() -> str | None:
    """Return why no lab can be opened here and what could be instead, or None where it can."""
    reason = _what_is_missing()
    return reason if reason is None else f"{reason}; {_OFFER}"


def _what_is_missing() -> str | None:
    if platform.system() != "Linux":
        return f"the lab needs Linux, this is {platform.system()}"
    if os.geteuid() != 0:
        return f"the lab needs root for its network namespaces, this is user {os.geteuid()}"
    try:
        os.close(os.open(_TUN_PATH, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"the lab needs {_TUN_PATH}: {error.strerror}"
    try:
        _pyroute2()
    except TransportUnavailable as error:
        return str(error)
    return None


def _pyroute2() -> ModuleType:
    try:
        import pyroute2
    except ImportError as error:
        hint = install_command("measure")
        raise TransportUnavailable(f"the lab needs pyroute2; install it with: {hint}") from error
    return pyroute2  # type: ignore[no-any-return,unused-ignore]


def open_tun(address: str, mtu_bytes: int, gso_max_bytes: int, slow_start_after_idle: bool) -> int:
    """Make the device in the calling thread's network namespace, bring it and the loopback up, return its descriptor.

    Raises
    ------
    TransportUnavailable
        If pyroute2 is missing.
    OSError
        If the kernel refuses.
    """
    pyroute2 = _pyroute2()
    tun = os.open(_TUN_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
        fcntl.ioctl(tun, _TUNSETOFFLOAD, _OFFLOAD_CSUM_TSO4_TSO6)
        # Router solicitations of IPv6 would only be noise on the line.
        _set(f"net/ipv6/conf/{DEVICE}/disable_ipv6", "1", required=False)
        with pyroute2.IPRoute() as netlink:
            index = netlink.link_lookup(ifname=DEVICE)[0]
            netlink.link("set", index=index, mtu=mtu_bytes, txqlen=_DEVICE_QUEUE_UNITS, gso_max_size=gso_max_bytes)
            netlink.addr("add", index=index, address=address, prefixlen=PREFIX_LENGTH)
            netlink.link("set", index=index, state="up")
            netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")
        if not slow_start_after_idle:
            _set("net/ipv4/tcp_slow_start_after_idle", "0")
    except pyroute2.NetlinkError as error:
        os.close(tun)
        raise OSError(error.code, f"{DEVICE} with address {address}: {error}") from error
    except BaseException:
        os.close(tun)
        raise
    return tun


def _set(name: str, value: str, *, required: bool = True) -> None:
    """Set a kernel parameter of the calling thread's network namespace."""
    path = Path("/proc/sys", name)
    if required or path.exists():
        path.write_text(value, encoding="ascii")
