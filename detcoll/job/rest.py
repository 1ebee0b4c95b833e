"""Losses and aborts of other ranks, as the rendezvous reports them.

Events that end a group or the job are kept, because both the progress thread and a failed native collective need them.
An event that ends a single call is passed on once.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections import deque

from detcoll.errors import Closed, DetcollError, PeerLost
from detcoll.rendezvous import Aborted, Event, Lost, Session
from detcoll.runtime.control import JOB_ID, WHOLE_GROUP, Cause
from detcoll.runtime.failures import EXPLANATION_NS, Failures

_AT = "@"
"""Separates, in the kind of an abort, the error's name from the sequence of the refused call."""

_LOOK_EVERY_NS = 20_000_000


class Rest:
    """Events of the other ranks. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._heard: list[Event] = []
        self._untold: deque[Event] = deque()

    def fileno(self) -> int:
        """Return a file descriptor that is readable when the rendezvous has new events.

        Raises
        ------
        Closed
            If this rank has closed its session.
        """
        return self._session.fileno()

    def tell(self, failures: Failures, now_ns: int) -> None:
        """Pass new events to the engine, without blocking."""
        self._listen()
        while self._untold:  # in order of arrival: the abort of a rank comes before its loss and is more specific
            event = self._untold.popleft()
            if isinstance(event, Aborted):
                failures.told(_cause(event), now_ns)
            else:
                failures.rank_lost(event.rank, _loss(event), now_ns, is_known=True)

    def announce(self, cause: Cause) -> None:
        """Tell all other ranks that this rank ends a call, a group or the job, and why."""
        kind = cause.kind if cause.sequence == WHOLE_GROUP else f"{cause.kind}{_AT}{cause.sequence}"
        self._session.abort(kind, cause.text, cause.group)

    def failure(self, group: int) -> DetcollError | None:
        """Return the error for an abort of this group or the job, else for a lost rank, else None."""
        self._listen()
        for event in self._heard:
            if isinstance(event, Aborted) and event.group in (JOB_ID, group):
                return _cause(event).error()
        for event in self._heard:
            if isinstance(event, Lost):
                return PeerLost(_loss(event))
        return None

    def explanation(self, group: int) -> DetcollError | None:
        """Wait up to `EXPLANATION_NS` for the reason of a peer's loss, which only the rendezvous reports.

        The progress thread may hear the reason first and take the wake-up, so this looks again by itself. Another
        thread may close the session meanwhile, so the descriptor is asked for again each time.
        """
        end_ns = time.monotonic_ns() + EXPLANATION_NS
        with contextlib.suppress(Closed):  # nothing more will be heard
            while (failure := self.failure(group)) is None and (left_ns := end_ns - time.monotonic_ns()) > 0:
                poll = select.poll()
                poll.register(self.fileno(), select.POLLIN)
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
