"""What a host and its local network cost, for predictions and the simulator."""

from __future__ import annotations

from dataclasses import dataclass, replace

from detcoll.plan.alignment import LATE_NS
from detcoll.plan.layout import LARGEST_FRAME_BYTES, STEP_NS

BUSY_SLOWNESS = 1.75
"""How many times as long a core takes while all cores are busy. Cores of virtual machines are often threads that share
one: on two such cores a Python loop took 1.0 to 2.1 times as long when both ran it, changing within seconds."""

CALL_WORK_NS = 900_000
"""Processor time of a call at one rank of a Python host before its first step, ZeroMQ's thread included."""

RETURN_WORK_NS = 500_000
"""The same from the last byte's arrival on. Ranks that share a core all have it then, and wait for each other: on four
ranks of two cores 1.7 ms passed until the last had its result, and the steps alone need 0.8."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a host and its local network cost.

    The defaults are those of a Python host on one machine: a step some 30 us, memory at 5 GB/s, a local message 60 us,
    a wake-up from a wait 100 us. ``frame_bytes`` is what a transport adds to a wide message. ``late_ns`` is what a
    window loses because its owner wakes up late: in the mean over the windows of a host with twice as many busy ranks
    as cores, most of which begin on time and one in ten more than a millisecond late. ``aligned_late_ns`` is the same
    where windows lead to one site each. ``call_ns`` is what passes in a call across sites before the first step begins,
    ``return_ns`` what ranks that all own a part keep each other waiting for at its end, which simulated hosts do not.
    ``device_bytes_per_s`` is what a device and pinned memory exchange in each direction, ``device_latency_ns`` what
    passes besides from when a copy is queued until its end is noticed; `Communicator.predict` measures both, where the
    process uses a device.
    """

    step_ns: int = STEP_NS
    copy_bytes_per_s: float = 5e9
    local_latency_ns: int = 60_000
    wake_ns: int = 100_000
    late_ns: int = 300_000
    aligned_late_ns: int = LATE_NS
    call_ns: int = 0
    return_ns: int = 0
    frame_bytes: int = LARGEST_FRAME_BYTES
    device_bytes_per_s: float = 20e9
    device_latency_ns: int = 20_000

    def with_device(self, bytes_per_s: float, latency_ns: int) -> Costs:
        """Return the same with a device that exchanges so much."""
        return replace(self, device_bytes_per_s=bytes_per_s, device_latency_ns=latency_ns)

    def device_ns(self, nbytes: float) -> float:
        """Return how long a copy of ``nbytes`` between pinned memory and a device takes, one way."""
        return self.device_latency_ns + nbytes / self.device_bytes_per_s * 1e9

    def copy_ns(self, nbytes: float) -> float:
        """Return how long the host takes to read or write ``nbytes``."""
        return nbytes / self.copy_bytes_per_s * 1e9

    @classmethod
    def on_host(cls, ranks: int, cores: int) -> Costs:
        """Return what a Python host costs whose ``ranks`` share ``cores``, in a call that all of them begin at once.

        With more ranks than cores each gets its share of a core, and no core is idle: all that needs a processor takes
        so much longer, and `BUSY_SLOWNESS` times that. A call across sites begins with some `CALL_WORK_NS` of it, for
        waking threads, greeting and posting.
        """
        shared = max(ranks / cores, 1.0)
        slowness = BUSY_SLOWNESS if shared > 1 else 1.0
        crowd = shared * slowness
        usual = cls()
        return cls(
            step_ns=round(usual.step_ns * crowd),
            copy_bytes_per_s=usual.copy_bytes_per_s / crowd,
            local_latency_ns=round(usual.local_latency_ns * crowd),
            wake_ns=round(usual.wake_ns * crowd),
            call_ns=round(CALL_WORK_NS * crowd),
            return_ns=round(RETURN_WORK_NS * (shared - 1) * slowness),
        )
