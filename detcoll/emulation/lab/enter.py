"""Started by an MPI launcher in place of a rank: enters the site's namespace, then becomes the rank's program.

It runs as a plain file (``python -I -S enter.py PLACEMENT -- COMMAND ...``) and imports nothing of detcoll, so that it
costs no more than the interpreter's start. PLACEMENT is the path of a JSON object: the launcher's variable that
holds the rank, the paths of each site's namespaces, each rank's site and variables. What the launcher left open for
the rank stays open.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

_ANY_KIND = 0


def main(arguments: list[str]) -> int:
    """Enter and execute; returns only if it fails."""
    with open(arguments[0], "rb") as file:
        placement = json.load(file)
    command = arguments[2:]
    rank = int(os.environ[placement["rank_variable"]])
    own = placement["ranks"][rank]
    directory = os.getcwd()
    library = ctypes.CDLL(None, use_errno=True)
    for path in placement["namespaces"][own["site"]]:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if library.setns(namespace, _ANY_KIND) != 0:
            print(f"rank {rank} cannot enter its site: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
            return 126
    os.environ.update(own["environment"])
    try:
        os.chdir(directory)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]!r} cannot be started: {error.strerror}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
