"""send and recv: their rules, stepped through in virtual time by a fleet of engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll.errors import Closed, DeadlineMissed, FrameError, PeerLost, PlanMismatch
from detcoll.machine import Queued, Slots
from detcoll.plan import Slotting
from detcoll.plan.layout import LARGEST_FRAME_BYTES
from detcoll.runtime import credit, group, transfer
from detcoll.runtime.group import CHUNK_BITS, MESSAGES, SEQUENCES, Group
from detcoll.runtime.messages import CHUNKS_QUEUED, EAGER_BYTES, LARGEST_EAGER
from detcoll.runtime.ranges import Memory
from detcoll.runtime.snapshot import snapshot
from detcoll.runtime.transfer import INLINE_BYTES, LARGEST_KEYS, LARGEST_TAG, NOTE_BYTES, Note, NoteKind
from detcoll.testing.fleet import SECOND_NS, Called, Fleet

MS = 1_000_000
LARGE = 100_000


def numbers(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def room(count: int) -> np.ndarray[Any, Any]:
    return np.full(count, np.nan, np.float32)


def check(sent: Called, got: Called) -> None:
    assert sent.error is None, sent.error
    assert got.error is None, got.error
    assert sent.ended
    assert got.ended
    assert got.array.tobytes() == sent.array.tobytes()


# Keys and notes.


@given(
    number=st.integers(0, 2**40), other=st.integers(0, 2**40), chunk=st.integers(0, 2**CHUNK_BITS - 1),
    sequence=st.integers(0, 2**40),
)  # fmt: skip
def test_keys_of_messages_are_apart_from_each_other_and_from_calls(number, other, chunk, sequence) -> None:
    group = Group(0xABCDEF0123456789, (0, 1), (0, 0))
    tag = group.message_tag(number, chunk)
    assert tag >> 32 == group.number
    assert tag != group.note_tag
    assert tag >> 20 != group.call_prefix(sequence) >> 20
    assert group.call_prefix(sequence) >> 32 == group.number
    assert (tag == group.message_tag(other, chunk)) == ((number - other) % MESSAGES == 0)
    assert group.call_prefix(sequence) == group.call_prefix(sequence + SEQUENCES)


@given(
    kind=st.sampled_from([NoteKind.ANNOUNCE, NoteKind.GRANT]), number=st.integers(0, 2**63),
    tag=st.integers(0, LARGEST_TAG), key=st.integers(0, MESSAGES - 1),
    dtype=st.sampled_from(["bfloat16", "complex128", ""]), count=st.integers(0, 2**63), eager=st.booleans(),
    name=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=16), asks=st.booleans(),
)  # fmt: skip
def test_notes_are_read_as_they_were_written(kind, number, tag, key, dtype, count, eager, name, asks) -> None:
    inline = eager and not name
    payload = bytes(range(count % (INLINE_BYTES + 1))) if inline else b""
    nbytes = len(payload) if inline else 8 * count % 2**63
    note = Note(kind, number, tag, dtype, count, nbytes, 77, eager, name, inline, payload, key, asks=asks)
    record = note.pack(memoryview(payload))
    assert len(record) == NOTE_BYTES
    assert Note.unpack(record) == note


@given(keys=st.lists(st.integers(0, MESSAGES - 1), max_size=LARGEST_KEYS))
def test_a_note_holds_the_keys_of_what_was_taken(keys: list[int]) -> None:
    note = Note(NoteKind.TAKEN, count=40, nbytes=70_000, keys=tuple(keys))
    assert len(note.pack()) == NOTE_BYTES
    assert Note.unpack(note.pack()) == note


CUT_SHORT = Note(NoteKind.ANNOUNCE, count=8, nbytes=8, dtype="uint8", is_eager=True, is_inline=True).pack(b"1234567")


@pytest.mark.parametrize("record", [b"", b"\xff" * NOTE_BYTES, bytes(40), CUT_SHORT])
def test_what_is_no_note_is_told(record: bytes) -> None:
    with pytest.raises(FrameError, match="invalid note"):
        Note.unpack(record)


# Messages that arrive.


@pytest.mark.parametrize("count", [0, 1, 16, 17, 1024, 1025, LARGE, 1_000_000])
@pytest.mark.parametrize("first", ["send", "recv"])
@pytest.mark.parametrize("awaits_receive", [False, True])
def test_one_message(count: int, first: str, awaits_receive: bool) -> None:
    fleet = Fleet(2)
    late_ns = 50 * MS
    sent_ns = 0 if first == "send" else late_ns
    sent = fleet.send(0, 1, numbers(count), 7, at_ns=sent_ns, awaits_receive=awaits_receive)
    got = fleet.recv(1, 0, room(count), 7, at_ns=late_ns if first == "send" else 0)
    fleet.run()
    check(sent, got)
    assert got.operation.source == 0
    assert fleet.idle
    is_eager = count * 4 <= EAGER_BYTES
    assert (sent.ended_ns < late_ns) == (is_eager and first == "send" and not awaits_receive)


@pytest.mark.parametrize("count", [3, LARGE])
def test_messages_with_one_tag_keep_their_order_and_tags_are_apart(count: int) -> None:
    fleet = Fleet([1, 1])
    sent = [fleet.send(0, 1, numbers(count, at), at % 2) for at in range(6)]
    got = [fleet.recv(1, 0, room(count), at % 2, at_ns=10 * MS) for at in (1, 3, 5, 0, 2, 4)]
    fleet.run()
    for at, received in zip((1, 3, 5, 0, 2, 4), got, strict=True):
        check(sent[at], received)


def test_any_source_takes_messages_in_order_of_arrival() -> None:
    fleet = Fleet(4, delay_ns=lambda source, dst: (10 - source) * MS)
    sent = {rank: fleet.send(rank, 0, numbers(10, rank), 1) for rank in (1, 2, 3)}
    got = [fleet.recv(0, None, room(10), 1) for _ in range(3)]
    fleet.run()
    assert [call.operation.source for call in got] == [3, 2, 1]
    for call in got:
        check(sent[call.operation.source], call)


def test_a_named_source_takes_no_message_of_another_that_came_first() -> None:
    fleet = Fleet(3)
    fleet.recv(0, None, room(1), 9)  # so it hears of the messages of all
    first, second = fleet.send(1, 0, numbers(10, 1)), fleet.send(2, 0, numbers(10, 2), at_ns=5 * MS)
    fleet.run(SECOND_NS)
    later, sooner = fleet.recv(0, 2, room(10)), fleet.recv(0, None, room(10))
    fleet.run()
    check(second, later)
    check(first, sooner)


def test_the_receive_that_was_called_first_gets_the_message() -> None:
    fleet = Fleet(3)
    anyone, named, last = (fleet.recv(0, src, room(10)) for src in (None, 1, None))
    first, second = (fleet.send(1, 0, numbers(10, seed), at_ns=10 * MS) for seed in (1, 2))
    third = fleet.send(2, 0, numbers(10, 3), at_ns=30 * MS)
    fleet.run()
    check(first, anyone)
    check(second, named)
    check(third, last)


@pytest.mark.parametrize("count", [0, 10, LARGE])
@pytest.mark.parametrize("first", ["send", "recv"])
def test_a_message_to_oneself(count: int, first: str) -> None:
    fleet = Fleet(1)
    calls = {}
    for at, way in enumerate(("send", "recv") if first == "send" else ("recv", "send")):
        make = fleet.send if way == "send" else fleet.recv
        calls[way] = make(0, 0, numbers(count) if way == "send" else room(count), at_ns=at * MS)
    fleet.run(MS // 2)
    assert calls[first].ended == (first == "send" and count < LARGE)
    fleet.run()
    check(calls["send"], calls["recv"])
    assert fleet.idle


@pytest.mark.parametrize("dst", [0, 1])
@pytest.mark.parametrize("count", [10, 1000])
def test_an_eager_message_is_what_it_was_when_it_was_sent(dst: int, count: int) -> None:
    fleet = Fleet(2)
    array = numbers(count)
    expected = array.tobytes()
    fleet.send(0, dst, array)
    fleet.run(MS // 2)
    array[:] = -1
    got = fleet.recv(dst, 0, room(count))
    fleet.run()
    assert got.array.tobytes() == expected


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("order", ["send first", "even first"])
@pytest.mark.parametrize("credit_bytes", [None, 65_536])
def test_a_ring_of_large_messages_does_not_deadlock(size: int, order: str, credit_bytes: int | None) -> None:
    fleet = Fleet(size, credit_bytes=credit_bytes)
    values = [numbers(262_144, rank) for rank in range(size)]
    rooms = [room(262_144) for _ in range(size)]

    def program(rank: int):
        def send():
            return fleet.send(rank, (rank + 1) % size, values[rank])

        def recv():
            return fleet.recv(rank, (rank - 1) % size, rooms[rank])

        if order == "send first":
            sent = send()
            yield recv()
            yield sent
        elif rank % 2 == 0 and rank != size - 1:
            yield send()
            yield recv()
        else:
            yield recv()
            yield send()

    for rank in range(size):
        fleet.program(rank, program(rank))
    fleet.run()
    assert fleet.idle
    for rank in range(size):
        assert rooms[rank].tobytes() == values[(rank - 1) % size].tobytes()


# Beside collectives.


def test_messages_and_collectives_do_not_wait_for_each_other() -> None:
    fleet = Fleet(3)
    stuck = [fleet.call(rank, "all_reduce", numbers(LARGE)) for rank in (0, 1) for _ in range(40)]
    waits = [fleet.recv(rank, 2, room(10), 9) for rank in (0, 1)]
    sent, got = fleet.send(0, 1, numbers(LARGE), 3), fleet.recv(1, 0, room(LARGE), 3)
    fleet.run(SECOND_NS)
    check(sent, got)
    assert not any(call.ended for call in [*stuck, *waits])
    stuck += [fleet.call(2, "all_reduce", numbers(LARGE)) for _ in range(40)]
    fleet.run(2 * SECOND_NS)
    assert all(call.ended and call.error is None for call in stuck)
    assert not any(call.ended for call in waits)


def test_calls_on_the_same_memory_run_in_their_order() -> None:
    fleet = Fleet(2)
    here, there = numbers(LARGE, 1), numbers(LARGE, 2)
    total = here + there
    arrays = (here, there)
    first = [fleet.call(rank, "all_reduce", arrays[rank], spans=True) for rank in (0, 1)]
    second = [fleet.send(0, 1, here, spans=True), fleet.recv(1, 0, room(LARGE), spans=True)]
    third = [fleet.recv(0, 1, here, spans=True), fleet.send(1, 0, numbers(LARGE, 5), spans=True)]
    last = [fleet.call(rank, "all_reduce", array, spans=True) for rank, array in ((0, here), (1, room(LARGE)))]
    last[1].array[:] = 1
    fleet.run()
    assert not any(call.error for call in [*first, *second, *third, *last])
    assert second[1].array.tobytes() == total.tobytes()
    assert here.tobytes() == (third[1].array + np.float32(1)).tobytes()


def test_two_sends_of_one_memory_do_not_wait_for_each_other() -> None:
    fleet = Fleet(3)
    array = numbers(LARGE)
    never = fleet.send(0, 1, array, spans=True)
    sent, got = fleet.send(0, 2, array, spans=True), fleet.recv(2, 0, room(LARGE))
    fleet.run(SECOND_NS)
    check(sent, got)
    assert not never.ended


def test_a_call_that_waits_for_memory_keeps_its_place() -> None:
    """The first receive cannot begin, and yet the second does not take its message."""
    fleet = Fleet(3)
    busy = room(LARGE)
    fleet.recv(0, 2, busy, 5, spans=True)
    first, second = fleet.recv(0, 1, busy[:10], spans=True), fleet.recv(0, 1, room(10), spans=True)
    sent = [fleet.send(1, 0, numbers(10, seed)) for seed in (1, 2)]
    fleet.run(SECOND_NS)
    check(sent[1], second)
    assert not first.ended
    fleet.send(2, 0, numbers(LARGE, 3), 5)
    fleet.run()
    check(sent[0], first)


def test_calls_that_wait_for_memory_cost_a_turn_nothing_until_it_is_free(monkeypatch) -> None:
    fleet = Fleet(3)
    memory = [room(LARGE) for _ in range(50)]
    got, passed_on = [], []
    for tag, array in enumerate(memory):
        got.append(fleet.recv(1, 0, array, tag, spans=True))
        passed_on.append(fleet.send(1, 2, array, tag, spans=True))
    fleet.run(SECOND_NS)
    looks = []
    find = Memory.find
    monkeypatch.setattr(Memory, "find", lambda one, call: looks.append(call) or find(one, call))
    for _ in range(100):
        fleet.engine(1).start_ready(fleet.now_ns)
    assert not fleet.engine(1).can_start
    assert not looks
    sent = [fleet.send(0, 1, numbers(LARGE, tag), tag) for tag in reversed(range(50))]
    last = [fleet.recv(2, 1, room(LARGE), tag) for tag in range(50)]
    fleet.run()
    for calls in zip(reversed(sent), got, passed_on, last, strict=True):
        for call in calls[1:]:
            check(calls[0], call)
    assert len(looks) <= 2 * 50


def test_groups_do_not_mix_messages() -> None:
    fleet = Fleet(3)
    pair, back = fleet.group([0, 2]), fleet.group([2, 0])
    sent = [fleet.send(0, 2, numbers(10, seed), group=group) for seed, group in enumerate([fleet.world, pair, back])]
    got = [fleet.recv(2, 0, room(10), group=group) for group in (back, pair, fleet.world)]
    fleet.run()
    for one, other in zip(sent, reversed(got), strict=True):
        check(one, other)


# Bounds.


def test_messages_that_nobody_takes_are_bounded_and_arrive_at_last() -> None:
    fleet = Fleet(2)
    count = 2 * LARGEST_EAGER
    sent = [fleet.send(0, 1, numbers(1024, seed % 8), seed % 3) for seed in range(count)]
    fleet.run(SECOND_NS)
    assert sum(call.ended for call in sent) == LARGEST_EAGER
    assert fleet.engine(0).credit.unasked_bytes(1) == LARGEST_EAGER * EAGER_BYTES <= credit.LARGEST_UNASKED_BYTES
    assert fleet.largest_held_bytes[0, 1] <= LARGEST_EAGER * EAGER_BYTES + count * NOTE_BYTES
    got = [fleet.recv(1, 0, room(1024), tag) for tag in (2, 0, 1) for _ in range(tag, count, 3)]
    fleet.run()
    order = [seed for tag in (2, 0, 1) for seed in range(tag, count, 3)]
    for seed, call in zip(order, got, strict=True):
        check(sent[seed], call)
    assert fleet.idle
    assert fleet.engine(0).credit.unasked_bytes(1) < LARGEST_EAGER * EAGER_BYTES // 4
    again = [fleet.send(0, 1, numbers(1024), 7) for _ in range(LARGEST_EAGER // 2)]
    fleet.run(fleet.now_ns + SECOND_NS)
    assert all(call.ended for call in again), "the sender was not told what was taken"


@pytest.mark.parametrize("waits", [100, LARGE])
@pytest.mark.parametrize("late", [100, LARGE])
def test_a_message_that_waits_for_long_is_not_taken_for_a_later_one(monkeypatch, waits: int, late: int) -> None:
    monkeypatch.setattr(transfer, "MESSAGES", 40)
    monkeypatch.setattr(group, "MESSAGES", 40)
    fleet = Fleet(2)
    kept = fleet.send(0, 1, numbers(waits, 1), 7)
    pairs = []
    for at_ns in range(10 * MS, 600 * MS, 10 * MS):
        sent = fleet.send(0, 1, numbers(late, at_ns), 8, at_ns=at_ns)
        pairs.append((sent, fleet.recv(1, 0, room(late), 8, at_ns=at_ns)))
    got = fleet.recv(1, 0, room(waits), 7, at_ns=SECOND_NS)
    fleet.run()
    for sent, received in [*pairs, (kept, got)]:
        check(sent, received)
    assert fleet.idle


def test_the_sender_of_a_message_is_told_when_its_bytes_can_go() -> None:
    fleet = Fleet(2)
    memory = room(1024)
    holds = fleet.recv(1, 0, memory, 1, spans=True)
    got = [fleet.recv(1, 0, memory, 2, spans=True) for _ in range(64)]
    sent = [fleet.send(0, 1, numbers(1024, seed), 2) for seed in range(64)]
    fleet.run(SECOND_NS)
    assert fleet.engine(0).credit.unasked_bytes(1) == 64 * EAGER_BYTES
    first = fleet.send(0, 1, numbers(1024), 1)
    fleet.run()
    assert holds.ended
    assert all(call.ended for call in [first, *got, *sent])
    assert fleet.engine(0).credit.unasked_bytes(1) < 32 * EAGER_BYTES


def test_unasked_bytes_of_calls_leave_less_to_messages(monkeypatch) -> None:
    monkeypatch.setattr(credit, "LARGEST_UNASKED_BYTES", 10_000)
    fleet = Fleet(3)
    sent = [fleet.send(0, 1, numbers(1000)) for _ in range(5)] + [fleet.send(0, 2, numbers(1000))]
    fleet.run(SECOND_NS)
    assert [call.ended for call in sent] == [True, True, False, False, False, True]


def test_a_sender_is_not_ahead_of_acknowledgements_by_more_than_it_may() -> None:
    fleet = Fleet([1, 1], delay_ns=20 * MS)
    sent = fleet.send(0, 1, numbers(1_000_000), ahead_bytes=200_000)
    got = fleet.recv(1, 0, room(1_000_000))
    fleet.run()
    check(sent, got)
    assert 200_000 <= fleet.largest_held_bytes[0, 1] <= 200_000 + 65_536 + NOTE_BYTES


@pytest.mark.parametrize("slotting", [Slotting.SHARE, Slotting.TURNS])
def test_messages_arrive_through_windows(slotting: Slotting) -> None:
    fleet = Fleet([2, 2], delay_ns=10 * MS, slotting=slotting)
    sent = [fleet.send(rank, (rank + 2) % 4, numbers(count, rank), 1) for count in (0, 1, 1000, LARGE, 1_000_000, 5)
            for rank in range(4)]  # fmt: skip
    got = [fleet.recv((call.rank + 2) % 4, call.rank, room(call.array.size), 1) for call in sent]
    calls = [fleet.call(rank, "all_reduce", numbers(LARGE)) for rank in range(4)]
    fleet.run()
    for one, other in zip(sent, got, strict=True):
        check(one, other)
    assert all(call.ended and call.error is None for call in calls)
    assert fleet.idle


def test_few_chunks_of_a_message_wait_for_the_line_before_those_of_others() -> None:
    fleet = Fleet([1, 1], slotting=Slotting.TURNS)
    engine = fleet.engine(0)
    engine.slots._lane(Queued((None, 0), 1, 1, 0)).windows = ((0, 1),)  # none is long enough, so all wait
    fleet.send(0, 1, numbers(1_000_000), ahead_bytes=10**9)
    fleet.recv(1, 0, room(1_000_000))
    fleet.run(SECOND_NS)
    assert len(engine.slots.queue) == CHUNKS_QUEUED


def test_notes_keep_to_the_budget_of_small_messages_and_to_their_order(monkeypatch) -> None:
    fleet = Fleet([1, 1], slotting=Slotting.SHARE)
    engine = fleet.engine(0)
    engine.express.rate_bytes_per_s = 0.0
    engine.express._left_bytes = 3 * (NOTE_BYTES + LARGEST_FRAME_BYTES)
    queued: list[Queued[Any]] = []
    add = Slots.add
    monkeypatch.setattr(Slots, "add", lambda slots, send: (queued.append(send), add(slots, send)))
    tags: list[int] = []
    fleet.drops = lambda source, dst, tag: source == 0 and tags.append(tag) is not None
    sent = [fleet.send(0, 1, numbers(1, seed), 2) for seed in range(10)]
    got = [fleet.recv(1, 0, room(1), 2) for _ in range(10)]
    fleet.run()
    for one, other in zip(sent, got, strict=True):
        check(one, other)
    assert len(queued) == 7
    # What waits for the line has a tag of its own: transports keep the order of a tag, so it would follow the others.
    assert tags == [fleet.world.note_tag] * 3 + [tags[3]] * 7
    assert tags[3] != fleet.world.note_tag
    assert engine.express._left_bytes == 0


def test_a_note_does_not_overtake_one_that_waits_for_a_window() -> None:
    fleet = Fleet([2, 2], slotting=Slotting.TURNS)
    engine = fleet.engine(1)
    engine.slots.ahead = False
    engine.express.rate_bytes_per_s = engine.express._left_bytes = 0.0
    first = fleet.send(1, 3, numbers(1, 1))
    fleet.run(1000)
    assert engine.slots.waiting, "its window is open already"
    engine.express._left_bytes = 10_000.0
    second = fleet.send(1, 3, numbers(1, 2))
    got = [fleet.recv(3, 1, room(1)) for _ in range(2)]
    fleet.run()
    check(first, got[0])
    check(second, got[1])


def test_an_announcement_that_missed_its_window_keeps_its_place(monkeypatch) -> None:
    fleet = Fleet([2, 2], slotting=Slotting.TURNS)
    engine = fleet.engine(1)
    engine.express.rate_bytes_per_s = engine.express._left_bytes = 0.0
    give, given = Slots.due, []

    def due(slots: Slots[Any], now_ns: int) -> list[tuple[Queued[Any], Any]]:
        """Let the first note miss its window, which is known when the second one was given to the next window."""
        taken = give(slots, now_ns)
        if slots is not engine.slots or not taken or len(given) > 1:
            return taken
        given.extend(taken)
        if len(given) == 1:
            return []
        engine.missed([(*given[0], 0)])
        return taken

    monkeypatch.setattr(Slots, "due", due)
    first = fleet.send(1, 3, numbers(1, 1))
    second = fleet.send(1, 3, numbers(1, 2), at_ns=SECOND_NS)
    got = [fleet.recv(3, 1, room(1)) for _ in range(2)]
    fleet.run()
    check(first, got[0])
    check(second, got[1])


# What goes wrong.


@pytest.mark.parametrize(
    ("array", "name", "text"),
    [
        (np.zeros(11, np.float32), "", "recv from rank 0 of {} float32"),
        (np.zeros(10, np.int32), "", "recv from rank 0 of {} int32"),
        (np.zeros(10, np.float32), "second", "float32, tag 4 (second)"),
    ],
)
@pytest.mark.parametrize(("count", "awaits"), [(10, False), (10, True), (1000, True), (LARGE, False)])
def test_messages_that_do_not_fit_end_the_group_on_all_ranks(
    array, name: str, text: str, count: int, awaits: bool
) -> None:
    fleet = Fleet(3)
    other = fleet.group([0, 1])
    waits = fleet.recv(2, 1, room(1), 3)
    own = fleet.recv(0, 1, room(1), 5)
    fleet.recv(1, 2, room(1), 5)
    array = np.resize(array, len(array) - 10 + count)
    sent = fleet.send(0, 1, numbers(count), 4, awaits_receive=awaits)
    got = fleet.recv(1, 0, array, 4, name=name)
    fleet.run(10 * SECOND_NS)
    for call in (got, waits, own) if count == 10 and not awaits else (got, waits, own, sent):
        assert isinstance(call.error, PlanMismatch), call.error
        assert f"rank 0 called send to rank 1 of {count} float32, tag 4; rank 1 called recv" in str(call.error)
    assert text.format(array.size) in str(got.error)
    assert sent.ended
    fine = fleet.send(0, 1, numbers(10), group=other), fleet.recv(1, 0, room(10), group=other)
    fleet.run(11 * SECOND_NS)
    check(*fine)


def test_a_lost_peer_ends_what_waits_for_it() -> None:
    fleet = Fleet(3)
    other = fleet.group([0, 1])
    calls = [
        fleet.recv(0, 2, room(10)), fleet.send(0, 2, numbers(LARGE)), fleet.recv(1, None, room(10)),
        fleet.recv(0, 1, room(1), 5), fleet.send(1, 0, numbers(LARGE), 6),
    ]  # fmt: skip
    fine = fleet.send(0, 1, numbers(LARGE), group=other), fleet.recv(1, 0, room(LARGE), group=other)
    fleet.run(SECOND_NS // 10)
    fleet.lose(2, by=[0, 1])
    fleet.run(SECOND_NS)
    assert all(isinstance(call.error, PeerLost) for call in calls)
    check(*fine)
    assert fleet.idle


@pytest.mark.parametrize("count", [10, LARGE])
def test_a_message_that_nobody_sends_is_missed_by_name(count: int) -> None:
    fleet = Fleet(4)
    got = fleet.recv(0, 3, room(count), 7, timeout_s=2.0)
    waits = fleet.recv(2, None, room(count), 7)
    fleet.run(10 * SECOND_NS)
    assert isinstance(got.error, DeadlineMissed)
    assert f"recv from rank 3 of {count} float32, tag 7 was not finished after 2 s" in str(got.error)
    assert "rank 3 has not sent tag 7" in str(got.error)
    assert got.ended_ns == 2 * SECOND_NS
    assert isinstance(waits.error, DeadlineMissed)


@pytest.mark.parametrize("count", [0, 10, 1000, LARGE])
def test_a_message_that_nobody_takes_is_missed_by_name(count: int) -> None:
    fleet = Fleet(3)
    sent = fleet.send(0, 1, numbers(count), 7, timeout_s=2.0, awaits_receive=True)
    fleet.recv(1, 2, room(LARGE), 7)
    fleet.run(10 * SECOND_NS)
    assert "rank 1 has not received tag 7" in str(sent.error)


def test_any_source_that_nobody_sends_to_is_missed() -> None:
    fleet = Fleet(3)
    got = fleet.recv(0, None, room(1), 7, timeout_s=2.0)
    fleet.run(10 * SECOND_NS)
    assert "no rank of the group has sent tag 7" in str(got.error)


def test_the_time_runs_from_the_last_progress() -> None:
    """A message that takes 10 s is not late after 1 s, and one whose sender stops is."""
    fleet = Fleet(2, rate_bytes_per_s=400_000.0)
    sent, got = fleet.send(0, 1, numbers(1_000_000), timeout_s=1.0), fleet.recv(1, 0, room(1_000_000), timeout_s=1.0)
    fleet.run(20 * SECOND_NS)
    check(sent, got)
    assert got.ended_ns > 9 * SECOND_NS
    fleet.send(0, 1, numbers(1_000_000))
    stuck = fleet.recv(1, 0, room(1_000_000), timeout_s=1.0)
    fleet.at(23 * SECOND_NS, 0, lambda: fleet.freeze(0))
    fleet.run(40 * SECOND_NS)
    assert isinstance(stuck.error, DeadlineMissed)
    assert "rank 0 has sent" in str(stuck.error)
    assert 23 * SECOND_NS < stuck.ended_ns < 26 * SECOND_NS


def test_the_time_does_not_run_while_an_earlier_call_uses_the_memory() -> None:
    fleet = Fleet(2)
    array = numbers(LARGE)
    calls = [fleet.call(0, "all_reduce", array, spans=True), fleet.send(0, 1, array, spans=True, timeout_s=1.0)]
    fleet.call(1, "all_reduce", numbers(LARGE, 3), at_ns=5 * SECOND_NS)
    got = fleet.recv(1, 0, room(LARGE))
    fleet.run()
    assert calls[0].error is None
    check(calls[1], got)


def test_who_leaves_a_group_ends_its_messages_there() -> None:
    fleet = Fleet(2)
    group = fleet.group([0, 1])
    calls = [fleet.recv(0, 1, room(1), group=group), fleet.send(0, 1, numbers(LARGE), group=group)]
    fleet.send(0, 1, numbers(10), group=group)
    fleet.run(SECOND_NS)
    assert fleet.engine(0).credit.unasked_bytes(1) == 40
    fleet.at(fleet.now_ns, 0, lambda: fleet.engine(0).leave(group))
    later = fleet.recv(0, 1, room(1), group=group, at_ns=2 * SECOND_NS)
    fleet.run(3 * SECOND_NS)
    assert all(isinstance(call.error, Closed) for call in [*calls, later])
    assert fleet.engine(0).credit.unasked_bytes(1) == 0


def test_the_flight_record_tells_who_waits_for_whom_and_which_tag() -> None:
    fleet = Fleet(3)
    fleet.send(0, 1, numbers(LARGE), 4, name="halo")
    fleet.recv(0, None, room(10), 5)
    fleet.send(0, 2, numbers(10), 6)
    fleet.run(SECOND_NS)
    (world,) = snapshot(fleet.engine(0))
    assert world["calls"] == [
        {
            "sequence": -1, "what": "send to rank 1 of 100000 float32, tag 4 (halo)",
            "state": "rank 1 has not received tag 4", "waits_for": [1],
        },
        {
            "sequence": -1, "what": "recv from any source of 10 float32, tag 5",
            "state": "no rank of the group has sent tag 5", "waits_for": [1, 2],
        },
    ]  # fmt: skip


# At random.


@given(
    seed=st.integers(0, 2**32 - 1), sites=st.sampled_from([[1], [3], [2, 2], [1, 2, 1]]),
    count=st.integers(1, 40), credit_bytes=st.sampled_from([None, 200_000]),
)  # fmt: skip
@settings(max_examples=60)
def test_random_messages_all_arrive(seed: int, sites: Sequence[int], count: int, credit_bytes: int | None) -> None:
    """All are posted at once, in an order that differs by rank, beside all-reduces. Some arrays are on devices."""
    draw = np.random.default_rng(seed)
    size = sum(sites)
    fleet = Fleet(sites, delay_ns=lambda source, dst: int((1 + source * 3 + dst) * MS), credit_bytes=credit_bytes)
    pairs = []
    for number in range(count):
        source, dst = (int(rank) for rank in draw.integers(0, size, 2))
        elems = int(draw.choice([0, 1, 1000, 5000, 40_000]))
        at_ns = [int(at) for at in draw.integers(0, 50 * MS, 2)]
        awaits = bool(draw.integers(0, 2))
        copies = [int(draw.integers(0, 20 * MS)) if draw.integers(0, 2) else None for _ in "sr"]
        sent = fleet.send(
            source, dst, numbers(elems, number), number, at_ns=at_ns[0], awaits_receive=awaits, copy_ns=copies[0]
        )
        origin = draw.choice([source, None])
        got = fleet.recv(dst, origin, room(elems), number, at_ns=at_ns[1], copy_ns=copies[1])
        pairs.append((sent, got))
    calls = [fleet.call(rank, "all_reduce", numbers(3000, 1)) for _ in range(5) for rank in range(size)]
    fleet.run()
    for sent, got in pairs:
        check(sent, got)
        assert got.operation.source == sent.rank
    assert all(call.ended and call.error is None for call in calls)
    assert fleet.idle
    assert not any(fleet._held_bytes.values())
