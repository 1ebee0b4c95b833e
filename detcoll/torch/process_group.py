"""The process group: what torch asks of every group, and how its calls are carried out."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from detcoll.communicator import Communicator
from detcoll.errors import DeadlineMissed, DetcollError, UsageError
from detcoll.job.caller import Request
from detcoll.torch import devices
from detcoll.torch.jobs import Lease, Members, lease, seconds_of
from detcoll.torch.kinds import Kinds
from detcoll.torch.marking import mark_steps
from detcoll.torch.profiling import profiled
from detcoll.torch.scopes import Lanes, short
from detcoll.torch.settings import Options
from detcoll.torch.untraced import untraced
from detcoll.torch.work import Work, after, all_of
from detcoll.uncaught import show_own_errors_short

log = logging.getLogger("detcoll")

CLOSING_S = 10.0
"""How long a group that is destroyed waits for calls that make no progress, and for the other ranks."""

SHORTEST_S = 0.01
"""The timeout of a monitored barrier whose timeout is zero."""

_KEPT_WORKS = 64 if torch.__version__.startswith(("2.4.", "2.5.", "2.6.")) else 0
"""torch's C++ code does not keep the Python part of a work alive up to 2.6, so the group does."""


@untraced(Kinds)
class ProcessGroup(Kinds, dist.ProcessGroup):  # type: ignore[misc]
    """A process group of torch on a communicator of detcoll; `create` makes it."""

    def __init__(self, lease: Lease, timeout: timedelta, name: str) -> None:
        super().__init__(lease.communicator.rank, lease.communicator.size)
        self._lease, self._timeout, self._name, self._desc = lease, timeout, name, ""
        self._lanes = Lanes(lease.communicator)
        self._coalesced: list[Work] | None = None
        self._latest: deque[Work] = deque(maxlen=_KEPT_WORKS)
        self._unfinished: list[Work] = []

    @property
    def communicator(self) -> Communicator:
        """The communicator that carries out the calls."""
        return self._lease.communicator

    def getBackendName(self) -> str:
        """Return the name under which the backend is registered."""
        return "detcoll"

    name = getBackendName
    _get_backend_name = getBackendName

    def getGroupName(self) -> str:
        """Return the name that torch gave to the group."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """Take the name that torch gives to the group."""
        self._name = name

    def getGroupDesc(self) -> str:
        """Return what the group is for."""
        return self._desc

    def setGroupDesc(self, desc: str) -> None:
        """Take what the group is for."""
        self._desc = desc

    @property
    def bound_device_id(self) -> torch.device | None:
        """None: a group takes tensors of all devices. torch would split one that is bound, to make a mesh."""
        return None

    @bound_device_id.setter
    def bound_device_id(self, device: torch.device | None) -> None:
        """Take no note of it."""

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(kind) for kind in ("cpu", "cuda")[: 1 + _has_cuda()]]

    @property
    def supports_splitting(self) -> bool:
        """False: torch makes groups with `new_group`."""
        return False

    @property
    def supports_coalescing(self) -> bool:
        """False: a batch of sends and receives is a list of calls."""
        return False

    @property
    def supports_time_estimate(self) -> bool:
        """False: see `detcoll.Communicator.predict`."""
        return False

    def _get_backend(self, device: torch.device) -> ProcessGroup:
        kinds = [each.type for each in self._device_types]
        if torch.device(device).type not in kinds:
            raise RuntimeError(f"the backend 'detcoll' has no backend for {device}; expected {' or '.join(kinds)}")
        return self

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: detcoll numbers its calls."""

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self.communicator.timeout = seconds_of(timeout)

    set_timeout = _set_default_timeout

    def shutdown(self) -> None:
        """Wait for the calls to end and leave the group; what goes wrong meanwhile is only logged.

        It waits as long as they make progress, at most for the timeout of the group.
        """
        try:
            self._lease.close(CLOSING_S, seconds_of(self._timeout), self._lanes.made)
        except DetcollError as error:
            log.warning("rank %d: closing the process group %s: %s", self.rank(), self._name, error)

    def abort(self) -> None:
        """End the group on all its ranks, without waiting."""
        self._lease.abort(f"the process group {self._name} was aborted", self._lanes.made)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Block until all ranks have called it, at most for ``timeout``; the error names those that have not.

        torch calls it for Gloo alone, others call it on the group, and expect the error and words that Gloo has.
        """
        seconds = seconds_of(self._timeout if timeout is None else timeout)
        try:
            self.communicator.barrier(timeout=max(seconds, SHORTEST_S))
        except DeadlineMissed as error:
            raise dist.DistError(f"Rank {self.rank()} timed out in monitoredBarrier: {error}") from error

    def _start_coalescing(self, device: torch.device | None = None) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device | None = None) -> Work:
        works, self._coalesced = self._coalesced or [], None
        return all_of(works)

    start_coalescing, end_coalescing = _start_coalescing, _end_coalescing

    def _run(
        self, kind: str, check: Callable[[], Request], result: list[Tensor], opts: Any, name: str
    ) -> Work:  # fmt: skip
        """Make a call: at once if torch waits for it, else in the background."""
        return profiled(kind, lambda: self._call(kind, check, result, opts, name))

    def _call(
        self, kind: str, check: Callable[[], Request], result: list[Tensor], opts: Any, name: str
    ) -> Work:  # fmt: skip
        timeout = _timeout(opts)
        if timeout is None:
            timeout = self.communicator.timeout  # a lane does not know of it
        communicator, label = self._lanes.next(timeout)
        is_async = getattr(opts, "asyncOp", True)
        called = short(f"{label} {name}".strip()) if label else name
        self._catch_up()
        devices.begin()
        inner = communicator._run(kind, check, is_async, timeout, called)
        work, leftover = Work((inner,) if is_async else (), result, self._lanes.program), devices.taken()
        if leftover is not None:
            work = after(work, leftover)
            if is_async:
                self._unfinished.append(work)
            else:
                work.wait()
        return self._kept(work)

    def _catch_up(self) -> None:
        """End calls that leave results to be copied into place, which the next call may use."""
        while self._unfinished:
            with contextlib.suppress(DetcollError, IndexError):  # who waits for it hears of it
                self._unfinished.pop().wait()

    def _kept(self, work: Work) -> Work:
        self._latest.append(work)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work


def _has_cuda() -> bool:
    return devices.TAKES_CUDA and torch.cuda.is_available()


def create(*arguments: Any) -> ProcessGroup:
    """Return the process group for what torch passes to a backend.

    That is torch's object of options and those of the user, or what `create_apart` takes.
    """
    if len(arguments) >= 3:
        return create_apart(*arguments)
    given, options = arguments[0], arguments[1] if len(arguments) > 1 else None
    if not isinstance(options, Options | None):
        raise UsageError(f"pg_options={options!r}; expected a detcoll.torch.Options")
    ranks, size = tuple(given.global_ranks_in_group), given.group_size
    if ranks:
        members = Members(ranks, dist.get_world_size(), given.group_rank, given.group_id, "part")
    else:
        members = Members(tuple(range(size)), size, given.group_rank, given.group_id, "default")
    mark_steps()
    show_own_errors_short()
    leased = lease(members, given.store, given.timeout, options or Options())
    return ProcessGroup(leased, given.timeout, given.group_id)


def create_apart(
    store: Any, rank: int, size: int, timeout: timedelta = timedelta(minutes=30), options: Options | None = None,
    name: str = "",
) -> ProcessGroup:  # fmt: skip
    """Return a process group of ranks that have nothing to do with torch's default group; it opens its own job."""
    members = Members(tuple(range(size)), size, rank, name, "apart")
    return ProcessGroup(lease(members, store, timeout, options or Options()), timeout, name)


def communicator(group: Any = None) -> Communicator:
    """Return the communicator behind a process group, by default torch's default group.

    Raises
    ------
    UsageError
        If the group is not one of the backend ``"detcoll"``.
    """
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, ProcessGroup):
        raise UsageError(f"group={group!r} is not a process group of the backend 'detcoll'")
    return found.communicator


def _timeout(opts: Any) -> float | None:
    """Return the timeout of a call in seconds, or None for that of the group."""
    timeout = opts if isinstance(opts, timedelta) else getattr(opts, "timeout", None)
    return seconds_of(timeout) if timeout is not None and timeout.total_seconds() > 0 else None
