"""A rank is killed in the middle of each kind of collective: all others name it, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import PROGRAMS, lines

from detcoll.launch.environment import rank_environments
from detcoll.signature import DECLARED

PLACES = ("slotted", "shm")
PATIENCE_S = 90


@pytest.mark.parametrize(("number", "kind"), list(enumerate(DECLARED)))
def test_all_name_the_rank_that_was_killed(tmp_path: Path, number: int, kind: str) -> None:
    transport, victim = PLACES[number % 2], (3, 0, 2)[number % 3]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DETCOLL_")}
    inherited["DETCOLL_TRANSPORT"] = transport
    if transport == "slotted":
        (tmp_path / "topology.toml").write_text(lines(2, 2, rate_bytes_per_s=1e9).to_toml())
        inherited["DETCOLL_TOPOLOGY"] = str(tmp_path / "topology.toml")
    started = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for rank, environment in enumerate(rank_environments(4, inherited, listener)):
            started.append(
                subprocess.Popen(
                    [sys.executable, str(PROGRAMS / "kinds_ending.py"), kind, str(victim)], env=environment,
                    pass_fds=[listener.fileno()] if rank == 0 else [], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    text=True,
                )
            )  # fmt: skip
    try:
        said = [process.communicate(timeout=PATIENCE_S) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert started[victim].returncode == -signal.SIGKILL
    for rank, (out, err) in enumerate(said):
        if rank != victim:
            assert out, f"rank {rank}: {err}"
            ended = json.loads(out.splitlines()[-1])
            assert ended["told"], f"rank {rank} was not told"
            assert ended["told"][0] == "PeerLost", ended
            assert f"rank {victim}" in ended["told"][1], ended
            assert ended["left"] == [], ended
