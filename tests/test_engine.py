"""The engine: the rules of calls, stepped through in virtual time by a fleet of engines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import Closed, DeadlineMissed, PeerLost, PlanMismatch, UsageError
from detcoll.fold import reference
from detcoll.runtime import Group, blame, credit
from detcoll.runtime.actions import Act
from detcoll.runtime.control import Answer, Ask, Cause, State
from detcoll.runtime.engine import GREETING_DELAY_NS, HELLO_TAG
from detcoll.runtime.group import PLAN_BITS, SEQUENCES
from detcoll.runtime.recorder import LARGEST_RECORD, Recorder
from detcoll.testing.fleet import SECOND_NS, Called, Fleet, Program
from detcoll.types import ReduceOp

MS = 1_000_000
SHAPES = {"3": [3], "4": [4], "7": [7], "2+2": [2, 2], "3+4": [3, 4], "1+1+1": [1, 1, 1]}


def ones(count: int, value: float = 1.0) -> np.ndarray[Any, Any]:
    return np.full(count, value, np.float32)


def sums(fleet: Fleet, count: int, *, ranks: Sequence[int] | None = None, **given: Any) -> list[Called]:
    """Let all ranks of a group sum ones."""
    ranks = ranks if ranks is not None else (given["group"].ranks if given.get("group") else range(len(fleet.hosts)))
    return [fleet.call(rank, "all_reduce", ones(count), **given) for rank in ranks]


def check_sums(calls: Sequence[Called], size: int | None = None) -> None:
    for call in calls:
        assert call.ended
        assert call.error is None, call.error
        assert (call.array == (size or len(calls))).all()


def culprit(call: Called) -> int:
    """Return whom the error of a call names."""
    assert isinstance(call.error, DeadlineMissed), call.error
    named = re.findall(r"it waits for rank (\d+)", str(call.error))
    assert len(named) == 1, call.error
    return int(named[0])


# Groups beside each other.


def test_a_group_that_waits_for_a_rank_does_not_slow_another_down() -> None:
    def run(blocked: bool) -> list[int]:
        fleet = Fleet(4)
        held, free = fleet.group([0, 1, 2]), fleet.group([1, 2, 3])
        if blocked:
            for _ in range(40):  # more than may be under way at once
                sums(fleet, 300_000, ranks=[0, 1], group=held, timeout_s=3600.0)
        fleet.run(SECOND_NS)
        calls = [call for _ in range(40) for call in sums(fleet, 5_000, group=free)]
        fleet.run(10 * SECOND_NS)
        check_sums(calls, 3)
        return [call.ended_ns for call in calls]

    assert run(blocked=True) == run(blocked=False)


@pytest.mark.parametrize("credit_bytes", [1 << 20, 16 << 20])
def test_a_send_without_credit_delays_only_its_own_peer(credit_bytes: int) -> None:
    """Rank 1 never calls, so rank 0 fills what rank 1 holds for it; ranks 0 and 2 go on."""

    def run(blocked: bool) -> list[int]:
        fleet = Fleet(3, credit_bytes=credit_bytes)
        first, second = fleet.group([0, 1]), fleet.group([0, 2])
        if blocked:
            for _ in range(8):
                fleet.call(0, "broadcast", ones(1 << 20), group=first, timeout_s=3600.0)
        fleet.run(SECOND_NS)
        calls = [call for _ in range(5) for call in sums(fleet, 50_000, group=second)]
        fleet.run(10 * SECOND_NS)
        check_sums(calls, 2)
        return [call.ended_ns for call in calls]

    assert run(blocked=True) == run(blocked=False)


def test_bytes_sent_unasked_are_bounded_for_each_peer_over_all_groups() -> None:
    fleet = Fleet(4)
    groups = [fleet.group([0, 1], name) for name in ("a", "b", "c")] + [fleet.group([0, 2])]
    calls = [fleet.call(0, "broadcast", ones(2 << 20), group=group) for group in groups for _ in range(3)]
    fleet.run(SECOND_NS)
    engine, slack = fleet.engine(0), 4_096 * len(calls)
    for peer in (1, 2):
        assert 0 < engine.credit.unasked_bytes(peer) <= credit.LARGEST_UNASKED_BYTES
        held = fleet.largest_held_bytes[0, peer]
        assert credit.LARGEST_UNASKED_BYTES // 2 < held <= credit.LARGEST_UNASKED_BYTES + slack
    for group in reversed(groups):
        calls += [fleet.call(group.ranks[1], "broadcast", ones(2 << 20, 0), group=group) for _ in range(3)]
    fleet.run()
    check_sums(calls, 1)
    assert engine.credit.unasked_bytes(1) == engine.credit.unasked_bytes(2) == 0


def test_the_rest_of_messages_that_a_peer_has_not_told_of_holds_no_call_back() -> None:
    def unasked_bytes(messages: int) -> int:
        fleet = Fleet(2)
        sent = [fleet.send(0, 1, ones(1000)) for _ in range(messages)]
        got = [fleet.recv(1, 0, ones(1000, 0)) for _ in range(messages)]
        fleet.run()
        assert all(call.ended for call in sent + got)
        books = fleet.engine(0).credit
        rest_bytes = books.unasked_bytes(1)
        assert rest_bytes == 4000 * messages <= credit.LARGEST_UNTOLD_BYTES
        fleet.call(0, "broadcast", ones(4 << 20))
        fleet.run(fleet.now_ns + SECOND_NS)
        return books.unasked_bytes(1) - rest_bytes

    alone = unasked_bytes(0)
    assert credit.LARGEST_UNASKED_BYTES // 2 < alone <= credit.LARGEST_UNASKED_BYTES
    assert unasked_bytes(1) == unasked_bytes(16) == alone


@pytest.mark.parametrize("copied_bytes", [credit.LARGEST_COPIED_BYTES, 1 << 20])
def test_lent_bytes_are_copied_before_they_use_up_credit_and_given_back(monkeypatch, copied_bytes: int) -> None:
    """Rank 2 lacks in each of many calls, so that what rank 1 sends to rank 0 waits there for its fold."""
    monkeypatch.setattr(credit, "LARGEST_LENT_BYTES", 1 << 20)
    monkeypatch.setattr(credit, "LARGEST_COPIED_BYTES", copied_bytes)
    fleet = Fleet(3)
    pending = [call for _ in range(16) for call in sums(fleet, 60_000, ranks=[0, 1])]
    fleet.run(SECOND_NS)
    books = fleet.engine(0).credit
    assert 0 < books.copied_bytes <= copied_bytes
    if copied_bytes > 1 << 20:
        assert (1 << 20) // 2 < books.lent_bytes(1) <= 1 << 20
    pending += [call for _ in range(16) for call in sums(fleet, 60_000, ranks=[2])]
    fleet.run()
    check_sums(pending, 3)
    assert books.copied_bytes == books.lent_bytes(1) == books.lent_bytes(2) == 0
    assert not any(fleet._held_bytes.values())


def test_work_is_done_in_turns_over_groups_and_in_order_inside_a_group() -> None:
    fleet = Fleet(2)
    groups = [fleet.group([0, 1], name) for name in ("a", "b", "c")]
    engine = fleet.engine(0)
    for group in groups:
        for _ in range(3):
            fleet.call(0, "all_reduce", ones(1000), group=group)
    engine_calls = list(fleet.hosts[0].calls)
    for operation in engine_calls:
        engine.submit(operation, 0)
    engine.start_ready(0)
    done = []
    while (work := engine.next_work()) is not None:
        operation, step = work
        done.append((groups.index(operation.group), operation.sequence, step))
        engine.worked(operation, step, 0)
    assert len(done) >= 9
    assert [entry[0] for entry in done] == [0, 1, 2] * (len(done) // 3)
    for index in range(3):
        mine = [entry[1:] for entry in done if entry[0] == index]
        assert mine == sorted(mine)


def test_a_group_has_a_bounded_number_of_calls_under_way() -> None:
    fleet = Fleet(2)
    calls = [call for _ in range(50) for call in sums(fleet, 10, ranks=[0])]
    fleet.run(SECOND_NS)
    membership = fleet.engine(0).groups[fleet.world.id]
    assert (len(membership.active), len(membership.waiting)) == (16, 34)
    calls += [call for _ in range(50) for call in sums(fleet, 10, ranks=[1])]
    fleet.run()
    check_sums(calls, 2)


# Calls that differ, and calls that are refused.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_mismatch_ends_its_group_on_all_members_and_no_other(shape: str, odd: int) -> None:
    fleet = Fleet(SHAPES[shape])
    size = fleet.topology.size
    other = fleet.group(range(size), "other")
    calls = [fleet.call(rank, "all_reduce", ones(10 + (rank == odd))) for rank in range(size)]
    beside = sums(fleet, 10, group=other)
    fleet.run()
    for call in calls:
        assert isinstance(call.error, PlanMismatch), call.error
        assert re.search(f"rank {odd} called all_reduce of 11 ", str(call.error))
    check_sums(beside)
    later = [fleet.call(rank, "all_reduce", ones(10)) for rank in range(size)]
    beside = sums(fleet, 10, group=other)
    fleet.run()
    assert all(isinstance(call.error, PlanMismatch) for call in later)
    check_sums(beside)


def test_calls_of_equal_shape_are_told_apart_by_name() -> None:
    fleet = Fleet(3)
    calls = [fleet.call(rank, "all_reduce", ones(10), name="b" if rank == 2 else "a") for rank in range(3)]
    fleet.run()
    assert all(isinstance(call.error, PlanMismatch) for call in calls)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("late_ns", [0, 50 * MS])
@pytest.mark.parametrize("by", [0, 1, 2])
def test_a_call_that_one_rank_refuses_ends_for_all_and_the_next_one_works(shape: str, late_ns: int, by: int) -> None:
    fleet = Fleet(SHAPES[shape])
    size = fleet.topology.size
    before = sums(fleet, 1000)
    fleet.refuse(by, UsageError("op='mode' is unknown"))
    others = [rank for rank in range(size) if rank != by]
    refused = [fleet.call(rank, "all_reduce", ones(1000), at_ns=late_ns) for rank in others]
    after = [fleet.call(rank, "all_reduce", ones(5000), at_ns=late_ns) for rank in range(size)]
    fleet.run(300 * MS)
    check_sums(before)
    for call in refused:
        assert isinstance(call.error, UsageError)
        assert str(call.error) == f"rank {by} refused the call: op='mode' is unknown"
    check_sums(after)
    assert fleet.idle
    assert not any(any(queue for queue in host.arrived.values()) for host in fleet.hosts)
    assert not any(fleet._held_bytes.values())


@pytest.mark.parametrize("mate_is_late", [False, True])
def test_other_sites_hear_of_a_call_with_its_first_message_or_soon(mate_is_late: bool) -> None:
    fleet = Fleet([2, 2], delay_ns=MS // 10)
    hellos: dict[tuple[int, int], int] = {}
    messages: dict[tuple[int, int], int] = {}

    def watch(source: int, dst: int, tag: int) -> bool:
        if fleet.world.call_prefix(0) == tag >> PLAN_BITS << PLAN_BITS and (source < 2) != (dst < 2):
            seen = hellos if tag == fleet.world.call_prefix(0) | HELLO_TAG else messages
            seen.setdefault((source, dst), fleet.now_ns)
        return False

    fleet.drops = watch
    calls = sums(fleet, 100_000, ranks=(0, 2, 3))
    calls.append(fleet.call(1, "all_reduce", ones(100_000), at_ns=SECOND_NS if mate_is_late else 0))
    fleet.run(2 * SECOND_NS)
    check_sums(calls)
    assert hellos[0, 2] == (GREETING_DELAY_NS if mate_is_late else messages[0, 2])
    assert hellos[0, 2] <= messages[0, 2]


def test_a_call_that_all_ranks_refuse_counts_once() -> None:
    fleet = Fleet(4)
    for rank in range(4):
        fleet.refuse(rank, UsageError("no"))
    fleet.run(SECOND_NS)
    after = sums(fleet, 10)
    fleet.run()
    check_sums(after)


def test_a_refusal_is_heard_behind_calls_that_still_wait() -> None:
    """Rank 2 refuses the third of its calls while rank 0 still waits for the first."""
    fleet = Fleet(3)
    calls = [[fleet.call(rank, "all_reduce", ones(10)) for _ in range(4)] for rank in (0, 1)]
    late = [fleet.call(2, "all_reduce", ones(10), at_ns=SECOND_NS) for _ in range(2)]
    fleet.refuse(2, UsageError("no"))
    late.append(fleet.call(2, "all_reduce", ones(10), at_ns=SECOND_NS))
    fleet.run()
    for mine in calls:
        assert [type(call.error) for call in mine] == [type(None), type(None), UsageError, type(None)]
    check_sums(late, 3)


def test_a_call_whose_memory_cannot_be_used_ends_for_all() -> None:
    def load() -> None:
        raise OSError("no such memory")

    fleet = Fleet(3)
    calls = [fleet.call(rank, "all_reduce", ones(1000), load=load if rank == 1 else None) for rank in range(3)]
    after = sums(fleet, 1000)
    fleet.run(SECOND_NS)
    assert isinstance(calls[1].error, OSError)
    for call in (calls[0], calls[2]):
        assert str(call.error) == "rank 1 gave up: OSError: no such memory"
    check_sums(after)


# Ranks that are lost.


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_rank_ends_every_group_that_it_is_in_and_no_other(lost: int) -> None:
    fleet = Fleet(5)
    others = [rank for rank in range(5) if rank != lost]
    without = fleet.group(others[:3])
    beside = fleet.group([lost, *others[2:]])
    fleet.run(0)
    calls = [fleet.call(rank, "all_reduce", ones(10)) for rank in others]
    more = [fleet.call(rank, "all_reduce", ones(10), group=beside) for rank in others[2:]]
    fleet.lose(lost, by=[others[-1]])
    fleet.run(SECOND_NS)
    for call in calls + more:
        assert isinstance(call.error, PeerLost), call.error
        assert f"rank {lost} is lost" in str(call.error)
    going_on = [fleet.call(rank, "all_reduce", ones(10), group=without) for rank in others[:3]]
    fleet.run()
    check_sums(going_on)
    with pytest.raises(PeerLost):
        fleet.engine(others[0]).join(Group(77, (others[0], lost), (0, 0), "new"))


def test_a_rank_that_an_endpoint_lost_is_given_up_unless_somebody_says_why() -> None:
    fleet = Fleet(3)
    calls = sums(fleet, 10, ranks=[0, 1])
    fleet.hosts[2].frozen = True
    fleet.at(MS, 0, lambda: fleet.engine(0).failures.suspect(2, PeerLost("rank 2: broken pipe"), MS))
    fleet.run(30 * SECOND_NS)
    assert [str(call.error) for call in calls] == ["rank 2: broken pipe"] * 2
    assert calls[0].ended_ns == MS + SECOND_NS

    fleet = Fleet(3)
    calls = sums(fleet, 10, ranks=[0, 1])
    fleet.at(MS, 0, lambda: fleet.engine(0).failures.suspect(2, PeerLost("rank 2: broken pipe"), MS))
    why = Cause(fleet.world.id, -1, "PlanMismatch", "calls differ", 2)
    fleet.at(2 * MS, 0, lambda: fleet.engine(0).failures.told(why, 2 * MS))
    fleet.run(30 * SECOND_NS)
    assert [str(call.error) for call in calls] == ["calls differ"] * 2


def test_a_rank_that_was_cut_off_persuades_nobody_that_the_others_are_gone() -> None:
    fleet = Fleet(4)
    calls = sums(fleet, 10)

    def hear(rank: int, lost: int, at_ns: int) -> None:
        loss = partial(fleet.engine(rank).failures.rank_lost, lost, f"rank {lost} is lost", at_ns, is_known=True)
        fleet.at(at_ns, rank, loss)

    hear(3, 0, MS)  # it hears nothing of the rendezvous any more, which the others hear of it a little later
    for rank in range(3):
        hear(rank, 3, 200 * MS)
    fleet.run(30 * SECOND_NS)
    assert [str(call.error) for call in calls] == ["rank 3 is lost"] * 3 + ["rank 0 is lost"]
    assert [call.ended_ns for call in calls] == [200 * MS] * 3 + [MS]
    assert [host.announced for host in fleet.hosts] == [[]] * 4


# Deadlines.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 100_000])
def test_a_rank_that_never_calls_is_named_by_all(shape: str, count: int) -> None:
    size = sum(SHAPES[shape])
    for absent in range(size):
        fleet = Fleet(SHAPES[shape])
        others = [rank for rank in range(size) if rank != absent]
        calls = [fleet.call(rank, "all_reduce", ones(count), timeout_s=1.0) for rank in others]
        fleet.run(60 * SECOND_NS)
        assert {culprit(call) for call in calls} == {absent}
        assert all("it has called nothing of this group" in str(call.error) for call in calls)
        assert all(SECOND_NS <= call.ended_ns <= 4 * SECOND_NS for call in calls)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_that_is_one_call_behind_is_named_by_all(shape: str) -> None:
    size = sum(SHAPES[shape])
    for behind in range(size):
        fleet = Fleet(SHAPES[shape], delay_ns=lambda source, dst: (1 + source + 2 * dst) * MS)
        made: list[Called] = []

        def program(rank: int, fleet: Fleet = fleet, behind: int = behind, made: list[Called] = made) -> Program:
            for number in range(6 - (rank == behind)):
                call = fleet.call(rank, ("all_reduce", "broadcast")[number % 2], ones(1000), timeout_s=2.0)
                if number == 5:
                    made.append(call)
                yield call

        for rank in range(size):
            fleet.program(rank, program(rank))
        fleet.run(60 * SECOND_NS)
        failed = [call for call in made if call.error is not None]
        assert failed
        assert {culprit(call) for call in failed} == {behind}
        assert "which has not called it; the latest call that it made of this group is number 4" in str(failed[0].error)
        assert all(call.ended_ns <= 6 * SECOND_NS for call in failed)


FREEZES = [*((shape, 100) for shape in SHAPES), *((shape, 40_000) for shape in ("3", "2+2", "1+1+1"))]


@pytest.mark.parametrize(("shape", "count"), FREEZES)
@pytest.mark.parametrize("mute", [False, True])
def test_a_rank_that_freezes_anywhere_is_named_by_all(shape: str, count: int, mute: bool) -> None:
    """All survivors name it within the timeout and a few seconds, whatever it had done before."""
    size = sum(SHAPES[shape])
    stride = 1 if size <= 3 else size - 1  # with more ranks the events of one rank alone leave out some
    for frozen in range(size):
        for event in range(frozen % stride, 400, stride):
            fleet = Fleet(SHAPES[shape], delay_ns=lambda source, dst: (5 + source + 3 * dst) * MS)
            fleet.freeze(frozen, event, mute=mute)
            latest: dict[int, Called] = {}

            def program(rank: int, fleet: Fleet = fleet, latest: dict[int, Called] = latest) -> Program:
                for number in range(3):
                    kind = "broadcast" if number == 1 else "all_reduce"
                    latest[rank] = fleet.call(rank, kind, ones(count), timeout_s=2.0)
                    yield latest[rank]

            for rank in range(size):
                fleet.program(rank, program(rank))
            fleet.run(60 * SECOND_NS)
            if not fleet.hosts[frozen].frozen:
                assert event > 10
                break
            survivors = [call for rank, call in latest.items() if rank != frozen]
            assert all(call.ended for call in survivors)
            failed = [call for call in survivors if call.error is not None]
            assert {culprit(call) for call in failed} <= {frozen}, (frozen, event)
            assert all(call.ended_ns <= 6 * SECOND_NS for call in failed), (frozen, event)
        else:
            pytest.fail("the frozen rank never got to an end")


def test_a_late_rank_is_waited_for_while_it_makes_progress() -> None:
    """Rank 2 is busy with calls that rank 0 has left long ago: each is short, all together outlast the timeout."""
    fleet = Fleet(3, delay_ns=300 * MS)
    early = [fleet.call(rank, "broadcast", ones(10, rank == 0), timeout_s=1.0) for rank in range(3)]
    late = [fleet.call(rank, "all_reduce", ones(10), timeout_s=1.0) for rank in range(2)]
    late.append(fleet.call(2, "all_reduce", ones(10), timeout_s=1.0, at_ns=1_100 * MS))
    fleet.run(20 * SECOND_NS)
    check_sums(early, 1)
    check_sums(late)


def test_a_call_that_is_queued_behind_a_message_ends_with_the_timeout_of_the_rank_that_waits() -> None:
    fleet = Fleet(2)
    array = ones(1000)
    fleet.recv(1, 0, array, timeout_s=600.0, spans=True)
    hasty = fleet.call(0, "all_reduce", ones(1000), timeout_s=2.0, spans=True)
    patient = fleet.call(1, "all_reduce", array, timeout_s=600.0, spans=True)
    fleet.run(20 * SECOND_NS)
    for call in (hasty, patient):
        assert isinstance(call.error, DeadlineMissed)
        assert "rank 1, which has queued this call behind recv from rank 0 of 1000 float32" in str(call.error)
        assert call.ended_ns < 5 * SECOND_NS


@pytest.mark.parametrize("n", [3, 4])
def test_queued_calls_do_not_run_out_of_time(n: int) -> None:
    """Each of 300 calls takes less than the timeout, all together far longer."""
    fleet = Fleet(n, rate_bytes_per_s=1e6)
    calls = [call for _ in range(300) for call in sums(fleet, 50_000, timeout_s=1.0)]
    fleet.run()
    check_sums(calls, n)
    assert max(call.ended_ns for call in calls) > 60 * SECOND_NS


def test_time_runs_from_the_last_progress() -> None:
    """One call outlasts its timeout many times, a chunk at a time."""
    fleet = Fleet(3, rate_bytes_per_s=1e6)
    calls = sums(fleet, 2_000_000, timeout_s=1.0)
    fleet.run()
    check_sums(calls)
    assert calls[0].ended_ns > 10 * SECOND_NS


def test_a_broadcast_that_outlasts_its_timeout_goes_on_at_its_root() -> None:
    """The root receives nothing, and learns from the others that they get further."""
    fleet = Fleet(3, rate_bytes_per_s=1e6)
    calls = [fleet.call(rank, "broadcast", ones(2_000_000, rank == 0), timeout_s=1.0) for rank in range(3)]
    fleet.run()
    check_sums(calls, 1)
    assert calls[0].ended_ns > 5 * SECOND_NS


@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_that_is_lost_ends_the_call_though_all_ranks_live(shape: str) -> None:
    size = sum(SHAPES[shape])
    counted = 0
    for lost in range(3):
        fleet = Fleet(SHAPES[shape])
        seen: list[int] = []

        def drops(source: int, dst: int, tag: int, seen: list[int] = seen, lost: int = lost) -> bool:
            seen.append(tag)
            return len([one for one in seen if one & 0xFFFFF != 0xFFFFF and one]) == lost + 1 and tag == seen[-1] != 0

        fleet.drops = drops
        calls = sums(fleet, 1000, timeout_s=2.0)
        fleet.run(60 * SECOND_NS)
        failed = [call for call in calls if call.error is not None]
        assert all(isinstance(call.error, DeadlineMissed) for call in failed)
        assert all(call.ended and call.ended_ns < 8 * SECOND_NS for call in calls)
        counted += len(failed)
    assert counted >= size


def test_the_shortest_timeout_counts_once_it_has_passed() -> None:
    fleet = Fleet(4)
    patient = [fleet.call(rank, "all_reduce", ones(100_000), timeout_s=600.0) for rank in (0, 1)]
    hasty = fleet.call(2, "all_reduce", ones(100_000), timeout_s=1.0)
    fleet.run(10 * SECOND_NS)
    assert {culprit(call) for call in [*patient, hasty]} == {3}
    assert all(call.ended_ns < 4 * SECOND_NS for call in [*patient, hasty])


def test_a_rank_that_is_held_up_in_another_group_is_alive() -> None:
    """Ranks 0 and 1 make two calls on the same memory in different order, so that neither can end."""
    fleet = Fleet(2)
    groups = [fleet.group([0, 1], "a"), fleet.group([0, 1], "b")]
    arrays = [ones(1000), ones(1000)]
    calls = [
        fleet.call(rank, "all_reduce", arrays[rank], group=groups[index], timeout_s=2.0, spans=True)
        for rank, order in ((0, (0, 1)), (1, (1, 0)))
        for index in order
    ]
    fleet.run(20 * SECOND_NS)
    assert all(isinstance(call.error, DeadlineMissed) for call in calls)
    queued = "rank 1, which has queued this call behind all_reduce number 0 of group 'b', which waits for rank 0"
    assert queued in str(calls[0].error)


def test_a_call_that_is_queued_behind_another_group_is_told_with_the_rank_that_is_missing_there() -> None:
    fleet = Fleet(3)
    part = fleet.group([1, 2], "part")
    array = ones(1000)
    fleet.call(1, "all_reduce", array, group=part, timeout_s=600.0, spans=True)
    calls = [
        fleet.call(rank, "all_reduce", array if rank == 1 else ones(1000), timeout_s=600.0 if rank else 2.0, spans=True)
        for rank in range(3)
    ]
    fleet.run(20 * SECOND_NS)
    queued = "rank 1, which has queued this call behind all_reduce number 0 of group 'part', which waits for rank 2"
    assert all(isinstance(call.error, DeadlineMissed) for call in calls)
    assert all(queued in str(call.error) for call in calls)
    assert all(call.ended_ns < 5 * SECOND_NS for call in calls)


def test_a_call_that_is_queued_behind_calls_that_progress_goes_on() -> None:
    """Rank 2 comes late to each of eight calls of a group, the last of which uses the memory of another group."""
    fleet = Fleet(3)
    one, other = fleet.group([0, 1], "one"), fleet.group([1, 2], "other")
    array = ones(1000)
    for number in range(8):
        mine = array if number == 7 else ones(1000)
        fleet.call(1, "all_reduce", mine, group=other, timeout_s=4.0, spans=True)
        fleet.call(2, "all_reduce", ones(1000), group=other, timeout_s=4.0, at_ns=number * 1_500 * MS)
    arrays = (ones(1000), array)
    calls = [
        fleet.call(rank, "all_reduce", arrays[rank], group=one, timeout_s=4.0, spans=True) for rank in (0, 1)
    ]  # fmt: skip
    fleet.run(60 * SECOND_NS)
    assert [call.error for call in calls] == [None, None]
    assert all(call.ended_ns > 10 * SECOND_NS for call in calls)


def test_a_call_that_is_queued_behind_a_message_that_progresses_goes_on() -> None:
    """Between the two are calls of another group: one waits for the message, the next has the memory of the call."""
    fleet = Fleet(3, rate_bytes_per_s=4e6)
    one, other = fleet.group([0, 1], "one"), fleet.group([1, 2], "other")
    large, array = ones(5_000_000), ones(1000)
    fleet.recv(1, 2, large, timeout_s=600.0, spans=True)
    fleet.send(2, 1, ones(5_000_000), timeout_s=600.0)
    for rank, arrays in ((1, (large, array)), (2, (ones(5_000_000), ones(1000)))):
        for each in arrays:
            fleet.call(rank, "all_reduce", each, group=other, timeout_s=600.0, spans=True)
    calls = [
        fleet.call(rank, "all_reduce", array if rank else ones(1000), group=one, timeout_s=3.0, spans=True)
        for rank in (0, 1)
    ]
    fleet.run(200 * SECOND_NS)
    assert [call.error for call in calls] == [None, None]
    assert all(call.ended_ns > 8 * SECOND_NS for call in calls)


def test_what_a_call_is_queued_behind_fits_a_control_message() -> None:
    fleet = Fleet(125)
    part = fleet.group(range(1, 125))
    array = ones(1000)
    fleet.call(1, "all_reduce", array, group=part, timeout_s=600.0, spans=True)
    calls = [
        fleet.call(rank, "all_reduce", array if rank == 1 else ones(1000), timeout_s=2.0, spans=True)
        for rank in range(125)
    ]
    fleet.run(10 * SECOND_NS)
    assert all(isinstance(call.error, DeadlineMissed) for call in calls)
    assert "rank 1, which has queued this call behind all_reduce number 0" in str(calls[0].error)


def test_a_hasty_rank_learns_the_culprit_from_a_patient_one_between_them() -> None:
    """One element is folded by rank 3: rank 1 waits for nobody else, and rank 3 would wait ten minutes for rank 0."""
    fleet = Fleet(4)
    calls = [fleet.call(rank, "all_reduce", ones(1), timeout_s=1.0 if rank == 1 else 600.0) for rank in (1, 2, 3)]
    fleet.run(20 * SECOND_NS)
    assert {culprit(call) for call in calls} == {0}
    finder = str(calls[2].error)
    assert "rank 3: all_reduce" in finder
    assert "after 1 s without progress (the timeout of a rank that waits for this one); it waits for rank 0" in finder


def test_the_error_of_a_rank_states_its_own_timeout_where_that_is_not_longer() -> None:
    fleet = Fleet(4)
    calls = [fleet.call(rank, "all_reduce", ones(1), timeout_s=1.0) for rank in (1, 2, 3)]
    fleet.run(20 * SECOND_NS)
    assert "after 1 s without progress (the timeout of the call); it waits for rank 0" in str(calls[2].error)


def test_progress_of_those_that_are_waited_for_prolongs_the_wait() -> None:
    fleet = Fleet(3)
    operation = fleet.call(0, "all_reduce", ones(10), timeout_s=1.0).operation
    assert operation is not None
    operation.strangers = {1, 2}
    blame.progressed(operation, 0)
    assert blame.look_into(0, operation, {}, SECOND_NS) == ([1, 2], None)
    for peer, idle_ns in ((1, 900 * MS), (2, 200 * MS)):
        told = Answer(fleet.world.id, 0, State.WAITING, idle_ns)
        blame.answered(operation, peer, told, SECOND_NS + 5 * MS)
    assert blame.look_into(0, operation, {}, SECOND_NS + 5 * MS) == ([], None)
    assert (operation.inquiry, operation.limit_ns) == (None, 1_800 * MS)


def test_a_rank_that_got_a_little_further_takes_over_the_timeout_of_the_one_that_asks() -> None:
    fleet = Fleet(3)
    operation = fleet.call(0, "all_reduce", ones(10), timeout_s=600.0).operation
    assert operation is not None
    fleet.run(0)
    blame.progressed(operation, 5 * MS)
    membership = fleet.engine(0).groups[fleet.world.id]
    blame.answer(membership, lambda call: None, Ask(fleet.world.id, 0, SECOND_NS), SECOND_NS + 2 * MS)
    assert operation.limit_ns == SECOND_NS + 5 * MS
    blame.progressed(operation, SECOND_NS + 3 * MS)
    assert operation.limit_ns == 601 * SECOND_NS + 3 * MS, "it is not late, so its own timeout holds"
    blame.answer(membership, lambda call: None, Ask(fleet.world.id, 0, SECOND_NS), 2 * SECOND_NS)
    assert operation.timeout_ns == 600 * SECOND_NS
    blame.look_into(0, operation, {}, operation.limit_ns)
    assert operation.timeout_ns == SECOND_NS


def test_the_time_of_a_call_runs_from_when_the_one_before_it_ends() -> None:
    fleet = Fleet(2)
    calls = [call for _ in range(2) for call in sums(fleet, 10, ranks=[0], timeout_s=1.0)]
    calls += [fleet.call(1, "all_reduce", ones(10), at_ns=at_ns) for at_ns in (900 * MS, 1_500 * MS)]
    fleet.run()
    check_sums(calls, 2)


def test_who_asks_about_a_group_that_has_failed_is_told_why() -> None:
    fleet = Fleet(2)
    engine = fleet.engine(0)
    fleet.run(0)
    engine.failures.fail_group(fleet.world, PlanMismatch("calls differ"), 0)
    engine.actions.clear()
    engine.failures.message(1, Ask(fleet.world.id, 0, SECOND_NS), 5)
    [(act, peer, told)] = engine.actions
    assert (act, peer, told) == (Act.TELL, 1, Cause(fleet.world.id, -1, "PlanMismatch", "calls differ", 0))


# Memory that calls share.


@pytest.mark.parametrize("seed", range(10))
def test_calls_on_the_same_memory_are_carried_out_in_the_order_in_which_they_were_made(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 3
    fleet = Fleet(size, delay_ns=lambda source, dst: int(rng.integers(1, 20)) * MS)
    groups = [fleet.world, fleet.group(range(size), "a"), fleet.group(range(size), "b")]
    arrays = [np.arange(100, dtype=np.int64) + rank for rank in range(size)]
    wanted = [array.copy() for array in arrays]
    calls = []
    for _ in range(12):
        begin, end = sorted(rng.integers(0, 101, 2).tolist())
        group, root = groups[rng.integers(3)], int(rng.integers(size))
        kind = ("all_reduce", "broadcast")[rng.integers(2)]
        total = sum(array[begin:end] for array in wanted) if kind == "all_reduce" else wanted[root][begin:end].copy()
        for rank in range(size):
            wanted[rank][begin:end] = total
            calls.append(fleet.call(rank, kind, arrays[rank][begin:end], group=group, root=root, spans=True))
    fleet.run()
    assert all(call.ended and call.error is None for call in calls)
    for array, right in zip(arrays, wanted, strict=True):
        assert (array == right).all()


# Groups that come and go.


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("between", [[], [SEQUENCES // 2], [1, 2, SEQUENCES - 1]])
def test_tags_of_a_refused_call_serve_another_call_later(late: int, between: list[int]) -> None:
    """A rank that calls late is sent messages of a call that has the tags of one that was refused."""
    fleet = Fleet(2)
    fleet.refuse(1, UsageError("no"))
    fleet.call(0, "all_reduce", ones(10))
    fleet.run(SECOND_NS)
    for sequence in [*between, SEQUENCES - 2, SEQUENCES]:
        for host in fleet.hosts:
            host.sequences[fleet.world.id] = sequence
        now_ns = fleet.now_ns
        calls = [fleet.call(rank, "all_reduce", ones(10), at_ns=now_ns + MS * 100 * (rank == late)) for rank in (0, 1)]
        fleet.run(now_ns + SECOND_NS)
        check_sums(calls)


def test_late_messages_of_a_refused_call_are_dropped_for_half_of_all_sequences() -> None:
    fleet = Fleet(2)
    fleet.refuse(1, UsageError("no"))
    fleet.call(0, "all_reduce", ones(10))
    fleet.run(SECOND_NS)
    for sequence, is_dropped in ((SEQUENCES // 2 - 1, True), (SEQUENCES // 2, False)):
        for host in fleet.hosts:
            host.sequences[fleet.world.id] = sequence
        calls = sums(fleet, 10)
        fleet.run(fleet.now_ns + SECOND_NS)
        check_sums(calls)
        assert {host.discarded.covers(fleet.world.call_prefix(0) | 5) for host in fleet.hosts} == {is_dropped}


def test_calls_that_come_while_a_group_is_left_end_and_leave_nothing() -> None:
    fleet = Fleet(2)
    group = fleet.group([0, 1], "pair")
    calls = [fleet.call(0, "all_reduce", ones(100_000), group=group) for _ in range(20)]
    beside = sums(fleet, 10)
    fleet.run(MS // 2)
    fleet.at(fleet.now_ns, 0, lambda: fleet.engine(0).leave(group))
    fleet.call(1, "all_reduce", ones(100_000), group=group, timeout_s=3600.0)
    fleet.run(10 * SECOND_NS)
    assert all(isinstance(call.error, Closed) for call in calls)
    check_sums(beside)
    assert fleet.engine(0).idle
    assert {key for key, queue in fleet.hosts[0].posted.items() if queue} == {(1, 0)}
    assert not any(fleet.hosts[0].arrived.values())


def test_memory_is_given_up_before_its_owner_hears_that_a_call_has_ended() -> None:
    for refuses in (False, True):
        fleet = Fleet(2)
        fleet.call(0, "all_reduce", ones(10))
        fleet.run(SECOND_NS)
        engine = fleet.engine(0)
        if refuses:
            engine.failures.told(Cause(fleet.world.id, 0, "UsageError", "no", 1), fleet.now_ns)
        else:
            engine.failures.fail_group(fleet.world, UsageError("no"), fleet.now_ns)
        acts = [action[0] for action in engine.actions]
        assert acts.index(Act.DISCARD) < acts.index(Act.FINISH)


def test_a_submitted_call_is_not_refused_any_more() -> None:
    """As where its caller was interrupted between handing it over and hearing so."""
    fleet = Fleet(2)
    calls = [fleet.call(0, "all_reduce", ones(10))]
    engine = fleet.engine(0)
    fleet.at(MS, 0, lambda: engine.failures.refuse(fleet.world, 0, UsageError("interrupted"), MS))
    fleet.run(SECOND_NS)
    calls.append(fleet.call(1, "all_reduce", ones(10)))
    fleet.run()
    check_sums(calls)


def test_a_group_of_equal_id_or_number_is_refused() -> None:
    fleet = Fleet(3)
    group = fleet.group([0, 1], "a")
    with pytest.raises(UsageError, match="has the same number in tags as group"):
        fleet.engine(0).join(group)
    clash = Group(group.id + (1 << 40), (0, 1, 2), (0, 0, 0), "b")
    with pytest.raises(UsageError, match="group 'b' has the same number in tags as group 'a'"):
        fleet.engine(0).join(clash)
    fleet.engine(0).leave(group)
    fleet.engine(0).join(clash)


def test_a_rank_that_has_left_a_group_is_named_as_such() -> None:
    fleet = Fleet(3)
    group = fleet.group([0, 1], "pair")
    before = sums(fleet, 10, group=group)
    fleet.run(SECOND_NS)
    check_sums(before)
    fleet.at(fleet.now_ns, 1, lambda: fleet.engine(1).leave(group))
    call = fleet.call(0, "all_reduce", ones(10), group=group, timeout_s=1.0)
    fleet.run(60 * SECOND_NS)
    assert culprit(call) == 1
    assert "which is not in the group: it has closed it, or not opened it yet" in str(call.error)


def test_a_call_in_a_group_that_was_left_ends_as_closed() -> None:
    fleet = Fleet(2)
    group = fleet.group([0, 1], "a")
    fleet.engine(0).leave(group)
    call = fleet.call(0, "all_reduce", ones(10), group=group)
    fleet.refuse(0, UsageError("no"), group=group)
    fleet.run()
    assert isinstance(call.error, Closed)


def test_late_messages_of_an_ended_call_and_group_are_dropped() -> None:
    """Rank 0 sends its part late: the others have given up the group, and rank 2 a call that it refused."""
    fleet = Fleet(3, delay_ns=lambda source, dst: 100 * MS if source == 0 else MS)
    group = fleet.group([0, 1, 2], "a")
    calls = [fleet.call(rank, "all_reduce", ones(10 + (rank == 2)), group=group) for rank in range(3)]
    fleet.refuse(2, UsageError("no"))
    refused = [fleet.call(rank, "all_reduce", ones(60_000)) for rank in range(2)]
    after = sums(fleet, 10)
    fleet.run()
    assert all(isinstance(call.error, PlanMismatch) for call in calls)
    assert all(isinstance(call.error, UsageError) for call in refused)
    check_sums(after)
    assert not any(any(queue for queue in host.arrived.values()) for host in fleet.hosts)
    assert not any(fleet._held_bytes.values())
    for rank in range(3):
        fleet.engine(rank).leave(group)
    again = fleet.group([0, 1, 2], "a")
    for host in fleet.hosts:
        host.sequences[again.id] = 0
    calls = sums(fleet, 10, group=again)
    fleet.run()
    check_sums(calls)


@pytest.mark.parametrize("late_ns", [0, 300 * MS])
def test_late_messages_of_a_call_that_was_refused_elsewhere_are_dropped(late_ns: int) -> None:
    """Rank 2 hears of the refusal before it calls and before the parts of rank 1 arrive, or after."""
    fleet = Fleet(3, delay_ns=lambda source, dst: 100 * MS if source == 1 else MS)
    fleet.refuse(0, UsageError("no"))
    refused = [fleet.call(rank, "all_reduce", ones(60_000), at_ns=(rank - 1) * late_ns) for rank in (1, 2)]
    fleet.run()
    assert all(isinstance(call.error, UsageError) for call in refused)
    assert not any(any(queue for queue in host.arrived.values()) for host in fleet.hosts)
    assert not any(fleet._held_bytes.values())
    after = sums(fleet, 10)
    fleet.run()
    check_sums(after)


def test_whom_a_rank_listens_to_from_the_start() -> None:
    group = Group(5, (4, 7, 9, 2, 3, 8), (0, 0, 0, 1, 1, 2))
    assert group.partners(7) == {4, 9, 3, 8}
    assert group.partners(8) == {4, 2}
    assert group.neighbours(4) == {8, 7}
    assert Group(5, (4,), (0,)).neighbours(4) == Group(5, (4,), (0,)).partners(4) == frozenset()


# Everything at once.


@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_random_calls_of_overlapping_groups_end_with_the_promised_bits(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([[4], [2, 2], [1, 3], [2, 1, 2]]), "sites")
    size = sum(shape)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    fleet = Fleet(
        shape, delay_ns=lambda source, dst: int(rng.integers(1, 30)) * MS // 3,
        credit_bytes=data.draw(st.sampled_from([None, 20 << 20]), "credit"),
    )  # fmt: skip
    groups = [fleet.world]
    for name in ("a", "b"):
        members = data.draw(st.lists(st.sampled_from(range(size)), min_size=1, max_size=size, unique=True), name)
        groups.append(fleet.group(members, name))
    made = []
    for _ in range(data.draw(st.integers(1, 8), "calls")):
        group = groups[data.draw(st.integers(0, 2), "group")]
        count = data.draw(st.sampled_from([0, 1, 7, 1000, 40_000]), "count")
        op = data.draw(st.sampled_from([ReduceOp.SUM, ReduceOp.MAX, ReduceOp.AVG]), "op")
        given = [rng.standard_normal(count).astype(np.float32) for _ in group.ranks]
        made.append((group, op, given, [None] * len(given)))
    for member in range(size):  # each rank makes its calls of a group in order, at times of its own
        at_ns = 0
        for group, op, given, calls in made:
            if member in group.ranks:
                at_ns += int(rng.integers(0, 20)) * MS
                index = group.ranks.index(member)
                array = given[index].copy()
                calls[index] = fleet.call(member, "all_reduce", array, group=group, op=op.value, at_ns=at_ns)
    fleet.run()
    for group, op, given, calls in made:
        sites = [site.ranks for site in fleet.topology.restricted(group.ranks).sites]
        right = reference(op, given, sites, np.dtype(np.float32)).tobytes()
        assert all(call.error is None and call.array.tobytes() == right for call in calls)
    assert fleet.idle


def test_the_recorder_keeps_what_happened() -> None:
    fleet = Fleet(2)
    group = fleet.group([0, 1], "a")
    sums(fleet, 10, group=group)
    late = fleet.call(0, "all_reduce", ones(10), group=group, timeout_s=1.0)
    fleet.run(20 * SECOND_NS)
    assert late.error is not None
    rows = [row for row in fleet.engine(0).recorder.rows() if row["group"] == group.number]
    first = [row["event"] for row in rows if row["sequence"] == 0]
    assert first[:2] == ["call", "start"]
    assert {"greeted", "step", "end"} <= set(first)
    assert [row["event"] for row in rows if row["sequence"] == 1] == ["call", "start", "ask", "answer"]
    assert [row["event"] for row in rows[:1] + rows[-1:]] == ["join", "fail"]
    assert all(row["peer"] == 1 for row in rows if row["event"] in ("greeted", "ask", "answer"))
    steps = [row for row in fleet.engine(1).recorder.rows() if row["event"] == "step"]
    assert {row["peer"] for row in steps} == {-1, 0}
    assert [row["at_ns"] for row in rows] == sorted(row["at_ns"] for row in rows)


def test_the_recorder_keeps_the_latest_events_only() -> None:
    recorder = Recorder()
    for at_ns in range(LARGEST_RECORD + 5):
        recorder.note(at_ns, "step")
    rows = recorder.rows()
    assert (len(rows), rows[0]["at_ns"]) == (LARGEST_RECORD, 5)
