"""Collectives that callbacks make: each callback has an order of its own.

Calls of a group are matched by their number, so all ranks must make them in one order. A callback of a future runs on a
thread of its own, at a moment that differs between ranks, so its calls cannot be counted among those of the program.
Each callback gets a number when it is added, among those that the program adds to calls of one group, or among those
that one callback adds. Its calls are carried out by another group of detcoll with the same ranks, a lane. There are
`LANES` for each process group that is used so. A callback that is added to what another one returns shares the lane of
that one; each other one takes the next lane. In a lane, the calls of a callback wait until those with lower numbers
have returned.

So the order of calls in a lane depends on the program alone: on the order in which it adds callbacks, and on what they
do, but not on when they run. Each call carries as a name the number of its callback and that of the call to which the
program added it. So if ranks add callbacks in different orders after all, as two threads may that agree only on the
order of calls, the call fails instead of giving wrong values. Nothing else depends on threads: a callback runs on one
thread, and its calls have their numbers before it returns and lets the next one of its lane go on.

A callback of a group that makes a call of a group with other ranks too has no lane for it, since those ranks may not
have this callback. Such a call is counted among those of the program.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator

from detcoll.arguments import LARGEST_NAME_BYTES
from detcoll.communicator import Communicator
from detcoll.errors import DeadlineMissed

LANES = 8
"""How many callbacks of one group may make collectives at the same time, if none was added to what another returns."""


class Scope:
    """A callback, or (with an empty ``order``) the program as far as it makes calls of one group.

    ``root`` : the group.  ``lane`` : names the lane, equal on all ranks.  ``order`` : the number among the callbacks
    that ``outer`` adds, behind the order of that one.  ``path`` : names the callback among all of the root, by these
    numbers and those of the calls to which callbacks were added.
    """

    def __init__(
        self, root: Communicator, lane: str, order: tuple[int, ...] = (), path: str = "", outer: Scope | None = None
    ) -> None:  # fmt: skip
        self.root, self.lane, self.order, self.path, self._outer = root, lane, order, path, outer
        self.calls: Counter[Communicator] = Counter()
        self._added, self._chains = itertools.count(), itertools.count()
        self._place = id(root), lane

    def next(self, before: Scope | None, of: int) -> Scope:
        """Return the scope of a callback that this thread adds now to a call of the program's scope ``self``.

        ``before`` : the callback whose result it gets, if it is the first one to get it.  ``of`` : the number of the
        call.
        """
        here = current()
        return (here if here is not None and here.covers(self.root) else self)._add(before, of)

    def covers(self, group: Communicator) -> bool:
        """Return whether all ranks of a group have the callback."""
        return group._job is self.root._job and set(group.ranks) <= set(self.root.ranks)

    def _add(self, before: Scope | None, of: int) -> Scope:
        if before is not None and before._outer is self:
            lane = before.lane
        else:
            lane = f"{self.lane}>{next(self._chains) % LANES}"
        with _changed:
            number = next(self._added)
            path = f"{self.path}>{number}@{of}" if self.path else f"{number}@{of}"
            added = Scope(self.root, lane, (*self.order, number), path, self)
            _open.setdefault(added._place, set()).add(added)
        return added

    def leave(self) -> None:
        """Take note that the callback has returned."""
        with _changed:
            others = _open.get(self._place, set())
            others.discard(self)
            if not others:
                _open.pop(self._place, None)
            _changed.notify_all()

    def await_turn(self, seconds: float) -> None:
        """Wait until the callbacks before this one in its lane have returned."""
        with _changed:
            if not _changed.wait_for(lambda: not self._earlier(), seconds):
                raise DeadlineMissed(
                    f"callback {self.path} made a collective, and callback {self._earlier()[0].path} has not returned "
                    f"after {seconds:g} s"
                )

    def _earlier(self) -> list[Scope]:
        """Return those that this one waits for; while one of them runs, it may add more to this lane."""
        earlier = [other for other in _open.get(self._place, ()) if other.order < self.order]
        return earlier or ([] if self._outer is None else self._outer._earlier())


_changed = threading.Condition()
_open: dict[tuple[int, str], set[Scope]] = {}
_here = threading.local()


def _forget() -> None:
    """Reset the state in a forked child, which has none of the threads that run callbacks."""
    global _changed, _here
    _changed, _here = threading.Condition(), threading.local()
    _open.clear()


os.register_at_fork(after_in_child=_forget)


def current() -> Scope | None:
    """Return the scope of the callback that this thread runs, or None."""
    scope: Scope | None = getattr(_here, "scope", None)
    return scope


@contextlib.contextmanager
def inside(scope: Scope | None) -> Iterator[None]:
    """Run a body as a callback of a scope."""
    outer, _here.scope = current(), scope
    try:
        yield
    finally:
        _here.scope = outer


class Lanes:
    """The calls of one process group: those of the program in one order, and those of callbacks in their lanes.

    ``program`` : the scope of the program.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.program = Scope(communicator, f"{communicator._group.id:x}")
        self._made: dict[str, Communicator] = {}
        self._making: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def next(self, seconds: float) -> tuple[Communicator, str]:
        """Return where the next call of this thread goes, and its name.

        Parameters
        ----------
        seconds : float
            How long to wait for the callbacks of earlier calls.
        """
        here, own = current(), self._communicator
        if here is None or not here.covers(own):
            return own, ""
        here.await_turn(seconds)
        lane = self._made.get(here.lane) or self._make(here.lane)
        here.calls[own] += 1
        return lane, f"{here.path}#{here.calls[own]}"

    def _make(self, name: str) -> Communicator:
        """Return a new lane; each has a lock of its own, since ranks come to different ones first."""
        with self._lock:
            making = self._making.setdefault(name, threading.Lock())
        with making:
            if name not in self._made:
                self._made[name] = self._communicator.group(range(self._communicator.size), short(f"lane {name}"))
            return self._made[name]

    @property
    def made(self) -> list[Communicator]:
        """The lanes, in an order that is equal on all ranks."""
        return [lane for _, lane in sorted(self._made.items())]


def short(name: str) -> str:
    """Return a name of a group or call, or a digest of one that is too long."""
    if len(name) <= LARGEST_NAME_BYTES:
        return name
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
