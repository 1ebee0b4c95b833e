"""Which process this is, without a system call."""

from __future__ import annotations

import os

_pid = os.getpid()


def _forked() -> None:
    global _pid
    _pid = os.getpid()


os.register_at_fork(after_in_child=_forked)


def process_id() -> int:
    """Return the id of this process. Every call compares it with that of the job, to find out that it was forked."""
    return _pid
