"""``detcoll run``: the ranks of a program on this host."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from detcoll import registry
from detcoll.cli.quantity import Quantity, Whole
from detcoll.cli.splitting import executed
from detcoll.errors import ConnectError, UsageError
from detcoll.job.settings import AUTO, log_level, place, read_settings
from detcoll.launch.environment import rank_environments
from detcoll.launch.ranks import run_local
from detcoll.outputs import require_folder
from detcoll.quantities import parse_timeout_s
from detcoll.rendezvous.sockets import own_host
from detcoll.topology import LARGEST_WORLD

_A_TIMEOUT_S = 60.0  # the script's own is not known here


def run(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    ranks: Annotated[Whole | None, Parameter(name=["-n", "--ranks"])] = None,
    sites: Whole | None = None,
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
        How many to start; has to be given.
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
    if ranks is None:
        raise UsageError("run needs the number of ranks to start, such as: detcoll run -n 2 train.py")
    _check(ranks, sites, topology)
    deadline_s = None if timeout is None else parse_timeout_s(timeout, "--timeout")
    program = executed(command, "run")
    settings = {
        "DETCOLL_SITES": None if sites is None else str(sites),
        "DETCOLL_TOPOLOGY": None if topology is None else str(topology.absolute()),
        "DETCOLL_TRANSPORT": transport,
    }
    environ = {**os.environ, **{name: value for name, value in settings.items() if value is not None}}
    _refuse_for_all(environ, ranks)
    tags = [f"[rank {rank}] " for rank in range(ranks)] if tag_output else None
    return run_local(
        program, lambda meeting: rank_environments(ranks, environ, meeting), tags=tags, deadline_s=deadline_s
    )


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
    with suppress(ConnectError):  # each rank has the time to look a name up again
        own_host(environ)
    if settings.transport != AUTO:
        registry.require_known(settings.transport)
    require_folder(None if settings.trace is None else Path(settings.trace), "DETCOLL_TRACE")
