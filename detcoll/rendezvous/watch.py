"""Whether the other side of a connection is still there: the rules, without sockets.

A connection that ended says little: the process may have died, or something between cut it. So its host is asked for
a new connection, at a port that the process holds open as long as it lives. A refusal is a death. An answer, or
silence, is a cut, which is tolerated for a while; the question is repeated meanwhile.
"""

from __future__ import annotations

_ASK_NS = 1_000_000_000
_LAST_WORDS_NS = 20_000_000
"""What a dead process said last may still be on its way through ZeroMQ's thread."""


class Watch:
    """What is known of one other side.

    Parameters
    ----------
    tolerance_ns : int
        How long it may be without a connection.
    """

    def __init__(self, tolerance_ns: int) -> None:
        self._tolerance_ns = tolerance_ns
        self._down_ns: int | None = None
        self._ask_ns = 0
        self._refused_ns: int | None = None

    @property
    def is_down(self) -> bool:
        """Whether there is no connection."""
        return self._down_ns is not None

    def up(self) -> None:
        """Note that there is a connection again."""
        self._down_ns = self._refused_ns = None

    def down(self, now_ns: int) -> None:
        """Note that the connection ended."""
        if self._down_ns is None:
            self._down_ns = self._ask_ns = now_ns

    def refused(self, now_ns: int) -> None:
        """Note that the other side's host refused a connection."""
        if self._down_ns is not None and self._refused_ns is None:
            self._refused_ns = now_ns

    def must_ask(self, now_ns: int) -> bool:
        """Whether to ask the other side's host for a connection now; if so, the next time is later."""
        if self._down_ns is None or now_ns < self._ask_ns:
            return False
        self._ask_ns = now_ns + _ASK_NS
        return True

    def loss(self, now_ns: int) -> str | None:
        """Return why the other side counts as lost, None as long as it does not."""
        if self._refused_ns is not None and now_ns >= self._refused_ns + _LAST_WORDS_NS:
            return "its connection ended and its host refuses new ones"
        if self._down_ns is not None and now_ns >= self._down_ns + self._tolerance_ns:
            return f"nothing was heard of it for {self._tolerance_ns / 1e9:.3g} s"
        return None

    def next_ns(self) -> int | None:
        """Return when to look again without an event."""
        if self._down_ns is None:
            return None
        end_ns = self._down_ns + self._tolerance_ns
        if self._refused_ns is not None:
            return min(end_ns, self._refused_ns + _LAST_WORDS_NS)
        return min(end_ns, self._ask_ns)
