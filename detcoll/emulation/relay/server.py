"""The relay's process: a SOCKS5 proxy on loopback with a port for every site, and the lines between them.

At which port a connection comes tells the site that it comes from; in which site's range of ports its target listens
tells where it goes. Other targets are refused, so the relay leads nowhere but to the ranks.

One thread waits for sockets and for what is due. Waiting is in select(2) on the selector's own descriptor where it has
one, since epoll counts milliseconds. The process ends when its control socket says so or is closed, which happens
however its parent ends.
"""

from __future__ import annotations

import gc
import ipaddress
import math
import resource
import select
import selectors
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from detcoll.emulation.helper import ASK_QUIT, ASK_STATISTICS, answer, configured
from detcoll.emulation.relay.lines import Direction, Lines
from detcoll.emulation.relay.socks import Answer
from detcoll.emulation.relay.tunnel import Event, Side, Tunnel
from detcoll.priority import LINE, make_prompt, shorten_turns
from detcoll.topology import Topology

LOOPBACK = "127.0.0.1"

_HANDSHAKE_NS = 10 * 10**9
_BACKLOG = 4096
_LONGEST_WAIT_S = 60.0
# Of a rank to each of another site, as many as the slotted transport has; each takes two sockets here.
_CONNECTIONS_OF_A_PAIR = 2
_OTHER_DESCRIPTORS = 64


class RelayConfig(msgspec.Struct, frozen=True):
    """The lines, the ports in which the ranks of each site listen (first and last), and how much may wait at a line.

    ``folder`` : removed when the relay ends, since its parent may be killed.
    """

    topology: Topology
    ports: tuple[tuple[int, int], ...]
    buffer_bytes: int
    folder: str


class RelayStatistics(msgspec.Struct, frozen=True):
    """What the relay counted since it was opened.

    ``connections`` : that were opened to a target.  ``refused`` : that were not, and strangers of other protocols.
    ``uplink_peak_bytes`` : the longest queue of each site's uplink.  ``late_mean_ns``, ``late_peak_ns`` : how late
    pieces were handed over, which the machine decides.  ``cpu_s`` : processor time.
    """

    directions: tuple[Direction, ...]
    connections: int
    refused: int
    uplink_peak_bytes: tuple[int, ...]
    late_mean_ns: float
    late_peak_ns: int
    cpu_s: float
    elapsed_s: float


Piece = tuple[Tunnel, Event, Side, bytes]
"""What travels: its tunnel, what it means, the end that it leads to, and data."""


