"""The device through which a site reaches the wide area.

A TUN device with a virtio header and segmentation offload: the kernel hands over whole runs of segments and leaves
their checksums open, as it would to a network card. The device exists as long as its descriptor is open. Source:
Linux ``Documentation/networking/tuntap.rst`` and ``include/uapi/linux/if_tun.h``.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from types import ModuleType

from detcoll.emulation.lab.user_namespace import IFF_NO_PI, IFF_TUN, TUN_PATH, TUNSETIFF
from detcoll.errors import TransportUnavailable
from detcoll.installation import install_command

DEVICE = "wan0"
PREFIX_LENGTH = 16

_TUNSETOFFLOAD = 0x400454D0
_IFF_VNET_HDR = 0x4000
_OFFLOAD_CSUM_TSO4_TSO6 = 1 | 2 | 4
# Units that the router has not read yet. It reads at once; what overflows here would be lost uncounted.
_DEVICE_QUEUE_UNITS = 10_000


def pyroute2() -> ModuleType:
    """Return the library that the device is set up with.

    Raises
    ------
    TransportUnavailable
        If it is missing; says how to install it.
    """
    try:
        import pyroute2 as library
    except ImportError as error:
        hint = install_command("measure")
        raise TransportUnavailable(f"the lab needs pyroute2; install it with: {hint}") from error
    return library  # type: ignore[no-any-return,unused-ignore]


def open_tun(address: str, mtu_bytes: int, gso_max_bytes: int, slow_start_after_idle: bool) -> int:
    """Make the device in the calling thread's network namespace, bring it and the loopback up, return its descriptor.

    Raises
    ------
    TransportUnavailable
        If pyroute2 is missing.
    OSError
        If the kernel refuses.
    """
    library = pyroute2()
    tun = os.open(TUN_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = IFF_TUN | IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
        fcntl.ioctl(tun, _TUNSETOFFLOAD, _OFFLOAD_CSUM_TSO4_TSO6)
        # Router solicitations of IPv6 would only be noise on the line.
        _set(f"net/ipv6/conf/{DEVICE}/disable_ipv6", "1", required=False)
        with library.IPRoute() as netlink:
            index = netlink.link_lookup(ifname=DEVICE)[0]
            netlink.link("set", index=index, mtu=mtu_bytes, txqlen=_DEVICE_QUEUE_UNITS, gso_max_size=gso_max_bytes)
            netlink.addr("add", index=index, address=address, prefixlen=PREFIX_LENGTH)
            netlink.link("set", index=index, state="up")
            netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")
        if not slow_start_after_idle:
            _set("net/ipv4/tcp_slow_start_after_idle", "0")
    except library.NetlinkError as error:
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
