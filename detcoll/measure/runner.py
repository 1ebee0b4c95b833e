"""Runs a program on all ranks, in one cluster or across the lab's lines, and waits for all of them."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from detcoll.emulation.lab import Lab
from detcoll.emulation.lab.launch import Launcher, run_ranks
from detcoll.emulation.relay import Relay
from detcoll.errors import DetcollError
from detcoll.launch.environment import rank_environments, without_place
from detcoll.launch.processes import TIMED_OUT
from detcoll.launch.ranks import run_local
from detcoll.measure.aggregate import Setting
from detcoll.topology import Topology

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Sums inside a rank run on one thread: more would round differently, and ranks share the processors."""

AS_IT_IS = {"DETCOLL_COMPARE": "0"}
"""Gloo is compared as it is, without the round trip that each call takes where ranks compare what they call."""

_ENDED_BY_USER = {128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP}


class Runner:
    """Runs programs on the ranks of a topology.

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

        ``lab`` may be a relay, beside which the ranks are processes of this host. Standard output of ranks is
        kept under ``logs``; their errors go to this process's.

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
            code = self._run_apart(lab, setting, argv, own, logs)
        else:
            told = [{}] * self._topology.size if lab is None else lab.environments()
            code = self._run_together(argv, own, logs, told)
        if code in _ENDED_BY_USER:
            raise SystemExit(code)
        if code == TIMED_OUT:
            raise DetcollError(f"{setting.title}: not done within {self._deadline_s:g} s")
        if code != 0:
            raise DetcollError(f"{setting.title}: a rank ended with exit code {code}")
        if isinstance(lab, Relay) and not lab.statistics().connections:
            raise DetcollError(f"{setting.title}: its ranks never connected through the relay")
        return time.monotonic() - begin_s

    def _run_apart(self, lab: Lab, setting: Setting, argv: Sequence[str], env: Mapping[str, str], logs: Path) -> int:
        launcher = Launcher.MPIEXEC if setting.transport == "mpi" else Launcher.PLAIN
        return run_ranks(lab, argv, launcher=launcher, env=env, deadline_s=self._deadline_s, logs=logs)

    def _run_together(
        self, argv: Sequence[str], env: Mapping[str, str], logs: Path, told: Sequence[Mapping[str, str]]
    ) -> int:
        """Run the ranks on this host; ``told`` tells each what it alone is to know."""

        def environments(meeting: socket.socket) -> list[dict[str, str]]:
            known = rank_environments(self._topology.size, without_place(os.environ), meeting)
            return [own | dict(env) | dict(given) for own, given in zip(known, told, strict=True)]

        return run_local(argv, environments, logs=logs, deadline_s=self._deadline_s, on_interrupt=signal.SIGTERM)
