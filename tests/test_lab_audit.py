"""The audit on made-up logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detcoll.emulation.lab import RECORD, Audit, audit, read_traces
from detcoll.emulation.lab.unit import TCP, UDP
from detcoll.errors import UsageError
from detcoll.topology import Topology

TOPOLOGY = Topology.uniform(2, 2, 1e6, 1000)
CYCLE_NS = 1000


def bulk_inside_share(found: Audit) -> float:
    """The share of bulk payload that came inside its owner's windows; 0 if there was none."""
    return found.bulk_inside_bytes / found.bulk_bytes if found.bulk_bytes else 0.0


def number(site: int) -> int:
    return 0x0A4D0001 | site << 8


def trace(
    rank: int, windows: list[list[int]] | None, offset_ns: int = 0, lanes: tuple[str, ...] = ("bulk",)
) -> dict[str, Any]:
    """Rank r of site s sends to rank (r + 2) % 4 from port 4000 + 10 r + lane."""
    site, other = rank // 2, 1 - rank // 2
    connections = [
        {"dst": (rank + 2) % 4, "lane": lane, "local": f"10.77.{site}.1:{4000 + 10 * rank + index}",
         "remote": f"10.77.{other}.1:6000"}
        for index, lane in enumerate(lanes)
    ]  # fmt: skip
    calendar = None
    if windows is not None:
        calendar = {
            "cycle_ns": CYCLE_NS,
            "windows": windows,
            "offset_ns": offset_ns,
            "guard_ns": 5,
            "mode": "turns",
            "rates_bytes_per_s": [],
            "burst_bytes": [],
            "line_share": 1.0,
        }
    return {"schema": "detcoll.trace/1", "rank": rank, "site": f"site{site}", "calendar": calendar,
            "connections": connections, "spans": []}  # fmt: skip


