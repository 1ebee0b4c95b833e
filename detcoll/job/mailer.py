"""Calls of send and recv of one group: from checked arguments to a transfer of the progress thread.

They are not numbered, since ranks need not make them in one order. The progress thread does them also where a transport
has native collectives; it is started by the first one.
"""

from __future__ import annotations

import time

from detcoll.buffers import Bound
from detcoll.job.caller import Caller, devices_of
from detcoll.plan.cut import cut
from detcoll.runtime import Work
from detcoll.runtime.postman import Parcel
from detcoll.runtime.transfer import ANY, Transfer


def transfer(
    caller: Caller, bound: Bound, *, is_send: bool, peer: int | None, tag: int, timeout_s: float, name: str,
    awaits_receive: bool = False,
) -> Work:  # fmt: skip
    """Start a send to or a receive from ``peer``, a rank of the group (None: any), and return its work.

    ``awaits_receive`` : whether a small send, too, ends when it has found its receive.
    """
    caller.check_usable()
    job, group = caller.job, caller.group
    rank = ANY if peer is None else group.ranks[peer]
    way = "send to" if is_send else "recv from"
    work = Work(f"{way} {'any source' if peer is None else f'rank {rank}'}, tag {tag}")
    devices = devices_of(bound) if bound.staged else None
    is_staged = bound.staged and devices is None
    parcel = Parcel(
        bound.array, work, bound.load if is_staged and is_send else None,
        bound.store if is_staged and not is_send else None, devices,
    )  # fmt: skip
    call = Transfer(
        group, is_send, rank, tag, bound.dtype.name, bound.size, bound.array.nbytes, round(timeout_s * 1e9),
        time.monotonic_ns(), spans=bound.spans, name=name, memory=parcel, is_on_device=devices is not None,
        awaits_receive=awaits_receive,
    )  # fmt: skip
    if is_send:
        pieces = cut(job.topology.granted, job.calendar, job.session.rank, rank)
        call.chunk_bytes, call.ahead_bytes = pieces.chunk_bytes, pieces.ahead_bytes
    loop = job.loop
    if job.natives:
        job.ahead.wait(call.spans, None)
    loop.submit(call)
    if job.natives:
        job.ahead.note(call.spans, work, None)
    return work
