"""Errors that several ranks report are written once, and nothing that a rank says is lost."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest

from detcoll.launch import forwarding, reports
from detcoll.launch.environment import rank_environments
from detcoll.launch.forwarding import Forwarder
from detcoll.launch.ranks import run_local
from detcoll.launch.reports import LARGEST_BYTES, VARIABLE, Reports

SHORT = b"detcoll: UsageError: no\n"
LONG = b"Traceback (most recent call last):\nValueError: no\n"


def test_an_error_of_all_ranks_is_written_once() -> None:
    told = Reports(3)
    assert told.take(2, SHORT) == b"detcoll: rank 2: UsageError: no\n"
    assert told.closing() is None
    assert [told.take(rank, SHORT) for rank in (0, 1)] == [None, None]
    assert told.closing() == "all 3 ranks reported the same error; DETCOLL_LOG=debug shows each report"


def test_reports_that_differ_are_all_written() -> None:
    told = Reports(4)
    assert told.take(0, LONG) == b"detcoll: rank 0:\n" + LONG
    assert told.take(1, LONG + b"\n") is not None
    assert told.take(2, SHORT) is not None
    assert told.take(3, LONG.replace(b"no", b"rank 0")) is not None
    assert told.closing() is None


def test_the_closing_line_names_who_said_what() -> None:
    told = Reports(9)
    for rank, text in enumerate((SHORT, LONG, SHORT, LONG, b"rank 4: no", b"rank 5: no", SHORT, b"rank 4: no")):
        told.take(rank, text)
    assert told.closing() == (
        "ranks 2, 6 reported the same as rank 0; rank 3 reported the same as rank 1; "
        "rank 7 reported the same as rank 4; rank 5 reported the same as rank 4, each with its own number; "
        "DETCOLL_LOG=debug shows each report"
    )


def test_reports_may_differ_in_the_number_of_their_own_rank_alone() -> None:
    told = Reports(12)
    assert told.take(1, b"rank 1 is behind rank 0") is not None
    assert told.take(2, b"rank 2 is behind rank 0") is None
    assert told.take(11, b"rank 11 is behind rank 0") is None
    assert told.take(3, b"rank 2 is behind rank 0") is not None, "of another rank"
    assert told.take(4, b"rank 4 is behind rank 3") is not None
    assert [told.take(rank, b"rank %d5 is behind" % rank) is None for rank in (5, 6)] == [False, False]
    assert [told.take(rank, b"frank %d is behind" % rank) is None for rank in (7, 8)] == [False, False]


def test_all_ranks_may_report_each_its_own_number() -> None:
    told = Reports(2)
    told.take(0, b"rank 0")
    told.take(1, b"rank 1")
    assert told.closing() == (
        "all 2 ranks reported the same error, each with its own number; DETCOLL_LOG=debug shows each report"
    )


def test_what_a_rank_repeats_is_written_again() -> None:
    told = Reports(2)
    assert [told.take(rank, SHORT) is not None for rank in (0, 1, 0)] == [True, False, True]
    assert [told.take(0, b"rank 0"), told.take(0, b"rank 0")] == [b"detcoll: rank 0:\nrank 0"] * 2


def test_a_tagged_report_stays_as_it_is() -> None:
    assert Reports(2).take(1, SHORT, is_tagged=True) == SHORT


def test_messages_that_are_none_are_kept_whole() -> None:
    assert [reports.parse(text, 3) for text in (b"2 a b", b"3 a", b"nothing", b" ")] == [
        (2, b"a b"), (0, b"3 a"), (0, b"nothing"), (0, b" ")
    ]  # fmt: skip


@contextmanager
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_report_reaches_the_launcher_whole() -> None:
    with sockets() as (ours, theirs):
        environ = reports.address(theirs.fileno(), 7, 2)
        os.set_inheritable(theirs.fileno(), True)
        assert reports.may_send(environ)
        assert not theirs.get_inheritable()
        text = b"x" * (LARGEST_BYTES - 2)
        assert reports.send(environ, text)
        assert reports.parse(ours.recv(LARGEST_BYTES), 8) == (7, text)


def test_a_report_that_the_launcher_cannot_have_is_left_to_print() -> None:
    with sockets() as (ours, theirs), open(os.devnull, "wb") as other:
        environ = reports.address(theirs.fileno(), 0, 2)
        assert not reports.send(environ, b"x" * (LARGEST_BYTES - 1)), "too long"
        assert not reports.send(reports.address(theirs.fileno(), 0, other.fileno()), b"x"), "stderr leads elsewhere"
        assert not reports.send(reports.address(other.fileno(), 0, 2), b"x"), "no socket"
        for text in ("", "x", "1", "1:2:3", f"0:{10**30}:1:1:1:1", "0:-1:1:1:1:1"):
            assert not reports.send({VARIABLE: text}, b"x")
        with socket.socket() as stranger:
            os.dup2(stranger.fileno(), theirs.fileno())
            assert not reports.send(environ, b"x"), "another file has the number now"
        assert ours.recv(1) == b"", "nothing came before the end"
    with sockets() as (ours, theirs):
        ours.close()
        assert not reports.send(reports.address(theirs.fileno(), 0, 2), b"x"), "the launcher is gone"


@contextmanager
def forwarded(*tags: str) -> Iterator[tuple[list[int], list[dict[str, str]], int, Forwarder]]:
    """Give what processes with these tags print and report to, and what comes out."""
    reading, writing = os.pipe()
    ends, addresses = [], []
    with open(writing, "wb", buffering=0) as out, Forwarder(out, out) as forwarder:
        for tag in tags:
            with forwarder.channels(tag) as (_, stderr):
                descriptor, _ = forwarder.reporting(stderr, tag)
                ends.append(os.dup(stderr))
        reported = os.dup(descriptor)
        addresses = [reports.address(reported, rank, 2) for rank in range(len(tags))]
        forwarder.begin()
        try:
            yield ends, addresses, reading, forwarder
        finally:
            for end in (*ends, reported):
                os.close(end)


def read_all(reading: int) -> bytes:
    with open(reading, "rb") as rest:
        return rest.read()


def read_to(reading: int, end: bytes) -> bytes:
    """Return what is read up to ``end``, while the processes still have their outputs open."""
    data = b""
    while not data.endswith(end):
        data += os.read(reading, 1)
    return data


def test_what_a_process_printed_comes_before_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "_IDLE_S", 3600)
    with forwarded("", "") as (ends, addresses, reading, _):
        os.write(ends[0], b"step 1\nstep 2")
        os.write(ends[1], b"other")
        reports.send(addresses[0], SHORT)
        assert read_to(reading, b": no\n") == b"step 1\nstep 2\ndetcoll: rank 0: UsageError: no\n"
        reports.send(addresses[1], SHORT)
    assert read_all(reading) == (
        b"other\ndetcoll: all 2 ranks reported the same error; DETCOLL_LOG=debug shows each report\n"
    )


def test_a_report_is_written_at_once_and_output_goes_on() -> None:
    with forwarded("", "") as (ends, addresses, reading, _):
        reports.send(addresses[1], LONG)
        assert os.read(reading, 1000) == b"detcoll: rank 1:\n" + LONG
        os.write(ends[1], b"on\n")
        assert os.read(reading, 1000) == b"on\n"
    assert read_all(reading) == b""


def test_tags_mark_every_line_of_a_report() -> None:
    with forwarded("<0> ", "<1> ") as (_, addresses, reading, _):
        reports.send(addresses[1], LONG)
    assert read_all(reading) == b"<1> Traceback (most recent call last):\n<1> ValueError: no\n"


def test_what_is_no_report_is_written_too() -> None:
    with forwarded("", "") as (_, addresses, reading, _):
        os.write(int(addresses[0][VARIABLE].split(":")[1]), b"stray")
    assert read_all(reading) == b"detcoll: rank 0:\nstray\n"


def test_an_exit_that_its_process_explained_is_not_told_again() -> None:
    with forwarded("", "") as (_, addresses, reading, forwarder):
        reports.send(addresses[1], SHORT)
        forwarder.say("rank 1 exited", 1)
        forwarder.say("rank 0 exited", 0)
        forwarder.say("rank 1 ended")
    assert read_all(reading) == b"detcoll: rank 1: UsageError: no\ndetcoll: rank 0 exited\ndetcoll: rank 1 ended\n"


def test_messages_are_lines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "_IDLE_S", 3600)
    with forwarded("") as (ends, _, reading, forwarder):
        os.write(ends[0], b"x" * 70_000)  # more than is held
        came = os.read(reading, 65_536)
        forwarder.say("it is over")
        while not came.endswith(b"over\n"):
            came += os.read(reading, 65_536)
    assert came == b"x" * 70_000 + b"\ndetcoll: it is over\n"
    os.close(reading)


PROGRAM = """
import os, select, sys
from pathlib import Path
import detcoll

