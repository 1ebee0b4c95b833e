"""Collectives that callbacks make: each callback has an order of its own.

Calls of a group are matched by their number, so all ranks must make them in one order. A callback of a future runs on a
thread of its own, at a moment that differs between ranks, so its calls cannot be counted among those of the program.
They are counted inside the call that the callback belongs to, and carried out by another group of detcoll with the same
ranks, a lane. There are `LANES` for each process group that is used so: calls n and n + 8 share one, in this order. The
calls of a later callback wait there until the callbacks of earlier ones have returned.

The order of calls in a lane depends on the program alone: on the number of the call, on the order in which callbacks
were added to one future, and on what a callback does. Each call carries its number as a name, so if ranks add callbacks
in different orders after all, the call fails instead of giving wrong values.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterator

from detcoll.arguments import LARGEST_NAME_BYTES
from detcoll.communicator import Communicator
from detcoll.errors import DeadlineMissed

LANES = 8
"""How many calls of one group may have callbacks that make collectives at the same time."""


class Scope:
    """The callbacks of one call, or a branch of them, one after another.

    ``root`` : the group of the call.  ``lane`` : names the lane, equal on all ranks.  ``order`` : its place there.
    ``path`` : names these callbacks among all of the root, for the names of calls.
    """

    def __init__(self, root: Communicator, lane: str, order: tuple[int, ...], path: str) -> None:
        self.root, self.lane, self.order, self.path = root, lane, order, path
        self.calls: Counter[Communicator] = Counter()
        self._pending = 0
        self._place = id(root), lane

    @classmethod
    def of_call(cls, root: Communicator, number: int) -> Scope:
        """Return the scope of the callbacks of a call that the program itself made."""
        return cls(root, f"{_key(root)} {number % LANES}", (number,), str(number))

    def inside(self, number: int) -> Scope:
        """Return the scope of the callbacks of a call that these callbacks made."""
        return Scope(self.root, f"{self.lane}>{number % LANES}", (*self.order, number), f"{self.path}>{number}")

    def branch(self, depth: int, index: int) -> Scope:
        """Return the scope of a callback that is not the first one of its future."""
        name = f"/{depth}.{index}"
        return Scope(self.root, self.lane + name, self.order, self.path + name)

    def enter(self) -> None:
        """Take note of a callback that was added."""
        with _changed:
            self._pending += 1
            _open.setdefault(self._place, set()).add(self)

    def leave(self) -> None:
        """Take note of a callback that has returned."""
        with _changed:
            self._pending -= 1
            if not self._pending:
                others = _open[self._place]
                others.discard(self)
                if not others:
                    del _open[self._place]
                _changed.notify_all()

    def await_turn(self, seconds: float) -> None:
        """Wait until the callbacks of earlier calls in this lane have returned."""
        with _changed:
            if not _changed.wait_for(lambda: not self._earlier(), seconds):
                raise DeadlineMissed(
                    f"a callback of call {self.path} made a collective, and the callbacks of call "
                    f"{self._earlier()[0].path} have not returned after {seconds:g} s"
                )

    def _earlier(self) -> list[Scope]:
        return [other for other in _open.get(self._place, ()) if other.order < self.order]


_changed = threading.Condition()
_open: dict[tuple[int, str], set[Scope]] = {}
_here = threading.local()


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
    """The calls of one process group: those of the program in one order, and those of callbacks in their lanes."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._numbers = itertools.count()
        self._made: dict[str, Communicator] = {}
        self._making: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def next(self, seconds: float) -> tuple[Communicator, str, Scope]:
        """Return where the next call of this thread goes, its name, and the scope of its callbacks.

        Parameters
        ----------
        seconds : float
            How long to wait for the callbacks of earlier calls.
        """
        here, own = current(), self._communicator
        if here is None or own._job is not here.root._job or not set(own.ranks) <= set(here.root.ranks):
            return own, "", Scope.of_call(own, next(self._numbers))
        here.await_turn(seconds)
        lane = self._made.get(here.lane) or self._make(here.lane)
        number = here.calls[own]
        here.calls[own] += 1
        return lane, f"{here.path}#{number}", here.inside(number)

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


def _key(communicator: Communicator) -> str:
    """Return what tells a group from the others of its job, equal on all ranks."""
    return f"{communicator._group.id:x}"


def short(name: str) -> str:
    """Return a name of a group or call, or a digest of one that is too long."""
    if len(name) <= LARGEST_NAME_BYTES:
        return name
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
