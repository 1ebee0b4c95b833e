"""The native collectives of a job: the world's, and those of each group that the transport can serve.

Each group has a runner with a queue and a thread of its own, so calls of different groups never wait for each other.
Whether a group has native collectives is agreed between its members when it is made: one that cannot make them sends
all of them to plans.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from detcoll.errors import DetcollError, TransportError, UsageError
from detcoll.runtime import Group
from detcoll.runtime.native import NativeRunner
from detcoll.runtime.recorder import Recorder
from detcoll.trace import Trace
from detcoll.transport import Capabilities, NativeCollectives

log = logging.getLogger("detcoll")

LONGEST_MAKING_NS = 30 * 10**9
"""How long members try to make the native collectives of a group; all of them are known to be there."""

Ended = Callable[[Group, Exception, bool], None]
Refused = Callable[[Group, int, Exception], None]
Explain = Callable[[Group], DetcollError | None]


class Meeting(Protocol):
    """How members of a group exchange what they have to say."""

    def exchange(self, name: str, payload: bytes, deadline_ns: int, ranks: Sequence[int] | None = None) -> list[bytes]:
        """Contribute ``payload`` and return those of all ``ranks``, in their order."""


class Natives:
    """The runners of native collectives, by group.

    Parameters
    ----------
    collectives : NativeCollectives or None
        Those of the transport, for all ranks; None if it has none that may be used.
    capabilities : Capabilities
        Of the transport.
    rank : int
        This rank of the job.
    trace : Trace
        Records calls.
    recorder : Recorder
        Records events.
    on_failure : callable
        Called with a group, the error that ended its native collectives, and whether this rank has to tell the others.
    on_refusal : callable
        Called with a group, the number of a call that this rank does not do, and why.
    explain : callable
        Waits for the reason why a member of a group is lost or in another call, and returns it, or None.
    """

    def __init__(
        self, collectives: NativeCollectives | None, capabilities: Capabilities, rank: int, trace: Trace,
        recorder: Recorder, on_failure: Ended, on_refusal: Refused, explain: Explain,
    ) -> None:  # fmt: skip
        self._collectives, self._capabilities, self._rank = collectives, capabilities, rank
        self._trace, self._recorder, self._explain = trace, recorder, explain
        self._on_failure, self._on_refusal = on_failure, on_refusal
        self._runners: dict[int, NativeRunner] = {}
        self._of_groups: dict[int, NativeCollectives] = {}

    def __bool__(self) -> bool:
        """Return whether the job has native collectives."""
        return self._collectives is not None

    def of(self, group: Group) -> NativeRunner | None:
        """Return the runner of a group, or None if all its calls are planned."""
        return self._runners.get(group.id)

    def failure(self, group: Group) -> Exception | None:
        """Return the error that ended the native collectives of a group, or None."""
        runner = self._runners.get(group.id)
        return None if runner is None else runner.failure

    @property
    def runners(self) -> list[NativeRunner]:
        """All runners."""
        return list(self._runners.values())

    def open_world(self, world: Group) -> None:
        """Begin to run the native collectives of all ranks, if there are some."""
        if self._collectives is not None:
            self._run(world, self._collectives)

    def open(self, group: Group, meeting: Meeting, deadline_ns: int) -> None:
        """Make the native collectives of a group, on all its members or on none; all of them call it.

        Raises
        ------
        ConnectError, PeerLost
            If a member does not come in time, or is lost.
        """
        if self._collectives is None or not self._capabilities.native_groups or len(group.ranks) < 2:
            return
        made, problem = None, ""
        try:
            try:
                soon_ns = min(deadline_ns, time.monotonic_ns() + LONGEST_MAKING_NS)
                made = self._collectives.group(group.ranks, group.id, soon_ns)
                made.arrange(_in_sites(group))
            except (TransportError, UsageError) as error:
                problem = f"rank {self._rank}: {error}"
            told = meeting.exchange(f"natives {group.id:016x}", problem.encode(), deadline_ns, group.ranks)
        except BaseException:
            if made is not None:
                made.leave(clean=False)
            raise
        problems = [answer.decode() for answer in told if answer]
        if made is not None and not problems:
            self._of_groups[group.id] = made
            self._run(group, made)
            return
        log.warning("group %s has no native collectives, its calls are planned: %s", group.title, problems[0])
        if made is not None:
            made.leave(clean=False)

    def stop(self, group: Group, error: Exception) -> None:
        """End the native collectives of a group that has failed otherwise, also one under way on another thread."""
        runner = self._runners.get(group.id)
        if runner is not None and runner.fail(error):
            collectives = self._of_groups.get(group.id, self._collectives)
            if collectives is not None:
                collectives.stop()

    def close(self, group: Group, *, clean: bool) -> None:
        """Give the native collectives of a group back; ``clean`` if all members have come to this point."""
        runner, made = self._runners.pop(group.id, None), self._of_groups.pop(group.id, None)
        if runner is not None and made is not None:
            runner.close()
            if not clean:  # a call under way holds the memory until its own deadline, perhaps half an hour
                made.stop()
            made.leave(clean=clean and runner.failure is None)

    def drain(self, deadline_ns: int) -> bool:
        """Wait for all calls of all groups; False if some are under way at the deadline."""
        return all([runner.drain(deadline_ns) for runner in self.runners])

    def end(self, error: Exception | None = None) -> None:
        """Accept no more calls, because of ``error`` if there is one."""
        for runner in self.runners:
            if error is not None:
                runner.fail(error)
            runner.close()

    def _run(self, group: Group, collectives: NativeCollectives) -> None:
        self._runners[group.id] = NativeRunner(
            collectives, self._capabilities, group, self._rank, self._trace,
            lambda error, is_ours: self._on_failure(group, error, is_ours), lambda: self._explain(group),
            self._recorder, lambda sequence, error: self._on_refusal(group, sequence, error),
        )  # fmt: skip


def awaited(find: Callable[[], Exception | None], patience_ns: int, look_s: float = 0.005) -> DetcollError | None:
    """Return what ``find`` returns as soon as that is an error of detcoll, or None after ``patience_ns``."""
    end_ns = time.monotonic_ns() + patience_ns
    while not isinstance(found := find(), DetcollError) and time.monotonic_ns() < end_ns:
        time.sleep(look_s)
    return found if isinstance(found, DetcollError) else None


def _in_sites(group: Group) -> list[list[int]]:
    """Return the members of each site, as they are numbered in the group."""
    return [
        [member for member, site in enumerate(group.sites) if site == here] for here in sorted(set(group.sites))
    ]  # fmt: skip
