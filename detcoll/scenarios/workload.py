"""What is trained, and how long an iteration takes once it is known how long its gradients take.

An iteration computes for C, of which the last share b is the backward pass. Gradients become final evenly over it, in K
buckets; each is reduced over all ranks, one behind the other. With f from a bucket's start to its end where nothing is
before it, and d between the ends of two that follow at once (`detcoll.scenarios.buckets` finds both):

    bucket k is ready at   C (1 - b) + C b k / K,  k = 1 ... K
    it ends at             max(ready + f, end of the one before + d)
    iteration              the end of the last one, at least C

Where only a part o of the buckets may go beside the backward pass, those after the first floor(o K) are ready at C.
The optimiser's step is part of C. Nothing of the next iteration overlaps with this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.errors import UsageError
from detcoll.plan import Collective
from detcoll.types import accumulation_dtype, parse_dtype

LARGEST_BUCKETS = 100_000
"""With so many, a study takes some four seconds more."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One iteration of data-parallel training, the same on all ranks.

    ``parameters`` and ``precision`` make the gradient that is reduced.  ``compute_ns`` : C.  ``backward`` : b.
    ``buckets`` : K.  ``overlap`` : o.
    """

    parameters: int
    precision: str
    compute_ns: int
    backward: float = 2 / 3
    buckets: int = 32
    overlap: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        parse_dtype(self.precision)
        for name in ("parameters", "compute_ns", "buckets"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        if self.buckets > self.parameters:
            raise UsageError(f"buckets={self.buckets} must not exceed parameters={self.parameters}")
        if self.buckets > LARGEST_BUCKETS:
            raise UsageError(f"buckets={self.buckets} must be at most {LARGEST_BUCKETS}: each is looked at in turn")
        for name in ("backward", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} must be from 0 to 1")

    @property
    def gradient_bytes(self) -> int:
        """Size V of the gradient that every rank holds and all ranks sum."""
        return self.parameters * parse_dtype(self.precision).itemsize

    def bucket(self, number: int = 1) -> Collective:
        """Return the all-reduce of ``number`` buckets in one."""
        dtype = parse_dtype(self.precision)
        count = -(-self.parameters // self.buckets) * number
        return Collective("all_reduce", count, dtype.itemsize, accumulation_dtype(dtype).itemsize)


@dataclass(frozen=True, slots=True)
class BucketTimes:
    """``first_ns``: from a bucket's start to its end; ``interval_ns``: between the ends of two that follow at once."""

    first_ns: float
    interval_ns: float

    def all_ns(self, buckets: int) -> float:
        """Return how long so many buckets take that are all ready at once."""
        return self.first_ns + (buckets - 1) * self.interval_ns


def iteration_ns(work: Workload, times: BucketTimes) -> float:
    """Return how long one iteration takes; see the top of this file."""
    backward_ns = work.compute_ns * work.backward
    begun_ns, beside = work.compute_ns - backward_ns, int(work.overlap * work.buckets + 1e-9)
    end_ns = 0.0
    for number in range(1, work.buckets + 1):
        ready_ns = begun_ns + backward_ns * number / work.buckets if number <= beside else float(work.compute_ns)
        end_ns = max(ready_ns + times.first_ns, end_ns + times.interval_ns if number > 1 else 0.0)
    return max(end_ns, float(work.compute_ns))
