"""What tests of detcoll, and of transports written elsewhere, are made with.

It needs pytest: ``pip install "detcoll[test]"``.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("detcoll.testing.contract", "detcoll.testing.fabric", "detcoll.testing.programs")

from detcoll.clock import MonotonicClock  # noqa: E402
from detcoll.testing.contract import TransportContract  # noqa: E402
from detcoll.testing.fabric import Fabric, Here, LocalMeeting, ThreadFabric, pattern  # noqa: E402
from detcoll.testing.fake_clock import FakeClock, VirtualTime  # noqa: E402
from detcoll.testing.faults import Delay, Drop, Faults, FaultyEndpoint, FaultyTransport, Kill, Pass  # noqa: E402
from detcoll.testing.memory import MemoryEndpoint, MemoryTransport  # noqa: E402
from detcoll.testing.worlds import MPI_ENVIRONMENT, ProcessFabric, World, WorldError, Worlds, mpi_launcher  # noqa: E402

__all__ = [
    "MPI_ENVIRONMENT",
    "Delay",
    "Drop",
    "Fabric",
    "FakeClock",
    "Faults",
    "FaultyEndpoint",
    "FaultyTransport",
    "Here",
    "Kill",
    "LocalMeeting",
    "MemoryEndpoint",
    "MemoryTransport",
    "MonotonicClock",
    "Pass",
    "ProcessFabric",
    "ThreadFabric",
    "TransportContract",
    "VirtualTime",
    "World",
    "WorldError",
    "Worlds",
    "mpi_launcher",
    "pattern",
]
