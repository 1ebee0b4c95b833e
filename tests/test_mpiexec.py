"""Which MPI launcher is there, and what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from detcoll.emulation.lab.launch import _mpiexec
from detcoll.errors import TransportUnavailable
from detcoll.launch.mpiexec import Family, find_mpiexec


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a launcher in PATH that answers with a text when it is asked for its version; none beside this Python."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "elsewhere" / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def write(text: str) -> str:
        path = tmp_path / "mpiexec"
        path.write_text(f"#!/bin/sh\necho '{text}'\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_mpich(install) -> None:
    path = install("HYDRA build details:")
    found = find_mpiexec()
    assert found is not None
    assert (found.family, found.rank_variable, found.environment) == (Family.MPICH, "PMI_RANK", {})
    assert found.command(4) == [path, "-n", "4"]
    assert found.command("{n}", labelled=True) == [path, "-l", "-n", "{n}"]
    assert found.without_shared_memory("wan0")["UCX_NET_DEVICES"] == "wan0"
    assert found.files_in("/somewhere") == {}


@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_open_mpi(install, monkeypatch: pytest.MonkeyPatch, user: int, allowed: bool) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    path = install("mpiexec (Open MPI) 5.0.11")
    found = find_mpiexec()
    assert found is not None
    assert (found.family, found.rank_variable) == (Family.OPEN_MPI, "OMPI_COMM_WORLD_RANK")
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in found.environment) == allowed
    assert found.command(4) == [path, "--oversubscribe", "-n", "4"]
    assert found.command(4, labelled=True) == [path, "--oversubscribe", "--output", "rank", "-n", "4"]
    assert found.without_shared_memory("wan0")["OMPI_MCA_btl_tcp_if_include"] == "wan0"
    assert set(found.files_in("/somewhere").values()) == {"/somewhere"}


def test_another_launcher_cannot_be_used_in_a_lab(install) -> None:
    path = install("Intel(R) MPI Library")
    found = find_mpiexec()
    assert found is not None
    assert found.family is Family.OTHER
    with pytest.raises(TransportUnavailable, match=rf"{path} is neither MPICH nor Open MPI.*pip install"):
        _mpiexec()


def test_without_any(install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    assert find_mpiexec() is None
    with pytest.raises(TransportUnavailable, match=r"mpiexec is missing.*pip install .*\[mpi\]"):
        _mpiexec()
