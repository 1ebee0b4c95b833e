"""The relay as the ranks' launcher sees it: a process, its ports, and what to tell each rank."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import msgspec

from detcoll.emulation.relay.server import ASK_QUIT, ASK_STATISTICS, LOOPBACK, RelayConfig, RelayStatistics
from detcoll.errors import Closed, DetcollError, UsageError
from detcoll.topology import Topology

DEFAULT_BUFFER_BYTES = 2_500_000

_SERVER = "import sys; from detcoll.emulation.relay.server import main; sys.exit(main(sys.argv[1:]))"
_PATIENCE_S = 30.0
# Below the ports that systems give out by themselves (32768 on Linux, 49152 elsewhere), above those of services.
_LOWEST_PORT, _END_PORT = 10_000, 32_768
_ATTEMPTS = 50
# Others may take a port in between; each rank takes the next one then.
_SPARE_PORTS = 8


class Relay:
    """Lines of rate and delay between sites of ordinary processes; a context manager that is open from the start.

    Parameters
    ----------
    topology : Topology
        Two sites or more with uplinks, and the delays between them; nothing is reserved.
    buffer_bytes : int
        What may wait at each line before the relay reads no more.

    Raises
    ------
    UsageError
        If an argument cannot be used.
    DetcollError
        If the relay does not start.

    Guarantees
    ----------
    It listens on 127.0.0.1 alone and connects to the ranks' ports alone. When it is closed, or its process's parent
    ends in whatever way, the relay ends and every connection through it breaks.
    """

    def __init__(self, topology: Topology, buffer_bytes: int = DEFAULT_BUFFER_BYTES) -> None:
        _check(topology, buffer_bytes)
        self.topology = topology
        self._lock = threading.Lock()
        self._final: RelayStatistics | None = None
        self._closed = False
        self._ranges = _free_ranges([len(site.ranks) + _SPARE_PORTS for site in topology.sites])
        with ExitStack() as stack:
            folder = tempfile.mkdtemp(prefix="detcoll-relay-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._topology_path = Path(folder, "topology.toml")
            self._topology_path.write_text(topology.to_toml(), encoding="utf-8")
            self._control, theirs = socket.socketpair()
            stack.callback(self._control.close)
            self._control.settimeout(_PATIENCE_S)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _SERVER, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            stack.callback(self._stop)
            self._proxy_ports = self._configure(RelayConfig(topology, self._ranges, buffer_bytes, folder))
            self._resources = stack.pop_all()

    def _configure(self, config: RelayConfig) -> tuple[int, ...]:
        """Tell the relay what it is, and return where it takes connections from each site."""
        self._control.sendall(msgspec.json.encode(config) + b"\n")
        answer: list[int] | str = msgspec.json.decode(self._receive_line(), type=list[int] | str)
        if isinstance(answer, str):
            raise DetcollError(f"the relay does not start: {answer}")
        return tuple(answer)

    @property
    def pid(self) -> int:
        """The process id of the relay."""
        return self._process.pid

    def proxy(self, site: int) -> str:
        """Return host:port of the proxy for processes of site number ``site``."""
        return f"{LOOPBACK}:{self._proxy_ports[site]}"

    def ports(self, site: int) -> tuple[int, int]:
        """Return the first and the last port in which ranks of a site listen to be reached through the relay."""
        return self._ranges[site]

    def environments(self) -> list[dict[str, str]]:
        """Return, in rank order, what tells each rank where it is and how it reaches other sites."""
        environments = []
        for rank in range(self.topology.size):
            index = self.topology.site_of(rank)
            site = self.topology.sites[index]
            local, count = str(site.ranks.index(rank)), str(len(site.ranks))
            environments.append({
                "LOCAL_RANK": local,
                "LOCAL_WORLD_SIZE": count,
                "DETCOLL_LOCAL_RANK": local,
                "DETCOLL_LOCAL_WORLD_SIZE": count,
                "DETCOLL_TOPOLOGY": str(self._topology_path),
                "DETCOLL_SITE": site.name,
                "DETCOLL_PORTS": "{}-{}".format(*self._ranges[index]),
                "DETCOLL_PROXY": self.proxy(index),
                "DETCOLL_ADVERTISE": "",
                "DETCOLL_INTERFACE": "",
            })  # fmt: skip
        return environments

    def statistics(self) -> RelayStatistics:
        """Return what the relay counted so far, or until it was closed.

        Raises
        ------
        DetcollError
            If the relay has died.
        """
        with self._lock:
            if not self._closed:
                return self._ask(ASK_STATISTICS)
            if self._final is None:
                raise Closed("the relay is closed and died before")
            return self._final

    def close(self) -> None:
        """End the relay. Idempotent."""
        with self._lock:
            self._closed = True
            self._resources.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, request: bytes) -> RelayStatistics:
        try:
            self._control.sendall(request)
        except OSError as error:
            raise DetcollError(f"the relay has ended, exit code {self._process.poll()}") from error
        return msgspec.json.decode(self._receive_line(), type=RelayStatistics)

    def _receive_line(self) -> bytes:
        received = bytearray()
        while not received.endswith(b"\n"):
            try:
                piece = self._control.recv(1 << 16)
            except OSError as error:
                raise DetcollError(f"the relay did not answer: {error}") from error
            if not piece:
                raise DetcollError(f"the relay has ended, exit code {self._process.wait(_PATIENCE_S)}")
            received += piece
        return bytes(received)

    def _stop(self) -> None:
        """Let the relay tell what it counted and end, or kill it."""
        # Where this process was told to end meanwhile, the answer to an earlier request comes first.
        with suppress(DetcollError, msgspec.MsgspecError):
            self._final = self._ask(ASK_QUIT)
        self._control.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _check(topology: Topology, buffer_bytes: int) -> None:
    """Refuse what cannot be emulated, before anything is made."""
    if len(topology.sites) < 2:
        raise UsageError(f"topology has {len(topology.sites)} sites; the relay needs at least 2")
    for site in topology.sites:
        if site.uplink_bytes_per_s is None or site.downlink_bytes_per_s is None:
            raise UsageError(f"topology: site {site.name!r} has no uplink; every site of a relay needs one")
    if topology.has_reservations:
        raise UsageError("topology reserves rates; the relay has no classes of traffic, that takes the lab")
    if buffer_bytes < topology.mtu_bytes:
        raise UsageError(f"buffer_bytes={buffer_bytes} must be at least one packet of {topology.mtu_bytes} bytes")
    wanted = topology.size + _SPARE_PORTS * len(topology.sites)
    if wanted > _END_PORT - _LOWEST_PORT:
        raise UsageError(f"topology needs {wanted} ports; the relay has {_END_PORT - _LOWEST_PORT}")


def _free_ranges(sizes: list[int]) -> tuple[tuple[int, int], ...]:
    """Return neighbouring ranges of ports that are all free now, somewhere at random."""
    for _ in range(_ATTEMPTS):
        first = random.randrange(_LOWEST_PORT, _END_PORT - sum(sizes) + 1)
        if all(_is_free(port) for port in range(first, first + sum(sizes))):
            starts = [first + sum(sizes[:index]) for index in range(len(sizes))]
            return tuple((start, start + size - 1) for start, size in zip(starts, sizes, strict=True))
    raise DetcollError(f"the relay found no {sum(sizes)} free ports in a row from {_LOWEST_PORT} to {_END_PORT - 1}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
