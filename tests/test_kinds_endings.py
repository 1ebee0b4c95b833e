"""A rank is killed in the middle of collectives of every kind: all others name it in each, and nothing stays behind."""

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

PATIENCE_S = 90


@pytest.mark.parametrize(("transport", "victim", "of_world"), [("slotted", 3, "all_reduce"), ("shm", 0, "barrier")])
def test_all_name_the_rank_that_was_killed(tmp_path: Path, transport: str, victim: int, of_world: str) -> None:
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
                    [sys.executable, str(PROGRAMS / "kinds_ending.py"), of_world, str(victim)], env=environment,
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
            assert sorted(ended["told"]) == sorted(DECLARED), f"rank {rank} was not told of all: {ended}"
            for kind, (error, text) in ended["told"].items():
                assert error == "PeerLost", f"rank {rank}, {kind}: {text}"
                assert f"rank {victim}" in text, f"rank {rank}, {kind}: {text}"
            assert ended["left"] == [], ended
