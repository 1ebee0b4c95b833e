"""Crews of processes: how they end, and that nothing of them is left."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from threading import Thread

import pytest

from detcoll.launch import forwarding
from detcoll.launch.forwarding import Forwarder
from detcoll.launch.processes import TIMED_OUT, Guard, _Crew, describe_exit, exit_code, start, supervise

FOREVER = "while :; do sleep 1000; done"


def shells(*scripts: str) -> list[subprocess.Popen[bytes]]:
    return [start(["bash", "-c", script]) for script in scripts]


def run(*scripts: str, **options: float) -> tuple[int, list[str]]:
    said: list[str] = []
    code = supervise(shells(*scripts), settle_s=0.05, announce=said.append, **options)
    return code, said


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if is_running(pid)]} still run"
        select.select([], [], [], 0.01)


def wait_until_handled(launcher: subprocess.Popen[str]) -> None:
    """Wait until `supervise` handles signals: SIGHUP is the last of them."""
    deadline = time.monotonic() + 20
    while True:
        with open(f"/proc/{launcher.pid}/status", encoding="ascii") as status:
            [caught] = [int(line.split()[1], 16) for line in status if line.startswith("SigCgt:")]
        if caught >> (signal.SIGHUP - 1) & 1:
            return
        assert time.monotonic() < deadline, "the launcher handles no signals"
        select.select([], [], [], 0.01)


def test_success_of_all_is_zero() -> None:
    assert run("true", "sleep 0.05", "exit 0") == (0, [])


def test_the_first_failure_gives_the_code_and_ends_the_others() -> None:
    code, said = run(FOREVER, "exit 7", FOREVER)
    assert code == 7
    assert said == ["first failure seen: rank 1 exited with code 7", "ending rank 0, rank 2"]


@pytest.mark.parametrize(("code", "explained"), [(1, [("first failure seen: rank 0 exited with code 1", 0)]), (3, [])])
def test_an_exit_that_may_have_been_explained_is_announced_apart(code: int, explained: list[tuple[str, int]]) -> None:
    said: list[str] = []
    exits: list[tuple[str, int]] = []
    assert supervise(shells(f"exit {code}"), announce=said.append, announce_exit=lambda *it: exits.append(it)) == code
    assert exits == explained
    assert said == ([] if explained else ["first failure seen: rank 0 exited with code 3"])


def test_a_signal_gives_128_and_its_number() -> None:
    code, said = run(FOREVER, "kill -SEGV $$")
    assert code == 128 + signal.SIGSEGV
    assert "first failure seen: rank 1 was ended by SIGSEGV" in said[0]


def test_who_ignores_sigterm_is_killed_after_the_grace() -> None:
    code, said = run(f"trap '' TERM; {FOREVER}", "exit 3", grace_s=0.1)
    assert code == 3
    assert said == ["first failure seen: rank 1 exited with code 3", "ending rank 0"]


def test_the_deadline_ends_all() -> None:
    crew, said = shells(FOREVER, "true"), list[str]()
    os.waitid(os.P_PID, crew[1].pid, os.WEXITED | os.WNOWAIT)
    assert supervise(crew, deadline_s=0.2, announce=said.append) == TIMED_OUT
    assert said == ["deadline reached; ending rank 0"]


def test_grandchildren_end_with_their_group() -> None:
    reading, writing = os.pipe()
    crew = [
        start(["bash", "-c", f"sleep 1000 & echo $! >&{writing}; wait"], pass_fds=[writing]),
        start(["bash", "-c", f"read < /proc/self/fd/{reading}; kill -9 $$"], pass_fds=[reading]),
    ]
    os.close(writing)
    supervise(crew, settle_s=0.0, announce=lambda _: None)
    with os.fdopen(reading) as rest:
        assert rest.read() in ("", "\n")  # at its end only when no process holds the pipe any more


def test_leftovers_of_a_successful_rank_end_too() -> None:
    reading, writing = os.pipe()
    process = start(["bash", "-c", f"sleep 1000 & echo $! >&{writing}"], pass_fds=[writing])
    os.close(writing)
    assert supervise([process]) == 0
    with os.fdopen(reading) as told:
        wait_until_gone([int(told.read())])


def test_a_program_that_cannot_be_run() -> None:
    said: list[str] = []
    process = start(["/nonexistent/program"], stderr=subprocess.DEVNULL)
    assert supervise([process], names=["the program"], announce=said.append) == 127
    assert said == ["first failure seen: the program exited with code 127"]


def test_one_that_ended_before_is_taken_into_account() -> None:
    processes = shells("exit 4", FOREVER)
    assert processes[0].wait() == 4
    assert supervise(processes, settle_s=0.0, announce=lambda _: None) == 4


def test_exit_codes_and_words() -> None:
    assert [exit_code(code) for code in (0, 3, -9)] == [0, 3, 137]
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "was ended by SIGKILL"
    assert describe_exit(-40) == "was ended by signal 40"


LAUNCHER = """
import sys
from detcoll.launch.processes import Guard, start, supervise
script = 'trap "echo INT; exit 0" INT; trap "echo TERM; exit 0" TERM; sleep 1000 & echo $$ $!; wait; wait'
with Guard() as guard:
    crew = [start(["bash", "-c", script], stdout=sys.stdout) for _ in range(2)]
    for process in crew:
        guard.watch(process)
    print(guard._process.pid, guard._process.pid, flush=True)
    sys.exit(supervise(crew, grace_s=30.0, on_interrupt=int(sys.argv[1])))
