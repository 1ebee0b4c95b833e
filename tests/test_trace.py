"""Rows of a trace, and what becomes of them."""

from __future__ import annotations

from detcoll.trace import LARGEST_TRACE, Call, Records, Trace

SUM, COPY = Call("all_reduce", 100, "exchange", "sum"), Call("broadcast", 5, "star", "copy")


def test_records_keep_the_last_rows_in_order() -> None:
    records = Records(("a", "b"), largest=3)
    assert (len(records), records.rows()) == (0, [])
    for number in range(7):
        records.append((number, -number))
        assert [row["a"] for row in records.rows()] == list(range(max(number - 2, 0), number + 1))
        assert len(records) == min(number + 1, 3)
    assert records.rows()[-1] == {"a": 6, "b": -6}


def test_records_take_times_of_years_and_stay_small() -> None:
    records = Records(("at_ns",))
    for _ in range(LARGEST_TRACE + 10):
        records.append((2**62,))
    assert len(records) == LARGEST_TRACE
    assert records.rows()[0] == {"at_ns": 2**62}


def test_calls_are_written_with_the_end_predicted_for_each() -> None:
    trace = Trace(3, 1, recording=True)
    trace.note_collective(0, SUM, 1000, 1500)
    trace.note_collective(1, COPY, 2000, 2300)
    trace.note_collective(2, SUM, 3000, 3600)
    told = trace.to_json(lambda call, called_ns: called_ns // 10 if call.subject == "sum" else None)
    assert [call["predicted_end_ns"] for call in told["collectives"]] == [1100, None, 3300]
    assert told["collectives"][1] == {
        "sequence": 1, "kind": "broadcast", "nbytes": 5, "algorithm": "star", "called_ns": 2000, "ended_ns": 2300,
        "predicted_end_ns": None, "group": 1,
    }  # fmt: skip
    assert [call["predicted_end_ns"] for call in trace.to_json()["collectives"]] == [None] * 3


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    trace = Trace(0, 0)
    trace.note_collective(0, SUM, 1, 2)
    assert trace.to_json()["collectives"] == []


def test_sends_and_misses_are_written_by_name() -> None:
    trace = Trace(0, 0, recording=True, misses=[(2, 10, 20)])
    trace.sends.append((7, 1, 100, 10, 20, 12, 18, 30, 1, 9))
    told = trace.to_json()
    assert told["sends"] == [{
        "sequence": 7, "dst": 1, "nbytes": 100, "not_before_ns": 10, "not_after_ns": 20, "started_ns": 12,
        "left_ns": 18, "ended_ns": 30, "trimmed": True, "group": 9,
    }]  # fmt: skip
    assert told["misses"] == [{"dst_site": 2, "not_before_ns": 10, "not_after_ns": 20}]
