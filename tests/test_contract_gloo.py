"""Gloo keeps the transport contract, with ranks as threads of one process."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from detcoll.testing import ThreadFabric, TransportContract
from detcoll_gloo import GlooTransport

pytestmark = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


class TestGloo(TransportContract):
    capabilities = GlooTransport.capabilities
    clogged_bytes = 2**20
    worlds = (1, 2, 3, 4)

    def fabric(self, n: int) -> ThreadFabric:
        return ThreadFabric(GlooTransport(), n)

    def clogged_fabric(self) -> ThreadFabric:
        return ThreadFabric(GlooTransport(), 2, {"unexpected_bytes": 1000})
