"""The rules of the rendezvous, in virtual time and without sockets: hub, member, link, watch."""

from __future__ import annotations

import random

import pytest

from detcoll.errors import ConnectError, FrameError, PeerLost, UsageError
from detcoll.rendezvous import wire
from detcoll.rendezvous.hub import Hub
from detcoll.rendezvous.link import WINDOW, Link
from detcoll.rendezvous.member import Aborted, Lost, Member
from detcoll.rendezvous.watch import Watch

S = 10**9
TOLERANCE_NS = 30 * S


def hello(rank: int, size: int = 3, **changes: object) -> wire.Hello:
    said: dict[str, object] = {
        "version": wire.VERSION, "job": "", "epoch": 0, "rank": rank, "size": size, "remaining_ms": 20_000,
    }  # fmt: skip
    return wire.Hello(**(said | changes))  # type: ignore[arg-type]


def assembled(size: int = 3) -> Hub:
    hub = Hub(size, "", 0)
    for rank in range(size):
        assert hub.greet(hello(rank, size), 0) is None
    hub.welcome()
    assert hub.answers() == [(rank, wire.Welcome("")) for rank in range(size)]
    return hub


def gather(name: str, ranks: tuple[int, ...] | None = None, turn: int = 0, payload: bytes = b"") -> wire.Gather:
    return wire.Gather(wire.Key(name, ranks, turn), payload, 10_000)


