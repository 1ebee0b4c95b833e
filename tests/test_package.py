"""What packaging can lose: the command, the data files, the mark of a typed package, and what docstrings name."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from pkgutil import resolve_name

import detcoll
from detcoll.cli import main


def test_the_command_is_installed() -> None:
    [command] = entry_points(group="console_scripts", name="detcoll")
    assert command.load() is main


def test_data_files_are_there() -> None:
    assert files("detcoll").joinpath("py.typed").is_file(), "type checkers would ignore the package's types"
    scenarios = {file.name for file in files("detcoll.scenarios").iterdir() if file.name.endswith(".toml")}
    assert scenarios == {"two-cities.toml", "forty-cities.toml"}


def test_what_docstrings_name_is_there() -> None:
    root = Path(detcoll.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in root.rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"`(detcoll(?:\.\w+)+)`", text)}
    for name in named - {"detcoll.transports"}:  # a group of entry points
        resolve_name(name)
    assert len(named) > 50
