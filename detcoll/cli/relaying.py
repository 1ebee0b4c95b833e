"""Options that name what the relay does not have, and the command that runs through it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from detcoll.emulation.relay import Relay, RelayStatistics
from detcoll.errors import UsageError
from detcoll.launch.environment import rank_environments, without_place
from detcoll.launch.ranks import run_local
from detcoll.topology import Topology


def refuse_with_relay(**options: object) -> None:
    """Refuse options that only the lab can honour; those with a value were given.

    Raises
    ------
    UsageError
        Naming them all.
    """
    named = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if named:
        raise UsageError(
            f"{', '.join(named)} cannot be combined with --relay, which has rate and delay alone; the lab without "
            "--relay has the rest, and needs Linux and root"
        )


def run_through_relay(
    topology: Topology, buffer_bytes: int, command: Sequence[str], deadline_s: float | None, *, prefix: bool
) -> tuple[int, RelayStatistics]:
    """Run ``command`` once a rank on this host, wide-area connections through a relay.

    Returns
    -------
    code, statistics : int, RelayStatistics
        The exit code of the first rank that failed, and what the relay counted.

    Raises
    ------
    UsageError
        If the topology cannot be relayed.
    DetcollError
        If the relay does not start or has died.
    """
    with Relay(topology, buffer_bytes) as relay:

        def environments(meeting: socket.socket) -> list[dict[str, str]]:
            known = rank_environments(topology.size, without_place(os.environ), meeting)
            return [own | placed for own, placed in zip(known, relay.environments(), strict=True)]

        tags = ["", *(f"[{rank}] " for rank in range(1, topology.size))] if prefix else None
        code = run_local(command, environments, tags=tags, deadline_s=deadline_s)
        return code, relay.statistics()
