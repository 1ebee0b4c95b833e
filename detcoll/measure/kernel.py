"""What the kernel counted in this network namespace: bytes sent beyond the host's loopback, segments sent again.

Both count for every transport alike, since both come from the kernel and not from the transport. In the lab a site is
a namespace, so its ranks read the same figures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class NetworkCounts:
    """Counters of one network namespace, rising from its start; None where the kernel does not tell."""

    sent_bytes: int | None
    retransmits: int | None

    def since(self, before: NetworkCounts) -> NetworkCounts:
        """Return what was counted after ``before``."""
        return NetworkCounts(
            _difference(self.sent_bytes, before.sent_bytes), _difference(self.retransmits, before.retransmits)
        )


def network_counts() -> NetworkCounts:
    """Return the counters of the namespace that this process is in.

    Nothing is known behind a proxy: all is on loopback, and the namespace is that of everybody on this host.
    """
    if os.environ.get("DETCOLL_PROXY"):
        return NetworkCounts(None, None)
    return NetworkCounts(parse_sent_bytes(_read("/proc/self/net/dev")), parse_retransmits(_read("/proc/self/net/snmp")))


def parse_sent_bytes(text: str) -> int | None:
    """Return the bytes sent on all interfaces but loopback, from the text of ``/proc/net/dev``.

    A segment that the kernel hands over whole and that is cut later counts one set of headers, so the figure is close
    to payload.
    """
    rows = [line.partition(":") for line in text.splitlines() if ":" in line]
    counts = [int(fields.split()[8]) for name, _, fields in rows if name.strip() != "lo"]
    return sum(counts) if rows else None


def parse_retransmits(text: str) -> int | None:
    """Return the number of TCP segments sent again, from the text of ``/proc/net/snmp``."""
    tcp = [line.split()[1:] for line in text.splitlines() if line.startswith("Tcp:")]
    if len(tcp) != 2 or "RetransSegs" not in tcp[0]:
        return None
    return int(tcp[1][tcp[0].index("RetransSegs")])


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