class Server:
    """Everything that the process holds.

    It has one field more than most classes may have, since the process serves one loop: sockets, lines, tunnels.
    """

    def __init__(self, config: RelayConfig, control: socket.socket) -> None:
        self._config, self._control = config, control
        _allow_descriptors(config.topology)
        self._selector = selectors.DefaultSelector()
        self._lines: Lines[Piece] = Lines(config.topology, config.buffer_bytes)
        self._pieces = [self._lines.piece_bytes(site) for site in range(len(config.topology.sites))]
        self._started_ns = time.monotonic_ns()
        self._tunnels: set[Tunnel] = set()
        self._greeting: deque[Tunnel] = deque()
        self._held: deque[tuple[Tunnel, Side]] = deque()
        self._is_deaf = False
        self._connections = self._refused = self._handed_over = 0
        self._late_sum_ns = self._late_peak_ns = 0.0
        self._listeners: list[socket.socket] = []
        for _ in config.topology.sites:
            self._listeners.append(socket.create_server((LOOPBACK, 0), backlog=_BACKLOG))
            self._listeners[-1].setblocking(False)
        self._selector.register(control, selectors.EVENT_READ)
        self._listen()

    @property
    def ports(self) -> tuple[int, ...]:
        """Where connections from each site are taken."""
        return tuple(listener.getsockname()[1] for listener in self._listeners)

    def run(self) -> None:
        """Serve until the control socket says goodbye or is closed."""
        while True:
            for key in self._wait():
                if key.fileobj is self._control:
                    if not self._answer_control():
                        return
                elif isinstance(key.data, int):
                    self._accept(key.data)
                else:
                    self._on_socket(*key.data)
            self._hand_over()
            self._take_up()
            self._end_late_handshakes()

    def close(self) -> None:
        """Close every socket."""
        for tunnel in list(self._tunnels):
            tunnel.close()
        for listener in self._listeners:
            listener.close()
        self._selector.close()

    def _wait(self) -> list[selectors.SelectorKey]:
        """Return what is ready, once something is or something is due."""
        next_ns = min(self._lines.next_ns, self._reopens_ns())
        if self._greeting:
            next_ns = min(next_ns, self._greeting[0].deadline_ns)
        timeout_s = _LONGEST_WAIT_S if next_ns == math.inf else max(0.0, (next_ns - time.monotonic_ns()) / 1e9)
        descriptor = getattr(self._selector, "fileno", None)
        if descriptor is not None:
            select.select([descriptor()], (), (), timeout_s)
            timeout_s = 0.0
        return [key for key, _ in self._selector.select(timeout_s)]

    def _reopens_ns(self) -> float:
        """Return when a connection that is held can be read again by the passing of time alone."""
        return min((self._opens_ns(tunnel, side) for tunnel, side in self._held), default=math.inf)

    def _opens_ns(self, tunnel: Tunnel, side: Side) -> float:
        other = tunnel.other(side)
        if other is None or other.waiting_bytes > self._config.buffer_bytes:
            return math.inf
        return self._lines.opens_ns(side.site, other.site)

    def _answer_control(self) -> bool:
        """Answer what is asked; False at the end."""
        asked = self._control.recv(1)
        if asked in (ASK_STATISTICS, ASK_QUIT):
            answer(self._control, self.statistics())
        return asked == ASK_STATISTICS

    def statistics(self) -> RelayStatistics:
        """Return what was counted."""
        return RelayStatistics(
            directions=self._lines.directions(),
            connections=self._connections,
            refused=self._refused,
            uplink_peak_bytes=self._lines.peaks_bytes(),
            late_mean_ns=self._late_sum_ns / max(1, self._handed_over),
            late_peak_ns=round(self._late_peak_ns),
            cpu_s=time.process_time(),
            elapsed_s=(time.monotonic_ns() - self._started_ns) / 1e9,
        )

    def _listen(self) -> None:
        for site, listener in enumerate(self._listeners):
            self._selector.register(listener, selectors.EVENT_READ, site)
        self._is_deaf = False

    def _accept(self, site: int) -> None:
        if self._is_deaf:
            return
        try:
            connection, _ = self._listeners[site].accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # no descriptors left: whoever waits is heard once a connection has ended
            for listener in self._listeners:
                self._selector.unregister(listener)
            self._is_deaf = True
            return
        tunnel = Tunnel(connection, site, time.monotonic_ns() + _HANDSHAKE_NS)
        self._tunnels.add(tunnel)
        self._greeting.append(tunnel)
        self._watch(tunnel, tunnel.client)

    def _watch(self, tunnel: Tunnel, side: Side) -> None:
        """Wait for what a socket is to do: be read unless it is held, be written where something waits."""
        reads = selectors.EVENT_READ if side.is_reading and not side.is_held else 0
        self._select(tunnel, side, reads | (selectors.EVENT_WRITE if side.waiting else 0))

    def _select(self, tunnel: Tunnel, side: Side, wanted: int) -> None:
        known = self._selector.get_map().get(side.connection)
        if known is None:
            if wanted:
                self._selector.register(side.connection, wanted, (tunnel, side))
        elif not wanted:
            self._selector.unregister(side.connection)
        elif known.events != wanted:
            self._selector.modify(side.connection, wanted, (tunnel, side))

    def _on_socket(self, tunnel: Tunnel, side: Side) -> None:
        """Go on with a socket that is ready; a connection that broke is passed on as such."""
        if tunnel.is_over:
            return
        try:
            if tunnel.handshake is not None:
                self._greet(tunnel)
            elif side is tunnel.target and not tunnel.is_ready:
                refused = side.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
                self._connected(tunnel, side, is_refused=refused)
            else:
                self._move(tunnel, side)
        except OSError:
            self._broken(tunnel, side)

    def _greet(self, tunnel: Tunnel) -> None:
        """Read more of a handshake, and let the request travel once it is there."""
        handshake = tunnel.handshake
        assert handshake is not None
        data = tunnel.client.connection.recv(handshake.wants_bytes)
        handshake.feed(data)
        refusal = handshake.refusal
        destination = None if handshake.target is None else self._site_of(*handshake.target)
        if handshake.target is not None and destination in (None, tunnel.client.site):
            refusal = Answer.NOT_ALLOWED
            tunnel.client.put(refusal.encode())
        if handshake.reply:
            tunnel.client.put(handshake.reply)
        tunnel.client.write()  # a few bytes into an empty buffer
        if refusal is not None or not data:
            self._refused += refusal is not None
            self._close(tunnel)
        elif destination is not None and handshake.target is not None:
            tunnel.handshake = None
            self._greeting.remove(tunnel)
            self._select(tunnel, tunnel.client, 0)
            tunnel.set_target(handshake.target, destination)
            self._send(tunnel, Event.OPEN, tunnel.client)

    def _site_of(self, host: str, port: int) -> int | None:
        """Return the site whose ranks listen at such a port of loopback, or None."""
        if not ipaddress.ip_address(host).is_loopback:
            return None
        return next((site for site, (first, last) in enumerate(self._config.ports) if first <= port <= last), None)

    def _send(self, tunnel: Tunnel, event: Event, side: Side, data: bytes = b"") -> None:
        """Let an event travel from ``side`` to the other end."""
        other = tunnel.other(side)
        if other is not None:
            piece = (tunnel, event, other, data)
            self._lines.carry(side.site, other.site, len(data), piece, time.monotonic_ns())

    def _connected(self, tunnel: Tunnel, target: Side, *, is_refused: bool) -> None:
        """Take note that a connection to a target is there, or was refused, and let the answer travel."""
        tunnel.is_ready = True
        self._connections += not is_refused
        self._refused += is_refused
        tunnel.answer = Answer.REFUSED if is_refused else Answer.SUCCEEDED
        target.is_reading = not is_refused
        self._watch(tunnel, target)
        self._send(tunnel, Event.ANSWER, target)

    def _move(self, tunnel: Tunnel, side: Side) -> None:
        """Write what waits for a socket, and read a piece of it unless the line is closed."""
        side.write()
        if tunnel.is_done:
            self._close(tunnel)
            return
        if side.is_reading and self._opens_ns(tunnel, side) <= time.monotonic_ns():
            data = side.read(self._pieces[side.site])
            if data is not None:
                self._send(tunnel, Event.DATA if data else Event.END, side, data)
        elif side.is_reading and not side.is_held:
            side.is_held = True
            self._held.append((tunnel, side))
        self._watch(tunnel, side)

    def _take_up(self) -> None:
        """Read again, in the order in which they were held, the connections whose lines are open again."""
        for _ in range(len(self._held)):
            tunnel, side = self._held.popleft()
            if tunnel.is_over:
                continue
            if self._opens_ns(tunnel, side) <= time.monotonic_ns():
                side.is_held = False
                self._on_socket(tunnel, side)
            else:
                self._held.append((tunnel, side))

    def _hand_over(self) -> None:
        """Carry out what has arrived."""
        now_ns = time.monotonic_ns()
        for due_ns, (tunnel, event, side, data) in self._lines.due(now_ns):
            late_ns = now_ns - due_ns
            self._handed_over += 1
            self._late_sum_ns += late_ns
            self._late_peak_ns = max(self._late_peak_ns, late_ns)
            if tunnel.is_over:
                continue
            try:
                self._carry_out(tunnel, event, side, data)
            except OSError:
                self._broken(tunnel, side)

    def _carry_out(self, tunnel: Tunnel, event: Event, side: Side, data: bytes) -> None:
        if event is Event.OPEN:
            if tunnel.connect():
                self._select(tunnel, side, selectors.EVENT_WRITE)
            else:
                self._connected(tunnel, side, is_refused=True)
            return
        if event is Event.END:
            side.ends = True
        elif event is not Event.BREAK:
            side.put(tunnel.answer.encode() if event is Event.ANSWER else data)
        side.write()
        is_refused = event is Event.ANSWER and tunnel.answer is not Answer.SUCCEEDED
        if is_refused or event is Event.BREAK or tunnel.is_done:
            self._close(tunnel)
        else:
            self._watch(tunnel, side)

    def _broken(self, tunnel: Tunnel, side: Side) -> None:
        """Close an end whose connection broke, and let the other hear of it when it can."""
        if tunnel.handshake is not None or tunnel.target is None:
            self._close(tunnel)
            return
        side.is_reading = False
        side.waiting.clear()
        self._select(tunnel, side, 0)
        self._send(tunnel, Event.BREAK, side)

    def _end_late_handshakes(self) -> None:
        now_ns = time.monotonic_ns()
        while self._greeting and self._greeting[0].deadline_ns <= now_ns:
            self._refused += 1
            self._close(self._greeting[0])

    def _close(self, tunnel: Tunnel) -> None:
        for side in (tunnel.client, tunnel.target):
            if side is not None and side.connection.fileno() >= 0:
                self._select(tunnel, side, 0)
        tunnel.close()
        self._tunnels.discard(tunnel)
        if tunnel.handshake is not None and tunnel in self._greeting:
            self._greeting.remove(tunnel)
        if self._is_deaf:
            self._listen()


def _allow_descriptors(topology: Topology) -> None:
    """Raise this process's limit of descriptors to what all connections between sites take, or say what it lacks."""
    pairs = sum(len(site.ranks) * (topology.size - len(site.ranks)) for site in topology.sites)
    wanted = 2 * _CONNECTIONS_OF_A_PAIR * pairs + len(topology.sites) + _OTHER_DESCRIPTORS
    may, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if may == resource.RLIM_INFINITY or may >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{topology.size} ranks need {wanted} descriptors (ulimit -n), of which it may have {most}"
        ) from error


def main(arguments: Sequence[str]) -> int:
    """Run a relay; ``arguments`` are the number of the control socket's descriptor."""
    with configured(arguments, RelayConfig) as (config, control):
        try:
            server = Server(config, control)
        except OSError as error:
            with suppress(OSError):
                answer(control, str(error))
            return 1
        try:
            if not make_prompt(LINE):
                shorten_turns()
            gc.freeze()
            answer(control, server.ports)
            with suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone: so is everybody
                server.run()
        finally:
            server.close()
            shutil.rmtree(config.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
