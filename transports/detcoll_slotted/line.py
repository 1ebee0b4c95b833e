"""Connections to other ranks, several of one lane on one ZeroMQ socket.

A ROUTER socket reaches each peer by a route, the name that it gave the connection. Its monitor, which costs three
descriptors, tells of all of them, by the address where each leads. Through a proxy all addresses are the proxy's, so
such connections have a socket each.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

from detcoll_slotted.congestion import SharedPath
from detcoll_slotted.tcp import BUFFER_SHARE, Connection
from detcoll_slotted.wire import Lane

log = logging.getLogger("detcoll")

UNPACED = 2**64 - 1
"""What the kernel takes for no limit."""
_WATCHED = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
_WATCHED_BEHIND_PROXY = _WATCHED | zmq.EVENT_CONNECT_DELAYED | zmq.EVENT_CLOSED
_FIRST_RETRY_BEHIND_PROXY_MS = 200
"""How long ZeroMQ waits after a connection ended: until then the socket can be closed, see `Trunk.close`. Longer than a
socket lingers."""


@dataclass(frozen=True, slots=True)
class Style:
    """How the TCP connections of a line are set up.

    ``keep`` : a duplicate of the descriptor is kept.  ``shared_round_trip_ns`` : of a path that nobody reserved, on
    which the congestion control follows what the path shows; None where the control stays.
    """

    congestion: str | None = None
    in_flight_bytes: int = 0
    keep: bool = False
    shared_round_trip_ns: int | None = None


class Line:
    """The connection to one peer, for one lane or both, and the TCP connection beneath it just now.

    It has two fields more than most classes may have: what traces tell of a connection is kept here too.
    """

    def __init__(
        self, trunk: Trunk, route: bytes, rank: int, address: str, lanes: tuple[Lane, ...], style: Style
    ) -> None:
        self.trunk, self.route, self.rank, self.address, self.lanes = trunk, route, rank, address, lanes
        self.connected = False
        self.was_connected = False
        self.is_paced = True
        """Whether the kernel is told the granted rate; else messages are handed over at it."""
        self._style = style
        self.rate_bytes_per_s = 0
        self.switches = 0
        """How often the congestion control was changed on live connections."""
        shared_ns = style.shared_round_trip_ns
        self._path = None if shared_ns is None else SharedPath(shared_ns)
        self._granted_bytes_per_s = 0
        self._free_ns = 0
        self._tcp: Connection | None = None
        self._past_retransmits = 0
        self.is_tried = True
        """Whether ZeroMQ is connecting, or failed to and will retry. Monitors report it only behind a proxy."""

    def note(self, event: int, value: int, endpoint: str) -> bool:
        """Take in what the monitor says; True when a broken connection has come back."""
        if event == zmq.EVENT_CONNECTED:
            self.is_tried = False
            self._adopt(value, endpoint)
        elif event in (zmq.EVENT_CONNECT_DELAYED, zmq.EVENT_CLOSED):
            self.is_tried = True
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            returned = self.was_connected
            self.connected = self.was_connected = True
            return returned
        elif event == zmq.EVENT_DISCONNECTED:
            self.close()
        return False

    def pace(self, rate_bytes_per_s: float) -> None:
        """Let the kernel send at most this many payload bytes per second on this connection, where it paces it."""
        rate = int(rate_bytes_per_s)
        if self._path is not None:
            if rate != UNPACED:
                self._granted_bytes_per_s = rate
            if self._granted_bytes_per_s and self.share < 1:
                rate = int(self._granted_bytes_per_s * self.share)
        if rate != self.rate_bytes_per_s:
            self.rate_bytes_per_s = rate
            if self._tcp is not None and self._kernel_paces:
                self._tcp.pace(rate)

    def look(self, now_ns: int) -> None:
        """Change the congestion control where the path shows that another one suits it."""
        if self._path is None or self._tcp is None or (facts := self._tcp.facts()) is None:
            return
        before = self._path.verdict
        after = self._path.look(facts, self._granted_bytes_per_s, now_ns)
        if after == before:
            return
        if not self._tcp.choose(after.control):
            self._path.refused(before)
            log.info("the connection to rank %d does without %s, which is not to be had", self.rank, after.control)
            return
        self.switches += 1
        log.info("the connection to rank %d changes from %s to %s", self.rank, before.control, after.control)
        self.pace(self._granted_bytes_per_s)
        if not self.is_paced and not self._kernel_paces:
            self._tcp.pace(UNPACED)

    @property
    def share(self) -> float:
        """The part of its granted rate that it may take."""
        return 1.0 if self._path is None else self._path.verdict.share

    @property
    def _kernel_paces(self) -> bool:
        """Whether the kernel is told the rate: one below the granted rate has to be kept to also where hosts pace."""
        return self.is_paced or self.share < 1

    def leaves_ns(self, now_ns: int, nbytes: int) -> int:
        """Return when ``nbytes`` handed over now will have left at the pace set, behind what was handed over before."""
        takes_ns = int(nbytes / self.rate_bytes_per_s * 1e9) if self.rate_bytes_per_s else 0
        self._free_ns = max(self._free_ns, now_ns) + takes_ns
        return self._free_ns

    def unsent_bytes(self) -> int:
        """Return what the kernel was given and has not sent yet; 0 where there is no connection."""
        return self._tcp.unsent_bytes() if self._tcp is not None else 0

    def retransmits(self) -> int:
        """Return retransmitted segments of all connections so far, as far as the kernel told."""
        tcp = self._tcp  # counters are also read by a thread that does not own the socket
        told = tcp.facts() if tcp is not None else None
        return self._past_retransmits + (told.retransmits if told else 0)

    @property
    def tcp(self) -> Connection | None:
        """The TCP connection, or None while there is none."""
        return self._tcp

    def cut(self) -> None:
        """End the TCP connection, so that a new one takes its place."""
        if self._tcp is not None:
            self._tcp.cut()

    def close(self) -> None:
        """Take note that the TCP connection has ended."""
        self.connected = False
        self._drop()

    def _adopt(self, descriptor: int, endpoint: str) -> None:
        self._drop()
        self._tcp = Connection.adopt(descriptor, endpoint, keep=self._style.keep)
        if self._tcp is not None:
            congestion = self._style.congestion
            if self._path is not None:
                self._path.begin()
                congestion = self._path.verdict.control
            is_chosen = self._tcp.prepare(congestion, round(self._style.in_flight_bytes * BUFFER_SHARE))
            if self._path is not None and self.share < 1 and not is_chosen:
                self._path.refused()
                self.pace(self._granted_bytes_per_s or self.rate_bytes_per_s)
            if self.rate_bytes_per_s and self._kernel_paces:
                self._tcp.pace(self.rate_bytes_per_s)

    def _drop(self) -> None:
        if self._tcp is not None:
            self._past_retransmits = self.retransmits()
            tcp, self._tcp = self._tcp, None
            tcp.close()


class Trunk:
    """A ROUTER socket, its monitor, and the lines on it."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], configure: Callable[[zmq.Socket[bytes]], None], proxy: str = ""
    ) -> None:
        self._proxy = proxy
        self._lines: dict[str, Line] = {}
        self._routes = itertools.count()
        self.socket = context.socket(zmq.ROUTER)
        try:
            configure(self.socket)
            self.socket.sndhwm = 0  # bounded by credit, which counts bytes
            if proxy:
                self.socket.setsockopt_string(zmq.SOCKS_PROXY, proxy)
                self.socket.reconnect_ivl = _FIRST_RETRY_BEHIND_PROXY_MS
            self.monitor = self.socket.get_monitor_socket(_WATCHED_BEHIND_PROXY if proxy else _WATCHED)
        except BaseException:
            self.socket.close(linger=0)
            raise

    @property
    def is_proxied(self) -> bool:
        """Whether its connections lead through a SOCKS proxy."""
        return bool(self._proxy)

    def connect(self, rank: int, address: str, lanes: tuple[Lane, ...], style: Style) -> Line:
        """Begin to connect to a peer; what is sent meanwhile waits."""
        # Not two connections of a socket may ever have one route: ZeroMQ would abort the process.
        route = b"%d" % next(self._routes)
        self.socket.setsockopt(zmq.CONNECT_ROUTING_ID, route)
        self.socket.connect(address)
        line = self._lines[self._proxy or address] = Line(self, route, rank, address, lanes, style)
        return line

    def disconnect(self, line: Line) -> None:
        """Drop what was sent to a peer and has not left, and connect to it no more, if ZeroMQ can; see `close`."""
        if self._may_end(line) and self._lines.pop(self._proxy or line.address, None) is not None:
            self.socket.linger = 0
            self.socket.disconnect(line.address)
            line.close()

    def _may_end(self, line: Line) -> bool:
        """Tell whether this line can be ended without ZeroMQ aborting the process."""
        if self.is_proxied:
            self.events()  # what became of it since they were read last
        return not self.is_proxied or not line.is_tried

    def events(self) -> list[tuple[Line, bool]]:
        """Take in what the monitor says; returns lines of which it spoke, and whether they were broken and are back."""
        told: dict[Line, bool] = {}
        while True:
            try:
                event = parse_monitor_message(self.monitor.recv_multipart(zmq.DONTWAIT))
            except zmq.Again:
                return list(told.items())
            endpoint = event["endpoint"].decode()
            line = self._lines.get(self._proxy or endpoint)
            if line is not None:
                told[line] = line.note(event["event"], int(event["value"]), endpoint) or told.get(line, False)

    def close(self, linger_ms: int) -> bool:
        """Close socket and monitor; what is queued for connected peers has ``linger_ms`` to leave.

        Returns False if the socket has to stay open, with its context, until the process ends: ZeroMQ 4.3.5 aborts the
        process if a socket is closed after it failed to connect through a SOCKS proxy. Such a socket goes on retrying,
        and sends what it holds if it connects.
        """
        if self.is_proxied:
            self.events()  # a line that ended is dropped now: ZeroMQ would retry while the socket lingers
        for line in [line for line in self._lines.values() if not line.connected]:
            self.disconnect(line)
        may_end = all(self._may_end(line) for line in self._lines.values())
        for line in self._lines.values():
            line.close()
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        if may_end:
            self.socket.close(linger=linger_ms)
        return may_end
