"""Reductions inside a site that its devices do among themselves, by NCCL.

A call of a group has two steps of this kind (`detcoll.plan.rails`): the site reduces, and at the end it gathers. NCCL
pairs calls by their order alone, and waits without end for a rank that does not come. So:

- A step begins when all ranks of the site have said that they made the same call (`Engine`), and when the caller's
  stream has come to it. Nothing is ever queued on a device that waits for something else there.
- Calls go to NCCL in the order in which this rank made them. A rank that leaves one out never gives NCCL another one:
  whatever ends a call early ends its group. So NCCL never pairs different calls.
- There are two cliques, one for each of the two steps, so that one call reduces while an earlier one is on the line.
  Each has one step under way at a time; so steps of the one never wait for steps of the other.
- A group that ends aborts NCCL first. Its callers hear of the end when the device uses their arrays no more.

::

    callers' threads    add ----------> lanes, in order
    progress thread     begin --------> step may begin          <---- its end: `OnSiteCall.begin`
                        ended with an error -> abort NCCL, then the caller hears of it
    thread of OnSite    cliques are made with the first call; start, ask whether events are past

The cliques are made when the first call has been agreed on, since ranks that call differently would not meet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from detcoll.device import DeviceBuffer, Driver, Gate
from detcoll.device.gate import wait_until
from detcoll.device.nccl import Clique, Library, Part, host_id
from detcoll.device.shares import parts_to_all_reduce, parts_to_gather, parts_to_reduce, share_of
from detcoll.errors import DetcollError, DeviceError, TransportError, UsageError
from detcoll.priority import shorten_turns
from detcoll.runtime.work import Work

log = logging.getLogger("detcoll")

LONGEST_MAKING_NS = 60 * 10**9
"""How long the ranks of a site try to make their cliques; all of them are known to be there."""
PATIENCE_NS = 2 * 10**9
"""How long an error of NCCL waits for its cause: it may be a rank that was lost, and the engine says which."""
LONGEST_SETTLING_NS = 10 * 10**9
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 1e-3
_LONGEST_CLOSING_S = 5.0


class Introduction(msgspec.Struct, frozen=True):
    """What the ranks of a site tell each other before their cliques are made.

    ``device`` : the host as NCCL sees it, and where the device is attached.  ``ids`` : of the first rank, in hex.
    ``problem`` : why this rank cannot.
    """

    device: str
    version: int
    ids: tuple[str, ...] = ()
    problem: str = ""


@dataclass(eq=False, slots=True)
class _Step:
    """What a lane does for one call: ``may_begin`` once the engine said so; ``done`` is called when it is over.

    ``is_begun`` : whether the device may be using the call's array.
    """

    parts: Sequence[Part]
    gates: Sequence[Gate]
    owner: object
    may_begin: bool = False
    is_begun: bool = False
    done: Callable[[], None] | None = None


class _Lane:
    """A clique, its stream, and the steps that it carries out, one at a time and in order.

    ``claims`` : asked whether a step may still begin, and takes note that it does.
    """

    def __init__(self, cuda: Driver, device: int, claims: Callable[[_Step], bool]) -> None:
        self.steps: deque[_Step] = deque()
        self.clique: Clique | None = None
        self._cuda, self._device, self._claims = cuda, device, claims
        self._stream = cuda.stream(device)
        self._under_way: _Step | None = None
        self._event: int | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way, or may begin."""
        return self._under_way is not None or bool(self.steps and self.steps[0].may_begin)

    def advance(self) -> bool:
        """Begin and end what may; return whether a step ended."""
        if not self.is_busy:
            return False
        assert self.clique is not None
        if self._under_way is None:
            if not (all(gate.is_open() for gate in self.steps[0].gates) and self._claims(self.steps[0])):
                return False
            self._under_way = self.steps.popleft()
            with self._cuda.on(self._device):
                self.clique.start(self._under_way.parts, self._stream)
        if not self.clique.is_settled():
            return False
        with self._cuda.on(self._device):
            if self._event is None:
                self._event = self._cuda.take_event(self._device)
                self._cuda.record(self._event, self._stream)
            if not self._cuda.is_past(self._event):
                return False
        self._cuda.give_event(self._device, self._event)
        self._under_way.is_begun = False
        step, self._under_way, self._event = self._under_way, None, None
        assert step.done is not None
        step.done()
        return True

    def abort(self) -> None:
        """End what is under way, wait until the device has stopped it, and give all up. Raises nothing."""
        clique, self.clique = self.clique, None
        has_stopped = self._under_way is None
        try:
            with self._cuda.on(self._device):
                if clique is not None:
                    clique.abort()
                if not has_stopped:
                    event = self._cuda.take_event(self._device)
                    self._cuda.record(event, self._stream)
                    deadline_ns = time.monotonic_ns() + LONGEST_SETTLING_NS
                    has_stopped = wait_until(partial(self._cuda.is_past, event), deadline_ns)
                    self._cuda.give_event(self._device, event)
                self._cuda.destroy_stream(self._stream)
        except Exception as error:  # callers wait for the end of this
            log.warning("NCCL on cuda:%d was not given up: %r", self._device, error)
        if self._under_way is not None and not has_stopped:
            _abandoned.append(self._under_way.owner)
        if self._event is not None:
            self._cuda.give_event(self._device, self._event)
        self._under_way, self._event = None, None
        self.steps.clear()


