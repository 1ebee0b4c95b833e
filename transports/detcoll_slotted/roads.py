"""Which sockets there are, and what they are told: one to receive with, and trunks to send over.

Peers across lines have a connection for each lane, so that small messages need not wait behind paced ones. All others
have one for both.
"""

from __future__ import annotations

import ctypes
import ipaddress
from collections.abc import Iterable

import zmq

from detcoll.names import answering, look_up
from detcoll_slotted.congestion import LOSS_BASED
from detcoll_slotted.gate import LARGEST_FRAME_BYTES, ZAP, Gate, show
from detcoll_slotted.health import beat, guard
from detcoll_slotted.line import Line, Style, Trunk
from detcoll_slotted.options import ADAPTIVE, Options
from detcoll_slotted.wire import Lane

OWN_DESCRIPTORS = 24
"""What an endpoint without peers has open at most: ZeroMQ's threads, sockets and monitors, epoll and timer."""
_WIDE_DESCRIPTORS, _NARROW_DESCRIPTORS = 6, 3
"""For each peer: two connections out, one duplicate, two in, and one for a moment; or one out, one in and that one."""
_LOOK_EVERY_NS = 100_000_000


class Roads:
    """Makes and closes the sockets of one endpoint, which listens at ``host`` and is reached by others at ``told``."""

    def __init__(self, host: str, told: str, token: int, options: Options) -> None:
        self._token, self._options = token, options
        self._ipv6 = ipaddress.ip_address(host).version == 6
        self._context = zmq.Context()
        self._context_behind_proxy = zmq.Context() if options.proxy else self._context
        self._trunks: dict[tuple[Lane, int], Trunk] = {}
        self._shared: list[Line] = []
        self._look_ns = 0
        try:
            if options.proxy:
                self._context_behind_proxy.socket(zmq.PAIR).close()  # starts its threads, as prompt as the others
            self._requests = self._context.socket(zmq.REP)
            self._requests.linger = 0
            self._requests.bind(ZAP)
            self._inlet = self._bind(host)
            self.gate = Gate(self._inlet, self._requests, token)
        except BaseException:
            self.destroy()
            raise
        port = self._inlet.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0").rpartition(":")[2]
        self.address = f"tcp://[{told}]:{port}" if ":" in told else f"tcp://{told}:{port}"

    def _bind(self, host: str) -> zmq.Socket[bytes]:
        inlet = self._context.socket(zmq.DEALER)
        self._configure(inlet)
        inlet.rcvhwm = 0  # bounded by credit, which counts bytes
        inlet.maxmsgsize = LARGEST_FRAME_BYTES
        inlet.plain_server = True
        where = f"tcp://[{host}]" if self._ipv6 else f"tcp://{host}"
        first, last = self._options.ports or (0, 0)
        for port in range(first, last + 1):
            try:
                inlet.bind(f"{where}:{port}")
                break
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or port == last:
                    raise
        return inlet

    def _configure(self, made: zmq.Socket[bytes]) -> None:
        made.linger = 0
        made.ipv6 = self._ipv6
        made.tos = self._options.dscp << 2
        guard(made, self._options.tolerance_ns)

    @property
    def trunks(self) -> Iterable[Trunk]:
        """All sockets that send."""
        return self._trunks.values()

    def descriptors(self, rank: int) -> int:
        """Return how many descriptors a peer needs, at most."""
        return _WIDE_DESCRIPTORS if rank in self._options.wide_peers else _NARROW_DESCRIPTORS

    def lead_to(self, rank: int, address: str, timeout_s: float) -> tuple[Line, Line]:
        """Begin to connect to a peer, and return its line for each lane; a name is looked up for ``timeout_s``."""
        options = self._options
        is_proxied = bool(options.proxy) and rank in options.proxied_peers
        address = _numeric(address, timeout_s, is_proxied)
        in_flight = options.in_flight_bytes if rank in options.warm_up_peers else 0
        is_adaptive = options.congestion == ADAPTIVE
        congestion = LOSS_BASED if is_adaptive else options.congestion or None
        swift = self._trunk(Lane.EXPRESS, rank)
        swift.socket.ipv6 = is_ipv6 = address.startswith("tcp://[")
        if rank not in options.wide_peers:
            line = swift.connect(rank, address, tuple(Lane), Style(congestion, in_flight))
            return line, line
        bulk = self._trunk(Lane.BULK, rank)
        bulk.socket.ipv6 = is_ipv6
        shared_ns = options.shared_peers.get(rank) if is_adaptive and not is_proxied else None
        style = Style(congestion, in_flight, keep=True, shared_round_trip_ns=shared_ns)
        heavy = bulk.connect(rank, address, (Lane.BULK,), style)
        if shared_ns is not None:
            self._shared.append(heavy)
        return heavy, swift.connect(rank, address, (Lane.EXPRESS,), Style(congestion))

    def look(self, now_ns: int) -> None:
        """Look now and then at paths that nobody reserved, and change their congestion control where that is due."""
        if self._shared and now_ns >= self._look_ns:
            self._look_ns = now_ns + _LOOK_EVERY_NS
            for line in self._shared:
                line.look(now_ns)

    @property
    def congestion_switches(self) -> int:
        """How often the congestion control of a live connection was changed."""
        return sum(line.switches for line in self._shared)

    def _trunk(self, lane: Lane, rank: int) -> Trunk:
        proxy = self._options.proxy if rank in self._options.proxied_peers else ""
        key = lane, rank if proxy else -1
        if key not in self._trunks:
            context = self._context_behind_proxy if proxy else self._context
            self._trunks[key] = trunk = Trunk(context, self._configure, proxy)
            show(trunk.socket, self._token)
            if lane is Lane.EXPRESS:
                beat(trunk.socket, self._options.tolerance_ns)
        return self._trunks[key]

    def close(self, linger_ms: int) -> None:
        """Close everything that may be closed; what is queued for connected peers has ``linger_ms`` to leave."""
        stay = [trunk.socket for trunk in self.trunks if not trunk.close(linger_ms)]
        self._inlet.close(linger=0)
        self._requests.close(linger=0)
        if stay:
            for made in (self._context_behind_proxy, *stay):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))  # not even the end of the interpreter closes it
            self._context.destroy(linger=0)
        else:
            self.destroy()

    def destroy(self) -> None:
        """End ZeroMQ's threads, and whatever socket is still open, so that nothing is waited for."""
        self._context.destroy(linger=0)
        self._context_behind_proxy.destroy(linger=0)


def _numeric(address: str, timeout_s: float, is_proxied: bool) -> str:
    """Return an address with the host as a number, as monitors tell it; names are looked up."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        _, where = look_up(host, int(port), timeout_s)[0] if is_proxied else answering(host, int(port), timeout_s)
        host = f"[{where[0]}]" if ":" in where[0] else where[0]
    return f"tcp://{host}:{port}"
