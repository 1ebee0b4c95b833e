"""Slot-scheduled ZeroMQ: every message leaves in its window, at its rate, and is kept until it is acknowledged.

Each rank binds one PULL socket and connects two PUSH sockets to every peer:

- the *bulk* lane carries what a plan moves; the kernel paces its TCP connection to the rate of the window
- the *express* lane carries small messages and acknowledgements, which leave at once

`wire` is the format, `flow` the rules of one ordered pair (sequence, credit, retention), both without any I/O;
`line` is the TCP connection beneath a ZeroMQ socket (pacing, congestion control, counters); `endpoint` puts them
together behind the SPI.
"""

from __future__ import annotations

from detcoll_slotted.endpoint import SlottedEndpoint
from detcoll_slotted.transport import SlottedTransport

__all__ = ["SlottedEndpoint", "SlottedTransport"]
