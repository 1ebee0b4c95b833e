"""A mailbox by itself, with times that are made up."""

from __future__ import annotations

import pytest

from detcoll.errors import Closed, FrameError, PeerLost, UsageError
from detcoll.mailbox import BEHIND, Mailbox
from detcoll.transport import Ticket, TicketStatus


def a_mailbox(**options: object) -> Mailbox:
    mail = Mailbox(0, **options)
    mail.peers |= {1, 2}
    return mail


def fill(mail: Mailbox, src: int, tag: int, data: bytes, now_ns: int = 5) -> None:
    mail.deliver(src, tag, memoryview(data), now_ns)


class Told:
    """Counts how often its memory came back, and with which tickets."""

    def __init__(self) -> None:
        self.taken: list[Ticket | None] = []

    def take_back(self, ticket: Ticket | None) -> None:
        self.taken.append(ticket)


def test_bytes_go_straight_to_the_receive() -> None:
    mail, memory = a_mailbox(), bytearray(8)
    ticket = mail.recv(1, 7, 8, memoryview(memory), 1)
    arrival = mail.begin(1, 7, 8, 2)
    arrival.rest[:3] = b"abc"
    mail.advance(arrival, 3, 3)
    assert memory == b"abc" + bytes(5)
    assert not mail.has_ended
    arrival.rest[:] = b"defgh"
    mail.advance(arrival, 5, 4)
    assert memory == b"abcdefgh"
    assert mail.take_ended() == [ticket]
    assert (ticket.status, ticket.ended_ns) == (TicketStatus.DONE, 4)
    assert not mail.has_ended


def test_a_receive_may_be_posted_while_its_message_arrives() -> None:
    mail, memory = a_mailbox(), bytearray(4)
    arrival = mail.begin(1, 7, 4, 1)
    arrival.rest[:2] = b"ab"
    mail.advance(arrival, 2, 1)
    first = mail.recv(1, 7, 4, memoryview(memory), 2)
    second = mail.recv(1, 7, 4, None, 2)
    assert memory == bytes(4)
    assert mail.held_bytes(1) == 4
    arrival.rest[:] = b"cd"
    mail.advance(arrival, 2, 3)
    fill(mail, 1, 7, b"next")
    assert mail.take_ended() == [first, second]
    assert memory == b"abcd"
    assert second.view == b"next"
    assert mail.held_bytes(1) == 0


@pytest.mark.parametrize("is_early", [False, True])
def test_another_size_fails_the_receive_and_leaves_its_memory_alone(is_early: bool) -> None:
    mail, memory = a_mailbox(), bytearray(3)
    if is_early:
        fill(mail, 1, 7, b"abcd")
    ticket = mail.recv(1, 7, 3, memoryview(memory), 1)
    if not is_early:
        fill(mail, 1, 7, b"abcd")
    assert isinstance(ticket.error, FrameError)
    assert memory == bytes(3)
    assert mail.take_ended() == [ticket]


def test_room_is_bounded_and_comes_back() -> None:
    mail = a_mailbox(held_bytes=10)
    fill(mail, 1, 1, bytes(6))
    assert mail.admits(1, 2, 4)
    assert not mail.admits(1, 2, 5)
    assert mail.admits(2, 2, 10)
    mail.recv(1, 2, 5, None, 1)
    assert mail.admits(1, 2, 5), "it is asked for"
    mail.recv(1, 1, 6, None, 1)
    assert mail.admits(1, 3, 10)


def test_in_order_more_is_held_while_a_receive_waits_behind() -> None:
    mail = a_mailbox(held_bytes=10)
    assert not mail.admits(1, 2, 11, in_order=True)
    behind = mail.recv(1, 9, 1, None, 1)
    assert mail.admits(1, 2, 11, in_order=True)
    assert not mail.admits(1, 2, 11)
    assert not mail.admits(1, 2, 10 * BEHIND + 1, in_order=True)
    assert not mail.admits(2, 2, 11, in_order=True), "nobody waits for rank 2"
    assert mail.cancel(behind, 2)
    assert not mail.admits(1, 2, 11, in_order=True)


