"""Holds the relay's line against what it was told: an unpaced TCP stream's rate, and a ping's round trip.

    python benchmarks/relay_line.py --rate "250 Mbit/s" --round-trip "20 ms"

Needs neither root nor Linux. The stream pushes as hard as it can, so its rate over the stated one tells whether the
relay lets more pass than a line would.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import threading
import time

from detcoll.emulation.relay import Relay
from detcoll.measure.host import host_facts
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s
from detcoll.testing.socks import open_through
from detcoll.topology import Topology

HOST = "127.0.0.1"
SKIPPED_S = 0.5
"""Time for the buffers of both hops to fill."""


def accepted(relay: Relay) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection from the first site to the second."""
    with socket.create_server((HOST, relay.ports(1)[0])) as listener:
        sender = open_through(relay.proxy(0), *listener.getsockname())
        return sender, listener.accept()[0]


def ping(relay: Relay, count: int) -> list[int]:
    """Return round trips of single bytes in nanoseconds."""
    took_ns = []
    sender, receiver = accepted(relay)
    with sender, receiver:
        receiver.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began_ns = time.monotonic_ns()
            sender.sendall(b"x")
            receiver.sendall(receiver.recv(1))
            sender.recv(1)
            took_ns.append(time.monotonic_ns() - began_ns)
    return took_ns


def blast(relay: Relay, seconds: float) -> float:
    """Return the payload in bytes/s that a stream which never waits carries."""
    sender, receiver = accepted(relay)

    def push() -> None:
        try:
            while True:
                sender.sendall(bytes(1 << 16))
        except OSError:  # the receiver has seen enough
            return

    thread = threading.Thread(target=push)
    with sender, receiver:
        thread.start()
        begin_ns = since_ns = time.monotonic_ns()
        got = 0
        while (now_ns := time.monotonic_ns()) < begin_ns + (SKIPPED_S + seconds) * 1e9:
            nbytes = len(receiver.recv(1 << 20))
            if now_ns < begin_ns + SKIPPED_S * 1e9:
                since_ns = now_ns
            else:
                got += nbytes
        receiver.shutdown(socket.SHUT_RDWR)
        sender.shutdown(socket.SHUT_RDWR)
    thread.join()
    return got * 1e9 / (now_ns - since_ns)


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="250 Mbit/s")
    parser.add_argument("--round-trip", default="20 ms")
    parser.add_argument("--pings", type=int, default=101)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    rate, round_trip_ns = parse_rate_bytes_per_s(given.rate, "rate"), parse_duration_ns(given.round_trip, "round_trip")
    topology = Topology.uniform(2, 1, rate, round_trip_ns // 2)
    with Relay(topology) as relay:
        took_ns = ping(relay, given.pings)
        carried = blast(relay, given.seconds)
        seen = relay.statistics()
    facts = {
        "schema": "detcoll.emulation.relay-line/1",
        "host": host_facts(),
        "rate_over_stated": carried / topology.payload_share / rate,
        "round_trip_over_stated": statistics.median(took_ns) / round_trip_ns,
        "least_round_trip_over_stated": min(took_ns) / round_trip_ns,
        "late_mean_s": seen.late_mean_ns / 1e9,
        "late_peak_s": seen.late_peak_ns / 1e9,
        "cpu_share": seen.cpu_s / seen.elapsed_s,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
