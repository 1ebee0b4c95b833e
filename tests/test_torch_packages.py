"""Packages that torch users train with give the same losses on detcoll as on Gloo, and torchft outlives a replica.

The packages are heavy and no part of the development environment: ``programs/packages/requirements.txt`` says how to
install them. What is not installed is skipped.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jobs import Ended, environment

import detcoll

pytest.importorskip("torch")

PROGRAMS = Path(__file__).parent / "programs" / "packages"
LIMIT_S = 240
"""Ends a program that hangs; nothing waits for it to pass."""

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "RUST_LOG": "warn"}
"""No package shall look for a network, and torchft not write a line for every step."""

BIN = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
TORCHRUN = [shutil.which("torchrun", path=BIN) or "torchrun", "--nproc-per-node", "2"]
ALONE = [sys.executable]
"""The package starts the ranks itself."""

CASES = {
    "lightning_trainer": ("lightning", ALONE),
    "lightning_fsdp": ("lightning", ALONE),
    "accelerated": ("accelerate", TORCHRUN),
    "hf_trainer": ("transformers", TORCHRUN),
    "ray_train": ("ray", ALONE),
    "torchft_replicas": ("torchft", ALONE),
    "titan_parts": ("torchtitan", TORCHRUN),
}
"""Programs, the packages that they need, and what starts them."""

pytestmark = pytest.mark.timeout(2 * LIMIT_S + 30)


def run(program: str, backend: str, argument: object) -> Ended:
    package, launcher = CASES[program]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; see {PROGRAMS / 'requirements.txt'}")
    paths = [str(Path(detcoll.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environ = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **QUIET}
    process = subprocess.Popen(
        [*launcher, str(PROGRAMS / f"{program}.py"), backend, str(argument)],
        env=environment(environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out + err
    return Ended(process.returncode, out, err)


@pytest.mark.parametrize("program", CASES)
def test_a_package_trains_as_on_gloo(program: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    said: dict[str, dict[int, list[Any]]] = {}
    for backend in ("gloo", "detcoll"):
        argument = "steady" if program == "torchft_replicas" else tmp_path_factory.mktemp("run")
        said[backend] = {rank: records[0] for rank, records in run(program, backend, argument).said.items()}
    assert sorted(said["gloo"]) == sorted(said["detcoll"]) == [0, 1]
    for rank in (0, 1):
        (own, *got), (other, *wanted) = said["detcoll"][rank], said["gloo"][rank]
        assert (own, other) in {("detcoll", "gloo"), ("torchft-detcoll", "torchft-gloo")}
        assert alike(got, wanted), f"{program} on rank {rank}: {got}, Gloo {wanted}"


def test_torchft_goes_on_without_a_lost_replica_and_heals_a_new_one() -> None:
    said = run("torchft_replicas", "detcoll", "fault").said
    names, went_on, heard_of_loss, steps, parameters = zip(*(said[number][0] for number in (0, 1)), strict=True)
    assert set(names) == {"torchft-detcoll"}
    assert all(went_on)
    assert heard_of_loss == (True, False)
    assert len(set(steps)) == len(set(parameters)) == 1


def alike(one: Any, other: Any) -> bool:
    """Compare numbers with the tolerance that another order of summation needs, and all else exactly."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5)
    return bool(one == other)
