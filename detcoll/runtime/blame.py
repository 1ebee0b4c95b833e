"""Calls that are late: whether to go on waiting, and whom to name where not.

Only the earliest unfinished call of a group can be late: those behind it may have to wait for it, and their time runs
from when it ends. Once it has made no progress for its timeout, its rank looks into it::

    late -> ask all that it waits for -> all answered, or ANSWER_NS in which one neither did nor sent anything
               one is absent, away or silent         -> name it; the group ends, all members are told
               one has made progress in this time    -> go on, for a timeout from that progress on
               all wait themselves                   -> wait HEARSAY_NS to be told; ask again; then name them

A rank that is asked about a call in which it waits as well, without progress for as long, looks into it at once. So the
question reaches the rank that waits for the culprit itself, which finds out in `ANSWER_NS` and tells, while those that
only wait for others keep silent until then. Progress counts from before the question was sent, so that two ranks that
wait for each other never keep each other going.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from detcoll.errors import DeadlineMissed
from detcoll.runtime.control import Answer, Ask, State
from detcoll.runtime.membership import Membership
from detcoll.runtime.operation import Operation

ANSWER_NS = 2_000_000_000
"""How long nothing may come from a rank that was asked, until it counts as silent. Its answer may take longer on a slow
line, where it waits behind what was sent before; then that is heard meanwhile."""

HEARSAY_NS = 1_000_000_000
"""How long it waits for one that knows better, beyond the time which that one waits for answers."""


@dataclass(slots=True)
class Inquiry:
    """What a rank that looks into a late call has heard so far: an answer or None of each that was asked.

    ``hears`` : all wait themselves, and one of them may tell.  ``is_last`` : they were asked for the second time.
    """

    asked_ns: int
    answers: dict[int, Answer | None]
    is_last: bool = False
    hears: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether all have answered."""
        return None not in self.answers.values()


def progressed(operation: Operation, at_ns: int) -> None:
    """Take note that a call has begun or got further."""
    operation.live_ns, operation.inquiry = at_ns, None
    operation.limit_ns = at_ns + operation.timeout_ns


def look_into(
    rank: int, operation: Operation, heard_ns: Mapping[int, int], now_ns: int
) -> tuple[list[int], DeadlineMissed | None]:
    """Decide about a call whose limit has passed: whom to ask, or the error that ends its group, or neither.

    ``heard_ns`` : when anything came from each rank last.
    """
    inquiry = operation.inquiry
    if inquiry is None or inquiry.hears:
        peers = list(awaited(operation))
        operation.inquiry = Inquiry(now_ns, dict.fromkeys(peers), is_last=inquiry is not None)
        operation.limit_ns = now_ns + (ANSWER_NS if peers else 0)
        return peers, None
    silent_ns = {
        peer: max(inquiry.asked_ns, heard_ns.get(peer, 0)) + ANSWER_NS
        for peer, answer in inquiry.answers.items() if answer is None
    }  # fmt: skip
    to_blame = [
        peer for peer, answer in inquiry.answers.items()
        if (answer.state in (State.ABSENT, State.AWAY) if answer is not None else silent_ns[peer] <= now_ns)
    ]  # fmt: skip
    if to_blame:
        return [], DeadlineMissed(_late(rank, operation, to_blame))
    if silent_ns:
        operation.limit_ns = min(silent_ns.values())
        return [], None
    waiting = [answer for answer in inquiry.answers.values() if answer is not None and answer.state is State.WAITING]
    live_ns = max((inquiry.asked_ns - answer.idle_ns for answer in waiting), default=operation.live_ns)
    if live_ns + operation.timeout_ns > now_ns:
        progressed(operation, live_ns)
    elif inquiry.is_last:
        return [], DeadlineMissed(_late(rank, operation, []))
    else:
        inquiry.hears = True
        operation.limit_ns = max(inquiry.asked_ns + ANSWER_NS, now_ns) + HEARSAY_NS
    return [], None


def answer(membership: Membership | None, others: Iterable[Membership], ask: Ask, now_ns: int) -> Answer:
    """Say where this rank stands in a call; one that is as late here is looked into at once.

    ``others`` : all groups of this rank, for a call that waits for one of another group.
    """
    if membership is None:
        return Answer(ask.group, ask.sequence, State.AWAY)
    latest = membership.latest
    calls = [op for op in membership.active if not op.reported and op.sequence <= ask.sequence]
    if calls:
        idle_ns = now_ns - max(operation.live_ns for operation in calls)
        first = calls[0]
        if idle_ns >= ask.timeout_ns and first.inquiry is None:
            first.timeout_ns = min(first.timeout_ns, ask.timeout_ns)
            first.limit_ns = now_ns
        return Answer(ask.group, ask.sequence, State.WAITING, max(idle_ns, 0), latest)
    if any(operation.sequence <= ask.sequence for operation in membership.waiting):
        lives = [operation.live_ns for other in others for operation in other.active]
        return Answer(ask.group, ask.sequence, State.WAITING, now_ns - max(lives, default=now_ns), latest)
    return Answer(ask.group, ask.sequence, State.ENDED if ask.sequence <= latest else State.ABSENT, 0, latest)


def answered(operation: Operation, peer: int, told: Answer, now_ns: int) -> None:
    """Take in an answer."""
    inquiry = operation.inquiry
    if inquiry is None or inquiry.hears or told.sequence != operation.sequence or peer not in inquiry.answers:
        return
    inquiry.answers[peer] = told
    if inquiry.is_answered:
        operation.limit_ns = now_ns


def awaited(operation: Operation) -> dict[int, int]:
    """Return how many messages a call waits for by rank, with those that have not said what they called first."""
    ranks = operation.group.ranks
    counts = {ranks[peer]: count for peer, count in sorted(operation.machine.waiting_for().items())}
    return {peer: counts.get(peer, 0) for peer in sorted(operation.strangers)} | counts


def _late(rank: int, operation: Operation, to_blame: list[int]) -> str:
    peers = ", ".join(f"rank {peer} ({_awaited(count)})" for peer, count in awaited(operation).items())
    if to_blame:
        peers = ", ".join(f"rank {peer}, {_reproach(operation, peer)}" for peer in to_blame)
    return (
        f"rank {rank}: {operation.title} was not finished after {operation.timeout_ns / 1e9:g} s "
        f"without progress; it waits for {peers or 'nobody'}"
    )


def _awaited(count: int) -> str:
    if not count:
        return "not heard to call it"
    return f"{count} message{'s' if count > 1 else ''}"


def _reproach(operation: Operation, peer: int) -> str:
    told = operation.inquiry.answers[peer] if operation.inquiry is not None else None
    if told is None:
        called = "has not been heard to call it and" if peer in operation.strangers else "has called it and now"
        return f"which {called} does not answer"
    if told.state is State.AWAY:
        return "which is not in the group: it has closed it, or not opened it yet"
    if told.latest < 0:
        return "which has not called it; it has called nothing of this group"
    return f"which has not called it; the latest call that it made of this group is number {told.latest}"
