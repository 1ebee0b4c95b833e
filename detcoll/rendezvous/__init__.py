"""The meeting of all ranks over TCP: they find each other, exchange addresses, and notice when one is gone.

Rank 0 serves (`detcoll.rendezvous.hub`), all ranks connect (`detcoll.rendezvous.session`), and
`detcoll.rendezvous.meeting` tells how they get to know where.
"""

from __future__ import annotations

from detcoll.rendezvous.meeting import Place, Store, meet
from detcoll.rendezvous.session import Aborted, Event, Lost, Session
from detcoll.rendezvous.sockets import Address, is_loopback

__all__ = ["Aborted", "Address", "Event", "Lost", "Place", "Session", "Store", "is_loopback", "meet"]
