"""Run a transport's native collectives in call order, each group's in a queue of its own.

If no other call of the group is pending, a blocking call runs on the caller's thread, which saves two thread switches.
Asynchronous calls, and all calls behind them, are queued for a worker thread of the group, so no group waits for
another. The timeout of a call starts when the call runs.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from detcoll.descriptor import brief, is_out_of_step
from detcoll.errors import Closed, DeadlineMissed, DetcollError, PeerLost, TransportError, UsageError
from detcoll.priority import shorten_turns
from detcoll.runtime.control import Cause
from detcoll.runtime.group import WORLD_ID, Group
from detcoll.runtime.recorder import Called, Recorder
from detcoll.runtime.work import Work
from detcoll.trace import Call, Trace
from detcoll.transport import Capabilities, NativeCall, NativeCollectives
from detcoll.types import ReduceOp

LARGEST_QUEUE = 4096
LARGEST_KEPT_ANSWERS = 1024

_WITHIN = "in the transport's own collective"


class Submission(NamedTuple):
    """A native call that was submitted.

    Its timeout counts from when the call runs.  ``load``, ``store`` : fill its input and empty its output until then,
    where the caller's memory is elsewhere.  ``release`` : called when it has ended in any way, or is queued.
    """

    call: NativeCall
    called_ns: int
    load: Callable[[int], None] | None = None
    store: Callable[[int], None] | None = None
    release: Callable[[], None] | None = None


class NativeRunner:
    """Runs the native collectives of one group, and keeps the state that a flight record shows.

    It has many fields because callers, the worker thread and flight records share its state.

    Parameters
    ----------
    collectives : NativeCollectives
        Executes the calls.
    capabilities : Capabilities
        The collectives, types and operators that it supports.
    group : Group
        Its ranks.
    rank : int
        This rank of the job, for messages.
    trace : Trace
        Records calls.
    on_failure : callable
        Called with the error that ended the collectives, and whether this rank detected it and has to tell the others.
    explain : callable, optional
        Waits for the reason that other ranks give for the loss of a peer, or for a peer that is in another call, and
        returns it or None; the endpoint does not know it.
    recorder : Recorder, optional
        Records events.
    on_refusal : callable, optional
        Called with the number of a call that this rank does not do, and why, before anything moved.
    """

    def __init__(
        self,
        collectives: NativeCollectives,
        capabilities: Capabilities,
        group: Group,
        rank: int,
        trace: Trace,
        on_failure: Callable[[Exception, bool], None],
        explain: Callable[[], DetcollError | None] = lambda: None,
        recorder: Recorder | None = None,
        on_refusal: Callable[[int, Exception], None] = lambda sequence, error: None,
    ) -> None:
        self._collectives, self._capabilities, self._rank, self._trace = collectives, capabilities, rank, trace
        self._group = group
        self._on_failure, self._explain, self._recorder = on_failure, explain, recorder or Recorder()
        self._on_refusal = on_refusal
        self.refused: Mapping[int, Cause] = {}
        """By number, the calls that other ranks refused; the engine adds to it."""
        self.was_told = False
        """Whether the failure was raised to a caller."""
        self._supported: dict[tuple[str, np.dtype[Any], ReduceOp, int, bool], bool] = {}
        self._current: NativeCall | None = None
        self._latest = -1
        self._turn = threading.Lock()
        self._queue: queue.Queue[tuple[Submission, Work] | None] = queue.Queue(LARGEST_QUEUE)
        self._queued = 0
        self._count = threading.Lock()
        self.failure: Exception | None = None
        """The error that ended the collectives, or None."""
        self._closing = False
        self._thread: threading.Thread | None = None
        """Started with the first call that is queued."""

    @property
    def algorithm(self) -> str:
        """The name of the transport's algorithm."""
        return self._collectives.algorithm

    def supports(self, kind: str, dtype: np.dtype[Any], op: ReduceOp, nbytes: int = 0, *, uneven: bool = False) -> bool:
        """Return whether the transport has a native collective for a call; see `Capabilities.supports`."""
        key = kind, dtype, op, nbytes, uneven
        answer = self._supported.get(key)
        if answer is None:
            if len(self._supported) >= LARGEST_KEPT_ANSWERS:
                self._supported.clear()
            answer = self._supported[key] = self._capabilities.supports(kind, dtype, op, nbytes, uneven=uneven)
        return answer

    def run(self, submission: Submission, work: Work) -> None:
        """Queue a call for the worker thread; ``work`` ends with it.

        Raises
        ------
        Closed
            If the collectives have failed or the job is closing; what failed first, to the first caller after that.
        DeadlineMissed
            If the queue stays full for the timeout of the call.
        """
        with self._count:  # `drain` waits for all counted calls
            self._check_usable()
            self._queued += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="detcoll-native", daemon=True)
                self._thread.start()
        try:
            self._queue.put((submission, work), timeout=submission.call.timeout_ns / 1e9)
        except BaseException as error:
            with self._count:
                self._queued -= 1
            self._say_that_it_closes()
            if isinstance(error, queue.Full):
                kind = submission.call.kind
                text = f"{kind}: the queue is full, {LARGEST_QUEUE} earlier collectives are not finished"
                raise DeadlineMissed(text) from None
            raise

    def run_at_once(
        self, call: NativeCall, called_ns: int, load: Callable[[int], None] | None = None,
        store: Callable[[int], None] | None = None, release: Callable[[], None] | None = None,
    ) -> bool:  # fmt: skip
        """Run a call on this thread and return True, or return False if other calls of the group are pending.

        What is given is what a `Submission` has.

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
            error = self._do(call, called_ns, load, store)
        except BaseException as interrupt:  # ranks may be out of step, so no later call can be trusted to match
            what = f"rank {self._rank} was interrupted in {_title(call)}"
            self._give_up(TransportError(f"{what}: {type(interrupt).__name__}"))
            raise
        finally:
            self._turn.release()
            if release is not None:
                release()
        if error is not None:
            raise error
        return True

    def _check_usable(self) -> None:
        if self.failure is not None and not (self.was_told or self._closing):
            self.was_told = True  # it came since the caller looked whether the group can be used
            raise self.failure
        if self.failure is not None or self._closing:
            reason = "the job is closed" if self.failure is None else f"the group has ended: {self.failure}"
            raise Closed(reason) from self.failure

    @property
    def takes_devices(self) -> bool:
        """Whether the transport copies arrays on devices itself; see `Capabilities`."""
        return self._capabilities.native_devices

    @property
    def latest(self) -> int:
        """The number of the latest call that was begun, or -1."""
        return self._latest

    @property
    def unfinished(self) -> tuple[int, str] | None:
        """The number of the earliest call that has not ended and its state, for people; None if all have ended."""
        call = self._current  # read once, since another thread may end it
        if call is not None:
            return call.sequence, f"is still in call {call.sequence}, {brief(*_called(call))}, {_WITHIN}"
        return (self._latest + 1, "has calls queued for the transport's own collectives") if self._queued else None

    def called(self, sequence: int) -> str:
        """Return what was called with this number, for people."""
        call = self._current
        if call is None or call.sequence != sequence:
            return f"another collective as number {sequence}"
        return brief(*_called(call))

    def fail(self, error: Exception) -> bool:
        """Refuse further calls because of ``error``; return whether a call is under way that does not know it."""
        if self.failure is not None:
            return False
        self.failure = error
        return self._current is not None

    def drain(self, deadline_ns: int) -> bool:
        """Close, and wait for queued calls; at the deadline fail the collectives and return False."""
        self.close()
        thread = self._thread
        if thread is None:
            return True
        thread.join(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
        if thread.is_alive():
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
            submission, work = entry
            with self._turn:
                error = self._do(*submission[:-1])
            if submission.release is not None:
                submission.release()
            with self._count:
                self._queued -= 1
            work.finish(error)

    def _do(
        self, call: NativeCall, called_ns: int, load: Callable[[int], None] | None,
        store: Callable[[int], None] | None,
    ) -> Exception | None:  # fmt: skip
        """Run a call; return the error that ended it, or None on success."""
        error: Exception
        sequence, number = call.sequence, self._group.number
        # Before the looks at what others have ended, which look at these two afterwards: one sees the other.
        self._current, self._latest = call, sequence
        if self.failure is not None:
            self._current, self.was_told = None, True
            return self.failure
        if self.refused and (cause := self.refused.get(sequence)) is not None:
            return self._refuse(sequence, cause.error())
        self._recorder.note(called_ns, "call", number, sequence, detail=_called(call))
        try:
            deadline_ns = time.monotonic_ns() + call.timeout_ns
            if load is not None:
                load(deadline_ns)
            self._collectives.run(call, deadline_ns)
            if store is not None:
                store(deadline_ns)
        except UsageError as problem:  # nothing has moved
            return self._refuse(sequence, problem)
        except DetcollError as problem:
            error = problem
        except Exception as problem:
            error = TransportError(f"{_title(call)} failed: {problem!r}")
            error.__cause__ = problem
        else:
            self._current = None
            self._recorder.note(time.monotonic_ns(), "end", number, sequence)
            if self._trace.recording:
                what = Call(call.kind, call.count * call.array.itemsize, self._collectives.algorithm, group=number)
                self._trace.note_collective(sequence, what, called_ns, time.monotonic_ns())
            return None
        return self._give_up(error)

    def standing(self) -> dict[str, Any]:
        """Return the state of this rank in the group as plain data for its flight record."""
        call, failure, group = self._current, self.failure, self._group
        calls = []
        if call is not None:
            what = f"call {call.sequence}, {brief(*_called(call))}"
            calls.append({
                "sequence": call.sequence, "what": what, "state": f"is {_WITHIN}",
                "waits_for": [],
            })  # fmt: skip
        return {
            "id": "world" if group.id == WORLD_ID else f"{group.id:016x}", "number": group.number, "name": group.name,
            "ranks": list(group.ranks), "latest": self._latest, "failure": None if failure is None else str(failure),
            "calls": calls,
        }  # fmt: skip

    def _refuse(self, sequence: int, error: Exception) -> Exception:
        """Report a call that is not carried out, and return the error to raise."""
        self._current = None
        self._on_refusal(sequence, error)
        return error

    def _give_up(self, error: Exception) -> Exception:
        """Record the failure, report it unless other ranks did, and return the error to raise."""
        self.was_told = True
        if self.failure is not None:  # failed or aborted meanwhile, and this error is a consequence
            return self.failure
        # A rank that refused a call is one call ahead; its message that says so may still be on its way.
        told = self._explain() if isinstance(error, PeerLost) or is_out_of_step(error) else None
        if self.failure is None:
            self.failure = told or error
            self._on_failure(self.failure, told is None)
        return self.failure


def _title(call: NativeCall) -> str:
    return f"{call.kind} number {call.sequence}"


def _called(call: NativeCall) -> Called:
    return call.kind, call.op, call.array.dtype, call.count, call.root, call.arrays, call.name, call.shape
