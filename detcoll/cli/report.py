"""``detcoll report``: pictures of what earlier runs left behind."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from detcoll.cli.doctor import standing_table
from detcoll.cli.terminal import error_console, output_console
from detcoll.draw import chrome_trace
from detcoll.errors import UsageError
from detcoll.outputs import require_folder, require_writable, write_file
from detcoll.report import ReportInputs, gather, write_report
from detcoll.report.flight_recorder import write_dumps
from detcoll.report.standing import findings, read_records, recorded_jobs


def report(
    *files: Path,
    out: Path | None = None,
    svg: bool = False,
    perfetto: Path | None = None,
    topology: Path | None = None,
    torch: Path | None = None,
) -> int:
    """Make a page of pictures from result files and traces, or a trace that Perfetto opens.

    Parameters
    ----------
    files
        Files of measure, bench and simulate --json, traces of ranks (DETCOLL_TRACE), folders of these, topology files,
        and TOML files whose sites have a latitude and a longitude. A file given twice is shown once. Or one folder of
        flight records (record0.json and so on): then nothing is drawn, and what the records say about a job that failed
        or hangs is printed. Of a folder with such folders of several jobs, the jobs are listed.
    out
        Directory for report.html; "report" unless given, and not made where only --perfetto is asked for.
    svg
        Also write each picture as an SVG file of its own into that directory.
    perfetto
        File for the traces in the Chrome trace format, to be opened at ui.perfetto.dev; a track for every rank and for
        every line.
    topology
        Topology file that names the sites of the traces and tells their delays.
    torch
        Directory for the flight records of a job in the form of PyTorch's flight recorder; compare them with
        "torchfrtrace DIRECTORY".
    """
    if not files:
        raise UsageError("FILES are missing; expected result files, traces or folders of them")
    require_writable(perfetto, "perfetto")
    if len(files) == 1 and files[0].is_dir() and any(files[0].glob("record*.json")):
        _print_records(files[0])
        if torch is not None:
            write_dumps(torch, read_records(files[0]))
            print(f"torchfrtrace {torch}")
        return 0
    if torch is not None:
        raise UsageError(f"torch={str(torch)!r} takes one folder of flight records (record0.json and so on)")
    if len(files) == 1 and files[0].is_dir() and any(files[0].glob("*/record*.json")):
        _print_jobs(files[0])
        return 0
    folder = Path("report") if out is None and (svg or perfetto is None) else out
    require_folder(folder, "out")
    inputs = gather(files, topology)
    for remark in inputs.remarks:
        error_console().print(remark, soft_wrap=True, highlight=False)
    if perfetto is not None:
        _write_perfetto(perfetto, inputs)
    if folder is not None:
        print(write_report(folder, inputs, svg))
    return 0


def _write_perfetto(path: Path, inputs: ReportInputs) -> None:
    if len(inputs.traced) != 1:
        names = ", ".join(run.name for run in inputs.traced) or "none"
        raise UsageError(f"perfetto={str(path)!r} takes the traces of one run; found {names}")
    trace = chrome_trace(inputs.traced[0].traces, inputs.site_names)
    write_file(path, msgspec.json.encode(trace))
    print(path)


def _print_jobs(folder: Path) -> None:
    """List the jobs that left records in this folder, and say how to see one."""
    jobs = recorded_jobs(folder)
    if not jobs:
        raise UsageError(f"{str(folder)!r} has no job whose flight records can be read")
    table = Table("job", "first record", "records", "reason of the first")
    for job in jobs:
        time = datetime.fromtimestamp(job.at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        ranks = f"{len(job.ranks)} of {job.size} ranks ({', '.join(map(str, job.ranks))})"
        table.add_row(Text(job.folder.name), time, ranks, Text(job.reason))
    console = output_console()
    console.print(table)
    text = f"Each job has a folder of its own. Give one to see where its ranks stood: detcoll report {jobs[0].folder}"
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _print_records(folder: Path) -> None:
    """Print where the ranks of a job stood, and what does not fit."""
    records = read_records(folder)
    console = output_console()
    console.print(standing_table(records))
    for sentence in findings(records):
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)
