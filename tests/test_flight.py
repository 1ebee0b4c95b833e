"""Flight records: what is written when a job fails, on a signal and when asked, and what is read from it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pwd
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ranks import attempt, launch

from detcoll.cli import main
from detcoll.errors import DeadlineMissed, PlanMismatch, UsageError
from detcoll.job.flight import LARGEST_KEPT_JOBS, Flight, ask, running
from detcoll.report.standing import findings, read_records, stands
from detcoll.runtime.recorder import CALLED, COLUMNS, LARGEST_RECORD, RECORD_SCHEMA, Recorder


def test_the_last_events_are_kept() -> None:
    recorder = Recorder()
    for number in range(LARGEST_RECORD + 5):
        recorder.note(number, "call", 1, number, detail=("all_reduce", "sum", "float32", number, 0, 1, "", ""))
    rows = recorder.rows()
    assert len(rows) == LARGEST_RECORD
    assert tuple(rows[0]) == (*COLUMNS, "called")
    assert rows[0]["called"] == dict(zip(CALLED, ("all_reduce", "sum", "float32", 5, 0, 1, "", ""), strict=True))
    assert rows[0]["detail"] == "all_reduce of 5 float32, sum"
    assert rows[-1]["at_ns"] == LARGEST_RECORD + 4


@pytest.mark.parametrize("transport", ["slotted", "shm"])
def test_a_mismatch_leaves_records_that_show_it(tmp_path: Path, capsys, transport: str) -> None:
    def program(comm):
        comm.barrier()
        comm.all_reduce(np.ones(100 + (comm.rank == 2), np.float32), name="gradients")

    answers = attempt(3, program, transport=transport, environ={"DETCOLL_RECORD": str(tmp_path)}, stay=True)
    assert all(isinstance(answer, PlanMismatch) for answer in answers)
    (folder,) = tmp_path.iterdir()
    records = read_records(folder)
    assert [record["rank"] for record in records] == [0, 1, 2]
    assert all(record["schema"] == RECORD_SCHEMA for record in records)
    (told,) = [sentence for sentence in findings(records) if "differ" in sentence]
    assert "world, call 1: calls differ." in told
    # a rank that hears of it before its own call has no call to show
    assert re.search(r"ranks? (0|1|0, 1) called all_reduce of 100 float32, sum \(gradients\)", told)
    assert "rank 2 called all_reduce of 101 float32, sum (gradients)" in told
    assert main(["report", str(folder)]) == 0
    assert "calls differ" in capsys.readouterr().out


def test_who_is_behind_shows(tmp_path: Path) -> None:
    def program(comm):
        part = comm.group([0, 1], name="part") if comm.rank < 2 else None
        comm.barrier()
        if comm.rank == 0:
            with pytest.raises(DeadlineMissed):
                part.barrier(timeout=0.5)
        comm.barrier()

    answers = attempt(3, program, transport="slotted", environ={"DETCOLL_RECORD": str(tmp_path)})
    assert answers == [None] * 3
    (folder,) = tmp_path.iterdir()
    told = findings(read_records(folder))
    assert "No record of rank 2." in told
    assert "group 'part': rank 1 has made 0 of 1 call that others made." in told


def hung_record(rank: int, calls: list[dict]) -> dict:
    group = {
        "id": "world", "number": 1, "name": "", "ranks": [0, 1, 2], "latest": 4, "failure": None,
        "calls": calls,
    }  # fmt: skip
    return {"schema": RECORD_SCHEMA, "job": "j", "rank": rank, "size": 3, "groups": [group], "events": []}


def test_whom_others_wait_for_shows() -> None:
    call = {"sequence": 4, "what": "call 4, barrier", "state": "waits for rank 1"}
    records = [
        hung_record(0, [call | {"waits_for": [1]}]), hung_record(1, []), hung_record(2, [call | {"waits_for": [0]}])
    ]  # fmt: skip
    assert findings(records) == ["world: others wait for rank 1, which waits for no other rank."]
    assert [(stand.rank, stand.waits_for) for stand in stands(records)] == [(0, (1,)), (1, ()), (2, (0,))]


def test_of_a_rank_without_a_record_nothing_is_said() -> None:
    call = {"sequence": 4, "what": "call 4, barrier", "state": "waits for rank 1", "waits_for": [1, 2]}
    left = hung_record(2, []) | {"groups": []}
    assert findings([hung_record(0, [call]), left]) == [
        "No record of rank 1.",
        "world: others wait for rank 2, which has left it or not opened it.",
        "world: others wait for rank 1, of which there is no record.",
    ]


def test_groups_of_the_same_ranks_are_told_apart() -> None:
    records = [hung_record(rank, []) for rank in range(3)]
    for record in records:
        (group,) = record["groups"]
        record["groups"] = [group | {"id": identity, "latest": latest} for identity, latest in (("a", 1), ("b", 7))]
    assert findings(records) == []


def test_a_user_without_a_home_has_no_records(monkeypatch) -> None:
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a KeyError, as for an unknown user
    flight = Flight("job", 0, dict, None)
    assert flight.write("test") is None
    flight.close()


def test_a_record_that_cannot_be_made_costs_nothing_else(tmp_path: Path) -> None:
    flight = Flight("job", 0, lambda: {"rank": object()}, str(tmp_path))
    assert flight.write("test") is None
    flight.close()


def test_a_record_that_somebody_asked_for_and_cannot_be_made_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    flight = Flight("job", 3, dict, str(tmp_path / "file"))
    assert flight.write("test") is None
    flight.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"rank 3: no flight record was written to {tmp_path}/file/job/record3.json: ")


def test_records_written_at_once_stay_whole(tmp_path: Path) -> None:
    sizes = itertools.cycle([10, 100_000, 1000])
    flight = Flight("job", 0, lambda: {"state": "x" * next(sizes)}, str(tmp_path))

    def write() -> None:
        for _ in range(50):
            path = flight.write("test")
            assert path is not None
            json.loads(path.read_text(encoding="utf-8"))

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(write) for _ in range(4)]:
            future.result()
    flight.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_writes_no_record(tmp_path: Path) -> None:
    flight = Flight("job", 0, dict, str(tmp_path))
    pid = os.fork()
    if not pid:
        os._exit(0 if flight.write("test") is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert flight.write("test") is not None
    flight.close()


def test_files_that_are_no_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "record0.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a flight record"):
        read_records(tmp_path)


def test_only_the_last_jobs_are_kept_where_nobody_chose_the_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for number in range(LARGEST_KEPT_JOBS + 3):
        flight = Flight(f"job{number:02}", 0, dict, None)
        path = flight.write("test")
        assert path is not None
        os.utime(path.parent, (number, number))
        flight.close()
    kept = sorted(path.name for path in (tmp_path / "detcoll" / "records").iterdir())
    assert kept == [f"job{number:02}" for number in range(3, LARGEST_KEPT_JOBS + 3)]


@pytest.mark.parametrize("word", ["off", "0", "no", "false", "False"])
def test_records_can_be_switched_off(word: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flight = Flight("job", 0, dict, word)
    assert flight.write("test") is None
    flight.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["on", "1", "yes", "true"])
def test_records_that_are_switched_on_go_where_they_go_by_default(word: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flight = Flight("job", 0, dict, word)
    assert flight.write("test") == tmp_path / "detcoll" / "records" / "job" / "record0.json"
    flight.close()


def test_a_closed_flight_is_not_found() -> None:
    flight = Flight("job", 7, lambda: {"rank": 7}, "off")
    (name,) = [name for name in running() if name.endswith(f"-{os.getpid()}-7")]
    record = ask(name)
    assert record is not None
    assert (record["rank"], record["job"]) == (7, "job")
    flight.close()
    assert ask(name) is None
    assert name not in running()


def test_a_hanging_job_tells_where_it_stands(tmp_path: Path) -> None:
    environ = {"DETCOLL_RECORD": str(tmp_path / "records")}
    ended = launch(2, "calls.py", "asked", tmp_path, options=["--transport", "slotted"], environ=environ)
    assert ended.code == 0, ended.err
    records = json.loads((tmp_path / "asked.json").read_text())
    assert [record["rank"] for record in records] == [0, 1]
    waiting = [stand for stand in stands(records) if stand.waits_for]
    assert [(stand.rank, stand.waits_for) for stand in waiting] == [(0, (1,))]
    (folder,) = (tmp_path / "records").iterdir()
    assert {path.name for path in folder.iterdir()} == {"record0.json", "record1.json"}


def test_the_folder_of_all_records_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ranks, reason in (("early", (0, 2), "rank 1 is lost"), ("late", (0,), "asked")):
        for rank in ranks:
            flight = Flight(name, rank, lambda rank=rank: {"rank": rank, "size": 3, "groups": []}, str(tmp_path))
            assert flight.write(reason) is not None
            flight.close()
    (tmp_path / "spoiled").mkdir()
    (tmp_path / "spoiled" / "record0.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    early, late = (next(line for line in lines if name in line and "rank" in line) for name in ("early", "late"))
    assert re.search(r"[0-9:]{8} .* 2 of 3 ranks \(0, 2\) .* rank 1 is lost", early)
    assert re.search(r"[0-9:]{8} .* 1 of 3 ranks \(0\) .* asked", late)
    assert lines[-1].endswith(f"detcoll report {tmp_path / 'late'}")
    for name in ("early", "late"):
        shutil.rmtree(tmp_path / name)
    assert main(["report", str(tmp_path)]) == 2
    assert "has no job whose flight records can be read" in capsys.readouterr().err


def test_one_of_several_jobs_is_asked_for_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("detcoll.job.flight.socket_prefix", lambda: f"detcoll-test-{os.getpid()}-")
    one = {"size": 2, "groups": [], "events": []}
    flights = [Flight(name, rank, lambda rank=rank: one | {"rank": rank}, "off") for rank, name in enumerate("ab")]
    asked = tmp_path / "asked.json"
    try:
        assert main(["doctor", "--job"]) == 0
        assert "Ranks of 2 jobs run here: a, b. " in capsys.readouterr().out
        assert main(["doctor", "--json", str(asked), "--job", "b"]) == 0
        assert [record["job"] for record in json.loads(asked.read_text())] == ["b"]
        told = capsys.readouterr().out
        assert "job b" in told
        assert "job a" not in told
        assert main(["doctor", "--job", "c"]) == 1
        assert "No rank of job c runs on this host as this user; there are ranks of a, b." in capsys.readouterr().out
        assert main(["doctor", "b"]) == 2
    finally:
        for flight in flights:
            flight.close()


def test_a_signal_writes_a_record(tmp_path: Path) -> None:
    program = (
        "import detcoll, os, signal, sys, pathlib, threading\n"
        "detcoll.init()\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "while not list(folder.glob('*/record0.json')): threading.Event().wait(0.01)\n"
        "detcoll.finalize()\n"
        "assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "DETCOLL_RECORD": str(tmp_path)}, timeout=60, check=False
    )
    assert done.returncode == 0
