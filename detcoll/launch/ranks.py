"""Runs a program once a rank on this host: starts the ranks, copies what they print, waits for all of them.

Ranks meet at a loopback socket that listens before the first of them starts; rank 0 inherits it, so nobody can take
the port in between.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from detcoll.launch.environment import LOOPBACK, MEETING_DESCRIPTOR
from detcoll.launch.forwarding import Forwarder
from detcoll.launch.processes import Guard, start, supervise
from detcoll.outputs import OutputLost


def run_here(
    program: Sequence[str],
    environments: Callable[[socket.socket], Sequence[Mapping[str, str]]],
    *,
    tags: Sequence[str] | None = None,
    logs: Path | None = None,
    deadline_s: float | None = None,
    on_interrupt: int = signal.SIGINT,
) -> int:
    """Start a program once for each environment, wait for all, and return the exit code of the first that failed.

    One rank shares the output of this process. That of several is copied in whole lines.

    Parameters
    ----------
    program : sequence of str
        Program and arguments.
    environments : callable
        Gets the socket where the ranks are to meet, and returns the environment of each; the one that has
        DETCOLL_RENDEZVOUS_FD inherits the socket.
    tags : sequence of str, optional
        What each line that a rank prints begins with.
    logs : Path, optional
        Folder for a file a rank with its standard output; standard error is shared then.
    deadline_s : float, optional
        End the ranks after so long.
    on_interrupt : int
        What ranks get for SIGINT; see `supervise`.

    Raises
    ------
    OutputLost
        If what ranks printed could not be written, and none of them failed.
    """
    # Left in the opposite order: the guard must outlive the wait, and the forwarder needs the ends of the pipes.
    with ExitStack() as stack:
        meeting = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=4096))
        given = environments(meeting)
        forwarder = None
        if logs is None and (tags is not None or len(given) > 1):
            forwarder = stack.enter_context(Forwarder(sys.stdout.buffer, sys.stderr.buffer))
        guard = stack.enter_context(Guard())
        processes: list[subprocess.Popen[bytes]] = []
        for rank, environment in enumerate(given):
            with ExitStack() as open_while_starting:
                out, err = None, None
                if forwarder is not None:
                    out, err = open_while_starting.enter_context(forwarder.channels("" if tags is None else tags[rank]))
                elif logs is not None:
                    out = open_while_starting.enter_context((logs / f"rank{rank}.out").open("wb")).fileno()
                inherited = [meeting.fileno()] if MEETING_DESCRIPTOR in environment else []
                processes.append(start(program, env=environment, pass_fds=inherited, stdout=out, stderr=err))
            guard.watch(processes[-1])
        meeting.close()
        if forwarder is not None:
            forwarder.begin()
        code = supervise(processes, deadline_s=deadline_s, on_interrupt=on_interrupt)
    if code == 0 and forwarder is not None and forwarder.lost is not None:
        raise OutputLost(forwarder.lost.errno, forwarder.lost.strerror)
    return code
