"""Worlds of ranks for tests of torch, forked from a process that has imported torch once.

A rank that is started imports torch, DDP and an optimizer for 2 s of a core, as long as most programs run. Nothing that
is imported starts a thread, and there is no group before the fork, so a forked rank begins as one that was started.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from jobs import Ended, environment
from ranks import PROGRAMS


@cache
def server() -> subprocess.Popen[str]:
    """The process that forks ranks, for as long as this one lives."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "forking.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def launch_forked(
    size: int, program: str, *arguments: object, environ: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> Ended:
    """Run a program of the folder ``programs`` as `ranks.launch` does, on forked ranks; nobody ends the others."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        request = {
            "size": size, "program": str(PROGRAMS / program), "arguments": list(map(str, arguments)),
            "environ": environment(environ), "out": str(out), "err": str(err), "deadline_s": timeout_s,
        }  # fmt: skip
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            codes = json.loads(process.stdout.readline())
        except BaseException:
            process.kill()  # with its ranks; what it would answer belongs to no later request
            server.cache_clear()
            raise
        return Ended(next(filter(None, codes), 0), out.read_text(), err.read_text())
