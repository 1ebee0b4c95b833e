"""A rank's end of MPI: messages as nonblocking sends and receives that `poll` tests in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detcoll.errors import FrameError, PeerLost, TransportError, UsageError
from detcoll.transport import LARGEST_TAG, Capabilities, Clock, Ticket, TicketKind, TicketStatus, Window
from detcoll_mpi.agreement import Agreement
from detcoll_mpi.collectives import MpiCollectives
from detcoll_mpi.pool import Loan, Pool
from detcoll_mpi.waiting import Backoff

_unfinished: list[_Operation] = []
"""What MPI may still read or write after its endpoint was closed: the memory must stay until MPI is done with it."""


@dataclass(eq=False, slots=True)
class _Operation:
    """A request of MPI, the ticket it stands for, and the memory it uses."""

    request: Any
    ticket: Ticket
    memory: memoryview
    loan: Loan | None = None


class MpiEndpoint(MpiCollectives):
    """Messages between the ranks of one job; see the package's text.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    lanes : list
        Communicators in the job's order of ranks; tag t travels in lane t // (TAG_UB + 1). The last one is for what
        collectives compare.
    """

    def __init__(
        self,
        mpi: Any,
        lanes: list[Any],
        rank: int,
        size: int,
        clock: Clock,
        capabilities: Capabilities,
        abort_job: bool = False,
    ) -> None:
        *lanes, dedicated = lanes
        super().__init__(mpi, lanes[0], size, clock, Agreement(mpi, dedicated))
        self._rank = rank
        self._lanes = lanes
        self._tags_per_lane = int(mpi.COMM_WORLD.Get_attr(mpi.TAG_UB)) + 1
        self._largest_bytes = capabilities.largest_message_bytes
        self._abort_job = abort_job
        self._peers: set[int] = set()
        self._pool = Pool()
        self._under_way: dict[Ticket, _Operation] = {}
        self._ended: list[Ticket] = []
        self._state = mpi.Status()
        self._counters = dict.fromkeys(("messages_sent", "bytes_sent", "messages_received", "bytes_received"), 0)

    @property
    def address(self) -> str:
        """The rank in the MPI world; MPI finds it by itself."""
        return f"mpi:{self._mpi.COMM_WORLD.Get_rank()}"

    def connect(self, addresses: Mapping[int, str], deadline_ns: int) -> None:
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
        self._peers |= set(addresses) - {self._rank}

    def send(self, dst: int, tag: int, view: memoryview, window: Window | None = None) -> Ticket:
        """Send ``view`` without a copy of ours; windows are not kept."""
        self._check_open()
        self._check_arguments("dst", dst, tag, view.nbytes)
        lane, lane_tag = self._lane(tag)
        ticket = Ticket(TicketKind.SEND, dst, tag, view.nbytes, started_ns=self._clock.now_ns())
        try:
            request = lane.Isend([view, self._mpi.BYTE], dst, lane_tag)
        except self._mpi.Exception as error:
            raise self._error(error, dst) from error
        self._begin(_Operation(request, ticket, view))
        return ticket

    def recv(self, src: int, tag: int, nbytes: int, into: memoryview | None = None) -> Ticket:
        """Receive into ``into``, or into memory from a pool that is lent with the ticket."""
        self._check_open()
        self._check_arguments("src", src, tag, nbytes)
        if into is not None and (into.readonly or into.nbytes != nbytes):
            raise UsageError(f"into has {into.nbytes} bytes; expected {nbytes} writable bytes")
        lane, lane_tag = self._lane(tag)
        ticket = Ticket(TicketKind.RECV, src, tag, nbytes)
        loan = None if into is not None else Loan(self._pool, self._pool.take(nbytes))
        memory = into if loan is None else loan.memory(nbytes)
        assert memory is not None
        try:
            request = lane.Irecv([memory, self._mpi.BYTE], src, lane_tag)
        except self._mpi.Exception as error:
            self._fail(ticket, error)
        else:
            self._begin(_Operation(request, ticket, memory, loan))
        return ticket

    def poll(self, deadline_ns: int) -> Sequence[Ticket]:
        """Return tickets that ended; see `Endpoint.poll`."""
        self._check_open()
        backoff = Backoff(self._clock, deadline_ns)
        while True:
            self._progress()
            if self._ended:
                ended, self._ended = self._ended, []
                return ended
            if not backoff.pause():
                return []

    def cancel(self, ticket: Ticket) -> bool:
        """End a pending receive as CANCELLED; MPI does not take sends back."""
        self._check_open()
        operation = self._under_way.get(ticket)
        if operation is None or ticket.kind is TicketKind.SEND:
            return False
        return self._cancel(operation)

    def abort(self) -> None:
        """Drop everything; with the option ``abort_job`` end the whole MPI job."""
        if self._is_open and self._abort_job:
            self._mpi.COMM_WORLD.Abort(1)
        self._leave(clean=False)

    def close(self, deadline_ns: int) -> None:
        """Wait until all sends have ended, then give everything back."""
        if not self._is_open:
            return
        backoff = Backoff(self._clock, deadline_ns)
        while any(ticket.kind is TicketKind.SEND for ticket in self._under_way):
            self._progress()
            if not backoff.pause():
                break
        self._leave(clean=True)

    def counters(self) -> Mapping[str, int]:
        """Return messages and bytes sent and received; collectives are not counted."""
        return dict(self._counters)

    def _check_arguments(self, name: str, peer: int, tag: int, nbytes: int) -> None:
        if peer not in self._peers:
            raise UsageError(f"{name}={peer} is not connected; expected one of {sorted(self._peers)}")
        if not 0 <= tag <= LARGEST_TAG:
            raise UsageError(f"tag={tag} must be from 0 to {LARGEST_TAG}")
        if not 0 <= nbytes <= self._largest_bytes:
            raise UsageError(f"a message has {nbytes} bytes; expected 0 to {self._largest_bytes}")

    def _lane(self, tag: int) -> tuple[Any, int]:
        index, lane_tag = divmod(tag, self._tags_per_lane)
        return self._lanes[index], lane_tag

    def _begin(self, operation: _Operation) -> None:
        self._under_way[operation.ticket] = operation
        self._test(operation)

    def _progress(self) -> None:
        for operation in list(self._under_way.values()):
            self._test(operation)

    def _test(self, operation: _Operation) -> None:
        """End the ticket of ``operation`` if MPI is done with it."""
        ticket = operation.ticket
        try:
            if not operation.request.Test(self._state):
                return
        except self._mpi.Exception as error:
            self._fail(ticket, error)
            return
        if self._state.Is_cancelled():
            self._end(ticket, TicketStatus.CANCELLED)
            return
        kind = "sent" if ticket.kind is TicketKind.SEND else "received"
        if ticket.kind is TicketKind.RECV and not self._accept(operation):
            return
        self._counters[f"messages_{kind}"] += 1
        self._counters[f"bytes_{kind}"] += ticket.nbytes
        self._end(ticket, TicketStatus.DONE)

    def _accept(self, operation: _Operation) -> bool:
        """Lend what arrived where it is to be lent; False if it has another size."""
        ticket = operation.ticket
        arrived = self._state.Get_count(self._mpi.BYTE)
        if arrived != ticket.nbytes:
            self._fail(ticket, FrameError(_wrong_size(ticket, f"{arrived}")))
            return False
        if operation.loan is not None:
            ticket.lender, ticket.view = operation.loan, operation.memory.toreadonly()
        return True

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        ticket.error = error if isinstance(error, TransportError) else self._error(error, ticket.peer, ticket)
        self._end(ticket, TicketStatus.FAILED)

    def _end(self, ticket: Ticket, status: TicketStatus) -> None:
        ticket.status = status
        ticket.ended_ns = self._clock.now_ns()
        self._under_way.pop(ticket, None)
        if status is not TicketStatus.CANCELLED:
            self._ended.append(ticket)

    def _error(self, error: Any, peer: int, ticket: Ticket | None = None) -> TransportError:
        """Return what an exception of mpi4py means."""
        if ticket is not None and error.Get_error_class() == self._mpi.ERR_TRUNCATE:
            mapped: TransportError = FrameError(_wrong_size(ticket, "more"))
        else:
            mapped = PeerLost(f"MPI lost rank {peer}: {error}")
        mapped.__cause__ = error
        return mapped

    def _cancel(self, operation: _Operation) -> bool:
        """Cancel a receive; where it has just ended instead, end its ticket as usual."""
        operation.request.Cancel()
        self._test(operation)
        return operation.ticket.status is TicketStatus.CANCELLED

    def _leave(self, clean: bool) -> None:
        """Drop what is under way and give the communicators back.

        A communicator with mail that no one took is kept instead: MPI would use its number again, and hand the old
        mail to the next job.
        """
        if not self._is_open:
            return
        for operation in list(self._under_way.values()):
            if operation.ticket.kind is TicketKind.RECV and self._cancel(operation):
                continue
            if operation.ticket.status is TicketStatus.PENDING:
                _unfinished.append(operation)
                operation.ticket.status = TicketStatus.CANCELLED
            clean = False
        self._under_way.clear()
        clean = clean and not self._is_broken
        clean = clean and not any(lane.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG) for lane in self._lanes)
        self._stop()
        if clean:
            for lane in (*self._lanes, self._agreement.comm):
                lane.Free()
        self._lanes = []


def _wrong_size(ticket: Ticket, came: str) -> str:
    return f"{came} bytes came from rank {ticket.peer} with tag {ticket.tag}; expected {ticket.nbytes}"
