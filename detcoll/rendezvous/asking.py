"""Non-blocking TCP connection probes: a process is alive if the port that it keeps open still accepts connections."""

from __future__ import annotations

import enum
import errno
import socket
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

_PATIENCE_NS = 3_000_000_000
_AT_A_TIME = 32

K = TypeVar("K", bound=Hashable)


class Answer(enum.Enum):
    """Result of a probe: accepted, refused, or neither (a timeout or another error)."""

    ACCEPTED = enum.auto()
    REFUSED = enum.auto()
    NONE = enum.auto()


@dataclass(slots=True)
class _Question:
    """A connection attempt that is in progress, or waits to be started; ``until_ns`` is None until it has started."""

    where: tuple[str, int]
    until_ns: int | None = None
    connection: socket.socket | None = None
    answer: Answer | None = None


class Asker(Generic[K]):
    """Runs several probes at a time, each under a key chosen by the caller; the time of a probe runs from its start."""

    def __init__(self) -> None:
        self._questions: dict[K, _Question] = {}

    def ask(self, key: K, where: tuple[str, int]) -> None:
        """Queue a probe, unless one with this key is pending."""
        self._questions.setdefault(key, _Question(where))

    def begin(self, now_ns: int) -> list[socket.socket]:
        """Start as many queued probes as allowed; return the sockets to poll for writability."""
        under_way = [question.connection for question in self._questions.values() if question.connection is not None]
        for question in self._questions.values():
            if question.until_ns is None and len(under_way) < _AT_A_TIME:
                question.until_ns = now_ns + _PATIENCE_NS
                _connect(question)
                if question.connection is not None:
                    under_way.append(question.connection)
        return under_way

    def answers(self, now_ns: int) -> list[tuple[K, Answer]]:
        """Return the probes that finished or timed out, each once."""
        found = []
        for key, question in list(self._questions.items()):
            answer = question.answer or _answer(question.connection)
            if answer is None and question.until_ns is not None and now_ns >= question.until_ns:
                answer = Answer.NONE
            if answer is not None:
                self.forget(key)
                found.append((key, answer))
        return found

    def next_ns(self) -> int | None:
        """Return when the next probe times out, 0 if a result is ready, None if no probe has started."""
        return min(
            (0 if one.answer else one.until_ns for one in self._questions.values() if one.until_ns is not None),
            default=None,
        )

    def forget(self, key: K) -> None:
        """Cancel the probe of ``key``."""
        question = self._questions.pop(key, None)
        if question is not None and question.connection is not None:
            question.connection.close()

    def close(self) -> None:
        """Cancel all probes."""
        for key in list(self._questions):
            self.forget(key)


def _connect(question: _Question) -> None:
    try:
        found = socket.getaddrinfo(*question.where, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        family, kind, protocol, _, address = found[0]
        connection = question.connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        connection.connect(address)
    except BlockingIOError:
        pass
    except ConnectionRefusedError:
        question.answer = Answer.REFUSED
    except OSError:  # no descriptor, no route
        question.answer = Answer.NONE


def _answer(connection: socket.socket | None) -> Answer | None:
    if connection is None:
        return None
    code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code in (errno.ECONNRESET, errno.EPIPE):  # accepted, then closed with data unread
        return Answer.ACCEPTED
    if code:
        return Answer.REFUSED if code == errno.ECONNREFUSED else Answer.NONE
    try:
        # Where nobody listens, TCP may connect the socket to itself (simultaneous open).
        return Answer.REFUSED if connection.getsockname() == connection.getpeername() else Answer.ACCEPTED
    except OSError:  # not connected yet
        return None
