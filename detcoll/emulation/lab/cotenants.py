"""Others' traffic that the router makes up itself: bursts that fill the best-effort queue, and small probes.

A burst has no bytes; it occupies the uplink's queue and line as real packets would and then leaves for somewhere
outside the lab, so it costs no socket and no copy. Bursts come at random (exponential gaps) with a geometric number of
full packets, four in the mean, like the datagrams of senders that mind nobody. What does not fit into the queue is
dropped packet by packet.

A probe is a real unit of 64 bytes that the router sends from one site to another and back, through queues, loss and
jitter like any other. Probes leave at random, so that they see the line as it is in the mean of time (RFC 2330,
section 11.1). Their round trip is the sum of both ways by the lines' own arithmetic, so the machine's lateness is not
in it.
"""

from __future__ import annotations

import random
import socket
import struct
from collections import deque
from typing import Any

import numpy as np

from detcoll.emulation.lab.port import Port
from detcoll.emulation.lab.statistics import BurstStatistics, ProbeStatistics
from detcoll.emulation.lab.unit import VNET_HEADER_BYTES

PROBE_HOST = 3
"""The last byte of the addresses that probes come from."""

MEAN_BURST_PACKETS = 4
_PROBE_BYTES = 64
_PROBE_PROTOCOL = 253  # for experiments, RFC 3692
_DRAW = 4096
_LARGEST_HISTORY = 65_536
_PAYLOAD = struct.Struct("!Hqq")
_PAYLOAD_AT = VNET_HEADER_BYTES + 20


class Bursts:
    """What others offer one uplink; ``seed`` decides when and how much at a time."""

    __slots__ = ("_draws", "_mean_gap_ns", "_random", "at_ns", "dropped_bytes", "offered_bytes", "packet_bytes")

    def __init__(self, bytes_per_s: float, packet_bytes: int, seed: list[int], opened_ns: int) -> None:
        self._random = np.random.default_rng(seed)
        self.packet_bytes = packet_bytes
        self._mean_gap_ns = MEAN_BURST_PACKETS * packet_bytes / bytes_per_s * 1e9
        self._draws: list[tuple[float, int]] = []
        self.at_ns = float(opened_ns)
        self.offered_bytes = self.dropped_bytes = 0

    def draw(self) -> list[tuple[float, int]]:
        """Return gaps and sizes of the next bursts, the last first."""
        gaps = self._random.exponential(self._mean_gap_ns, _DRAW).tolist()
        sizes = (self._random.geometric(1 / MEAN_BURST_PACKETS, _DRAW) * self.packet_bytes).tolist()
        return list(zip(gaps, sizes, strict=True))

    def advance(self, port: Port[Any], now_ns: float) -> None:
        """Put all bursts into the queue of ``port`` that come by ``now_ns``."""
        at_ns, draws = self.at_ns, self._draws
        while at_ns <= now_ns:
            if not draws:
                draws = self._draws = self.draw()
            gap_ns, nbytes = draws.pop()
            self.offered_bytes += nbytes
            room = port.room_bytes(at_ns)
            if nbytes > room:
                taken = int(room // self.packet_bytes) * self.packet_bytes if room > 0 else 0
                self.dropped_bytes += nbytes - taken
                nbytes = taken
            if nbytes:
                port.take(nbytes, at_ns, at_ns)
            at_ns += gap_ns
        self.at_ns = at_ns

    def statistics(self) -> BurstStatistics:
        """Return what was counted."""
        return BurstStatistics(self.offered_bytes, self.dropped_bytes)


class Probes:
    """The probes of all links, which take turns."""

    def __init__(self, links: list[tuple[int, int]], gap_ns: int, seed: int) -> None:
        self._links = links
        self._mean_gap_ns = gap_ns / len(links) if gap_ns else 0.0
        self._random = random.Random(f"{seed}:probe")
        self.sent = 0
        self.seen: deque[tuple[int, int]] = deque(maxlen=_LARGEST_HISTORY)
        self.next_ns = float("inf")

    def start(self, now_ns: int) -> None:
        """Let the first probe leave soon after ``now_ns``, where any are wanted."""
        if self._mean_gap_ns:
            self.next_ns = now_ns + self.gap_ns()

    def gap_ns(self) -> float:
        """Draw the time to the next probe."""
        return self._random.expovariate(1.0) * self._mean_gap_ns

    def due(self, now_ns: float) -> list[tuple[int, bytes]]:
        """Return the sources and units of probes that leave by ``now_ns``."""
        leaving = []
        while self.next_ns <= now_ns:
            here, there = self._links[self.sent % len(self._links)]
            leaving.append((here, _unit(here, there, here, round(self.next_ns), 0)))
            self.sent += 1
            self.next_ns += self.gap_ns()
        return leaving

    def arrived(self, unit: bytes, way_ns: float) -> tuple[int, bytes] | None:
        """Take a probe that was ``way_ns`` on its way; returns where it goes back from and what, or None."""
        origin, sent_ns, before_ns = _PAYLOAD.unpack_from(unit, _PAYLOAD_AT)
        so_far_ns = before_ns + round(way_ns)
        here, back = unit[VNET_HEADER_BYTES + 18], unit[VNET_HEADER_BYTES + 14]
        if here == origin:
            self.seen.append((sent_ns, so_far_ns))
            return None
        return here, _unit(here, back, origin, sent_ns, so_far_ns)

    def statistics(self) -> ProbeStatistics:
        """Return what was sent and what came back."""
        return ProbeStatistics(self.sent, tuple(sent for sent, _ in self.seen), tuple(took for _, took in self.seen))


def _unit(source: int, destination: int, origin: int, sent_ns: int, so_far_ns: int) -> bytes:
    """Return a probe as a unit; no kernel ever sees it, so its checksum stays open."""
    ends = socket.inet_aton(f"10.77.{source}.{PROBE_HOST}") + socket.inet_aton(f"10.77.{destination}.{PROBE_HOST}")
    header = struct.pack("!BBHHHBBH", 0x45, 0, _PROBE_BYTES, 0, 0x4000, 64, _PROBE_PROTOCOL, 0) + ends
    packet = header + _PAYLOAD.pack(origin, sent_ns, so_far_ns)
    return bytes(VNET_HEADER_BYTES) + packet + bytes(_PROBE_BYTES - len(packet))
