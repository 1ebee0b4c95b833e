"""``detcoll run``: the ranks of a program on this host.

Ranks meet at a loopback socket that listens before the first of them starts; rank 0 inherits it, so nobody can take
the port in between.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from detcoll import registry
from detcoll.cli.quantity import Quantity
from detcoll.errors import UsageError
from detcoll.job.settings import AUTO, log_level, place, read_settings
from detcoll.launch.processes import Guard, start, supervise
from detcoll.launch.tagging import Tagger
from detcoll.outputs import require_folder
from detcoll.quantities import parse_timeout_s
from detcoll.rendezvous.sockets import own_host
from detcoll.topology import LARGEST_WORLD

_A_TIMEOUT_S = 60.0  # the script's own is not known here


def run(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    ranks: Annotated[int, Parameter(name=["-n", "--ranks"])],
    sites: int | None = None,
    topology: Path | None = None,
    transport: str | None = None,
    timeout: Quantity | None = None,
    tag_output: bool = False,
) -> int:
    """Start the ranks of a program on this host and wait for them.

    When a rank fails, the others are ended soon after, and its exit code is the one of this command. What all ranks
    would refuse of DETCOLL_* variables is refused before any is started.

    Parameters
    ----------
    command
        SCRIPT.py, ``-m MODULE`` or a program, and its arguments. Options after it belong to it.
    ranks
        How many to start.
    sites
        Group the ranks into so many equal sites, with no lines between: the baseline of a wide-area run.
    topology
        A topology file; its ranks must add up to those started.
    transport
        What moves the data; chosen by itself unless given. One that the script registers itself is named in it.
    timeout
        End the ranks after so long, such as "10 min".
    tag_output
        Begin each line that a rank prints with its number.
    """
    _check(ranks, sites, topology)
    deadline_s = None if timeout is None else parse_timeout_s(timeout, "--timeout")
    program = _program(command)
    settings = {
        "DETCOLL_SITES": None if sites is None else str(sites),
        "DETCOLL_TOPOLOGY": None if topology is None else str(topology.absolute()),
        "DETCOLL_TRANSPORT": transport,
    }
    environ = {**os.environ, **{name: value for name, value in settings.items() if value is not None}}
    _refuse_for_all(environ, ranks)
    tags = [f"[rank {rank}] " for rank in range(ranks)] if tag_output else None
    return launch(program, lambda listener: rank_environments(ranks, environ, listener), tags, deadline_s)


def launch(
    program: Sequence[str],
    environments: Callable[[socket.socket], Sequence[Mapping[str, str]]],
    tags: Sequence[str] | None,
    deadline_s: float | None,
) -> int:
    """Start a program once for each environment, wait for all, and return the exit code of the first that failed.

    Parameters
    ----------
    program : sequence of str
        Program and arguments.
    environments : callable
        Gets the socket where the ranks are to meet, and returns the environment of each; the one that has
        DETCOLL_RENDEZVOUS_FD inherits the socket.
    tags : sequence of str, optional
        What each line that a rank prints begins with.
    deadline_s : float, optional
        End the ranks after so long.
    """
    pipe = None if tags is None else subprocess.PIPE
    # Left in the opposite order: the guard must outlive the wait, and the tags need the ends of the pipes.
    with ExitStack() as stack:
        tagger = None if tags is None else stack.enter_context(Tagger(sys.stdout.buffer, sys.stderr.buffer))
        guard = stack.enter_context(Guard())
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            processes = []
            for environment in environments(listener):
                inherited = [listener.fileno()] if "DETCOLL_RENDEZVOUS_FD" in environment else []
                processes.append(start(program, env=environment, pass_fds=inherited, stdout=pipe, stderr=pipe))
                guard.watch(processes[-1])
        if tagger is not None and tags is not None:
            tagger.copy(processes, tags)
        return supervise(processes, deadline_s=deadline_s)


def rank_environments(size: int, inherited: Mapping[str, str], listener: socket.socket) -> list[dict[str, str]]:
    """Return the environment of every rank: detcoll's own variables, and those that torch programs read.

    Parameters
    ----------
    size : int
        How many ranks there are.
    inherited : mapping
        What to add to.
    listener : socket.socket
        Listens where the ranks are to meet; rank 0 is told its descriptor.
    """
    common = {name: value for name, value in inherited.items() if name != "DETCOLL_RENDEZVOUS_FD"}
    common["DETCOLL_RENDEZVOUS"] = f"127.0.0.1:{listener.getsockname()[1]}"
    common["DETCOLL_JOB"] = secrets.token_hex(8)
    common["MASTER_ADDR"], common["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    if size > 1:
        common.setdefault("OMP_NUM_THREADS", "1")
    environments = []
    for rank in range(size):
        numbers = {
            f"{prefix}{local}{name}": str(value)
            for prefix in ("", "DETCOLL_")
            for local in ("", "LOCAL_")
            for name, value in (("RANK", rank), ("WORLD_SIZE", size))
        }
        environments.append(common | numbers)
    environments[0]["DETCOLL_RENDEZVOUS_FD"] = str(listener.fileno())
    return environments


def _check(ranks: int, sites: int | None, topology: Path | None) -> None:
    if not 1 <= ranks <= LARGEST_WORLD:
        raise UsageError(f"-n {ranks} must be a whole number from 1 to {LARGEST_WORLD}")
    if sites is not None and topology is not None:
        raise UsageError("--sites and --topology exclude each other: a topology names its sites")
    if sites is not None and (sites < 1 or ranks % sites):
        raise UsageError(f"--sites {sites} must divide the {ranks} ranks into equal sites")
    if sites is not None and os.environ.get("DETCOLL_TOPOLOGY"):
        raise UsageError("--sites and DETCOLL_TOPOLOGY exclude each other: a topology names its sites")


def _refuse_for_all(environ: Mapping[str, str], ranks: int) -> None:
    """Refuse what every rank of this environment would refuse, once instead of once a rank."""
    log_level(environ.get("DETCOLL_LOG") or "warning")
    settings = read_settings(environ, ranks, AUTO, None, _A_TIMEOUT_S, None)
    place(settings.topology, [environ.get("DETCOLL_SITE") or ""] * ranks)
    own_host(environ)
    if settings.transport != AUTO:
        registry.require_known(settings.transport)
    require_folder(None if settings.trace is None else Path(settings.trace), "DETCOLL_TRACE")


def _program(command: Sequence[str]) -> list[str]:
    """Return what each rank executes."""
    if not command:
        raise UsageError("run needs a SCRIPT, -m MODULE or a program to start")
    first = command[0]
    if first == "-m":
        if len(command) < 2:
            raise UsageError("-m needs the name of a module")
        return [sys.executable, *command]
    if first.startswith("-"):
        raise UsageError(f"{first!r} is no option of run; see detcoll run --help")
    if first.endswith(".py"):
        if not Path(first).is_file():
            raise UsageError(f"script {first!r} does not exist")
        return [sys.executable, *command]
    found = shutil.which(first)
    if found is None:
        raise UsageError(f"{first!r} is neither a Python script (.py) nor a program that can be run here")
    return [found, *command[1:]]


def _free_port() -> int:
    """Return a port for torch's own meeting, should the program use it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