class TestHub:
    def test_an_exchange_is_answered_once_all_that_take_part_have_come(self) -> None:
        hub = assembled()
        hub.gather(2, gather("x", (0, 2), payload=b"two"), 0)
        hub.gather(1, gather("x"), 0)
        assert hub.answers() == []
        hub.gather(0, gather("x", (0, 2), payload=b"zero"), 0)
        answer = wire.Gathered(wire.Key("x", (0, 2), 0), [b"zero", b"two"])
        assert hub.answers() == [(0, answer), (2, answer)]

    def test_those_that_came_hear_a_little_early_who_did_not_and_the_late_at_once(self) -> None:
        hub = assembled()
        hub.gather(0, gather("x"), S)
        assert hub.next_ns() == S + 9_500_000_000
        hub.on_time(S + 9_499_999_999)
        assert hub.answers() == []
        hub.on_time(S + 9_500_000_000)
        failure = wire.Missing(wire.Key("x", None, 0), "absent", (1, 2), "")
        assert hub.answers() == [(0, failure)]
        hub.gather(1, gather("x"), 11 * S)
        assert hub.answers() == [(1, failure)]
        for rank in range(3):
            hub.gather(rank, gather("x", turn=1), 12 * S)
        assert [type(message) for _, message in hub.answers()] == [wire.Gathered] * 3

    def test_who_came_with_other_ranks_or_under_another_name_is_told(self) -> None:
        hub = assembled()
        hub.gather(0, gather("x"), 0)
        hub.gather(1, gather("x", (1, 2)), S)
        hub.gather(2, gather("y"), S)
        hub.on_time(9_500_000_000)
        [(rank, failure)] = hub.answers()
        assert rank == 0
        assert isinstance(failure, wire.Missing)
        assert failure.ranks == (1, 2)
        assert failure.text == "rank 1 came to 'x' of ranks 1, 2; rank 2 came to 'y' of all ranks"

    def test_a_loss_fails_only_what_needs_the_rank(self) -> None:
        hub = assembled(4)
        hub.gather(0, gather("all"), 0)
        hub.gather(1, gather("few", (0, 1)), 0)
        hub.gather(2, gather("lost", (2, 3)), 0)
        hub.lose(3, "nothing was heard of it for 30 s")
        told = hub.answers()
        why = "rank 3 is lost: nothing was heard of it for 30 s"
        assert told[:3] == [(rank, wire.LostRank(3, "nothing was heard of it for 30 s")) for rank in range(3)]
        assert told[3:] == [
            (0, wire.Missing(wire.Key("all", None, 0), "lost", (3,), why)),
            (2, wire.Missing(wire.Key("lost", (2, 3), 0), "lost", (3,), why)),
        ]
        hub.gather(0, gather("few", (0, 1)), 0)
        assert [type(message) for _, message in hub.answers()] == [wire.Gathered] * 2
        hub.gather(1, gather("all"), 0)
        assert hub.answers() == [(1, wire.Missing(wire.Key("all", None, 0), "lost", (3,), why))]

    def test_leaving_is_no_loss(self) -> None:
        hub = assembled()
        hub.leave(1)
        assert hub.answers() == []
        hub.gather(2, gather("x"), 0)
        assert hub.answers() == [(2, wire.Missing(wire.Key("x", None, 0), "other", (1,), "rank 1 has left"))]
        hub.lose(1, "its connection ended")
        assert hub.answers() == []
        hub.leave(0)
        assert not hub.is_over
        hub.lose(2, "its connection ended")
        assert hub.is_over

    def test_an_abort_is_passed_on_to_all_others(self) -> None:
        hub = assembled()
        hub.abort(1, wire.Abort("mismatch", "x" * 20_000, 2**63 + 5))
        told = wire.AbortedRank(1, "mismatch", "x" * wire.TEXT_CHARS, 2**63 + 5)
        assert hub.answers() == [(0, told), (2, told)]

    @pytest.mark.parametrize(
        ("stray", "fault", "why"),
        [
            (hello(1, 4), "usage", "rank 1 says that the world has 4 ranks, rank 0 says 3"),
            (hello(3), "usage", "rank 3 is not in a world of 3 ranks"),
            (hello(0), "usage", "two processes say that they are rank 0"),
            (hello(1, job="other"), "world", "it belongs to another job"),
            (hello(1, version=1), "usage", "rank 1 has version 1 of the rendezvous, rank 0 has 2"),
        ],
    )
    def test_a_stray_is_refused_alone(self, stray: wire.Hello, fault: str, why: str) -> None:
        hub = Hub(3, "", 0)
        assert hub.greet(hello(0), 0) is None
        refusal = hub.greet(stray, 0)
        assert isinstance(refusal, wire.Refused)
        assert refusal.fault == fault
        assert refusal.text.startswith(why)
        assert hub.answers() == []
        assert hub.greet(hello(1), 0) is None
        assert hub.greet(hello(2), 0) is None
        assert hub.is_assembled

    def test_refusals_are_part_of_why_a_meeting_failed(self) -> None:
        hub = Hub(3, "", 0)
        hub.greet(hello(0), 0)
        hub.greet(hello(2, 4), 0)
        hub.greet(hello(1), 0)
        hub.on_time(19_500_000_000)
        told = (
            "a process that says it is rank 2 of 4 was refused: rank 2 says that the world has 4 ranks, rank 0 says 3"
        )
        failure = wire.Missing(None, "absent", (2,), told)
        assert hub.answers() == [(0, failure), (1, failure)]
        assert not hub.is_over
        assert hub.greet(hello(2), 19_600_000_000) == failure  # who comes too late learns at once why
        assert hub.is_over

    def test_many_strays_are_not_all_remembered(self) -> None:
        hub = Hub(2, "", 0)
        hub.greet(hello(0, 2), 0)
        for size in range(3, 1000):
            hub.greet(hello(1, size), 0)
        hub.on_time(20 * S)
        [(_, failure)] = hub.answers()
        assert isinstance(failure, wire.Missing)
        assert failure.text.count("was refused") == 8

    def test_a_rank_that_is_gone_before_all_have_come_ends_the_meeting(self) -> None:
        hub = Hub(3, "", 0)
        hub.greet(hello(0), 0)
        hub.greet(hello(1), 0)
        hub.lose(1, "its connection ended and its host refuses new ones")
        failure = wire.Refused("world", "rank 1 joined, but left before all ranks had joined")
        assert hub.answers() == [(0, failure)]
        assert hub.greet(hello(2), 0) == failure
        assert hub.greet(hello(1), 0) == failure

    def test_a_meeting_that_is_too_early_or_too_late(self) -> None:
        hub = Hub(2, "", 1)
        assert hub.greet(hello(0, 2, epoch=2), 0) == wire.Refused("later", "the previous meeting is not over yet")
        late = hub.greet(hello(0, 2, epoch=0), 0)
        assert isinstance(late, wire.Refused)
        assert late.text == "the ranks of this job have already met, without this process"

    @pytest.mark.parametrize("ranks", [(0, 2), (1, 9), (1, -1)])
    def test_ranks_that_do_not_fit_are_refused(self, ranks: tuple[int, ...]) -> None:
        hub = assembled()
        hub.gather(1, gather("x", ranks), 0)
        [(rank, failure)] = hub.answers()
        assert rank == 1
        assert isinstance(failure, wire.Missing)
        assert failure.text == "rank 1 cannot take part in it"


