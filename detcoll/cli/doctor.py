"""``detcoll doctor``: what this host lacks, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from detcoll.cli.terminal import output_console
from detcoll.doctor import Verdict, examine
from detcoll.errors import UsageError
from detcoll.job.flight import ask, running
from detcoll.outputs import require_writable, write_file
from detcoll.report.standing import findings, stands
from detcoll.topology import Topology

_STYLES = {Verdict.GOOD: "green", Verdict.CHANGE: "bold red", Verdict.NOTE: "yellow"}


def doctor(
    name: str | None = None,
    /,
    *,
    topology: Path | None = None,
    towards: tuple[str, ...] = (),
    json: Path | None = None,
    job: bool = False,
) -> int:
    """Look at this host's buffers, clocks, scheduling and transports, and say what to change.

    The exit code is 1 where something should be changed.

    Parameters
    ----------
    name
        With --job, the name of one job, where several run.
    topology
        The topology file whose lines this host is to serve; a line of 1 Gbit/s over 20 ms is assumed without.
    towards
        Other hosts: try which size of packets reaches them. May be given several times; takes some seconds each where
        large packets vanish.
    json
        File for what was found.
    job
        Instead, ask the ranks that run on this host as this user where they stand, and let each write its flight
        record. Ranks in other network namespaces are not found.
    """
    require_writable(json, "json")
    if job:
        if topology is not None:
            raise UsageError("--topology means nothing with --job")
        if towards:
            raise UsageError("--towards means nothing with --job")
        return _ask_job(json, name)
    if name is not None:
        raise UsageError(f"{name!r} means nothing without --job, which takes the name of a job")
    found = examine(None if topology is None else Topology.from_file(topology), towards=towards)
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


def _ask_job(json: Path | None, wanted: str | None) -> int:
    """Ask the ranks on this host, all or those of one job; the exit code is 1 where there is none."""
    jobs: dict[str, list[dict[str, Any]]] = {}
    for record in map(ask, running()):
        if record is not None:
            jobs.setdefault(record["job"], []).append(record)
    names = ", ".join(sorted(jobs))
    if wanted is not None:
        jobs = {name: ranks for name, ranks in jobs.items() if name == wanted}
    if json is not None:
        write_file(json, msgspec.json.encode([record for ranks in jobs.values() for record in ranks]))
    if not names:
        print("No rank of detcoll runs on this host as this user.")
        return 1
    if not jobs:
        print(f"No rank of job {wanted} runs on this host as this user; there are ranks of {names}.")
        return 1
    console = output_console()
    if len(jobs) > 1:
        text = f"Ranks of {len(jobs)} jobs run here: {names}. For one of them: detcoll doctor --job NAME"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    for name, ranks in sorted(jobs.items()):
        console.print(f"job {name}", highlight=False, markup=False)
        console.print(standing_table(sorted(ranks, key=lambda record: int(record["rank"]))))
        for sentence in findings(ranks):
            console.print(sentence, soft_wrap=True, highlight=False, markup=False)
    return 0


def standing_table(records: list[dict[str, Any]]) -> Table:
    """Return where each rank stands in each group."""
    table = Table("group", "rank", "calls", "doing")
    for stand in stands(records):
        doing = f"failed: {stand.failure}" if stand.failure else stand.doing
        table.add_row(Text(stand.group), str(stand.rank), str(stand.latest + 1), Text(doing))
    return table
