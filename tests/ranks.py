"""Worlds of ranks for tests: as threads of this process, which is quick, or as processes under ``detcoll run``."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import Ended, environment

from detcoll.communicator import Communicator, open_communicator
from detcoll.launch.environment import rank_environments
from detcoll.launch.leftovers import now_ns, remove_segments
from detcoll.topology import Topology

PROGRAMS = Path(__file__).parent / "programs"
TIMEOUT_S = 20.0
"""Deadline of what should succeed; nothing waits for it to pass."""

FAST = 100e6
"""Bytes per second of the lines in test topologies: fast enough to be done soon, slow enough to use many windows."""


def lines(*ranks_of_sites: int, rate_bytes_per_s: float = FAST, one_way_ns: int = 1_000_000) -> Topology:
    """Return a wide-area topology with so many ranks in each site."""
    text = "".join(
        f'[[site]]\nname = "s{index}"\nranks = {ranks}\nuplink = "{rate_bytes_per_s:.0f} B/s"\n'
        for index, ranks in enumerate(ranks_of_sites)
    )
    for low in range(len(ranks_of_sites)):
        for high in range(low + 1, len(ranks_of_sites)):
            text += f'[[link]]\nbetween = ["s{low}", "s{high}"]\none_way = "{one_way_ns} ns"\n'
    return Topology.parse(text)


def grouped(*ranks_of_sites: int) -> Topology:
    """Return the same grouping with no lines between."""
    return lines(*ranks_of_sites).as_single_cluster()


def attempt(
    size: int,
    function: Callable[[Communicator], Any],
    *,
    transport: str | Sequence[str] = "auto",
    topology: Topology | Sequence[Topology | None] | None = None,
    timeout: float = TIMEOUT_S,
    patience: float | None = None,
    environ: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    reproducible: bool | None = None,
    absent: Sequence[int] = (),
    stay: bool = False,
) -> list[Any]:
    """Run ``function(communicator)`` on ``size`` ranks, each a thread; return its answers or what was raised.

    Sequences give each rank its own setting. Ranks that are ``absent`` never come; their answer is None. ``patience``
    is the deadline of collectives in seconds, where that of assembling should be longer. Ranks that ``stay`` leave
    after all have their answers, so that each fails for its own reason and none hears of it from another.
    """
    answers: list[Any] = [None] * size
    answered = threading.Barrier(size - len(absent))

    def mine(setting: Any, rank: int) -> Any:
        return setting[rank] if isinstance(setting, list | tuple) else setting

    def run_rank(rank: int, environment: Mapping[str, str]) -> None:
        given = {**environment, **(mine(environ, rank) or {})}
        try:
            communicator = open_communicator(given, mine(transport, rank), mine(topology, rank), timeout, reproducible)
            if patience is not None:
                give_up_after(communicator, patience)
            with communicator:
                try:
                    answers[rank] = function(communicator)
                finally:
                    if stay:
                        answered.wait(TIMEOUT_S)
        except BaseException as error:  # pytest's own is no Exception
            answers[rank] = error

    listener = socket.create_server(("127.0.0.1", 0))
    threads = [
        threading.Thread(target=run_rank, args=(rank, environment), name=f"test rank {rank}", daemon=True)
        for rank, environment in enumerate(rank_environments(size, {}, listener))
        if rank not in absent
    ]
    listener.detach()  # rank 0 adopts it
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT_S)
        assert not thread.is_alive(), f"{thread.name} hangs"
    return answers


def give_up_after(communicator: Communicator, seconds: float) -> None:
    """Shorten the deadline of later collectives, for those that must fail; what should succeed comes before."""
    communicator.timeout = seconds


def run_ranks(size: int, function: Callable[[Communicator], Any], **settings: Any) -> list[Any]:
    """Do as `attempt`; raise what a rank raised."""
    answers = attempt(size, function, **settings)
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    if errors:
        raise BaseExceptionGroup("ranks failed", errors)
    return answers


def written(topology: Topology, folder: Path) -> str:
    """Write a topology into a folder, and return the path of the file."""
    path = folder / "topology.toml"
    path.write_text(topology.to_toml())
    return str(path)


def launch(
    size: int,
    program: str,
    *arguments: object,
    options: Sequence[str] = (),
    topology: Topology | None = None,
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
    launcher: Sequence[str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 90.0,
) -> Ended:
    """Run a program of the folder ``programs`` on ``size`` processes under ``detcoll run`` or another launcher.

    ``detcoll run`` is patient: where a rank fails, it leaves the others the time that a busy machine needs.
    """
    if launcher is None:
        interpreter: list[str] = []
        patient = str(PROGRAMS / "patient.py")
        launcher = [sys.executable, patient, "run", "-n", str(size), "--timeout", f"{timeout_s:.0f} s"]
    else:
        interpreter = [sys.executable]
    command = [*launcher, *options]
    given = environment(environ)
    if topology is not None:
        assert folder is not None
        given["DETCOLL_TOPOLOGY"] = written(topology, folder)
    since_ns = now_ns()
    done = subprocess.run(
        [*command, *interpreter, str(PROGRAMS / program), *map(str, arguments)],
        env=given, cwd=cwd, capture_output=True, text=True, timeout=timeout_s + 20, check=False,
    )  # fmt: skip
    remove_segments(since_ns)  # MPICH leaves its own where ranks are killed
    return Ended(done.returncode, done.stdout, done.stderr)


def options(**given: object) -> list[str]:
    """Return the options of a command line: a name with True stands alone, one with a list is repeated."""
    words: list[str] = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [option] if one is True else [option, str(one)]
    return words


def await_gone(pids: Sequence[int]) -> None:
    """Wait until none of the processes runs any more."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            assert waiting.poll(round(TIMEOUT_S * 1000)), f"process {pid} still runs"
        finally:
            os.close(handle)