class TestMember:
    def test_exchanges_are_counted_by_name_and_ranks(self) -> None:
        member = Member(1, 3)
        assert [member.count("a", None).turn for _ in range(2)] == [0, 1]
        assert member.count("a", (0, 1)).turn == 0
        assert member.count("b", None).turn == 0

    def test_all_ranks_by_name_are_all_ranks(self) -> None:
        member = Member(1, 3)
        assert member.group_of("x", [2, 0, 1]) is None
        assert member.group_of("x", [2, 1]) == (1, 2)

    @pytest.mark.parametrize(
        ("ranks", "told"),
        [
            ([0, 2], "does not contain this rank, 1"),
            ([1, 1], "different ranks"),
            ([1, 3], "from 0 to 2"),
            ([], "does not contain"),
        ],
    )
    def test_ranks_that_do_not_fit(self, ranks: list[int], told: str) -> None:
        with pytest.raises(UsageError, match=told):
            Member(1, 3).group_of("x", ranks)

    def test_an_abort_of_a_group_fails_no_exchange_and_one_of_the_job_fails_all(self) -> None:
        member = Member(0, 2)
        key = member.count("x", None)
        member.begin(key)
        member.take(wire.AbortedRank(1, "mismatch", "group only", 7))
        assert not member.is_settled(key)
        member.take(wire.AbortedRank(1, "error", "disk full", 0))
        assert member.is_settled(key)
        with pytest.raises(PeerLost, match=r"exchange 'x': rank 1 gave up \(error\): disk full"):
            member.outcome(key)
        with pytest.raises(PeerLost):
            member.begin(member.count("y", None))
        assert member.events() == [Aborted(1, "mismatch", "group only", 7), Aborted(1, "error", "disk full", 0)]
        assert member.events() == []

    def test_a_loss_is_an_event_and_fails_nothing_by_itself(self) -> None:
        member = Member(0, 3)
        key = member.count("x", (0, 1))
        member.begin(key)
        member.take(wire.LostRank(2, "nothing was heard of it for 30 s"))
        assert not member.is_settled(key)
        [lost] = member.events()
        assert lost == Lost(2)
        assert isinstance(lost, Lost)
        assert lost.why == "nothing was heard of it for 30 s"

    def test_without_rank_0_exchanges_fail_at_once_and_it_is_told_once(self) -> None:
        member = Member(1, 2)
        member.lose_hub("nothing was heard of it for 30 s")
        member.lose_hub("again")
        assert member.events() == [Lost(0)]
        with pytest.raises(PeerLost, match="exchange 'x': rank 0 is lost: nothing was heard of it for 30 s"):
            member.begin(member.count("x", None))

    def test_a_hub_that_left_is_not_lost(self) -> None:
        member = Member(1, 2)
        member.take(wire.Closing())
        member.lose_hub("its connection ended and its host refuses new ones")
        assert member.events() == []
        with pytest.raises(PeerLost, match="rank 0 has left"):
            member.begin(member.count("x", None))

    def test_late_answers_are_dropped_and_failures_leave_it_usable(self) -> None:
        member = Member(1, 2)
        first = member.count("x", None)
        member.begin(first)
        member.take(wire.Missing(first, "absent", (0,), ""))
        with pytest.raises(ConnectError, match="exchange 'x': rank 0 did not arrive in time"):
            member.outcome(first)
        member.end(first)
        member.take(wire.Gathered(first, [b"", b""]))
        second = member.count("x", None)
        member.begin(second)
        assert member.outcome(second) is None
        member.take(wire.Gathered(second, [b"0", b"1"]))
        assert member.outcome(second) == [b"0", b"1"]


def carry(frames: list[bytes], to: Link) -> list[bytes]:
    taken = [to.take(*wire.parse(frame)) for frame in frames]
    return [message for message in taken if message is not None]


