"""Runs a program on all ranks, in one cluster or across the lab's lines, and waits for all of them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from types import FrameType
from uuid import uuid4

from detcoll.emulation.lab import Lab
from detcoll.emulation.lab.launch import Launcher, Output, run_ranks
from detcoll.emulation.relay import Relay
from detcoll.errors import DetcollError
from detcoll.launch import processes
from detcoll.measure.aggregate import Setting
from detcoll.topology import Topology

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Sums inside a rank run on one thread: more would round differently, and ranks share the processors."""

AS_IT_IS = {"DETCOLL_COMPARE": "0"}
"""Gloo is compared as it is, without the round trip that each call takes where ranks compare what they call."""

_PLACING = ("DETCOLL_TOPOLOGY", "DETCOLL_SITES", "DETCOLL_SITE", "DETCOLL_RENDEZVOUS", "DETCOLL_RENDEZVOUS_FD")
_LOOPBACK = "127.0.0.1"
_ENDED_BY_USER = {128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP}


class Places:
    """Where settings run.

    Parameters
    ----------
    topology : Topology
        The ranks and their sites.
    deadline_s : float
        How long one run may take.
    """

    def __init__(self, topology: Topology, deadline_s: float) -> None:
        self._topology, self._deadline_s = topology, deadline_s

    def run(
        self, setting: Setting, argv: Sequence[str], logs: Path, env: Mapping[str, str] | None = None,
        lab: Lab | Relay | None = None,
    ) -> float:  # fmt: skip
        """Run ``argv`` once a rank, apart in ``lab`` or together without, and return how long it took in seconds.

        ``lab`` may be a relay, beside which the ranks are processes of this host. Standard output of ranks is dropped,
        or kept under ``logs``; their errors go to this process's.

        Raises
        ------
        DetcollError
            If a rank fails, the deadline passes, or nothing went through the relay.
        SystemExit
            If this process was told to end meanwhile.
        """
        own = ONE_THREAD | AS_IT_IS | {"DETCOLL_TRANSPORT": setting.transport} | dict(env or {})
        begin_s = time.monotonic()
        if isinstance(lab, Lab):
            code = self._run_apart(lab, setting, argv, own)
        else:
            placed = [{}] * self._topology.size if lab is None else lab.environments()
            code = self._run_together(argv, own, logs, placed)
        if code in _ENDED_BY_USER:
            raise SystemExit(code)
        if code == processes.TIMED_OUT:
            raise DetcollError(f"{setting.name}, {setting.place}: not done within {self._deadline_s:g} s")
        if code != 0:
            raise DetcollError(f"{setting.name}, {setting.place}: a rank ended with exit code {code}")
        if isinstance(lab, Relay) and not lab.statistics().connections:
            raise DetcollError(f"{setting.name}, {setting.place}: its ranks never connected through the relay")
        return time.monotonic() - begin_s

    def _run_apart(self, lab: Lab, setting: Setting, argv: Sequence[str], env: Mapping[str, str]) -> int:
        launcher = Launcher.MPIEXEC if setting.transport == "mpi" else Launcher.PLAIN
        deadline_ns = time.monotonic_ns() + round(self._deadline_s * 1e9)
        result = run_ranks(lab, argv, launcher=launcher, env=env, deadline_ns=deadline_ns, output=Output.CAPTURE)
        return processes.exit_code(result.exit_code)

    def _run_together(
        self, argv: Sequence[str], env: Mapping[str, str], logs: Path, placed: Sequence[Mapping[str, str]]
    ) -> int:
        """Run the ranks on this host; ``placed`` tells each what it alone is to know."""
        started: list[Popen[bytes]] = []
        with processes.Guard() as guard, socket.create_server((_LOOPBACK, 0)) as meeting:
            try:
                for rank, own in enumerate(cluster_environments(self._topology.size, meeting)):
                    inherited = [meeting.fileno()] if rank == 0 else []
                    with (logs / f"rank{rank}.out").open("wb") as output:
                        given = own | dict(env) | dict(placed[rank])
                        started.append(processes.start(argv, env=given, pass_fds=inherited, stdout=output))
                    guard.watch(started[-1])
            except BaseException:
                processes.supervise(started, deadline_s=0)
                raise
            return processes.supervise(started, deadline_s=self._deadline_s, on_interrupt=signal.SIGTERM)


def cluster_environments(size: int, meeting: socket.socket) -> list[dict[str, str]]:
    """Return what a launcher tells each of ``size`` ranks of this host, which meet at the listening ``meeting``.

    Rank 0 inherits the socket, so that nobody takes the port before it listens. What this process was told itself
    about a place is left out.
    """
    common = {name: value for name, value in os.environ.items() if name not in _PLACING} | {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "DETCOLL_WORLD_SIZE": str(size),
        "DETCOLL_LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(_free_port()),
        "DETCOLL_RENDEZVOUS": f"{_LOOPBACK}:{meeting.getsockname()[1]}",
        "DETCOLL_JOB": uuid4().hex,
    }
    numbers = ("RANK", "LOCAL_RANK", "DETCOLL_RANK", "DETCOLL_LOCAL_RANK")
    environments = [common | dict.fromkeys(numbers, str(rank)) for rank in range(size)]
    environments[0]["DETCOLL_RENDEZVOUS_FD"] = str(meeting.fileno())
    return environments


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that what was started is ended and cleaned up."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])
