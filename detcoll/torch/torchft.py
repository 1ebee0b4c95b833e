"""A process group for torchft, which makes it anew whenever replicas come or go.

Give it to torchft's ``Manager`` where you would give ``torchft.ProcessGroupGloo``. Each `configure` aborts the job of
the replicas before, and opens one of those that there are now.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from detcoll.errors import UsageError
from detcoll.torch import devices
from detcoll.torch.process_group import ProcessGroup, create_apart
from detcoll.torch.settings import Options
from detcoll.torch.work import Work

try:
    from torchft.process_group import ProcessGroupWrapper
except ImportError as error:
    raise ImportError("torchft is not installed; install it with: pip install torchft") from error


class ProcessGroupDetcoll(ProcessGroupWrapper):  # type: ignore[misc]
    """A process group of detcoll among replicas, for torchft's ``Manager``.

    Parameters
    ----------
    timeout : timedelta
        How long `configure` waits for the other replicas, and the default timeout of calls.
    options : Options
        Of the job that each `configure` opens.

    Raises
    ------
    UsageError
        If an argument has the wrong type.
    """

    def __init__(self, timeout: timedelta = timedelta(seconds=60), options: Options | None = None) -> None:
        if not isinstance(timeout, timedelta):
            raise UsageError(f"timeout={timeout!r}; expected a datetime.timedelta")
        if options is not None and not isinstance(options, Options):
            raise UsageError(f"options={options!r}; expected a detcoll.torch.Options")
        super().__init__(timeout)
        self._pg: ProcessGroup | None = None
        self._options = options
        self._last: Work | None = None

    def getBackendName(self) -> str:
        """Return the name that torchft shows."""
        return "torchft-detcoll"

    def errored(self) -> Exception | None:
        """Return the error that ended the last call, or None.

        An error that ends the group ends all its calls, so the last call tells.
        """
        return None if self._last is None else self._last.exception()

    def shutdown(self) -> None:
        """Wait for the calls to end and leave the job."""
        group = self._pg
        self._pg = self._last = None
        if group is not None:
            group.shutdown()

    def _create_pg(self, store: Any, rank: int, world_size: int) -> ProcessGroup:
        self._last = None
        return create_apart(store, rank, world_size, self._timeout, self._options, "torchft")

    def _wrap_work(self, work: Any, opts: object) -> Any:
        self._last = work
        return _Call(work)


class _Call(dist.Work):  # type: ignore[misc]
    """A call whose future is torch's own.

    torchft relies on that: the callback that it adds after `wait` has to run at once, not on another thread.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the call has ended; see `Work.wait`."""
        return self._work.wait(timeout)

    def is_completed(self) -> bool:
        """Return whether the call has ended."""
        return self._work.is_completed()

    def is_success(self) -> bool:
        """Return whether the call has ended without an error."""
        return self._work.is_success()

    def exception(self) -> Exception | None:
        """Return the error that ended the call, if there is one by now."""
        return self._work.exception()

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that hold the result."""
        return self._work.result()

    def synchronize(self) -> None:
        """Do nothing, since results on the host need no stream."""

    def block_current_stream(self) -> None:
        """Block until the call has ended, since results on the host have no stream."""
        self.wait()

    def get_future(self) -> torch.futures.Future:
        """Return a future that runs its callbacks at once where the call has ended."""
        future = torch.futures.Future(devices=list(devices.of(self._work.result())))
        if self.is_completed():
            _complete(future, self._work)
        else:
            self._work.get_future().add_done_callback(lambda _: _complete(future, self._work))
        return future


def _complete(future: torch.futures.Future, work: Work) -> None:
    error = work.exception()
    if error is None:
        future.set_result(work.result())
    else:
        future.set_exception(error)
