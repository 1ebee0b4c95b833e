from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import PlanError
from detcoll.machine import SMALLEST_REST_NS, Machine, Queued, Slots
from detcoll.plan import Buffer, ChunkSize, Collective, Kind, Slotting, build_calendar
from detcoll.plan.calendar import Calendar, SiteCycle, SlotWindow
from detcoll.testing.plans import all_parts, sites_of
from detcoll.transport import SMALLEST_PART_BYTES, Window

MS = 1_000_000
TWO_BY_TWO = sites_of([2, 2])
RATE = 1e8
CALENDAR = Calendar(
    Slotting.TURNS,
    tuple(
        SiteCycle(20 * MS, (SlotWindow(a, 0, 9 * MS), SlotWindow(a + 1, 10 * MS, 19 * MS))) for a in (0, 2)
    ),
    (0.0, RATE, RATE, 0.0),
    MS,
)  # fmt: skip
MESSAGE = 200_000
"""Takes 2 ms, so four of them fit into a window of 9 ms."""

Given = list[tuple[Queued[int], Window | None]]


def slots(rank: int = 0, calendar: Calendar = CALENDAR, splits: bool = False, **options: int) -> Slots[int]:
    return Slots(calendar, rank // 2, rank, splits=splits, **options)


def queue(line: Slots[int], numbers: range, peer: int = 2, nbytes: int = MESSAGE) -> None:
    for number in numbers:
        line.add(Queued(number, peer // 2, peer, nbytes))


def numbers(given_out: Given) -> list[int]:
    return [send.item for send, _ in given_out]


def windows(given_out: Given) -> set[tuple[int, int | None]]:
    return {(window.not_before_ns, window.not_after_ns) for _, window in given_out if window is not None}


def test_a_window_is_filled_and_the_rest_waits_for_the_next() -> None:
    line = slots()
    queue(line, range(10))
    assert numbers(line.due(0)) == [0, 1, 2, 3]
    assert line.next_ns(0) == 9 * MS
    assert line.due(5 * MS) == []
    second = line.due(9 * MS)
    assert numbers(second) == [4, 5, 6, 7]
    assert windows(second) == {(20 * MS, 29 * MS)}
    assert line.next_ns(9 * MS) == 29 * MS
    assert numbers(line.due(29 * MS)) == [8, 9]
    assert line.next_ns(29 * MS) is None


def test_sends_are_given_out_ahead_of_the_window_only_to_who_holds_them() -> None:
    ahead, inside = slots(1), slots(1, ahead=False)
    for line in (ahead, inside):
        queue(line, range(2))
    early = ahead.due(1 * MS)
    assert windows(early) == {(10 * MS, 19 * MS)}
    assert inside.due(1 * MS) == []
    assert inside.next_ns(1 * MS) == 10 * MS
    assert numbers(inside.due(10 * MS)) == [0, 1]


def test_a_late_owner_uses_what_is_left() -> None:
    line = slots()
    queue(line, range(6))
    assert numbers(line.due(4 * MS)) == [0, 1]
    line = slots()
    queue(line, range(6))
    assert numbers(line.due(7 * MS + 1)) == []
    assert line.next_ns(7 * MS + 1) == 9 * MS


def test_a_rest_too_small_to_start_is_left_alone() -> None:
    line = slots()
    queue(line, range(1))
    assert windows(line.due(9 * MS - SMALLEST_REST_NS + 1)) == {(20 * MS, 29 * MS)}


def test_what_comes_later_goes_behind_what_was_given_out() -> None:
    line = slots()
    queue(line, range(3))
    assert numbers(line.due(0)) == [0, 1, 2]
    queue(line, range(3, 6))
    assert numbers(line.due(1 * MS)) == [3]


def test_frames_count() -> None:
    line = slots(frame_bytes=50_001)
    queue(line, range(10))
    assert len(line.due(0)) == 3


def test_another_connection_waits_until_the_one_before_has_drained() -> None:
    line = slots()
    queue(line, range(2), peer=2)
    queue(line, range(2, 4), peer=3)
    begins = [window.not_before_ns for _, window in line.due(0) if window is not None]
    assert begins == [0, 0, 4 * MS, 0]
    later = slots()
    queue(later, range(1), peer=2)
    later.due(0)
    queue(later, range(1), peer=3)
    assert windows(later.due(1 * MS)) == {(2 * MS, 9 * MS)}


def test_what_missed_its_window_goes_back_in_order() -> None:
    line = slots()
    queue(line, range(6))
    given_out = [(send, window) for send, window in line.due(0) if window is not None]
    line.sent(*given_out[0])
    line.missed([(send, window, 0) for send, window in given_out[1:]])
    assert [send.item for send in line.queue] == [1, 2, 3, 4, 5]
    again = line.due(9 * MS)
    assert numbers(again) == [1, 2, 3, 4]
    assert windows(again) == {(20 * MS, 29 * MS)}
    assert (line.misses, line.trimmed) == (0, 1)


def test_a_window_is_a_miss_only_if_nothing_was_sent_in_it() -> None:
    line = slots()
    queue(line, range(8))
    for start in (0, 9):
        line.missed([(send, window, 0) for send, window in line.due(start * MS) if window is not None])
    assert (line.misses, line.trimmed) == (2, 0)
    for send, window in line.due(29 * MS):
        assert window is not None
        line.sent(send, window)
        assert send.item < 4
    assert (line.misses, line.trimmed) == (2, 0)


def test_windows_that_pass_while_nobody_looks_are_missed() -> None:
    line = slots()
    queue(line, range(8))
    for send, window in line.due(0):
        assert window is not None
        line.sent(send, window)
    assert numbers(line.due(64 * MS)) == [4, 5], "of the window from 60 to 69 ms half is left"
    assert (line.misses, line.trimmed) == (2, 0)
    assert list(line.missed_windows) == [(-1, 20 * MS, 29 * MS), (-1, 40 * MS, 49 * MS)]
    line.due(69 * MS)
    assert line.misses == 2, "what was given out is counted when it was sent or was not"


def test_a_window_passes_unused_only_if_something_waited_when_it_opened() -> None:
    line = slots()
    line.due(100 * MS)
    queue(line, range(1))
    assert line.due(108 * MS) == []
    assert line.next_ns(108 * MS) == 109 * MS
    assert windows(line.due(109 * MS)) == {(120 * MS, 129 * MS)}
    assert line.misses == 0


def test_a_window_that_is_full_already_is_not_missed_by_what_comes_later() -> None:
    line = slots()
    queue(line, range(4))
    for send, window in line.due(15 * MS):
        assert window is not None
        line.sent(send, window)
    queue(line, range(4, 6))
    assert line.due(16 * MS) == []
    assert windows(line.due(29 * MS)) == {(40 * MS, 49 * MS)}
    assert line.misses == 0


def test_what_comes_back_late_missed_the_windows_meanwhile_too() -> None:
    line = slots()
    queue(line, range(1))
    ((send, window),) = line.due(0)
    assert window is not None
    line.missed([(send, window, 0)])
    assert windows(line.due(50 * MS)) == {(60 * MS, 69 * MS)}
    assert [begins_ns for _, begins_ns, _ in line.missed_windows] == [0, 20 * MS, 40 * MS]
    assert line.misses == 3


def test_misses_name_the_site_that_a_window_leads_to_and_an_offset_shifts_them() -> None:
    cycle = SiteCycle(20 * MS, (SlotWindow(-1, 0, 9 * MS, 1), SlotWindow(-1, 15 * MS, 24 * MS, 2)))
    line: Slots[int] = Slots(Calendar(Slotting.CALENDAR, (cycle,) * 3, (RATE,) * 9, MS), 0, 0, offset_ns=5 * MS)
    line.add(Queued(0, 2, 4, MESSAGE))
    ((send, window),) = line.due(0)
    assert window is not None
    assert (window.not_before_ns, window.not_after_ns) == (-10 * MS, -1 * MS) or window.not_before_ns == 10 * MS
    line.missed([(send, window, 0)])
    line.due(40 * MS)
    assert [entry for entry in line.missed_windows] == [(2, 10 * MS, 19 * MS), (2, 30 * MS, 39 * MS)]


def test_a_miss_is_taken_back_when_something_smaller_went_after_all() -> None:
    line = slots()
    queue(line, range(2))
    (first, window), (second, _) = line.due(0)
    assert window is not None
    line.missed([(first, window, 0)])
    assert (line.misses, len(line.missed_windows)) == (1, 1)
    line.sent(second, window)
    assert (line.misses, line.trimmed, len(line.missed_windows)) == (0, 1, 0)


def test_a_send_that_fits_in_part_is_given_out_and_its_rest_opens_the_next_window() -> None:
    line = slots(splits=True)
    queue(line, range(10))
    first = [(send, window) for send, window in line.due(0) if window is not None]
    assert numbers(first) == [0, 1, 2, 3, 4]
    for send, window in first[:4]:
        line.sent(send, window)
    line.missed([(*first[4], 100_000)])
    assert (line.misses, line.trimmed) == (0, 0), "cut as planned"
    second = line.due(9 * MS)
    assert numbers(second) == [4, 5, 6, 7, 8]
    assert [(send.nbytes, send.sent_bytes) for send, _ in second] == [(100_000, 100_000)] + [(MESSAGE, 0)] * 4
    assert windows(second) == {(20 * MS, 29 * MS)}


def test_a_send_that_should_have_fitted_counts_as_trimmed() -> None:
    line = slots(splits=True)
    queue(line, range(2))
    (first, _), (second, window) = line.due(0)
    assert window is not None
    assert (first.fits, second.fits) == (True, True)
    line.missed([(second, window, MESSAGE - 10)])
    assert (line.misses, line.trimmed) == (0, 1)
    assert [(send.nbytes, window.takes_ns(send.nbytes)) for send, window in line.due(9 * MS) if window] == [(10, 100)]


def test_a_part_too_small_for_a_frame_is_left_alone() -> None:
    line = slots(splits=True)
    queue(line, range(2), nbytes=900_000 - SMALLEST_PART_BYTES + 1)
    assert numbers(line.due(0)) == [0]
    line = slots(splits=True)
    queue(line, range(2), nbytes=900_000 - SMALLEST_PART_BYTES)
    assert numbers(line.due(0)) == [0, 1]


def test_an_offset_shifts_the_windows() -> None:
    line = slots(offset_ns=3 * MS)
    queue(line, range(1))
    assert windows(line.due(6 * MS + 1)) == {(17 * MS, 26 * MS)}
    negative = slots(offset_ns=-3 * MS)
    queue(negative, range(1))
    assert windows(negative.due(0)) == {(3 * MS, 12 * MS)}


def test_a_message_larger_than_its_window_is_an_error() -> None:
    line = slots()
    queue(line, range(1), nbytes=900_001)
    with pytest.raises(PlanError, match="900001 bytes takes 9000010 ns, its window 9000000 ns"):
        line.due(0)


@pytest.mark.parametrize(("sites", "mode"), [([2, 2], Slotting.TURNS), ([2, 2, 2], Slotting.CALENDAR)])
def test_who_does_not_know_the_time_sends_at_once_at_a_share(sites: list[int], mode: Slotting) -> None:
    calendar = build_calendar(sites_of(sites), mode)
    line: Slots[int] = Slots(calendar, 0, 0, trusted=False)
    line.add(Queued(0, 1, 2, MESSAGE))
    assert line.next_ns(5) == 5
    ((_, window),) = line.due(5)
    assert window == Window(5, None, calendar.rate_bytes_per_s(0, 1) / 2)
    line.trusted = True
    line.add(Queued(0, 1, 2, MESSAGE))
    ((_, window),) = line.due(6)
    assert window is not None
    assert window.not_after_ns is not None
    assert window.rate_bytes_per_s == calendar.rate_bytes_per_s(0, 1)


def test_a_lone_rank_sends_at_once_at_its_rate() -> None:
    topology = sites_of([1, 1])
    calendar = build_calendar(topology)
    line: Slots[int] = Slots(calendar, 0, 0)
    line.add(Queued(7, 1, 1, MESSAGE))
    assert line.next_ns(5) == 5
    (send, window), *rest = line.due(5)
    assert (send.item, rest) == (7, [])
    assert window == Window(5, None, calendar.rate_bytes_per_s(0, 1))
    assert line.next_ns(6) is None


def test_shares_pace_without_a_window_and_off_does_not() -> None:
    topology = sites_of([2, 2, 2])
    for mode in (Slotting.SHARE, Slotting.OFF):
        calendar = build_calendar(topology, mode)
        line: Slots[int] = Slots(calendar, 0, 0)
        line.add(Queued(0, 1, 2, MESSAGE))
        line.add(Queued(1, 2, 4, MESSAGE))
        expected = Window(0, None, calendar.rate_bytes_per_s(0, 1)) if mode is Slotting.SHARE else None
        assert [window for _, window in line.due(0)] == [expected, expected]


@settings(max_examples=200)
@given(
    rank=st.integers(0, 1),
    start_ns=st.integers(0, 40 * MS),
    sends=st.lists(st.tuples(st.integers(2, 3), st.integers(1, 900_000)), min_size=1, max_size=30),
    waits=st.lists(st.integers(0, 15 * MS), max_size=10),
    splits=st.booleans(),
)
def test_nothing_ever_leaves_its_window(
    rank: int, start_ns: int, sends: list[tuple[int, int]], waits: list[int], splits: bool
) -> None:
    line = slots(rank, splits=splits)
    for number, (peer, nbytes) in enumerate(sends):
        line.add(Queued(number, 1, peer, nbytes))
    now, drained, order, pending, sent_bytes = start_ns, 0, [], list(waits), 0
    while line.queue:
        for send, window in line.due(now):
            assert window is not None
            assert window.not_after_ns is not None
            assert (window.not_after_ns - (9 if rank == 0 else 19) * MS) % (20 * MS) == 0
            begin = max(window.not_before_ns, drained, now)
            part_bytes = window.fitting_bytes(send.nbytes, begin, 0)
            assert (
                part_bytes == send.nbytes if send.fits else splits and SMALLEST_PART_BYTES <= part_bytes < send.nbytes
            )
            drained = begin + window.takes_ns(part_bytes)
            assert window.not_after_ns - 9 * MS <= begin
            assert drained <= window.not_after_ns
            sent_bytes += part_bytes
            if part_bytes == send.nbytes:
                order.append(send.item)
            else:
                line.missed([(send, window, part_bytes)])
        following = line.next_ns(now)
        if following is not None:
            now = following + (pending.pop() if pending else 0)
    assert order == sorted(order)
    assert len(order) == len(sends)
    assert sent_bytes == sum(nbytes for _, nbytes in sends)


def test_a_machine_starts_what_waits_for_nothing_and_then_what_became_ready() -> None:
    parts = all_parts(Collective("all_reduce", 4, 4, 4), sites_of([1, 1]), "exchange", ChunkSize(4, 1))
    machine = Machine(parts[0])
    kinds = [Kind(row["kind"]) for row in parts[0].steps]
    assert kinds == [Kind.FOLD, Kind.SEND, Kind.RECV, Kind.FOLD]
    assert machine.start() == [0, 2]
    assert machine.waiting_for() == {1: 1}
    assert machine.ended(0) == [1]
    assert machine.waiting_for() == {1: 2}
    assert machine.ended(2) == [3]
    assert machine.ended(3) == []
    assert machine.result_ready
    assert not machine.done
    assert machine.ended(1) == []
    assert machine.done
    assert machine.waiting_for() == {}


def test_a_result_is_not_ready_while_the_callers_array_is_being_sent() -> None:
    parts = all_parts(Collective("broadcast", 8, 4, 4), sites_of([1, 1]), "star", ChunkSize(4, 1))
    machine = Machine(parts[0])
    assert machine.start() == [0, 1]
    assert parts[0].steps["buffer"].tolist() == [Buffer.OUT, Buffer.PARTIAL, Buffer.PARTIAL]
    assert machine.ended(1) == [2], "the last chunk is copied, and sent from there"
    assert not machine.result_ready
    machine.ended(0)
    assert machine.result_ready
    assert not machine.done


def test_a_step_cannot_end_before_it_started() -> None:
    parts = all_parts(Collective("all_reduce", 4, 4, 4), sites_of([1, 1]), "exchange", ChunkSize(4, 1))
    machine = Machine(parts[0])
    machine.start()
    with pytest.raises(KeyError):
        machine.ended(3)


def test_an_empty_plan_is_done_at_once() -> None:
    parts = all_parts(Collective("all_reduce", 0, 4, 4), sites_of([1, 1]), "exchange", ChunkSize(4, 1))
    machine = Machine(parts[0])
    assert machine.start() == []
    assert machine.done
    assert machine.result_ready


def test_windows_of_unequal_sites_are_their_own() -> None:
    calendar = build_calendar(sites_of([2, 3]), Slotting.TURNS, slot_ns=10 * MS)
    line: Slots[int] = Slots(replace(calendar, guard_ns=0), 1, 4)
    line.add(Queued(0, 0, 0, MESSAGE))
    assert windows(line.due(0)) == {(20 * MS, 30 * MS - calendar.guard_ns)}