def sharing(rank: int, line_share: float = 0.495, rate: float = 1e8) -> dict[str, Any]:
    """A rank whose window never closes and holds 100 bytes at its rate."""
    shared = trace(rank, [[0, CYCLE_NS]])
    rates = [0.0 if site == rank // 2 else rate for site in range(2)]
    shared["calendar"] |= {"rates_bytes_per_s": rates, "burst_bytes": [100.0, 100.0], "line_share": line_share}
    return shared


def traces(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    usual = [trace(rank, [[0, 400]] if rank % 2 == 0 else [[500, 900]]) for rank in range(4)]
    for name, changed in changes.items():
        usual[int(name[1:])] = changed
    return usual


def log(*rows: tuple[int, int, int, int]) -> NDArray[Any]:
    """Make records from rows of time, site, source port and payload bytes."""
    records = np.zeros(len(rows), dtype=RECORD)
    for record, (time_ns, site, port, payload) in zip(records, rows, strict=True):
        record["time_ns"], record["source_site"], record["destination_site"] = time_ns, site, 1 - site
        record["source_address"], record["destination_address"] = number(site), number(1 - site)
        record["source_port"], record["destination_port"], record["protocol"] = port, 6000, TCP
        record["payload_bytes"], record["wire_bytes"] = payload, payload + 52
        record["queue_bytes"] = payload + 52
    return records


def test_payload_inside_and_outside_its_owners_window() -> None:
    found = audit(
        log(
            (5 * CYCLE_NS + 0, 0, 4000, 100),  # the first instant of rank 0's window
            (5 * CYCLE_NS + 399, 0, 4000, 200),
            (5 * CYCLE_NS + 400, 0, 4000, 1000),  # the end is outside
            (6 * CYCLE_NS + 600, 0, 4010, 400),
            (6 * CYCLE_NS + 100, 0, 4010, 2000),  # in rank 0's window, which is not its own
            (7 * CYCLE_NS + 550, 1, 4030, 800),
        ),
        traces(),
        TOPOLOGY,
    )
    assert (found.bulk_bytes, found.bulk_inside_bytes) == (4500, 1500)
    assert bulk_inside_share(found) == pytest.approx(1 / 3)
    assert found.windows_disjoint
    assert not found.is_slotted


def test_offsets_move_the_windows() -> None:
    records = log((10_000 + 450, 0, 4000, 100))
    assert audit(records, traces(), TOPOLOGY).bulk_inside_bytes == 0
    moved = traces(r0=trace(0, [[0, 400]], offset_ns=-60), r1=trace(1, [[500, 900]], offset_ns=-40))
    found = audit(records, moved, TOPOLOGY)
    assert found.bulk_inside_bytes == 100
    assert found.clock_spread_ns == (20, 0)
    assert found.is_slotted


def test_windows_that_run_over_the_end_of_the_cycle() -> None:
    wrapped = traces(r0=trace(0, [[950, 1100]]), r1=trace(1, [[100, 900]]))
    found = audit(
        log((20_050, 0, 4000, 1), (20_099, 0, 4000, 2), (20_960, 0, 4000, 4), (20_100, 0, 4000, 8)), wrapped, TOPOLOGY
    )
    assert found.bulk_inside_bytes == 7
    assert found.windows_disjoint
    touching = traces(r0=trace(0, [[950, 1100]]), r1=trace(1, [[90, 900]]))
    assert audit(log(), touching, TOPOLOGY).overlap_ns == (10, 0)


def test_windows_lead_to_one_site_or_to_any() -> None:
    records = log((10_000, 0, 4000, 100), (10_200, 0, 4000, 10), (10_600, 0, 4010, 1))
    led = traces(r0=trace(0, [[0, 100, 1], [100, 400, 0]]), r1=trace(1, [[500, 900, -1]]))
    assert audit(records, led, TOPOLOGY).bulk_inside_bytes == 101
    with pytest.raises(UsageError, match="is no trace"):
        audit(records, traces(r0=trace(0, [[0]])), TOPOLOGY)


def test_overlapping_windows_of_a_site_are_found_and_those_of_two_sites_are_none() -> None:
    overlapping = traces(r3=trace(3, [[300, 350], [390, 900]]))
    found = audit(log((0, 0, 4000, 1)), overlapping, TOPOLOGY)
    assert found.overlap_ns == (0, 60)
    assert not found.windows_disjoint
    assert bulk_inside_share(found) == 1
    assert not found.is_slotted


def test_ranks_that_share_a_slot_are_held_to_their_rates() -> None:
    shared = [sharing(rank) for rank in range(4)]
    kept = log((0, 0, 4000, 100), (10, 0, 4010, 100), (500, 0, 4000, 50), (1000, 0, 4000, 50), (1000, 1, 4020, 100))
    found = audit(kept, shared, TOPOLOGY)
    assert (bulk_inside_share(found), found.overlap_ns, found.ranks_share) == (1.0, (0, 0), True)
    assert found.is_slotted
    hasty = log((0, 0, 4000, 100), (500, 0, 4000, 51), (999, 0, 4000, 99), (1000, 0, 4010, 100))
    found = audit(hasty, shared, TOPOLOGY)
    assert (found.bulk_bytes, found.bulk_inside_bytes) == (350, 299)  # a policer passes what comes after enough time
    assert not found.is_slotted


def test_connections_of_a_rank_to_one_site_are_held_to_its_rate_together() -> None:
    two = [sharing(rank) for rank in range(4)]
    two[0]["connections"].append({**two[0]["connections"][0], "dst": 3, "local": "10.77.0.1:4005"})
    both = log((0, 0, 4000, 100), (500, 0, 4005, 100), (1000, 0, 4000, 50))
    found = audit(both, two, TOPOLOGY)
    assert (found.bulk_bytes, found.bulk_inside_bytes) == (250, 150)
    in_turn = log((0, 0, 4000, 100), (1000, 0, 4005, 100), (2000, 0, 4000, 50))
    assert audit(in_turn, two, TOPOLOGY).is_slotted
    two[0]["calendar"]["flows"] = [0, 2]
    assert audit(both, two, TOPOLOGY).is_slotted, "a rate was reserved for each"


def test_shares_that_add_up_to_more_than_the_line_are_found() -> None:
    greedy = [sharing(rank, 0.505 if rank < 2 else 0.5) for rank in range(4)]
    found = audit(log((0, 0, 4000, 1)), greedy, TOPOLOGY)
    assert found.overlap_ns == (CYCLE_NS, 0)
    assert not found.is_slotted


def test_lanes_and_strangers_are_told_apart() -> None:
    records = log((0, 0, 4000, 1000), (10, 0, 4001, 10), (600, 0, 4001, 20), (0, 0, 9999, 100))
    records = np.append(records, records[0])
    records[-1]["destination_port"] = 6001  # the same source to somebody else is another connection
    found = audit(records, traces(r0=trace(0, [[0, 400]], lanes=("bulk", "express"))), TOPOLOGY)
    assert (found.bulk_bytes, found.express_bytes, found.other_bytes) == (1000, 30, 1100)
    assert found.express_inside_bytes == 10
    assert found.payload_inside_share == pytest.approx(1010 / 2130)


def with_headroom(rank: int, rate: float = 1e8, burst: float = 100.0) -> dict[str, Any]:
    """A rank whose express connection may carry 100 bytes at once, and one every 10 ns."""
    stated = trace(rank, [[0, 400]], lanes=("bulk", "express"))
    stated["calendar"] |= {"express_bytes_per_s": rate, "express_burst_bytes": burst}
    return stated


def test_express_belongs_to_the_headroom_and_beyond_it_counts_as_outside() -> None:
    kept = log((0, 0, 4000, 400), (500, 0, 4001, 100), (1000, 0, 4001, 50))
    found = audit(kept, traces(r0=with_headroom(0)), TOPOLOGY)
    assert (found.express_bytes, found.express_inside_bytes) == (150, 150)
    assert (found.kept_share, found.payload_inside_share) == (1.0, 1.0)
    assert found.is_slotted
    hasty = log((0, 0, 4000, 400), (500, 0, 4001, 100), (999, 0, 4001, 50), (1000, 0, 4001, 50))
    found = audit(hasty, traces(r0=with_headroom(0)), TOPOLOGY)
    assert (found.express_bytes, found.express_inside_bytes) == (200, 150)
    assert found.kept_share == pytest.approx(400 / 450)
    assert bulk_inside_share(found) == 1.0
    assert not found.is_slotted


def test_a_run_of_small_messages_alone_is_slotted_if_it_keeps_to_the_headroom() -> None:
    found = audit(log((600, 0, 4001, 100)), traces(r0=with_headroom(0)), TOPOLOGY)
    assert (found.bulk_bytes, found.kept_share) == (0, 1.0)
    assert found.is_slotted
    found = audit(log((600, 0, 4001, 101)), traces(r0=with_headroom(0)), TOPOLOGY)
    assert (found.kept_share, found.is_slotted) == (0.0, False)


def test_only_tcp_payload_counts() -> None:
    records = log((0, 0, 4000, 100), (500, 0, 4000, 0), (500, 0, 4000, 700))
    records["protocol"][2] = UDP
    found = audit(records, traces(), TOPOLOGY)
    assert (found.bulk_bytes, bulk_inside_share(found), found.other_bytes) == (100, 1.0, 0)


def test_a_rank_without_a_calendar_is_always_outside() -> None:
    found = audit(log((0, 0, 4000, 100)), traces(r0=trace(0, None)), TOPOLOGY)
    assert (found.bulk_bytes, found.bulk_inside_bytes) == (100, 0)


def test_queues_are_held_against_a_window() -> None:
    wide = Topology.uniform(2, 2, 1e9, 1000)  # a byte a nanosecond
    found = audit(log((0, 0, 4000, 348), (0, 1, 4020, 349)), traces(), wide)
    assert found.peak_queue_bytes == (400, 401)
    assert found.window_capacity_bytes == (400, 400)
    assert not found.queues_within_windows
    assert audit(log((0, 0, 4000, 348)), traces(), wide).queues_within_windows
    slept = audit(log((0, 0, 4000, 348), (0, 1, 4020, 349)), traces(), wide, router_late_ns=1)
    assert slept.asleep_bytes == (1, 1)
    assert slept.queues_within_windows


def test_an_empty_log_proves_nothing() -> None:
    found = audit(log(), traces(), TOPOLOGY)
    assert (bulk_inside_share(found), found.payload_inside_share, found.is_slotted) == (0.0, 0.0, False)
    assert found.peak_queue_bytes == (0, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (traces()[:3], "ranks \\[0, 1, 2\\]; expected one of each of 4"),
        ([*traces(), trace(2, None)], "two of rank 2"),
        (traces(r1=trace(1, None) | {"schema": "other/1"}), "traces\\[1\\] is no trace.*schema"),
        (traces(r1={"rank": 1}), "traces\\[1\\] is no trace"),
        (
            traces(r1=trace(1, []) | {"calendar": sharing(1)["calendar"] | {"cycle_ns": 7}}),
            "site 0 have cycles of \\[7, 1000\\]",
        ),
    ],
)
def test_bad_traces_are_refused(given: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        audit(log(), given, TOPOLOGY)


def test_traces_are_read_from_files(tmp_path: Path) -> None:
    paths = []
    for entry in traces():
        paths.append(tmp_path / f"{entry['rank']}.json")
        paths[-1].write_text(json.dumps(entry), encoding="utf-8")
    assert audit(log((0, 0, 4000, 5)), read_traces(paths), TOPOLOGY).is_slotted
    (tmp_path / "bad.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UsageError, match="not a JSON object"):
        read_traces([tmp_path / "bad.json"])
    with pytest.raises(UsageError, match="cannot be read"):
        read_traces([tmp_path / "missing.json"])
