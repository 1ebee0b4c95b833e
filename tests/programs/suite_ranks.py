"""Runs tests of torch's own suite for distributed calls, each in fresh ranks that are forked from this process.

    python tests/programs/suite_ranks.py BACKEND RANKS

Reads one request a line, ``{"test": ..., "folder": ..., "deadline_s": ...}``, and answers with one line that says how
it ended. Other lines of the protocol: the first answer lists the tests. `torch_suite.py` in the folder above drives it.

The suite spawns the ranks of each test, which costs an import of torch (2 to 4 s of a core) a rank and test. Here torch
is imported once. No group exists and no tensor was touched before the fork, so a rank starts as one that was spawned.

The suite asks for backends by name, and leaves out tests of any name that it does not know. So it is imported for Gloo:
what it would run on Gloo, it runs on BACKEND. Two more kinds of tests run here on any backend: those of all-to-all on
tensors of the host, which the suite keeps to MPI, and those of a group of ranks 1 and 2, from three ranks on; the suite
leaves them out below eight ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

KNOWN = "gloo"
OPENED = "Only MPI supports"
"""How a reason begins for which no test is left out here."""
LEAST = 3
"""Ranks that tests need which the suite leaves out for a small world."""
ERROR_CODE = 10
"""The exit code of a rank whose test raised; the suite's `MultiProcessTestCase.TEST_ERROR_EXIT_CODE`."""
GRACE_S = 3.0
"""What other ranks get to end by themselves, and so to say what they know, once one has failed."""
ASKING_S = 1.0
OUTPUT_BYTES = 4000
_PR_SET_PDEATHSIG = 1


class Standing(str):
    """The name of a backend that takes Gloo's place: equal to both names, so that the suite treats it as Gloo."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == KNOWN

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(KNOWN)


@dataclass(slots=True)
class Rank:
    """A forked rank."""

    process: ForkProcess
    pipe: Connection
    output: Path
    said: list[str] = field(default_factory=list)
    """Tracebacks: of the exception, or of where the rank stood when time was up."""

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while the rank lives."""
        return self.process.exitcode


class Suite:
    """The suite, imported for a backend and a number of ranks."""

    def __init__(self, backend: str, size: int) -> None:
        os.environ.update(
            BACKEND=KNOWN,
            WORLD_SIZE=str(size),
            INIT_METHOD="file:///",
            MASTER_ADDR="localhost",
            CUDA_VISIBLE_DEVICES="",
        )
        import torch.distributed
        from torch.testing._internal import common_distributed, common_utils

        leave_out = common_utils.skip_but_pass_in_sandcastle_if
        common_utils.skip_but_pass_in_sandcastle_if = lambda condition, reason: leave_out(
            condition and not reason.startswith(OPENED), reason
        )
        if size >= LEAST:
            common_distributed.skip_if_small_worldsize = lambda test: test
        from torch.testing._internal.distributed import distributed_test

        class Tests(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):  # type: ignore[misc]
            """All tests, for one process group of the given backend."""

        if backend == "detcoll":
            for name in ("detcoll.torch.process_group", "detcoll_shm", "zmq"):  # else each rank would import them
                importlib.import_module(name)
            if (
                backend not in torch.distributed.Backend.backend_list
            ):  # detcoll runs from its tree, and is not installed
                importlib.import_module("detcoll_registration").register()
        os.environ["BACKEND"] = backend
        distributed_test.BACKEND = Standing(backend)
        self.size = size
        self.skips = {skip.exit_code: skip.message for skip in common_distributed.TEST_SKIPS.values()}
        self._module = distributed_test
        self._tests = Tests
        self._where = common_distributed.MultiProcessTestCase.Event.GET_TRACEBACK

    def names(self) -> list[str]:
        """Return the names of all tests."""
        return [name for name in sorted(dir(self._tests)) if name.startswith("test_")]

    def left_out(self, test: str) -> str | None:
        """Return why the suite leaves out a test before it starts a rank, or None."""
        function = getattr(self._tests, test)
        return str(function.__unittest_skip_why__) if getattr(function, "__unittest_skip__", False) else None

    def be_rank(self, rank: int, test: str, folder: Path, pipe: Connection) -> None:
        """Run a test as one of its ranks; leaves by SystemExit."""
        method = f"file://{folder}/init_dir/shared_init_file"
        os.environ.update(TEMP_DIR=str(folder), TMPDIR=str(folder), INIT_METHOD=method)
        tempfile.tempdir = None
        self._module.INIT_METHOD = method
        self._tests._run(rank, test, str(folder / "meeting"), pipe)

    def ask_where(self, rank: Rank) -> None:
        """Ask a rank for the tracebacks of its threads."""
        with contextlib.suppress(OSError, EOFError):
            rank.pipe.send(self._where)
            if rank.pipe.poll(ASKING_S):
                rank.said.append(rank.pipe.recv())


