"""The Python snippets of the README: they satisfy a strict type checker, and run."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from jobs import environment

import detcoll

README = Path(__file__).resolve().parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL) if README.exists() else []
PACKAGES = Path(detcoll.__file__).parent.parent
TIMEOUT_S = 100

pytestmark = [
    pytest.mark.skipif(not README.exists(), reason="the README is not installed"),
    pytest.mark.timeout(120),
]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Each snippet in a file of its own."""
    written = [tmp_path / f"snippet{number}.py" for number in range(len(SNIPPETS))]
    for file, snippet in zip(written, SNIPPETS, strict=True):
        file.write_text(snippet, encoding="utf-8")
    assert len(written) >= 2, "the README has lost its snippets, or they are not found any more"
    return written


def succeed(*command: str, folder: Path, more: dict[str, str] | None = None) -> None:
    ended = subprocess.run(
        command, cwd=folder, env=environment(more), timeout=TIMEOUT_S, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_snippets_satisfy_a_strict_type_checker(files: list[Path], tmp_path: Path) -> None:
    # mypy finds what is installed by itself, and refuses to be told where that is.
    where = {} if PACKAGES.name == "site-packages" else {"MYPYPATH": str(PACKAGES)}
    names = [file.name for file in files]
    succeed(
        sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", *names, folder=tmp_path, more=where
    )  # fmt: skip


@pytest.mark.parametrize("launcher", [(), ("-m", "detcoll", "run", "-n", "4", "--sites", "2")], ids=["alone", "ranks"])
def test_snippets_run(files: list[Path], tmp_path: Path, launcher: tuple[str, ...]) -> None:
    for file in files:
        succeed(sys.executable, *launcher, file.name, folder=tmp_path, more={"DETCOLL_RECORD": "off"})
