"""Libraries in C that stand in for those of a device."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("cc") or shutil.which("gcc")


def compiled(source: Path, library: Path) -> Path:
    """Compile ``source`` into ``library``, and return that."""
    assert COMPILER is not None
    subprocess.run([COMPILER, "-std=gnu11", "-Wall", "-Werror", "-fPIC", "-shared", "-o", library, source], check=True)
    return library