def fork(suite: Suite, test: str, folder: Path) -> list[Rank]:
    """Start the ranks of a test, in a group of processes of their own."""
    ranks: list[Rank] = []
    for number in range(suite.size):
        ours, theirs = Pipe()
        output = folder / f"output{number}"
        leader = ranks[0].process.pid if ranks else None
        process = get_context("fork").Process(target=become, args=(suite, test, folder, number, theirs, output))
        process.start()
        with contextlib.suppress(OSError):  # it has ended
            os.setpgid(process.pid, leader or process.pid)
        theirs.close()
        ranks.append(Rank(process, ours, output))
    return ranks


def become(suite: Suite, test: str, folder: Path, number: int, pipe: Connection, output: Path) -> None:
    """Be one rank, in a fork of the server; leaves by SystemExit."""
    end_with_parent()
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(written, 1)
    os.dup2(written, 2)
    try:
        suite.be_rank(number, test, folder, pipe)
    finally:
        # `multiprocessing` joins threads that are no daemons, but before Python 3.13 leaves these functions out. The
        # interpreter's own end is not waited for: it takes a second, since torch is large.
        atexit._run_exitfuncs()


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however that ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def follow(suite: Suite, ranks: list[Rank], deadline_s: float) -> list[int]:
    """Wait until all ranks have ended, or time is up; returns the order in which they did."""
    order: list[int] = []
    until_s = time.monotonic() + deadline_s
    failed = False
    there = {rank.process.sentinel: number for number, rank in enumerate(ranks)}
    while there and (left_s := until_s - time.monotonic()) > 0:
        for sentinel in wait(list(there), left_s):
            order.append(there.pop(sentinel))
            ranks[order[-1]].process.join()
            if not failed and ranks[order[-1]].code not in (0, *suite.skips):
                failed = True
                until_s = min(until_s, time.monotonic() + GRACE_S)
    for number in there.values():
        suite.ask_where(ranks[number])
    return order


def end(ranks: list[Rank]) -> None:
    """Kill what is left of the ranks and of what they started, and take what they said."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(ranks[0].process.pid, signal.SIGKILL)
    for rank in ranks:
        rank.process.join()
        with contextlib.suppress(OSError, EOFError):
            while rank.pipe.poll():
                rank.said.append(rank.pipe.recv())
        rank.pipe.close()


def judge(suite: Suite, ranks: list[Rank], order: list[int]) -> tuple[str, str]:
    """Return how a test ended: passed, failed or skipped, and why.

    Stricter than the suite, which looks at rank 0 alone unless a test raises: every rank has to end well.
    """
    for number in order:
        rank = ranks[number]
        if rank.code == 0 or rank.code in suite.skips:
            continue
        if rank.code == ERROR_CODE and rank.said:
            return "failed", f"rank {number}: {last_line(rank.said[0])}"
        how = f"signal {signal.Signals(-rank.code).name}" if rank.code is not None and rank.code < 0 else rank.code
        return "failed", f"rank {number} ended with {how}"
    if late := sorted(set(range(len(ranks))) - set(order)):
        return "failed", f"time was up; ranks still there: {late}"
    reasons = [suite.skips[rank.code] for rank in ranks if rank.code]
    return ("skipped", reasons[0]) if reasons else ("passed", "")


def last_line(traceback: str) -> str:
    """Return the message of an exception, without C++ frames and the traceback above it."""
    text = traceback.split("\nException raised from ")[0].split("\n\nTo execute this test")[0].rstrip()
    lines = text.splitlines()
    inside = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[inside[-1] + 1 :] if inside else lines
    said = [line for line in after if not line.startswith(" ")] or lines[-1:]
    return " ".join(said)[:500]


def run(suite: Suite, test: str, folder: Path, deadline_s: float) -> dict[str, Any]:
    """Run one test; returns what there is to say of it."""
    if (reason := suite.left_out(test)) is not None:
        return {"outcome": "skipped", "reason": reason, "seconds": 0.0}
    for name in ("barrier", "test_dir", "init_dir"):
        (folder / name).mkdir()
    began_s = time.monotonic()
    ranks = fork(suite, test, folder)
    order = follow(suite, ranks, deadline_s)
    end(ranks)
    outcome, reason = judge(suite, ranks, order)
    told: dict[str, Any] = {"outcome": outcome, "reason": reason, "seconds": round(time.monotonic() - began_s, 2)}
    if outcome == "failed":
        told["ranks"] = {
            number: {"code": rank.code, "said": rank.said, "output": tail(rank.output)}
            for number, rank in enumerate(ranks)
        }
    return told


def tail(path: Path) -> str:
    """Return the end of what a rank wrote."""
    return path.read_bytes()[-OUTPUT_BYTES:].decode(errors="replace") if path.exists() else ""


def main() -> None:
    """Serve requests until the input ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    suite = Suite(sys.argv[1], int(sys.argv[2]))
    gc.freeze()  # what ranks need not look through
    print(json.dumps({"tests": suite.names()}), file=answers)
    for line in sys.stdin:
        request: Mapping[str, Any] = json.loads(line)
        told = run(suite, request["test"], Path(request["folder"]), request["deadline_s"])
        print(json.dumps(told), file=answers)


if __name__ == "__main__":
    main()
