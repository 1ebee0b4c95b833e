"""Read from the environment which rank this process is, for several launchers.

A table lists the variables of each launcher; `read_environment` uses the first row that applies. The order matters,
because launchers nest: ranks of an ``mpirun`` inside a Slurm allocation have the variables of both, and those of Slurm
describe the step that started MPI's daemons.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from detcoll.errors import UsageError
from detcoll.topology import LARGEST_WORLD

Meeting = Literal["alone", "address", "store", "mpi"]
"""How ranks find the rendezvous: not needed, at a known address, through torchrun's store, or through MPI."""

_FIRST_SLURM_SPECIAL_STEP = 0xFFFFFFF0
"""Step numbers from here on are special steps without ranks, such as the batch script and the interactive shell."""

_FIRST_PORT, _PORTS = 10_000, 22_000
"""Range of ports derived from a job id: below Linux's ephemeral range, which starts at 32768."""


@dataclass(frozen=True, slots=True)
class World:
    """Rank, world size and rendezvous of this process, as set by its launcher.

    ``local_rank`` and ``local_size`` count the ranks on this host; None if the launcher does not set them.
    ``rendezvous`` : ``host:port`` of the rendezvous or, with ``meeting == "store"``, of torchrun's store.
    ``job`` : equal on all ranks of a job; differs between jobs if the launcher sets a job id, else empty.
    ``site`` : the value of DETCOLL_SITE, or None.
    """

    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    launcher: str
    meeting: Meeting
    rendezvous: str | None = None
    job: str = ""
    site: str | None = None


@dataclass(frozen=True, slots=True)
class _Launcher:
    """The variables of one launcher. If a value has several names, the first that is set is used."""

    name: str
    applies: Callable[[Mapping[str, str]], bool]
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: Callable[[Mapping[str, str]], int | None]
    meeting: Meeting
    job: tuple[str, ...] = ()


def read_environment(environ: Mapping[str, str]) -> World:
    """Return the rank and world of this process from the variables that its launcher set.

    Recognised, in this order: ``detcoll run``, torchrun, Open MPI's mpirun, mpiexec of MPICH and Intel MPI, srun, and
    plain RANK and WORLD_SIZE. Without any of them the world has one rank.

    Raises
    ------
    UsageError
        If a variable that the launcher should have set is missing or has an invalid value, or if Slurm has several
        tasks and does not say which of them this process is.
    """
    site = environ.get("DETCOLL_SITE") or None
    launcher = next((row for row in _LAUNCHERS if row.applies(environ)), None)
    if launcher is None:
        _refuse_slurm_without_task(environ)
        return World(0, 1, 0, 1, "none", "alone", site=site)
    size = _number(environ, launcher.size, 1, LARGEST_WORLD)
    rank = _number(environ, launcher.rank, 0, size - 1)
    has_local = any(environ.get(name) for name in launcher.local_rank)
    local_rank = _number(environ, launcher.local_rank, 0, size - 1) if has_local else None
    local_size = launcher.local_size(environ)
    explicit = environ.get("DETCOLL_RENDEZVOUS") or None
    return World(
        rank,
        size,
        local_rank,
        local_size,
        launcher.name,
        "alone" if size == 1 else "address" if explicit else _meeting(environ, launcher),
        explicit or _rendezvous(environ, launcher, is_local=local_size == size),
        ".".join(environ[name] for name in launcher.job if environ.get(name)),
        site,
    )


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list such as ``"gpu[03-07,11],login1"``.

    Raises
    ------
    UsageError
        If the list has another format.
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list)
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""
    if not re.fullmatch(r"[\w.-]+", host):
        raise UsageError(f"SLURM_STEP_NODELIST={node_list!r} is not a list of hosts such as 'gpu[03-07,11]'")
    return host


def derived_port(job: str) -> int:
    """Return the port that all ranks of ``job`` derive from its id, without communication."""
    return _FIRST_PORT + int.from_bytes(hashlib.blake2b(job.encode(), digest_size=8).digest(), "big") % _PORTS


def _number(environ: Mapping[str, str], names: tuple[str, ...], low: int, high: int) -> int:
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        raise UsageError(f"{' or '.join(names)} is not set, although other variables of the same launcher are")
    value = environ[name]
    if not (re.fullmatch(r"[0-9]{1,9}", value) and low <= int(value) <= high):
        raise UsageError(f"{name}={value!r} must be a whole number from {low} to {high}")
    return int(value)


def _meeting(environ: Mapping[str, str], launcher: _Launcher) -> Meeting:
    # If torchrun's agent does not run the store, rank 0 is expected to listen on MASTER_PORT.
    if launcher.meeting == "store" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return "address"
    return launcher.meeting


