"""Rendezvous of all ranks over ZeroMQ: ranks find each other, exchange addresses and detect lost ranks.

Rank 0 runs the hub and all ranks connect to it; `detcoll.rendezvous.meeting` describes how they learn its address.
Protocol rules are separate from sockets and threads: `hub` decides and `server` does the I/O on rank 0, `member` holds
a rank's state and `connection` does its I/O. `link` delivers messages reliably across reconnects. `watch` distinguishes
a dead process from a broken connection.
"""

from __future__ import annotations

from detcoll.rendezvous.meeting import Place, Store, meet
from detcoll.rendezvous.member import Aborted, Event, Lost
from detcoll.rendezvous.session import Session
from detcoll.rendezvous.sockets import Address, is_loopback

__all__ = ["Aborted", "Address", "Event", "Lost", "Place", "Session", "Store", "is_loopback", "meet"]
