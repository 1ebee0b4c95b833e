"""Run a transport's native collectives in call order.

If no other call is pending, a blocking call runs on the caller's thread, which saves two thread switches. Asynchronous
calls, and all calls behind them, are queued for a worker thread. The timeout of a call starts when the call runs.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.descriptor import brief
from detcoll.errors import Closed, DeadlineMissed, DetcollError, PeerLost, TransportError, UsageError
from detcoll.priority import shorten_turns
from detcoll.runtime.group import WORLD_ID, Group
from detcoll.runtime.recorder import Called, Recorder
from detcoll.runtime.work import Work
from detcoll.signature import signature_of
from detcoll.trace import Call, Trace
from detcoll.transport import Capabilities, NativeCollectives
from detcoll.types import ReduceOp

LARGEST_QUEUE = 4096


@dataclass(frozen=True, slots=True)
class NativeCall:
    """Arguments of one native collective.  ``timeout_ns`` : counts from when the call runs."""

    sequence: int
    kind: str
    array: NDArray[Any]
    op: ReduceOp
    root: int
    timeout_ns: int
    called_ns: int
    arrays: int = 1
    load: Callable[[], None] | None = None
    store: Callable[[], None] | None = None
    name: str = ""


class NativeRunner:
    """Runs native collectives with a worker thread and a queue, and keeps the state that a flight record shows.

    It has many fields because callers, the worker thread and flight records share its state.

    Parameters
    ----------
    collectives : NativeCollectives
        Executes the calls.
    capabilities : Capabilities
        The collectives, types and operators that it supports.
    rank : int
        This rank, for messages.
    trace : Trace
        Records calls.
    on_failure : callable
        Called with the error that ended the collectives, and whether this rank detected it and has to tell the others.
    explain : callable, optional
        Returns the reason that other ranks gave for the loss of a peer, or None; the endpoint does not know it.
    recorder : Recorder, optional
        Records events.
    """

    def __init__(
        self,
        collectives: NativeCollectives,
        capabilities: Capabilities,
        rank: int,
        trace: Trace,
        on_failure: Callable[[Exception, bool], None],
        explain: Callable[[], DetcollError | None] = lambda: None,
        recorder: Recorder | None = None,
    ) -> None:
        self._collectives, self._capabilities, self._rank, self._trace = collectives, capabilities, rank, trace
        self._on_failure, self._explain, self._recorder = on_failure, explain, recorder or Recorder()
        self._supported: dict[tuple[str, np.dtype[Any], ReduceOp], bool] = {}
        self._current: NativeCall | None = None
        self._latest = -1
        self._turn = threading.Lock()
        self._queue: queue.Queue[tuple[NativeCall, Work] | None] = queue.Queue(LARGEST_QUEUE)
        self._queued = 0
        self._count = threading.Lock()
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="detcoll-native", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Exception | None:
        """The error that ended the collectives, or None."""
        return self._failure

    def has(self, kind: str) -> bool:
        """Return whether the transport has a native collective of this kind for any type."""
        return kind in self._capabilities.native

    def supports(self, kind: str, dtype: np.dtype[Any], op: ReduceOp) -> bool:
        """Return whether the transport has a native collective of this kind, type and operator."""
        key = kind, dtype, op
        answer = self._supported.get(key)
        if answer is None:
            answer = self._supported[key] = self._capabilities.supports(kind, dtype, op)
        return answer

    def run(self, call: NativeCall, work: Work) -> None:
        """Queue ``call`` for the worker thread; ``work`` ends with it.

        Raises
        ------
        Closed
            If the collectives have failed or the job is closing.
        DeadlineMissed
            If the queue stays full for the timeout of the call.
        """
        with self._count:  # `drain` waits for all counted calls
            self._check_usable()
            self._queued += 1
        try:
            self._queue.put((call, work), timeout=call.timeout_ns / 1e9)
        except BaseException as error:
            with self._count:
                self._queued -= 1
            self._say_that_it_closes()
            if isinstance(error, queue.Full):
                text = f"{call.kind}: the queue is full, {LARGEST_QUEUE} earlier collectives are not finished"
                raise DeadlineMissed(text) from None
            raise

    def run_at_once(self, call: NativeCall) -> bool:
        """Run ``call`` on this thread and return True, or return False if other calls are pending.

        Raises
        ------
        DetcollError
            The error that ended the call.
        """
        self._check_usable()
        if self._queued or not self._turn.acquire(blocking=False):
            return False
        try:
            if self._queued:
                return False
            error = self._do(call)
        except BaseException as interrupt:  # ranks may be out of step, so no later call can be trusted to match
            what = f"rank {self._rank} was interrupted in {call.kind} number {call.sequence}"
            self._give_up(TransportError(f"{what}: {type(interrupt).__name__}"))
            raise
        finally:
            self._turn.release()
        if error is not None:
            raise error
        return True

    def _check_usable(self) -> None:
        if self._failure is not None or self._closing:
            reason = "the job is closed" if self._failure is None else f"the group has ended: {self._failure}"
            raise Closed(reason) from self._failure

    def fail(self, error: Exception) -> None:
        """Refuse further calls because of ``error``."""
        self._failure = self._failure or error

    def drain(self, deadline_ns: int) -> bool:
        """Close, and wait for queued calls; at the deadline fail the collectives and return False."""
        self.close()
        self._thread.join(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
        if self._thread.is_alive():
            self.fail(DeadlineMissed("closing: collectives were still under way at the deadline"))
            return False
        return True

    def close(self) -> None:
        """Accept no more calls. The thread ends after the queued calls; a call in the transport is not interrupted."""
        with self._count:
            is_new, self._closing = not self._closing, True
        if is_new:
            self._say_that_it_closes()

    def _say_that_it_closes(self) -> None:
        """If closing, wake the thread so that it can end; if the queue is full, the thread is awake anyway."""
        if self._closing:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)

    def _serve(self) -> None:
        shorten_turns()
        while not (self._closing and not self._queued):
            entry = self._queue.get()
            if entry is None:
                continue
            call, work = entry
            with self._turn:
                error = self._do(call)
            with self._count:
                self._queued -= 1
            work.finish(error)

    def _do(self, call: NativeCall) -> Exception | None:
        """Run ``call``; return the error that ended it, or None on success."""
        if self._failure is not None:
            return self._failure
        error: Exception
        self._latest = max(self._latest, call.sequence)
        self._recorder.note(call.called_ns, "call", WORLD_ID, call.sequence, detail=_called(call))
        self._current = call
        try:
            if call.load is not None:
                call.load()
            self._dispatch(call)
            if call.store is not None:
                call.store()
        except UsageError as problem:  # nothing has moved
            self._current = None
            return problem
        except DetcollError as problem:
            error = problem
        except Exception as problem:
            error = TransportError(f"{call.kind} number {call.sequence} failed: {problem!r}")
            error.__cause__ = problem
        else:
            self._current = None
            self._recorder.note(time.monotonic_ns(), "end", WORLD_ID, call.sequence)
            if self._trace.recording:
                what = Call(call.kind, call.array.nbytes, self._collectives.algorithm)
                self._trace.note_collective(call.sequence, what, call.called_ns, time.monotonic_ns())
            return None
        return self._give_up(error)

    def standing(self, world: Group) -> dict[str, Any]:
        """Return the state of this rank in the world as plain data for its flight record."""
        call, failure = self._current, self._failure
        calls = []
        if call is not None:
            what = f"call {call.sequence}, {brief(*_called(call))}"
            calls.append({
                "sequence": call.sequence, "what": what, "state": "is in the transport's own collective",
                "waits_for": [],
            })  # fmt: skip
        return {
            "id": "world", "number": WORLD_ID, "name": "", "ranks": list(world.ranks),
            "latest": self._latest, "failure": None if failure is None else str(failure), "calls": calls,
        }  # fmt: skip

    def _give_up(self, error: Exception) -> Exception:
        """Record the failure, report it unless other ranks did, and return the error to raise."""
        if self._failure is not None:  # failed or aborted meanwhile, and this error is a consequence
            return self._failure
        told = self._explain() if isinstance(error, PeerLost) else None
        self._failure = told or error
        self._on_failure(self._failure, told is None)
        return self._failure

    def _dispatch(self, call: NativeCall) -> None:
        deadline_ns = time.monotonic_ns() + call.timeout_ns
        signature = signature_of(call.kind)
        carry_out = getattr(self._collectives, call.kind)
        if not signature.has_array:
            carry_out(deadline_ns, call.name)
            return
        operation = (call.op,) if signature.has_op else ()
        root = (call.root,) if signature.has_root else ()
        carry_out(call.array, *operation, *root, deadline_ns, call.arrays, call.name)


def _called(call: NativeCall) -> Called:
    array = call.array
    return call.kind, call.op, array.dtype, array.size, call.root, call.arrays, call.name
