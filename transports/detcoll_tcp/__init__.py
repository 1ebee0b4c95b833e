"""Plain TCP with the kernel's defaults: no slots, no pacing, nothing is resent. A lost connection is a lost peer."""

from __future__ import annotations

from detcoll_tcp.transport import TcpTransport

__all__ = ["TcpTransport"]
