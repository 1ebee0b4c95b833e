"""Lets test modules import what they share from this folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detcoll.launch.leftovers import now_ns, remove_segments
from detcoll.launch.mpiexec import find_mpiexec

sys.path.insert(0, str(Path(__file__).parent))

LONG = (
    "test_pages.py", "test_bench_smoke.py", "test_contract_shm.py", "test_examples.py", "test_communicator.py",
    "test_values.py", "test_contract_gloo.py", "test_messages.py", "test_lab.py", "test_contract_mpi.py",
    "test_communicator_errors.py", "test_endings.py", "test_shm_endings.py", "test_cli_run.py", "test_device_calls.py",
    "test_check_kinds.py", "test_shm_collectives.py", "test_slotted.py", "test_nccl.py", "test_rendezvous.py",
    "test_regressions_waiting.py", "test_measure_lab.py", "test_runtime.py", "test_torch_groups.py", "test_reports.py",
    "test_rendezvous_cuts.py", "test_kinds.py",
)  # fmt: skip
"""Files that take long, the longest first: begun last, they would keep one worker busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; the order inside a file stays."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_configure(config: pytest.Config) -> None:
    """Make the many processes that tests start cheap.

    None compiles detcoll anew, none starts a pool of threads, none looks for garbage among all that it imports.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # else pytest-xdist begins with the files that have most tests
    _be_patient()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist inherits the environment
        return
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # containers set it to keep images small
    patch.setenv("PYTHONPATH", str(Path(__file__).parent / "quick"), prepend=os.pathsep)
    if "OMP_NUM_THREADS" not in os.environ:
        patch.setenv("OMP_NUM_THREADS", "1")


def _be_patient() -> None:
    """Let hypothesis take the time that a busy machine needs.

    It is imported here since other commands read this file as well: `pytest-benchmark compare` does, which people run
    who have installed what benchmarks need and no more.
    """
    import hypothesis

    hypothesis.settings.register_profile(
        "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep flight records of failures, which many tests provoke, out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def mpiexec(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command that starts MPI ranks, from the environment of this Python before any other, up to its ``-n``."""
    pytest.importorskip("mpi4py")
    found = find_mpiexec()
    if found is None:
        pytest.skip("there is no mpiexec")
    with pytest.MonkeyPatch.context() as patch:
        files = found.files_in(str(tmp_path_factory.mktemp("mpi")))
        for name, value in {**found.environment, **files}.items():
            patch.setenv(name, value)
        since_ns = now_ns()
        yield found.command(2)[:-2]
        remove_segments(since_ns)  # MPICH leaves its own where ranks are killed
