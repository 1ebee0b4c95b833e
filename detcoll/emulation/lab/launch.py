"""Runs a program once per rank of a lab, each in its site, and ends them all together.

``plain`` starts the ranks itself. ``mpiexec`` lets the launcher of MPICH or Open MPI start them, so that they are ranks
of one MPI job: every rank goes through `detcoll.emulation.lab.enter`, which brings it to its site, and MPI is kept from
the shared memory that only ranks of one site could have. The launcher itself is in the first site. Open MPI's ranks
talk to it over the lines as they start and end.

The topology reaches the ranks as a path to memory of this process (memfd_create), so that no file is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from detcoll.emulation.lab.emulation import Lab
from detcoll.emulation.lab.tun import DEVICE
from detcoll.errors import TransportUnavailable, UsageError
from detcoll.installation import install_command
from detcoll.launch.environment import rank_numbers
from detcoll.launch.leftovers import now_ns, remove_segments
from detcoll.launch.mpiexec import Family, Mpiexec, find_mpiexec
from detcoll.launch.ranks import Outputs, run_crew

MASTER_PORT = 29500
RENDEZVOUS_PORT = 29400


class Launcher(Enum):
    """Who starts the ranks."""

    PLAIN = "plain"
    MPIEXEC = "mpiexec"


def run_ranks(
    lab: Lab,
    argv: Sequence[str],
    *,
    launcher: Launcher = Launcher.PLAIN,
    env: Mapping[str, str] | None = None,
    deadline_s: float | None = None,
    settle_s: float = 5.0,
    prefix: bool = False,
    logs: Path | None = None,
    on_interrupt: int = signal.SIGTERM,
) -> int:
    """Run ``argv`` once per rank of the lab's topology, wait for all of them as `run_crew` does, and return its code.

    Every rank gets the environment of this process, then RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT, DETCOLL_TOPOLOGY, DETCOLL_RENDEZVOUS, DETCOLL_SITE, DETCOLL_INSECURE, GLOO_SOCKET_IFNAME and
    TORCH_CPP_LOG_LEVEL, then ``env``.

    Parameters
    ----------
    lab : Lab
        Where to run.
    argv : sequence of str
        Program and arguments.
    launcher : Launcher
        Who starts the ranks.
    env : mapping, optional
        Variables for every rank, over all others.
    prefix : bool
        Put ``[rank]`` in front of every line, but for rank 0's.
    logs, deadline_s, settle_s, on_interrupt
        As for `run_crew`; under ``mpiexec`` there is one process, the launcher.

    Raises
    ------
    UsageError
        If the program cannot be started.
    TransportUnavailable
        If the mpiexec of MPICH or Open MPI is needed and missing.
    DetcollError
        If the lab's router died; the ranks are ended.

    Guarantees
    ----------
    No rank outlives the call, however it ends, nor does what MPICH's ranks keep in /dev/shm.
    """
    if not argv:
        raise UsageError("argv is empty; expected a program and its arguments")
    with ExitStack() as stack:
        topology_path = stack.enter_context(_memory_path(lab.topology.to_toml().encode()))
        ranks = [own | dict(env or {}) for own in rank_environments(lab, topology_path)]
        jobs = [(lab.topology.site_of(rank), list(argv), os.environ | own) for rank, own in enumerate(ranks)]
        tags = ["" if rank == 0 else f"[{rank}] " for rank in range(len(ranks))] if prefix else None
        if launcher is Launcher.MPIEXEC:
            jobs, tags = [_mpiexec_job(stack, lab, ranks, argv, env or {}, prefix)], None
        return run_crew(
            [partial(_start, lab, *job) for job in jobs],
            tags=tags, logs=logs, deadline_s=deadline_s, settle_s=settle_s, on_interrupt=on_interrupt,
            essential={lab.router_pid: "the lab's router has ended; the ranks are ended too"},
        )  # fmt: skip


def _start(lab: Lab, site: int, argv: list[str], env: dict[str, str], outputs: Outputs) -> subprocess.Popen[bytes]:
    try:
        return lab.popen(
            site, argv, {**env, **outputs.variables}, stdin=subprocess.DEVNULL, stdout=outputs.stdout,
            stderr=outputs.stderr, pass_fds=outputs.inherited,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"{argv[0]!r} cannot be started: {error.strerror}") from error


def rank_environments(lab: Lab, topology_path: str) -> list[dict[str, str]]:
    """Return, in rank order, the variables that tell each rank who and where it is."""
    topology = lab.topology
    environments = []
    for rank in range(topology.size):
        site = topology.sites[topology.site_of(rank)]
        numbers = rank_numbers(rank, topology.size, site.ranks.index(rank), len(site.ranks), prefixes=("",))
        environments.append(numbers | {
            "MASTER_ADDR": lab.address(0),
            "MASTER_PORT": str(MASTER_PORT),
            "DETCOLL_TOPOLOGY": topology_path,
            "DETCOLL_RENDEZVOUS": f"{lab.address(0)}:{RENDEZVOUS_PORT}",
            "DETCOLL_SITE": site.name,
            "DETCOLL_INSECURE": "lab",
            "GLOO_SOCKET_IFNAME": DEVICE,
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # no names are known in a lab
        })  # fmt: skip
    return environments


@contextmanager
def _memory_path(content: bytes) -> Iterator[str]:
    """Give a path under which other processes of this user read ``content``."""
    descriptor = os.memfd_create("detcoll-lab")
    with open(descriptor, "wb", buffering=0) as file:
        file.write(content)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"


def _placement(lab: Lab, ranks: list[dict[str, str]], rank_variable: str) -> bytes:
    """Return what `detcoll.emulation.lab.enter` needs to bring each rank to its site."""
    topology = lab.topology
    placement = {
        "rank_variable": rank_variable,
        "namespaces": [lab.namespace_paths(site) for site in range(len(topology.sites))],
        "ranks": [{"site": topology.site_of(rank), "environment": own} for rank, own in enumerate(ranks)],
    }
    return json.dumps(placement).encode()


def _mpiexec_job(
    stack: ExitStack, lab: Lab, ranks: list[dict[str, str]], argv: Sequence[str], env: Mapping[str, str], prefix: bool
) -> tuple[int, list[str], dict[str, str]]:
    """Return where, how and with what environment to start MPI's launcher; ``stack`` removes what it leaves."""
    mpiexec = _mpiexec()
    stack.callback(remove_segments, now_ns())  # of ranks that are ended early; after those are
    placement_path = stack.enter_context(_memory_path(_placement(lab, ranks, mpiexec.rank_variable)))
    files = mpiexec.files_in(stack.enter_context(TemporaryDirectory(prefix="detcoll-mpi-")))
    wrapper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("enter.py")), placement_path, "--"]
    variables = os.environ | mpiexec.environment | mpiexec.without_shared_memory(DEVICE) | files | dict(env)
    return 0, [*mpiexec.command(lab.topology.size, labelled=prefix), *wrapper, *argv], variables


def _mpiexec() -> Mpiexec:
    """Return an MPI launcher that can be kept from shared memory."""
    found = find_mpiexec()
    if found is None:
        raise TransportUnavailable(f"mpiexec is missing; install MPICH with: {install_command('mpi')}")
    if found.family is Family.OTHER:
        raise TransportUnavailable(
            f"{found.path} is {found.family.value}; install one of them, such as with: {install_command('mpi')}"
        )
    return found
