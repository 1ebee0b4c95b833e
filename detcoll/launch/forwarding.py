"""Copy the output of several processes to this process's output, in whole lines.

Lines of different processes are not mixed: a line is written when its newline arrives. There are two exceptions: a line
longer than the buffer is written in parts, and an unfinished line, such as a prompt, is written once no process has
printed anything for a while. If another process prints next, the unfinished line is ended first. A last line without a
newline gets one. Bytes are never decoded.

Beside their output, processes send error reports, which are written to standard error as `detcoll.launch.reports`
says. What a process printed before its report comes before it.

If the output is a terminal, each process gets a pseudo-terminal, so that it buffers and colours its output as it would
on the real one. If standard output and standard error are the same file, a process has one channel for both, which
keeps their order.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import selectors
import socket
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Self

from detcoll.launch import reports
from detcoll.launch.reports import Reports

_LINE_BYTES = 65536
_IDLE_S = 0.05
"""After this time without any output, unfinished lines are written. A reader hardly notices the delay."""

_DRAIN_NS = 10 * 10**9
"""How long to go on reading after all processes have ended, in case a process that they left behind still writes."""


class _Target:
    """An output file. ``begun_by``: the stream with an unfinished line in it; ``lost``: the error that ended output."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.begun_by: _Stream | None = None
        self.lost: OSError | None = None

    def write(self, data: bytes) -> None:
        """Write all of ``data``; record an error instead of raising it, so that the processes run to their end."""
        left = memoryview(data)
        while left and self.lost is None:
            try:
                written = self.file.write(left)
                if written is None:  # the output is non-blocking and full
                    select.select([], [self.file], [])
                left = left[written or 0 :]
            except OSError as error:
                self.lost = error
        with contextlib.suppress(OSError):
            self.file.flush()


@dataclass(eq=False, slots=True)
class _Stream:
    """An output stream of one process: the tag of its lines, its target, and the part of a line not written yet."""

    tag: bytes
    target: _Target
    waiting: bytearray = field(default_factory=bytearray)

    def take(self, data: bytes) -> None:
        """Write the complete lines; also the rest if it exceeds the buffer."""
        self.waiting += data
        whole = self.waiting.rfind(b"\n") + 1
        self._pass_on(len(self.waiting) if len(self.waiting) - whole > _LINE_BYTES else whole)

    def show_begun(self) -> None:
        """Write the unfinished line."""
        self._pass_on(len(self.waiting))

    def end(self) -> None:
        """Write the rest, and end an unfinished line with a newline."""
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


@dataclass(frozen=True, slots=True)
class _Reporter:
    """How the reports of one process are written, and what it prints to."""

    lines: _Stream
    outputs: list[_Stream]


@dataclass(frozen=True, slots=True)
class _Message:
    """A line of the launcher's own; dropped if ``unless_reported``, a process, has reported an error."""

    text: str
    unless_reported: int | None


