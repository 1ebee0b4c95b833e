"""Collectives of shared memory give the bits of plans, which its messages can carry out as well."""

from __future__ import annotations

import dataclasses

import pytest
from ranks import grouped, run_ranks

from detcoll.testing.values import varied
from detcoll.topology import Topology
from detcoll.types import DTYPES
from detcoll_shm import ShmTransport


@pytest.mark.parametrize("topology", [None, grouped(2, 2), grouped(1, 3)], ids=["4", "2+2", "1+3"])
def test_plans_give_the_same_bits(topology: Topology | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(comm):
        results = []
        for name in ("float32", "float16", "bfloat16", "float64", "int32", "bool", "complex64"):
            for count in (1, 1000, 40_000, 300_001):
                mine = varied(DTYPES[name], count, comm.rank)
                comm.all_reduce(mine, op="bxor" if name == "bool" else "sum")
                results.append(mine.tobytes())
        return comm.algorithm("all_reduce", 4), results

    native = run_ranks(4, program, transport="shm", topology=topology)
    planned = dataclasses.replace(ShmTransport.capabilities, native=frozenset())
    monkeypatch.setattr(ShmTransport, "capabilities", planned)
    plans = run_ranks(4, program, transport="shm", topology=topology)
    assert [name for name, _ in native] == ["shared-memory"] * 4
    assert [name for name, _ in plans] == ["exchange"] * 4
    assert len({b"".join(bits) for _, bits in native + plans}) == 1
