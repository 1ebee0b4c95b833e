from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import PlanError
from detcoll.plan import (
    Buffer,
    ChunkSize,
    Collective,
    Kind,
    Plan,
    PlanBuilder,
    Slotting,
    algorithms_for,
    build_calendar,
    check,
)  # fmt: skip
from detcoll.plan.calendar import SiteCycle, SlotWindow
from detcoll.plan.ir import Phase
from detcoll.testing.plans import all_parts, packed, sites_of, unpacked

ALL_REDUCE = algorithms_for("all_reduce")
BROADCAST = algorithms_for("broadcast")

SUM = Collective("all_reduce", 24, 2, 4)
SMALL = ChunkSize(4, 2)
TOPOLOGY = sites_of([2, 2])
THREE = sites_of([2, 1, 2])


@settings(max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    count=st.integers(0, 200),
    elems=st.integers(1, 64),
    depth=st.integers(1, 6),
    data=st.data(),
)
def test_every_algorithm_proves_itself(ranks: list[int], count: int, elems: int, depth: int, data: Any) -> None:
    topology = sites_of(ranks)
    kind = data.draw(st.sampled_from(["all_reduce", "broadcast", "barrier"]))
    algorithm = data.draw(st.sampled_from(BROADCAST if kind == "broadcast" else ALL_REDUCE))
    root = data.draw(st.integers(0, topology.size - 1)) if kind == "broadcast" else 0
    elems = max(elems, -(-count // 40))
    size = ChunkSize(elems, depth, data.draw(st.booleans()), in_place=data.draw(st.integers(0, 3)))
    parts = all_parts(Collective(kind, count, 2, 4, root), topology, algorithm, size)
    for mode in Slotting:
        check(parts, topology, build_calendar(topology, mode))


def broken(rank: int, change: Any, algorithm: str = "exchange", topology: Any = TOPOLOGY) -> list[Plan]:
    """Return all parts of an all-reduce with ``change`` done to the steps of one rank."""
    parts = all_parts(SUM, topology, algorithm, SMALL)
    rows = unpacked(parts[rank])
    change(rows)
    parts[rank] = packed(parts[rank], rows)
    return parts


def find(rows: list[dict[str, Any]], kind: Kind, **wanted: int) -> int:
    return next(i for i, row in enumerate(rows) if row["kind"] == kind and all(row[k] == v for k, v in wanted.items()))


def drop(rows: list[dict[str, Any]], gone: int) -> None:
    del rows[gone]
    for row in rows:
        row["after"] = [s - (s > gone) for s in row["after"] if s != gone]
        row["inputs"] = [(b, o - (b == Buffer.LENT and o > gone), n) for b, o, n in row["inputs"]]


def test_unpacked_and_packed_is_the_same_plan() -> None:
    parts = broken(0, lambda rows: None)
    assert [p.digest for p in parts] == [p.digest for p in all_parts(SUM, TOPOLOGY, "exchange", SMALL)]
    check(parts, TOPOLOGY)


@pytest.mark.parametrize(("kind", "other"), [(Kind.SEND, "SEND"), (Kind.RECV, "RECV")])
def test_a_missing_partner_is_named(kind: Kind, other: str) -> None:
    parts = broken(3, lambda rows: drop(rows, find(rows, kind, phase=Phase.LOCAL_GATHER)))
    with pytest.raises(PlanError, match=rf"rank 2, step \d+ \(.* rank 3, tag \d+\) has no {other}"):
        check(parts, TOPOLOGY)


def test_swapped_fold_inputs_break_the_promised_order() -> None:
    def swap(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.FOLD)]["inputs"].reverse()

    with pytest.raises(PlanError, match=r"rank 0 ends with final\(\(1 0\) \(2 3\)\).*promised is final\(\(0 1\)"):
        check(broken(0, swap), TOPOLOGY)


def test_swapped_sites_break_the_promised_order() -> None:
    def swap(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.FOLD, final=1)]["inputs"].reverse()

    with pytest.raises(PlanError, match=r"ends with final\(\(2 3\) \(0 1\)\)"):
        check(broken(0, swap), TOPOLOGY)


def test_a_contribution_folded_twice_is_found() -> None:
    def twice(rows: list[dict[str, Any]]) -> None:
        fold = rows[find(rows, Kind.FOLD)]
        fold["inputs"] = [read for read in fold["inputs"] if read[0] == Buffer.OUT] * 2 + fold["inputs"][1:]

    with pytest.raises(PlanError, match=r"input 0 counts as 2 ranks; it is \(0 0 1\)"):
        check(broken(0, twice), TOPOLOGY)


def test_a_wrong_weight_is_found() -> None:
    def lighter(rows: list[dict[str, Any]]) -> None:
        fold = rows[find(rows, Kind.FOLD, final=1)]
        fold["inputs"] = [(buffer, offset, 1) for buffer, offset, _ in fold["inputs"]]

    with pytest.raises(PlanError, match=r"rank 0, step \d+ \(FOLD\): input 0 counts as 1 ranks; it is \(0 1\)"):
        check(broken(0, lighter), TOPOLOGY)


