"""Ranks of a site whose clocks differ agree about their windows, and sites whose clocks differ align arrivals."""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import pairwise

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
def test_clocks_that_are_an_hour_apart(tmp_path) -> None:
    shift_s = 3600
    ended = launch(
        4, "shifted.py", "shifted", shift_s, 1, topology=lines(2, 2), folder=tmp_path,
        environ={"DETCOLL_TRACE": str(tmp_path), "DETCOLL_SLOTTING": "turns"},
    )  # fmt: skip
    assert ended.code == 0, ended.err
    told = {rank: said[0] for rank, said in ended.said.items()}
    for leader in (0, 2):
        follower = leader + 1
        assert told[leader][:2] == [0, 0], "the leader's clock is the site's"
        offset_ns, bound_ns, now_ns = told[follower]
        assert abs(now_ns - told[leader][2] - shift_s * 10**9) < 20 * 10**9, "the clocks were not apart"
        assert 0 < bound_ns < 1000 * MS  # a quiet host knows it to a millisecond
        assert abs(offset_ns + shift_s * 10**9) <= bound_ns
    traces = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    for trace in traces:
        calendar = trace["calendar"]
        ((_, end_ns, _),) = calendar["windows"]
        assert abs(calendar["offset_ns"] - told[trace["rank"]][0]) < 20 * MS + 2 * told[trace["rank"]][1]
        last = [send for send in trace["sends"] if send["not_after_ns"]][-1]
        closes_ns = (last["not_after_ns"] + calendar["offset_ns"]) % calendar["cycle_ns"]
        assert abs(closes_ns - end_ns) <= MS + 2 * told[trace["rank"]][1], "its windows are the calendar's"
        assert last["started_ns"] <= last["not_after_ns"] + TOLERANCE_NS
    assert traces[0]["calendar"]["windows"] != traces[1]["calendar"]["windows"]
    assert traces[0]["calendar"]["guard_ns"] >= 300_000, "clocks that must be asked for need longer guards"


@pytest.mark.usefixtures("time_namespaces")
def test_windows_of_sites_whose_clocks_are_apart_do_not_meet_at_a_receiver(tmp_path) -> None:
    """On one host the true time is known: that of rank 0, from which the other clocks differ by whole seconds."""
    shift_s, topology = 7, lines(2, 2, 2)
    for _ in range(6):  # a busy machine may not tell arrivals well enough for windows, or be late for those of a site
        ended = launch(
            6, "shifted.py", "shifted_sites", shift_s, 2, topology=topology, folder=tmp_path,
            environ={"DETCOLL_TRACE": str(tmp_path), "DETCOLL_SLOTTING": "calendar"},
        )  # fmt: skip
        assert ended.code == 0, ended.err
        told = {rank: said[0] for rank, said in ended.said.items()}
        arrivals: dict[int, set[tuple[int, int, int]]] = {0: set(), 1: set(), 2: set()}
        for rank in range(6):
            site = rank // 2
            for send in json.loads((tmp_path / f"rank{rank}.json").read_text())["sends"]:
                if send["not_after_ns"]:
                    there = send["dst"] // 2
                    late_ns = topology.one_way_ns(site, there) - site * shift_s * 10**9
                    arrivals[there].add((send["not_before_ns"] + late_ns, send["not_after_ns"] + late_ns, site))
        senders = [{site for _, _, site in windows} for windows in arrivals.values()]
        if {mode for mode, *_ in told.values()} == {"calendar"} and all(len(sites) == 2 for sites in senders):
            break
    for rank in range(6):
        site, (mode, guard_ns, now_ns, _, _) = rank // 2, told[rank]
        assert mode == "calendar", ended.err
        assert guard_ns >= 500_000, "guards allow for hosts, ranks of a site, and readings that wander"
        assert abs(now_ns - told[0][2] - site * shift_s * 10**9) < 5 * 10**9, "the clocks were not apart"
    assert senders == [{1, 2}, {0, 2}, {0, 1}]
    for windows in arrivals.values():
        for (_, end_ns, site), (start_ns, _, next_site) in pairwise(sorted(windows)):
            # A job takes arrivals that are misaligned by up to 1 ms, which happens on a busy machine.
            assert site == next_site or start_ns > end_ns - MS
