"""The other ranks as the rendezvous knows them: who is gone, who gave up, and why.

What ended a group or the job is kept, since both the progress thread and a native collective that failed want to know
it. What ended a single call is told once.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque

from detcoll.errors import DetcollError, PeerLost
from detcoll.rendezvous import Aborted, Event, Lost, Session
from detcoll.runtime.control import JOB_ID, WHOLE_GROUP, Cause
from detcoll.runtime.engine import EXPLANATION_NS, Engine

_AT = "@"
"""In the kind of an abort, before the sequence of the call that was refused."""

_LOOK_EVERY_NS = 20_000_000


class Rest:
    """What this rank hears of the others. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._heard: list[Event] = []
        self._untold: deque[Event] = deque()

    def fileno(self) -> int:
        """Return a descriptor that is readable when the rendezvous has something to say."""
        return self._session.fileno()

    def tell(self, engine: Engine, now_ns: int) -> None:
        """Tell the engine what it has not been told yet, without waiting."""
        self._listen()
        while self._untold:  # why a rank gave up comes before that it is gone, and says more
            event = self._untold.popleft()
            if isinstance(event, Aborted):
                engine.told(_cause(event), now_ns)
            else:
                engine.rank_lost(event.rank, _loss(event), now_ns, is_known=True)

    def announce(self, cause: Cause) -> None:
        """Tell all other ranks why this rank ends a call, a group or the job."""
        kind = cause.kind if cause.sequence == WHOLE_GROUP else f"{cause.kind}{_AT}{cause.sequence}"
        self._session.abort(kind, cause.text, cause.group)

    def failure(self, group: int) -> DetcollError | None:
        """Return the error that a loss, or another rank's giving up this group or the job, means here."""
        self._listen()
        for event in self._heard:
            if isinstance(event, Aborted) and event.group in (JOB_ID, group):
                return _cause(event).error()
        for event in self._heard:
            if isinstance(event, Lost):
                return PeerLost(_loss(event))
        return None

    def explanation(self, group: int) -> DetcollError | None:
        """Wait a little for why a peer is lost: an endpoint sees only that it is, the rendezvous hears the reason.

        The progress thread may hear it first and take the wake-up, so this looks again by itself.
        """
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        end_ns = time.monotonic_ns() + EXPLANATION_NS
        while (failure := self.failure(group)) is None and (left_ns := end_ns - time.monotonic_ns()) > 0:
            poll.poll(min(left_ns, _LOOK_EVERY_NS) / 1e6)
        return failure

    def _listen(self) -> None:
        with self._lock:
            events = self._session.events()
            self._untold += events
            self._heard += [event for event in events if not (isinstance(event, Aborted) and _AT in event.kind)]


def _cause(event: Aborted) -> Cause:
    kind, _, sequence = event.kind.partition(_AT)
    return Cause(event.group, int(sequence) if sequence else WHOLE_GROUP, kind, event.text, event.rank)


def _loss(event: Lost) -> str:
    return f"rank {event.rank} is lost: {event.why}"
