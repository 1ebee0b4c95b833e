"""Others' TCP flows: real connections of the kernel that share the best-effort class of each line.

They run in network namespaces of their own, one beside each site, so that their retransmits are not counted among the
ranks'. One process holds all their sockets, which live in the namespace in which they were made. Each site sends to the
next, two flows at once. A flow gets another 64 KiB as often as its part of what is offered asks for, and gives way as
CUBIC does: what the kernel does not take is not offered again. Lumps cost the router a tenth of what a paced flow of
single segments does. What arrives is thrown away in the kernel (``MSG_TRUNC``, tcp(7)).
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

from detcoll.emulation.helper import answer, configured
from detcoll.emulation.lab.namespaces import Namespace, run_inside
from detcoll.errors import DetcollError

_FLOWS_PER_SITE = 2
_PORT = 7000
_LUMP = bytes(65_536)
_NOWHERE = bytearray(1 << 20)


@dataclass(frozen=True, slots=True)
class FlowsConfig:
    """What the flows' process is told when it starts; ``namespaces`` are descriptors of its own.

    ``rates_bytes_per_s`` : what each site's flows offer together, payload.
    """

    addresses: tuple[str, ...]
    namespaces: tuple[int, ...]
    rates_bytes_per_s: tuple[float, ...]


class _Flows:
    """All connections, both ends."""

    def __init__(self, config: FlowsConfig, control: socket.socket) -> None:
        # when the next lump is due, the flow's number, the time between lumps, and the flow
        self._next: list[tuple[float, int, float, socket.socket]] = []
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(control, selectors.EVENT_READ, None)
        count = len(config.addresses)
        for site in range(count):
            listener = run_inside(_namespace(config, site), partial(_listen, config.addresses[site]))
            self._waiting.register(listener, selectors.EVENT_READ, self._accept)
        for site in range(count):
            there = config.addresses[(site + 1) % count]
            for _ in range(_FLOWS_PER_SITE):
                made = run_inside(_namespace(config, site), socket.socket)
                self._connect(made, there, _FLOWS_PER_SITE * len(_LUMP) / config.rates_bytes_per_s[site] * 1e9)

    def _connect(self, flow: socket.socket, there: str, gap_ns: float) -> None:
        flow.setblocking(False)
        with suppress(OSError):  # a kernel without it: its default gives way too
            flow.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        with suppress(BlockingIOError):
            flow.connect((there, _PORT))
        heappush(
            self._next,
            (time.monotonic_ns() + gap_ns * len(self._next) / _FLOWS_PER_SITE, len(self._next), gap_ns, flow),
        )

    def _accept(self, listener: socket.socket) -> None:
        arriving, _ = listener.accept()
        arriving.setblocking(False)
        self._waiting.register(arriving, selectors.EVENT_READ, _throw_away)

    def run(self) -> None:
        """Send and throw away until the lab is gone."""
        while True:
            for key, _ in self._waiting.select(max(0.0, (self._next[0][0] - time.monotonic_ns()) / 1e9)):
                if key.data is None:
                    return
                try:
                    key.data(key.fileobj)
                except BlockingIOError:
                    continue
                except OSError:  # the line is so full that the kernel gave the connection up
                    self._waiting.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
            self._send_due(time.monotonic_ns())

    def _send_due(self, now_ns: int) -> None:
        while self._next[0][0] <= now_ns:
            due_ns, number, gap_ns, flow = heappop(self._next)
            with suppress(OSError):  # not connected yet, no room, or given up: nothing is offered
                flow.send(_LUMP)
            # After a stall no more than one lump is made up for.
            heappush(self._next, (max(due_ns + gap_ns, now_ns - gap_ns), number, gap_ns, flow))


def _namespace(config: FlowsConfig, site: int) -> Namespace:
    return Namespace(config.namespaces[site], None)


def _listen(address: str) -> socket.socket:
    listener = socket.create_server((address, _PORT))
    listener.setblocking(False)
    return listener


def _throw_away(flow: socket.socket) -> None:
    if not flow.recv_into(_NOWHERE, 0, socket.MSG_TRUNC):
        raise OSError("the other end is gone")


def main(arguments: Sequence[str]) -> int:
    """Run the flows; ``arguments`` are the number of the control socket's descriptor."""
    with configured(arguments, FlowsConfig) as (config, control):
        try:
            flows = _Flows(config, control)
        except (OSError, DetcollError) as error:
            answer(control, str(error))
            return 1
        answer(control, True)
        flows.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
