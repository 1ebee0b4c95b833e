"""``detcoll lab``: run a command once per rank in an emulated wide-area network."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from detcoll.errors import UsageError
from detcoll.lab import Conditions, Lab, Launcher, Output, run_ranks
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s, parse_size_bytes
from detcoll.topology import Topology


def lab(
    *command: str,
    sites: int | None = None,
    ranks_per_site: int | None = None,
    rate: str | None = None,
    round_trip: str | None = None,
    topology: Path | None = None,
    queue: str = "2.5MB",
    loss: float = 0.0,
    seed: int = 0,
    log: Path | None = None,
    mpi: bool = False,
    prefix: bool = False,
    slow_start_after_idle: bool = False,
    deadline: str | None = None,
) -> int:
    """Run COMMAND once per rank, each in the network of its site, and return the exit code of the first that failed.

    Sites reach each other over an emulated line only. Ranks get RANK, WORLD_SIZE, MASTER_ADDR and the other variables
    of a launcher. Needs Linux and root.

    Parameters
    ----------
    command : str
        Program and arguments, after ``--``.
    sites : int
        Number of sites (default 2).
    ranks_per_site : int
        Ranks in each site (default 1).
    rate : str
        What each site's uplink and downlink carry, such as "1 Gbit/s" (the default). Headers count.
    round_trip : str
        Round-trip time between any two sites, such as "20 ms" (the default).
    topology : Path
        Topology file, instead of sites, ranks per site, rate and round trip.
    queue : str
        Drop-tail queue of each line.
    loss : float
        Probability with which a segment is lost.
    seed : int
        Of the random losses.
    log : Path
        File for the router's arrival log (.npy).
    mpi : bool
        Start the ranks through MPICH's mpiexec, for MPI programs.
    prefix : bool
        Put "[rank]" in front of every line that ranks other than 0 print.
    slow_start_after_idle : bool
        Leave TCP's slow start after idle phases on, as it is by default.
    deadline : str
        End the ranks after this time, such as "10 min"; the exit code is then 124.
    """
    if not command:
        raise UsageError("COMMAND is missing; expected detcoll lab [OPTIONS] -- COMMAND [ARGUMENTS]")
    wanted = _topology(topology, sites, ranks_per_site, rate, round_trip)
    patience_ns = None if deadline is None else parse_duration_ns(deadline, "deadline")
    queue_bytes = parse_size_bytes(queue, "queue")
    with (
        _terminable(),
        Lab(
            wanted, Conditions(queue_bytes, loss, seed=seed), log_path=log,
            slow_start_after_idle=slow_start_after_idle,
        ) as network,
    ):  # fmt: skip
        result = run_ranks(
            network,
            command,
            launcher=Launcher.MPIEXEC if mpi else Launcher.PLAIN,
            deadline_ns=None if patience_ns is None else time.monotonic_ns() + patience_ns,
            output=Output.PREFIX if prefix else Output.RAW,
        )
    return result.exit_code if result.exit_code >= 0 else 128 - result.exit_code


def _topology(
    file: Path | None, sites: int | None, ranks_per_site: int | None, rate: str | None, round_trip: str | None
) -> Topology:
    """Return the topology of the file, or the uniform one that the other options describe."""
    if file is not None:
        given = {"sites": sites, "ranks-per-site": ranks_per_site, "rate": rate, "round-trip": round_trip}
        if clashing := [f"--{name}" for name, value in given.items() if value is not None]:
            raise UsageError(f"--topology cannot be combined with {', '.join(clashing)}")
        return Topology.from_file(file)
    return Topology.uniform(
        2 if sites is None else sites,
        1 if ranks_per_site is None else ranks_per_site,
        parse_rate_bytes_per_s(rate or "1 Gbit/s"),
        parse_duration_ns(round_trip or "20 ms", "round-trip") // 2,
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exit that closes what is open."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    wanted = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
