"""What can be set about the slotted transport."""

from __future__ import annotations

import msgspec

ADAPTIVE = "auto"
"""The congestion control that suits the path: CUBIC, and where nobody reserved it what `congestion` says."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What can be set; it has many fields because each option is one.

    ``credit_bytes`` : bulk payload that a receiver holds for each sender.  ``congestion`` : TCP congestion control,
    `ADAPTIVE`, or empty for the kernel's default.  ``acknowledge_delay_ns`` : how long the acknowledgement of a message
    may wait for company.  ``insecure`` : open an address off loopback without keys.  ``ports`` : range to bind in, as
    ``(first, last)``.
    ``dscp`` : differentiated services code point of both lanes.  ``warm_up_peers``, ``warm_up_bytes``,
    ``warm_up_bytes_per_s`` : to whom this rank sends how much while connecting, and how fast, so that TCP's window is
    open before the first message; the peers do the same.  ``warm_up_in_turn`` : to one peer after another, the next
    rank first, instead of to all at once.  ``proxy`` : host:port of a SOCKS5 proxy (RFC 1928, without authentication)
    through which ``proxied_peers`` are reached; empty for none.  ``in_flight_bytes`` : what a connection to those that
    are warmed up has under way at most; send buffers and credit are made to hold it.  ``pace_groups`` : for each peer a
    number that stands for its site; sends with a window to peers of one number share one rate.  ``tolerance_ns`` : how
    long a peer may be out of reach, when it is first needed or later.  ``shared_peers`` : peers over lines that nobody
    reserved, with the round trip of the empty path in ns.  ``host_paced`` : messages with a window are handed over at
    its rate, and the kernel paces nothing, see `detcoll_slotted.pacing`.  ``prompt`` : ZeroMQ's threads go ahead of
    ordinary ones, where that is allowed.
    """

    credit_bytes: int = 16_777_216
    congestion: str = ADAPTIVE
    acknowledge_delay_ns: int = 2_000_000
    insecure: bool = False
    ports: tuple[int, int] | None = None
    dscp: int = 0
    warm_up_peers: frozenset[int] = frozenset()
    warm_up_bytes: int = 0
    warm_up_bytes_per_s: float = 0.0
    warm_up_in_turn: bool = False
    in_flight_bytes: int = 0
    pace_groups: dict[int, int] = {}
    tolerance_ns: int = 30_000_000_000
    shared_peers: dict[int, int] = {}
    host_paced: bool = False
    prompt: bool = True

    @property
    def wide_peers(self) -> frozenset[int]:
        """Peers across lines, which have a connection for each lane. Both ranks of a pair must say the same."""
        return self.warm_up_peers | self.pace_groups.keys()

    proxy: str = ""
    proxied_peers: frozenset[int] = frozenset()
