"""Calls and groups that end early: what ends them, who is told, and what of theirs is dropped.

What an error ends: a refused call itself; a mismatch or a missed deadline its group; a lost rank every group that it is
in. All members are told, by those that know, without rank 0 (`detcoll.runtime.control`)::

    found out here: refuse, broken, fail_group, suspect, look_after    heard: message, told, rank_lost
        TELL, ANNOUNCE   members that this rank has to do with hear the cause, except the one that told it
        DISCARD          what still arrives for the call or the group is dropped
        FINISH           callers hear of it

A rank passes each cause on once, and the first one counts. An endpoint that has lost a peer is not believed at once:
the peer may have ended for a reason that another rank, or the rendezvous, tells within `EXPLANATION_NS`.
"""

from __future__ import annotations

from typing import Any

from detcoll.errors import Closed, DeadlineMissed, PeerLost
from detcoll.machine import Slots
from detcoll.runtime import blame, mixed
from detcoll.runtime.actions import Act
from detcoll.runtime.control import JOB_ID, WHOLE_GROUP, Answer, Ask, Cause, Message, Planned
from detcoll.runtime.credit import Credit
from detcoll.runtime.group import NUMBER_BITS, PLAN_BITS, SEQUENCES, Group
from detcoll.runtime.membership import Membership
from detcoll.runtime.operation import Operation
from detcoll.runtime.recorder import Recorder
from detcoll.runtime.transfer import Posting, Transfer

LARGEST_REFUSALS = 1024

EXPLANATION_NS = 1_000_000_000
"""How long a rank that lost the connection to a peer waits to hear why."""


