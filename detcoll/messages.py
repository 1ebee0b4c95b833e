"""send and recv: messages from one rank of a group to another, with tags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import numpy as np

from detcoll.arguments import check_name, rank_of, timeout_of
from detcoll.buffers import Bound, bind
from detcoll.errors import UsageError
from detcoll.job.caller import Caller
from detcoll.job.mailer import transfer
from detcoll.runtime import Work
from detcoll.runtime.transfer import LARGEST_TAG

Checked = TypeVar("Checked")


class Messages:
    """The part of a communicator that sends and receives messages."""

    _caller: Caller
    _timeout: float

    @overload
    def send(
        self, x: Any, dst: int, tag: int = 0, async_op: Literal[False] = False, *, timeout: float | None = None,
        name: str = "",
    ) -> None: ...  # fmt: skip
    @overload
    def send(
        self, x: Any, dst: int, tag: int = 0, *, async_op: Literal[True], timeout: float | None = None, name: str = ""
    ) -> Work: ...
    @overload
    def send(self, x: Any, dst: int, tag: int, async_op: Literal[True]) -> Work: ...
    @overload
    def send(
        self, x: Any, dst: int, tag: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
    ) -> Work | None: ...

    def send(
        self, x: Any, dst: int, tag: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
    ) -> Work | None:
        """Send ``x`` to rank ``dst``, which takes it with `recv`.

        It returns when ``x`` may be changed again. For up to 4 KiB that is at once, as long as few earlier messages
        wait at ``dst`` for their receive; for more it is when ``dst`` has received them. An array on a GPU is copied
        first, once what the current stream holds has ended.

        Parameters
        ----------
        x : Buffer, any shape, one of the types in `detcoll.types.DTYPES`, C-contiguous, borrowed until wait
            A NumPy or CuPy array, a torch tensor, or a list of them, which is coalesced. It may be read-only.
        dst : int
            A rank of the group. To this rank itself: the receive should be posted first (``async_op``); otherwise a
            synchronous send copies ``x`` and returns.
        tag : int
            From 0 to 2**31 - 1. A receive takes only messages with its tag.
        async_op : bool
            Return a `Work` at once instead of waiting.
        timeout : float, optional
            Seconds for which this call may make no progress; by default `timeout` of the group. Its receive, and every
            part that ``dst`` acknowledges, count as progress.
        name : str
            At most 64 bytes. Compared with that of the receive and shown in messages.

        Returns
        -------
        Work or None
            `Work` if ``async_op`` is set.

        Raises
        ------
        UsageError
            If an argument is not valid; nothing was sent, and ``dst`` waits for a valid call.
        PlanMismatch
            If the receive has another type, number of elements or name; raised on both sides, and the group has ended.
        DeadlineMissed
            If the call made no progress for its timeout; says what it waited for. The group has ended.
        PeerLost, Closed
            See `detcoll.errors`.

        Guarantees
        ----------
        Messages to one rank with one tag are received in the order in which they were sent. Messages wait for no
        collective, and collectives wait for no message, unless they use the same memory: then calls of one rank are
        executed in their order. Sends of the same memory may run at the same time.
        """
        bound = self._checked_message(lambda: bind(x, writable=False), "dst", dst, tag, timeout, name)
        is_own = int(dst) == self._caller.rank
        if is_own and not async_op:
            bound.load()
            bound = bind(bound.array.copy(), writable=False)
        seconds = self._timeout if timeout is None else timeout
        work = transfer(self._caller, bound, is_send=True, peer=int(dst), tag=int(tag), timeout_s=seconds, name=name)
        if async_op:
            return work
        if not is_own:
            work.wait()
        return None

    def _send_checked(self, x: Any, dst: int, tag: int, name: str) -> Work:
        """Send as `send` does; the work of a small message, too, ends when its receive is found, or does not fit."""
        bound = self._checked_message(lambda: bind(x, writable=False), "dst", dst, tag, None, name)
        return transfer(
            self._caller, bound, is_send=True, peer=int(dst), tag=int(tag), timeout_s=self._timeout, name=name,
            awaits_receive=True,
        )  # fmt: skip

    @overload
    def recv(
        self, x: Any, src: int | None = None, tag: int = 0, async_op: Literal[False] = False, *,
        timeout: float | None = None, name: str = "",
    ) -> int: ...  # fmt: skip
    @overload
    def recv(
        self, x: Any, src: int | None = None, tag: int = 0, *, async_op: Literal[True], timeout: float | None = None,
        name: str = "",
    ) -> Work: ...  # fmt: skip
    @overload
    def recv(self, x: Any, src: int | None, tag: int, async_op: Literal[True]) -> Work: ...
    @overload
    def recv(
        self, x: Any, src: int | None = None, tag: int = 0, async_op: bool = False, *, timeout: float | None = None,
        name: str = "",
    ) -> Work | int: ...  # fmt: skip

    def recv(
        self, x: Any, src: int | None = None, tag: int = 0, async_op: bool = False, *, timeout: float | None = None,
        name: str = "",
    ) -> Work | int:  # fmt: skip
        """Receive into ``x`` what rank ``src`` sends with `send`.

        Parameters
        ----------
        x : Buffer, as for `send`, but writable
            Of the type and with the number of elements of the message.
        src : int, optional
            A rank of the group. None: the first message of any rank of the group with this tag.
        tag, async_op, name
            As for `send`.
        timeout : float, optional
            As for `send`; every part that arrives counts as progress.

        Returns
        -------
        Work or int
            `Work` if ``async_op`` is set; its `Work.wait` returns the source, as its `Work.source` tells. Otherwise the
            rank of the group that the message came from.

        Raises
        ------
        UsageError, PlanMismatch, DeadlineMissed, PeerLost, Closed
            As for `send`.

        Guarantees
        ----------
        As for `send`. If one receive takes messages of any source and another one names a source, the one that was
        called first gets the first message that fits both.
        """
        bound = self._checked_message(lambda: bind(x), "src", 0 if src is None else src, tag, timeout, name)
        peer = None if src is None else int(src)
        seconds = self._timeout if timeout is None else timeout
        work = transfer(self._caller, bound, is_send=False, peer=peer, tag=int(tag), timeout_s=seconds, name=name)
        if async_op:
            return work
        source: int = work.wait()
        return source

    def _checked_message(
        self, check: Callable[[], Bound], label: str, peer: object, tag: object, timeout: object, name: object
    ) -> Bound:
        """Check arguments; what is not valid ends here, and no other rank hears of it."""
        self._caller.check_usable()
        size = len(self._caller.group.ranks)
        rank_of(label, peer, size)
        if isinstance(tag, bool) or not isinstance(tag, int | np.integer) or not 0 <= tag <= LARGEST_TAG:
            raise UsageError(f"tag={tag!r} must be a whole number from 0 to {LARGEST_TAG}")
        check_name(name)
        if timeout is not None:
            timeout_of(timeout)
        return check()
