"""Finds the job's ranks in the MPI world and opens endpoints among them."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from detcoll.errors import ConnectError, TransportUnavailable, UsageError
from detcoll.installation import install_command
from detcoll.transport import Capabilities, Clock, Rendezvous, Scope, Transport
from detcoll.types import DTYPES, ReduceOp
from detcoll_mpi.endpoint import MpiEndpoint
from detcoll_mpi.mail import HEADER
from detcoll_mpi.waiting import Backoff

OPEN_TIMEOUT_NS = 60 * 10**9
COMMUNICATORS = 3
"""For messages, for collectives, and for what collectives compare."""

_JOB_VARIABLES = ("PMIX_NAMESPACE", "PMI_JOBID", "SLURM_JOB_ID")

_starting = threading.Lock()


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of the transport."""

    abort_job: bool = False
    open_timeout_ns: int = OPEN_TIMEOUT_NS


class _Seat(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells the others about its place in MPI; ``trouble`` says why it has none."""

    world_rank: int = -1
    world_size: int = 0
    job: str = ""
    trouble: str = ""


class MpiTransport(Transport):
    """MPI's messages and collectives; see the package's text."""

    name = "mpi"
    capabilities = Capabilities(
        scope=Scope.ANYWHERE,
        native=frozenset(
            {
                "all_reduce",
                "broadcast",
                "barrier",
                "reduce",
                "all_gather",
                "reduce_scatter",
                "gather",
                "scatter",
                "all_to_all",
            }
        ),
        native_uneven=frozenset({"all_gather", "reduce_scatter", "gather", "scatter"}),
        native_groups=True,
        native_dtypes=frozenset(DTYPES),
        native_ops=frozenset(ReduceOp),
        frame_bytes=HEADER.size,
    )

    def open(
        self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]
    ) -> MpiEndpoint:
        """Open this rank's endpoint in the MPI world that its launcher made.

        Raises
        ------
        UsageError
            If an option is unknown or of the wrong type.
        TransportUnavailable
            On all ranks, if one of them lacks mpi4py or was not started by the MPI launcher of the others.
        ConnectError
            If not all ranks come before ``open_timeout_ns`` have passed.
        """
        settings = _settings(options)
        deadline_ns = clock.now_ns() + settings.open_timeout_ns
        mpi, trouble = _load()
        _check_troubles([text.decode() for text in rendezvous.exchange("mpi4py", trouble.encode(), deadline_ns)])
        _start(mpi)
        answers = rendezvous.exchange("mpi", msgspec.msgpack.encode(_take_seat(mpi)), deadline_ns)
        seats = [msgspec.msgpack.decode(answer, type=_Seat) for answer in answers]
        _check_seats(seats, size)
        comms = _make_communicators(mpi, [seat.world_rank for seat in seats], clock, deadline_ns)
        return MpiEndpoint(mpi, comms, rank, size, clock, self.capabilities, settings.abort_job)


def _settings(options: Mapping[str, Any]) -> Settings:
    unknown = sorted(set(options) - {"abort_job", "open_timeout_ns"})
    if unknown:
        raise UsageError(f"options of transport 'mpi' has unknown keys {', '.join(unknown)}")
    settings = Settings(**options)
    if not isinstance(settings.abort_job, bool):
        raise UsageError(f"abort_job={settings.abort_job!r} must be True or False")
    if isinstance(settings.open_timeout_ns, bool) or not isinstance(settings.open_timeout_ns, int):
        raise UsageError(f"open_timeout_ns={settings.open_timeout_ns!r} must be a whole number of nanoseconds")
    return settings


def _load() -> tuple[Any, str]:
    """Return mpi4py's MPI module, without starting MPI, or why there is none."""
    try:
        if "mpi4py.MPI" not in sys.modules:
            settings = importlib.import_module("mpi4py").rc
            settings.initialize, settings.finalize = False, True
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError where it finds no MPI library
        return None, f"mpi4py does not load ({error}); install it with: {install_command('mpi')}"
    return mpi, "MPI was finalized" if mpi.Is_finalized() else ""


def _start(mpi: Any) -> None:
    """Start MPI. Waits until all ranks have come, with the interpreter's lock in its hands, so all must be sure to."""
    with _starting:
        if not mpi.Is_initialized():
            mpi.Init_thread()


def _check_troubles(troubles: list[str]) -> None:
    for rank, trouble in enumerate(troubles):
        if trouble:
            raise TransportUnavailable(f"transport 'mpi' cannot be used: on rank {rank}, {trouble}")


def _take_seat(mpi: Any) -> _Seat:
    """Return this process's place in MPI, or why it has none."""
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        return _Seat(trouble="MPI runs without MPI_THREAD_MULTIPLE, which mpi4py asks for by default")
    job = next((os.environ[name] for name in _JOB_VARIABLES if name in os.environ), "")
    return _Seat(mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size(), job)


def _check_seats(seats: list[_Seat], size: int) -> None:
    """Refuse a job whose ranks are not distinct processes of one MPI world."""
    _check_troubles([seat.trouble for seat in seats])
    sizes = {seat.world_size for seat in seats}
    distinct = {seat.world_rank for seat in seats}
    if len(sizes) > 1 or len(distinct) < size or len({seat.job for seat in seats}) > 1:
        raise TransportUnavailable(
            f"transport 'mpi' cannot be used: the {size} ranks of the job are not in one MPI world (their worlds have "
            f"{sorted(sizes)} ranks); start them all with one launcher: mpiexec -n {size} python ..."
        )


def _make_communicators(mpi: Any, world_ranks: list[int], clock: Clock, deadline_ns: int) -> list[Any]:
    """Return `COMMUNICATORS` communicators in the job's order of ranks.

    All ranks are known to be here, so that making the first one, which MPI offers without a deadline only, does not
    wait for one that never comes.
    """
    members = mpi.COMM_WORLD.Get_group().Incl(world_ranks)
    first = mpi.COMM_WORLD.Create_group(members, 0)
    members.Free()
    comms = [first]
    while len(comms) < COMMUNICATORS:
        comm, request = first.Idup()
        backoff = Backoff(clock, deadline_ns)
        while not request.Test():
            if not backoff.pause():
                raise ConnectError("MPI did not set up its communicators before the deadline")
        comms.append(comm)
    return comms
