"""Options of an iteration of training, which several commands have. All of them are None unless given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cyclopts import Parameter

from detcoll.cli.quantity import Quantity, Whole
from detcoll.quantities import parse_duration_ns

ITERATION_GROUP = "An iteration of training"
"""Heading in the help of commands."""


@Parameter(name="*", group=ITERATION_GROUP)
@dataclass(frozen=True, kw_only=True)
class IterationOptions:
    """What an iteration computes, and how its gradients are reduced."""

    compute: Quantity | None = None
    """Computing time of one iteration, such as "15.7 s"."""

    backward: float | None = None
    """Share of the computing time in which gradients become final."""

    buckets: Whole | None = None
    """How many buckets gradients are cut into."""

    overlap: float | None = None
    """Share of the buckets that may be reduced beside the backward pass."""

    def values(self) -> dict[str, Any]:
        """Return the values by the names of `detcoll.scenarios.workload.Workload`; None where not given."""
        compute_ns = None if self.compute is None else parse_duration_ns(self.compute, "compute")
        return {
            "backward": self.backward, "buckets": self.buckets, "overlap": self.overlap, "compute_ns": compute_ns,
        }  # fmt: skip


ANY_ITERATION = IterationOptions()
"""Nothing given."""
