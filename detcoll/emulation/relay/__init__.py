"""The relay: delay and rate between sites where namespaces are forbidden, in user space alone.

Ranks are ordinary processes on loopback. Their wide-area connections go through a SOCKS5 proxy
(`detcoll.emulation.relay.server`) which reads and writes at the times that the lines allow
(`detcoll.emulation.relay.lines`). It moves streams, not packets, so nothing is ever dropped, and each half of a
connection has a TCP of its own that sees loopback; docs/lab.md says what that cannot show.
"""

from detcoll.emulation.relay.emulation import Relay
from detcoll.emulation.relay.server import RelayStatistics

__all__ = ["Relay", "RelayStatistics"]
