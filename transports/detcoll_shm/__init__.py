"""Shared memory between ranks of one host."""

from __future__ import annotations

from detcoll_shm.endpoint import ShmEndpoint
from detcoll_shm.settings import Settings
from detcoll_shm.transport import ShmTransport

__all__ = ["Settings", "ShmEndpoint", "ShmTransport"]
