"""Clocks: this host's, how far those of other hosts are off, and sites whose arrivals align without a common one."""

from __future__ import annotations

from detcoll.clock.arrival import MARK_BYTES, ArrivalLoop
from detcoll.clock.filter import ClockFilter, Exchange, SyncState, Verdict
from detcoll.clock.host import MonotonicClock, SuspendDetector, clock_domain
from detcoll.clock.synchroniser import RECORD_BYTES, Synchroniser, answer_ping

__all__ = [
    "ArrivalLoop",
    "ClockFilter",
    "Exchange",
    "MARK_BYTES",
    "MonotonicClock",
    "RECORD_BYTES",
    "SuspendDetector",
    "SyncState",
    "Synchroniser",
    "Verdict",
    "answer_ping",
    "clock_domain",
]
