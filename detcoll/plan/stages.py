"""The wide stage of a prediction: hops over lines, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detcoll.plan.costs import Costs
from detcoll.plan.lines import Floats, Flows, Lines


@dataclass(frozen=True, slots=True)
class Crossing:
    """What crosses lines in one hop; the other fields are those of `detcoll.plan.collectives.Hop`."""

    flows: Flows
    folds: bool = False
    from_user: bool = False
    behind: int | None = None


class Stages:
    """Hops over lines, from when owners have chunks to when every owner has its result.

    Parameters
    ----------
    crossings : sequence of Crossing
        One after another.
    lines : Lines
        What they cross.
    costs : Costs
        Of the hosts at both ends.
    chunk_bytes : float
        What is folded at once.
    first, last : array, (P,)
        By rank, when its first and its last chunk is ready to leave, in nanoseconds.
    """

    def __init__(
        self, crossings: Sequence[Crossing], lines: Lines, costs: Costs, chunk_bytes: float, first: Floats, last: Floats
    ) -> None:
        self.crossings, self.lines, self.costs = crossings, lines, costs
        self.first, self.last = first, last
        self.begun = self.first
        self.acknowledged_ns = 0.0
        self.fold_ns = costs.step_ns + costs.copy_ns(chunk_bytes)
        self.handing_ns = costs.copy_ns(chunk_bytes)

    def done_ns(self) -> float:
        """Return when the last owner has its last chunk."""
        end_ns, folds = 0.0, False
        for crossing in self.crossings:
            before = None if crossing.behind is None else self.crossings[crossing.behind].flows
            end_ns = max(end_ns, self._cross(crossing.flows, before, crossing.from_user))
            folds = crossing.folds
            if folds:  # received and folded, before it goes on
                self.first, self.last = self.first + 2 * self.fold_ns, self.last + 2 * self.fold_ns
        return end_ns + self.fold_ns * (2 if folds else 1)

    def _cross(self, flows: Flows, before: Flows | None, from_user: bool) -> float:
        """Send ``flows`` behind what ``before`` put on the same lines; return when the last one has arrived."""
        one, over_ns = flows.only_one(), self.lines.delays_ns(flows) + self.costs.wake_ns
        first, last = self.first[flows.src] + self.handing_ns, self.last[flows.src] + self.handing_ns
        one_ns = self.lines.end_ns(one, first)
        end_ns = np.maximum(self.lines.end_ns(flows, first), self.lines.end_ns(one, last))
        if before is not None:
            end_ns = np.maximum(end_ns, self.lines.end_ns(flows.with_more(before), self.begun[flows.src]))
        used = flows.messages > 0
        if from_user:
            back = Flows(flows.dst, flows.src, flows.nbytes, flows.messages)
            acknowledged = end_ns + self.lines.delays_ns(flows) + self.lines.delays_ns(back)
            self.acknowledged_ns = max(self.acknowledged_ns, float(acknowledged[used].max(initial=0.0)))
        first, last = np.zeros_like(self.first), np.zeros_like(self.last)
        np.maximum.at(first, flows.dst[used], (one_ns + over_ns)[used])
        np.maximum.at(last, flows.dst[used], (end_ns + over_ns)[used])
        heard = last > 0
        self.first, self.last = np.where(heard, first, self.first), np.where(heard, last, self.last)
        return float(last.max())
