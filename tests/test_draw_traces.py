"""Traces as pictures and for Perfetto: slots stand where they were, whatever clock they were read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pictures import MS, call, check_labels, number, of_class, send, texts, trace

from detcoll.draw import (
    RankTrace,
    Span,
    chrome_trace,
    cycle_of_calendar,
    cycle_of_traces,
    cycle_picture,
    read_rank_traces,
    time_space,
    typical_call,
)
from detcoll.draw.timespace import joined
from detcoll.draw.traces import timed_sends
from detcoll.errors import UsageError
from detcoll.plan import Slotting, build_calendar
from detcoll.topology import Topology

TWO = (
    trace(0, 0, collectives=[call(0, 100)], sends=[send(10, 20, 1), send(60, 80, 1, not_after_ns=70 * MS)]),
    trace(1, 1, collectives=[call(0, 90, predicted_end_ns=95 * MS)], sends=[send(30, 40, 0)]),
)


def known(*told: dict[str, Any]) -> tuple[RankTrace, ...]:
    return tuple(msgspec.convert(each, RankTrace) for each in told)


def test_slots_stand_at_their_times() -> None:
    drawn = time_space(known(*TWO), 1000, Span(0, 100 * MS))
    lane = of_class(drawn, "lane")[0]
    left, wide = number(lane, "x"), number(lane, "width")

    def at_ms(x: float) -> float:
        return (x - left) / wide * 100

    planned = [
        (at_ms(number(node, "x")), at_ms(number(node, "x") + number(node, "width")))
        for node in of_class(drawn, "planned")[1:]  # the first stands in the legend
    ]
    assert planned[0] == pytest.approx((10, 15), abs=0.01), "100 kB at 20 MB/s, where the window has no end"
    assert planned[1] == pytest.approx((60, 70), abs=0.01)
    assert planned[2] == pytest.approx((30, 35), abs=0.01)
    sent = [
        (at_ms(number(node, "x")), at_ms(number(node, "x") + number(node, "width")))
        for node in of_class(drawn, "fill", "edge")
    ]
    assert sent[0] == pytest.approx((10, 20), abs=0.01)
    assert sent[1] == pytest.approx((60, 80), abs=0.01)
    lanes = of_class(drawn, "lane")
    assert number(lanes[0], "y") < number(lanes[1], "y"), "sites go down"
    assert {"site 0", "site 1"} <= set(texts(drawn))


@pytest.mark.parametrize("width", [920.0, 340.0])
def test_texts_of_traces_and_calendars_cover_nothing(width: float) -> None:
    names = ["a-site-with-a-long-name", "nanjing"]
    told = [trace(rank, rank // 12, sends=[send(10, 20, (rank + 12) % 24)]) for rank in range(24)]
    told[0]["collectives"] = [call(0, 1234.5)]
    check_labels(time_space(known(*told), width, site_names=names))
    calendar = trace(0, 0)
    calendar["calendar"]["windows"] = [[at * MS, at * MS + MS, at % 2] for at in range(12)]
    cycle = cycle_of_traces(known(calendar), names, lambda source, destination: 5 * MS)
    assert cycle is not None
    check_labels(cycle_picture(cycle, width))


def test_what_left_after_its_window_is_hatched() -> None:
    in_time = known(trace(0, 0, collectives=[call(0, 100)], sends=[send(60, 69, 1, not_after_ns=70 * MS)]))
    span = Span(0, 100 * MS)
    in_legend = len(of_class(time_space(in_time, 1000, span), "hatch"))
    assert in_legend > 0
    assert len(of_class(time_space(known(*TWO), 1000, span), "hatch")) > in_legend
    trimmed = known(trace(0, 0, collectives=[call(0, 100)], sends=[send(60, 69, 1, trimmed=True)]))
    assert len(of_class(time_space(trimmed, 1000, span), "hatch")) > in_legend


def test_slots_too_small_to_be_told_apart_are_joined() -> None:
    assert joined([(0, 3), (3.2, 6), (20, 22), (22, 40), (40, 41)]) == [(0, 6), (20, 22), (22, 41)]
    many = [send(at, at + 0.5, 1, nbytes=10_000) for at in range(50)]
    drawn = time_space(known(trace(0, 0, collectives=[call(0, 100_000)], sends=many), trace(1, 1)), 900)
    assert len(of_class(drawn, "fill", "edge")) == 0
    assert len(of_class(drawn, "planned")) == 2, "one, and the legend's"


def test_messages_of_a_flow_leave_one_after_another() -> None:
    sends = [
        send(1, 11, 1), send(2, 21, 1), send(3, 4, 1, nbytes=10), send(31, 0, 1, left_ns=0), send(5, 10, 2),
        send(40, 41, 1, not_before_ns=0),
    ]  # fmt: skip
    timed = timed_sends(*known(trace(0, 0, sends=sends)), {1: 1})
    assert [(each.begin_ns / MS, each.end_ns / MS) for each in timed] == [
        (1, 11), (11, 21), (3, 4), (5, 10), (31, 31), (40, 41),
    ]  # fmt: skip
    planned = [(each.planned_begin_ns / MS, each.planned_end_ns / MS) for each in timed]
    assert planned[:2] == [(1, 6), (6, 11)], "100 kB at 20 MB/s, one behind the other"
    assert planned[3:5] == [(5, 5), (31, 31)], "no rate is known, or it left at once"
    assert planned[5] == (40, 40), "what has no window is due when it is handed over"
    assert [each.dst_site for each in timed] == [1, 1, 1, -1, 1, 1]


def test_each_rank_is_set_to_its_sites_clock() -> None:
    shifted = json.loads(json.dumps(TWO[0]))
    shifted["calendar"]["offset_ns"] = 25 * MS
    drawn = time_space(known(shifted), 1000, Span(0, 100 * MS))
    lane, sent = of_class(drawn, "lane")[0], of_class(drawn, "fill", "edge")[0]
    share = (number(sent, "x") - number(lane, "x")) / number(lane, "width")
    assert share == pytest.approx(0.35, abs=1e-3)
    assert chrome_trace(known(shifted, TWO[1]))["otherData"]["origin_ns"] == 0


def test_ways_slant_by_the_delay() -> None:
    drawn = time_space(known(*TWO), 1000, Span(0, 100 * MS), one_way_ns=lambda source, destination: 5 * MS)
    lane = of_class(drawn, "lane")[0]
    per_ms = number(lane, "width") / 100
    (x1, y1), (x2, _), (x3, y3), (x4, _) = (
        tuple(map(float, pair.split(","))) for pair in of_class(drawn, "wedge")[0].attrib["points"].split()
    )
    assert (x4 - x1, x3 - x2) == pytest.approx((5 * per_ms, 5 * per_ms), abs=0.05)
    assert x2 - x1 == pytest.approx(10 * per_ms, abs=0.05)
    assert y3 > y1, "from site 0 down to site 1"


def test_prediction_and_end_are_marked_and_told() -> None:
    drawn = time_space(known(*TWO), 1000, Span(0, 100 * MS))
    lanes = of_class(drawn, "lane")
    left, per_ms = number(lanes[0], "x"), number(lanes[0], "width") / 100
    marks = {
        (round((number(node, "x1") - left) / per_ms), "dotted" in node.attrib["class"])
        for node in of_class(drawn, "mark")
        if number(node, "x1") >= left and number(node, "y1") > 40
    }
    assert marks >= {(100, False), (90, False), (95, True)}
    assert "at most 5.6" in (drawn.findtext("desc") or "")


def test_a_missed_window_is_crossed_out() -> None:
    missed = {"dst_site": 1, "not_before_ns": 40 * MS, "not_after_ns": 50 * MS}
    drawn = time_space(
        known(trace(0, 0, collectives=[call(0, 100)], sends=[send(1, 2, 1)], misses=[missed]), TWO[1]), 900
    )
    assert len(of_class(drawn, "cross")) == 2
    assert "missed window" in texts(drawn)


def test_the_middle_one_of_the_largest_calls_is_chosen() -> None:
    calls = [call(at * 100, at * 100 + 50, sequence=at, nbytes=10 if at == 3 else 400) for at in range(4)]
    span = typical_call(known(trace(0, 0, collectives=calls)))
    assert (span.begin_ns, span.end_ns) == (98 * MS, 152 * MS)


def test_traces_without_a_collective_say_how_to_get_one() -> None:
    with pytest.raises(UsageError, match="DETCOLL_TRACE"):
        time_space(known(trace(0, 0)), 900)


def test_a_rank_that_sends_nothing_keeps_its_lane() -> None:
    drawn = time_space(known(trace(0, 0, collectives=[call(0, 5)], calendar=None)), 340)
    assert len(of_class(drawn, "lane")) == 1


def test_the_calendar_of_three_sites_has_departures_and_arrivals() -> None:
    topology = Topology.uniform(3, 2, 125e6, 10 * MS)
    calendar = build_calendar(topology, Slotting.CALENDAR)
    cycle = cycle_of_calendar(calendar, topology)
    drawn = cycle_picture(cycle, 920)
    tracks = of_class(drawn, "track")
    assert len(tracks) == 6
    left, wide = number(tracks[0], "x"), number(tracks[0], "width")
    window = calendar.sites[0].windows[0]
    block = of_class(drawn, "fill")[0]
    assert number(block, "x") - left == pytest.approx(window.start_ns / cycle.cycle_ns * wide, abs=0.02)
    assert number(block, "width") == pytest.approx((window.end_ns - window.start_ns) / cycle.cycle_ns * wide, abs=0.02)
    arrival = next(each for each in cycle.arrivals[window.destination].blocks if each.label == "from site0")
    assert arrival.start_ns == (window.start_ns + 10 * MS) % cycle.cycle_ns
    assert any(text.startswith("to site") for text in texts(drawn)), "destinations are named, not coloured alone"


def test_a_window_over_the_end_of_the_cycle_goes_on_at_its_begin() -> None:
    told = trace(0, 0)
    told["calendar"]["windows"] = [[8 * MS, 14 * MS, 1]]
    cycle = cycle_of_traces(known(told))
    assert cycle is not None
    drawn = cycle_picture(cycle, 900)
    per_ms = number(of_class(drawn, "track")[0], "width") / 12
    widths = [number(node, "width") / per_ms for node in of_class(drawn, "fill")]
    assert widths == pytest.approx([4, 2], abs=0.01)


def test_ranks_that_take_turns_have_rows_of_their_own() -> None:
    told = [trace(rank, 0) for rank in range(2)]
    for rank, each in enumerate(told):
        each["calendar"]["windows"] = [[rank * 6 * MS, (rank + 1) * 6 * MS, -1]]
    cycle = cycle_of_traces(known(*told), ["guiyang"])
    assert cycle is not None
    assert [row.label for row in cycle.departures] == ["guiyang, rank 0", "guiyang, rank 1"]
    always = cycle_of_traces(known(trace(0, 0), trace(1, 0)))
    assert always is not None
    assert [[block.label for block in row.blocks] for row in always.departures] == [["open at all times"]]
    assert cycle_of_traces(known(trace(0, 0, calendar=None))) is None


def test_perfetto_gets_a_track_for_each_rank_and_line() -> None:
    told = chrome_trace(known(*TWO), ["guiyang", "nanjing"])
    events = told["traceEvents"]
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {
        (1, 1001): "rank 0", (1, 1002): "to nanjing, planned", (1, 1003): "to nanjing",
        (2, 1004): "rank 1", (2, 1005): "to guiyang, planned", (2, 1006): "to guiyang",
    }  # fmt: skip
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"guiyang", "nanjing"}
    sent = next(event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (2, 1006))
    assert (sent["ts"], sent["dur"], sent["cat"], sent["args"]["bytes"]) == (30_000, 10_000, "send", 100_000)
    late = [event["args"]["is_late"] for event in events if event.get("cat") == "send"]
    assert late == [False, True, False]
    predicted = [event["ts"] for event in events if event["ph"] == "i"]
    assert predicted == [100_000, 95_000]
    assert told["displayTimeUnit"] == "ms"
    json.loads(json.dumps(told, allow_nan=False))
    assert {event["ph"] for event in events} == {"M", "X", "i"}
    assert all({"ph", "pid", "tid", "name"} <= set(event) for event in events)


def test_times_of_perfetto_keep_the_nanosecond() -> None:
    year_ns = 365 * 86_400 * 10**9
    told = trace(0, 0, collectives=[call(0, 0, called_ns=year_ns, ended_ns=year_ns + 1001, predicted_end_ns=None)])
    slices = [event for event in chrome_trace(known(told))["traceEvents"] if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in slices] == [(0, 1.001)]


def test_slices_of_one_track_never_overlap_in_part() -> None:
    spans = [(0, 10), (5, 15), (6, 9), (10, 20), (16, 18), (17, 30)]
    sends = [send(begin, end, 10 + index, nbytes=1) for index, (begin, end) in enumerate(spans)]
    events = chrome_trace(known(trace(0, 0, sends=sends), *(trace(10 + at, 1) for at in range(6))))["traceEvents"]
    tracks: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") == "send":
            tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, tracks.values())) == len(spans)
    for track in tracks.values():
        for a, b in track:
            for c, d in track:
                assert not a < c < b < d, "a slice begins inside another and ends outside"
    assert len(tracks) == 2
    assert chrome_trace(())["traceEvents"] == []


def write(path: Path, told: object) -> Path:
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


def test_trace_files_are_read_by_rank(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"rank{rank}.json", trace(rank, 0, unknown=1)) for rank in (2, 0)]
    assert [each.rank for each in read_rank_traces(paths)] == [0, 2]
    again = write(tmp_path / "again.json", trace(0, 0))
    with pytest.raises(UsageError, match="rank 0"):
        read_rank_traces([*paths, again])


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "no trace"), ('{"schema": "x", "rank": 0, "site": 0}', "expected detcoll.trace/1"), ("[]", "no trace")],
)
def test_files_that_are_no_traces_are_refused_by_name(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "rank0.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=told) as caught:
        read_rank_traces([path])
    assert "rank0.json" in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_rank_traces([tmp_path / "absent.json"])
