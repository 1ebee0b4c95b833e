"""The meeting of all ranks over ZeroMQ: they find each other, exchange addresses, and notice when one is gone.

Rank 0 serves, all ranks connect, and `detcoll.rendezvous.meeting` tells how they get to know where. Rules are apart
from sockets and threads: what the hub decides (`hub`) from what carries it out (`server`), what a rank knows (`member`)
from its connection (`connection`). `link` brings messages over connections that come and go, `watch` tells a process
that died from a connection that was cut.
"""

from __future__ import annotations

from detcoll.rendezvous.meeting import Place, Store, meet
from detcoll.rendezvous.member import Aborted, Event, Lost
from detcoll.rendezvous.session import Session
from detcoll.rendezvous.sockets import Address, is_loopback

__all__ = ["Aborted", "Address", "Event", "Lost", "Place", "Session", "Store", "is_loopback", "meet"]