"""


@contextlib.contextmanager
def launched(on_interrupt: int = signal.SIGINT):  # type: ignore[no-untyped-def]
    """Give a running launcher, and the processes of its crew and its guard."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(int(on_interrupt))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert launcher.stdout is not None
        pids = {int(word) for _ in range(3) for word in launcher.stdout.readline().split()}
        assert len(pids) == 5
        wait_until_handled(launcher)
        yield launcher, pids
    finally:
        launcher.kill()
        launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_forwarded(number: signal.Signals) -> None:
    with launched() as (launcher, pids):
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=30)
        assert launcher.returncode == 128 + number
        assert f"{number.name} received, forwarding it" in err
        if number != signal.SIGHUP:
            assert out.split() == [number.name.removeprefix("SIG")] * 2
        wait_until_gone(list(pids))


@pytest.mark.parametrize(
    ("trap", "signals", "told"), [("echo TERM > told; exit", 1, "TERM\n"), ("echo TERM > told; sleep 1000", 2, "")]
)
def test_after_a_failure_too_the_first_signal_is_forwarded_and_the_second_kills(
    trap: str, signals: int, told: str, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    said: list[str] = []

    def announce(message: str) -> None:
        said.append(message)
        if len(said) <= signals:
            os.kill(os.getpid(), signal.SIGTERM)

    patient = f"trap '{trap}' TERM; echo > ready; sleep 1000 & wait"
    scripts = (patient, "read < ready; exit 7")
    crew = [start(["bash", "-c", script], cwd=str(tmp_path)) for script in scripts]
    assert supervise(crew, settle_s=3600, grace_s=3600, announce=announce) == 7
    assert said == [
        "first failure seen: rank 1 exited with code 7", "SIGTERM received, forwarding it"
    ]  # fmt: skip
    assert not told or (tmp_path / "told").read_text() == told
    assert crew[0].returncode == (0 if told else -signal.SIGKILL)


def test_a_signal_does_not_postpone_the_end_after_a_failure() -> None:
    crew = _Crew([], [], lambda _: None)
    crew.settle_ns, crew.grace_ns = 0, 10**9
    crew._end_with(signal.SIGTERM, 0)
    before = crew.ahead[1]
    crew._end_with(signal.SIGINT, 0)
    assert list(crew.ahead)[1] == before
    assert [number for _, number in crew.ahead] == [signal.SIGINT, signal.SIGKILL, None]


def test_an_interrupt_can_end_them_by_another_signal() -> None:
    with launched(signal.SIGTERM) as (launcher, pids):
        launcher.send_signal(signal.SIGINT)
        out, err = launcher.communicate(timeout=30)
        assert launcher.returncode == 128 + signal.SIGINT
        assert err == "detcoll: SIGINT received, ending rank 0, rank 1\n"
        assert out.split() == ["TERM", "TERM"]
        wait_until_gone(list(pids))


def test_nothing_is_left_when_the_launcher_is_killed() -> None:
    with launched() as (launcher, pids):
        launcher.kill()
        wait_until_gone(list(pids))


def test_the_guard_kills_when_left_by_an_exception() -> None:
    with pytest.raises(KeyError), Guard() as guard:  # noqa: PT012
        process = shells(FOREVER)[0]
        guard.watch(process)
        raise KeyError("anything")
    assert process.wait(20) == -signal.SIGKILL


def test_the_guard_spares_who_runs_on_after_a_goodbye() -> None:
    with Guard() as guard:
        process = start(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        guard.watch(process)
    guard.close()
    assert process.communicate(b"still here", timeout=20)[0] == b"still here"
    assert process.returncode == 0


@contextlib.contextmanager
def forwarded(*tags: str) -> Iterator[tuple[list[int], int]]:
    """Give what processes with these tags would write to, and what comes out."""
    reading, writing = os.pipe()
    ends: list[int] = []
    with open(writing, "wb", buffering=0) as out, Forwarder(out, out) as forwarder:
        for tag in tags:
            with forwarder.channels(tag) as (mine, error):
                assert mine == error, "both go to the same file, so order is to be kept"
                ends.append(os.dup(mine))
        forwarder.begin()
        try:
            yield ends, reading
        finally:
            for end in ends:
                os.close(end)


def test_tags_mark_every_line() -> None:
    out, err = BytesIO(), BytesIO()
    script = "for i in 1 2 3; do printf 'a%s' $i; printf 'b\\n'; done; echo wrong >&2; printf 'no end'"
    with Forwarder(out, err) as forwarder:
        crew = []
        for rank in range(2):
            with forwarder.channels(f"[{rank}] ") as (stdout, stderr):
                crew.append(start(["bash", "-c", script], stdout=stdout, stderr=stderr))
        forwarder.begin()
        assert supervise(crew) == 0
    lines = out.getvalue().decode().splitlines()
    for tag in ("[0] ", "[1] "):
        mine = [line for line in lines if line.startswith(tag)]
        assert mine[-1] == f"{tag}no end"
    assert sorted(err.getvalue().splitlines()) == [b"[0] wrong", b"[1] wrong"]
    assert forwarder.lost is None


def test_a_line_is_written_when_its_end_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "_IDLE_S", 3600)
    with forwarded("", "") as ((one, other), reading):
        os.write(one, b"good")
        os.write(other, b"SURVIVOR 3\n")
        assert os.read(reading, 100) == b"SURVIVOR 3\n"
        os.write(one, b"bye\nand")
        assert os.read(reading, 100) == b"goodbye\n"
        os.write(one, b" the last")
    assert os.read(reading, 100) == b"and the last\n"
    os.close(reading)


def test_a_prompt_is_shown_and_then_ended_by_others() -> None:
    with forwarded("<0>", "<1>") as ((one, other), reading):
        os.write(one, b"your name? ")
        assert os.read(reading, 100) == b"<0>your name? "
        os.write(one, b"really? ")
        assert os.read(reading, 100) == b"really? "
        os.write(other, b"hello\n")
        assert os.read(reading, 100) == b"\n<1>hello\n"
        os.write(one, b"yes\n")
        assert os.read(reading, 100) == b"<0>yes\n"
    os.close(reading)


def test_bytes_pass_as_they_are_and_long_lines_in_parts() -> None:
    sent = bytes(range(256)) * 2 + bytes(300_000) + b"\n"
    with forwarded("") as ((one,), reading):
        writer = Thread(target=lambda: [os.write(one, sent[at : at + 4096]) for at in range(0, len(sent), 4096)])
        writer.start()
        came = b""
        while len(came) < len(sent):
            came += os.read(reading, 65536)
        writer.join()
    os.close(reading)
    assert came == sent


def test_what_left_its_group_and_holds_the_output_is_not_waited_for(tmp_path: Path) -> None:
    out, told = BytesIO(), tmp_path / "told"
    os.mkfifo(told)
    script = f"setsid sh -c 'echo $$ > {told}; exec sleep 1000' & read pid < {told}; echo $pid"
    with contextlib.ExitStack() as stack:
        with Forwarder(out, BytesIO()) as forwarder:
            with forwarder.channels() as (stdout, stderr):
                process = start(["bash", "-c", script], stdout=stdout, stderr=stderr)
            forwarder.begin()
            assert supervise([process]) == 0
        pid = int(out.getvalue())
        stack.callback(os.kill, pid, signal.SIGKILL)
        assert is_running(pid)


def test_an_output_that_is_full_is_told_and_the_processes_run_to_their_end() -> None:
    with open("/dev/full", "wb", buffering=0) as full, Forwarder(full, full) as forwarder:
        with forwarder.channels() as (stdout, stderr):
            process = start(["head", "-c", "300000", "/dev/zero"], stdout=stdout, stderr=stderr)
        forwarder.begin()
        assert supervise([process]) == 0
    assert forwarder.lost is not None
    assert forwarder.lost.errno == errno.ENOSPC