def test_what_is_discarded_gives_its_room_back_and_spares_what_is_being_written() -> None:
    mail, memory = a_mailbox(held_bytes=10), bytearray(4)
    fill(mail, 1, 0x100, bytes(8))
    waiting = mail.recv(1, 0x101, 4, memoryview(bytearray(4)), 1)
    written = mail.recv(1, 0x102, 4, memoryview(memory), 1)
    lent = mail.recv(1, 0x103, 4, None, 1)
    other = mail.recv(1, 0x200, 4, None, 1)
    into, to_lend = mail.begin(1, 0x102, 4, 2), mail.begin(1, 0x103, 4, 2)
    mail.discard(0x1FF, 8, 3)
    assert mail.held_bytes(1) == 0
    assert mail.take_ended() == [waiting, lent]
    assert written.status is other.status is TicketStatus.PENDING
    for arrival in (into, to_lend):
        mail.advance(arrival, 4, 4)
    assert mail.take_ended() == [written]
    assert {ticket.status for ticket in (waiting, lent, written)} == {TicketStatus.CANCELLED}
    assert mail.admits(1, 0x110, 1000)
    fill(mail, 1, 0x110, bytes(1000))
    assert mail.held_bytes(1) == 0
    mail.send(2, 0x180, 1, 5)
    assert not mail.admits(1, 0x110, 1000), "using a tag of the prefix ends the dropping"


def test_what_is_discarded_while_it_arrives_early_is_dropped_at_its_end() -> None:
    mail = a_mailbox()
    arrival = mail.begin(1, 0x100, 4, 1)
    mail.discard(0x100, 8, 2)
    late = mail.recv(1, 0x100, 4, None, 3)
    mail.advance(arrival, 4, 4)
    assert late.status is TicketStatus.PENDING
    assert mail.held_bytes(1) == 0
    fill(mail, 1, 0x100, b"next")
    assert late.view == b"next"


def test_a_lost_peer_costs_its_own_tickets_and_keeps_what_had_arrived() -> None:
    mail, memory = a_mailbox(), bytearray(4)
    fill(mail, 1, 1, b"here")
    half = mail.begin(1, 2, 4, 1)
    arriving = mail.recv(1, 3, 4, memoryview(memory), 1)
    mail.begin(1, 3, 4, 1)
    waiting, other = mail.recv(1, 4, 4, None, 1), mail.recv(2, 4, 4, None, 1)
    sent, sent_elsewhere = mail.send(1, 5, 4, 1), mail.send(2, 5, 4, 1)
    mail.advance(half, 2, 2)
    mail.lose(1, PeerLost("gone"), 3)
    assert set(mail.take_ended()) == {arriving, waiting, sent}
    assert all(isinstance(ticket.error, PeerLost) for ticket in (arriving, waiting, sent))
    assert other.status is sent_elsewhere.status is TicketStatus.PENDING
    assert mail.recv(1, 1, 4, None, 4).view == b"here"
    for start in (lambda: mail.recv(1, 2, 4, None, 4), lambda: mail.send(1, 2, 4, 4)):
        with pytest.raises(PeerLost, match="gone"):
            start()
    assert mail.held_bytes(1) == 0


def test_a_refused_receive_lifts_no_prefix() -> None:
    mail = a_mailbox()
    mail.discard(0x100, 8, 1)
    mail.lose(1, PeerLost("gone"), 2)
    with pytest.raises(PeerLost):
        mail.recv(1, 0x101, 4, None, 3)
    assert mail.drops(0x101)
    mail.recv(2, 0x101, 4, None, 4)
    assert not mail.drops(0x101)


