"""The relay as the ranks' launcher sees it: a process, its ports, and what to tell each rank."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from detcoll.emulation.helper import ASK_STATISTICS, Helper
from detcoll.emulation.relay.server import LOOPBACK, RelayConfig, RelayStatistics
from detcoll.errors import Closed, DetcollError, UsageError
from detcoll.launch.environment import rank_numbers
from detcoll.topology import Topology

DEFAULT_BUFFER_BYTES = 2_500_000

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
            self._helper = Helper("the relay", "detcoll.emulation.relay.server")
            stack.callback(self._stop)
            config = RelayConfig(topology, self._ranges, buffer_bytes, folder)
            self._proxy_ports = self._helper.configure(config, tuple[int, ...])
            self._resources = stack.pop_all()

    @property
    def pid(self) -> int:
        """The process id of the relay."""
        return self._helper.pid

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
            numbers = rank_numbers(rank, self.topology.size, site.ranks.index(rank), len(site.ranks))
            environments.append(numbers | {
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
                return self._helper.ask(ASK_STATISTICS, RelayStatistics)
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

    def _stop(self) -> None:
        """Let the relay tell what it counted and end, or kill it."""
        self._final = self._helper.quit(RelayStatistics)
        self._helper.close()


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
