"""Late calls: decide whether to go on waiting, and which rank to blame if not.

Only the earliest unfinished call of a group can be late: later ones may have to wait for it, and their timeout runs
from its end. When it has made no progress for its timeout, its rank starts an inquiry::

    late -> ask all ranks that it waits for -> all have answered, or one was silent for ANSWER_NS
               one is absent, away or silent         -> blame it; the group ends and all members are told
               one has made progress meanwhile       -> wait on, for a timeout from that progress
               all are waiting themselves            -> wait HEARSAY_NS to be told; ask again; then blame them
               one has queued the call behind one that makes no progress -> the same, without HEARSAY_NS

A rank that is asked about a call in which it also waits starts its inquiry as soon as it has made no progress for the
timeout of the rank that asks, and takes that timeout over. So the question reaches the rank that waits for the culprit
directly. That rank finds out within `ANSWER_NS` and tells the others, which wait until then because they only wait for
waiting ranks. Only progress from before the question was sent counts, so that two ranks that wait for
each other cannot keep each other waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from detcoll.errors import DeadlineMissed
from detcoll.runtime.control import Answer, Ask, State
from detcoll.runtime.membership import Membership
from detcoll.runtime.operation import Operation
from detcoll.runtime.transfer import Transfer

ANSWER_NS = 2_000_000_000
"""A rank that was asked counts as silent if nothing arrives from it for this long. On a slow line its answer may take
longer, queued behind earlier messages, but then those arrive meanwhile."""

Blocker = Callable[[Operation], tuple[Operation | Transfer, int] | None]
"""Returns the call under way for which a queued call waits in the end, and when that made progress last, or None."""

LONGEST_TITLE = 300
MOST_NAMED = 8
"""How much an answer says of another call, in characters and ranks: it has to fit a control message."""

HEARSAY_NS = 1_000_000_000
"""How long to wait for the verdict of another rank, beyond the time for which that rank waits for answers."""


@dataclass(slots=True)
class Inquiry:
    """State of an inquiry about a late call: for each rank that was asked, its answer or None.

    ``hears`` : all asked ranks are waiting themselves, and this rank waits for a verdict from one of them.
    ``is_last`` : this is the second time of asking.
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
    """Restart the timeout of a call that has begun or made progress."""
    operation.live_ns, operation.inquiry, operation.hurry_ns = at_ns, None, 0
    operation.limit_ns = at_ns + operation.timeout_ns


def promote(membership: Membership, now_ns: int) -> None:
    """Let the time of the earliest unfinished call run from now on: it may have waited for the one before."""
    first = membership.first
    if first is not None:
        progressed(first, now_ns)


def look_into(
    rank: int, operation: Operation, heard_ns: Mapping[int, int], now_ns: int
) -> tuple[list[int], DeadlineMissed | None]:
    """Decide about a call whose limit has passed: return the ranks to ask, or the error that ends its group.

    Both are empty if the call waits on. ``heard_ns`` : when the last message arrived from each rank.
    """
    inquiry = operation.inquiry
    if inquiry is None and 0 < operation.hurry_ns < operation.timeout_ns:
        operation.timeout_ns, operation.is_hurried = operation.hurry_ns, True
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
    told = {peer: answer for peer, answer in inquiry.answers.items() if answer is not None}
    waiting = [answer for answer in told.values() if answer.state in (State.WAITING, State.QUEUED)]
    queued = [peer for peer, answer in told.items() if answer.state is State.QUEUED]
    live_ns = max((inquiry.asked_ns - answer.idle_ns for answer in waiting), default=operation.live_ns)
    if live_ns + operation.timeout_ns > now_ns:
        progressed(operation, live_ns)
    elif inquiry.is_last or not inquiry.answers:  # whoever waits for no rank waits for its device, and knows it first
        return [], DeadlineMissed(_late(rank, operation, queued))
    else:
        inquiry.hears = True
        operation.limit_ns = max(inquiry.asked_ns + ANSWER_NS, now_ns) + (0 if queued else HEARSAY_NS)
    return [], None


