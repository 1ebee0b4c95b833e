"""Slot-scheduled ZeroMQ: every message leaves in its window, at its rate, and is kept until it is acknowledged.

Each rank receives on one DEALER socket, and sends over ROUTER sockets that all peers share. Peers across lines have two
connections, since small messages must not wait behind paced ones; others have one for both lanes:

- the *bulk* lane carries what a plan moves; the kernel paces its TCP connection to the rate of the window
- the *express* lane carries small messages and acknowledgements, which leave at once

Rules without any I/O: `wire` is the format, `flow` an ordered pair of ranks (sequence, credit, retention), `pacing`
keeps peers of one site to one rate; `detcoll.mailbox` finds the receive for a message. What moves bytes: `roads` makes
the sockets, `line` and `tcp` are the connections, `post` writes frames, `departures` decides when sends leave, `gate`
lets connections and messages in, `intake` takes them. `joining` makes two ranks known to each other, on demand;
`health` follows connections that ended, and says when a peer is lost. `endpoint` puts them together behind the SPI.
"""

from __future__ import annotations

from detcoll_slotted.endpoint import SlottedEndpoint
from detcoll_slotted.transport import SlottedTransport

__all__ = ["SlottedEndpoint", "SlottedTransport"]
