"""A path between two hosts that a test can break, played by a relay on loopback.

Nothing here imports detcoll, as in `jobs`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable

_RESET = struct.pack("ii", 1, 0)
_PIECE_BYTES = 2**16


class NetworkPath:
    """Passes connections on to a port of loopback, or as a SOCKS5 proxy (RFC 1928) to wherever clients ask for.

    Use as a context manager. Each command has taken effect when it returns.
    """

    def __init__(self, port: int | None = None) -> None:
        self._target, self._loop = port, asyncio.new_event_loop()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: set[_Connection] = set()
        self._is_dark, self._resets_to_come = False, 0
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def forget(self) -> None:
        """Swallow without a word what comes over the connections that there are; new ones work."""
        self._command(lambda: [each.go_silent() for each in self._connections])

    def go_dark(self) -> None:
        """Swallow what comes over all connections, new ones too."""
        self._is_dark = True
        self.forget()

    def reset(self, new_ones: int = 0) -> None:
        """Reset all connections that there are, and the next ``new_ones`` that are made."""

        def end() -> None:
            self._resets_to_come = new_ones
            for each in self._connections:
                each.reset()

        self._command(end)

    def __enter__(self) -> NetworkPath:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._command(self._over.set)
        self._thread.join()
        self._loop.close()

    def _command(self, command: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            command()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._listener)
        await self._over.wait()
        server.close()
        for each in self._connections:
            each.writer.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        near = _Connection(reader, writer, self._is_dark)
        if self._resets_to_come:
            self._resets_to_come -= 1
            near.reset()
            return
        self._connections.add(near)
        try:
            if near.is_silent:
                await near.drain_into(None)
            else:
                far = _Connection(*await asyncio.open_connection("127.0.0.1", await self._port_for(near)))
                self._connections.add(far)
                await asyncio.gather(near.drain_into(far), far.drain_into(near))
        except (OSError, asyncio.IncompleteReadError):
            near.reset()

    async def _port_for(self, client: _Connection) -> int:
        if self._target is not None:
            return self._target
        await client.reader.readexactly((await client.reader.readexactly(2))[1])
        client.writer.write(b"\x05\x00")
        asked = await client.reader.readexactly(10)
        client.writer.write(b"\x05\x00\x00\x01" + bytes(6))
        return int.from_bytes(asked[8:], "big")


class _Connection:
    """One of the two halves of a connection through a path."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_silent: bool = False) -> None:
        self.reader, self.writer, self.is_silent = reader, writer, is_silent

    def go_silent(self) -> None:
        self.is_silent = True

    def reset(self) -> None:
        if not self.writer.is_closing():
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.writer.transport.abort()

    async def drain_into(self, other: _Connection | None) -> None:
        """Pass on what comes, and the end of it, until the connection ends."""
        while data := await self.reader.read(_PIECE_BYTES):
            if other is not None and not self.is_silent:
                other.writer.write(data)
                await other.writer.drain()
        if other is not None and not self.is_silent:
            other.writer.close()
