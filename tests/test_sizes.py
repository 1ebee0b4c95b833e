"""No function of detcoll or of its transports is longer than a screen."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

LARGEST_LINES = 60
"""With signature and docstring."""

PACKAGES = ("detcoll", "detcoll_slotted", "detcoll_shm", "detcoll_mpi", "detcoll_gloo", "detcoll_tcp")


def _files() -> list[Path]:
    folders = [Path(folder) for name in PACKAGES for folder in find_spec(name).submodule_search_locations]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_functions_are_short() -> None:
    functions, long = 0, []
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                lines = node.end_lineno - node.lineno + 1
                if lines > LARGEST_LINES:
                    long.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    assert functions > 1000
    assert not long, "\n".join(long)
