"""The transport contract on slotted ZeroMQ."""

from __future__ import annotations

from detcoll.testing import ThreadFabric, TransportContract
from detcoll_slotted import SlottedTransport

QUICK = {"tolerance_ns": 20_000_000_000}


class TestSlotted(TransportContract):
    capabilities = SlottedTransport.capabilities
    clogged_bytes = 2**20

    def fabric(self, n: int) -> ThreadFabric:
        return ThreadFabric(SlottedTransport(), n, QUICK)

    def clogged_fabric(self) -> ThreadFabric:
        return ThreadFabric(SlottedTransport(), 2, QUICK | {"credit_bytes": 65_536})
