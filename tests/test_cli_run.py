"""``detcoll run`` as users call it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from detcoll.cli import app, main
from detcoll.cli.splitting import FLAGS, keep_script_options
from detcoll.errors import ConnectError, UsageError

SHOW = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "DETCOLL_SITES",
         "DETCOLL_TOPOLOGY", "DETCOLL_TRANSPORT", "DETCOLL_RANK", "DETCOLL_WORLD_SIZE")
sys.stdout.write(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]) + "\\n")
"""

MEET = """
import os, sys, time
from detcoll.launch.launchers import read_environment
from detcoll.rendezvous import meet
deadline_ns = time.monotonic_ns() + 20 * 10**9
world = read_environment(os.environ)
session = meet(world, deadline_ns)
sys.stdout.write(f"{world.launcher} {session.exchange('x', b'%d' % world.rank, deadline_ns)}\\n")
session.close(deadline_ns)
"""


def detcoll(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "detcoll", *arguments],
        env=dict(os.environ) | dict(environ or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def script(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_ranks_meet_and_exchange(script) -> None:  # type: ignore[no-untyped-def]
    done = detcoll("run", "-n", "2", script(MEET))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["detcoll run [b'0', b'1']"] * 2


def test_environment_and_arguments_of_each_rank(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["-n", "9", "--topology", "x", "--", "--help"]
    done = detcoll("run", "-n", "4", "--sites=2", "--transport", "slotted", script(SHOW), *arguments)
    assert done.returncode == 0, done.stderr
    seen = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda one: one[1]["RANK"])
    for rank, (argv, environ) in enumerate(seen):
        assert argv == arguments
        assert environ == {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "DETCOLL_SITES": "2",
            "DETCOLL_TOPOLOGY": None,
            "DETCOLL_TRANSPORT": "slotted",
            "DETCOLL_RANK": str(rank),
            "DETCOLL_WORLD_SIZE": "4",
        }


def test_topology_and_threads_are_handed_on(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    topology = tmp_path / "two.toml"
    topology.write_text('[[site]]\nname = "a"\nranks = 1\n', encoding="utf-8")
    done = detcoll("run", "-n1", "--topology", str(topology), script(SHOW), environ={"OMP_NUM_THREADS": "5"})
    environ = json.loads(done.stdout)[1]
    assert (environ["DETCOLL_TOPOLOGY"], environ["OMP_NUM_THREADS"]) == (str(topology), "5")


def test_modules_and_programs_run_too() -> None:
    assert detcoll("run", "-n", "2", "-m", "timeit", "-n", "1", "-r", "1").stdout.count("1 loop") == 2
    assert detcoll("run", "-n", "2", "bash", "-c", "echo $RANK").stdout.split() in (["0", "1"], ["1", "0"])


def test_tagged_output() -> None:
    done = detcoll("run", "-n", "2", "--tag-output", "bash", "-c", "echo out; echo err >&2")
    assert sorted(done.stdout.splitlines()) == ["[rank 0] out", "[rank 1] out"]
    assert sorted(done.stderr.splitlines()) == ["[rank 0] err", "[rank 1] err"]


def test_lines_of_ranks_stay_apart_also_without_an_end() -> None:
    done = detcoll("run", "-n", "2", "bash", "-c", '[ $RANK = 0 ] && printf goodbye || printf "SURVIVOR 3"')
    assert sorted(done.stdout.splitlines()) == ["SURVIVOR 3", "goodbye"]


def test_one_rank_writes_to_our_own_output(tmp_path: Path) -> None:
    for ranks, is_ours in ((1, True), (2, False)):
        with (tmp_path / "out").open("w+b") as out:
            show = "import os; print(os.fstat(1).st_ino)"
            command = [sys.executable, "-m", "detcoll", "run", "-n", str(ranks), sys.executable, "-c", show]
            assert subprocess.run(command, stdout=out, check=False, timeout=60).returncode == 0
            out.seek(0)
            assert (int(out.readline()) == os.fstat(out.fileno()).st_ino) is is_ours


def test_ranks_see_a_terminal_where_there_is_one() -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 33, 111, 0, 0))
    show = "import os, sys; print(sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size(1).columns)"
    command = [sys.executable, "-m", "detcoll", "run", "-n", "2", sys.executable, "-c", show]
    running = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:
        while piece := terminal.read(4096):
            shown += piece
    assert running.wait(60) == 0
    assert shown.split(b"\r\n") == [b"True True 111"] * 2 + [b""]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "-n", "2", "echo", "hello"],
        ["run", "-n", "1", "--tag-output", "echo", "hello"],
        ["doctor"],
        ["--version"],
    ],
)
def test_an_output_that_cannot_be_written_is_one_line_and_a_closed_pipe_none(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "detcoll", *arguments]

    def run(shell: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            ["bash", "-c", f'"$@" {shell}', "-", *command], stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
        return done.returncode, done.stderr.splitlines()

    told = "detcoll: standard output cannot be written:"
    assert run("> /dev/full") == (1, [f"{told} No space left on device"])
    if arguments[0] != "doctor":  # which takes long, and writes as the others do
        assert run(">&-") == (1, [f"{told} Bad file descriptor"])
        assert run(">&- 2>&-") == (1, [])
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_output_that_nobody_writes_to_is_no_error() -> None:
    command = [sys.executable, "-m", "detcoll", "run", "-n", "2", "bash", "-c", "echo hello >&2"]
    done = subprocess.run(["bash", "-c", '"$@" >&- 2>/dev/null', "-", *command], check=False, timeout=60)
    assert done.returncode == 0


def test_ranks_of_a_closed_output_have_none_either() -> None:
    show = "import os, sys; sys.exit(0 if sys.stdout is None else 3)"
    command = [sys.executable, "-m", "detcoll", "run", "-n", "1", sys.executable, "-c", show]
    assert subprocess.run(["bash", "-c", '"$@" >&-', "-", *command], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(("last_words", "code"), [("exit 5", 5), ("kill -KILL $$", 128 + signal.SIGKILL)])
def test_a_failing_rank_ends_the_run_with_its_code(last_words: str, code: int) -> None:
    done = detcoll("run", "-n", "3", "bash", "-c", f"[ $RANK = 1 ] && {last_words}; sleep 1000")
    assert done.returncode == code
    assert "detcoll: first failure seen: rank 1" in done.stderr


def test_timeout() -> None:
    done = detcoll("run", "-n", "2", "--timeout", "200 ms", "sleep", "1000")
    assert done.returncode == 124
    assert "deadline reached; ending rank 0, rank 1" in done.stderr


def test_killing_the_launcher_kills_the_ranks() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-m", "detcoll", "run", "-n", "2", "bash", "-c", "sleep 1000 & echo $$; wait"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stdout is not None
    assert all(launcher.stdout.readline().strip().isdigit() for _ in range(2))
    launcher.kill()
    launcher.communicate(timeout=30)  # the output ends only when nobody holds it any more, grandchildren included


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-n", "0", "true"], "-n 0 must be a whole number from 1 to 65536"),
        (["-n", "2", "missing.py"], "script 'missing.py' does not exist"),
        (["-n", "2", "--transprt", "shm", "train.py"], "'--transprt' is no option of run"),
        (["-n", "2", "no-such-program-here"], "'no-such-program-here' is neither a Python script"),
        (["-n", "2"], "run needs a SCRIPT"),
        (["true"], "run needs the number of ranks to start, such as: detcoll run -n 2 train.py"),
        ([], "run needs the number of ranks to start, such as: detcoll run -n 2 train.py"),
        (["-n", "2", "-m"], "-m needs the name of a module"),
        (["-n", "4", "--sites", "3", "true"], "--sites 3 must divide the 4 ranks"),
        (["-n", "4", "--sites", "0", "true"], "--sites 0"),
        (["-n", "4", "--sites", "2", "--topology", "t", "true"], "exclude each other"),
        (["-n", "4", "--topology", "/nonexistent.toml", "true"], "topology='/nonexistent.toml' cannot be read"),
        (["-n", "2", "--transport", "pigeon", "true"], "transport='pigeon' is not known; expected auto or one of"),
        (["-n", "2", "--timeout", "5", "true"], "--timeout='5' has no unit; expected one of ns, us,"),
        (["-n", "2", "--timeout", "-5s", "true"], "--timeout='-5s' must not be negative"),
        (["-n", "2", "--timeout", "0 s", "true"], "--timeout='0 s' must be greater than zero"),
        (["-n", "2", "--timeout", "12 days", "true"], "--timeout='12 days' has the unknown unit 'days'"),
        (["-n", "2", "--timeout", "1e6 min", "true"], "--timeout='1e6 min' is too large; expected at most 1000000 s"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("detcoll: ")
    assert told in lines[0]


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("TRANSPORT", "pigeon", "transport='pigeon' is not known; expected auto or one of"),
        ("SLOTTING", "never", "slotting='never' must be one of"),
        ("DSCP", "99", "DETCOLL_DSCP='99'"),
        ("PORTS", "9-1", "DETCOLL_PORTS='9-1'"),
        ("PROXY", "somewhere", "DETCOLL_PROXY='somewhere'"),
        ("LOG", "loud", "DETCOLL_LOG='loud'"),
        ("SITES", "3", "DETCOLL_SITES='3'"),
        ("SITE", "moon", "rank 0 says it is in site 'moon'"),
        ("TOPOLOGY", "/nonexistent.toml", "topology='/nonexistent.toml' cannot be read"),
        ("INTERFACE", "none0", "DETCOLL_INTERFACE='none0'"),
        ("INSECURE", "maybe", "DETCOLL_INSECURE='maybe' is neither on nor off"),
        ("COMPARE", "2", "DETCOLL_COMPARE='2' is neither on nor off"),
        ("REALTIME", "never", "DETCOLL_REALTIME='never' is neither on nor off"),
        ("TRACE", "/dev/null/traces", "DETCOLL_TRACE='/dev/null/traces' cannot be made"),
    ],
)
def test_what_every_rank_would_refuse_is_refused_once(
    variable: str, value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(f"DETCOLL_{variable}", value)
    assert main(["run", "-n", "2", "touch", str(tmp_path / "started")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert not (tmp_path / "started").exists()


def test_sites_and_a_topology_of_the_environment_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETCOLL_TOPOLOGY", "/nonexistent.toml")
    assert main(["run", "-n", "2", "--sites", "2", "true"]) == 2
    assert "--sites and DETCOLL_TOPOLOGY exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run", "-n", "two", "true"], ["run", "--nope", "1"], ["nope"]])
def test_what_the_parser_refuses_is_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(UsageError("bad x"), 2), (ConnectError("rank 1 never came"), 1)])
def test_errors_are_one_line_and_a_traceback_only_when_asked_for(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("detcoll.cli._call", fail)
    monkeypatch.delenv("DETCOLL_LOG", raising=False)
    assert main(["run"]) == code
    assert capsys.readouterr().err == f"detcoll: {error}\n"
    monkeypatch.setenv("DETCOLL_LOG", "debug")
    assert main(["run"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detcoll.cli.run.run_local", interrupted)
    assert main(["run", "-n", "2", "true"]) == 130
    assert capsys.readouterr().err == "detcoll: interrupted\n"


def test_help_names_the_commands_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in ("run", "lab", "measure", "bench"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("detcoll")
    assert main(["run", "--help"]) == 0
    assert "--tag-output" in capsys.readouterr().out


def test_run_starts_without_what_other_commands_need() -> None:
    program = (
        "import sys; from detcoll.cli import main; code = main(['run', '-n', '1', 'true']); "
        "bad = {'torch', 'zmq', 'sklearn', 'pyroute2', 'mpi4py', 'detcoll.measure', 'detcoll.emulation'}; "
        "bad &= set(sys.modules); "
        "sys.exit(str(bad) if bad else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["run", "-n", "2", "s.py", "--x"], ["run", "-n", "2", "--", "s.py", "--x"]),
        (["run", "-n2", "s.py"], ["run", "-n2", "--", "s.py"]),
        (["run", "--ranks=2", "-m", "mod"], ["run", "--ranks=2", "--", "-m", "mod"]),
        (["run", "--tag-output", "-n", "2", "s.py"], ["run", "--tag-output", "-n", "2", "--", "s.py"]),
        (["run", "-n", "2", "--", "s.py", "--"], ["run", "-n", "2", "--", "s.py", "--"]),
        (["run", "-n"], ["run", "-n"]),
        (["run", "--help"], ["run", "--help"]),
        (["lab", "--sites", "2", "s.py", "--mpi"], ["lab", "--sites", "2", "--", "s.py", "--mpi"]),
        (["lab", "--no-relay", "-m", "mod"], ["lab", "--no-relay", "--", "-m", "mod"]),
        (["bench", "--sites", "2", "x"], ["bench", "--sites", "2", "x"]),
        ([], []),
    ],
)
def test_options_after_the_script_belong_to_it(tokens: list[str], expected: list[str]) -> None:
    assert keep_script_options(tokens) == expected


@pytest.mark.parametrize("name", ["run", "lab"])
def test_options_without_a_value_are_known(name: str) -> None:
    found = set()
    for argument in app[name].assemble_argument_collection():
        is_switch = argument.hint in (bool, bool | None)
        found |= {one for one in argument.names if is_switch or one in argument.negatives}
    assert {one for one in found if one.startswith("-")} - FLAGS == set()
    valued = {one for argument in app[name].assemble_argument_collection() for one in argument.names} - found
    assert valued & FLAGS == set()
