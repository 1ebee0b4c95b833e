"""The rules of send and recv: events and the time in, actions out; a part of the engine.

::

    send   submit -> ANNOUNCE -> (GRANT) -> chunks, each acknowledged -> FINISH
    recv   submit -> finds its message among those announced, or waits for it -> (GRANT) -> chunks -> FINISH

- Matching: a receive takes the first announced message of its source (or of any) and its tag; messages of one source
  keep their order. It does not wait for memory, so calls match in the order in which they were made.
- A message of at most `EAGER_BYTES` is copied and sent right behind its announcement, and its caller goes on. One of
  at most `INLINE_BYTES` travels inside the announcement. The number of those that have found no receive is bounded by
  `LARGEST_EAGER`, and their bytes by `detcoll.runtime.credit`; beyond that, messages are only announced.
  Announcements are bounded by these, and by the calls that have not ended (`loop.LARGEST_QUEUE`).
- A caller that wants to hear of a misfit (`Transfer.awaits_receive`) goes on when such a message has found its receive,
  of which a GRANT tells; the message is there by then. Longer messages wait for that in any case.
- Data moves once a receive has granted it and no earlier call works on the memory of either end. A sender has at most
  `Transfer.ahead_bytes` under way, which leave in windows like those of collectives.
- The values of a send on a device are copied to the host first (COPY, `Messages.copied`), those of a receive to it
  last; only then has the call ended. So they are never eager. But a send of up to `EAGER_BYTES` lets its caller go on
  once it is copied, within the same bounds.
- A message to this rank itself goes from memory to memory.
- Messages that do not fit their receive end the group on all ranks. So does a call without progress for its timeout:
  a grant, or a chunk that was received or acknowledged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any

from detcoll.errors import FrameError, PeerLost, PlanMismatch
from detcoll.machine import Queued, Slots
from detcoll.plan.headroom import Express
from detcoll.plan.layout import uses_window
from detcoll.runtime.actions import Act
from detcoll.runtime.credit import LARGEST_UNTOLD_BYTES, Credit
from detcoll.runtime.failures import Failures
from detcoll.runtime.membership import Membership
from detcoll.runtime.operation import Operation
from detcoll.runtime.recorder import Recorder
from detcoll.runtime.transfer import (
    ANY,
    INLINE_BYTES,
    LARGEST_KEYS,
    NOTE_BYTES,
    Arrived,
    Note,
    NoteKind,
    Pair,
    Posting,
    Transfer,
)
from detcoll.transport import Window

EAGER_BYTES = 4_096
"""The payload of messages up to this size travels with the announcement."""

LARGEST_EAGER = 1_024
"""Messages sent unasked to one rank of a group that have found no receive there; further ones are only announced."""

_TELL_COUNT, _TELL_BYTES = 32, LARGEST_UNTOLD_BYTES
"""So many eager messages, or so many of their bytes, are taken before their sender is told."""

CHUNKS_QUEUED = 2
"""Chunks of one message that wait for the line at once, so that those of other calls soon have their turn."""

RECEIVES_AHEAD = 64
"""Chunks of one message for which receives are posted at once."""


class Verb(IntEnum):
    """What a driver is to do about messages: the second entry of an `Act.MAIL`; further fields are given here."""

    LISTEN = 0
    """group, peer: post a receive for a note."""
    NOTE = 1
    """posting, queued or None, window or None: send a note."""
    OPEN = 2
    """transfer: load the caller's values."""
    KEEP = 3
    """transfer: copy the payload, which the caller may change from then on."""
    SEND = 4
    """transfer, chunk, queued or None, window or None: send, what of ``queued`` is left."""
    RECV = 5
    """transfer, chunk: post the receive."""
    MOVE = 6
    """send, recv: copy a message of this rank to itself."""
    PUT = 7
    """transfer, payload: copy it into the memory of a receive."""
    COPY = 8
    """transfer: copy the values of a send from its device, or of a receive to it; then call `Messages.copied`."""


