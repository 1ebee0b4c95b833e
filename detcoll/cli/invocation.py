"""The command line that is being carried out, for result files: figures should say where they came from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_given: ContextVar[tuple[str, ...]] = ContextVar("given", default=())


@contextmanager
def carrying_out(arguments: Sequence[str]) -> Iterator[None]:
    """Keep ``arguments`` as those of ``detcoll`` meanwhile."""
    before = _given.set(tuple(arguments))
    try:
        yield
    finally:
        _given.reset(before)


def command_line() -> str:
    """Return the command being carried out, in the form that a shell reads."""
    return shlex.join(("detcoll", *_given.get()))