def test_final_twice_is_found() -> None:
    def again(rows: list[dict[str, Any]]) -> None:
        done = find(rows, Kind.FOLD, final=1)
        user = (int(Buffer.OUT), rows[done]["offset"], TOPOLOGY.size)
        rows.append(rows[done] | {"inputs": [user], "after": list(range(len(rows)))})

    with pytest.raises(PlanError, match=r"step \d+ \(FOLD\): input 0 is finished already: final"):
        check(broken(0, again), TOPOLOGY)


def test_final_too_early_is_found() -> None:
    def early(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.FOLD, final=0)]["final"] = 1

    with pytest.raises(PlanError, match="finished already"):
        check(broken(0, early), TOPOLOGY)


def test_final_left_out_is_found() -> None:
    def never(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.FOLD, final=1)]["final"] = 0

    with pytest.raises(PlanError, match=r"rank 0 ends with \(\(0 1\) \(2 3\)\).*promised is final"):
        check(broken(0, never), TOPOLOGY)


def test_a_missing_dependency_is_a_race() -> None:
    def unordered(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.SEND, phase=Phase.LOCAL_GATHER)]["after"] = []

    with pytest.raises(PlanError, match=r"rank 0, step \d+ .* touch the same elements of OUT"):
        check(broken(0, unordered), TOPOLOGY)


def test_scratch_reused_too_early_is_a_race() -> None:
    def impatient(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["kind"] == Kind.FOLD and row["buffer"] == Buffer.PARTIAL:
                row["after"] = [s for s in row["after"] if rows[s]["kind"] == Kind.RECV and not rows[s]["wide"]]

    with pytest.raises(PlanError, match="PARTIAL"):
        check(broken(0, impatient), TOPOLOGY)


def test_a_fold_before_its_message_is_found() -> None:
    def early(rows: list[dict[str, Any]]) -> None:
        fold = rows[find(rows, Kind.FOLD, final=1)]
        lender = next(o for b, o, _ in fold["inputs"] if b == Buffer.LENT)
        fold["after"].remove(lender)

    with pytest.raises(PlanError, match=r"\(FOLD\) reads what step \d+ lends, but does not come after it"):
        check(broken(0, early), TOPOLOGY)


def test_what_nobody_reads_is_found() -> None:
    def forget(rows: list[dict[str, Any]]) -> None:
        fold = rows[find(rows, Kind.FOLD)]
        fold["inputs"] = [read for read in fold["inputs"] if read[0] != Buffer.LENT]

    with pytest.raises(PlanError, match="read by 0 steps; expected 1"):
        check(broken(0, forget), TOPOLOGY)


def test_wrong_length_is_found_with_both_ends() -> None:
    def shorter(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.SEND, phase=Phase.LOCAL_GATHER)]["length"] -= 1

    with pytest.raises(PlanError, match=r"rank 0.* to rank 1, tag 1\) sends 3 elements.*expects 4"):
        check(broken(0, shorter), TOPOLOGY)


def test_wrong_message_type_is_found() -> None:
    topology = sites_of([1, 1, 1])

    def rounded(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.RECV, accumulated=1)]["accumulated"] = 0

    with pytest.raises(PlanError, match="in the accumulation type"):
        check(broken(2, rounded, "ring", topology), topology)


def test_an_open_fold_may_only_come_first() -> None:
    topology = sites_of([1, 1, 1])

    def reverse(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.FOLD, final=1)]["inputs"].reverse()

    with pytest.raises(PlanError, match=r"input 1 is an open fold, which only the first may be: open\(0 1\)"):
        check(broken(2, reverse, "ring", topology), topology)


def test_rounding_at_every_hop_of_a_ring_is_another_result() -> None:
    topology = sites_of([1, 1, 1])
    parts = all_parts(SUM, topology, "ring", SMALL)
    for rank in (1, 2):
        rows = unpacked(parts[rank])
        for row in rows:
            row["accumulated"] = 0
            row["buffer"] = Buffer.PARTIAL if row["buffer"] == Buffer.ACCUMULATOR else row["buffer"]
        parts[rank] = packed(parts[rank], rows)
    with pytest.raises(PlanError, match=r"ends with final\(\(0 1\) 2\).*promised is final\(0 1 2\)"):
        check(parts, topology)


@pytest.mark.parametrize("change", ["offset", "length"])
def test_memory_out_of_bounds_is_found(change: str) -> None:
    def beyond(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.FOLD, buffer=Buffer.PARTIAL)][change] += 1000

    with pytest.raises(PlanError, match=r"leaves PARTIAL|lends 4"):
        check(broken(0, beyond), TOPOLOGY)


def test_scratch_too_small_is_found() -> None:
    parts = all_parts(SUM, TOPOLOGY, "exchange", SMALL)
    parts[1] = replace(parts[1], partial_elems=parts[1].partial_elems - 1)
    with pytest.raises(PlanError, match=r"rank 1, step \d+ .*leaves PARTIAL, which holds 7"):
        check(parts, TOPOLOGY)


