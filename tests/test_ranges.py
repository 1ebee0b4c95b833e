"""Which messages use the same memory: found as a look at each of them would."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from detcoll.runtime.group import Group
from detcoll.runtime.operation import Span, conflict
from detcoll.runtime.ranges import Memory
from detcoll.runtime.transfer import Transfer

GROUP = Group(1, (0, 1), (0, 0))

spans = st.lists(
    st.tuples(st.integers(0, 60), st.one_of(st.integers(0, 3), st.integers(0, 40))).map(lambda of: (of[0], sum(of))),
    min_size=1, max_size=3,
)  # fmt: skip


def message(is_send: bool, where: list[Span], order: int) -> Transfer:
    made = Transfer(GROUP, is_send, 1, 0, "float32", 1, 4, 10**9, 0, spans=where)
    made.order = order
    return made


@given(
    held=st.lists(st.tuples(st.booleans(), spans, st.sampled_from(("under way", "reported", "ended"))), max_size=12),
    is_send=st.booleans(), where=spans, order=st.integers(0, 12),
)  # fmt: skip
def test_it_finds_what_a_look_at_each_message_finds(
    held: list[tuple[bool, list[Span], str]], is_send: bool, where: list[Span], order: int
) -> None:
    memory, left = Memory(), []
    for at, (each_sends, each_where, state) in enumerate(held):
        one = message(each_sends, each_where, at)
        memory.add(one)
        one.reported = state == "reported"
        left.append((one, state))
    for one, state in left:
        if state == "ended":
            memory.remove(one)
    call = message(is_send, where, order)
    wanted = [one for one, state in left if state == "under way" and one.order < order and conflict(one, call)]
    found = memory.find(call)
    assert (found in wanted) if wanted else found is None
    for one, state in left:
        if state != "ended":
            memory.remove(one)
    assert memory.find(message(False, [(0, 1000)], 99)) is None


class Counted(list[Any]):
    """A list that counts how often somebody looks at an entry."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        type(self).looks += 1
        return super().__getitem__(at)


def test_a_look_does_not_grow_with_the_number_of_messages() -> None:
    memory, count = Memory(), 2000
    memory._read._entries, memory._written._entries = Counted(), Counted()
    for at in range(count):
        apart = [message(bool(way), [(100 * (2 * at + way), 100 * (2 * at + way) + 100)], at) for way in (0, 1)]
        shared = message(True, [(-100, 0)], at)
        for one in (*apart, shared):
            assert memory.find(one) is None
            memory.add(one)
    assert memory.find(message(False, [(-1, 0)], count)) is not None
    assert Counted.looks < 200 * count, "a look at each of them would take thousands"
