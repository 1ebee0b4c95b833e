"""The transport contract on plain TCP, with ranks as threads and as processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from detcoll.testing import ProcessFabric, ThreadFabric, TransportContract, Worlds
from detcoll_tcp import TcpTransport

SMALL = {"held_bytes": 4096}


class TestTcp(TransportContract):
    capabilities = TcpTransport.capabilities

    def fabric(self, n: int) -> ThreadFabric:
        return ThreadFabric(TcpTransport(), n)

    def clogged_fabric(self) -> ThreadFabric:
        return ThreadFabric(TcpTransport(), 2)


class TestHoldingLittle(TransportContract):
    """Early messages stay with their sender, but for the smallest."""

    capabilities = TcpTransport.capabilities
    worlds = (2,)

    def fabric(self, n: int) -> ThreadFabric:
        return ThreadFabric(TcpTransport(), n, {"held_bytes": 2**18})

    def clogged_fabric(self) -> ThreadFabric:
        return ThreadFabric(TcpTransport(), 2, SMALL)


class TestProcesses(TransportContract):
    capabilities = TcpTransport.capabilities
    worlds = (3,)
    crews: ClassVar[Worlds]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _crews(cls) -> Iterator[None]:
        cls.crews = Worlds()
        yield
        cls.crews.end()

    def fabric(self, n: int) -> ProcessFabric:
        return ProcessFabric(self.crews.of(n), "detcoll_tcp:TcpTransport")

    def clogged_fabric(self) -> ProcessFabric:
        return ProcessFabric(self.crews.of(2), "detcoll_tcp:TcpTransport")
