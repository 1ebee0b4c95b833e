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
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from detcoll.emulation.lab.emulation import Lab
from detcoll.emulation.lab.tun import DEVICE
from detcoll.errors import DetcollError, TransportUnavailable, UsageError
from detcoll.launch.leftovers import now_ns, remove_segments
from detcoll.launch.mpiexec import Family, Mpiexec, find_mpiexec

MASTER_PORT = 29500
RENDEZVOUS_PORT = 29400
DEADLINE_EXIT_CODE = 124
"""The exit code of a run that missed its deadline, as with timeout(1)."""

_TERMINATE_NS = 2 * 10**9
_DRAIN_NS = 10**9
_LARGEST_CAPTURE_BYTES = 64 * 2**20
_LONGEST_LINE_BYTES = 2**20


class Launcher(Enum):
    """Who starts the ranks."""

    PLAIN = "plain"
    MPIEXEC = "mpiexec"


class Output(Enum):
    """What becomes of the ranks' standard output and error.

    ``RAW``: they share those of this process.  ``PREFIX``: line by line, with ``[rank]`` in front of all but rank 0's.
    ``CAPTURE``: the output is kept, and errors are shared.
    """

    RAW = "raw"
    PREFIX = "prefix"
    CAPTURE = "capture"


@dataclass(frozen=True, slots=True)
class RanksResult:
    """How a run ended.

    ``exit_codes`` in rank order, negative for a signal; under ``mpiexec`` there is one, the launcher's. ``exit_code``
    is that of the rank which failed first, 0 if none did, and 124 if the deadline passed. ``outputs`` are the captured
    outputs (the last 64 MiB of each), in the same order as the exit codes.
    """

    exit_codes: tuple[int, ...]
    exit_code: int
    deadline_missed: bool
    outputs: tuple[bytes, ...] = ()


def run_ranks(
    lab: Lab,
    argv: Sequence[str],
    *,
    launcher: Launcher = Launcher.PLAIN,
    env: Mapping[str, str] | None = None,
    deadline_ns: int | None = None,
    grace_ns: int = 5 * 10**9,
    output: Output = Output.RAW,
) -> RanksResult:
    """Run ``argv`` once per rank of the lab's topology and wait for all of them.

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
    deadline_ns : int, optional
        Monotonic time at which ranks that still run are ended.
    grace_ns : int
        How long the others may go on once a rank has failed.
    output : Output
        What becomes of what they print.

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
        if launcher is Launcher.MPIEXEC:
            mpiexec = _mpiexec()
            stack.callback(remove_segments, now_ns())  # of ranks that are ended early; after those are
            placement_path = stack.enter_context(_memory_path(_placement(lab, ranks, mpiexec.rank_variable)))
            files = mpiexec.files_in(stack.enter_context(TemporaryDirectory(prefix="detcoll-mpi-")))
            own_env = files | dict(env or {})
            jobs = [_mpiexec_job(mpiexec, lab.topology.size, argv, placement_path, own_env, output)]
        else:
            jobs = [(lab.topology.site_of(rank), list(argv), os.environ | own) for rank, own in enumerate(ranks)]
        run = _Run(lab, output, grace_ns, deadline_ns)
        stack.callback(run.close)
        run.start(jobs)
        return run.wait()


def rank_environments(lab: Lab, topology_path: str) -> list[dict[str, str]]:
    """Return, in rank order, the variables that tell each rank who and where it is."""
    topology = lab.topology
    environments = []
    for rank in range(topology.size):
        site = topology.sites[topology.site_of(rank)]
        environments.append({
            "RANK": str(rank),
            "WORLD_SIZE": str(topology.size),
            "LOCAL_RANK": str(site.ranks.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(site.ranks)),
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
    mpiexec: Mpiexec, size: int, argv: Sequence[str], placement_path: str, env: Mapping[str, str], output: Output
) -> tuple[int, list[str], dict[str, str]]:
    """Return where, how and with what environment to start MPI's launcher."""
    wrapper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("enter.py")), placement_path, "--"]
    variables = os.environ | mpiexec.environment | mpiexec.without_shared_memory(DEVICE) | dict(env)
    return 0, [*mpiexec.command(size, labelled=output is Output.PREFIX), *wrapper, *argv], variables


def _mpiexec() -> Mpiexec:
    """Return an MPI launcher that can be kept from shared memory."""
    found = find_mpiexec()
    if found is None:
        raise TransportUnavailable("mpiexec is missing; install MPICH with: pip install 'detcoll[mpi]'")
    if found.family is Family.OTHER:
        raise TransportUnavailable(
            f"{found.path} is {found.family.value}; install one of them, such as with: pip install 'detcoll[mpi]'"
        )
    return found


class _Stream:
    """One output of one rank: kept, or passed on line by line with a prefix."""

    def __init__(self, source: IO[bytes], sink: IO[str] | None, prefix: str) -> None:
        self.source = source
        self.kept = bytearray()
        self._sink = sink
        self._prefix = prefix

    def read(self) -> bool:
        """Take what is there; False at the end."""
        piece = os.read(self.source.fileno(), 65536)
        self.kept += piece
        if self._sink is None:
            del self.kept[:-_LARGEST_CAPTURE_BYTES]
        else:
            whole = not piece or len(self.kept) > _LONGEST_LINE_BYTES
            end = len(self.kept) if whole else self.kept.rfind(b"\n") + 1
            self._pass_on(bytes(self.kept[:end]))
            del self.kept[:end]
        return bool(piece)

    def _pass_on(self, text: bytes) -> None:
        if text and self._sink is not None:
            lines = text.decode(errors="replace").splitlines(keepends=True)
            self._sink.write("".join(self._prefix + line for line in lines))
            self._sink.flush()


