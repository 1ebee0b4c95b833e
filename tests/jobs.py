"""Jobs of several processes, for tests that use detcoll only as its users do.

Nothing here imports detcoll, so that these tests can be run with other versions of it.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = str(Path(__file__).parent / "programs" / "regressions.py")
GUARD_S = 80
"""Ends a job that hangs; nothing waits for it to pass."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> dict[int, list[Any]]:
        """What each rank printed with `say` of its program, in its order."""
        said: dict[int, list[Any]] = {}
        for line in self.out.splitlines():
            if line.startswith('{"rank":'):
                record = json.loads(line)
                said.setdefault(record["rank"], []).append(record["said"])
        return said


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of this process without detcoll's own variables, with some changes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DETCOLL_")} | dict(changes or {})


def run(
    size: int, name: str, *arguments: object, options: Sequence[str] = (), environ: Mapping[str, str] | None = None,
    launcher: Sequence[str] | None = None,
) -> Ended:  # fmt: skip
    """Run the function ``name`` of the program on ``size`` ranks, under ``detcoll run`` or another launcher."""
    if launcher is None:
        launcher = [sys.executable, "-m", "detcoll", "run", "-n", str(size), "--timeout", f"{GUARD_S} s", *options]
    command = [*launcher, sys.executable, PROGRAM, name, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(environ), capture_output=True, text=True, timeout=GUARD_S + 20, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def free_port() -> int:
    """Return a TCP port of loopback that was free just now, of those that Linux gives to nobody who asks for any."""
    while True:
        port = random.randrange(10_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
