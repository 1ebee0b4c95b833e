"""Enters a user namespace in which an ordinary user may make networks, then becomes the program it is given.

A process may make network namespaces and devices in them where it has capabilities over them. Whoever makes a user
namespace has all capabilities in it, and over what is made from there, but over nothing outside. Only a process of one
thread may enter one, and NumPy starts threads; so this runs as a plain file and imports nothing of detcoll::

    python -I -S user_namespace.py COMMAND ARGUMENTS ...

Without COMMAND it tries whether a site's network can be made there; where that fails it prints "STEP ERRNO".

The user keeps its number, so files, names and permissions are the user's own, and programs that refuse to run as root
have nothing to refuse. An ordinary user's capabilities end with ``execve`` unless they are ambient: those that a lab
needs become so. Sources: user_namespaces(7), capabilities(7).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
import threading

TUN_PATH = "/dev/net/tun"
SYSCTL_PATH = "/proc/sys/net/ipv4/tcp_slow_start_after_idle"
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000

USER, MAP, KEEP, NETWORK, TUN, SYSCTL = "user", "map", "keep", "network", "tun", "sysctl"
"""Steps that may fail: a user namespace, its users, keeping capabilities, a network, its device, its parameters."""

FAILED = 126
"""The exit code where the kernel refuses, or the command cannot be started."""

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2
_CAPABILITY_VERSION_3 = 0x20080522
_NET_BIND_SERVICE, _NET_ADMIN, _NET_RAW, _SYS_CHROOT, _SYS_PTRACE, _SYS_ADMIN = 10, 12, 13, 18, 19, 21
# Namespaces and mounts, devices, who runs in a site; ping and servers in a site want the rest. None of them lets a
# program pass by the permissions of files, so that these hold as they do outside.
_KEPT = (_NET_BIND_SERVICE, _NET_ADMIN, _NET_RAW, _SYS_CHROOT, _SYS_PTRACE, _SYS_ADMIN)


class Refused(Exception):
    """The kernel refused a step."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(f"{step}: {os.strerror(number)}")
        self.step, self.number = step, number


def _call(step: str, function: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments) != 0:
        raise Refused(step, ctypes.get_errno())


def enter() -> None:
    """Move this process, which must have one thread, into a user namespace of its own; user and group stay the same.

    Raises
    ------
    Refused
        If the kernel refuses.
    """
    user, group = os.geteuid(), os.getegid()
    _call(USER, "unshare", _CLONE_NEWUSER)
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    except OSError as error:
        raise Refused(MAP, error.errno or 0) from error


def keep_capabilities() -> None:
    """Let the capabilities that a lab needs outlive ``execve``, and no others.

    Raises
    ------
    Refused
        If the kernel refuses.
    """
    mask = sum(1 << number for number in _KEPT)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _call(KEEP, "capset", header, struct.pack("=6I", mask, mask, mask, 0, 0, 0))
    for number in _KEPT:
        _call(KEEP, "prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, ctypes.c_ulong(number), 0, 0)


def try_site() -> None:
    """Make a network namespace with a device, in a thread of its own, and let go of both.

    Raises
    ------
    Refused
        If the kernel refuses; nothing is left.
    """
    failed: list[BaseException] = []

    def work() -> None:
        try:
            _try_site()
        except BaseException as error:  # what is not told here would pass for success
            failed.append(error)

    thread = threading.Thread(target=work, name="detcoll-lab-trial", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _try_site() -> None:
    _call(NETWORK, "unshare", _CLONE_NEWNET)
    try:
        tun = os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"trial0", IFF_TUN | IFF_NO_PI))
        finally:
            os.close(tun)
    except OSError as error:
        raise Refused(TUN, error.errno or 0) from error
    try:
        # Not access(2), which takes no notice of an ordinary user's capabilities.
        os.close(os.open(SYSCTL_PATH, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        raise Refused(SYSCTL, error.errno or 0) from error


def main(command: list[str]) -> int:
    """Enter, and execute or try; returns only if there is nothing to execute, or it fails."""
    try:
        enter()
        keep_capabilities()
        if not command:
            try_site()
            return 0
    except Refused as error:
        print(error.step, error.number) if not command else print(f"detcoll: {error}", file=sys.stderr)
        return FAILED
    try:
        os.execv(command[0], command)
    except OSError as error:
        print(f"detcoll: {command[0]!r} cannot be started: {error.strerror}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
