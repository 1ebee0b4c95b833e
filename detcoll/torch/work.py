"""What torch gets for a call: a work and, where it asks, a future."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch._C._distributed_c10d import Work as _TorchWork

from detcoll import runtime
from detcoll.torch import completion, devices
from detcoll.torch.scopes import Scope, inside


class Future(torch.futures.Future):  # type: ignore[misc]
    """The result of a call or of a callback.

    Callbacks always run on threads of `completion`, each in a scope of its own.  ``program`` : the scope of the program
    in the group of the call.  ``of`` : the number of the call.  ``scope`` : of the callback whose result this is.
    ``on`` : the devices of its tensors. There callbacks run on streams of their own, which wait for what this holds.
    """

    def __init__(
        self, program: Scope | None, of: int = -1, scope: Scope | None = None, on: Sequence[torch.device] = ()
    ) -> None:  # fmt: skip
        super().__init__(devices=list(on))
        self._program, self._of, self._before, self._on = program, of, scope, on

    def then(self, callback: Callable[[Future], Any]) -> Future:
        """Return the future of what ``callback`` returns, which is called with this future when it has completed."""
        scope = self._scope_of_next()
        child = Future(self._program, self._of, scope, self._on)

        def run() -> None:
            try:
                result = callback(self)
            except BaseException as error:  # whatever ends a callback, who waits for the child must hear of it
                child.set_exception(_as_exception(error))
            else:
                child.set_result(result)

        self._call(run, scope)
        return child

    def add_done_callback(self, callback: Callable[[Future], Any]) -> None:
        """Call ``callback`` with this future when it has completed."""
        self._call(lambda: callback(self), self._scope_of_next())

    def set_exception(self, error: Exception) -> None:
        """Complete the future with an error, which `wait` and `value` raise."""

        def fail(_: object) -> NoReturn:
            raise error

        self._set_unwrap_func(fail)
        self.set_result(_Failure(error, is_looked_at=bool(self._on)))

    def _scope_of_next(self) -> Scope | None:
        """Return the scope of a callback that is added now."""
        before, self._before = self._before, None  # the first one alone goes on where that one was
        return None if self._program is None else self._program.next(before, self._of)

    def _call(self, callback: Callable[[], Any], scope: Scope | None) -> None:
        def run() -> None:
            try:
                with inside(scope), devices.streams(self._on):
                    if self._on:
                        with contextlib.suppress(Exception):  # the callback hears of it
                            self.wait()
                    callback()
            finally:
                if scope is not None:
                    scope.leave()

        super().add_done_callback(lambda _: completion.run(run))


def _as_exception(error: BaseException) -> Exception:
    """Return an error that may be raised to who waits: not one that would end that thread or program."""
    if isinstance(error, Exception):
        return error
    said = f"a callback of a collective raised {type(error).__name__}: {error}"
    wrapped = RuntimeError(said.rstrip(": "))
    wrapped.__cause__ = error
    return wrapped


class _Failure:
    """The value of a future that has failed.

    torch's own code in C++ does not see an error that Python has set. It looks for the tensors in the value by pickling
    it, where this raises the error. After a hook in Python it tells what is no tensor instead.  ``is_looked_at`` :
    whether a future is to hold it that has devices, and looks so itself first.
    """

    def __init__(self, error: Exception, *, is_looked_at: bool = False) -> None:
        self.error, self._is_looked_at = error, is_looked_at

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._is_looked_at:
            raise self.error
        self._is_looked_at = False
        return str, ()  # something without a tensor

    def __repr__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


class Work(_TorchWork):
    """Calls under way, as one; none of them if they have ended well already.

    ``calls`` : what is waited for.  ``result`` : the tensors that hold the result.  ``program`` : the scope of the
    program in the group of the calls; None for send and recv, whose callbacks ranks do not count alike.  ``follow`` :
    what is left to do once all calls have ended well; done once, by the first who waits, or else by a thread.
    """

    def __init__(
        self, calls: Sequence[runtime.Work], result: list[torch.Tensor], program: Scope | None,
        follow: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._calls, self._result, self._program, self._follow = calls, result, program, follow
        self._following = threading.Lock()
        self._future: Future | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until all calls have ended, at most for ``timeout`` each unless that is zero; return True.

        Raises
        ------
        DetcollError
            The error that ended a call, or `DeadlineMissed` if ``timeout`` passes first.
        """
        seconds = 0.0 if timeout is None else timeout.total_seconds()
        for call in self._calls:
            call.wait(seconds if seconds > 0 else None)
        if self._follow is not None:
            with self._following:
                if self._follow is not None:
                    self._follow()
                    self._follow = None
        return True

    def is_completed(self) -> bool:
        """Return whether all is done; does what is left where all calls have ended."""
        return all(call.done() for call in self._calls) and (self.exception() is not None or self.wait())

    def is_success(self) -> bool:
        """Return whether all is done without an error."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        """Return the first error that ended a call, if there is one by now."""
        ended = (call.exception() for call in self._calls if call.done())
        return next((error for error in ended if error is not None), None)

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that hold the result."""
        return self._result

    def synchronize(self) -> None:
        """Do nothing, since calls that have ended have done with all memory, also on devices."""

    def block_current_stream(self) -> None:
        """Block until the calls have ended, since they end on the host."""
        self.wait()

    def source_rank(self) -> int:
        """Return the rank of the group that a received message came from; -1 of anything else."""
        source = self._calls[0].source if len(self._calls) == 1 else None
        return -1 if source is None else source

    _source_rank = source_rank

    def get_future(self) -> Future:
        """Return the future of these calls, always the same."""
        if self._future is None:
            number, on = self._calls[0].sequence if self._calls else -1, devices.of(self._result)
            future = self._future = Future(self._program, number, on=on)

            def complete() -> None:
                with devices.streams(on):
                    self._complete(future)

            if self._calls:
                _after(self._calls, lambda: completion.run(complete))
            else:
                self._complete(future)
        return self._future

    def _complete(self, future: Future) -> None:
        """Complete the future of calls that have ended."""
        error = self.exception()
        if error is None:
            try:
                self.wait()
            except Exception as trouble:
                error = trouble
        if error is None:
            future.set_result(self._result)
        else:
            future.set_exception(error)


def _after(calls: Sequence[runtime.Work], notice: Callable[[], object]) -> None:
    """Call ``notice`` on the thread that ends the last one of some calls, or at once if they have ended."""
    left = itertools.count(len(calls) - 1, -1)

    def ended() -> None:
        if next(left) == 0:
            notice()

    for call in calls:
        call.notify(ended)


def all_of(
    works: Sequence[Work], follow: Callable[[], object] | None = None, result: list[torch.Tensor] | None = None
) -> Work:  # fmt: skip
    """Return a work that ends with several, and with what is left to do after them; by default it has their results."""
    if len(works) == 1 and follow is None:
        return works[0]
    calls = [call for work in works for call in work._calls]
    given = [each for work in works for each in work.result()] if result is None else result
    left = [work for work in works if work._follow is not None]

    def finish() -> None:
        for work in left:
            work.wait()
        if follow is not None:
            follow()

    return Work(calls, given, works[0]._program if works else None, finish if left else follow)


def after(work: Work, leftover: devices.Leftover | None) -> Work:
    """Return a work that ends when what is left to do after ``work`` is done too."""
    return work if leftover is None else all_of([work], leftover.finish)
