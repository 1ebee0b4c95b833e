"""Run a program once for each rank on this host: start the ranks, copy their output, wait for all of them.

Ranks meet at a loopback socket that listens before the first of them starts. Rank 0 inherits it, so that no other
process can take the port in between.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from detcoll.launch.environment import LOOPBACK, MEETING_DESCRIPTOR
from detcoll.launch.forwarding import Forwarder
from detcoll.launch.processes import SETTLE_S, Guard, start, supervise
from detcoll.outputs import OutputLost


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a process prints to and reports errors to.

    ``stdout``, ``stderr`` : descriptors; None: inherit this process's.  ``inherited`` : other descriptors that the
    process inherits.  ``variables`` : what its environment says of these.
    """

    stdout: int | None = None
    stderr: int | None = None
    inherited: tuple[int, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


_STDERR = 2

Start = Callable[[Outputs], subprocess.Popen[bytes]]
"""Starts a process with these outputs."""


def run_local(
    program: Sequence[str],
    environments: Callable[[socket.socket], Sequence[Mapping[str, str]]],
    *,
    tags: Sequence[str] | None = None,
    logs: Path | None = None,
    deadline_s: float | None = None,
    on_interrupt: int = signal.SIGINT,
) -> int:
    """Start a program on this host once for each environment, and wait for all as `run_crew` does.

    Parameters
    ----------
    program : sequence of str
        Program and arguments.
    environments : callable
        Takes the listening socket of the rendezvous and returns the environment of each rank. The rank whose
        environment has DETCOLL_RENDEZVOUS_FD inherits the socket.
    tags, logs, deadline_s, on_interrupt
        As for `run_crew`.

    Returns
    -------
    int
        The exit code, as for `run_crew`.
    """

    def start_rank(environment: Mapping[str, str], outputs: Outputs) -> subprocess.Popen[bytes]:
        inherited = [meeting.fileno()] if MEETING_DESCRIPTOR in environment else []
        return start(
            program, env={**environment, **outputs.variables}, pass_fds=[*inherited, *outputs.inherited],
            stdout=outputs.stdout, stderr=outputs.stderr,
        )  # fmt: skip

    with socket.create_server((LOOPBACK, 0), backlog=4096) as meeting:
        starts = [partial(start_rank, environment) for environment in environments(meeting)]
        return run_crew(
            starts, tags=tags, logs=logs, deadline_s=deadline_s, on_interrupt=on_interrupt, when_started=meeting.close
        )


def run_crew(
    starts: Sequence[Start],
    *,
    tags: Sequence[str] | None = None,
    logs: Path | None = None,
    deadline_s: float | None = None,
    settle_s: float = SETTLE_S,
    on_interrupt: int = signal.SIGINT,
    essential: Mapping[int, str] | None = None,
    when_started: Callable[[], None] | None = None,
) -> int:
    """Start processes, wait for all, and return the exit code as `supervise` does.

    A single process without a tag inherits this process's output. The output of several is copied in whole lines, and
    an error that several ranks report is written once; see `detcoll.launch.reports`.

    Parameters
    ----------
    starts : sequence of callable
        Each starts one process.
    tags : sequence of str, optional
        For each process, the prefix of its output lines.
    logs : Path, optional
        Folder in which each process has a file for its standard output. Standard error is then inherited.
    deadline_s, settle_s, on_interrupt, essential
        As for `supervise`.
    when_started : callable, optional
        Called after all processes have started.

    Returns
    -------
    int
        The exit code, as for `supervise`.

    Raises
    ------
    OutputLost
        If their output could not be written and no process failed.
    DetcollError
        As `supervise` does.
    """
    # Contexts end in reverse order: the guard must outlive the wait, and the forwarder must drain the pipes.
    with ExitStack() as stack:
        forwarder = _forwarder(len(starts), tags, logs)
        if forwarder is not None:
            stack.enter_context(forwarder)
        guard = stack.enter_context(Guard())
        processes = _start_all(starts, guard, forwarder, tags, logs)
        if when_started is not None:
            when_started()
        if forwarder is not None:
            forwarder.begin()
        say = None if forwarder is None else forwarder.say
        code = supervise(
            processes, deadline_s=deadline_s, settle_s=settle_s, on_interrupt=on_interrupt, essential=essential,
            announce=say, announce_exit=say,
        )  # fmt: skip
    if code == 0 and forwarder is not None and forwarder.lost is not None:
        raise OutputLost(forwarder.lost.errno, forwarder.lost.strerror)
    return code


def _forwarder(size: int, tags: Sequence[str] | None, logs: Path | None) -> Forwarder | None:
    """Return what copies the output of ``size`` processes and writes their reports; with ``logs``, only the latter."""
    if logs is not None:
        stderr = getattr(sys.stderr, "buffer", None)  # there is none in a notebook
        return Forwarder(stderr, stderr) if stderr is not None and size > 1 else None
    return Forwarder(sys.stdout.buffer, sys.stderr.buffer) if tags is not None or size > 1 else None


def _start_all(
    starts: Sequence[Start], guard: Guard, forwarder: Forwarder | None, tags: Sequence[str] | None, logs: Path | None
) -> list[subprocess.Popen[bytes]]:
    """Start the processes in order, each watched by ``guard`` before the next one starts."""
    processes = []
    for rank, start_one in enumerate(starts):
        with ExitStack() as while_starting:
            tag = "" if tags is None else tags[rank]
            processes.append(start_one(_outputs(while_starting, forwarder, tag, logs, rank)))
        guard.watch(processes[-1])
    return processes


def _outputs(stack: ExitStack, forwarder: Forwarder | None, tag: str, logs: Path | None, rank: int) -> Outputs:
    """Return the outputs of a process; ``stack`` closes our copies."""
    stdout = stderr = None
    if logs is not None:
        stdout = stack.enter_context((logs / f"rank{rank}.out").open("wb")).fileno()
    elif forwarder is not None:
        stdout, stderr = stack.enter_context(forwarder.channels(tag))
    if forwarder is None:
        return Outputs(stdout, stderr)
    reports, variables = forwarder.reporting(_STDERR if stderr is None else stderr, tag)
    return Outputs(stdout, stderr, (reports,), variables)
