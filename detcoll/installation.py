"""The command that installs an optional part, in the way in which detcoll itself was installed.

Installers record where a package came from in ``direct_url.json`` (PEP 610); nothing is recorded of one that came from
an index.
"""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAME = "detcoll"


def install_command(extra: str) -> str:
    """Return the command that installs what an extra of detcoll brings; it works as printed.

    Parameters
    ----------
    extra : str
        Name of the extra, such as ``"mpi"``.

    Returns
    -------
    command : str
        ``pip install "detcoll[mpi]"`` where detcoll came from an index, ``pip install -e ".[mpi]"`` where it is an
        editable install of the current directory. Another directory is named by its path, and an archive or a version
        control system by its URL. Where what was installed is gone, the index is named.
    """
    try:
        recorded = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        recorded = None
    return f"pip install {_what({} if recorded is None else json.loads(recorded), extra)}"


def _what(origin: dict[str, Any], extra: str) -> str:
    """Return what to install, as arguments of pip."""
    from urllib.request import url2pathname  # it brings HTTP and TLS, which no call needs

    url = origin.get("url", "")
    path = Path(url2pathname(urlsplit(url).path)) if url.startswith("file:") else None
    if not url or (path is not None and not path.exists()):
        return _quoted(f"{NAME}[{extra}]")
    if path is not None and "dir_info" in origin:
        option = "-e " if origin["dir_info"].get("editable") else ""
        return option + _quoted(f"{'.' if os.path.samefile(path, '.') else path}[{extra}]")
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return _quoted(f"{NAME}[{extra}] @ {url}")


def _quoted(text: str) -> str:
    """Return ``text`` for a shell, in double quotes: brackets are patterns in some."""
    return '"' + re.sub(r'(["\\$`])', r"\\\1", text) + '"'
