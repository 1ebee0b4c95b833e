"""Plans for sites whose devices reduce among themselves.

Ranks with the same number in their sites are a rail. The devices of a site first reduce, which leaves each rank with
its share of the site's sum (`detcoll.device.shares`); each rail does an all-reduce of its shares across the sites; the
devices gather. `railed` takes the plan of that all-reduce, for the ranks of a rail and a share on a device, and returns
this rank's part of the whole::

    FOLD DEVICE_OUT -> DEVICE_OUT      the devices reduce
        copies to the host, messages between the sites, folds, copies to the device, as in the plan of the rail
    FOLD DEVICE_OUT -> DEVICE_OUT      the devices gather

With one site, the first of these is an all-reduce, and there is nothing else. Offsets of the steps between are those of
the share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from detcoll.plan.ir import INPUT, STEP, Buffer, Collective, Kind, Phase, Plan


def railed(
    rail: Plan | None, collective: Collective, rank: int, members: Sequence[int], mates: Sequence[int]
) -> Plan:  # fmt: skip
    """Return the plan of a rank whose device reduces with those of its site.

    Parameters
    ----------
    rail : Plan or None
        This rank's part of the all-reduce of its share across sites, with ``device_out``; None if there is one site.
    collective : Collective
        The whole all-reduce.
    rank : int
        Its number in the group.
    members : sequence of int
        The ranks of the rail, as they are numbered in the group; of all rails, there is one for each rank of a site.
    mates : sequence of int
        The ranks of the site.

    Returns
    -------
    Plan
        With ``mates`` set.
    """
    others, rails = tuple(mate for mate in mates if mate != rank), len(mates)
    size = len(members) * rails
    if rail is None:
        steps, inputs = _device_step(Phase.LOCAL_REDUCE, collective.count, 0, 1, size)
        steps["final"] = 1
        return Plan(collective, "nccl", rank, size, steps, np.empty(0, np.int32), inputs, 0, device_out=True,
                    mates=others)  # fmt: skip
    copies = np.zeros(len(rail.steps), bool)
    copies[list(rail.copies)] = True
    # Copies come after the reduction too; what a step comes after ends at `after_end`.
    ends = rail.steps["after_end"]
    after = np.insert(rail.after + 1, ends[copies], 0)
    moved = rail.steps.copy()
    moved["after_end"] = ends + np.cumsum(copies)
    moved["inputs_end"] += 1
    far = moved["kind"] != Kind.FOLD
    moved["peer"][far] = np.asarray(members, np.int32)[moved["peer"][far]]
    inputs = rail.inputs.copy()
    inputs["offset"][inputs["buffer"] == Buffer.LENT] += 1
    inputs["ranks"] *= rails
    first, of_first = _device_step(Phase.LOCAL_REDUCE, collective.count, 0, 1, rails)
    results = np.concatenate(([0], 1 + np.flatnonzero(moved["buffer"] == Buffer.DEVICE_OUT)))
    last, of_last = _device_step(
        Phase.LOCAL_GATHER, collective.count, len(after) + len(results), len(inputs) + 2, size
    )  # fmt: skip
    return Plan(
        collective, f"nccl, {rail.algorithm}", rank, size, np.concatenate((first, moved, last)),
        np.concatenate((after, results)).astype(np.int32), np.concatenate((of_first, inputs, of_last)),
        rail.out_elems, rail.in_elems, rail.partial_elems, rail.accumulator_elems, device_out=True, mates=others,
    )  # fmt: skip


def _device_step(
    phase: Phase, length: int, after_end: int, inputs_end: int, ranks: int
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Return a step of the devices and its input."""
    step = np.zeros(1, STEP)
    step["kind"], step["phase"], step["buffer"], step["peer"] = Kind.FOLD, phase, Buffer.DEVICE_OUT, -1
    step["length"], step["after_end"], step["inputs_end"] = length, after_end, inputs_end
    taken = np.zeros(1, INPUT)
    taken["buffer"], taken["ranks"] = Buffer.DEVICE_OUT, ranks
    return step, taken
