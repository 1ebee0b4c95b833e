"""Clocks: this host's, and how far those of other hosts are off."""

from __future__ import annotations

from detcoll.clock.filter import ClockFilter, Exchange, SyncState, Verdict
from detcoll.clock.host import MonotonicClock, SuspendDetector, clock_domain
from detcoll.clock.synchroniser import RECORD_BYTES, Synchroniser, answer_ping

__all__ = [
    "ClockFilter",
    "Exchange",
    "MonotonicClock",
    "RECORD_BYTES",
    "SuspendDetector",
    "SyncState",
    "Synchroniser",
    "Verdict",
    "answer_ping",
    "clock_domain",
]
