"""The machine: walks one rank's plan, without a clock, a socket or an array.

`Machine` keeps the graph: told that a step has ended, it answers with the steps that may start now. `Slots` keeps the
line: sends that need the wide area queue there, and it answers, for a time given as argument, which of them go into
the current or the next window of this rank, and when to ask again. Both are pure state machines; the runtime carries
their answers out on real endpoints, the simulator on modelled links, and tests step through them in virtual time.

::

    start/ended -> Machine -> SEND local, RECV, FOLD ----------------> runtime or simulator
                           -> SEND wide -> Slots.add, Slots.due(now) -> send with a Window
                                           Slots.next_ns(now) <- when to call due again
                                           Slots.sent / missed <- what became of them

Times are nanoseconds of the rank's local monotonic clock; `Slots.offset_ns` is what the site's clock adds to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from detcoll.errors import PlanError
from detcoll.plan.calendar import Calendar, Slotting
from detcoll.plan.ir import Plan
from detcoll.transport import Window

Item = TypeVar("Item")

SMALLEST_REST_NS = 20_000
"""A window with less than this left is not worth starting."""

LARGEST_MISSES = 65_536
"""Missed windows that are remembered one by one, the oldest go first."""

FROM_NOW = -1

CALENDAR, OFF = Slotting.CALENDAR, Slotting.OFF
"""What every wide send is compared with: to look a member up in its class takes ten times as long."""


class Machine:
    """Progress through one plan.

    Parameters
    ----------
    plan : Plan
        This rank's part.
    """

    __slots__ = ("_blocked_by", "_left", "_left_for_result", "_retained", "_under_way", "plan")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._blocked_by = list(plan.blocked_by)
        self._retained = plan.retained
        self._left = len(self._retained)
        self._left_for_result = self._left - sum(self._retained)
        self._under_way: set[int] = set()

    @property
    def done(self) -> bool:
        """Whether every step has ended, so that scratch may be used again."""
        return self._left == 0

    @property
    def result_ready(self) -> bool:
        """Whether the caller's array is finished and nothing reads or writes it any more."""
        return self._left_for_result == 0

    @property
    def under_way(self) -> frozenset[int]:
        """The steps that were started and have not ended."""
        return frozenset(self._under_way)

    def start(self) -> list[int]:
        """Return the steps that wait for nothing."""
        ready = [step for step, count in enumerate(self._blocked_by) if count == 0]
        self._under_way.update(ready)
        return ready

    def ended(self, step: int) -> list[int]:
        """Take note that ``step`` has ended and return the steps that may start now."""
        self._under_way.remove(step)
        self._left -= 1
        self._left_for_result -= not self._retained[step]
        ready = []
        for following in self.plan.followers[step]:
            self._blocked_by[following] -= 1
            if not self._blocked_by[following]:
                ready.append(following)
        self._under_way.update(ready)
        return ready

    def waiting_for(self) -> dict[int, int]:
        """Return how many messages are awaited from each peer, for the error that a missed deadline shows."""
        awaited: dict[int, int] = {}
        for step in self._under_way:
            peer = self.plan.columns.peer[step]
            if peer >= 0:
                awaited[peer] = awaited.get(peer, 0) + 1
        return awaited


@dataclass(slots=True)
class Queued(Generic[Item]):
    """A wide send that waits for its turn: whose it is, where to, and how much of it is left.

    ``sent_bytes`` have left in earlier windows. ``fits``: when last given out, all of it should have left.
    """

    item: Item
    destination_site: int
    peer: int
    nbytes: int
    sent_bytes: int = 0
    fits: bool = True


@dataclass(slots=True)
class _Lane(Generic[Item]):
    """Sends that use the same windows one after another, and where they stand in them."""

    windows: tuple[tuple[int, int], ...]
    queue: deque[Queued[Item]] = field(default_factory=deque)
    free_ns: int = 0
    last_peer: int = -1
    watched_ns: int = 0
    outcome: tuple[int, int] = (0, 0)
    waits_from_ns: int = FROM_NOW
    """Windows that open from here on and pass with something in the queue are missed."""
    given_ns: int = 0
    """When the last window ends for which something was given out."""


