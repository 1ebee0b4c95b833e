"""Errors of ranks: equal ones are told once, all others each, and nothing that ranks print is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest

from detcoll.errors import UsageError
from detcoll.launch.forwarding import Forwarder
from detcoll.launch.reports import HOLD_NS, Reports, begin_of_report, report_bytes
from detcoll.rendezvous.sockets import parse_ports
from detcoll.uncaught import describe

TRACEBACK = b'Traceback (most recent call last):\n  File "x.py", line 3, in <module>\n    f()\n    ^^^\nKeyError: 1\n'
CHAINED = TRACEBACK + b"\nDuring handling of the above exception, another exception occurred:\n\n" + TRACEBACK
GROUP = b"  + Exception Group Traceback (most recent call last):\n  | ExceptionGroup: both\n  +----\n"
SYNTAX = b'Traceback (most recent call last):\n  File "x.py", line 1\n    f(\n     ^\nSyntaxError: never closed\n'


@pytest.mark.parametrize("report", [TRACEBACK, CHAINED, SYNTAX, GROUP, b"detcoll: UsageError: no\n"])
def test_a_report_ends_with_the_line_that_names_the_exception(report: bytes) -> None:
    after = b"" if report is GROUP else b"more\n  of it\n"
    assert begin_of_report(b"before\n" + report, 0, 7 + len(report)) == 7
    assert report_bytes(report + after) == len(report)
    assert report_bytes(report[:-1]) == len(report) - 1


@pytest.mark.parametrize("line", [b"loss 0.3\n", b" detcoll: x\n", b"detcoll WARNING: x\n", b"see Traceback (most\n"])
def test_other_lines_are_no_reports(line: bytes) -> None:
    assert begin_of_report(line, 0, len(line)) == -1


def held(texts: Sequence[bytes], *, size: int = 4) -> Reports:
    reports = Reports(size)
    for rank, text in enumerate(texts):
        reports.begin(rank, rank)
        reports.add(rank, text)
    return reports


@pytest.mark.parametrize(
    ("texts", "size", "notes"),
    [
        ([TRACEBACK] * 4, 4, ["all 4 ranks"]),
        ([TRACEBACK] * 3, 4, ["ranks 0, 1, 2"]),
        ([TRACEBACK, SYNTAX, TRACEBACK], 3, ["ranks 0, 2", "rank 1"]),
        ([TRACEBACK] * 20, 32, ["ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 4 more"]),
    ],
)
def test_equal_reports_are_one_and_different_ones_are_all_told(texts: list[bytes], size: int, notes: list[str]) -> None:
    told = held(texts, size=size).take(2 * HOLD_NS)
    assert [one.note for one in told] == notes
    assert [one.text for one in told] == list(dict.fromkeys(texts))


def test_reports_wait_for_their_equals_and_no_longer() -> None:
    reports = held([TRACEBACK, SYNTAX])
    assert reports.next_ns() == HOLD_NS
    assert not reports.take(HOLD_NS - 1)
    assert [one.ranks for one in reports.take(HOLD_NS)] == [(0,)]
    assert reports.holds(1)
    assert not reports.holds(0)
    assert [one.ranks for one in reports.take(0, everything=True)] == [(1,)]


def test_the_first_to_fail_is_told_first() -> None:
    reports = Reports(3)
    for rank, text in ((2, TRACEBACK), (0, SYNTAX), (1, SYNTAX)):
        reports.begin(rank, 10 - rank)
        reports.add(rank, text)
    reports.begin(2, 0)
    reports.add(2, TRACEBACK)
    assert [one.ranks for one in reports.take(HOLD_NS, everything=True)] == [(2,), (0, 1)]


def test_a_late_equal_is_named_by_its_last_line_and_a_repeated_one_is_told_whole() -> None:
    reports = held([TRACEBACK] * 2, size=3)
    reports.take(HOLD_NS)
    assert not reports.all_alike
    for rank, line in ((2, b"KeyError: 1 (rank 2 too)\n"), (0, TRACEBACK[:-1] + b" (rank 0)\n")):
        reports.begin(rank, 0)
        reports.add(rank, TRACEBACK)
        assert [one.line for one in reports.take(HOLD_NS)] == [line]
    assert reports.all_alike


def test_what_follows_a_report_is_told_once_where_it_is_equal_and_final() -> None:
    reports = held([TRACEBACK + b"bye\n"] * 2, size=2)
    reports.over(0)
    assert [one.after for one in reports.take(HOLD_NS)] == [((0, b"bye\n"), (1, b"bye\n"))]
    reports = held([TRACEBACK + b"bye"] * 2, size=2)
    reports.over(0)
    reports.over(1)
    assert [one.after for one in reports.take(HOLD_NS)] == [((0, b"bye\n"),)]


@contextmanager
def forwarded(size: int, tags: Sequence[str] = ()) -> Iterator[tuple[list[int], list[int], BytesIO, Forwarder]]:
    """Give what ranks write to as standard output and standard error, and what comes out of the latter in the end."""
    out, err = BytesIO(), BytesIO()
    outs: list[int] = []
    errs: list[int] = []
    with Forwarder(out, err, size) as forwarder:
        for rank in range(size):
            with forwarder.channels(tags[rank] if tags else "") as (stdout, stderr):
                outs.append(os.dup(stdout))
                errs.append(os.dup(stderr))
        forwarder.begin()
        yield outs, errs, err, forwarder
        for end in (*outs, *errs):
            os.close(end)


def test_the_forwarder_tells_equal_errors_once() -> None:
    with forwarded(3) as (_, errs, err, forwarder):
        for one in errs:
            os.write(one, b"loading\n" + TRACEBACK)
        forwarder.note("first failure seen: rank 1")
    assert err.getvalue() == b"loading\n" * 3 + TRACEBACK[:-1] + b" (all 3 ranks)\n"


def test_the_forwarder_tells_the_first_failure_where_ranks_differ() -> None:
    with forwarded(2) as (_, errs, err, forwarder):
        os.write(errs[1], b"detcoll: UsageError: no\n")
        forwarder.note("first failure seen: rank 1")
    assert err.getvalue() == b"detcoll: UsageError: no (rank 1)\ndetcoll: first failure seen: rank 1\n"


def test_a_failure_without_a_report_is_told_at_once() -> None:
    reading, writing = os.pipe()
    with open(writing, "wb", buffering=0) as err, Forwarder(BytesIO(), err, 2) as forwarder:
        with forwarder.channels() as (_, stderr):
            kept = os.dup(stderr)
        forwarder.begin()
        forwarder.note("first failure seen: rank 1")
        assert os.read(reading, 100) == b"detcoll: first failure seen: rank 1\n"
        os.close(kept)
    os.close(reading)


def test_tags_name_all_who_failed() -> None:
    with forwarded(3, ["<0> ", "<1> ", "<2> "]) as (_, errs, err, _forwarder):
        os.write(errs[0], b"detcoll: no\nand more\n")
        os.write(errs[1], b"detcoll: other\n")
        os.write(errs[2], b"detcoll: no\n")
    lines = err.getvalue().splitlines()
    assert sorted(lines) == [b"<0> and more", b"<1> detcoll: other", b"[ranks 0, 2] detcoll: no"]


def test_a_rank_that_lives_on_prints_on() -> None:
    """Its error was caught and shown, and what it prints behind comes out whole and in order."""
    reading, writing = os.pipe()
    with open(writing, "wb", buffering=0) as err, Forwarder(BytesIO(), err, 2) as forwarder:
        ends = []
        for _ in range(2):
            with forwarder.channels() as (_, stderr):
                ends.append(os.dup(stderr))
        forwarder.begin()
        os.write(ends[0], TRACEBACK + b"go")
        expected = TRACEBACK[:-1] + b" (rank 0)\n"
        came = b""
        while len(came) < len(expected):
            came += os.read(reading, 1000)
        os.write(ends[0], b"ing on\n")
        while not came.endswith(b"going on\n"):
            came += os.read(reading, 1000)
        assert came == expected + b"going on\n"
        for end in ends:
            os.close(end)
    os.close(reading)


def test_standard_output_and_a_single_rank_are_left_as_they_are() -> None:
    out, err = BytesIO(), BytesIO()
    for size in (1, 2):
        with Forwarder(out, err, size) as forwarder:
            with forwarder.channels() as (stdout, stderr):
                for end in (stdout, stderr) if size == 1 else (stdout,):
                    os.write(end, TRACEBACK)
            forwarder.begin()
    assert (out.getvalue(), err.getvalue()) == (TRACEBACK * 2, TRACEBACK)


PROGRAM = """
import sys
import numpy as np
import detcoll
kind = sys.argv[1]
if kind == "open":
    detcoll.init("nosuch")
