"""Losses and aborts of other ranks, as the rendezvous reports them.

Events that end a group or the job are kept, because both the progress thread and a failed native collective need them.
An event that ends a single call is passed on once.
"""

from __future__ import annotations

import threading
from collections import deque

from detcoll.errors import DetcollError, PeerLost
from detcoll.rendezvous import Aborted, Event, Lost, Session
from detcoll.runtime.control import JOB_ID, WHOLE_GROUP, Cause
from detcoll.runtime.failures import Failures

_AT, _BY = "@", "/"
"""The kind of an abort is the name of the error; then, for a single refused call, ``@`` and its sequence; then, if
another rank than the sender found the cause, ``/`` and that rank."""


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
        by = "" if cause.rank == self._session.rank else f"{_BY}{cause.rank}"
        self._session.abort(kind + by, cause.text, cause.group)

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

    def _listen(self) -> None:
        with self._lock:
            events = self._session.events()
            self._untold += events
            self._heard += [event for event in events if not (isinstance(event, Aborted) and _AT in event.kind)]


def _cause(event: Aborted) -> Cause:
    named, _, by = event.kind.partition(_BY)
    kind, _, sequence = named.partition(_AT)
    number = int(sequence) if sequence else WHOLE_GROUP
    return Cause(event.group, number, kind, event.text, int(by) if by else event.rank)


def _loss(event: Lost) -> str:
    return f"rank {event.rank} is lost: {event.why}"