_abandoned: list[object] = []
"""Owners of memory that a device may still use although nobody waits for it any more."""


class OnSiteCall:
    """One call: hands its two steps to the lanes, and keeps its caller's `Work` until the device is through.

    ``share`` : what this rank has of the array between the steps.  ``work`` : what the caller waits for.
    ``inner`` : what the engine ends.
    """

    def __init__(self, onsite: OnSite, share: DeviceBuffer, steps: Sequence[_Step], work: Work, inner: Work) -> None:
        self.share, self.work, self.inner = share, work, inner
        self._onsite, self._steps = onsite, steps

    def begin(self, reduces: bool, done: Callable[[], None]) -> None:
        """Let the first or the last step begin; ``done`` is called when it is over."""
        self._onsite._begin(self._steps[0 if reduces else -1], done)

    @property
    def is_on_device(self) -> bool:
        """Whether the device may be using the array."""
        return any(step.is_begun for step in self._steps)


@dataclass(slots=True)
class _Trouble:
    error: Exception
    until_ns: int


@dataclass(slots=True)
class _State:
    """What threads share, under the lock of `OnSite`.

    ``is_ending`` : a call has failed, or the group is closed.  ``ended`` : failed calls whose callers wait.
    """

    has_news: bool = False
    is_ending: bool = False
    is_over: bool = False
    ended: list[tuple[OnSiteCall, Exception]] = field(default_factory=list)


