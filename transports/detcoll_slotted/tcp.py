"""The TCP connection beneath a ZeroMQ socket.

ZeroMQ's monitor tells the file descriptor of each connection that is made. Through a duplicate of it the kernel is told
to pace the connection (``SO_MAX_PACING_RATE``) and which congestion control to use, and asked what it retransmitted
(``TCP_INFO``). A duplicate costs a descriptor, so only connections that are asked all the time keep theirs; for the
others one is made for each question, and compared with the addresses noted at first, since ZeroMQ may have closed the
connection meanwhile and the number may belong to another file.

Which control suits which path, and when it changes, is said in `detcoll_slotted.congestion`.

TCP has no more under way than its send buffer holds. The kernel lets them grow to the last number of ``tcp_wmem``, of
which some two thirds are payload. Where more has to be under way the buffer is set, with room for what is acknowledged
late and for what is to leave next, which beyond ``wmem_max`` only a process with CAP_NET_ADMIN may do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from detcoll_slotted.congestion import PathFacts

SO_MAX_PACING_RATE = 47
SO_SNDBUFFORCE = 32
BUFFER_SHARE = 2.0
"""Bytes of send buffer for each that is under way, with what the kernel keeps beside them. With 1.5 the line idles:
64 MiB at 1 Gbit/s over 80 ms take 623 ms instead of 608."""
_LARGEST_BUFFER_BYTES = 2**30 - 1
_SIOCOUTQNSD = 0x894B
# struct tcp_info of linux/tcp.h, up to Linux 4.10's tcpi_sndbuf_limited; times in us
_TCP_INFO_BYTES = 192
_RTT_AT, _RETRANSMITS_AT, _ACKNOWLEDGED_AT, _UNSENT_AT, _BUSY_AT = 68, 100, 120, 144, 168
_LARGEST_NAME_BYTES = 16  # TCP_CA_NAME_MAX

_Names = tuple[str, str]


class Connection:
    """One TCP connection that ZeroMQ has made; see `adopt`."""

    def __init__(self, descriptor: int, names: _Names, kept: socket.socket | None) -> None:
        self.names = names
        self._descriptor, self._kept = descriptor, kept

    @classmethod
    def adopt(cls, descriptor: int, endpoint: str, *, keep: bool) -> Connection | None:
        """Return the connection to an endpoint of which a monitor told the descriptor, or None if it is gone again.

        Parameters
        ----------
        descriptor : int
            ZeroMQ's own.
        endpoint : str
            Where it leads, as ``tcp://host:port``.
        keep : bool
            Whether to keep a duplicate.
        """
        try:
            tcp = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed again already: the next event tells
            return None
        names = _names(tcp)
        if names is None or names[1].rpartition(":")[2] != endpoint.rpartition(":")[2]:
            tcp.close()  # the number went to another file meanwhile
            return None
        if keep:
            return cls(descriptor, names, tcp)
        tcp.close()
        return cls(descriptor, names, None)

    def pace(self, rate_bytes_per_s: int) -> None:
        """Let the kernel send at most so many payload bytes per second."""
        with self._borrowed() as tcp, contextlib.suppress(OSError):  # it just broke: set again on the next one
            if tcp is not None:
                tcp.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", rate_bytes_per_s))

    def prepare(self, congestion: str | None, buffer_bytes: int) -> bool:
        """Choose the congestion control, and make the send buffer large enough where it does not grow by itself.

        Returns False where the kernel does not offer that control, and its default stays.
        """
        with self._borrowed() as tcp:
            if tcp is None:
                return True
            is_chosen = not congestion or _choose(tcp, congestion)
            if buffer_bytes and buffer_bytes > _grows_to_bytes():
                _set_send_buffer(tcp, buffer_bytes)
            return is_chosen

    def unsent_bytes(self) -> int:
        """Return what the kernel was given and has not sent yet; 0 where the connection is gone."""
        if self._kept is not None:  # asked before each paced send
            return _unsent_bytes(self._kept)
        with self._borrowed() as tcp:
            return _unsent_bytes(tcp) if tcp is not None else 0

    def choose(self, congestion: str) -> bool:
        """Change the congestion control; False where this system does not offer it or the connection is gone."""
        with self._borrowed() as tcp:
            return tcp is not None and _choose(tcp, congestion)

    def congestion(self) -> str:
        """Return the name of the congestion control; empty where the connection is gone."""
        with contextlib.suppress(OSError):
            name = self.option(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _LARGEST_NAME_BYTES)
            return name.rstrip(b"\0").decode()
        return ""

    def facts(self) -> PathFacts | None:
        """Return what TCP has counted, or None where the kernel does not tell."""
        with self._borrowed() as tcp, contextlib.suppress(OSError):
            if tcp is not None:
                told = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                if len(told) == _TCP_INFO_BYTES:
                    round_trip_us, retransmits = (
                        struct.unpack_from("I", told, at)[0] for at in (_RTT_AT, _RETRANSMITS_AT)
                    )
                    unsent_bytes, least_us = struct.unpack_from("2I", told, _UNSENT_AT)
                    busy_us, by_receiver_us, by_buffer_us = struct.unpack_from("3Q", told, _BUSY_AT)
                    return PathFacts(
                        struct.unpack_from("Q", told, _ACKNOWLEDGED_AT)[0],
                        (busy_us - by_receiver_us - by_buffer_us) * 1000,
                        retransmits, round_trip_us * 1000, least_us * 1000, unsent_bytes,
                    )  # fmt: skip
        return None

    def option(self, level: int, name: int, nbytes: int) -> bytes:
        """Return what the kernel has set, empty where the connection is gone."""
        with self._borrowed() as tcp:
            return b"" if tcp is None else tcp.getsockopt(level, name, nbytes)

    def cut(self) -> None:
        """End the connection in both directions; ZeroMQ makes a new one."""
        with self._borrowed() as tcp, contextlib.suppress(OSError):
            if tcp is not None:
                tcp.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the duplicate back."""
        if self._kept is not None:
            self._kept.close()

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[socket.socket | None]:
        kept = self._kept  # counters are also read by a thread that does not own the socket
        if kept is not None:
            yield kept
            return
        try:
            tcp = socket.socket(fileno=os.dup(self._descriptor))
        except OSError:
            yield None
            return
        with tcp:
            yield tcp if _names(tcp) == self.names else None


