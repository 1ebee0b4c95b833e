"""Plain traffic through a lab's lines: one TCP stream, and pings over UDP, by programs of a few lines.

What they see is held against the rates and delays that the lab was given: by tests where it is exact, and by
``benchmarks/lab_line.py`` where it takes a quiet machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from detcoll.emulation.lab import Lab

# They should run before what else the machine does; an ordinary user's have to wait.
_FIRST = """
import os
try:
    os.nice(-10)
except PermissionError:
    pass
"""

SINK = (
    _FIRST
    + """
import socket, sys, time, json, hashlib
with socket.create_server((sys.argv[1], 5000)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    server.close()
    buffer, seen, got, digest = bytearray(1 << 20), [], 0, hashlib.sha256()
    while count := connection.recv_into(buffer):
        got += count
        digest.update(buffer[:count])
        seen.append((time.monotonic(), got))
    connection.close()
errors = [line.split() for line in open("/proc/net/snmp") if line.startswith(("Tcp:", "Ip:"))]
counters = {n: int(v) for names, values in (errors[0:2], errors[2:4]) for n, v in zip(names[1:], values[1:])}
print(json.dumps({"seen": seen, "digest": digest.hexdigest(), "checksum_errors": counters["InCsumErrors"],
                  "header_errors": counters["InHdrErrors"]}))
"""
)

BLAST = (
    _FIRST
    + """
import socket, sys, time
with socket.socket() as s:
    try:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    except OSError:
        pass
    s.connect((sys.argv[1], 5000))
    end, left, block = time.monotonic() + float(sys.argv[2]), int(sys.argv[3]), bytes(range(256)) * 256
    while time.monotonic() < end and left > 0:
        s.sendall(block)
        left -= len(block)
"""
)

ECHO = (
    _FIRST
    + """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind((sys.argv[1], 6000))
    print("listening", flush=True)
    while True:
        s.sendto(*s.recvfrom(2000))
"""
)

PING = (
    _FIRST
    + """
import socket, sys, time, json
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(10)
    s.connect((sys.argv[1], 6000))
    took = []
    for number in range(int(sys.argv[2])):
        start = time.monotonic_ns()
        s.send(number.to_bytes(4, "big"))
        assert s.recv(2000) == number.to_bytes(4, "big")
        took.append(time.monotonic_ns() - start)
print(json.dumps(took))
"""
)


def python(code: str, *arguments: object) -> list[str]:
    """Return the command that runs ``code`` with nothing of the environment's."""
    return [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]


def serve(lab: Lab, site: int, code: str) -> subprocess.Popen[str]:
    """Start a program in a site and return it once it listens."""
    server = lab.popen(site, python(code, lab.address(site)), stdout=subprocess.PIPE, text=True)
    if server.stdout is None or server.stdout.readline() != "listening\n":
        raise RuntimeError(f"the server in site {site} does not listen")
    return server


def blast(lab: Lab, seconds: float, most_bytes: int = 2**40) -> dict[str, Any]:
    """Send from site 0 to site 1 over one TCP connection until the time or the bytes are over.

    Returns
    -------
    dict
        ``seen``: pairs of monotonic seconds and bytes received by then. ``digest``: SHA-256 of all bytes.
        ``checksum_errors``, ``header_errors``: what the receiver's kernel counted.
    """
    with serve(lab, 1, SINK) as sink, lab.popen(0, python(BLAST, lab.address(1), seconds, most_bytes)) as source:
        if source.wait(60):
            raise RuntimeError(f"the sender ended with exit code {source.returncode}")
        seen: dict[str, Any] = json.loads(sink.communicate(timeout=60)[0])
    return seen


def ping(lab: Lab, count: int) -> list[int]:
    """Return the round trips, in nanoseconds, of ``count`` small packets from site 0 to site 1, one after another."""
    with (
        serve(lab, 1, ECHO) as echo,
        lab.popen(0, python(PING, lab.address(1), count), stdout=subprocess.PIPE, text=True) as asker,
    ):
        took: list[int] = json.loads(asker.communicate(timeout=60)[0])
        echo.kill()
    return took
