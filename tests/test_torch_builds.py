"""What PyTorch builds on a process group trains on detcoll as on Gloo: DDP, FSDP2, HSDP, DTensor, compiled programs."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
from forked import TORCH, launch_forked
from jobs import Ended

pytest.importorskip("torch")

SIZE = int(os.environ.get("TEST_TORCH_RANKS", "2"))
"""With 4, sites of more than one rank are tried too; it takes twice as long."""


@pytest.fixture(scope="module")
def trained() -> dict[str, Ended]:
    environ = {"OMP_NUM_THREADS": "1"}
    return {
        backend: launch_forked(SIZE, "torch_builds.py", backend, modules=TORCH, environ=environ, timeout_s=300)
        for backend in ("gloo", "detcoll")
    }


def test_every_case_gives_what_gloo_gives(trained: dict[str, Ended]) -> None:
    said = {backend: ended.said for backend, ended in trained.items()}
    for backend, ended in trained.items():
        assert ended.code == 0, f"{backend}: {ended.err}"
        assert sorted(ended.said) == list(range(SIZE))
    different = [
        f"{case} on rank {rank}: {got}, Gloo {wanted}"
        for rank in range(SIZE)
        for (case, got), (_, wanted) in zip(said["detcoll"][rank], said["gloo"][rank], strict=True)
        if not alike(got, wanted)
    ]
    assert different == []


def test_gloo_can_do_every_case(trained: dict[str, Ended]) -> None:
    """If it could not, two equal errors would look like success."""
    cases = [case for case, _ in trained["gloo"].said[0]]
    failed = [case for case, given in trained["gloo"].said[0] if isinstance(given, str)]
    assert len(cases) > 12
    assert failed == []


def alike(one: Any, other: Any) -> bool:
    """Compare numbers with the tolerance that another order of summation needs, and all else exactly."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    return bool(one == other)
