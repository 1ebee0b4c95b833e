"""The lab or the relay: what each command has for its lines here, and the command that runs through the relay.

Whoever asks for the lab gets it, in a user namespace where that takes one (`detcoll.emulation.lab.privilege`). Where it
is forbidden, the command says by what and goes on with the relay, unless it was given ``--no-relay``, or what only the
lab has.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

from detcoll.cli.invocation import is_whole_process
from detcoll.emulation.lab import obtain
from detcoll.emulation.relay import Relay, RelayStatistics
from detcoll.errors import TransportUnavailable, UsageError
from detcoll.launch.environment import rank_environments, without_place
from detcoll.launch.ranks import run_local
from detcoll.topology import Topology

_SHOWS = (
    "detcoll: the relay shows rate and delay alone: no drops, no TCP over the long path, no reserved rates, no others' "
    "traffic, no transport but slotted, and nothing is audited (docs/lab.md)"
)


def refuse_with_relay(**options: object) -> None:
    """Refuse options that only the lab can honour; those with a value were given.

    Raises
    ------
    UsageError
        Naming them all.
    """
    if named := _named(options):
        raise UsageError(
            f"{', '.join(named)} cannot be combined with --relay, which has rate and delay alone; the lab without "
            "--relay has the rest"
        )


def _named(options: dict[str, object]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name, value in options.items() if value]


def must_relay(*, may_relay: bool = True, **options: object) -> bool:
    """Get what a lab needs, and tell whether the relay has to do instead; says why and what it cannot show.

    Where this process comes by a lab in a user namespace alone, it starts anew there, and the call does not return.

    Parameters
    ----------
    may_relay : bool
        Whether the relay may do.
    options
        Those that only the lab can honour; those with a value were given.

    Raises
    ------
    TransportUnavailable
        If the relay may not or cannot do what is asked for, something is missing that both need, or nobody knows
        whether a lab can be opened; says what.
    """
    forbidden = obtain(may_restart=is_whole_process())
    if forbidden is None:
        return False
    if not may_relay:
        raise TransportUnavailable(f"the lab cannot be opened: {forbidden}; --no-relay rules out the relay")
    if named := _named(options):
        raise TransportUnavailable(
            f"the lab cannot be opened: {forbidden}; {', '.join(named)} cannot go on without it: the relay has rate "
            "and delay alone, for slotted alone"
        )
    print(f"detcoll: going on with the relay instead of the lab: {forbidden}", file=sys.stderr)
    print(_SHOWS, file=sys.stderr, flush=True)
    return True


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
