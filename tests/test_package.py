"""What only packaging can lose: the command, the data files, and the mark that says the package is typed."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.resources import files

from detcoll.cli import main


def test_the_command_is_installed() -> None:
    [command] = entry_points(group="console_scripts", name="detcoll")
    assert command.load() is main


def test_data_files_are_there() -> None:
    assert files("detcoll").joinpath("py.typed").is_file(), "type checkers would ignore the package's types"
    scenarios = {file.name for file in files("detcoll.scenarios").iterdir() if file.name.endswith(".toml")}
    assert scenarios == {"two-cities.toml", "forty-cities.toml"}
