"""The help of each command: its whole description, options in groups, examples that it accepts; and completion."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from detcoll.cli import COMMANDS, app, main
from detcoll.cli.examples import EXAMPLES
from detcoll.cli.splitting import keep_script_options

TIMEOUT_S = 100
COMPLETE = """
source "$1"
COMP_WORDS=(detcoll bench --transp) COMP_CWORD=2 COMP_LINE="detcoll bench --transp" COMP_POINT=22
_detcoll
echo "${COMPREPLY[@]}"
COMP_WORDS=(detcoll simu) COMP_CWORD=1 COMP_LINE="detcoll simu" COMP_POINT=12
_detcoll
echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_that_the_command_accepts(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    end = capsys.readouterr().out.rpartition("Examples:")[2]
    shown = [line.strip() for line in end.splitlines() if line.strip()]
    assert shown == list(EXAMPLES[command]), "each on one line, so that it can be copied"
    for line in shown:
        detcoll, *tokens = shlex.split(line)
        called, _, _ = app.parse_args(keep_script_options(tokens), exit_on_error=False, print_error=False)
        assert detcoll == "detcoll"
        assert called.__name__ == tokens[0]
    assert any(shlex.split(line)[1] == command for line in shown)


def test_help_begins_with_the_whole_description(capsys: pytest.CaptureFixture[str]) -> None:
    main(["lab", "--help"])
    assert "Sites reach each other over an emulated line only." in capsys.readouterr().out
    main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for command, summary in COMMANDS.items():
        assert f"{command} {summary}" in shown, "lists say it shortly, also once the command was called"


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("lab", ["Sites and lines", "What the lines promise, and what others do on them"]),
        ("bench", ["What is timed", "Sites and lines", "What the lines promise, and what others do on them"]),
        ("measure", ["Sites and lines", "How much is measured", "A synthetic iteration", "Results"]),
        ("plan", ["Sites and lines", "The collective", "An iteration of training"]),
        ("simulate", ["Lines and networks", "An iteration of training", "Results"]),
    ],
)
def test_options_come_in_groups(command: str, groups: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    shown = capsys.readouterr().out
    assert [group for group in groups if f"─ {group} ─" not in shown] == []


@pytest.mark.parametrize("command", ["run", "lab", "measure", "bench", "plan", "simulate"])
def test_nothing_is_rounded_to_a_whole_number(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    options = re.findall(r"│ (--[\w-]+)(?: -n)? INT", capsys.readouterr().out)
    for option in options:
        assert main([command, option, "2.5"]) == 2
        assert f"{option}: '2.5' is no whole number" in " ".join(capsys.readouterr().err.split())
    assert options


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    script, environ = tmp_path / "detcoll.bash", os.environ | {"HOME": str(tmp_path)}
    install = ["--install-completion", "--shell", "bash", "--output", str(script)]
    subprocess.run([sys.executable, "-m", "detcoll", *install], env=environ, timeout=TIMEOUT_S, check=True)
    assert str(script) in (tmp_path / ".bashrc").read_text()
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", str(script)],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=environ,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["--transport", "simulate"]