def answer(membership: Membership | None, blocker: Blocker, ask: Ask, now_ns: int) -> Answer:
    """Answer a question about a call; if the call is as late on this rank, let its inquiry start at once.

    ``blocker`` : tells for which call a queued call waits; that may be a message, or a call of another group.
    """
    if membership is None:
        return Answer(ask.group, ask.sequence, State.AWAY)
    natives = membership.natives
    latest = membership.latest if natives is None else max(membership.latest, natives.latest)
    calls = [op for op in membership.active if not op.reported and op.sequence <= ask.sequence]
    if calls:
        live_ns = max(operation.live_ns for operation in calls)
        idle_ns, first = now_ns - live_ns, calls[0]
        if first.inquiry is None:
            first.hurry_ns = min(first.hurry_ns or ask.timeout_ns, ask.timeout_ns)
            first.limit_ns = min(first.limit_ns, max(now_ns, live_ns + first.hurry_ns))
        doing = f"is still in call {first.sequence}, {first.descriptor.brief}" if first.sequence < ask.sequence else ""
        return Answer(ask.group, ask.sequence, State.WAITING, max(idle_ns, 0), latest, doing)
    queued = next((operation for operation in membership.waiting if operation.sequence <= ask.sequence), None)
    if queued is not None:
        found = blocker(queued)
        if found is None:
            return Answer(ask.group, ask.sequence, State.WAITING, 0, latest)
        ahead, live_ns = found
        doing = f"has queued this call behind {_brief(ahead)}{_waits(ahead)}"
        return Answer(ask.group, ask.sequence, State.QUEUED, max(now_ns - live_ns, 0), latest, doing)
    unfinished = natives.unfinished if natives is not None and ask.sequence > membership.latest else None
    if unfinished is not None and unfinished[0] < ask.sequence:  # nobody knows when it made progress last
        return Answer(ask.group, ask.sequence, State.WAITING, ask.timeout_ns, latest, unfinished[1])
    return Answer(ask.group, ask.sequence, State.ENDED if ask.sequence <= latest else State.ABSENT, 0, latest)


def _brief(call: Operation | Transfer) -> str:
    title = call.title
    return title if len(title) <= LONGEST_TITLE else f"{title[:LONGEST_TITLE]}..."


def _waits(call: Operation | Transfer) -> str:
    """Return for which ranks a collective waits; the title of a message says that by itself."""
    ranks = [] if isinstance(call, Transfer) else list(awaited(call))
    named = ", ".join(f"rank {rank}" for rank in ranks[:MOST_NAMED])
    others = f" and {len(ranks) - MOST_NAMED} others" if len(ranks) > MOST_NAMED else ""
    return f", which waits for {named}{others}" if ranks else ""


def answered(operation: Operation, peer: int, told: Answer, now_ns: int) -> None:
    """Record an answer; when it was the last one, let the inquiry go on at once."""
    inquiry = operation.inquiry
    if inquiry is None or inquiry.hears or told.sequence != operation.sequence or peer not in inquiry.answers:
        return
    inquiry.answers[peer] = told
    if inquiry.is_answered:
        operation.limit_ns = now_ns


def awaited(operation: Operation) -> dict[int, int]:
    """Return by rank how many messages a call waits for; ranks that have not confirmed the call come first.

    While devices reduce, no message is waited for: what has been posted comes afterwards.
    """
    ranks, machine = operation.group.ranks, operation.machine
    messages = {} if machine.under_way & operation.plan.onsite else machine.waiting_for()
    counts = {ranks[peer]: count for peer, count in sorted(messages.items())}
    return {peer: counts.get(peer, 0) for peer in sorted(operation.strangers)} | counts


def _late(rank: int, operation: Operation, to_blame: list[int]) -> str:
    peers = ", ".join(
        f"rank {peer} ({_awaited(count)}{_doing(operation, peer)})" for peer, count in awaited(operation).items()
    )
    if to_blame:
        peers = ", ".join(f"rank {peer}, {_reproach(operation, peer)}" for peer in to_blame)
    whose = "a rank that waits for this one" if operation.is_hurried else "the call"
    return (
        f"rank {rank}: {operation.title} was not finished after {operation.timeout_ns / 1e9:g} s "
        f"without progress (the timeout of {whose}); it waits for {peers or devices(operation) or 'no other rank'}"
    )


def devices(operation: Operation) -> str:
    """Return for which devices a call waits."""
    under_way, plan = operation.machine.under_way, operation.plan
    if not under_way & plan.onsite:
        return "its device" if under_way & plan.copies else ""
    named = ", ".join(f"rank {rank}" for rank in sorted(operation.mates)[:MOST_NAMED])
    return f"NCCL in its site, with {named}, and what callers queued on their devices"


def _awaited(count: int) -> str:
    if not count:
        return "has not confirmed that it made this call"
    return f"{count} message{'s' if count > 1 else ''}"


def _doing(operation: Operation, peer: int) -> str:
    told = operation.inquiry.answers.get(peer) if operation.inquiry is not None else None
    return f"; it {told.doing}" if told is not None and told.doing else ""


def _reproach(operation: Operation, peer: int) -> str:
    told = operation.inquiry.answers[peer] if operation.inquiry is not None else None
    if told is None:
        called = "has not confirmed that it made this call" if peer in operation.strangers else "has made this call"
        return f"which {called} and does not answer"
    if told.state is State.QUEUED:
        return f"which {told.doing}"
    if told.state is State.AWAY:
        return "which is not in the group: it has closed it, or not opened it yet"
    if told.latest < 0:
        return "which has not called it; it has called nothing of this group"
    return f"which has not called it; the latest call that it made of this group is number {told.latest}"
