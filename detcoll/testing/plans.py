"""Topologies and plans for tests: uneven sites, all ranks' parts, and parts taken to pieces and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from detcoll.plan import ChunkSize, Collective, Plan, compile_plan
from detcoll.plan.ir import INPUT, STEP
from detcoll.topology import Link, Site, Topology


def sites_of(
    ranks: Sequence[int],
    uplink_bytes_per_s: float = 1e8,
    one_way_ns: int = 5_000_000,
    downlink_bytes_per_s: float | None = None,
) -> Topology:
    """Return sites of ``ranks[s]`` ranks each, all pairs equally far apart; one site has no line."""
    made: list[Site] = []
    for index, count in enumerate(ranks):
        first = sum(ranks[:index])
        numbers = tuple(range(first, first + count))
        down = uplink_bytes_per_s if downlink_bytes_per_s is None else downlink_bytes_per_s
        made.append(Site(f"s{index}", numbers, *((uplink_bytes_per_s, down) if len(ranks) > 1 else ())))
    links = tuple((pair, Link(one_way_ns)) for pair in combinations(range(len(ranks)), 2))
    return Topology(tuple(made), links)


def all_parts(collective: Collective, topology: Topology, algorithm: str, chunk_size: ChunkSize) -> list[Plan]:
    """Return every rank's part."""
    return [compile_plan(collective, topology, rank, algorithm, chunk_size) for rank in range(topology.size)]


def unpacked(plan: Plan) -> list[dict[str, Any]]:
    """Return the steps as dictionaries with lists ``after`` and ``inputs``, to be changed and `packed` again.

    An input is its buffer, its offset and how many ranks it holds.
    """
    names = [name for name in STEP.names or () if not name.endswith("_end")]
    return [
        {name: int(row[name]) for name in names}
        | {"after": plan.after_of(i)}
        | {"inputs": [(*read, ranks) for read, ranks in zip(plan.inputs_of(i), plan.ranks_of(i), strict=True)]}
        for i, row in enumerate(plan.steps)
    ]


def packed(plan: Plan, rows: Sequence[dict[str, Any]], **changes: Any) -> Plan:
    """Return ``plan`` with these steps instead of its own."""
    steps = np.zeros(len(rows), dtype=STEP)
    after: list[int] = []
    inputs: list[tuple[int, int, int]] = []
    for index, row in enumerate(rows):
        after += row["after"]
        inputs += row["inputs"]
        for name in row.keys() - {"after", "inputs"}:
            steps[name][index] = row[name]
        steps["after_end"][index], steps["inputs_end"][index] = len(after), len(inputs)
    return dataclasses.replace(
        plan, steps=steps, after=np.array(after, dtype=np.int32), inputs=np.array(inputs, dtype=INPUT), **changes
    )
