"""What torch gets for a call: a work and, where it asks, a future."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch._C._distributed_c10d import Work as _TorchWork

from detcoll import runtime
from detcoll.torch import completion
from detcoll.torch.scopes import Scope, inside


class Future(torch.futures.Future):  # type: ignore[misc]
    """The result of a call or of a callback.

    Callbacks always run on threads of `completion`, each in a scope of its own.  ``program`` : the scope of the program
    in the group of the call.  ``scope`` : of the callback whose result this is.
    """

    def __init__(self, program: Scope | None, scope: Scope | None = None) -> None:
        super().__init__()
        self._program, self._before = program, scope

    def then(self, callback: Callable[[Future], Any]) -> Future:
        """Return the future of what ``callback`` returns, which is called with this future when it has completed."""
        scope = self._scope_of_next()
        child = Future(self._program, scope)

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
        self.set_result(_Failure(error))

    def _scope_of_next(self) -> Scope | None:
        """Return the scope of a callback that is added now."""
        before, self._before = self._before, None  # the first one alone goes on where that one was
        return None if self._program is None else self._program.next(before)

    def _call(self, callback: Callable[[], Any], scope: Scope | None) -> None:
        def run() -> None:
            try:
                with inside(scope):
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
    it, where this raises the error. After a hook in Python it tells what is no tensor instead.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> NoReturn:
        raise self.error

    def __repr__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


class Work(_TorchWork):
    """A call under way, or one that has ended (``inner`` is None).

    ``result`` : the tensors that hold the result.  ``program`` : the scope of the program in its group; None for send
    and recv, whose callbacks ranks do not count alike.
    """

    def __init__(
        self, inner: runtime.Work | None, result: list[torch.Tensor], program: Scope | None, source: int = -1
    ) -> None:
        super().__init__()
        self._inner, self._result, self._program, self._source = inner, result, program, source
        self._future: Future | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the call has ended, at most for ``timeout`` unless that is zero; return True.

        Raises
        ------
        DetcollError
            The error that ended the call, or `DeadlineMissed` if ``timeout`` passes first.
        """
        if self._inner is not None:
            seconds = 0.0 if timeout is None else timeout.total_seconds()
            self._inner.wait(seconds if seconds > 0 else None)
        return True

    def is_completed(self) -> bool:
        """Return whether the call has ended."""
        return self._inner is None or self._inner.done()

    def is_success(self) -> bool:
        """Return whether the call has ended without an error."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        """Return the error that ended the call, if there is one by now."""
        return None if self._inner is None or not self._inner.done() else self._inner.exception()

    def error(self) -> Exception | None:
        """Block until the call has ended, and return the error that ended it, or None."""
        return None if self._inner is None else self._inner.exception()

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that hold the result."""
        return self._result

    def synchronize(self) -> None:
        """Do nothing, since results on the host need no stream."""

    def block_current_stream(self) -> None:
        """Do nothing, since results on the host need no stream."""
        self.wait()

    def source_rank(self) -> int:
        """Return the rank of the group that a received message came from."""
        source = self._inner.source if self._inner is not None else None
        return self._source if source is None else source

    _source_rank = source_rank

    def get_future(self) -> Future:
        """Return the future of this call, always the same."""
        if self._future is None:
            future = self._future = Future(self._program)
            inner, result = self._inner, self._result
            if inner is None:
                future.set_result(result)
            else:
                inner.notify(lambda: completion.run(lambda: _complete(future, inner, result)))
        return self._future


def _complete(future: Future, ended: runtime.Work, result: list[torch.Tensor]) -> None:
    error = ended.exception()
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def all_of(works: Sequence[Work]) -> Work:
    """Return a work that ends with several calls."""
    return works[0] if len(works) == 1 else _Together(works)


class _Together(Work):
    """Several calls as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        super().__init__(None, [each for work in works for each in work.result()], works[0]._program if works else None)
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until all calls have ended; see `Work.wait`. Each is given ``timeout``."""
        for work in self._works:
            work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        """Return whether all calls have ended."""
        return all(work.is_completed() for work in self._works)

    def exception(self) -> Exception | None:
        """Return the first error that ended one of the calls, if there is one by now."""
        return next((error for work in self._works if (error := work.exception()) is not None), None)

    def error(self) -> Exception | None:
        """Block until all calls have ended, and return the first error that ended one, or None."""
        return next((error for work in self._works if (error := work.error()) is not None), None)

    def get_future(self) -> Future:
        """Return the future of all calls."""
        if self._future is None:
            future = self._future = Future(self._program)

            def complete() -> None:
                error = self.error()
                if error is None:
                    future.set_result(self._result)
                else:
                    future.set_exception(error)

            completion.run(complete)
        return self._future


class Followed(_Together):
    """Several calls, and what is done once they have ended well: by the first who waits, or else by a thread."""

    def __init__(self, works: Sequence[Work], follow: Callable[[], object], result: list[torch.Tensor]) -> None:
        super().__init__(works)
        self._result, self._follow = result, follow
        self._following, self._is_done = threading.Lock(), False

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until all is done; see `Work.wait`."""
        super().wait(timeout)
        with self._following:
            if not self._is_done:
                self._follow()
                self._is_done = True
        return True

    def is_completed(self) -> bool:
        """Return whether all is done; does what is left where all calls have ended."""
        return super().is_completed() and (self.exception() is not None or self.wait())

    def error(self) -> Exception | None:
        """Block until all is done, and return the first error that ended a call, or None."""
        error = super().error()
        if error is None:
            self.wait()
        return error
