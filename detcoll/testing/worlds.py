"""Fabrics whose ranks are processes, so that a transport is tested as it is used.

A `World` starts n processes once, by a launcher such as mpiexec or one by one, and then takes orders: open an endpoint,
run a program, close. A `ProcessFabric` is one set of endpoints in such a world. Orders and answers travel over Unix
sockets in a private directory; a world that fails to answer in time is ended with all its processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from detcoll.launch.leftovers import now_ns, remove_segments
from detcoll.launch.mpiexec import find_mpiexec
from detcoll.testing.fabric import Fabric, Program

START_TIMEOUT_S = 60.0
ORDER_TIMEOUT_S = 60.0
ADDRESS_VARIABLE = "DETCOLL_TESTING_WORLD"
ORDER_VARIABLE = "DETCOLL_TESTING_ORDER"
"""Says which rank of the job the launcher's ranks are, such as ``2,0,1``; by default the same."""

MPI_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""Lets Open MPI run as root, as it must in a container; other launchers do not ask."""


def mpi_launcher() -> list[str] | None:
    """Return the launcher of the MPI beside this Python, or else on the path, for `Worlds`; None if there is none.

    Ranks may be more than there are cores.
    """
    found = find_mpiexec()
    return None if found is None else found.command("{n}")


class WorldError(RuntimeError):
    """A rank of a world failed; the text holds its traceback."""


class World:
    """Processes that run programs together.

    Parameters
    ----------
    size : int
        Number of ranks.
    launcher : Sequence of str
        Command that starts ``size`` copies of what follows it, such as ``("mpiexec", "-n", "4")``. Without it, the
        processes are started one by one.
    environment : Mapping
        What to add to the environment.

    Raises
    ------
    WorldError
        If not all ranks come.
    """

    def __init__(self, size: int, launcher: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self.size = size
        self.is_alive = True
        self._since_ns = now_ns()
        self._directory = tempfile.TemporaryDirectory(prefix="detcoll-world-")
        self._log = open(Path(self._directory.name) / "log", "w+b")  # noqa: SIM115 (closed in `end`)
        self._connections: dict[Connection, int] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start(list(launcher), dict(environment or {}))
        except BaseException:
            self.end()
            raise

    def order(self, what: str, *details: Any) -> list[Any]:
        """Give all ranks an order and return their answers, in rank order.

        Raises
        ------
        WorldError
            If a rank raised, or did not answer in time; in the latter case the world is ended.
        """
        for connection in self._connections:
            connection.send((what, *details))
        round_ = _Round(self._connections)
        deadline = time.monotonic() + ORDER_TIMEOUT_S
        while not round_.is_over:
            ready = wait(list(self._connections), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {round_.silent} gave no answer to {what!r} in {ORDER_TIMEOUT_S} s")
            for connection in [connection for connection in self._connections if connection in ready]:
                self._take(round_, connection)
        if round_.errors:
            raise WorldError("\n".join(round_.errors))
        return [round_.answers[rank] for rank in range(self.size)]

    def end(self) -> None:
        """End all processes and remove what they left."""
        self.is_alive = False
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()
        remove_segments(self._since_ns)
        self._log.close()
        self._directory.cleanup()

    def _start(self, launcher: list[str], environment: dict[str, str]) -> None:
        path = str(Path(self._directory.name) / "socket")
        worker = [sys.executable, "-m", "detcoll.testing.worker"]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(self.size)
            base = os.environ | {ADDRESS_VARIABLE: path, "OMP_NUM_THREADS": "1"} | environment
            mpiexec = find_mpiexec() if launcher else None
            base |= mpiexec.files_in(self._directory.name) if mpiexec else {}
            ranks = [None] if launcher else list(range(self.size))
            for rank in ranks:
                own = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": str(self.size)}
                self._processes.append(
                    subprocess.Popen(
                        launcher + worker,
                        stdin=subprocess.DEVNULL,
                        stdout=self._log,
                        stderr=self._log,
                        env=base | own,
                        start_new_session=True,
                    )
                )
            self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        listener.settimeout(0.1)
        while len(self._connections) < self.size:
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                    self._fail(f"{len(self._connections)} of {self.size} ranks came")
                continue
            accepted.setblocking(True)
            connection = Connection(accepted.detach())
            self._connections[connection] = connection.recv()

    def _take(self, round_: _Round, connection: Connection) -> None:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            self._fail(f"rank {self._connections[connection]} died")
        round_.take(connection, message)

    def _fail(self, text: str) -> None:
        self._log.flush()
        said = Path(self._log.name).read_text(encoding="utf-8", errors="replace")[-4000:]
        self.end()
        raise WorldError(f"{text}\n{said}")


class _Round:
    """One order under way: who answered, and who waits for the others in an exchange."""

    def __init__(self, connections: dict[Connection, int]) -> None:
        self._connections = connections
        self.answers: dict[int, Any] = {}
        self.errors: list[str] = []
        self._waiting: dict[str, dict[Connection, bytes]] = {}
        self._ended: set[int] = set()

    @property
    def is_over(self) -> bool:
        return len(self._ended) == len(self._connections)

    @property
    def silent(self) -> list[int]:
        return sorted(set(self._connections.values()) - self._ended)

    def take(self, connection: Connection, message: Any) -> None:
        kind, *details = message
        rank = self._connections[connection]
        if kind == "exchange":
            self._waiting.setdefault(details[0], {})[connection] = details[1]
        else:
            self._ended.add(rank)
            if kind == "error":
                self.errors.append(f"rank {rank}: {details[0]}")
            else:
                self.answers[rank] = details[0]
        self._release()

    def _release(self) -> None:
        """Answer those in a complete exchange, and those who wait for a rank that has ended its part."""
        for name, waiting in list(self._waiting.items()):
            if len(waiting) == len(self._connections):
                of_ranks = {self._connections[connection]: payload for connection, payload in waiting.items()}
                for connection in waiting:
                    connection.send([of_ranks[rank] for rank in sorted(of_ranks)])
            elif self._ended:
                for connection in waiting:
                    connection.send(None)
            else:
                continue
            del self._waiting[name]


class ProcessFabric(Fabric):
    """One endpoint in each process of a world.

    Parameters
    ----------
    world : World
        The processes; it stays when the fabric is left.
    transport : str
        Where to find the transport's class, as ``"module:name"``.
    options : Mapping
        Passed to `Transport.open` on every rank.
    """

    def __init__(self, world: World, transport: str, options: Mapping[str, Any] | None = None) -> None:
        self.size = world.size
        self._world = world
        self._transport = transport
        self._options = dict(options or {})

    def run(self, program: Program, **arguments: Any) -> list[Any]:
        """Run ``program`` in each process; see `Fabric.run`."""
        file = sys.modules[program.__module__].__file__
        return self._world.order("run", program.__module__, file, program.__qualname__, arguments)

    def __enter__(self) -> Self:
        """Open and connect an endpoint in each process."""
        self._world.order("open", self._transport, self._options, self.needed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the endpoints, or abort them if the body raised."""
        if self._world.is_alive:
            self._world.order("close" if kind is None else "abort")


class Worlds:
    """Worlds by size, started when first asked for and kept until `end`."""

    def __init__(self, launcher: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self._launcher = launcher
        self._environment = environment
        self._made: dict[int, World] = {}

    def of(self, size: int) -> World:
        """Return the living world of ``size`` ranks; in the launcher's command ``{n}`` stands for ``size``."""
        world = self._made.get(size)
        if world is None or not world.is_alive:
            launcher = [part.format(n=size) for part in self._launcher]
            world = self._made[size] = World(size, launcher, self._environment)
        return world

    def end(self) -> None:
        """End all of them."""
        for world in self._made.values():
            world.end()
        self._made.clear()
