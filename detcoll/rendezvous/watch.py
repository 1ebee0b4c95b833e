"""Liveness rules for the other side of a connection, without sockets.

When a connection ends, either the process died or the network broke the connection. To tell these apart, its host is
probed at a TCP port that the process keeps open as long as it lives. A refusal means that the process is dead. If the
host accepts or stays silent, the network is at fault: that is tolerated for a while, and the probe is repeated.
"""

from __future__ import annotations

_ASK_NS = 1_000_000_000
_LAST_WORDS_NS = 20_000_000
"""Grace period after a refusal: the last messages of the dead process may still be in ZeroMQ's I/O thread."""


class Watch:
    """Liveness state of one peer.

    Parameters
    ----------
    tolerance_ns : int
        How long the connection may be down before the peer counts as lost.
    """

    def __init__(self, tolerance_ns: int) -> None:
        self._tolerance_ns = tolerance_ns
        self._down_ns: int | None = None
        self._ask_ns = 0
        self._refused_ns: int | None = None

    @property
    def is_down(self) -> bool:
        """Whether the connection is down."""
        return self._down_ns is not None

    def up(self) -> None:
        """Process a new connection: the peer is alive."""
        self._down_ns = self._refused_ns = None

    def down(self, now_ns: int) -> None:
        """Process the end of the connection."""
        if self._down_ns is None:
            self._down_ns = self._ask_ns = now_ns

    def refused(self, now_ns: int) -> None:
        """Process a refused probe: the peer's process is dead."""
        if self._down_ns is not None and self._refused_ns is None:
            self._refused_ns = now_ns

    def must_ask(self, now_ns: int) -> bool:
        """Return whether to probe the peer now; if so, schedule the next probe."""
        if self._down_ns is None or now_ns < self._ask_ns:
            return False
        self._ask_ns = now_ns + _ASK_NS
        return True

    def loss(self, now_ns: int) -> str | None:
        """Return why the peer counts as lost, or None if it does not."""
        if self._refused_ns is not None and now_ns >= self._refused_ns + _LAST_WORDS_NS:
            return "its connection ended and its host refuses new ones"
        if self._down_ns is not None and now_ns >= self._down_ns + self._tolerance_ns:
            return f"nothing was heard of it for {self._tolerance_ns / 1e9:.3g} s"
        return None

    def next_ns(self) -> int | None:
        """Return when to check again if no event comes first; None while the connection is up."""
        if self._down_ns is None:
            return None
        end_ns = self._down_ns + self._tolerance_ns
        if self._refused_ns is not None:
            return min(end_ns, self._refused_ns + _LAST_WORDS_NS)
        return min(end_ns, self._ask_ns)