@dataclass(slots=True)
class Slots(Generic[Item]):
    """What one rank may put on its site's uplink, and when.

    ``frame_bytes`` is what a transport adds to each message. ``ahead``: sends are given out before their window opens,
    to a transport that holds them; otherwise only inside it. ``splits``: so is one of which only a part fits, to a
    transport that sends that part. In mode SHARE and OFF, and where nobody shares a downlink, everything goes at once,
    at its flow's rate. Where windows lead to one site each, every site has a queue and windows of its own, so that what
    waits for one does not hold up another; else one queue serves all.

    While ``trusted`` is not set, this rank does not know the time well enough for its windows: everything goes at once,
    at an equal share of the line for each of those that the cycle has windows for.

    A window in which something waited and nothing was sent is a miss. ``missed_windows`` : the last of them, by
    destination site (-1: any), begin and end in local time.
    """

    calendar: Calendar
    site: int
    rank: int
    offset_ns: int = 0
    frame_bytes: int = 0
    ahead: bool = True
    splits: bool = True
    trusted: bool = True
    misses: int = 0
    trimmed: int = 0
    missed_windows: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=LARGEST_MISSES))
    _lanes: dict[int, _Lane[Item]] = field(default_factory=dict)

    @property
    def queue(self) -> list[Queued[Item]]:
        """What waits, by queue and in order."""
        return [send for lane in self._lanes.values() for send in lane.queue]

    @property
    def waiting(self) -> bool:
        """Whether anything waits."""
        return any(lane.queue for lane in self._lanes.values())

    def add(self, send: Queued[Item]) -> None:
        """Queue a send behind those already waiting."""
        lane = self._lane(send)
        if not lane.queue:
            lane.waits_from_ns = FROM_NOW
        lane.queue.append(send)

    def sent(self, send: Queued[Item], window: Window) -> None:
        """Take note that a send used its window."""
        self._count(self._lane(send), send, window, 1, 0)

    def missed(self, sends: Sequence[tuple[Queued[Item], Window, int]]) -> None:
        """Put sends back, in order, that did not end in their window; the third item is the bytes already sent."""
        for send, window, sent_bytes in sends:
            lane = self._lane(send)
            self._count(lane, send, window, int(sent_bytes > 0), int(send.fits or not sent_bytes))
            send.sent_bytes, send.nbytes = send.sent_bytes + sent_bytes, send.nbytes - sent_bytes
            if window.not_after_ns is not None:  # what is left of it is too short for the next send as well
                lane.free_ns = max(lane.free_ns, window.not_after_ns)
                lane.waits_from_ns = max(lane.waits_from_ns, window.not_after_ns)
        for send, _, _ in reversed(sends):
            self._lane(send).queue.appendleft(send)

    def withdraw(self, unwanted: Callable[[Item], bool]) -> None:
        """Take sends out of the queues."""
        for lane in self._lanes.values():
            if any(unwanted(send.item) for send in lane.queue):
                lane.queue = deque(send for send in lane.queue if not unwanted(send.item))

    def _lane(self, send: Queued[Item]) -> _Lane[Item]:
        key = send.destination_site if self._leads else -1
        if key not in self._lanes:
            windows = self.calendar.windows_to(self.site, self.rank, send.destination_site)
            self._lanes[key] = _Lane(tuple((window.start_ns, window.end_ns) for window in windows))
        return self._lanes[key]

    def _count(self, lane: _Lane[Item], send: Queued[Item], window: Window, sent: int, missed: int) -> None:
        """Count a window in which some sends came too late as trimmed, one in which all did as a miss."""
        if window.not_after_ns is None:
            return
        if window.not_after_ns != lane.watched_ns:
            lane.watched_ns, lane.outcome = window.not_after_ns, (0, 0)
        before = lane.outcome
        after = lane.outcome = (before[0] + sent, before[1] + missed)
        was_missed, is_missed = before[0] == 0 and before[1] > 0, after[0] == 0 and after[1] > 0
        self.trimmed += (after[0] > 0 and after[1] > 0) - (before[0] > 0 and before[1] > 0)
        if is_missed and not was_missed:
            self._miss(send, window.not_before_ns, window.not_after_ns)
        elif was_missed and not is_missed:  # something smaller went after all
            self.misses -= 1
            for entry in [entry for entry in self.missed_windows if entry[2] == window.not_after_ns]:
                self.missed_windows.remove(entry)

    def _miss(self, send: Queued[Item], begins_ns: int, ends_ns: int) -> None:
        self.misses += 1
        self.missed_windows.append((send.destination_site if self._leads else -1, begins_ns, ends_ns))

    def _pass_windows(self, lane: _Lane[Item], now_ns: int) -> None:
        """Count windows that have opened and closed while something waited in the queue and nobody looked."""
        if lane.waits_from_ns == FROM_NOW:
            lane.waits_from_ns = max(now_ns, lane.given_ns)
        while True:
            begins_ns, ends_ns = self._opening(lane, lane.waits_from_ns)
            if ends_ns > now_ns:
                return
            self._miss(lane.queue[0], begins_ns, ends_ns)
            lane.waits_from_ns = ends_ns

    def due(self, now_ns: int) -> list[tuple[Queued[Item], Window | None]]:
        """Take from the queues what goes into this rank's current or next windows, each with its window.

        A rank that is late for its window uses what is left of it. Of the last send that is given out perhaps only a
        part fits, where parts can be sent; what fits not at all stays queued.
        """
        taken: list[tuple[Queued[Item], Window | None]] = []
        for lane in self._lanes.values():
            if lane.queue and lane.windows and self.trusted:
                self._fill(lane, now_ns, taken)
            elif lane.queue:
                taken += [(send, self._at_once(send, now_ns)) for send in lane.queue]
                lane.queue.clear()
        return taken

    def _fill(self, lane: _Lane[Item], now_ns: int, taken: list[tuple[Queued[Item], Window | None]]) -> None:
        self._pass_windows(lane, now_ns)
        start_ns, end_ns = self._window(lane, now_ns)
        if now_ns < start_ns and not self.ahead:
            return
        cursor_ns, given_out = max(start_ns, now_ns, lane.free_ns), len(taken)
        while lane.queue:
            send = lane.queue[0]
            rate = self.calendar.rate_bytes_per_s(self.site, send.destination_site)
            # Kernel pacing keeps the order inside one connection; another connection must not start before it drained.
            changes = send.peer != lane.last_peer and (lane.last_peer >= 0 or not self._leads)
            begin_ns = max(start_ns, cursor_ns) if changes else start_ns
            window = Window(begin_ns, end_ns, rate)
            takes_ns = window.takes_ns(send.nbytes + self.frame_bytes)
            if takes_ns > end_ns - start_ns and not self.splits:
                raise PlanError(f"a send of {send.nbytes} bytes takes {takes_ns} ns, its window {end_ns - start_ns} ns")
            part_bytes = window.fitting_bytes(send.nbytes, cursor_ns, self.frame_bytes)
            send.fits = part_bytes == send.nbytes
            if not send.fits and not (self.splits and part_bytes):
                break
            taken.append((lane.queue.popleft(), window))
            lane.last_peer = send.peer
            cursor_ns = cursor_ns + takes_ns if send.fits else end_ns
        if len(taken) > given_out:
            lane.free_ns = cursor_ns
            lane.waits_from_ns = lane.given_ns = end_ns

    def next_ns(self, now_ns: int) -> int | None:
        """Return when `due` should be asked again, or None while nothing waits."""
        return min((self._ask_ns(lane, now_ns) for lane in self._lanes.values() if lane.queue), default=None)

    def _ask_ns(self, lane: _Lane[Item], now_ns: int) -> int:
        if not lane.windows or not self.trusted:
            return now_ns
        start_ns, end_ns = self._window(lane, now_ns)
        return start_ns if now_ns < start_ns and not self.ahead else end_ns

    @property
    def _leads(self) -> bool:
        """Whether windows lead to one site each."""
        return self.calendar.mode is CALENDAR and bool(self.calendar.sites[self.site].windows)

    def _at_once(self, send: Queued[Item], now_ns: int) -> Window | None:
        if self.calendar.mode is OFF:
            return None
        rate = self.calendar.rate_bytes_per_s(self.site, send.destination_site)
        takers = {(window.rank, window.destination) for window in self.calendar.sites[self.site].windows}
        return Window(now_ns, None, rate / max(len(takers), 1))

    def _window(self, lane: _Lane[Item], now_ns: int) -> tuple[int, int]:
        """Return the current window of a queue if there is time left in it, else its next, in local time."""
        return next((start, end) for start, end in self._around(lane, now_ns) if end - now_ns >= SMALLEST_REST_NS)

    def _opening(self, lane: _Lane[Item], from_ns: int) -> tuple[int, int]:
        """Return the first window of a queue that opens at or after a time."""
        return next((start, end) for start, end in self._around(lane, from_ns) if start >= from_ns)

    def _around(self, lane: _Lane[Item], at_ns: int) -> Iterator[tuple[int, int]]:
        """Yield the windows of three cycles, the second of which holds ``at_ns``; one may run over a cycle's end."""
        cycle_ns = self.calendar.sites[self.site].cycle_ns
        site_ns = at_ns + self.offset_ns
        base_ns = site_ns - site_ns % cycle_ns - self.offset_ns
        for turn_ns in (base_ns - cycle_ns, base_ns, base_ns + cycle_ns):
            for start_ns, end_ns in lane.windows:
                yield turn_ns + start_ns, turn_ns + end_ns
