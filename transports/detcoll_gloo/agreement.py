"""Whether all ranks called the same collective.

Gloo does not compare what ranks call: sizes that differ end the process from a thread of its own, and the rest hangs or
gives wrong data. So every rank tells every other what it is about to call, and only then calls it. One of Gloo's own
collectives would do, but takes several turns between sites: with 4 ranks and 20 ms of round trip, 52 ms of each call,
where messages straight to everybody take 21: Gloo sends only when the receiver has said that it is ready.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import DeadlineMissed
from detcoll.transport import NativeCall
from detcoll_gloo.group import Group

AGREEMENT_TAG = 2**30 + 1
"""A tag that no message has."""

_ENDED = timedelta(milliseconds=10)


class Agreement:
    """The comparison of one rank's calls with those of the others.

    Parameters
    ----------
    group : Group
        The ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def reach(self, call: NativeCall, deadline_ns: int) -> None:
        """Return once all ranks are known to call the same.

        Raises
        ------
        PlanMismatch
            If they call different collectives; shows this rank's and another.
        DeadlineMissed, PeerLost
            If a rank did not come before the deadline, which is named, or is lost. All connections are closed then.
        """
        announced = call.announcement.numbered(call.sequence)
        mine = np.frombuffer(bytearray(announced.record), np.uint8)
        records = [np.zeros_like(mine) if rank != self._group.rank else mine for rank in range(self._group.size)]
        try:
            self._group.wait(lambda: _All(self._tell(mine, records)), deadline_ns)
        except DeadlineMissed as error:
            missing = [rank for rank, record in enumerate(records) if not record.any()]
            if not missing:
                raise
            names = ", ".join(f"rank {self._group.ranks[rank]}" for rank in missing)
            raise DeadlineMissed(
                f"{call.kind} by Gloo did not end before its deadline; it waits for {names}, which has not begun it"
            ) from error
        announced.compare(self._group.rank, [record.tobytes() for record in records], self._group.ranks)

    def _tell(self, mine: NDArray[np.uint8], records: Sequence[NDArray[np.uint8]]) -> list[Any]:
        """Begin to exchange records with all other ranks."""
        gloo, tensor = self._group.gloo, self._group.tensor
        others = [rank for rank in range(self._group.size) if rank != self._group.rank]
        sent = [gloo.send([tensor(mine)], rank, AGREEMENT_TAG) for rank in others]
        return [gloo.recv([tensor(records[rank])], rank, AGREEMENT_TAG) for rank in others] + sent


class _All:
    """Several of Gloo's works as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works
        self._was_waited = False

    def wait(self, timeout: timedelta) -> None:
        """Return when all have ended; each may take this long.

        The second time is after an interruption, when all connections are closed: what is under way fails at once, but
        Gloo tells only once that a message has ended, so one that may have told it is not waited for.
        """
        if not self._was_waited:
            self._was_waited = True
            for work in self._works:
                work.wait(timeout)
            return
        for work in self._works:
            with contextlib.suppress(RuntimeError):
                work.wait(_ENDED)
