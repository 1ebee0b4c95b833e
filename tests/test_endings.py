"""Ranks that die, freeze or leave in the middle of collectives of two groups: all others name the same one.

Each case ends a rank at an event that a seed chooses, so that over many seeds every phase of a call is met. By default
there is one case for each way and two of the ranks, rank 0 among them; ``TEST_INSTANTS`` asks for so many of
every rank.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import PROGRAMS, lines

from detcoll.launch.environment import rank_environments

SIZE = 4
INSTANTS = int(os.environ.get("TEST_INSTANTS", "0"))


def run(folder: Path, transport: str, victim: int, at: int, how: str) -> dict[int, dict]:
    """Run the ranks, end the one that froze, and return what the others said."""
    listener = socket.create_server(("127.0.0.1", 0))
    inherited = dict(os.environ)
    if transport == "slotted":
        path = folder / "topology.toml"
        path.write_text(lines(2, 2, rate_bytes_per_s=1e9).to_toml())
        inherited["DETCOLL_TOPOLOGY"] = str(path)
    arguments = [sys.executable, str(PROGRAMS / "two_groups.py"), transport, str(victim), str(at), how]
    started = []
    with listener:
        for rank, environment in enumerate(rank_environments(SIZE, inherited, listener)):
            fds = [listener.fileno()] if rank == 0 else []
            started.append(
                subprocess.Popen(
                    arguments, env=environment, pass_fds=fds, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
    try:
        said = {}
        for rank in [other for other in range(SIZE) if other != victim]:
            out, err = started[rank].communicate(timeout=90)
            assert out, f"rank {rank} said nothing: {err}"
            said[rank] = json.loads(out.splitlines()[-1])
        return said
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.communicate()


CASES = [
    (transport, how, victim, instant)
    for transport in ("slotted", "shm")
    for how in ("kill", "freeze", "leave")
    for victim in (range(SIZE) if INSTANTS else (0, 3))
    for instant in range(INSTANTS or 1)
]


@pytest.mark.parametrize(("transport", "how", "victim", "instant"), CASES)
def test_all_name_the_same_rank(tmp_path: Path, transport: str, how: str, victim: int, instant: int) -> None:
    at = random.Random(f"{transport} {how} {victim} {instant}").randrange(1, 400)
    said = run(tmp_path, transport, victim, at, how)
    counterparts = {0: 2, 1: 3, 2: 0, 3: 1}
    for rank, one in said.items():
        groups = {"world", "part"} if transport == "shm" or counterparts[victim] == rank else {"world"}
        assert groups <= set(one["told"]), f"rank {rank} at event {at}: {one}"
        for group in groups:
            kind, text = one["told"][group]
            named = [int(number) for number in re.findall(r"rank (\d+)(?:,| is lost| \(|:)", text)]
            assert kind in ("PeerLost", "DeadlineMissed", "TransportError"), text
            assert f"rank {victim}" in text, f"rank {rank}, {group}, at event {at}: {text}"
            culprits = set(re.findall(r"rank (\d+) is lost|waits for rank (\d+)", text))
            assert culprits in ({(str(victim), "")}, {("", str(victim))}, set()), f"event {at}: {text} {named}"
        assert one["left"] == [], one