def meet():
    Path(os.environ["RANK"] + ".here").touch()
    while len(list(Path().glob("*.here"))) < 3:
        select.select([], [], [], 0.01)

kind = sys.argv[1]
if kind == "early":
    meet()
    raise KeyError("before init")
if kind == "open":
    meet()
    detcoll.init("nosuch")
comm = detcoll.init(timeout=60)
meet()
if kind == "call":
    detcoll.Topology.from_file("nosuch.toml")
if kind == "user":
    print("a line without an end", end="")
    raise ValueError("of the user")
if kind == "different":
    raise ValueError(f"of {comm.rank}")
if kind == "replaced":
    sys.stderr = sys.stdout
    raise ValueError("of the user")
if kind == "one" and comm.rank == 2:
    raise ValueError("of one")
if kind == "exit" and comm.rank == 2:
    sys.exit(1)
detcoll.barrier()
"""


def launched(tmp_path: Path, *command: str, **environ: str) -> tuple[list[str], list[str]]:
    """Return what a job of three ranks, which fails, writes to standard output and standard error."""
    (tmp_path / "script.py").write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "detcoll", "run", "-n", "3", *command],
        env=os.environ | environ, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    return done.stdout.splitlines(), done.stderr.splitlines()


ALL = "detcoll: all 3 ranks reported the same error; DETCOLL_LOG=debug shows each report"


@pytest.mark.parametrize(("kind", "line", "text"), [("open", 17, "transport='nosuch'"), ("call", 21, "nosuch.toml")])
def test_a_mistake_of_all_ranks_is_one_line(kind: str, line: int, text: str, tmp_path: Path) -> None:
    _, [told, closing] = launched(tmp_path, "script.py", kind)
    assert re.match(rf"detcoll: rank [012]: UsageError in script.py, line {line}: .*{text}", told)
    assert closing == ALL


@pytest.mark.parametrize(("kind", "last"), [("user", "ValueError: of the user"), ("early", "KeyError: 'before init'")])
def test_an_exception_of_the_program_of_all_ranks_is_one_traceback(kind: str, last: str, tmp_path: Path) -> None:
    out, told = launched(tmp_path, "script.py", kind)
    assert re.fullmatch(r"detcoll: rank [012]:", told[0])
    assert told[1] == "Traceback (most recent call last):"
    assert told[-2:] == [last, ALL]
    assert len(told) < 8
    assert out == ["a line without an end"] * (3 if kind == "user" else 0)


def test_different_errors_are_all_told(tmp_path: Path) -> None:
    _, told = launched(tmp_path, "script.py", "different")
    assert sorted(line for line in told if line.startswith("ValueError")) == [f"ValueError: of {i}" for i in range(3)]
    assert not any("same" in line for line in told)


def test_an_error_of_one_rank_comes_first_and_what_it_means_for_the_others_once(tmp_path: Path) -> None:
    _, told = launched(tmp_path, "script.py", "one")
    assert told[0] == "detcoll: rank 2:"
    end = told.index("ValueError: of one")
    assert re.match(r"detcoll: rank [01]: .* rank 2 gave up: its program ended: ValueError: of one", told[end + 1])
    assert len(told) == end + 3
    assert re.search("rank 2 gave up|reported the same as rank [01]", told[end + 2])


def test_an_exit_without_a_report_is_told(tmp_path: Path) -> None:
    assert "detcoll: first failure seen: rank 2 exited with code 1" in launched(tmp_path, "script.py", "exit")[1]


def test_debugging_shows_the_traceback_of_every_rank(tmp_path: Path) -> None:
    _, told = launched(tmp_path, "script.py", "user", DETCOLL_LOG="debug")
    assert told.count("ValueError: of the user") == 3
    assert any(line.startswith("detcoll: first failure seen: rank ") for line in told)
    assert not any("reported" in line for line in told)


def test_reports_go_where_a_rank_has_directed_its_errors(tmp_path: Path) -> None:
    _, told = launched(tmp_path, "bash", "-c", f'"{sys.executable}" script.py user 2> $RANK.err')
    assert len(told) == 1
    assert "first failure seen" in told[0]
    for rank in range(3):
        assert (tmp_path / f"{rank}.err").read_text(encoding="utf-8").endswith("\nValueError: of the user\n")
    out, _ = launched(tmp_path, "script.py", "replaced")
    assert out.count("ValueError: of the user") == 3


def test_a_program_behind_a_shell_reports_too(tmp_path: Path) -> None:
    command = ("bash", "-c", f'"{sys.executable}" script.py user; exit 1')
    assert launched(tmp_path, *command)[1].count("ValueError: of the user") == 1


def test_a_process_that_a_rank_starts_prints_its_errors(tmp_path: Path) -> None:
    started = "[sys.executable, 'script.py', 'early']"
    program = f"import subprocess, sys, detcoll; sys.exit(subprocess.run({started}).returncode)"
    assert launched(tmp_path, sys.executable, "-c", program)[1].count("KeyError: 'before init'") == 3


def test_a_rank_whose_launcher_is_gone_prints_its_report(tmp_path: Path) -> None:
    program = "import detcoll; print('before'); raise KeyError('of the user')"
    with sockets() as (ours, theirs), (tmp_path / "err").open("wb") as err:
        environ = os.environ | reports.address(theirs.fileno(), 0, err.fileno())
        ours.close()
        subprocess.run(
            [sys.executable, "-c", program], env=environ, stdout=err, stderr=err, pass_fds=[theirs.fileno()],
            check=False, timeout=60,
        )  # fmt: skip
    told = (tmp_path / "err").read_text(encoding="utf-8").splitlines()
    assert told[:2] == ["before", "Traceback (most recent call last):"], "what was printed comes first"
    assert told[-1] == "KeyError: 'of the user'"
    assert len(told) == 4


def test_ranks_whose_output_goes_to_files_report_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stderr:
        buffer = BytesIO()

    (tmp_path / "script.py").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", Stderr)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "script.py", "user"]
    assert run_local(command, lambda meeting: rank_environments(3, os.environ, meeting), logs=tmp_path) == 1
    told = Stderr.buffer.getvalue().decode().splitlines()
    assert told.count("ValueError: of the user") == 1
    assert told[-1] == ALL
    assert [(tmp_path / f"rank{rank}.out").read_text() for rank in range(3)] == ["a line without an end"] * 3