class OnSite:
    """The devices of this rank's site, in one group.

    Parameters
    ----------
    mates : sequence of int
        The ranks of the site, as ranks of the job.
    rank : int
        This rank of the job.
    sites : int
        The number of sites.
    cuda : callable
        Returns the driver.
    library : callable
        Returns NCCL.
    meet : callable
        Tells the mates something by a deadline, and returns what all of them say, in their order.
    failed : callable
        Called with an error that ends the group.
    """

    def __init__(
        self, mates: Sequence[int], rank: int, sites: int, cuda: Callable[[], Driver], library: Callable[[], Library],
        meet: Callable[[bytes, int], list[bytes]], failed: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self.mates, self.place = tuple(mates), tuple(mates).index(rank)
        self.device: int | None = None
        """Of the arrays of all calls; None before the first one."""
        self._sites, self._cuda, self._library, self._meet, self._failed = sites, cuda, library, meet, failed
        self._lanes: tuple[_Lane, ...] = ()
        self._shared, self._changed = _State(), threading.Condition()
        self._thread: threading.Thread | None = None
        self._trouble: _Trouble | None = None
        self._is_making = False

    def add(
        self, buffer: DeviceBuffer, dtype: str, op: str, gates: Sequence[Gate], work: Work, inner: Work
    ) -> OnSiteCall:  # fmt: skip
        """Take in the next call, in the order in which this rank makes them.

        Raises
        ------
        UsageError
            If its array is on another device than those before.
        DeviceError
            If the device cannot be used.
        """
        if self.device not in (None, buffer.device):
            raise UsageError(
                f"x is on cuda:{buffer.device}, arrays of earlier calls were on cuda:{self.device}; expected one "
                "device for a group, with DETCOLL_NCCL=1"
            )
        size, place = len(self.mates), self.place
        if self._sites == 1:
            parts = [list(parts_to_all_reduce(buffer, dtype, op))]
        else:
            parts = [
                list(parts_to_reduce(buffer, size, place, dtype, op)),
                list(parts_to_gather(buffer, size, place, dtype)),
            ]
        steps = [_Step(part, gates if not number else (), buffer.owner) for number, part in enumerate(parts)]
        call = OnSiteCall(self, share_of(buffer, size, place), steps, work, inner)
        with self._changed:
            if self._thread is None:
                self.device = buffer.device
                self._lanes = tuple(_Lane(self._cuda(), buffer.device, self._claims) for _ in steps)
                self._thread = threading.Thread(target=self._serve, name="detcoll-nccl", daemon=True)
                self._thread.start()
            for lane, step in zip(self._lanes, steps, strict=True):
                lane.steps.append(step)
        inner.notify(partial(self._ended, call))
        return call

    def close(self) -> None:
        """Give NCCL up; what is under way is aborted. All ranks have done with the group, or it has failed."""
        with self._changed:
            self._shared.is_ending = self._shared.has_news = True
            self._changed.notify()
        if self._thread is not None and not self._is_making:  # which ends with the job's session
            self._thread.join(_LONGEST_CLOSING_S)

    # On the progress thread.

    def _begin(self, step: _Step, done: Callable[[], None]) -> None:
        with self._changed:
            step.done, step.may_begin = done, True
            self._shared.has_news = True
            self._changed.notify()

    def _ended(self, call: OnSiteCall) -> None:
        """Let the caller hear how its call ended, with an error only when the device uses its array no more."""
        error = call.inner.exception(0)
        with self._changed:
            if error is not None:
                self._shared.is_ending = self._shared.has_news = True
                self._changed.notify()
                if call.is_on_device and not self._shared.is_over:
                    self._shared.ended.append((call, error))
                    return
        call.work.finish(error)

    # On the thread of this object.

    def _serve(self) -> None:
        shorten_turns()
        since_s = time.monotonic()
        while not self._shared.is_ending:
            has_ended = False
            try:
                has_ended = self._advance()
            except Exception as error:
                self._note(error)
            if self._pause(time.monotonic() - since_s) or has_ended:
                since_s = time.monotonic()
        for lane in self._lanes:
            lane.abort()
        with self._changed:
            self._shared.is_over = True
            ended, self._shared.ended = self._shared.ended, []
        for call, reason in ended:
            call.work.finish(reason)

    def _claims(self, step: _Step) -> bool:
        """Take note that a step begins, unless the group ends."""
        with self._changed:
            step.is_begun = not self._shared.is_ending
            return step.is_begun

    def _advance(self) -> bool:
        """Do what can be done, and return whether a step ended."""
        if self._trouble is not None:
            if time.monotonic_ns() >= self._trouble.until_ns:
                self._trouble.until_ns = time.monotonic_ns() + LONGEST_MAKING_NS
                self._failed(self._trouble.error)
            return False
        if self._lanes[0].clique is None:
            if not self._lanes[0].is_busy:
                return False
            self._is_making = True
            try:
                self._make()
            finally:
                self._is_making = False
        return any([lane.advance() for lane in self._lanes])

    def _note(self, error: Exception) -> None:
        told: Exception = error
        if not isinstance(error, DetcollError):
            told = TransportError(f"NCCL in the site failed: {error!r}")
            told.__cause__ = error
        is_ours = isinstance(error, DeviceError | UsageError)
        self._trouble = _Trouble(told, time.monotonic_ns() + (0 if is_ours else PATIENCE_NS))

    def _pause(self, idle_s: float) -> bool:
        """Wait for news and return whether there are; with steps under way at most an eighth of the time so far."""
        is_busy = self._trouble is not None or any(lane.is_busy for lane in self._lanes)
        with self._changed:
            if not self._shared.has_news:
                pause_s = min(max(idle_s / 8, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S) if is_busy else None
                self._changed.wait(pause_s)
            has_news, self._shared.has_news = self._shared.has_news, False
        return has_news

    def _make(self) -> None:
        """Make the cliques, with all ranks of the site.

        Raises
        ------
        UsageError
            If a rank cannot, or two share a device; all ranks raise it.
        TransportError
            If ranks do not come, or NCCL fails.
        """
        deadline_ns = time.monotonic_ns() + LONGEST_MAKING_NS
        library, mine = self._introduce()
        told = [
            msgspec.json.decode(each, type=Introduction)
            for each in self._meet(msgspec.json.encode(mine), deadline_ns)
        ]  # fmt: skip
        self._check(told)
        assert library is not None
        assert self.device is not None
        for lane, unique_id in zip(self._lanes, told[0].ids, strict=True):
            with self._cuda().on(self.device):
                clique = library.join(bytes.fromhex(unique_id), len(self.mates), self.place, self.device)
            lane.clique = clique  # from here on it is aborted if something fails
            if not wait_until(lambda: self._shared.is_ending or clique.is_settled(), deadline_ns):  # noqa: B023 - called here
                raise TransportError(f"NCCL did not connect the ranks {self.mates} of the site within 60 s")

    def _introduce(self) -> tuple[Library | None, Introduction]:
        assert self.device is not None
        cuda = self._cuda()
        try:
            library = self._library()
            with cuda.on(self.device):
                ids = tuple(library.unique_id().hex() for _ in self._lanes) if not self.place else ()
                return library, Introduction(f"{host_id()}, {cuda.pci_bus_id(self.device)}", library.version, ids)
        except (DetcollError, ImportError) as error:
            return None, Introduction("", 0, problem=str(error))

    def _check(self, told: Sequence[Introduction]) -> None:
        """Raise the same error on all ranks if NCCL cannot be used."""
        hint = "Without DETCOLL_NCCL=1 detcoll does without NCCL"
        for rank, each in zip(self.mates, told, strict=True):
            if each.problem:
                raise UsageError(f"rank {rank} cannot use NCCL: {each.problem}. {hint}")
            if each.version != told[0].version:
                raise UsageError(
                    f"rank {self.mates[0]} has NCCL {told[0].version}, rank {rank} {each.version}; expected one version"
                )
        owners: dict[str, int] = {}
        for rank, each in zip(self.mates, told, strict=True):
            other = owners.setdefault(each.device, rank)
            if other != rank:
                raise UsageError(
                    f"ranks {other} and {rank} share the device {each.device}; NCCL needs one for each rank. {hint}"
                )


def takes(op: Any, dtype: str, size: int, sites: int) -> bool:
    """Tell whether NCCL keeps what is promised of an operation, in sites of ``size`` ranks.

    Floats are left to detcoll where it promises more: NaN of minimum and maximum, float32 for sums of more than two
    16-bit floats, and averages that divide once; across sites, the last fold divides.
    """
    is_float, is_half = dtype in ("float32", "float64"), dtype in ("float16", "bfloat16")
    if op.value == "avg":
        return is_float and sites > 1
    if op.value in ("sum", "prod"):
        return is_float or dtype in _INTEGERS or (is_half and size == 2)
    return op.value in ("min", "max") and dtype in _INTEGERS


_INTEGERS = frozenset({"int8", "uint8", "int32", "uint32", "int64", "uint64"})
