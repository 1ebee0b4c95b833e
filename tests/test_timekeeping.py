"""Ranks of a site whose clocks differ agree about their windows."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from ranks import launch, lines

MS = 1_000_000
TOLERANCE_NS = 500 * MS
"""What may lie between looking at the clock and handing a send over, on a busy machine; clocks are seconds apart."""


@pytest.fixture
def time_namespaces() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    command = ["unshare", "--time", "--monotonic", "1", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"time namespaces cannot be made here: {tried.stderr.strip()}")


@pytest.mark.usefixtures("time_namespaces")
@pytest.mark.parametrize("shift_s", [7, 3600])
def test_clocks_that_are_seconds_apart(tmp_path, shift_s: int) -> None:
    ended = launch(
        4, "calls.py", "shifted", shift_s, topology=lines(2, 2), folder=tmp_path,
        environ={"DETCOLL_TRACE": str(tmp_path), "DETCOLL_SLOTTING": "turns"},
    )  # fmt: skip
    assert ended.code == 0, ended.err
    told = {rank: said[0] for rank, said in ended.said.items()}
    for leader in (0, 2):
        follower = leader + 1
        assert told[leader][:2] == [0, 0], "the leader's clock is the site's"
        offset_ns, bound_ns, now_ns = told[follower]
        assert abs(now_ns - told[leader][2] - shift_s * 10**9) < 20 * 10**9, "the clocks were not apart"
        assert 0 < bound_ns < 20 * MS
        assert abs(offset_ns + shift_s * 10**9) <= bound_ns
    traces = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    for trace in traces:
        calendar = trace["calendar"]
        ((_, end_ns, _),) = calendar["windows"]
        assert abs(calendar["offset_ns"] - told[trace["rank"]][0]) < 20 * MS
        last = [send for send in trace["sends"] if send["not_after_ns"]][-1]
        closes_ns = (last["not_after_ns"] + calendar["offset_ns"]) % calendar["cycle_ns"]
        assert abs(closes_ns - end_ns) <= MS + 2 * told[trace["rank"]][1], "its windows are the calendar's"
        assert last["started_ns"] <= last["not_after_ns"] + TOLERANCE_NS
    assert traces[0]["calendar"]["windows"] != traces[1]["calendar"]["windows"]
    assert traces[0]["calendar"]["guard_ns"] >= 300_000, "clocks that must be asked for need longer guards"
