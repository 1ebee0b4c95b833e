"""The TCP connection beneath a ZeroMQ socket.

A socket's monitor reports the file descriptor of each connection that ZeroMQ makes. Through a duplicate of it the
kernel is told to pace the connection (``SO_MAX_PACING_RATE``) and which congestion control to use, and asked what it
retransmitted (``TCP_INFO``). After a reconnect the descriptor is a new one, and everything is set again.

On a reserved, paced path loss does not happen, so a loss-based control never slows down, while BBR empties the pipe for
200 ms every 10 s to probe the round trip. Hence CUBIC unless told otherwise.

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
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

SO_MAX_PACING_RATE = 47
SO_SNDBUFFORCE = 32
UNPACED = 2**64 - 1
"""What the kernel takes for no limit."""
BUFFER_SHARE = 2.0
"""Bytes of send buffer for each that is under way, with what the kernel keeps beside them. With 1.5 the line idles:
64 MiB at 1 Gbit/s over 80 ms take 623 ms instead of 608."""
_LARGEST_BUFFER_BYTES = 2**30 - 1
_SIOCOUTQNSD = 0x894B
_TCP_INFO_BYTES = 104
_RTT_AT, _RETRANSMITS_AT = 68, 100  # struct tcp_info of linux/tcp.h
_WATCHED = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED


class Line:
    """One PUSH socket, its monitor, and the TCP connection it has just now, with ``in_flight_bytes`` under way."""

    def __init__(self, push: zmq.Socket[bytes], congestion: str | None, in_flight_bytes: int) -> None:
        self.push = push
        self.monitor = push.get_monitor_socket(_WATCHED)
        self.connected = False
        self.was_connected = False
        self.broken_since_ns = 0
        self._congestion = congestion
        self._buffer_bytes = round(in_flight_bytes * BUFFER_SHARE)
        self._rate_bytes_per_s = 0
        self._free_ns = 0
        self._tcp: socket.socket | None = None
        self._past_retransmits = 0

    def events(self, now_ns: int) -> bool:
        """Take in what the monitor says; True when a broken connection has come back."""
        returned = False
        while True:
            try:
                event = parse_monitor_message(self.monitor.recv_multipart(zmq.DONTWAIT))
            except zmq.Again:
                return returned
            if event["event"] == zmq.EVENT_CONNECTED:
                self._adopt(int(event["value"]), event["endpoint"].decode())
            elif event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                returned |= self.was_connected
                self.connected = self.was_connected = True
                self.broken_since_ns = 0
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                self.connected = False
                self.broken_since_ns = self.broken_since_ns or now_ns
                self._drop()

    def pace(self, rate_bytes_per_s: float) -> None:
        """Let the kernel send at most this many payload bytes per second on this connection."""
        rate = int(rate_bytes_per_s)
        if rate != self._rate_bytes_per_s:
            self._rate_bytes_per_s = rate
            self._apply_rate()

    def leaves_ns(self, now_ns: int, nbytes: int) -> int:
        """Return when ``nbytes`` handed over now will have left at the pace set, behind what was handed over before."""
        takes_ns = int(nbytes / self._rate_bytes_per_s * 1e9) if self._rate_bytes_per_s else 0
        self._free_ns = max(self._free_ns, now_ns) + takes_ns
        return self._free_ns

    def unsent_bytes(self) -> int:
        """Return what the kernel was given and has not sent yet; 0 where there is no connection."""
        if self._tcp is None:
            return 0
        try:
            return int(struct.unpack("i", fcntl.ioctl(self._tcp, _SIOCOUTQNSD, b"\0\0\0\0"))[0])
        except OSError:
            return 0

    def info(self) -> tuple[int, int]:
        """Return smoothed round trip in ns and retransmitted segments of all connections so far."""
        info = self._read_info()
        if info is None:
            return 0, self._past_retransmits
        round_trip_us, retransmits = (struct.unpack_from("I", info, at)[0] for at in (_RTT_AT, _RETRANSMITS_AT))
        return round_trip_us * 1000, self._past_retransmits + retransmits

    def names(self) -> tuple[str, str] | None:
        """Return local and remote ``ip:port`` of the connection, or None while there is none."""
        tcp = self._tcp
        if tcp is None:
            return None
        try:
            local, remote = tcp.getsockname(), tcp.getpeername()
        except OSError:
            return None
        return f"{local[0]}:{local[1]}", f"{remote[0]}:{remote[1]}"

    def close(self, linger_ms: int) -> None:
        """Close the socket and its monitor; what is queued has ``linger_ms`` to leave."""
        self._drop()
        self.push.disable_monitor()
        self.monitor.close(linger=0)
        self.push.close(linger=linger_ms)

    def _adopt(self, descriptor: int, endpoint: str) -> None:
        self._drop()
        try:
            tcp = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed again already: the next event tells
            return
        try:
            port = tcp.getpeername()[1]
        except (OSError, IndexError):
            port = None
        if str(port) != endpoint.rpartition(":")[2]:  # the number went to another file meanwhile
            tcp.close()
            return
        self._tcp = tcp
        if self._congestion:
            with contextlib.suppress(OSError):  # not offered by this kernel: its default stays, and counters show it
                self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion.encode())
        if self._buffer_bytes and self._buffer_bytes > _grows_to_bytes():
            _set_send_buffer(self._tcp, self._buffer_bytes)
        self._apply_rate()

    def _apply_rate(self) -> None:
        if self._tcp is not None and self._rate_bytes_per_s:
            with contextlib.suppress(OSError):  # the connection just broke: set again on the next one
                self._tcp.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", self._rate_bytes_per_s))

    def _read_info(self) -> bytes | None:
        """Return struct tcp_info, or None without a connection or where the kernel's is shorter."""
        tcp = self._tcp  # counters are also read by a thread that does not own the socket
        if tcp is None:
            return None
        try:
            info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            return None
        return info if len(info) == _TCP_INFO_BYTES else None

    def _drop(self) -> None:
        if self._tcp is not None:
            self._past_retransmits = self.info()[1]
            self._tcp.close()
            self._tcp = None


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
