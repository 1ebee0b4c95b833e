"""Where connections and messages come in: who is let in, and how much is taken at a time.

A connection is let in if it knows the job's token, which it shows as the password of ZeroMQ's PLAIN mechanism (RFC 24);
ZeroMQ asks this rank about each (ZAP, RFC 27). Before that it can send one command of at most `LARGEST_FRAME_BYTES`,
within the time for a handshake, so that is all the memory that a stranger's connection costs. The number of connections
is bounded by file descriptors.

Those who are let in keep to their credit. However much they send, a turn takes `TURN_MESSAGES` at most, so that
deadlines, timers and the caller come in between.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence

import zmq

LARGEST_FRAME_BYTES = 2**24
"""Larger messages are sent in parts."""
TURN_MESSAGES = 256
_TURN_REQUESTS = 32
ZAP = "inproc://zeromq.zap.01"
_USER = b"detcoll"
_POLLIN, _DONTWAIT = int(zmq.POLLIN), int(zmq.DONTWAIT)
"""Plain numbers, since operations of enumerations run in Python."""


def show(made: zmq.Socket[bytes], token: int) -> None:
    """Let a socket show the job's token where it connects."""
    made.plain_username, made.plain_password = _USER, _password(token)


def _password(token: int) -> bytes:
    return b"%016x" % token


class Gate:
    """The receiving socket and the one by which ZeroMQ asks, both of one endpoint."""

    def __init__(self, inlet: zmq.Socket[bytes], requests: zmq.Socket[bytes], token: int) -> None:
        self.refused_connections = 0
        self._has_messages = self._has_requests = False
        self._inlet, self._requests, self._password = inlet, requests, _password(token)
        self.descriptors = inlet.fileno(), requests.fileno()

    @property
    def has_more(self) -> bool:
        """Whether a turn left something, of which no descriptor tells."""
        return self._has_messages or self._has_requests

    def turn(self, ready: Sequence[int], take: Callable[[Sequence[zmq.Frame]], None]) -> bool:
        """Take in a bounded part of what has come; False where no message was looked for."""
        inlet_fd, requests_fd = self.descriptors
        if self._has_requests or requests_fd in ready:
            self._has_requests = self.admit()
        if self._has_messages or inlet_fd in ready:
            self._has_messages = self._receive(take)
            return True
        return False

    def admit(self) -> bool:
        """Answer ZeroMQ who may come in; True if it asks for more."""
        for _ in range(_TURN_REQUESTS):
            if not _is_readable(self._requests):
                return False
            asked = self._requests.recv_multipart(zmq.DONTWAIT)
            knows = len(asked) == 8 and hmac.compare_digest(asked[7], self._password)
            self.refused_connections += not knows
            answer = (b"200", b"OK") if knows else (b"400", b"another job, or none")
            self._requests.send_multipart([*asked[:2], *answer, b"", b""], zmq.DONTWAIT)
        return _is_readable(self._requests)

    def _receive(self, take: Callable[[Sequence[zmq.Frame]], None]) -> bool:
        for _ in range(TURN_MESSAGES):
            if not _is_readable(self._inlet):
                return False
            take(self._next_message())
        return _is_readable(self._inlet)

    def _next_message(self) -> list[zmq.Frame]:
        """Return the frames of a message, all of which have come; they say by themselves whether more follow."""
        frames = [self._inlet.recv(_DONTWAIT, copy=False)]
        while frames[-1].more:
            frames.append(self._inlet.recv(_DONTWAIT, copy=False))
        return frames


def _is_readable(asked: zmq.Socket[bytes]) -> bool:
    return bool(int(asked.getsockopt(zmq.EVENTS)) & _POLLIN)