class Messages:
    """Sends and receives of one rank in all its groups; shares state with the engine that it is a part of.

    Parameters
    ----------
    rank : int
        This rank of the job.
    site_of : sequence of int
        The site of every rank.
    wide : frozenset of int
        Ranks behind the line.
    groups : dict of int to Membership
        The groups that are open, by id.
    failures : Failures
        Ends groups; it has the list of actions.
    slots, express, credit, recorder
        As of the engine.
    listen : callable
        Lets the engine listen to ranks for control messages.
    predecessor : callable
        Returns an earlier call that works on the same memory and has not ended, or None.
    """

    def __init__(
        self, rank: int, site_of: Sequence[int], wide: frozenset[int], groups: dict[int, Membership],
        actions: list[tuple[Any, ...]], failures: Failures, slots: Slots[tuple[Any, int]], express: Express | None,
        credit: Credit, recorder: Recorder, listen: Callable[[Iterable[int]], None],
        predecessor: Callable[[Transfer], Operation | Transfer | None],
    ) -> None:  # fmt: skip
        self._rank, self._site_of, self._wide, self._groups, self._actions = rank, site_of, wide, groups, actions
        self._failures, self._slots, self._express, self._credit = failures, slots, express, credit
        self._recorder, self._listen, self._predecessor = recorder, listen, predecessor
        self.blocked: list[tuple[Transfer, Operation | Transfer]] = []

    # Calls.

    def submit(self, membership: Membership, transfer: Transfer, now_ns: int) -> None:
        """Take in a call; its place in the order of calls is known already."""
        self._recorder.note(now_ns, "message", transfer.group.number, peer=transfer.peer, detail=transfer.what)
        membership.mail.add(transfer)
        self._reach(membership, transfer)
        earlier = self._predecessor(transfer) if transfer.spans else None
        if earlier is not None:
            self.blocked.append((transfer, earlier))
        else:
            self._begin(membership, transfer, now_ns)
        if transfer.is_send:
            self._announce(membership, transfer, now_ns)
            return
        letter = membership.mail.take_arrived(transfer)
        if letter is None:
            membership.mail.posted.setdefault(transfer.tag, deque()).append(transfer)
        else:
            self._match(membership, transfer, letter, now_ns)

    def start_ready(self, now_ns: int) -> None:
        """Begin the calls that waited for memory which no earlier call works on any more."""
        left = []
        for transfer, earlier in self.blocked:
            if transfer.over:
                continue
            # Each turn comes here, so calls are looked through only when the one that was waited for has ended.
            another = self._predecessor(transfer) if earlier.reported else earlier
            if another is not None:
                left.append((transfer, another))
                continue
            membership = self._groups[transfer.group.id]
            self._begin(membership, transfer, now_ns)
            self._advance(membership, transfer, now_ns)
        self.blocked = left

    @property
    def can_start(self) -> bool:
        """Whether `start_ready` might begin something."""
        return any(transfer.over or earlier.reported for transfer, earlier in self.blocked)

    def _begin(self, membership: Membership, transfer: Transfer, now_ns: int) -> None:
        transfer.is_free = True
        transfer.is_copying = transfer.is_send and transfer.is_on_device
        self._do(Verb.COPY if transfer.is_copying else Verb.OPEN, transfer)
        membership.mail.progressed(transfer, now_ns)

    def _reach(self, membership: Membership, transfer: Transfer) -> None:
        """Listen to those whom a call has to do with."""
        peers = membership.group.ranks if transfer.peer == ANY else (transfer.peer,)
        new = [peer for peer in peers if peer not in membership.mail.pairs]
        for peer in new:
            membership.mail.pairs[peer] = Pair()
            if peer != self._rank:
                self._do(Verb.LISTEN, membership.group, peer)
        self._listen(peer for peer in new if peer != self._rank)
        membership.contacts |= {transfer.peer} - {ANY, self._rank}

    # Announcing and matching.

    def _announce(self, membership: Membership, send: Transfer, now_ns: int) -> None:
        peer = send.peer
        pair = membership.mail.pairs[peer]
        send.number = pair.sent
        pair.sent += 1
        is_own = peer == self._rank
        send.is_eager = send.is_free and not send.is_on_device and self._goes_unasked(pair, send)
        is_inline = send.is_eager and 0 < send.nbytes <= INLINE_BYTES and not (send.name or is_own)
        if _has_key(send.nbytes, is_inline) and not is_own:
            send.key = pair.take_key()
        note = Note(
            NoteKind.ANNOUNCE, send.number, send.tag, send.dtype, send.count, send.nbytes, send.chunk_bytes,
            send.is_eager, send.name, is_inline, key=max(send.key, 0), asks=send.is_eager and send.awaits_receive,
        )  # fmt: skip
        if send.is_eager:
            self._do(Verb.KEEP, send)
            if not note.asks or is_own:
                self._finish(send, now_ns)
        if is_own:
            if send.is_eager:
                self._end(membership, send, now_ns)
            self._arrive(membership, Arrived(peer, note, send), now_ns)
            return
        self._tell(membership, peer, note, now_ns, send if note.is_inline else None)
        if note.asks or not send.is_eager:
            pair.awaiting[send.number] = send
        if note.is_inline:
            send.done_bytes = send.nbytes
            self._conclude(membership, send, now_ns)
        elif send.is_eager:
            self._flow(membership, send, now_ns)

    def _goes_unasked(self, pair: Pair, send: Transfer) -> bool:
        """Tell whether the caller of a send may go on before it has found its receive; then count it as such."""
        if send.nbytes > EAGER_BYTES or pair.unasked >= LARGEST_EAGER:
            return False
        if not self._credit.take_unasked(send.peer, send.nbytes):
            return False
        pair.unasked += 1
        pair.unasked_bytes += send.nbytes
        return True

    def noted(self, group_id: int, peer: int, record: bytes, now_ns: int) -> None:
        """Take in what a peer tells about messages of a group."""
        membership = self._groups.get(group_id)
        if membership is None or membership.failure is not None:
            return
        self._failures.heard_ns[peer] = now_ns
        try:
            note = Note.unpack(record)
        except FrameError as error:
            self._failures.end_group(membership, error, now_ns)
            return
        membership.contacts.add(peer)
        pair = membership.mail.pairs[peer]
        if note.kind is NoteKind.ANNOUNCE:
            # One that missed its window may have been overtaken by another that was given to the next one already.
            pair.ahead[note.number] = note
            while membership.failure is None and pair.heard in pair.ahead:
                pair.heard += 1
                self._arrive(membership, Arrived(peer, pair.ahead.pop(pair.heard - 1)), now_ns)
        elif note.kind is NoteKind.TAKEN:
            self._returned(pair, peer, note.count, note.nbytes)
            pair.keys.difference_update(note.keys)
        else:
            send = pair.awaiting.pop(note.number, None)
            if send is not None:
                self._found(membership, send)
                membership.mail.progressed(send, now_ns)
                if not send.is_eager:
                    self._advance(membership, send, now_ns)
                elif send.done_bytes == send.nbytes:
                    self._conclude(membership, send, now_ns)

    def _arrive(self, membership: Membership, letter: Arrived, now_ns: int) -> None:
        recv = membership.mail.take_posted(letter.source, letter.note.tag)
        if recv is None:
            membership.mail.arrived.setdefault(letter.note.tag, deque()).append(letter)
        else:
            self._match(membership, recv, letter, now_ns)

    def _match(self, membership: Membership, recv: Transfer, letter: Arrived, now_ns: int) -> None:
        note, source = letter.note, letter.source
        recv.is_matched, recv.source, recv.number, recv.key = True, source, note.number, note.key
        recv.is_eager, recv.chunk_bytes, recv.mate = note.is_eager, max(note.chunk_bytes, 1), letter.sender
        recv.payload = note.payload if note.is_inline else None
        self._recorder.note(now_ns, "match", recv.group.number, peer=source)
        if (note.dtype, note.count, note.name) != (recv.dtype, recv.count, recv.name):
            self._failures.end_group(membership, self._misfit(recv, letter), now_ns)
            return
        if note.asks and letter.sender is None:
            self._tell(membership, source, Note(NoteKind.GRANT, note.number), now_ns)
        if letter.sender is not None:
            letter.sender.mate = recv
            self._found(membership, letter.sender)
        if recv.is_free:
            membership.mail.progressed(recv, now_ns)
            self._advance(membership, recv, now_ns)

    def _found(self, membership: Membership, send: Transfer) -> None:
        """Take note that a send has found its receive; of an eager one to another rank, that says when."""
        send.is_matched = True
        if send.is_kept or send.is_eager:
            self._returned(membership.mail.pairs[send.peer], send.peer, 1, send.nbytes)

    def _misfit(self, recv: Transfer, letter: Arrived) -> PlanMismatch:
        note = letter.note
        named = f" ({note.name})" if note.name else ""
        title = f" in group {recv.group.title}" if recv.group.title else ""
        return PlanMismatch(
            f"a message does not fit its receive{title}: rank {letter.source} called send to rank {self._rank} of "
            f"{note.count} {note.dtype}, tag {note.tag}{named}; rank {self._rank} called {recv.what}"
        )

    def _took(self, membership: Membership, recv: Transfer, now_ns: int) -> None:
        """Take note that an eager message goes to its receive; tell its sender now and then."""
        source, pair = recv.source, membership.mail.pairs[recv.source]
        pair.owed += 1
        pair.owed_bytes += recv.nbytes
        if _has_key(recv.nbytes, recv.payload is not None):
            pair.owed_keys.append(recv.key)
        if pair.owed >= _TELL_COUNT or pair.owed_bytes >= _TELL_BYTES or len(pair.owed_keys) == LARGEST_KEYS:
            taken = Note(NoteKind.TAKEN, count=pair.owed, nbytes=pair.owed_bytes, keys=tuple(pair.owed_keys))
            self._tell(membership, source, taken, now_ns)
            pair.owed = pair.owed_bytes = 0
            pair.owed_keys.clear()

    def _returned(self, pair: Pair, peer: int, count: int, nbytes: int) -> None:
        pair.unasked -= count
        pair.unasked_bytes -= nbytes
        self._credit.return_unasked(peer, nbytes)

    # Data.

    def _advance(self, membership: Membership, transfer: Transfer, now_ns: int) -> None:
        """Let data move if the message has found its receive and the memory may be used."""
        if transfer.over or not transfer.is_matched or not transfer.is_ready:
            return
        if transfer.reported and not transfer.is_kept:
            return
        if transfer.mate is not None:
            self._move(membership, transfer, transfer.mate, now_ns)
        elif transfer.is_send:
            self._flow(membership, transfer, now_ns)
        else:
            if transfer.is_eager:
                self._took(membership, transfer, now_ns)
            else:
                self._tell(membership, transfer.source, Note(NoteKind.GRANT, transfer.number), now_ns)
            if transfer.payload is not None:
                self._do(Verb.PUT, transfer, transfer.payload)
                self._end(membership, transfer, now_ns)
            else:
                self._post(membership, transfer, now_ns)

    def _move(self, membership: Membership, one: Transfer, other: Transfer, now_ns: int) -> None:
        send, recv = (one, other) if one.is_send else (other, one)
        if send.is_ready and recv.is_ready:
            self._do(Verb.MOVE, send, recv)
            self._end(membership, send, now_ns)
            self._end(membership, recv, now_ns)

    def _flow(self, membership: Membership, send: Transfer, now_ns: int) -> None:
        """Send chunks until enough of them are under way, or wait for the line."""
        while (
            (chunk := self._next(send)) is not None
            and send.under_way_bytes < send.ahead_bytes
            and send.queued < CHUNKS_QUEUED
        ):
            begin, end = send.span(chunk)
            send.next_chunk, send.under_way[chunk] = chunk + 1, end - begin
            send.under_way_bytes += end - begin
            if send.peer in self._wide and not self._leaves_at_once(send, now_ns):
                send.queued += 1
                self._slots.add(Queued((send, chunk), self._site_of[send.peer], send.peer, end - begin))
            else:
                self._do(Verb.SEND, send, chunk, None, None)
        if not send.nbytes:
            self._conclude(membership, send, now_ns)

    def give(self, queued: Queued[Any], window: Window | None, now_ns: int) -> bool:
        """Send what the line was given to, a chunk or a note; return whether this has put others into the queue."""
        send, chunk = queued.item
        if isinstance(send, Posting):
            self._do(Verb.NOTE, send, queued, window)
            return False
        self._do(Verb.SEND, send, chunk, queued, window)
        send.queued -= 1
        before: int = send.next_chunk
        self._flow(self._groups[send.group.id], send, now_ns)
        more: int = send.next_chunk
        return more > before

    def missed(self, queued: Queued[Any]) -> None:
        """Take note that what the line was given to is in the queue again."""
        send = queued.item[0]
        if isinstance(send, Transfer):
            send.queued += 1

    def told(self, posting: Posting) -> None:
        """Take note that a note which waited for the line was acknowledged; none overtakes it any more."""
        if not posting.over:
            posting.mail.pairs[posting.peer].notes -= 1

    def _leaves_at_once(self, send: Transfer, now_ns: int) -> bool:
        if uses_window(self._slots.calendar, send.nbytes):
            return False
        return self._express is None or self._express.take(send.nbytes, now_ns)

    def _post(self, membership: Membership, recv: Transfer, now_ns: int) -> None:
        while (chunk := self._next(recv)) is not None and len(recv.under_way) < RECEIVES_AHEAD:
            begin, end = recv.span(chunk)
            recv.next_chunk, recv.under_way[chunk] = chunk + 1, end - begin
            recv.under_way_bytes += end - begin
            self._do(Verb.RECV, recv, chunk)
        if not recv.nbytes:
            self._end(membership, recv, now_ns)

    @staticmethod
    def _next(transfer: Transfer) -> int | None:
        return transfer.next_chunk if transfer.next_chunk * transfer.chunk_bytes < transfer.nbytes else None

    def moved(self, transfer: Transfer, chunk: int, now_ns: int) -> None:
        """Take note that a chunk was received, or that one that was sent was acknowledged."""
        if transfer.over:
            return
        membership = self._groups[transfer.group.id]
        self._failures.heard_ns[transfer.partner] = now_ns
        nbytes = transfer.under_way.pop(chunk)
        transfer.done_bytes, transfer.under_way_bytes = transfer.done_bytes + nbytes, transfer.under_way_bytes - nbytes
        membership.mail.progressed(transfer, now_ns)
        if transfer.done_bytes == transfer.nbytes:
            self._conclude(membership, transfer, now_ns)
        elif transfer.is_send:
            self._flow(membership, transfer, now_ns)
        else:
            self._post(membership, transfer, now_ns)

    def copied(self, transfer: Transfer, now_ns: int) -> None:
        """Take note that the values of a send are at the host, or those of a receive on its device."""
        if transfer.over:
            return
        membership, transfer.is_copying = self._groups[transfer.group.id], False
        if not transfer.is_send:
            self._close(membership, transfer, now_ns)
            return
        membership.mail.progressed(transfer, now_ns)
        if not transfer.is_matched and self._goes_unasked(membership.mail.pairs[transfer.peer], transfer):
            transfer.is_kept = True
            self._finish(transfer, now_ns)
        self._advance(membership, transfer, now_ns)

    def failed(self, transfer: Transfer, chunk: int, error: Exception, now_ns: int) -> None:
        """Take note that sending or receiving a chunk failed."""
        transfer.settled.add(chunk)
        if transfer.over:
            return
        if isinstance(error, PeerLost):
            self._failures.suspect(transfer.partner, error, now_ns)
        else:
            self._failures.end_group(self._groups[transfer.group.id], error, now_ns)

    # Ends.

    def _finish(self, transfer: Transfer, now_ns: int) -> None:
        """Let the caller of a transfer go on."""
        if not transfer.reported:
            transfer.reported = True
            self._recorder.note(now_ns, "end", transfer.group.number, peer=transfer.partner, detail=transfer.what)
            self._actions.append((Act.FINISH, transfer, None))

    def _conclude(self, membership: Membership, transfer: Transfer, now_ns: int) -> None:
        """End a transfer whose data has moved, unless its caller waits to hear of its receive."""
        if transfer.is_matched or not transfer.awaits_receive:
            self._end(membership, transfer, now_ns)

    def _end(self, membership: Membership, transfer: Transfer, now_ns: int) -> None:
        if transfer.is_on_device and not transfer.is_send:
            transfer.is_copying = True
            self._do(Verb.COPY, transfer)
        else:
            self._close(membership, transfer, now_ns)

    def _close(self, membership: Membership, transfer: Transfer, now_ns: int) -> None:
        membership.mail.remove(transfer)
        if transfer.is_send and not transfer.is_eager:  # of an eager one, the receiver says when
            membership.mail.pairs[transfer.peer].keys.discard(transfer.key)
        self._finish(transfer, now_ns)

    # Actions.

    def _tell(self, membership: Membership, peer: int, note: Note, now_ns: int, send: Transfer | None = None) -> None:
        """Send a note; on the line it keeps to the budget of small messages, or else waits for a window."""
        posting, pair = Posting(membership.mail, membership.group, peer, note, send), membership.mail.pairs[peer]
        express = self._express if peer in self._wide else None
        if express is not None and (pair.notes or not express.take(NOTE_BYTES, now_ns)):
            pair.notes += 1
            self._slots.add(Queued((posting, 0), self._site_of[peer], peer, NOTE_BYTES))
        else:
            self._do(Verb.NOTE, posting, None, None)

    def _do(self, verb: Verb, *fields: Any) -> None:
        self._actions.append((Act.MAIL, verb, *fields))


def _has_key(nbytes: int, is_inline: bool) -> bool:
    """Tell whether a message has chunks of its own, whose tags contain its key."""
    return nbytes > 0 and not is_inline
