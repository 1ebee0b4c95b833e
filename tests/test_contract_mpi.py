"""MPI keeps the transport contract, with processes that mpiexec started."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import ClassVar

import pytest

from detcoll.testing import MPI_ENVIRONMENT, ProcessFabric, TransportContract, Worlds, mpi_launcher
from detcoll_mpi import MpiTransport

LAUNCHER = mpi_launcher()
pytestmark = [
    pytest.mark.skipif(find_spec("mpi4py") is None, reason="mpi4py is not installed"),
    pytest.mark.skipif(LAUNCHER is None, reason="there is no mpiexec"),
]


class TestMpi(TransportContract):
    capabilities = MpiTransport.capabilities
    abort_unseen = "MPI tells survivors nothing"
    worlds = (1, 2, 3, 4)
    crews: ClassVar[Worlds]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _crews(cls) -> Iterator[None]:
        cls.crews = Worlds(LAUNCHER or (), MPI_ENVIRONMENT)
        yield
        cls.crews.end()

    def fabric(self, n: int) -> ProcessFabric:
        return ProcessFabric(self.crews.of(n), "detcoll_mpi:MpiTransport")

    def clogged_fabric(self) -> ProcessFabric:
        return self.fabric(2)
