"""Barrier: no rank returns before all have called.

It is an all-reduce of one element that nobody looks at, so that every rank's result depends on every rank's call.
"""

from __future__ import annotations

from dataclasses import replace

from detcoll.plan.collectives.all_reduce import ALL_REDUCE
from detcoll.plan.collectives.declaration import longest_delay_ns
from detcoll.plan.ir import Collective
from detcoll.topology import Topology


def floor_ns(topology: Topology, collective: Collective) -> float:
    """Return the least time that a barrier takes: the sites at the ends of the longest delay hear of each other."""
    return float(longest_delay_ns(topology))


BARRIER = replace(ALL_REDUCE, name="barrier", has_array=False, has_op=False, floor_ns=floor_ns)