comm = detcoll.init(timeout=60)
if kind == "call":
    detcoll.all_reduce(np.ones(3), op="nosuch")
if kind == "user":
    raise ValueError("of the user")
if kind == "different":
    raise ValueError(f"of {comm.rank}")
if kind == "partial" and comm.rank == 2:
    raise ValueError("of one")
detcoll.barrier()
"""


def ended(tmp_path: Path, kind: str, **environ: str) -> list[str]:
    """Return what the ranks of a job of three say on standard error before it fails."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "detcoll", "run", "-n", "3", str(script), kind],
        env=os.environ | environ, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize(("kind", "line", "text"), [("open", 7, "transport='nosuch'"), ("call", 10, "op='nosuch'")])
def test_a_mistake_of_all_ranks_is_one_line(kind: str, line: int, text: str, tmp_path: Path) -> None:
    told = ended(tmp_path, kind)
    said = [one for one in told if text in one]
    assert said[0].startswith(f"detcoll: UsageError in {tmp_path}/script.py, line {line}: ")
    assert re.search(r"\((all 3 ranks|ranks? [\d, ]+)\)$", said[0])
    assert all(one.endswith(" too)") for one in said[1:]), "a rank that fails a second later is told as well"
    assert "Traceback" not in "".join(told)


def test_a_users_error_keeps_its_traceback_once(tmp_path: Path) -> None:
    told = ended(tmp_path, "user")
    assert sum("Traceback" in line for line in told) == 1
    last = [line for line in told if line.startswith("ValueError: of the user (")]
    assert {int(rank) for line in last for rank in re.findall(r"\d+", line.replace("all 3", "0 1 2"))} == {0, 1, 2}


