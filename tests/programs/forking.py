"""Runs programs on ranks that are forked from this process, which has imported what they need; see `forked.py` above.

    python tests/programs/forking.py MODULE ...

Reads one request a line, and answers with one line: the exit code of each rank, negative for a signal. Requests without
a number of ranks are for one rank that a test talks to: they fork it, which is answered with its pid, and end it.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from suite_ranks import end_with_parent

from detcoll.launch.environment import rank_environments

Request = Mapping[str, Any]


def fork(request: Request) -> list[int] | None:
    """Fork all ranks and return their pids; in a rank, be that rank and return None."""
    places = request["places"]
    with socket.create_server(("127.0.0.1", 0)) as meeting:
        environments = rank_environments(request["size"], request["environ"], meeting)
        if places:
            environments = [request["environ"] | place["environ"] for place in places]
        pids = []
        for rank, environ in enumerate(environments):
            pids.append(os.fork())
            if not pids[-1]:
                if places:
                    enter(places[rank]["namespaces"])
                become(environ, request)
                if rank == 0 and not places:
                    meeting.detach()  # it adopts the descriptor
                return None
    return pids


def fork_one(request: Request) -> int:
    """Fork a rank with its whole environment, and return its pid, or 0 in the rank."""
    pid = os.fork()
    if not pid:
        become(request["environ"], request)
    return pid


def end_one(pid: int) -> bool:
    """End a rank that this process has forked."""
    if os.waitpid(pid, os.WNOHANG) == (0, 0):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return True


def enter(namespaces: Sequence[str]) -> None:
    """Enter the namespaces of a site of the lab, as processes that the lab starts there do."""
    library, folder = ctypes.CDLL(None, use_errno=True), os.getcwd()
    for path in namespaces:
        if library.setns(os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0):
            raise OSError(ctypes.get_errno(), "a rank cannot enter its site")
    os.chdir(folder)


def become(environ: Mapping[str, str], request: Request) -> None:
    """Let this process look like one that was started with this environment and these arguments."""
    end_with_parent()
    for number, path in enumerate((request["in"], request["out"], request["err"])):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [request["program"], *request["arguments"]]
    sys.path[0] = os.path.dirname(request["program"])
    told = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[1:1] = [folder for folder in told if folder not in sys.path]


def follow(pids: list[int], request: Request) -> list[int]:
    """Wait until the ranks have ended; kill those that are there at the deadline, or long after another has failed."""
    until_s = time.monotonic() + request["deadline_s"]
    codes: dict[int, int] = {}
    handles = {os.pidfd_open(pid): pid for pid in pids}
    frozen = {pids[rank] for rank in request["frozen"]}
    while handles:
        if frozen.issuperset(handles.values()):
            until_s = 0.0
        ended = select.select(list(handles), [], [], max(0.0, until_s - time.monotonic()))[0]
        for handle in ended or list(handles):
            pid = handles.pop(handle)
            os.close(handle)
            if not ended:
                os.kill(pid, signal.SIGKILL)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if codes[pid]:
                until_s = min(until_s, time.monotonic() + request["grace_s"])
    return [codes[pid] for pid in pids]


def serve() -> bool:
    """Serve requests until the input ends; returns True where this process has become a rank."""
    end_with_parent()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # what ranks need not look through
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "size" in request:
            pids = fork(request)
            answer: object = pids and follow(pids, request)
        else:
            answer = end_one(request["end"]) if "end" in request else fork_one(request)
        if not answer:
            return True
        print(json.dumps(answer), flush=True)
    return False


def end_rank() -> None:
    """End as Python does, but for the interpreter itself where torch is loaded: that takes a third of a second."""
    if "torch" not in sys.modules or "TEST_WHOLE_END" in os.environ:
        return
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__" and serve():  # the program is at the top of a rank, as if Python had started it
    with open(sys.argv[0], encoding="utf-8") as source:
        __file__ = sys.argv[0]
        program = compile(source.read(), __file__, "exec", dont_inherit=True)
    exec(program)
    end_rank()