class Failures:
    """What goes wrong in the groups of one rank; a part of its engine, whose groups and list of actions it shares.

    ``lost`` : by rank that is lost, the error to raise.  ``suspects`` : by rank that an endpoint has lost, what the
    endpoint said, and until when somebody may explain it.  ``heard_ns`` : by rank, when the last message came from it.

    Parameters
    ----------
    rank : int
        This rank of the job.
    groups : dict of int to Membership
        The groups that are open, by id.
    actions : list of tuple
        Where actions are added.
    slots : Slots
        The sends that wait for the line.
    credit : Credit
        The bytes that calls have buffered.
    recorder : Recorder
        Where events are kept.
    """

    def __init__(
        self, rank: int, groups: dict[int, Membership], actions: list[tuple[Any, ...]],
        slots: Slots[tuple[Operation | Transfer | Posting, int]], credit: Credit, recorder: Recorder,
        blocker: blame.Blocker,
    ) -> None:  # fmt: skip
        self._rank, self._groups, self._actions = rank, groups, actions
        self._slots, self._credit, self._recorder, self._blocker = slots, credit, recorder, blocker
        self.lost: dict[int, PeerLost] = {}
        self.suspects: dict[int, tuple[str, int]] = {}
        self.heard_ns: dict[int, int] = {}

    # What this rank finds out.

    def refuse(self, group: Group, sequence: int, error: Exception, now_ns: int) -> None:
        """Tell all members that this rank cannot do call ``sequence``, which ends for all of them.

        A call that was submitted, and whose caller was interrupted just then, goes on.
        """
        membership = self._groups.get(group.id)
        if membership is None or membership.has_made(sequence):
            return
        membership.made(sequence)
        self._recorder.note(now_ns, "refuse", group.number, sequence)
        if membership.is_bound:
            self.end_group(membership, error, now_ns)
            membership.told = True  # the caller is about to raise it
            return
        if membership.refused.pop(sequence, None) is None and membership.failure is None:
            self._discard_call(membership, sequence)
            self._spread(membership, Cause.of(group.id, sequence, error, self._rank), self._rank)

    def broken(self, operation: Operation, error: Exception, now_ns: int) -> None:
        """End a call that cannot begin here, such as one whose array cannot be read, on all members."""
        membership = self._groups.get(operation.group.id)
        if membership is None or operation.over or operation.reported:
            return
        if membership.is_bound:
            self.end_group(membership, error, now_ns)
            return
        self._spread(membership, Cause.of(membership.group.id, operation.sequence, error, self._rank), self._rank)
        self.end_call(membership, operation, error, now_ns)

    def fail_group(self, group: Group, error: Exception, now_ns: int) -> None:
        """End a group with an error that this rank found out."""
        membership = self._groups.get(group.id)
        if membership is not None:
            self.end_group(membership, error, now_ns)

    def heard(self, group: Group, error: Exception, now_ns: int) -> None:
        """End a group with an error that its members hear of without this engine."""
        membership = self._groups.get(group.id)
        if membership is not None:
            self.end_group(membership, error, now_ns, is_known=True)

    def suspect(self, peer: int, error: PeerLost, now_ns: int) -> None:
        """Note that an endpoint lost a peer. It counts as lost after `EXPLANATION_NS` without a cause."""
        if peer not in self.lost:
            self.suspects.setdefault(peer, (str(error), now_ns + EXPLANATION_NS))

    def look_after(self, now_ns: int) -> None:
        """Look into calls that make no progress, and declare suspected peers lost whose time for a cause has passed."""
        for peer, (text, until_ns) in list(self.suspects.items()):
            if now_ns >= until_ns:
                self.rank_lost(peer, text, now_ns)
        for membership in list(self._groups.values()):
            mail = membership.mail
            transfer = mail.late(now_ns) if now_ns >= mail.look_ns else None
            if transfer is not None:
                self.end_group(membership, self._overdue(transfer), now_ns)
            first = membership.first
            while first is not None and now_ns >= first.limit_ns:
                peers, missed = blame.look_into(self._rank, first, self.heard_ns, now_ns)
                for peer in peers:
                    self._recorder.note(now_ns, "ask", first.group.number, first.sequence, peer=peer)
                    self._actions.append((Act.TELL, peer, Ask(first.group.id, first.sequence, first.timeout_ns)))
                if missed is not None:
                    self.end_group(membership, missed, now_ns)
                first = membership.first
            if membership.natives is not None:
                self._look_beside(membership, now_ns)

    def _look_beside(self, membership: Membership, now_ns: int) -> None:
        """Look into a group some of whose calls are native."""
        for peer, planned in mixed.to_tell(membership, now_ns):
            self._actions.append((Act.TELL, peer, planned))
        doubt = mixed.confirmed(membership, now_ns) if membership.doubts else None
        if doubt is not None:
            if doubt.cause is not None and doubt.cause.rank != self._rank:
                # The refusal itself ended one call only; this rank knows that it ends the group. It uses the
                # rendezvous too, because a transport that is stopped may lose the messages sent just before.
                self._actions.append((Act.ANNOUNCE, doubt.cause))
            self.end_group(membership, doubt.error, now_ns, doubt.cause)

    def _overdue(self, transfer: Transfer) -> DeadlineMissed:
        return DeadlineMissed(
            f"rank {self._rank}: {transfer.title} was not finished after {transfer.timeout_ns / 1e9:g} s "
            f"without progress (the timeout of the call); {transfer.awaits}"
        )

    # What others tell.

    def message(self, peer: int, message: Message, now_ns: int) -> None:
        """Take in a control message of ``peer``."""
        self.heard_ns[peer] = now_ns
        match message:
            case Cause():
                self.told(message, now_ns, peer)
            case Ask():
                self._asked(peer, message, now_ns)
            case Planned():
                self._planned(peer, message, now_ns)
            case Answer():
                membership = self._groups.get(message.group)
                if membership is not None and membership.first is not None:
                    self._recorder.note(now_ns, "answer", membership.group.number, message.sequence, peer=peer)
                    blame.answered(membership.first, peer, message, now_ns)

    def _asked(self, peer: int, ask: Ask, now_ns: int) -> None:
        membership = self._groups.get(ask.group)
        if membership is not None and membership.cause is not None:
            self._actions.append((Act.TELL, peer, membership.cause))
            return
        told = blame.answer(membership, self._blocker, ask, now_ns)
        self._actions.append((Act.TELL, peer, told))

    def _planned(self, peer: int, planned: Planned, now_ns: int) -> None:
        membership = self._groups.get(planned.group)
        if membership is None:
            return
        if membership.cause is not None:
            self._actions.append((Act.TELL, peer, membership.cause))
            return
        mixed.told(membership, self._rank, peer, planned, now_ns)

    def told(self, cause: Cause, now_ns: int, by: int = -1) -> None:
        """Take in why something ended, from a peer (``by``) or from the rendezvous."""
        if cause.group == JOB_ID:
            for membership in list(self._groups.values()):
                self.end_group(membership, cause.error(), now_ns, cause)
            return
        member_of = self._groups.get(cause.group)
        if member_of is not None and member_of.failure is None:
            if cause.sequence == WHOLE_GROUP:
                self.end_group(member_of, cause.error(), now_ns, cause, by)
            elif cause.sequence not in member_of.refused:
                self._refused(member_of, cause, by, now_ns)
        if cause.lost not in (-1, self._rank):
            self.rank_lost(cause.lost, cause.text, now_ns)

    def _refused(self, membership: Membership, cause: Cause, by: int, now_ns: int) -> None:
        """End a call that another rank refused, now or when it is made here."""
        operation = next((op for op in membership.active if op.sequence == cause.sequence), None)
        waits = any(op.sequence == cause.sequence for op in membership.waiting)
        if operation is None and not waits and membership.has_made(cause.sequence):
            return  # it has ended here, well or by the same cause
        self._spread(membership, cause, by)
        if operation is not None:
            if not operation.reported:
                self._recorder.note(now_ns, "refused", membership.group.number, cause.sequence, peer=cause.rank)
                self.end_call(membership, operation, cause.error(), now_ns)
            return
        if len(membership.refused) >= LARGEST_REFUSALS:
            membership.refused.pop(next(iter(membership.refused)))
        membership.refused[cause.sequence] = cause  # before the look at native calls, which look here when they begin
        mixed.refused(membership, cause, now_ns)

    def rank_lost(self, rank: int, text: str, now_ns: int, *, is_known: bool = False) -> None:
        """End every group that a lost rank is in.

        ``is_known`` : the rendezvous says so. Each rank hears that for itself, so it is not passed on: a rank that was
        cut off itself would only tell those that it still reaches that the others are gone.
        """
        self.suspects.pop(rank, None)
        if rank in self.lost:
            return
        self._recorder.note(now_ns, "lost", peer=rank, detail=text)
        self.lost[rank] = PeerLost(text)
        for membership in list(self._groups.values()):
            if rank in membership.group.members:
                cause = Cause.of(membership.group.id, WHOLE_GROUP, self.lost[rank], self._rank, lost=rank)
                self.end_group(membership, PeerLost(text), now_ns, cause, is_known=is_known)

    # Ends.

    def end_group(
        self, membership: Membership, error: Exception, now_ns: int, cause: Cause | None = None, by: int = -1,
        *, is_known: bool = False,
    ) -> None:  # fmt: skip
        """End all calls of a group with ``error``, and tell its members: the cause as it was told, or this one.

        ``is_known`` : the members hear it from the rendezvous, so they are not told again.
        """
        if membership.failure is not None:
            return
        membership.failure = error
        membership.cause = cause = cause or Cause.of(membership.group.id, WHOLE_GROUP, error, self._rank)
        self._recorder.note(now_ns, "fail", membership.group.number, detail=str(error))
        if not is_known:
            self._spread(membership, cause, by)  # before callers wake up here, who may end the job
        self._actions.append((Act.RECORD, str(error)))
        if membership.natives is not None:
            self._actions.append((Act.STOP, membership.group, error))
        calls = self._forget(membership)
        membership.told = any(not operation.reported for operation in calls)
        # First, so that nothing is written into arrays any more once their owners hear of the end.
        self._actions.append((Act.DISCARD, membership.group.prefix, 64 - NUMBER_BITS))
        for operation in calls:
            self.drop(operation, error)

    def end_call(self, membership: Membership, operation: Operation, error: Exception, now_ns: int) -> None:
        """End one call of a group; the others go on."""
        if operation in membership.active:
            membership.active.remove(operation)
        self._discard_call(membership, operation.sequence)  # first, as in `end_group`
        self.drop(operation, error)
        blame.promote(membership, now_ns)

    def leave(self, membership: Membership) -> None:
        """End the calls of a group that is left, and drop what still arrives for it."""
        for operation in self._forget(membership):
            self.drop(operation, Closed(f"{operation.title}: the group was closed"))
        self._actions.append((Act.DISCARD, membership.group.prefix, 64 - NUMBER_BITS))

    def _forget(self, membership: Membership) -> list[Operation | Transfer]:
        """Take all calls out of a group and return them."""
        for peer, pair in membership.mail.pairs.items():
            self._credit.return_unasked(peer, pair.unasked_bytes)
        calls: list[Operation | Transfer] = [*membership.active, *membership.waiting, *membership.mail.clear()]
        membership.clear()
        self._slots.withdraw(lambda item: isinstance(item[0], Posting) and item[0].over)
        return calls

    def drop(self, operation: Operation | Transfer, error: Exception) -> None:
        """Give up what a call holds, and let its caller hear of the error."""
        operation.over = True
        if isinstance(operation, Operation):
            self._credit.drop(operation)
        self._slots.withdraw(lambda item: item[0] is operation)
        if not operation.reported:
            operation.reported = True
            self._actions.append((Act.FINISH, operation, error))

    def _discard_call(self, membership: Membership, sequence: int) -> None:
        """Make endpoints drop messages that still arrive for a call that has ended early."""
        self.lift_old(membership, sequence)
        membership.dropped.append(sequence)
        self._actions.append((Act.DISCARD, membership.group.call_prefix(sequence), PLAN_BITS))

    def lift_old(self, membership: Membership, sequence: int) -> None:
        """Stop dropping messages with the tags of old calls, since the tags will be used again.

        Sequences are counted modulo `SEQUENCES`. Half of that after a call, all its messages have arrived, and no peer
        has reached the next call with the same tags.
        """
        while membership.dropped and membership.dropped[0] <= sequence - SEQUENCES // 2:
            prefix = membership.group.call_prefix(membership.dropped.popleft())
            ranks = [*sorted(membership.contacts), *membership.group.ranks]
            self._actions.append((Act.LIFT, prefix, ranks))

    def _spread(self, membership: Membership, cause: Cause, by: int) -> None:
        """Pass a cause on to all that this rank has to do with in the group; who finds it out tells the rendezvous."""
        for peer in sorted(membership.contacts - {by, *self.lost}):
            self._actions.append((Act.TELL, peer, cause))
        if cause.rank == self._rank:
            self._actions.append((Act.ANNOUNCE, cause))
