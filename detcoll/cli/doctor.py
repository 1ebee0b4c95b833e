"""``detcoll doctor``: what this host lacks, and what to change."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.table import Table

from detcoll.cli.terminal import output_console
from detcoll.doctor import Verdict, examine
from detcoll.outputs import require_writable, write_file
from detcoll.topology import Topology

_STYLES = {Verdict.GOOD: "green", Verdict.CHANGE: "bold red", Verdict.NOTE: "yellow"}


def doctor(*, topology: Path | None = None, json: Path | None = None) -> int:
    """Look at this host's buffers, clocks, scheduling and transports, and say what to change.

    The exit code is 1 where something should be changed.

    Parameters
    ----------
    topology
        The topology file whose lines this host is to serve; a line of 1 Gbit/s over 20 ms is assumed without.
    json
        File for what was found.
    """
    require_writable(json, "json")
    found = examine(None if topology is None else Topology.from_file(topology))
    if json is not None:
        write_file(json, msgspec.json.encode({"schema": "detcoll.doctor/1", "findings": found}))
    table = Table("what", "found", "")
    for one in found:
        table.add_row(one.name, one.value, one.verdict.value, style=_STYLES[one.verdict])
    console = output_console()
    console.print(table)
    for one in found:
        if one.advice:  # below, on lines of their own, so that commands can be copied
            console.print(f"{one.name}: {one.advice}", style=_STYLES[one.verdict], soft_wrap=True)
    return 1 if any(one.verdict is Verdict.CHANGE for one in found) else 0
