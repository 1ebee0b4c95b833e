"""The installed MPI launcher: its path, its MPI implementation, and the options and variables that it needs.

Open MPI refuses to run as root, or with more ranks than processors, unless that is allowed explicitly. It also has
other options than MPICH to label output, and other variables to select shared memory and network devices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path

_ASK_TIMEOUT_S = 30


class Family(Enum):
    """The MPI implementation of a launcher."""

    MPICH = "MPICH"
    OPEN_MPI = "Open MPI"
    OTHER = "neither MPICH nor Open MPI"


@dataclass(frozen=True, slots=True)
class Mpiexec:
    """An MPI launcher.

    ``rank_variable`` : the variable in which a rank finds its number.  ``environment`` : variables to set for the
    launcher; other programs ignore them.
    """

    path: str
    family: Family
    rank_variable: str = "PMI_RANK"
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, ranks: int | str, *, labelled: bool = False) -> list[str]:
        """Return the command prefix that runs a program on ``ranks`` ranks, which may exceed the number of processors.

        ``labelled`` puts the rank in front of every line that a rank prints.
        """
        if self.family is Family.OPEN_MPI:
            label = ["--output", "rank"] if labelled else []
            return [self.path, "--oversubscribe", *label, "-n", str(ranks)]
        return [self.path, *(["-l"] if labelled else []), "-n", str(ranks)]

    def without_shared_memory(self, device: str) -> dict[str, str]:
        """Return the variables that make ranks of one host use only TCP over the network device ``device``.

        Open MPI's ranks then also reach their launcher over that device.
        """
        if self.family is Family.OPEN_MPI:
            return {
                "OMPI_MCA_pml": "ob1",
                "OMPI_MCA_btl": "tcp,self",
                "OMPI_MCA_btl_tcp_if_include": device,
                "PMIX_MCA_ptl_base_if_include": device,
                "PRTE_MCA_prte_if_include": device,
            }
        return {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": device}

    def files_in(self, directory: str) -> dict[str, str]:
        """Return the variables that make Open MPI create its files in ``directory``, since dead ranks leave some."""
        if self.family is Family.OPEN_MPI:
            return {"PRTE_MCA_prte_tmpdir_base": directory, "OMPI_MCA_btl_sm_backing_directory": directory}
        return {}


def find_mpiexec(python: str | None = None) -> Mpiexec | None:
    """Return the mpiexec next to ``python`` (by default the running one), else the first in PATH, else None."""
    folders = os.pathsep.join([str(Path(python or sys.executable).parent), os.environ.get("PATH", os.defpath)])
    path = shutil.which("mpiexec", path=folders)
    if path is None:
        return None
    family = _family(path)
    if family is Family.OPEN_MPI:
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return Mpiexec(path, family, "OMPI_COMM_WORLD_RANK", allowed if os.geteuid() == 0 else {})
    return Mpiexec(path, family)


@cache
def _family(path: str) -> Family:
    """Return the implementation that ``mpiexec --version`` reports: MPICH's prints HYDRA, Open MPI's its name."""
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Family.OTHER
    if "HYDRA" in told.stdout:
        return Family.MPICH
    return Family.OPEN_MPI if "Open MPI" in told.stdout or "OpenRTE" in told.stdout else Family.OTHER