def _choose(tcp: socket.socket, congestion: str) -> bool:
    try:
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    except OSError:  # not offered by this kernel, not permitted to this user, or the connection broke
        return False
    return True


def _unsent_bytes(tcp: socket.socket) -> int:
    try:
        return int.from_bytes(fcntl.ioctl(tcp, _SIOCOUTQNSD, b"\0\0\0\0"), sys.byteorder)
    except OSError:
        return 0


def _names(tcp: socket.socket) -> _Names | None:
    """Return local and remote ``ip:port``, or None where there are none."""
    try:
        local, remote = tcp.getsockname(), tcp.getpeername()
        return f"{local[0]}:{local[1]}", f"{remote[0]}:{remote[1]}"
    except (OSError, IndexError):
        return None


def _grows_to_bytes() -> int:
    """Return how large the kernel lets a send buffer grow by itself."""
    return _last_number("/proc/sys/net/ipv4/tcp_wmem")


def _set_send_buffer(tcp: socket.socket, nbytes: int) -> None:
    """Make room for ``nbytes``, or for as many as the system permits; the kernel doubles what it is told."""
    half = min(nbytes // 2, _LARGEST_BUFFER_BYTES)
    with contextlib.suppress(OSError):  # the connection just broke: set again on the next one
        try:
            tcp.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, half)
        except PermissionError:
            if 2 * min(half, _last_number("/proc/sys/net/core/wmem_max")) > _grows_to_bytes():
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, half)


def _last_number(path: str) -> int:
    """Return the last number of a kernel setting, or one beyond all that is needed where it does not tell."""
    try:
        return int(Path(path).read_text(encoding="ascii").split()[-1])
    except (OSError, ValueError, IndexError):
        return sys.maxsize