def test_a_receive_waits_on_where_there_is_no_memory_for_its_message() -> None:
    def refuse(nbytes: int) -> tuple[memoryview, None]:
        raise MemoryError

    mail = a_mailbox(memory=refuse)
    ticket = mail.recv(1, 1, 4, None, 1)
    with pytest.raises(MemoryError):
        mail.begin(1, 1, 4, 2)
    mail.keep(1, 1, memoryview(b"next"), 3)
    assert ticket.view == b"next"


def test_a_peer_that_takes_nothing_more_is_still_heard() -> None:
    mail = a_mailbox()
    waiting, sent = mail.recv(1, 1, 4, None, 1), mail.send(1, 1, 4, 1)
    mail.end_sends(1, PeerLost("gone"), 2)
    assert mail.take_ended() == [sent]
    fill(mail, 1, 1, b"last")
    assert waiting.view == b"last"


def test_a_message_that_cannot_be_had_fails_the_receive_that_takes_it() -> None:
    mail, memory = a_mailbox(), bytearray(4)
    posted = mail.recv(1, 1, 4, memoryview(memory), 1)
    arrivals = [mail.begin(1, tag, 4, 2) for tag in (1, 2, 3)]
    mail.advance(arrivals[0], 2, 2)
    mail.discard(3, 0, 2)
    for arrival in arrivals:
        mail.fail(arrival, PeerLost("refused"), 3)
    fill(mail, 1, 2, b"next")
    later, after = mail.recv(1, 2, 4, None, 4), mail.recv(1, 2, 4, None, 4)
    assert mail.take_ended() == [posted, later, after]
    assert [str(ticket.error) for ticket in (posted, later)] == ["refused"] * 2
    assert after.view == b"next"
    assert mail.held_bytes(1) == 0


def test_cancelled_receives_take_no_message() -> None:
    mail = a_mailbox()
    tickets = [mail.recv(1, 7, 4, None, 1) for _ in range(3)]
    assert mail.cancel(tickets[1], 2)
    assert not mail.cancel(tickets[1], 2)
    assert not mail.has_ended
    begun = mail.begin(1, 7, 4, 3)
    assert not mail.cancel(tickets[0], 3), "its message is arriving"
    begun.rest[:] = b"one."
    mail.advance(begun, 4, 3)
    fill(mail, 1, 7, b"two.")
    assert [tickets[0].view, tickets[2].view] == [b"one.", b"two."]


def test_closing_cancels_all_and_refuses_the_rest() -> None:
    mail = a_mailbox()
    tickets = [mail.recv(1, 1, 4, None, 1), mail.recv(2, 2, 4, None, 1), mail.send(1, 3, 4, 1)]
    mail.begin(2, 2, 4, 2)
    mail.close(3)
    mail.close(4)
    assert {ticket.status for ticket in tickets} == {TicketStatus.CANCELLED}
    for use in (lambda: mail.recv(1, 1, 4, None, 5), lambda: mail.send(1, 1, 4, 5), lambda: mail.discard(0, 8, 5)):
        with pytest.raises(Closed):
            use()


def test_a_lender_hears_of_the_release() -> None:
    owner, reused = Told(), bytearray(9)
    mail = a_mailbox(memory=lambda nbytes: (memoryview(reused)[:nbytes], owner))
    ticket = mail.recv(1, 1, 4, None, 1)
    fill(mail, 1, 1, b"lent")
    assert ticket.view.readonly
    assert ticket.view.obj is reused
    ticket.release()
    ticket.release()
    assert owner.taken == [ticket]


