"""What ranks are told about themselves: the variables that launchers of detcoll set.

Every rank is told its numbers as torch programs read them (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), and on one
host also under detcoll's own names, which count before those of any other launcher around.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping

LOOPBACK = "127.0.0.1"
MEETING_DESCRIPTOR = "DETCOLL_RENDEZVOUS_FD"
"""Names the descriptor of the listening socket that a rank inherits."""

_PLACING = ("DETCOLL_TOPOLOGY", "DETCOLL_SITES", "DETCOLL_SITE", "DETCOLL_RENDEZVOUS", MEETING_DESCRIPTOR)


def rank_numbers(
    rank: int, size: int, local_rank: int, local_size: int, prefixes: tuple[str, ...] = ("", "DETCOLL_")
) -> dict[str, str]:
    """Return the variables that tell a rank its number and how many there are, everywhere and on its host."""
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {f"{prefix}{name}": str(number) for prefix in prefixes for name, number in numbers.items()}


def rank_environments(size: int, inherited: Mapping[str, str], meeting: socket.socket) -> list[dict[str, str]]:
    """Return the environment of every rank of a job on this host: detcoll's own variables, and what torch reads.

    Parameters
    ----------
    size : int
        How many ranks there are.
    inherited : mapping
        What to add to.
    meeting : socket.socket
        Listens where the ranks are to meet. Rank 0 is told its descriptor and inherits it, so that nobody takes the
        port before it listens.
    """
    common = {name: value for name, value in inherited.items() if name != MEETING_DESCRIPTOR}
    common["DETCOLL_RENDEZVOUS"] = f"{LOOPBACK}:{meeting.getsockname()[1]}"
    common["DETCOLL_JOB"] = secrets.token_hex(8)
    common["MASTER_ADDR"], common["MASTER_PORT"] = LOOPBACK, str(_free_port())
    if size > 1:
        common.setdefault("OMP_NUM_THREADS", "1")
    environments = [common | rank_numbers(rank, size, rank, size) for rank in range(size)]
    environments[0][MEETING_DESCRIPTOR] = str(meeting.fileno())
    return environments


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what this process was told itself about its place among ranks."""
    return {name: value for name, value in environment.items() if name not in _PLACING}


def _free_port() -> int:
    """Return a port for torch's own meeting, should the program use it."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
