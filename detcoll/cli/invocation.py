"""The command line that is being carried out: figures in result files should say where they came from.

Also whether it is all that this process does. Then the process may start anew with it; a program that called
`detcoll.cli.main` may not.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_given: ContextVar[tuple[str, ...]] = ContextVar("given", default=())
_is_all: ContextVar[bool] = ContextVar("is_all", default=False)


@contextmanager
def carrying_out(arguments: Sequence[str], *, is_all: bool = False) -> Iterator[None]:
    """Keep ``arguments`` as those of ``detcoll`` meanwhile; ``is_all`` : they are all that this process does."""
    before, was_all = _given.set(tuple(arguments)), _is_all.set(is_all)
    try:
        yield
    finally:
        _given.reset(before)
        _is_all.reset(was_all)


def command_line() -> str:
    """Return the command being carried out, in the form that a shell reads."""
    return shlex.join(("detcoll", *_given.get()))


def is_whole_process() -> bool:
    """Tell whether the command being carried out is all that this process does."""
    return _is_all.get()