class Forwarder:
    """Context manager that copies the output of processes, and writes their error reports, in a thread.

    Parameters
    ----------
    out, err : binary file
        The targets of standard output and standard error.

    Guarantees
    ----------
    If all processes have ended when the context is left, all their output has been copied at its end, and all their
    reports are written or counted. It does not wait for processes that they left behind.
    """

    def __init__(self, out: BinaryIO, err: BinaryIO) -> None:
        self._out = _Target(_unbuffered(out))
        self._err = self._out if _is_same_file(out, err) else _Target(_unbuffered(err))
        self._selector = selectors.DefaultSelector()
        self._streams: set[_Stream] = set()
        self._ending, self._wake_it = os.pipe2(os.O_CLOEXEC)
        self._selector.register(self._ending, selectors.EVENT_READ)
        reporting, self._reported = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reporting = reporting.detach()
        self._selector.register(self._reporting, selectors.EVENT_READ)
        self._opened: list[_Stream] = []
        self._reporters: list[_Reporter] = []
        self._reports = Reports(0)
        self._messages: deque[_Message] = deque()
        self._thread = threading.Thread(target=self._copy, name="detcoll-output", daemon=True)

    @contextlib.contextmanager
    def channels(self, tag: str = "") -> Iterator[tuple[int, int]]:
        """Yield the descriptors for a process's standard output and standard error.

        Start the process in this context, before `begin` is called; each of its lines begins with ``tag``.
        """
        opened: list[int] = []
        self._opened = []
        try:
            for target in dict.fromkeys((self._out, self._err)):
                ours, theirs = _open_channel(target.file)
                opened.append(theirs)
                stream = _Stream(tag.encode(), target)
                self._opened.append(stream)
                self._streams.add(stream)
                self._selector.register(ours, selectors.EVENT_READ, stream)
            yield opened[0], opened[-1]
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def reporting(self, stderr: int, tag: str = "") -> tuple[int, dict[str, str]]:
        """Return a descriptor that the next process inherits, and variables, by which it reports its errors.

        Called before `begin`, once for each process in the order of their numbers, after `channels` if that is called.
        ``stderr`` : its standard error. ``tag`` : as for `channels`.
        """
        descriptor = self._reported.fileno()
        self._reporters.append(_Reporter(_Stream(tag.encode(), self._err), self._opened))
        return descriptor, reports.address(descriptor, len(self._reporters) - 1, stderr)

    def begin(self) -> None:
        """Start to copy; called once, after all processes were started."""
        self._reported.close()
        self._reports = Reports(len(self._reporters))
        self._thread.start()

    def say(self, text: str, unless_reported: int | None = None) -> None:
        """Write a line of detcoll's to standard error, after all that processes which have ended said before.

        Called after `begin`. It is dropped if the process with the number ``unless_reported`` reported an error.
        """
        self._messages.append(_Message(text, unless_reported))
        os.write(self._wake_it, b"\n")

    @property
    def lost(self) -> OSError | None:
        """The error with which output could not be written, or None."""
        return self._out.lost or self._err.lost

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._wake_it)
        self._reported.close()
        if self._thread.ident is not None:
            self._thread.join()  # without a timeout, since the reader of our output may be slow
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()

    def _copy(self) -> None:
        until_ns: int | None = None
        while until_ns is None or time.monotonic_ns() < until_ns:
            is_waiting = any(stream.waiting for stream in self._streams)
            keys = self._selector.select(0 if until_ns is not None else _IDLE_S if is_waiting else None)
            if not keys and until_ns is not None:
                break
            if not keys:
                for stream in self._streams:
                    stream.show_begun()
            # A process prints, then reports, then ends, and then something is said about its end.
            for key, _ in sorted(keys, key=lambda ready: (ready[0].fd == self._ending, ready[0].data is None)):
                if key.fd == self._ending:
                    until_ns = None if self._was_woken() else time.monotonic_ns() + _DRAIN_NS
                elif key.data is None:
                    self._take_report()
                else:
                    self._read(key.fd, key.data)
        for stream in self._streams:
            stream.end()
        if (closing := self._reports.closing()) is not None:
            self._write(f"detcoll: {closing}")

    def _was_woken(self) -> bool:
        """Write what was said; return False at the end."""
        if not os.read(self._ending, _LINE_BYTES):
            self._close(self._ending)
            return False
        while self._messages:
            message = self._messages.popleft()
            if message.unless_reported is None or not self._reports.has_of(message.unless_reported):
                self._write(f"detcoll: {message.text}")
        return True

    def _take_report(self) -> None:
        try:
            data = os.read(self._reporting, reports.LARGEST_BYTES)
        except OSError:
            data = b""
        if not data:
            self._close(self._reporting)
            return
        rank, text = reports.parse(data, len(self._reporters))
        reporter = self._reporters[rank]
        written = self._reports.take(rank, text, is_tagged=bool(reporter.lines.tag))
        if written is not None:
            for stream in reporter.outputs:
                stream.show_begun()
            reporter.lines.take(written)
            reporter.lines.end()

    def _write(self, line: str) -> None:
        _Stream(b"", self._err).take(f"{line}\n".encode())

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
        self._close(descriptor)

    def _close(self, descriptor: int) -> None:
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
        # A file that is open for reading only is a placeholder for a closed output.
        first, second = (fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE for number in numbers)
    except (OSError, ValueError):
        return one is other
    return is_same and first == second


def _open_channel(target: BinaryIO) -> tuple[int, int]:
    """Return our end and the process's end: of a pty with the target's size if that is a terminal, else of a pipe."""
    if not target.isatty():
        return os.pipe2(os.O_CLOEXEC)
    try:
        ours, theirs = pty.openpty()
    except OSError:  # no free pty
        return os.pipe2(os.O_CLOEXEC)
    tty.setraw(theirs)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, fcntl.ioctl(target.fileno(), termios.TIOCGWINSZ, bytes(8)))
    return ours, theirs
