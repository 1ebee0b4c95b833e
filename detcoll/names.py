"""Which address of a host answers: a name may lead to several, of which its owner listens at some.

A name is looked up until the resolver has an answer, since "temporary failure" says nothing of the name (RFC 1035, a
server that failed or did not reply). Several addresses are tried at once, and the first at which somebody accepts is
taken (RFC 8305 does so in turn); so a path that swallows packets of one family costs nothing.
"""

from __future__ import annotations

import select
import socket
import time
from contextlib import ExitStack
from typing import Any

ANSWER_S = 3.0
"""For how long several addresses of a name are tried."""
_ASK_AGAIN_S = 0.2

Found = tuple[socket.AddressFamily, Any]
"""A family and a socket address."""


def is_temporary(error: Exception) -> bool:
    """Return whether looking up the same name again may succeed."""
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN


def look_up(host: str, port: int, timeout_s: float) -> list[Found]:
    """Return all addresses of a name or address; ask again for ``timeout_s`` where the resolver fails for now.

    Raises
    ------
    OSError
        If there is none.
    """
    until_ns = time.monotonic_ns() + int(timeout_s * 1e9)
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"{host!r} is no name of a host: {error}") from error
        except OSError as error:
            left_s = (until_ns - time.monotonic_ns()) / 1e9
            if left_s <= 0 or not is_temporary(error):
                raise
            time.sleep(min(_ASK_AGAIN_S, left_s))
        else:
            return [(family, where) for family, _, _, _, where in found]


def answering(host: str, port: int, timeout_s: float) -> Found:
    """Return the address of ``host`` at which somebody accepts; the first one where there is one only, or none does.

    Raises
    ------
    OSError
        If there is no address.
    """
    found = look_up(host, port, timeout_s)
    return found[0] if len(found) == 1 else _first_to_accept(found, min(timeout_s, ANSWER_S)) or found[0]


def _first_to_accept(found: list[Found], timeout_s: float) -> Found | None:
    until_ns = time.monotonic_ns() + int(timeout_s * 1e9)
    with ExitStack() as stack:
        trying, waiting = {}, select.poll()
        for family, where in found:
            try:
                made = stack.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                made.connect_ex(where)
            except OSError:  # such as a family that this host lacks
                continue
            trying[made.fileno()] = made, (family, where)
            waiting.register(made, select.POLLOUT)
        while trying:
            left_ms = max(0, (until_ns - time.monotonic_ns()) // 10**6)
            ready = waiting.poll(left_ms)
            for descriptor, _ in ready:
                made, one = trying.pop(descriptor)
                waiting.unregister(descriptor)
                if made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 and _is_connected(made):
                    return one
            if not ready and not left_ms:
                return None
    return None


def _is_connected(made: socket.socket) -> bool:
    try:
        return bool(made.getpeername())
    except OSError:
        return False
