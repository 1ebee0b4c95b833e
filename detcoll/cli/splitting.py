"""The program that ``detcoll run`` and ``detcoll lab`` start: where it begins, and what each rank executes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from detcoll.errors import UsageError

FLAGS = frozenset(
    {
        "--help", "-h", "--version", "--tag-output", "--no-tag-output", "--mpi", "--no-mpi", "--prefix", "--no-prefix",
        "--relay", "--no-relay", "--slow-start-after-idle", "--no-slow-start-after-idle", "--empty-failure",
    }
)  # fmt: skip
"""Options of both commands that have no value behind them."""


def keep_script_options(tokens: Sequence[str]) -> list[str]:
    """Return the arguments of ``detcoll`` with ``--`` before the program of ``run`` or ``lab``, if there is none.

    What follows the program, or ``-m module``, is then not read as options of the command, whatever it looks like.
    """
    found = list(tokens)
    if found[:1] not in (["run"], ["lab"]):
        return found
    index = 1
    while index < len(found):
        token = found[index]
        if token == "--":
            break
        if not token.startswith("-") or token == "-m":
            found.insert(index, "--")
            break
        has_value_apart = token not in FLAGS and "=" not in token and (token.startswith("--") or len(token) == 2)
        index += 2 if has_value_apart else 1
    return found


def executed(command: Sequence[str], name: str) -> list[str]:
    """Return what each rank executes for the COMMAND of ``detcoll NAME``.

    Raises
    ------
    UsageError
        If there is nothing to execute, or it is not here.
    """
    if not command:
        raise UsageError(f"{name} needs a SCRIPT, -m MODULE or a program to start")
    first = command[0]
    if first == "-m":
        if len(command) < 2:
            raise UsageError("-m needs the name of a module")
        return [sys.executable, *command]
    if first.startswith("-"):
        raise UsageError(f"{first!r} is no option of {name}; see detcoll {name} --help")
    if first.endswith(".py"):
        if not Path(first).is_file():
            raise UsageError(f"script {first!r} does not exist")
        return [sys.executable, *command]
    found = shutil.which(first)
    if found is None:
        raise UsageError(f"{first!r} is neither a Python script (.py) nor a program that can be run here")
    return [found, *command[1:]]
