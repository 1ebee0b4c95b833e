"""Copies what several processes print, each line with a tag that tells whose it is.

Lines stay whole, whoever prints at the same time. A line that is longer than the buffer is passed on in parts.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO

_LINE_BYTES = 65536


@dataclass(eq=False, slots=True)
class _Stream:
    """One pipe: where it is copied to, under which tag, and what of a line has come so far."""

    tag: bytes
    target: BinaryIO
    begun: bytearray = field(default_factory=bytearray)


class Tagger:
    """Copies piped output of processes in a thread of its own; a context manager that ends with what was printed.

    Parameters
    ----------
    out, err : binary file
        Where standard output and standard error go.
    """

    def __init__(self, out: BinaryIO, err: BinaryIO) -> None:
        self._out, self._err = out, err
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._copy, name="detcoll-output", daemon=True)

    def copy(self, processes: Sequence[subprocess.Popen[bytes]], tags: Sequence[str]) -> None:
        """Begin to copy the output of ``processes``, which were started with pipes; called once."""
        for process, tag in zip(processes, tags, strict=True):
            for pipe, target in ((process.stdout, self._out), (process.stderr, self._err)):
                if pipe is not None:
                    self._selector.register(pipe, selectors.EVENT_READ, _Stream(tag.encode(), target))
        self._thread.start()

    def __enter__(self) -> Tagger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._thread.ident is not None:
            self._thread.join(10.0)  # the pipes end with the processes, unless one of them cannot be killed
        if not self._thread.is_alive():
            self._selector.close()

    def _copy(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                stream: _Stream = key.data
                data = os.read(key.fd, _LINE_BYTES)
                stream.begun += data
                whole = len(stream.begun) if not data or len(stream.begun) > _LINE_BYTES else _after_last(stream.begun)
                _write(stream, bytes(stream.begun[:whole]))
                del stream.begun[:whole]
                if not data:
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]


def _after_last(data: bytearray) -> int:
    return data.rfind(b"\n") + 1


def _write(stream: _Stream, text: bytes) -> None:
    if not text:
        return
    tagged = b"".join(b"%s%s\n" % (stream.tag, line) for line in text.removesuffix(b"\n").split(b"\n"))
    with contextlib.suppress(BrokenPipeError):  # nobody reads any more; the processes still run to their end
        stream.target.write(tagged)
        stream.target.flush()
