"""Lets all ranks begin a timed call together.

A barrier across sites lets ranks go up to a one-way delay apart, and whoever goes first sends while the others are
not counted yet. So ranks of one host, which share a clock whatever network they are in, agree on an instant and begin
then. The time of a call is from the last rank's entry to the last rank's exit, and how far entries lay apart is kept
beside it. Ranks of several hosts have no common clock: they begin from a barrier, and the time of a call is the
greatest of the ranks' own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detcoll.workloads.arrays import host_number

SLACK_NS = 500_000
LARGEST_WAIT_NS = 250_000_000

StartKind = Literal["instant", "barrier"]


class Starter:
    """Brings the ranks of a communicator together; every rank makes the same calls."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.kind: StartKind = "instant" if _share_a_clock(comm) else "barrier"
        self._longest_ns = 0
        for _ in range(3):
            self()

    def __call__(self) -> None:
        """Return on all ranks at once, as nearly as they can."""
        if self.kind == "barrier":
            self._comm.barrier()
            return
        before_ns = time.monotonic_ns()
        agreed = np.array([before_ns, self._longest_ns], np.int64)
        self._comm.all_reduce(agreed, op="max")
        self._longest_ns = time.monotonic_ns() - before_ns
        wait_ns = min(2 * int(agreed[1]) + SLACK_NS, LARGEST_WAIT_NS)
        left_ns = int(agreed[0]) + wait_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Times of calls in seconds, equal on all ranks; ``skew_s`` is how far entries lay apart, None where unknown.

    ``began_ns`` : when each call began by the monotonic clock: the last entry, or this rank's own where they differ.
    """

    calls_s: tuple[float, ...]
    began_ns: tuple[int, ...]
    skew_s: tuple[float, ...] | None


def combine(comm: Any, kind: StartKind, entered_ns: NDArray[np.int64], left_ns: NDArray[np.int64]) -> CallTimes:
    """Return the times of calls that this rank entered and left at the given times; all ranks call it."""
    if kind == "barrier":
        own_s = (left_ns - entered_ns) / 1e9
        comm.all_reduce(own_s, op="max")
        return CallTimes(tuple(own_s.tolist()), tuple(entered_ns.tolist()), None)
    first_ns, last_ns, end_ns = entered_ns.copy(), entered_ns.copy(), left_ns.copy()
    comm.all_reduce(first_ns, op="min")
    comm.all_reduce(last_ns, op="max")
    comm.all_reduce(end_ns, op="max")
    calls_s, skew_s = (end_ns - last_ns) / 1e9, (last_ns - first_ns) / 1e9
    return CallTimes(tuple(calls_s.tolist()), tuple(last_ns.tolist()), tuple(skew_s.tolist()))


def _share_a_clock(comm: Any) -> bool:
    """Tell whether all ranks are on one host; all ranks call it and get the same answer."""
    least = np.array([host_number()], np.int64)
    greatest = least.copy()
    comm.all_reduce(least, op="min")
    comm.all_reduce(greatest, op="max")
    return bool(least[0] == greatest[0])
