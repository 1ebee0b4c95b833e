"""Others' TCP flows: real connections of the kernel that share the best-effort class of each line.

They run in network namespaces of their own, one beside each site, so that their retransmits are not counted among the
ranks'. One process holds all their sockets, which live in the namespace in which they were made. Each site sends to the
next, two flows at once. A flow gets another 64 KiB as often as its part of what is offered asks for, and gives way as
its congestion control does: what the kernel does not take is not offered again. Lumps cost the router a tenth of what a
paced flow of single segments does. A greedy flow gets as much as the kernel takes. What arrives is counted and thrown
away in the kernel (``MSG_TRUNC``, tcp(7)).
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush

from detcoll.emulation.helper import ASK_QUIT, answer, configured
from detcoll.emulation.lab.namespaces import Namespace, run_inside
from detcoll.errors import DetcollError

_FLOWS_PER_SITE = 2
_PORT = 7000
_LUMP = bytes(65_536)
_NOWHERE = bytearray(1 << 20)
_LOOK_NS = 100_000_000
_MOST_LOOKS = 4_096


@dataclass(frozen=True, slots=True)
class FlowsConfig:
    """What the flows' process is told when it starts; ``namespaces`` are descriptors of its own.

    ``rates_bytes_per_s`` : what each site's flows offer together, payload.  ``is_greedy`` : as much as TCP lets them
    instead.
    ``congestion`` : the congestion control of all flows, empty for the kernel's default.
    """

    addresses: tuple[str, ...]
    namespaces: tuple[int, ...]
    rates_bytes_per_s: tuple[float, ...]
    is_greedy: bool = False
    congestion: str = ""


@dataclass(frozen=True, slots=True)
class FlowCounts:
    """What the flows' process counted, by the site that sends; the times and numbers of `Statistics.flows`."""

    offered_bytes: tuple[int, ...] = ()
    looked_ns: tuple[int, ...] = ()
    arrived_bytes: tuple[tuple[int, ...], ...] = ()


class Looks:
    """What had arrived at which times; thinned out where there are many, so that it never grows beyond a bound."""

    def __init__(self, now_ns: int) -> None:
        self._kept: list[tuple[int, tuple[int, ...]]] = []
        self._every_ns = _LOOK_NS
        self.next_ns = now_ns

    def note(self, now_ns: int, arrived_bytes: Sequence[int]) -> None:
        """Keep what has arrived by now."""
        if len(self._kept) == _MOST_LOOKS:
            self._kept = self._kept[::2]
            self._every_ns *= 2
        self._kept.append((now_ns, tuple(arrived_bytes)))
        self.next_ns = now_ns + self._every_ns

    def counts(self, offered_bytes: Sequence[int]) -> FlowCounts:
        """Return all that was kept."""
        by_site = zip(*(arrived for _, arrived in self._kept), strict=True)
        return FlowCounts(tuple(offered_bytes), tuple(at_ns for at_ns, _ in self._kept), tuple(by_site))


class _Flows:
    """All connections, both ends."""

    def __init__(self, config: FlowsConfig, control: socket.socket) -> None:
        # when the next lump is due, the flow's number, the time between lumps, and the flow
        self._next: list[tuple[float, int, float, socket.socket, int]] = []
        self._waiting = selectors.DefaultSelector()
        self._control = control
        self._waiting.register(control, selectors.EVENT_READ, None)
        self._congestion, self._is_greedy = config.congestion.encode(), config.is_greedy
        count = len(config.addresses)
        self._offered, self._arrived = [0] * count, [0] * count
        self._looks = Looks(time.monotonic_ns())
        for site in range(count):
            listener = run_inside(_namespace(config, site), partial(_listen, config.addresses[site]))
            source = (site - 1) % count
            self._waiting.register(listener, selectors.EVENT_READ, partial(self._accept, source))
        for site in range(count):
            there = config.addresses[(site + 1) % count]
            for _ in range(_FLOWS_PER_SITE):
                made = run_inside(_namespace(config, site), socket.socket)
                self._connect(made, there, config.rates_bytes_per_s[site], site)

    def _connect(self, flow: socket.socket, there: str, rate_bytes_per_s: float, site: int) -> None:
        flow.setblocking(False)
        if self._congestion:
            with suppress(OSError):  # a kernel without it: its default gives way too
                flow.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion)
        with suppress(BlockingIOError):
            flow.connect((there, _PORT))
        if self._is_greedy:
            self._waiting.register(flow, selectors.EVENT_WRITE, partial(self._send, site))
            return
        gap_ns = _FLOWS_PER_SITE * len(_LUMP) / rate_bytes_per_s * 1e9
        first_ns = time.monotonic_ns() + gap_ns * len(self._next) / _FLOWS_PER_SITE
        heappush(self._next, (first_ns, len(self._next), gap_ns, flow, site))

    def _accept(self, source: int, listener: socket.socket) -> None:
        arriving, _ = listener.accept()
        arriving.setblocking(False)
        self._waiting.register(arriving, selectors.EVENT_READ, partial(self._throw_away, source))

    def _throw_away(self, source: int, flow: socket.socket) -> None:
        nbytes = flow.recv_into(_NOWHERE, 0, socket.MSG_TRUNC)
        if not nbytes:
            raise OSError("the other end is gone")
        self._arrived[source] += nbytes

    def _send(self, site: int, flow: socket.socket) -> None:
        self._offered[site] += flow.send(_LUMP)

    def run(self) -> None:
        """Send and throw away until the lab is gone."""
        while True:
            next_ns = min(self._looks.next_ns, self._next[0][0]) if self._next else self._looks.next_ns
            for key, _ in self._waiting.select(max(0.0, (next_ns - time.monotonic_ns()) / 1e9)):
                if key.data is None:
                    if self._answer():
                        return
                    continue
                try:
                    key.data(key.fileobj)
                except BlockingIOError:
                    continue
                except OSError:  # the line is so full that the kernel gave the connection up
                    self._waiting.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
            now_ns = time.monotonic_ns()
            self._send_due(now_ns)
            if now_ns >= self._looks.next_ns:
                self._looks.note(now_ns, self._arrived)

    def _send_due(self, now_ns: int) -> None:
        while self._next and self._next[0][0] <= now_ns:
            due_ns, number, gap_ns, flow, site = heappop(self._next)
            with suppress(OSError):  # not connected yet, no room, or given up: nothing is offered
                self._send(site, flow)
            # After a stall no more than one lump is made up for.
            heappush(self._next, (max(due_ns + gap_ns, now_ns - gap_ns), number, gap_ns, flow, site))

    def _answer(self) -> bool:
        """Answer a request of the lab; returns whether this process is to end."""
        request = self._control.recv(1)
        if request:
            self._looks.note(time.monotonic_ns(), self._arrived)
            answer(self._control, self._looks.counts(self._offered))
        return request in (ASK_QUIT, b"")


def _namespace(config: FlowsConfig, site: int) -> Namespace:
    return Namespace(config.namespaces[site], None)


def _listen(address: str) -> socket.socket:
    listener = socket.create_server((address, _PORT))
    listener.setblocking(False)
    return listener


def main(arguments: Sequence[str]) -> int:
    """Run the flows; ``arguments`` are the number of the control socket's descriptor."""
    with configured(arguments, FlowsConfig) as (config, control):
        try:
            flows = _Flows(config, control)
        except (OSError, DetcollError) as error:
            answer(control, str(error))
            return 1
        answer(control, True)
        with suppress(OSError):  # the lab has gone away
            flows.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
