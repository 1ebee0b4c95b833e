"""Worlds of ranks for tests, forked from a process that has imported once what they need.

A rank that is started imports detcoll for 0.3 s of a core, and torch, DDP and an optimizer for 2 s, as long as most
programs run. Nothing that is imported starts a thread, and there is no job or group before the fork, so a forked rank
begins as one that was started. How launchers start ranks is tested elsewhere.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from jobs import Ended, environment
from ranks import PROGRAMS

PLAIN = ("detcoll.testing.values", "detcoll_shm", "detcoll_slotted", "detcoll_tcp", "numpy.ma")
TORCH = (*PLAIN, "torch._dynamo", "torch.nn.parallel", "detcoll.torch.process_group", "detcoll_gloo")
"""What each rank would import for itself; torch imports ``torch._dynamo`` with an optimizer and with DDP."""


@cache
def server(modules: tuple[str, ...]) -> subprocess.Popen[str]:
    """The process that has imported the modules and forks ranks, for as long as this one lives."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "forking.py"), *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=environment(),
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def launch_forked(
    size: int, program: str, *arguments: object, modules: tuple[str, ...] = PLAIN,
    environ: Mapping[str, str] | None = None, timeout_s: float = 90.0, grace_s: float = 30.0,
    frozen: Collection[int] = (),
) -> Ended:  # fmt: skip
    """Run a program of the folder ``programs`` as `ranks.launch` does, on forked ranks that have imported ``modules``.

    Where a rank fails, the others get ``grace_s`` to end by themselves. Those that are ``frozen`` are not waited for.
    The code is that of the first rank that failed, negative for a signal.
    """
    process = server(modules)
    assert process.stdin is not None
    assert process.stdout is not None
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        request = {
            "size": size, "program": str(PROGRAMS / program), "arguments": list(map(str, arguments)),
            "environ": environment(environ), "out": str(out), "err": str(err), "deadline_s": timeout_s,
            "grace_s": grace_s, "frozen": list(frozen),
        }  # fmt: skip
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            codes = json.loads(process.stdout.readline())
        except BaseException:
            process.kill()  # with its ranks; what it would answer belongs to no later request
            server.cache_clear()
            raise
        return Ended(next(filter(None, codes), 0), out.read_text(), err.read_text())
