"""What a workload is told, and when each of its iterations passed its marks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detcoll.workloads.compute import ComputeKind

WorkloadName = Literal["digits", "synthetic"]


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """A workload and its figures; ``compute_ns``, its kind and ``gradient_bytes`` are the synthetic one's alone.

    ``batches`` : of the digits, so many make an iteration, and their gradients are added up before they are reduced.
    ``overlap`` : whether buckets are reduced during the backward pass, or all after it.  ``device`` : where arrays are,
    "cpu" or "cuda".
    """

    name: WorkloadName
    bucket_bytes: int
    compute_ns: int = 0
    gradient_bytes: int = 0
    data_path: str | None = None
    seed: int = 0
    compute_kind: ComputeKind = "wait"
    overlap: bool = True
    device: str = "cpu"
    batches: int = 1


@dataclass(frozen=True, slots=True)
class Stamps:
    """When one iteration passed its marks, in nanoseconds of the host's monotonic clock.

    Of several batches, the backward pass begins with all that is computed of the first.
    ``reduced_ns`` is when this rank had the whole reduced gradient, ``end_ns`` when it had applied it.
    """

    backward_begin_ns: int
    backward_end_ns: int
    reduced_ns: int
    end_ns: int