def test_unwritten_scratch_is_found() -> None:
    topology = sites_of([1, 1])
    parts = all_parts(SUM, topology, "exchange", SMALL)
    rows = unpacked(parts[0])
    send = find(rows, Kind.SEND)
    rows[send]["offset"] = parts[0].partial_elems
    parts[0] = packed(parts[0], rows, partial_elems=parts[0].partial_elems + 4)
    with pytest.raises(PlanError, match=rf"rank 0, step {send} .*reads scratch that nothing has written"):
        check(parts, topology)


def test_elements_that_do_not_belong_together_are_found() -> None:
    def crosswise(rows: list[dict[str, Any]]) -> None:
        one, other = [row for row in rows if row["kind"] == Kind.SEND and row["phase"] == Phase.LOCAL_REDUCE][:2]
        one["tag"], other["tag"] = other["tag"], one["tag"]

    with pytest.raises(PlanError, match=r"rank 0, step \d+ \(FOLD\): input 1 holds other elements of the array"):
        check(broken(1, crosswise), TOPOLOGY)


def test_wide_that_is_not_wide_is_found() -> None:
    def local(rows: list[dict[str, Any]]) -> None:
        rows[find(rows, Kind.SEND, wide=1)]["wide"] = 0

    with pytest.raises(PlanError, match="not where its peer is"):
        check(broken(0, local), TOPOLOGY)


def crossed(first: str, second: str) -> list[Plan]:
    """Return two ranks that each send and receive once, in the orders given."""
    parts = []
    for rank, order in enumerate((first, second)):
        builder = PlanBuilder()
        for word in order.split():
            after = [builder.count - 1] if builder.count else []
            if word == "send":
                builder.send(Phase.LOCAL_REDUCE, 1 - rank, rank, (Buffer.OUT, 0), 1, after)
            else:
                builder.recv(Phase.LOCAL_REDUCE, 1 - rank, 1 - rank, (Buffer.OUT, 1), 1, after)
        parts.append(builder.build(Collective("all_reduce", 2, 4, 4), "exchange", rank, 2, 2))
    return parts


@pytest.mark.parametrize(("first", "second"), [("recv send", "recv send"), ("send recv", "send recv")])
def test_steps_that_wait_for_one_another_are_named(first: str, second: str) -> None:
    with pytest.raises(PlanError, match=r"wait for one another: .*rank 0, step .*rank 1, step|rank 1, step .*rank 0"):
        check(crossed(first, second), sites_of([2]))


def test_an_order_that_works_gets_past_the_wait() -> None:
    with pytest.raises(PlanError, match="rank 0 ends with"):
        check(crossed("send recv", "recv send"), sites_of([2]))


def test_ranks_of_different_plans_are_refused() -> None:
    parts = all_parts(SUM, TOPOLOGY, "exchange", SMALL)
    with pytest.raises(PlanError, match="expected one each of 4"):
        check(parts[:3], TOPOLOGY)
    other = all_parts(SUM, TOPOLOGY, "direct", SMALL)
    with pytest.raises(PlanError, match="rank 2 has direct of"):
        check([*parts[:2], *other[2:]], TOPOLOGY)


def test_steps_after_later_ones_are_refused() -> None:
    def forward(rows: list[dict[str, Any]]) -> None:
        rows[0]["after"] = [5]

    with pytest.raises(PlanError, match=r"rank 0, step 0 .*only earlier steps"):
        check(broken(0, forward), TOPOLOGY)


def test_a_message_larger_than_a_window_is_found() -> None:
    big = Collective("all_reduce", 200_000, 2, 4)
    calendar = build_calendar(TOPOLOGY, Slotting.TURNS)
    check(all_parts(big, TOPOLOGY, "exchange", ChunkSize(100_000, 2)), TOPOLOGY, calendar)
    short = replace(
        calendar, sites=tuple(SiteCycle(c.cycle_ns, tuple(replace(w, end_ns=w.start_ns + 10**6) for w in c.windows))
                              for c in calendar.sites),
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"rank 0, step \d+ \(SEND to rank 2.*a window 1000000 ns"):
        check(all_parts(big, TOPOLOGY, "exchange", ChunkSize(100_000, 2)), TOPOLOGY, short)


def test_colliding_slots_are_found() -> None:
    calendar = build_calendar(TOPOLOGY)
    collide = SiteCycle(20_000_000, (SlotWindow(0, 0, 11_000_000), SlotWindow(1, 10_000_000, 19_000_000)))
    with pytest.raises(PlanError, match="collide"):
        check(all_parts(SUM, TOPOLOGY, "exchange", SMALL), TOPOLOGY,
              replace(calendar, sites=(collide, calendar.sites[1])))  # fmt: skip


def test_a_large_plan_with_real_chunks_is_proved() -> None:
    topology = sites_of([3, 2, 4])
    big = Collective("all_reduce", 50_000, 4, 4)
    check(all_parts(big, topology, "direct", ChunkSize(1_000, 5)), topology)
    assert np.all([len(p.steps) > 100 for p in all_parts(big, topology, "direct", ChunkSize(1_000, 5))])
