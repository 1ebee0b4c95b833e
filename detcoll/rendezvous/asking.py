"""Asking hosts for a connection without waiting: whether a process lives shows by whether its port is still open."""

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
    """What a host says."""

    ACCEPTED = enum.auto()
    REFUSED = enum.auto()
    NONE = enum.auto()


@dataclass(slots=True)
class _Question:
    """A connection on its way, or one that has yet to begin."""

    where: tuple[str, int]
    asked_ns: int
    connection: socket.socket | None = None
    answer: Answer | None = None


class Asker(Generic[K]):
    """Asks about several at a time, each under a key of the caller's."""

    def __init__(self) -> None:
        self._questions: dict[K, _Question] = {}

    def ask(self, key: K, where: tuple[str, int], now_ns: int) -> None:
        """Ask, unless this key is being asked about already."""
        self._questions.setdefault(key, _Question(where, now_ns))

    def begin(self, now_ns: int) -> list[socket.socket]:
        """Begin what can begin, and return the sockets to wait for until they are writable."""
        under_way = [question.connection for question in self._questions.values() if question.connection is not None]
        for question in self._questions.values():
            if question.connection is None and question.answer is None and len(under_way) < _AT_A_TIME:
                question.asked_ns = now_ns
                _connect(question)
                if question.connection is not None:
                    under_way.append(question.connection)
        return under_way

    def answers(self, now_ns: int) -> list[tuple[K, Answer]]:
        """Return what is known by now, each once."""
        found = []
        for key, question in list(self._questions.items()):
            answer = question.answer or _answer(question.connection)
            if answer is None and now_ns >= question.asked_ns + _PATIENCE_NS:
                answer = Answer.NONE
            if answer is not None:
                self.forget(key)
                found.append((key, answer))
        return found

    def next_ns(self) -> int | None:
        """Return when an answer is known or overdue."""
        return min(
            (0 if question.answer else question.asked_ns + _PATIENCE_NS for question in self._questions.values()),
            default=None,
        )

    def forget(self, key: K) -> None:
        """Stop asking about ``key``."""
        question = self._questions.pop(key, None)
        if question is not None and question.connection is not None:
            question.connection.close()

    def close(self) -> None:
        """Stop asking."""
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
    if code in (errno.ECONNRESET, errno.EPIPE):  # accepted, and closed without a look at it
        return Answer.ACCEPTED
    if code:
        return Answer.REFUSED if code == errno.ECONNREFUSED else Answer.NONE
    try:
        # TCP may meet itself on a port that nobody listens at.
        return Answer.REFUSED if connection.getsockname() == connection.getpeername() else Answer.ACCEPTED
    except OSError:  # not connected yet
        return None
