"""Errors of detcoll that a program does not catch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import detcoll
from detcoll.uncaught import describe

BEGIN = "import detcoll, numpy as np, os\ncomm = detcoll.init()\n"


def last_words(folder: Path, program: str, **environ: str) -> str:
    script = folder / "script.py"
    script.write_text(BEGIN + program)
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=_alone() | environ, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    return ended.stderr


def _alone() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DETCOLL_")}


WRONG = "comm.all_reduce('no array')\n"


def test_an_error_of_detcoll_is_one_line(tmp_path: Path) -> None:
    told = last_words(tmp_path, WRONG)
    assert told.startswith("detcoll: UsageError in script.py, line 3: x is a str; expected ")
    assert told.count("\n") == 1


def test_the_line_of_the_program_is_named_and_not_that_of_a_package_between(tmp_path: Path) -> None:
    program = "from unittest.mock import Mock\nMock(side_effect=comm.all_reduce)('no array')\n"
    assert " in script.py, line 4: " in last_words(tmp_path, program)


def test_a_package_is_named_where_the_program_has_no_line() -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - any error from inside a package
        json.loads("[")
    trace = raised.value.__traceback__
    assert trace is not None
    told = describe(detcoll.UsageError("mine"), trace.tb_next)
    assert re.fullmatch(r"detcoll: UsageError in \S+decoder\.py, line \d+: mine", told)


def test_its_traceback_is_shown_to_who_debugs(tmp_path: Path) -> None:
    assert "Traceback" in last_words(tmp_path, WRONG, DETCOLL_LOG="debug")


@pytest.mark.parametrize(
    "program",
    [
        f"try:\n    1 / 0\nfinally:\n    {WRONG}",
        f"try:\n    1 / 0\nexcept ZeroDivisionError:\n    {WRONG}",
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise detcoll.UsageError('mine') from error\n",
    ],
)
def test_an_exception_of_the_program_that_came_before_is_not_hidden(tmp_path: Path, program: str) -> None:
    told = last_words(tmp_path, program)
    assert "ZeroDivisionError: division by zero" in told
    assert "UsageError" in told


def test_notes_are_not_hidden(tmp_path: Path) -> None:
    program = f"try:\n    {WRONG}except detcoll.UsageError as error:\n    error.add_note('step 7')\n    raise\n"
    assert "step 7" in last_words(tmp_path, program)


def test_what_detcoll_turned_into_its_own_error_is_told_by_its_text(tmp_path: Path) -> None:
    program = "import detcoll.topology\ndetcoll.topology.Topology.from_file('nosuch.toml')\n"
    assert last_words(tmp_path, program).count("\n") == 1


def test_a_hook_of_the_program_is_kept(tmp_path: Path) -> None:
    hook = "import sys\nsys.excepthook = lambda *told: print('mine', file=sys.stderr)\n"
    program = f"{hook}detcoll.finalize()\ncomm = detcoll.init()\n{WRONG}"
    assert last_words(tmp_path, program) == "mine\n"
