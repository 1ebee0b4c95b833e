"""Groups in which a transport does some calls by itself, and others are planned.

Ranks choose between the two by what descriptors compare, so a call that is native on one rank and planned on another
was called differently. Transports compare native calls with each other, and hellos compare planned ones, but neither
meets the other. So a planned call that has waited for hellos for `SILENCE_NS` says what it is to those that it waits
for, and again every `REPEAT_NS`. Acquaintances connect all ranks: where calls of both sorts have one number, some rank
of the one sort has an acquaintance of the other, tells it, and is heard::

    rank 0, native                rank 1, planned                     rank 2, native
    waits in its transport        waits for hellos
    <- Planned(number) ---------- SILENCE_NS later ------------------>
    finds the number among its native ones: the group ends, and all are told

A call that one rank refuses ends on the others, see `detcoll.runtime.failures`. Those that come to it later in their
transport find it among the refused ones and go on. One that is in it already cannot leave it alone, so its group ends.

A number counts as native here if the transport has begun a call with that number or a later one, and no planned or
refused call had it. A caller's refusal may still be on its way to the engine, so this is a doubt for `DOUBT_NS` first.
"""

from __future__ import annotations

import msgspec

from detcoll.errors import PlanMismatch
from detcoll.runtime.control import WHOLE_GROUP, Cause, Planned
from detcoll.runtime.membership import Doubt, Membership
from detcoll.runtime.operation import Operation

SILENCE_NS = 100_000_000
REPEAT_NS = 500_000_000
DOUBT_NS = 20_000_000


def begin(operation: Operation, now_ns: int) -> None:
    """Take note that a planned call of such a group begins; one with a short timeout speaks before that."""
    operation.tells_ns = now_ns + min(SILENCE_NS, operation.timeout_ns // 4)


def to_tell(membership: Membership, now_ns: int) -> list[tuple[int, Planned]]:
    """Return whom to tell now of the earliest unfinished call, and what."""
    first = membership.first
    if first is None or not first.strangers or now_ns < first.tells_ns:
        return []
    first.tells_ns = now_ns + REPEAT_NS
    return [
        (peer, Planned(membership.group.id, first.sequence, first.described_to(peer).told))
        for peer in sorted(first.strangers)
    ]


def told(membership: Membership, rank: int, peer: int, planned: Planned, now_ns: int) -> None:
    """Take in what ``peer`` has planned; ``rank`` is this rank."""
    if membership.natives is None or not membership.is_native(planned.sequence):
        return
    error = PlanMismatch(
        f"ranks called different collectives: rank {rank} called {membership.natives.called(planned.sequence)}, which "
        f"its transport does, rank {peer} called {planned.called}, which goes through a plan"
    )
    _doubt(membership, Doubt(planned.sequence, now_ns + DOUBT_NS, error))


def refused(membership: Membership, cause: Cause, now_ns: int) -> None:
    """Take in that another rank refused a call, which may be under way in this rank's transport."""
    if membership.is_native(cause.sequence):
        ends = msgspec.structs.replace(cause, sequence=WHOLE_GROUP)
        _doubt(membership, Doubt(cause.sequence, now_ns + DOUBT_NS, ends.error(), ends))


def _doubt(membership: Membership, doubt: Doubt) -> None:
    if all(other.sequence != doubt.sequence for other in membership.doubts):
        membership.doubts.append(doubt)


def confirmed(membership: Membership, now_ns: int) -> Doubt | None:
    """Return what ends the group now, or None; doubts about calls that were not native are forgotten."""
    due = [doubt for doubt in membership.doubts if doubt.until_ns <= now_ns]
    if due:
        membership.doubts = [doubt for doubt in membership.doubts if doubt.until_ns > now_ns]
    return next((doubt for doubt in due if membership.is_native(doubt.sequence)), None)


def next_ns(membership: Membership) -> int | None:
    """Return when a group with native calls needs a look even if nothing happens, or None."""
    times = [doubt.until_ns for doubt in membership.doubts]
    first = membership.first
    if first is not None and first.strangers:
        times.append(first.tells_ns)
    return min(times, default=None)