def test_different_errors_are_all_told(tmp_path: Path) -> None:
    told = ended(tmp_path, "different")
    assert {f"ValueError: of {rank} (rank {rank})" for rank in range(3)} <= set(told)


def test_an_error_of_one_rank_is_told_beside_what_it_means_for_the_others(tmp_path: Path) -> None:
    told = ended(tmp_path, "partial")
    assert "ValueError: of one (rank 2)" in told
    others = [line for line in told if "rank 2 gave up: its program ended: ValueError: of one" in line]
    assert others
    assert any(line.startswith("detcoll: first failure seen: rank ") for line in told)


def test_debugging_shows_the_traceback_of_every_rank(tmp_path: Path) -> None:
    told = ended(tmp_path, "open", DETCOLL_LOG="debug")
    assert sum(line.startswith("detcoll.errors.UsageError: rank 0 could not load nosuch") for line in told) == 3


def test_the_line_named_is_the_programs() -> None:
    with pytest.raises(UsageError) as caught:
        parse_ports("x")
    trace = caught.value.__traceback__
    assert trace is not None
    where = f"{os.path.relpath(__file__)}, line {trace.tb_lineno}"
    assert describe(caught.value, trace) == f"detcoll: UsageError in {where}: {caught.value}"
    assert describe(caught.value, None) == f"detcoll: UsageError: {caught.value}"


def test_a_hook_of_the_programs_own_is_left_alone() -> None:
    program = (
        "import sys, detcoll; sys.excepthook = lambda kind, *_: print('mine', kind.__name__); detcoll.init('nosuch')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "mine UsageError\n", "")
