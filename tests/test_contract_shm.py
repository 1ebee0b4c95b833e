"""The transport contract on shared memory: between threads, between processes, and with tiny rings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from detcoll.testing import TransportContract
from detcoll.testing.fabric import Fabric, ThreadFabric
from detcoll.testing.worlds import ProcessFabric, Worlds
from detcoll_shm import ShmTransport

TINY = {"ring_bytes": 4096, "slots": 4, "fragment_bytes": 320, "spin_ns": 0, "wait_ns": 0, "chunk_bytes": 512}
SMALL = {"ring_bytes": "64 KiB"}


class TestShm(TransportContract):
    capabilities = ShmTransport.capabilities
    clogged_bytes = 2**20

    def fabric(self, n: int) -> Fabric:
        return ThreadFabric(ShmTransport(), n)

    def clogged_fabric(self) -> Fabric:
        return ThreadFabric(ShmTransport(), 2, SMALL)


class TestTinyRings(TransportContract):
    capabilities = ShmTransport.capabilities
    clogged_bytes = 100_000
    large_count = 30_001

    def fabric(self, n: int) -> Fabric:
        return ThreadFabric(ShmTransport(), n, TINY)

    def clogged_fabric(self) -> Fabric:
        return ThreadFabric(ShmTransport(), 2, TINY)


class TestProcesses(TransportContract):
    capabilities = ShmTransport.capabilities
    worlds = (1, 2, 3, 4)
    clogged_bytes = 2**20
    crews: ClassVar[Worlds]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _crews(cls) -> Iterator[None]:
        cls.crews = Worlds()
        yield
        cls.crews.end()

    def fabric(self, n: int) -> Fabric:
        return ProcessFabric(self.crews.of(n), "detcoll_shm:ShmTransport")

    def clogged_fabric(self) -> Fabric:
        return ProcessFabric(self.crews.of(2), "detcoll_shm:ShmTransport", SMALL)
