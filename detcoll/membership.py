"""The rendezvous as those see it who work: who is gone, who gave up, and why."""

from __future__ import annotations

import select
import time

from detcoll.errors import DeadlineMissed, DetcollError, PeerLost, PlanMismatch, TransportError
from detcoll.rendezvous import Aborted, Lost, Session

_EXPLANATION_NS = 1_000_000_000
"""How long a rank that lost a peer waits to hear from the rendezvous why."""


class Members:
    """The rendezvous as the progress thread sees it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def fileno(self) -> int:
        """Return a descriptor that is readable when `failure` has something to say."""
        return self._session.fileno()

    def failure(self) -> DetcollError | None:
        """Return the error that a lost rank or another rank's abort means here, without waiting."""
        events = self._session.events()
        for event in events:
            if isinstance(event, Aborted) and not event.group:
                return _told(event)
        for event in events:
            if isinstance(event, Lost):
                return PeerLost(f"rank {event.rank} is lost: {event.why}")
        return None

    def explanation(self) -> DetcollError | None:
        """Wait a little for why a peer is lost: an endpoint sees only that it is, the rendezvous hears the reason."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        end_ns = time.monotonic_ns() + _EXPLANATION_NS
        while (left_ns := end_ns - time.monotonic_ns()) > 0:
            poll.poll(left_ns / 1e6)
            failure = self.failure()
            if failure is not None:
                return failure
        return None

    def abort(self, kind: str, text: str) -> None:
        """Tell all other ranks that this one has given up, and why."""
        self._session.abort(kind, text)


def _told(event: Aborted) -> DetcollError:
    """Return the error that another rank's giving up means here: of the same kind where that holds here too."""
    if event.kind == PlanMismatch.__name__:
        return PlanMismatch(event.text)
    kind = {kind.__name__: kind for kind in (DeadlineMissed, PeerLost)}.get(event.kind, TransportError)
    name = "" if event.kind == kind.__name__ else f"{event.kind}: "
    return kind(f"rank {event.rank} gave up: {name}{event.text.removeprefix(f'rank {event.rank}: ')}")
