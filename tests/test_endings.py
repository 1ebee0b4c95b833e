"""Ranks that die, freeze, leave or are cut off in the middle of collectives of two groups: all name the same one.

Each case ends a rank at an event that a seed chooses, so that over many seeds every phase of a call is met. By default
there is one case for each way, with rank 0 or the last one; ``TEST_INSTANTS`` asks for so many of every rank. How long
after the event the slowest rank was told is kept as the property ``took_s`` (``--junitxml``), and printed (``-s``).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import launch_forked
from jobs import environment
from ranks import PROGRAMS, lines, written

from detcoll.launch.environment import rank_environments

SIZE = 4
INSTANTS = int(os.environ.get("TEST_INSTANTS", "0"))
COUNTERPARTS = {0: 2, 1: 3, 2: 0, 3: 1}
KINDS = ("PeerLost", "DeadlineMissed", "TransportError")
CUTS = {"slotted": ((6.0, 3.0), (1.0, 20.0)), "shm": ((6.0, 2.0), (2.0, 3.0))}
"""For each transport, pairs of a call's timeout and DETCOLL_TOLERANCE, in seconds; the shorter of a pair ends calls.

With shm calls go on during a cut, so there the tolerance ends them, also where the timeout is shorter."""
END_S, FREEZE_S = 20.0, 3.0
"""The timeout of calls where a rank ends, of which the others hear at once, and where one freezes."""
PATIENCE_S = 90


@dataclass(frozen=True)
class Case:
    """What happens to whom, and when."""

    transport: str
    how: str
    victim: int
    at: int
    timeout_s: float
    tolerance_s: float = 20.0

    def words(self, folder: Path) -> list[str]:
        """Return the arguments of the program that every rank runs."""
        return list(map(str, [self.transport, self.victim, self.at, self.how, self.timeout_s, folder / "event"]))

    def variables(self, folder: Path) -> dict[str, str]:
        """Return what the environment of all ranks has besides that of this process."""
        given = {"DETCOLL_TOLERANCE": f"{self.tolerance_s:g}"}
        if self.transport != "shm":
            given["DETCOLL_TOPOLOGY"] = written(lines(2, 2, rate_bytes_per_s=1e9), folder)
        return given


def run(case: Case, folder: Path) -> dict[int, dict[str, Any]]:
    """Run the ranks, and return what each but the victim said."""
    frozen = [case.victim] if case.how == "freeze" else []
    ended = launch_forked(
        SIZE, "two_groups.py", *case.words(folder), environ=case.variables(folder), timeout_s=PATIENCE_S,
        grace_s=PATIENCE_S, frozen=frozen,
    )  # fmt: skip
    others = set(range(SIZE)) - {case.victim}
    told = {record["rank"]: record for record in map(json.loads, ended.out.splitlines())}
    assert set(told) == others, ended.err
    return told


def said(rank: int, out: str, err: str) -> dict[str, Any]:
    """Return what a rank printed."""
    assert out, f"rank {rank} said nothing: {err}"
    line: dict[str, Any] = json.loads(out.splitlines()[-1])
    return line


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs ranks on networks of their own."""
    pytest.importorskip("pyroute2")
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    folder = str(tmp_path_factory.mktemp("apart"))
    job = {"command": ["true"], "environments": [{}], "networks": [0], "folder": folder, "are_hosts": True}
    refusals = []
    for options in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *options, "--net", "--mount", sys.executable, str(PROGRAMS / "apart.py")]
        tried = subprocess.run(command, input=f"{json.dumps(job)}\n", capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            return command
        refusals += tried.stderr.splitlines()[-1:]
    pytest.skip(f"there is no network of one's own, neither as root nor in a user namespace: {'; '.join(refusals)}")


def run_apart(apart: list[str], case: Case, folder: Path, networks: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Run the ranks on networks of their own, and return what all said, the one that is cut off too."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        environments = rank_environments(SIZE, environment(case.variables(folder)), unused)
    for variables in environments:
        variables.pop("DETCOLL_RENDEZVOUS_FD", None)
        variables |= {"DETCOLL_RENDEZVOUS": "10.77.0.1:29400", "DETCOLL_INSECURE": "lab"}
    job = {
        "command": [sys.executable, str(PROGRAMS / "two_groups.py"), *case.words(folder)],
        "environments": environments, "networks": networks, "folder": str(folder),
        "are_hosts": case.transport == "slotted",
    }  # fmt: skip
    process = subprocess.Popen(
        apart, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        out, err = process.communicate(json.dumps(job) + "\n", timeout=PATIENCE_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        process.communicate()
        raise
    assert process.returncode == 0, err
    return {rank: said(rank, *streams) for rank, streams in enumerate(json.loads(out))}


WAYS = (
    ("slotted", "kill", 0), ("slotted", "freeze", 3), ("slotted", "leave", 0), ("shm", "kill", 3), ("shm", "freeze", 0),
    ("shm", "leave", 3), ("tcp", "kill", 3),
)  # fmt: skip
CUT_OFF = (("slotted", "cut", 0), ("shm", "cut", 3))


def cases(ways: Sequence[tuple[str, str, int]]) -> Any:
    """Parametrise a test: by default one case for each way, else as many as asked for with every victim."""
    victims = {way: range(SIZE) if INSTANTS else [way[2]] for way in ways}
    each = [(*way[:2], victim, at) for way in ways for victim in victims[way] for at in range(INSTANTS or 1)]
    return pytest.mark.parametrize(("transport", "how", "victim", "instant"), each)


Report = Callable[[Case, Path, dict[int, dict[str, Any]]], None]


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Keeps how long after the event the slowest of the other ranks was told."""

    def keep(case: Case, folder: Path, told: dict[int, dict[str, Any]]) -> None:
        event_ns = int((folder / "event").read_text(encoding="ascii"))
        words = [at_ns for rank, one in told.items() if rank != case.victim for _, _, at_ns in one["told"].values()]
        took_s = (max(words, default=event_ns) - event_ns) / 1e9
        record_property("took_s", f"{took_s:.3f}")
        print(f"\n{case}: {took_s:.2f} s")

    return keep


def culprits(text: str) -> set[int]:
    """Return whom an error blames."""
    return {
        int(number)
        for pattern in (r"rank (\d+) is lost", r"waits for rank (\d+)", r"^rank (\d+): nothing came through")
        for number in re.findall(pattern, text)
    }


def check_others(case: Case, told: dict[int, dict[str, Any]]) -> None:
    """Check that all others name the victim, and nobody else, in every group with it, and leave nothing behind.

    Groups without it go on.
    """
    for rank, one in told.items():
        if rank == case.victim:
            continue
        groups = {"world", "part"} if case.transport == "shm" or COUNTERPARTS[case.victim] == rank else {"world"}
        assert groups == set(one["told"]), f"rank {rank}, {case}: {one}"
        for group in groups:
            kind, text, _ = one["told"][group]
            assert kind in KINDS, text
            assert f"rank {case.victim}" in text, f"rank {rank}, {group}, {case}: {text}"
            assert culprits(text) <= {case.victim}, f"rank {rank}, {group}, {case}: {text}"
        assert one["left"] == [], one


def check_victim(case: Case, one: dict[str, Any]) -> None:
    """Check that a rank that was cut off names others, whom it does not reach, and leaves nothing behind."""
    assert set(one["told"]) == {"world", "part"}, f"{case}: {one}"
    for kind, text, _ in one["told"].values():
        assert kind in KINDS, text
        assert culprits(text), f"{case}: {text}"
        assert case.victim not in culprits(text), f"{case}: {text}"
    assert one["left"] == [], one


@cases(WAYS)
def test_all_name_the_same_rank(
    tmp_path: Path, report: Report, transport: str, how: str, victim: int, instant: int
) -> None:
    at = random.Random(f"{transport} {how} {victim} {instant}").randrange(1, 400)
    case = Case(transport, how, victim, at, FREEZE_S if how == "freeze" else END_S)
    told = run(case, tmp_path)
    report(case, tmp_path, told)
    check_others(case, told)


@cases(CUT_OFF)
def test_all_name_the_rank_that_is_cut_off(
    tmp_path: Path, apart: list[str], report: Report, transport: str, how: str, victim: int, instant: int
) -> None:
    seed = random.Random(f"{transport} cut {victim} {instant}")
    case = Case(transport, how, victim, seed.randrange(1, 400), *CUTS[transport][(victim + instant) % 2])
    told = run_apart(apart, case, tmp_path, tuple(range(SIZE)))
    report(case, tmp_path, told)
    check_others(case, told)
    check_victim(case, told[victim])
