"""When a rank says its hello again: no socket, no clock.

A connection begins with a hello, which its other end answers. Before the answer that end may close it and mean nothing
by it: too many strangers were silent while the hello was on its way, or no descriptor was left for another caller. So
who called tries again, at once and then after a pause each time, until the greeting's deadline. Where a new connection
is refused nobody listens any more, and no hello helps.
"""

from __future__ import annotations

from dataclasses import dataclass

PAUSE_NS = 100_000_000
"""Time from the end of a connection without an answer to the next one; the first time there is none."""


@dataclass(slots=True)
class _Greeting:
    """A hello that is not answered.  ``until_ns`` : when to give up.  ``next_ns`` : when to say it again, if it is."""

    until_ns: int
    next_ns: int | None = None
    has_failed: bool = False


class Greetings:
    """The peers that have not answered."""

    def __init__(self) -> None:
        self._unanswered: dict[int, _Greeting] = {}

    def begin(self, peer: int, until_ns: int) -> None:
        """Take note that a peer is called."""
        self._unanswered[peer] = _Greeting(until_ns)

    def end(self, peer: int) -> None:
        """Take note that a peer has answered, or is lost."""
        self._unanswered.pop(peer, None)

    def closed(self, peer: int, error: Exception, now_ns: int) -> bool:
        """Take note that the connection to a peer has ended; tell whether it is called again."""
        greeting = self._unanswered.get(peer)
        if greeting is None:
            return False
        is_closed = isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError)
        if not is_closed or now_ns >= greeting.until_ns:
            self.end(peer)
            return False
        greeting.next_ns = now_ns + PAUSE_NS if greeting.has_failed else now_ns
        greeting.has_failed = True
        return True

    def next_ns(self) -> int | None:
        """Return when `due` has somebody, or None."""
        times = (greeting.next_ns for greeting in self._unanswered.values() if greeting.next_ns is not None)
        return min(times, default=None)

    def due(self, now_ns: int) -> list[int]:
        """Return the peers that are to be called now."""
        due = [
            peer
            for peer, greeting in self._unanswered.items()
            if greeting.next_ns is not None and greeting.next_ns <= now_ns
        ]
        for peer in due:
            self._unanswered[peer].next_ns = None
        return due