def _rendezvous(environ: Mapping[str, str], launcher: _Launcher, *, is_local: bool) -> str | None:
    if launcher.name == "srun":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
        host = "127.0.0.1" if is_local else first_host(nodes)
        return f"{host}:{derived_port('.'.join(environ.get(name, '') for name in launcher.job))}"
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if launcher.meeting == "mpi" or not address or not port:
        return None
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _has(*names: str) -> Callable[[Mapping[str, str]], bool]:
    return lambda environ: any(environ.get(name) for name in names)


def _is_torchrun(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("TORCHELASTIC_RUN_ID") and environ.get("RANK"))


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    """Return whether this is a task of srun, not the batch script, which also has SLURM_PROCID=0."""
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    is_step = re.fullmatch(r"[0-9]{1,10}", step) is not None and int(step) < _FIRST_SLURM_SPECIAL_STEP
    return is_step and bool(environ.get("SLURM_PROCID"))


def _refuse_slurm_without_task(environ: Mapping[str, str]) -> None:
    """Raise in a Slurm job of several tasks whose variables do not tell a task of srun from the batch script.

    The script has SLURM_PROCID=0, and so has the first task in a container that was not given the number of the step.
    """
    rank, tasks = environ.get("SLURM_PROCID", ""), environ.get("SLURM_NTASKS", "")
    if rank and tasks.isdecimal() and int(tasks) > 1:
        raise UsageError(
            f"SLURM_PROCID={rank} of SLURM_NTASKS={tasks}, but no SLURM_STEP_ID of a task: start the ranks with srun; "
            "in a container, pass SLURM_STEP_ID on as well; for a single rank use detcoll run -n 1"
        )


def _is_hydra(environ: Mapping[str, str]) -> bool:
    """Return whether this is a rank of mpiexec, not of ``srun --mpi=pmi2``, which sets PMI_RANK but no local rank."""
    return bool(environ.get("PMI_RANK")) and (bool(environ.get("MPI_LOCALRANKID")) or not _is_slurm_step(environ))


def _variable(name: str) -> Callable[[Mapping[str, str]], int | None]:
    return lambda environ: _number(environ, (name,), 1, LARGEST_WORLD) if environ.get(name) else None


def _slurm_local_size(environ: Mapping[str, str]) -> int | None:
    """Return the number of tasks on this node from a list such as ``"4(x2),3"``, None if it cannot be read."""
    text, node = environ.get("SLURM_STEP_TASKS_PER_NODE", ""), environ.get("SLURM_NODEID", "")
    counts: list[int] = []
    for part in text.split(","):
        shape = re.fullmatch(r"(\d{1,5})(?:\(x(\d{1,5})\))?", part)
        if shape is None:
            return None
        counts += [int(shape[1])] * int(shape[2] or 1)
    return counts[int(node)] if re.fullmatch(r"[0-9]{1,5}", node) and int(node) < len(counts) else None


_LAUNCHERS = (
    _Launcher(
        "detcoll run",
        _has("DETCOLL_RANK"),
        ("DETCOLL_RANK",),
        ("DETCOLL_WORLD_SIZE",),
        ("DETCOLL_LOCAL_RANK",),
        _variable("DETCOLL_LOCAL_WORLD_SIZE"),
        "address",
        ("DETCOLL_JOB",),
    ),
    _Launcher(
        "torchrun",
        _is_torchrun,
        ("RANK",),
        ("WORLD_SIZE",),
        ("LOCAL_RANK",),
        _variable("LOCAL_WORLD_SIZE"),
        "store",
        ("TORCHELASTIC_RUN_ID",),  # agents count restarts differently
    ),
    _Launcher(
        "openmpi",
        _has("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "PMIX_RANK"),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        _variable("OMPI_COMM_WORLD_LOCAL_SIZE"),
        "mpi",
        ("PMIX_NAMESPACE",),
    ),
    _Launcher(
        "mpich",
        _is_hydra,
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID",),
        _variable("MPI_LOCALNRANKS"),
        "mpi",
    ),
    _Launcher(
        "srun",
        _is_slurm_step,
        ("SLURM_PROCID",),
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_LOCALID",),
        _slurm_local_size,
        "address",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    _Launcher(
        "environment",
        _has("RANK"),
        ("RANK",),
        ("WORLD_SIZE",),
        ("LOCAL_RANK",),
        _variable("LOCAL_WORLD_SIZE"),
        "address",
        ("DETCOLL_JOB",),
    ),
)
