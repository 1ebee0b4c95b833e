"""Copies what several processes print to this process's own output, in whole lines.

Lines stay whole, whoever prints at the same time: a line is written at once when its end has come. Two things are
written before that: a part of a line longer than the buffer, and a line without an end, such as a prompt, once nobody
has written anything for a while. Where another process writes next, the unfinished line is ended first. A last line
without a newline gets one. Bytes are never decoded.

Where the output is a terminal, each process gets a terminal of its own, so that it buffers and colours as it would
without a copy in between. Where standard output and standard error are the same file, a process has one channel for
both, which keeps their order.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import selectors
import termios
import threading
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Self

_LINE_BYTES = 65536
_IDLE_S = 0.05
"""After so long without output from anybody, what has come of a line is shown. A reader hardly notices it."""

_DRAIN_NS = 10 * 10**9
"""How long to go on reading when all processes have ended, should something that they left behind still write."""


class _Target:
    """Where lines go. ``begun_by`` is the stream whose line was written in part; ``lost`` is why nothing more goes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.begun_by: _Stream | None = None
        self.lost: OSError | None = None

    def write(self, data: bytes) -> None:
        """Write all of ``data``, or note that it cannot be; the processes still run to their end."""
        left = memoryview(data)
        while left and self.lost is None:
            try:
                written = self.file.write(left)
                if written is None:  # whoever gave us this output made it non-blocking
                    select.select([], [self.file], [])
                left = left[written or 0 :]
            except OSError as error:
                self.lost = error
        with contextlib.suppress(OSError):
            self.file.flush()


@dataclass(eq=False, slots=True)
class _Stream:
    """What one process prints: where it is copied to, under which tag, and what of a line waits for its end."""

    tag: bytes
    target: _Target
    waiting: bytearray = field(default_factory=bytearray)

    def take(self, data: bytes) -> None:
        """Pass on the whole lines, and the beginning of a line that is too long to wait for."""
        self.waiting += data
        whole = self.waiting.rfind(b"\n") + 1
        self._pass_on(len(self.waiting) if len(self.waiting) - whole > _LINE_BYTES else whole)

    def show_begun(self) -> None:
        """Pass on what has come of a line."""
        self._pass_on(len(self.waiting))

    def end(self) -> None:
        """Pass on the rest, with a newline where it has none."""
        if self.waiting or self.target.begun_by is self:
            self.waiting += b"\n"
        self.show_begun()

    def _pass_on(self, count: int) -> None:
        if not count:
            return
        text = bytes(self.waiting[:count])
        del self.waiting[:count]
        is_ended = text.endswith(b"\n")
        before = self.target.begun_by
        first = b"" if before is self else self.tag if before is None else b"\n" + self.tag
        if self.tag:
            text = text.removesuffix(b"\n").replace(b"\n", b"\n" + self.tag) + (b"\n" if is_ended else b"")
        self.target.begun_by = None if is_ended else self
        self.target.write(first + text)


class Forwarder:
    """Copies the output of processes in a thread of its own; a context manager that ends with what was printed.

    Parameters
    ----------
    out, err : binary file
        Where standard output and standard error go.

    Guarantees
    ----------
    Leave the context when all processes have ended: what they printed is copied by then. What they left behind is
    not waited for.
    """

    def __init__(self, out: BinaryIO, err: BinaryIO) -> None:
        self._out = _Target(_unbuffered(out))
        self._err = self._out if _is_same_file(out, err) else _Target(_unbuffered(err))
        self._selector = selectors.DefaultSelector()
        self._streams: set[_Stream] = set()
        self._ending, self._end_it = os.pipe2(os.O_CLOEXEC)
        self._selector.register(self._ending, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._copy, name="detcoll-output", daemon=True)

    @contextlib.contextmanager
    def channels(self, tag: str = "") -> Iterator[tuple[int, int]]:
        """Give the descriptors that a process is to have for standard output and standard error.

        Start it in this context; its lines begin with ``tag``. Called before `begin`.
        """
        opened: list[int] = []
        try:
            for target in dict.fromkeys((self._out, self._err)):
                ours, theirs = _open_channel(target.file)
                opened.append(theirs)
                stream = _Stream(tag.encode(), target)
                self._streams.add(stream)
                self._selector.register(ours, selectors.EVENT_READ, stream)
            yield opened[0], opened[-1]
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def begin(self) -> None:
        """Begin to copy; called once, when all processes were started."""
        self._thread.start()

    @property
    def lost(self) -> OSError | None:
        """Why something that was printed could not be written, if so."""
        return self._out.lost or self._err.lost

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._end_it)
        if self._thread.ident is not None:
            self._thread.join()  # however long the reader of our output takes
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()

    def _copy(self) -> None:
        until_ns: int | None = None
        while self._streams and (until_ns is None or time.monotonic_ns() < until_ns):
            is_waiting = any(stream.waiting for stream in self._streams)
            keys = self._selector.select(0 if until_ns is not None else _IDLE_S if is_waiting else None)
            if not keys and until_ns is not None:
                break
            if not keys:
                for stream in self._streams:
                    stream.show_begun()
            for key, _ in keys:
                if key.data is None:
                    self._selector.unregister(key.fd)
                    os.close(key.fd)
                    until_ns = time.monotonic_ns() + _DRAIN_NS
                else:
                    self._read(key.fd, key.data)
        for stream in self._streams:
            stream.end()

    def _read(self, descriptor: int, stream: _Stream) -> None:
        try:
            data = os.read(descriptor, _LINE_BYTES)
        except OSError:  # the end of a terminal
            data = b""
        if data:
            stream.take(data)
            return
        stream.end()
        self._streams.remove(stream)
        self._selector.unregister(descriptor)
        os.close(descriptor)


def _unbuffered(file: BinaryIO) -> BinaryIO:
    file.flush()
    raw: BinaryIO = getattr(file, "raw", file)
    return raw


def _is_same_file(one: BinaryIO, other: BinaryIO) -> bool:
    try:
        numbers = one.fileno(), other.fileno()
        is_same = os.path.samestat(*map(os.fstat, numbers))
        # One that is open for reading only stands in for a closed output.
        first, second = (fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE for number in numbers)
    except (OSError, ValueError):
        return one is other
    return is_same and first == second


def _open_channel(target: BinaryIO) -> tuple[int, int]:
    """Return our end and the process's: of a terminal as large as the target, or of a pipe where that is none."""
    if not target.isatty():
        return os.pipe2(os.O_CLOEXEC)
    try:
        ours, theirs = pty.openpty()
    except OSError:  # there are no more of them
        return os.pipe2(os.O_CLOEXEC)
    tty.setraw(theirs)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, fcntl.ioctl(target.fileno(), termios.TIOCGWINSZ, bytes(8)))
    return ours, theirs
