"""Environment variables that detcoll's launchers set for the ranks.

Every rank gets the variables that torch programs read (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE). On a single
host it also gets them with the prefix ``DETCOLL_``; these take precedence over the variables of any other launcher.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

LOOPBACK = "127.0.0.1"
MEETING_DESCRIPTOR = "DETCOLL_RENDEZVOUS_FD"
"""The variable with the descriptor of the listening socket that rank 0 inherits."""

_PLACING = ("DETCOLL_TOPOLOGY", "DETCOLL_SITES", "DETCOLL_SITE", "DETCOLL_RENDEZVOUS", MEETING_DESCRIPTOR)


def rank_numbers(
    rank: int, size: int, local_rank: int, local_size: int, prefixes: tuple[str, ...] = ("", "DETCOLL_")
) -> dict[str, str]:
    """Return the variables with the global and local rank and world size, once for each prefix."""
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {f"{prefix}{name}": str(number) for prefix in prefixes for name, number in numbers.items()}


def rank_environments(size: int, inherited: Mapping[str, str], meeting: socket.socket) -> list[dict[str, str]]:
    """Return the environment of each rank of a job on this host, with detcoll's and torch's variables.

    Parameters
    ----------
    size : int
        Number of ranks.
    inherited : mapping
        The environment to extend.
    meeting : socket.socket
        The listening socket of the rendezvous. Rank 0 inherits it and gets its descriptor in a variable, so that no
        other process can take the port in between.
    """
    common = {name: value for name, value in inherited.items() if name != MEETING_DESCRIPTOR}
    common["DETCOLL_RENDEZVOUS"] = f"{LOOPBACK}:{meeting.getsockname()[1]}"
    common["DETCOLL_JOB"] = secrets.token_hex(8)
    common["MASTER_ADDR"], common["MASTER_PORT"] = LOOPBACK, str(free_port())
    if size > 1:
        common.setdefault("OMP_NUM_THREADS", "1")
    environments = [common | rank_numbers(rank, size, rank, size) for rank in range(size)]
    environments[0][MEETING_DESCRIPTOR] = str(meeting.fileno())
    return environments


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that place this process itself in a topology and rendezvous."""
    return {name: value for name, value in environment.items() if name not in _PLACING}


def free_port() -> int:
    """Return a free port of loopback, for a program that listens on it some seconds later.

    It is below those that the kernel gives to outgoing connections, if one there is free, so none of them takes it
    meanwhile.
    """
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 0
    below = range(max(lowest - 16_384, 1_025), lowest)
    for port in [*secrets.SystemRandom().sample(below, min(len(below), 100)), 0]:
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)) as probe:
            return int(probe.getsockname()[1])
    raise OSError(f"no port of {LOOPBACK} is free")