@pytest.mark.parametrize("is_early", [False, True])
def test_what_is_kept_is_lent_where_it_lies_and_comes_back_once(is_early: bool) -> None:
    mail, owner, memory = a_mailbox(), Told(), bytearray(b"kept")
    ticket = None if is_early else mail.recv(1, 1, 4, None, 1)
    mail.keep(1, 1, memoryview(memory), 2, owner)
    assert mail.held_bytes(1) == (4 if is_early else 0)
    ticket = ticket or mail.recv(1, 1, 4, None, 3)
    memory[:] = b"same"
    assert ticket.view == b"same"
    assert not owner.taken
    ticket.release()
    ticket.release()
    assert owner.taken == [ticket]
    assert mail.held_bytes(1) == 0


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("nbytes", [4, 3])
def test_what_is_kept_comes_back_when_it_was_copied_or_does_not_fit(is_early: bool, nbytes: int) -> None:
    mail, owner, into = a_mailbox(), Told(), bytearray(nbytes)
    ticket = None if is_early else mail.recv(1, 1, nbytes, memoryview(into), 1)
    mail.keep(1, 1, memoryview(b"kept"), 2, owner)
    ticket = ticket or mail.recv(1, 1, nbytes, memoryview(into), 3)
    assert owner.taken == [None]
    assert ticket.status is (TicketStatus.DONE if nbytes == 4 else TicketStatus.FAILED)
    assert into == (b"kept" if nbytes == 4 else bytes(nbytes))


@pytest.mark.parametrize("is_early", [False, True])
def test_what_is_kept_comes_back_when_its_tag_is_dropped(is_early: bool) -> None:
    mail, owner = a_mailbox(), Told()
    if is_early:
        mail.keep(1, 0x101, memoryview(b"kept"), 1, owner)
        assert not owner.taken
    mail.discard(0x100, 8, 2)
    if not is_early:
        mail.keep(1, 0x101, memoryview(b"kept"), 3, owner)
    assert owner.taken == [None]
    assert mail.held_bytes(1) == 0
    assert mail.drops(0x1FF)
    assert not mail.drops(0x200)


def test_memory_of_the_transport_comes_back_once_nobody_writes_to_it() -> None:
    owner, into = Told(), bytearray(4)
    mail = a_mailbox(memory=lambda nbytes: (memoryview(bytearray(nbytes)), owner))
    mail.recv(1, 1, 4, memoryview(into), 1)
    fill(mail, 1, 1, b"into")
    assert not owner.taken, "it went straight to the receive's own memory"
    copied, dropped, failed = (mail.begin(1, tag, 4, 2) for tag in (2, 3, 4))
    mail.recv(1, 2, 4, memoryview(into), 3)
    mail.discard(3, 0, 3)
    mail.recv(1, 4, 4, None, 3)
    for index, arrival in enumerate((copied, dropped)):
        mail.advance(arrival, 3, 4)
        assert len(owner.taken) == index
        mail.advance(arrival, 1, 5)
        assert len(owner.taken) == index + 1
    mail.fail(failed, PeerLost("refused"), 6)
    assert owner.taken == [None] * 3


def test_what_was_kept_of_a_lost_peer_may_still_be_received() -> None:
    mail, owner = a_mailbox(), Told()
    mail.keep(1, 1, memoryview(b"kept"), 1, owner)
    mail.lose(1, PeerLost("gone"), 2)
    ticket = mail.recv(1, 1, 4, None, 3)
    assert ticket.view == b"kept"
    ticket.release()
    assert owner.taken == [ticket]


def test_a_ticket_ends_once() -> None:
    mail = a_mailbox()
    ticket = mail.send(1, 1, 4)
    mail.end(ticket, TicketStatus.DONE, 1)
    mail.end(ticket, TicketStatus.FAILED, 2, PeerLost("gone"))
    assert mail.take_ended() == [ticket]
    assert (ticket.status, ticket.error, ticket.ended_ns) == (TicketStatus.DONE, None, 1)
    assert mail.counters["messages_sent"] == 1


def test_a_message_beyond_the_largest_is_refused() -> None:
    mail = a_mailbox(largest_message_bytes=10)
    with pytest.raises(UsageError, match="11 bytes"):
        mail.send(1, 1, 11, 1)
