"""The postman: carries out on endpoints what the engine says about send and recv; a part of the courier."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import PeerLost, TransportError
from detcoll.machine import Queued
from detcoll.plan.ir import Buffer
from detcoll.runtime.devices import DeviceCopy, Devices
from detcoll.runtime.engine import Engine, Wide
from detcoll.runtime.group import Group
from detcoll.runtime.messages import Verb
from detcoll.runtime.transfer import NOTE_BYTES, Posting, Transfer
from detcoll.runtime.work import Work
from detcoll.transport import Ticket, TicketStatus, Window, byte_view

log = logging.getLogger("detcoll")

NOTE, TOLD, CHUNK = "note", "told", "chunk"
"""What a ticket of the postman is about, the second entry of its context."""

COPIES = frozenset({Verb.OPEN, Verb.KEEP, Verb.MOVE, Verb.PUT})
"""What needs no endpoint."""

Wished = tuple[Queued[Wide] | None, Window | None]


@dataclass(eq=False, slots=True)
class Parcel:
    """The memory of a send or recv.

    ``array`` : (count,), the caller's memory or its staging copy; read or written in place.
    ``load``, ``store`` : copy between a staging array and the caller's memory; None where there is none, and where the
    caller's memory is on a device of CUDA: ``devices``.
    """

    array: NDArray[Any]
    work: Work
    load: Callable[[], None] | None = None
    store: Callable[[], None] | None = None
    devices: Devices | None = None

    def device_copy(self, *, to_device: bool) -> DeviceCopy:
        """Return the copy between the staging array and the device."""
        assert self.devices is not None
        return DeviceCopy(self.devices.buffers[Buffer.DEVICE_OUT], 0, self.array, to_device)

    def keep(self) -> None:
        """Copy the values, so that the caller may change them."""
        self.array = np.array(self.array)

    def view(self, begin: int, end: int) -> memoryview:
        """Return some bytes of the array."""
        return byte_view(self.array)[begin:end]

    def drop(self) -> None:
        """Let go of everything; what a transport still borrows lives until its tickets end."""
        self.array, self.devices = np.empty(0, self.array.dtype), None

    def take(self, other: Parcel) -> None:
        """Copy the values of another one."""
        np.copyto(self.array, other.array)


class Postman:
    """Stands between the rules of messages and the endpoints; the courier calls it.

    Parameters
    ----------
    engine : Engine
        Decides.
    post_recv, post_send : callable
        Post a receive or a send on the endpoint of a peer; a lost peer is told to the engine.
    settle : callable
        Called where nothing is written any more for a receive of a transfer that has failed.
    note_send : callable
        Notes a wide send.
    lose : callable
        Takes in that a ticket has failed.
    copy : callable
        Begins the copy of a transfer between its staging array and its device.
    kind : int
        The first entry of the contexts of its tickets.
    """

    def __init__(
        self, engine: Engine, post_recv: Callable[..., None], post_send: Callable[..., None],
        settle: Callable[[Transfer, int], None], note_send: Callable[[Transfer | Posting, Ticket, Wished, int], None],
        lose: Callable[[Ticket], None], copy: Callable[[Transfer], None], kind: int,
    ) -> None:  # fmt: skip
        self._engine, self._post_recv, self._post_send, self._settle = engine, post_recv, post_send, settle
        self._note_send, self._lose, self._copy, self._kind = note_send, lose, copy, kind
        self._carry: dict[Verb, Callable[..., None]] = {
            Verb.LISTEN: self._listen, Verb.NOTE: self._tell, Verb.OPEN: self._open, Verb.KEEP: self._keep,
            Verb.SEND: self._send, Verb.RECV: self._recv, Verb.MOVE: self._move, Verb.PUT: self._put,
            Verb.COPY: self._to_or_from_device,
        }  # fmt: skip

    def act(self, verb: Verb, *fields: Any) -> None:
        """Carry out an action."""
        self._carry[verb](*fields)

    def _listen(self, group: Group, peer: int) -> None:
        for tag in (group.note_tag, group.paced_note_tag):
            self._await_note(group, peer, tag)

    def _await_note(self, group: Group, peer: int, tag: int) -> None:
        self._post_recv(peer, tag, NOTE_BYTES, (self._kind, NOTE, group))

    def _tell(self, posting: Posting, queued: Queued[Wide] | None, window: Window | None) -> None:
        if posting.over:
            return
        send = posting.send
        record = posting.note.pack(b"" if send is None else send.memory.view(0, send.nbytes))
        context = (self._kind, TOLD, posting, record, (queued, window))
        tag = posting.group.note_tag if queued is None else posting.group.paced_note_tag
        self._post_send(posting.peer, tag, memoryview(record), context, window)

    def _open(self, transfer: Transfer) -> None:
        parcel: Parcel = transfer.memory
        if transfer.over or parcel.load is None or not transfer.is_send:
            return
        try:
            parcel.load()
        except Exception as problem:
            error = TransportError(f"{transfer.title}: its memory cannot be used: {problem!r}")
            error.__cause__ = problem
            self._engine.failures.fail_group(transfer.group, error, time.monotonic_ns())

    def _to_or_from_device(self, transfer: Transfer) -> None:
        if not transfer.over:
            self._copy(transfer)

    def _keep(self, transfer: Transfer) -> None:
        if not transfer.over:
            transfer.memory.keep()

    def _send(self, transfer: Transfer, chunk: int, queued: Queued[Wide] | None, window: Window | None) -> None:
        if transfer.over:
            return
        begin, end = transfer.span(chunk)
        if queued is not None:
            begin += queued.sent_bytes
        tag = transfer.group.message_tag(transfer.key, chunk)
        view = transfer.memory.view(begin, end)
        self._post_send(transfer.peer, tag, view, (self._kind, CHUNK, transfer, chunk, (queued, window)), window)

    def _recv(self, transfer: Transfer, chunk: int) -> None:
        if transfer.over:
            self._settle(transfer, chunk)
            return
        begin, end = transfer.span(chunk)
        tag = transfer.group.message_tag(transfer.key, chunk)
        context = (self._kind, CHUNK, transfer, chunk, None)
        self._post_recv(transfer.source, tag, end - begin, context, transfer.memory.view(begin, end))

    def _move(self, send: Transfer, recv: Transfer) -> None:
        if not recv.over:
            recv.memory.take(send.memory)

    def _put(self, recv: Transfer, payload: bytes) -> None:
        if not recv.over:
            recv.memory.view(0, recv.nbytes)[:] = payload

    # Events.

    def take(self, ticket: Ticket, missed: list[tuple[Queued[Wide], Window, int]]) -> None:
        """Tell the engine how a ticket ended.

        ``missed`` : gets sends that did not end in their window.
        """
        about = ticket.context
        if about[1] == CHUNK:
            self._take_chunk(ticket, about[2], about[3], about[4], missed)
        elif ticket.status is TicketStatus.FAILED:
            self._lose(ticket)
        elif about[1] == TOLD:
            self._take_told(ticket, about[2], about[4], missed)
        elif ticket.status is TicketStatus.DONE:
            record, group = bytes(ticket.view or b""), about[2]
            ticket.release()
            membership = self._engine.groups.get(group.id)
            if membership is not None and membership.failure is None:
                self._await_note(group, ticket.peer, ticket.tag)
                self._engine.messages.noted(group.id, ticket.peer, record, time.monotonic_ns())

    def _take_chunk(
        self, ticket: Ticket, transfer: Transfer, chunk: int, wide: Wished | None,
        missed: list[tuple[Queued[Wide], Window, int]],
    ) -> None:  # fmt: skip
        messages, now_ns = self._engine.messages, time.monotonic_ns()
        if transfer.over:
            self._settle(transfer, chunk)
        elif ticket.status is TicketStatus.DONE:
            if wide is not None:
                self._note_send(transfer, ticket, wide, ticket.nbytes)
            messages.moved(transfer, chunk, now_ns)
        elif ticket.status is TicketStatus.MISSED and wide is not None:
            self._miss(ticket, transfer, wide, missed)
        elif ticket.status is not TicketStatus.CANCELLED:
            error = ticket.error or PeerLost(f"rank {ticket.peer}: {ticket.kind.value} was {ticket.status.value}")
            messages.failed(transfer, chunk, error, now_ns)

    def _take_told(
        self, ticket: Ticket, posting: Posting, wide: Wished, missed: list[tuple[Queued[Wide], Window, int]]
    ) -> None:
        if ticket.status is TicketStatus.DONE:
            self._note_send(posting, ticket, wide, ticket.nbytes)
            if wide[0] is not None:
                self._engine.messages.told(posting)
        elif ticket.status is TicketStatus.MISSED:
            self._miss(ticket, posting, wide, missed)

    def _miss(
        self, ticket: Ticket, item: Transfer | Posting, wide: Wished, missed: list[tuple[Queued[Wide], Window, int]]
    ) -> None:
        """Let a send that did not end in its window be queued again."""
        queued, window = wide
        assert queued is not None
        assert window is not None
        missed.append((queued, window, ticket.sent_bytes))
        self._note_send(item, ticket, wide, ticket.sent_bytes)
