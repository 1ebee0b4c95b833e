"""A rank's end of MPI."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from detcoll.errors import UsageError
from detcoll.transport import Capabilities, Clock, Endpoint, NativeCall, NativeCollectives, Ticket, Window
from detcoll_mpi.collectives import MpiCollectives
from detcoll_mpi.lockstep import Lockstep
from detcoll_mpi.mail import Mail
from detcoll_mpi.progress import progress
from detcoll_mpi.waiting import Backoff


class MpiEndpoint(Endpoint, NativeCollectives):
    """Messages and collectives between the ranks of one job; see the package's text.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comms : list
        Communicators in the job's order of ranks: for messages, for collectives, and for what collectives compare.
    """

    def __init__(
        self,
        mpi: Any,
        comms: list[Any],
        rank: int,
        size: int,
        clock: Clock,
        capabilities: Capabilities,
        abort_job: bool = False,
    ) -> None:
        self._post, dedicated, compared = comms
        self._mpi, self._rank, self._size, self._clock = mpi, rank, size, clock
        progress.enter(mpi)
        lockstep = Lockstep(mpi, dedicated, compared, range(size), clock)
        self._collectives = MpiCollectives(lockstep, range(size), capabilities, clock)
        self._abort_job = abort_job
        numbers = int(mpi.COMM_WORLD.Get_attr(mpi.TAG_UB))
        self._mail = Mail(mpi, self._post, clock, capabilities.largest_message_bytes, numbers)

    @property
    def algorithm(self) -> str:
        """The name in traces and results."""
        return self._collectives.algorithm

    def run(self, call: NativeCall, deadline_ns: int) -> None:
        """Carry out a collective of all ranks."""
        self._collectives.run(call, deadline_ns)

    def stop(self) -> None:
        """End the collectives of all ranks; those of groups and messages go on."""
        self._collectives.stop()

    def group(self, ranks: Sequence[int], key: int, deadline_ns: int) -> MpiCollectives:
        """Return the collectives of some ranks, on communicators of their own."""
        return self._collectives.group(ranks, key, deadline_ns)

    @property
    def address(self) -> str:
        """The rank in the MPI world; MPI finds it by itself."""
        return f"mpi:{self._mpi.COMM_WORLD.Get_rank()}"

    def connect(self, addresses: Mapping[int, str], deadline_ns: int, needed: Collection[int] | None = None) -> None:
        """Allow messages to the ranks in ``addresses``; MPI connects when the first one is sent.

        Raises
        ------
        UsageError
            If a rank is not in the job.
        """
        self._check_open()
        beyond = sorted(rank for rank in addresses if not 0 <= rank < self._size)
        if beyond:
            raise UsageError(f"addresses names ranks {beyond}; expected ranks from 0 to {self._size - 1}")
        self._mail.peers.update(set(addresses) - {self._rank})

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Send ``view``, without a copy of ours unless it is small; windows are not kept."""
        progress.is_active = True
        return self._mail.send(dst, tag, view)

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Receive into ``into``, or into memory that is lent with the ticket."""
        progress.is_active = True
        return self._mail.recv(src, tag, nbytes, into)

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Return tickets that ended; see `Endpoint.poll`."""
        backoff = Backoff(self._clock, deadline_ns)
        while True:
            self._check_open()
            self._mail.progress()
            ended = self._mail.collect()
            if ended or not backoff.pause():
                return ended

    def cancel(self, ticket: Ticket) -> bool:
        """End a receive as CANCELLED whose message was not announced yet; MPI takes no more back."""
        self._check_open()
        return self._mail.cancel(ticket)

    def discard(self, tag: int, bits: int) -> None:
        """Drop what belongs to a prefix of tags; see `Endpoint.discard`."""
        progress.is_active = True
        self._mail.discard(tag, bits)

    def abort(self) -> None:
        """Drop everything; with the option ``abort_job`` end the whole MPI job."""
        if self._mail.is_open and self._abort_job:
            self._mpi.COMM_WORLD.Abort(1)
        self._leave(clean=False)

    def close(self, deadline_ns: int) -> None:
        """Wait until all sends have ended, then give everything back."""
        if not self._mail.is_open:
            return
        backoff = Backoff(self._clock, deadline_ns)
        while self._mail.is_sending:
            self._mail.progress()
            if not backoff.pause():
                break
        self._leave(clean=True)

    def counters(self) -> Mapping[str, int]:
        """Return messages and bytes sent and received; collectives are not counted."""
        return dict(self._mail.counters)

    def _check_open(self) -> None:
        progress.is_active = True
        self._mail.check_open()

    def _leave(self, clean: bool) -> None:
        """Drop what is under way and give the communicators back.

        A communicator with mail that no one took is kept instead: MPI would use its number again, and hand the old
        mail to the next job.
        """
        if not self._mail.is_open:
            return
        clean = self._mail.end() and clean
        progress.leave()
        self._collectives.leave(clean=clean)
        if clean and not self._post.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG):
            self._post.Free()