class TestLink:
    def test_messages_arrive_whole_in_order_and_once_over_connections_that_lose(self) -> None:
        chance = random.Random(7)
        sizes = [0, 1, wire.PIECE_BYTES, wire.PIECE_BYTES + 1, 3 * wire.PIECE_BYTES, 40]
        messages = [bytes([i % 256]) * chance.choice(sizes[1:]) for i in range(200)]
        here, there = Link(2**20), Link(2**20)
        arrived: list[bytes] = []
        pending = list(messages)
        while len(arrived) < len(messages):
            for _ in range(chance.randrange(4)):
                if pending:
                    here.send(pending.pop(0))
            frames = here.frames()
            lost_from = chance.randrange(len(frames) + 1) if chance.random() < 0.3 else len(frames)
            arrived += carry(frames[:lost_from], there)
            back = there.frames()
            if lost_from < len(frames):  # the connection broke, and with it what comes back
                arrived += carry([there.note()], here)
                here.restart()
                there.restart()
            else:
                carry(back, here)
        assert arrived == messages
        carry([there.note()], here)
        assert here.is_idle

    def test_few_pieces_are_on_their_way_at_a_time(self) -> None:
        here, there = Link(2**24), Link(2**24)
        here.send(bytes((WINDOW + 3) * wire.PIECE_BYTES))
        frames = here.frames()
        assert len(frames) == WINDOW
        assert here.frames() == []
        assert here.has_waiting
        assert carry(frames, there) == []
        carry(there.frames(), here)
        assert [len(message) for message in carry(here.frames(), there)] == [(WINDOW + 3) * wire.PIECE_BYTES]

    def test_what_arrived_is_acknowledged_once(self) -> None:
        here, there = Link(100), Link(100)
        number = here.send(b"x")
        assert carry(here.frames(), there) == [b"x"]
        assert here.acknowledged < number
        notes = there.frames()
        assert len(notes) == 1
        assert there.frames() == []
        carry(notes, here)
        assert here.acknowledged == number
        assert here.is_idle

    def test_a_backlog_shows(self) -> None:
        link = Link(100, backlog_bytes=10)
        link.send(bytes(10))
        assert not link.is_full
        link.send(b"x")
        assert link.is_full

    @pytest.mark.parametrize(
        "frames",
        [
            [wire.frame(wire.Header(wire.CONTINUES, 1, 0), bytes(60)), wire.frame(wire.Header(0, 2, 0), bytes(60))],
            [wire.frame(wire.Header(0, 0, 1))],
        ],
        ids=["too large", "acknowledges what was not sent"],
    )
    def test_what_breaks_the_protocol(self, frames: list[bytes]) -> None:
        with pytest.raises(FrameError):
            carry(frames, Link(100))

    def test_a_frame_without_a_header(self) -> None:
        with pytest.raises(FrameError, match="has no header"):
            wire.parse(b"short")


class TestWatch:
    def test_a_refusal_is_a_death_at_once(self) -> None:
        watch = Watch(TOLERANCE_NS)
        watch.down(S)
        assert watch.must_ask(S)
        assert watch.loss(S) is None
        watch.refused(S)
        assert watch.next_ns() == S + 20_000_000  # its last words may be on their way
        assert watch.loss(S + 19_999_999) is None
        assert watch.loss(S + 20_000_000) == "its connection ended and its host refuses new ones"

    def test_silence_is_tolerated_for_a_while_and_asked_about_meanwhile(self) -> None:
        watch = Watch(TOLERANCE_NS)
        watch.down(0)
        asked = [now_ns for now_ns in range(0, TOLERANCE_NS, S // 10) if watch.must_ask(now_ns)]
        assert asked == list(range(0, TOLERANCE_NS, S))
        assert watch.loss(TOLERANCE_NS - 1) is None
        assert watch.loss(TOLERANCE_NS) == "nothing was heard of it for 30 s"

    def test_a_new_connection_forgives_all(self) -> None:
        watch = Watch(TOLERANCE_NS)
        watch.down(0)
        watch.refused(0)
        watch.up()
        assert watch.loss(2 * TOLERANCE_NS) is None
        assert watch.next_ns() is None
        watch.down(2 * TOLERANCE_NS)
        assert watch.loss(3 * TOLERANCE_NS - 1) is None

    def test_a_refusal_that_arrives_after_the_connection_is_back_means_nothing(self) -> None:
        watch = Watch(TOLERANCE_NS)
        watch.refused(0)
        watch.down(S)
        assert watch.loss(2 * S) is None
