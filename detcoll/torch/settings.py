"""What a program may say about a process group beyond what torch asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from detcoll.topology import Topology


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the job that a process group opens, for ``pg_options`` of torch's functions; see `detcoll.init`.

    A group whose ranks are all in an open job becomes a group of that job. Where `detcoll.init` opened it, they must
    fit it; where another process group did, they are not used.
    """

    transport: str = "auto"
    topology: Topology | str | os.PathLike[str] | None = None
    reproducible: bool | None = None
