"""Worlds of ranks for tests, forked from a process that has imported once what they need.

A rank that is started imports detcoll for 0.3 s of a core, and torch, DDP and an optimizer for 2 s, as long as most
programs run. Nothing that is imported starts a thread, and there is no job or group before the fork, so a forked rank
begins as one that was started. How launchers start ranks is tested elsewhere.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jobs import GUARD_S, PROGRAM, Ended, environment
from ranks import PROGRAMS

from detcoll.emulation.lab import Lab
from detcoll.emulation.lab.launch import rank_environments

PLAIN = ("detcoll.testing.values", "detcoll_shm", "detcoll_slotted", "detcoll_tcp", "numpy.ma")
TORCH = (
    *PLAIN, "torch._dynamo", "torch._functorch.aot_autograd", "torch.nn.parallel", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.optim", "torch.distributed.tensor.parallel",
    "detcoll.torch.process_group", "detcoll_gloo",
)  # fmt: skip
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


def asked(request: Mapping[str, object], modules: tuple[str, ...]) -> Any:
    """Return what the process that has imported the modules answers."""
    process = server(modules)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        print(json.dumps(request), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())
    except BaseException:
        process.kill()  # with its ranks; what it would answer belongs to no later request
        server.cache_clear()
        raise


def places(lab: Lab, folder: str, environ: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Return, for each rank, the namespaces of its site and what the lab tells it, with ``environ`` over that."""
    topology, path = lab.topology, Path(folder, "topology.toml")
    path.write_text(topology.to_toml())
    return [
        {"namespaces": lab.namespace_paths(topology.site_of(rank)), "environ": own | dict(environ or {})}
        for rank, own in enumerate(rank_environments(lab, str(path)))
    ]


def launch_forked(
    size: int, program: str, *arguments: object, modules: tuple[str, ...] = PLAIN,
    environ: Mapping[str, str] | None = None, timeout_s: float = 90.0, grace_s: float = 30.0,
    frozen: Collection[int] = (), lab: Lab | None = None,
) -> Ended:  # fmt: skip
    """Run a program of the folder ``programs`` as `ranks.launch` does, on forked ranks that have imported ``modules``.

    Where a rank fails, the others get ``grace_s`` to end by themselves. Those that are ``frozen`` are not waited for.
    With ``lab``, each rank is in its site and knows what the lab tells. The code is that of the first rank that
    failed, negative for a signal.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        request = {
            "size": size, "program": str(PROGRAMS / program), "arguments": list(map(str, arguments)),
            "environ": environment(environ), "in": os.devnull, "out": str(out), "err": str(err),
            "deadline_s": timeout_s, "grace_s": grace_s, "frozen": list(frozen),
            "places": [] if lab is None else places(lab, folder, environ),
        }  # fmt: skip
        codes = asked(request, modules)
        return Ended(next(filter(None, codes), 0), out.read_text(), err.read_text())


class Rank:
    """One forked rank, with what every launcher sets, which runs a function of a program; a test talks to it."""

    def __init__(
        self, rank: int, size: int, port: int, name: str, *arguments: object, environ: Mapping[str, str] | None = None
    ) -> None:
        plain = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._stack = ExitStack()
        folder = self._stack.enter_context(TemporaryDirectory())
        paths = {way: os.path.join(folder, way) for way in ("in", "out", "err")}
        os.mkfifo(paths["in"])
        os.mkfifo(paths["out"])
        self._err = Path(paths["err"])
        self._err.touch()
        request = {
            **paths, "program": PROGRAM, "arguments": [name, *map(str, arguments)],
            "environ": environment(plain | dict(environ or {})),
        }  # fmt: skip
        self.pid: int = asked(request, PLAIN)
        self._out = self._stack.enter_context(open(paths["out"], encoding="utf-8"))  # noqa: SIM115
        self._in = self._stack.enter_context(open(paths["in"], "w", encoding="utf-8"))  # noqa: SIM115
        self._guard = threading.Timer(GUARD_S, os.kill, (self.pid, signal.SIGKILL))
        self._guard.start()

    def hears(self) -> Any:
        """Return what the rank says next, None where it has ended."""
        line = self._out.readline()
        return json.loads(line)["said"] if line else None

    def go_on(self) -> None:
        """Let the rank go on from where it waits."""
        print(file=self._in, flush=True)

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.cancel()
        asked({"end": self.pid}, PLAIN)
        print(self._err.read_text(), file=sys.stderr, end="")  # pytest shows it where the test fails
        self._stack.close()
