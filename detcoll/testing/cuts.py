"""A TCP relay that cuts connections on command, as routers and firewalls do."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

_PIECE_BYTES = 2**16
_RESET = struct.pack("ii", 1, 0)


class CuttingRelay:
    """Passes connections on to ``target`` (``host:port``) until told otherwise; use as a context manager.

    Each command has taken effect when it returns.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener: socket.socket | None = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._partners: dict[socket.socket, socket.socket] = {}
        self._forgotten: set[socket.socket] = set()
        self._passes_on, self._garbles = True, False
        self.garbled = threading.Event()
        self._command: Callable[[], None] | None = None
        self._done = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, name="cutting-relay", daemon=True)
        self._thread.start()

    def forget(self) -> None:
        """Swallow what arrives on connections so far, without a word; new ones are passed on."""
        self._do(lambda: self._swallow(True))

    def silence(self) -> None:
        """Swallow what arrives on all connections, new ones too."""
        self._do(lambda: self._swallow(False))

    def reset(self) -> None:
        """Reset all connections so far; new ones are passed on."""
        self._do(self._reset)

    def refuse(self) -> None:
        """Reset all connections and accept no new ones."""
        self._do(self._refuse)

    def garble(self) -> None:
        """Reset all connections, and answer new ones with what is not ZeroMQ; returns once one was."""
        self.garbled.clear()
        self._do(lambda: self._reset(garbles=True))
        self.garbled.wait()

    def __enter__(self) -> CuttingRelay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._end)
        self._thread.join()
        self._selector.close()
        os.close(self._wake)

    def _do(self, command: Callable[[], None]) -> None:
        self._done.clear()
        self._command = command
        os.eventfd_write(self._wake, 1)
        self._done.wait()

    def _swallow(self, passes_on: bool) -> None:
        self._passes_on = passes_on
        self._forgotten |= self._partners.keys()

    def _reset(self, garbles: bool = False) -> None:
        self._passes_on, self._garbles = True, garbles
        for connection in list(self._partners):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        for connection in list(self._partners):
            self._drop(connection)

    def _refuse(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        self._reset()

    def _end(self) -> None:
        self._refuse()
        self._is_over = True

    def _serve(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select():
                if key.fileobj == self._wake:
                    os.eventfd_read(self._wake)
                    if self._command is not None:
                        self._command()
                        self._command = None
                        self._done.set()
                        break  # what else was ready may be closed by now
                elif key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._partners:
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        assert self._listener is not None
        near, _ = self._listener.accept()
        if self._garbles:
            with near, contextlib.suppress(ConnectionError):
                if near.recv(_PIECE_BYTES):  # not from one that only looks whether somebody listens
                    near.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    self.garbled.set()
                    while near.recv(_PIECE_BYTES):
                        pass
            return
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            self._partners[one] = other
            self._selector.register(one, selectors.EVENT_READ)
            if not self._passes_on:
                self._forgotten.add(one)

    def _pass_on(self, connection: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(_PIECE_BYTES)
        if connection in self._forgotten:
            if not data:
                self._selector.unregister(connection)  # the other side is not told
            return
        if data:
            with contextlib.suppress(OSError):
                self._partners[connection].sendall(data)
            return
        self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        for one in (connection, self._partners.get(connection)):
            if one is not None and self._partners.pop(one, None) is not None:
                self._forgotten.discard(one)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(one)
                one.close()