class _Run:
    """The processes of one run and their outputs."""

    def __init__(self, lab: Lab, output: Output, grace_ns: int, deadline_ns: int | None) -> None:
        self._lab = lab
        self._output = output
        self._grace_ns = grace_ns
        self._deadline_ns = deadline_ns
        self._selector = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._running: set[int] = set()
        self._streams: list[_Stream] = []
        self._captured: list[_Stream] = []
        self._first_failure: int | None = None
        self._deadline_missed = False
        self._watch(os.pidfd_open(lab.router_pid), None)

    def start(self, jobs: Sequence[tuple[int, list[str], dict[str, str]]]) -> None:
        """Start one process per job: its site, arguments and environment."""
        piped = {Output.RAW: (None, None), Output.PREFIX: (subprocess.PIPE,) * 2,
                 Output.CAPTURE: (subprocess.PIPE, None)}[self._output]  # fmt: skip
        for index, (site, argv, env) in enumerate(jobs):
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": piped[0], "stderr": piped[1]}
            try:
                process = self._lab.popen(site, argv, env, bufsize=0, **options)
            except OSError as error:
                raise UsageError(f"{argv[0]!r} cannot be started: {error.strerror}") from error
            self._processes.append(process)
            self._running.add(index)
            self._watch(os.pidfd_open(process.pid), index)
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                if source is not None:
                    self._follow(source, sink, "" if index == 0 else f"[{index}] ")

    def _watch(self, handle: int, index: int | None) -> None:
        self._selector.register(handle, selectors.EVENT_READ, index)

    def _follow(self, source: IO[bytes], sink: IO[str], prefix: str) -> None:
        stream = _Stream(source, None if self._output is Output.CAPTURE else sink, prefix)
        self._streams.append(stream)
        if self._output is Output.CAPTURE:
            self._captured.append(stream)
        self._selector.register(source, selectors.EVENT_READ, stream)

    def wait(self) -> RanksResult:
        """Wait for all processes, ending them where they failed or are late, and tell how it went."""
        while self._running:
            left_ns = None if self._deadline_ns is None else self._deadline_ns - time.monotonic_ns()
            if left_ns is not None and left_ns <= 0:
                self._deadline_missed = self._first_failure is None
                self._end()
                break
            self._turn(left_ns)
        drained_ns = time.monotonic_ns() + _DRAIN_NS
        while self._streams and (left_ns := drained_ns - time.monotonic_ns()) > 0:
            self._turn(left_ns)
        codes = tuple(-signal.SIGKILL if (code := process.poll()) is None else code for process in self._processes)
        code = DEADLINE_EXIT_CODE if self._deadline_missed else self._first_failure or 0
        return RanksResult(codes, code, self._deadline_missed, tuple(bytes(s.kept) for s in self._captured))

    def _turn(self, patience_ns: int | None) -> None:
        """Wait for something to happen, and deal with it."""
        for key, _ in self._selector.select(None if patience_ns is None else patience_ns / 1e9):
            if isinstance(key.data, _Stream):
                if not key.data.read():
                    self._drop_stream(key.data)
            elif key.data is None:
                self._selector.unregister(key.fd)
                os.close(key.fd)
                raise DetcollError("the lab's router has ended; the ranks are ended too")
            else:
                self._ended(key.data, key.fd)

    def _drop_stream(self, stream: _Stream) -> None:
        self._selector.unregister(stream.source)
        self._streams.remove(stream)
        stream.source.close()

    def _ended(self, index: int, handle: int) -> None:
        """Note that a process has ended, and end what it left behind in its process group."""
        self._selector.unregister(handle)
        os.close(handle)
        process = self._processes[index]
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._running.discard(index)
        code = process.wait()
        if code != 0 and self._first_failure is None:
            self._first_failure = code
            patience_ns = time.monotonic_ns() + self._grace_ns
            self._deadline_ns = patience_ns if self._deadline_ns is None else min(self._deadline_ns, patience_ns)

    def _end(self) -> None:
        """End all that still run: SIGTERM, and a little later SIGKILL."""
        for wanted, patience_ns in ((signal.SIGTERM, _TERMINATE_NS), (signal.SIGKILL, _TERMINATE_NS)):
            for index in self._running:
                with suppress(ProcessLookupError):
                    os.killpg(self._processes[index].pid, wanted)
            until_ns = time.monotonic_ns() + patience_ns
            while self._running and (left_ns := until_ns - time.monotonic_ns()) > 0:
                with suppress(DetcollError):
                    self._turn(left_ns)

    def close(self) -> None:
        """End what still runs and let go of everything. Idempotent."""
        self._end()
        for stream in list(self._streams):
            self._drop_stream(stream)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fd)
            os.close(key.fd)
        self._selector.close()
