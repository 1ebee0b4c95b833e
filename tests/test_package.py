"""What packaging can lose: the command, the data files, the mark of typed packages, and what texts name or advise."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, metadata
from importlib.resources import files
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from packaging.requirements import Requirement

import detcoll
from detcoll.cli import main
from detcoll.installation import install_command
from detcoll.registry import _NEEDS

COMMIT = "0123456789012345678901234567890123456789"


def sources() -> list[Path]:
    """The Python files of all packages of the wheel."""
    folders = [Path(str(files(package))) for package in packages()]
    return [path for folder in folders for path in folder.rglob("*.py")]


def packages() -> list[str]:
    own = [entry.module for entry in entry_points(group="detcoll.transports") if entry.dist.name == "detcoll"]
    return ["detcoll", *own]


def test_the_command_is_installed() -> None:
    [command] = entry_points(group="console_scripts", name="detcoll")
    assert command.load() is main


def test_data_files_are_there() -> None:
    scenarios = {file.name for file in files("detcoll.scenarios").iterdir() if file.name.endswith(".toml")}
    assert scenarios == {"two-cities.toml", "forty-cities.toml"}


def test_every_package_is_typed() -> None:
    assert len(packages()) == 6
    for package in packages():
        assert files(package).joinpath("py.typed").is_file(), f"type checkers would ignore the types of {package}"


def test_what_docstrings_name_is_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in Path(detcoll.__file__).parent.rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"`(detcoll(?:\.\w+)+)`", text)}
    for name in named - {"detcoll.transports"}:  # a group of entry points
        resolve_name(name)
    assert len(named) > 50


def test_what_is_for_torch_says_so_where_torch_is_missing() -> None:
    program = "import sys; sys.modules['torch'] = None; import detcoll.torch"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ImportError: torch is not installed; install it with: " in ended.stderr
    assert ended.returncode == 1


class _Installed:
    """A distribution that an installer has recorded the origin of."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self._origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._origin is None else json.dumps(self._origin)


def hint(monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None) -> str:
    monkeypatch.setattr("detcoll.installation.distribution", lambda name: _Installed(origin))
    return install_command("mpi")


def test_hints_follow_the_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hint(monkeypatch, None) == 'pip install "detcoll[mpi]"'
    clone, elsewhere, wheel = tmp_path / "a clone $1", tmp_path / "elsewhere", tmp_path / "detcoll-1-py3-none-any.whl"
    clone.mkdir()
    elsewhere.mkdir()
    wheel.touch()
    editable = {"url": clone.as_uri(), "dir_info": {"editable": True}}
    monkeypatch.chdir(clone)
    assert hint(monkeypatch, editable) == 'pip install -e ".[mpi]"'
    assert hint(monkeypatch, {"url": clone.as_uri(), "dir_info": {}}) == 'pip install ".[mpi]"'
    monkeypatch.chdir(elsewhere)
    said = hint(monkeypatch, editable)
    assert shlex.split(said)[:3] == ["pip", "install", "-e"]
    assert said.endswith('/a clone \\$1[mpi]"'), "the shell must not replace what it knows"
    told = hint(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    assert told == f'pip install "detcoll[mpi] @ {wheel.as_uri()}"'
    wheel.unlink()
    clone.rmdir()
    for gone in (editable, {"url": wheel.as_uri(), "archive_info": {}}):
        assert hint(monkeypatch, gone) == 'pip install "detcoll[mpi]"'


def test_hints_name_the_commit_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = {"url": "https://example.org/detcoll.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}
    [*_, requirement] = shlex.split(hint(monkeypatch, origin))
    assert Requirement(requirement).url == f"git+https://example.org/detcoll.git@{COMMIT}"


def test_hints_of_what_is_not_installed_name_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("detcoll.installation.distribution", missing)
    assert install_command("mpi") == 'pip install "detcoll[mpi]"'


def test_every_hint_is_made_in_one_place_and_names_an_extra() -> None:
    extras = {extra for _, extra in _NEEDS.values()}
    for path in sources():
        text = path.read_text(encoding="utf-8")
        extras.update(re.findall(r"install_command\([\"'](\w+)[\"']\)", text))
        by_hand = re.findall(r"(?<!``)pip install [^`\n]*\[", text)
        assert not by_hand or path.name == "installation.py", f"{path}: {by_hand} is not made by install_command"
    assert extras >= {"mpi", "gloo", "measure", "calendar", "cuda12", "cuda13"}
    assert extras <= set(metadata("detcoll").get_all("Provides-Extra") or ())
