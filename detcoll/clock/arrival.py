"""The arrival loop: sites shift their cycles until what they send arrives where receivers want it. No I/O, no clock.

Windows between more than two sites are laid so that what arrives at one receiver does not meet there. Site i departs at
its own reading of the job's time, which is wrong by p_i, and the way to j takes x_ij longer than the plan says. What
arrives at j is then late, by j's reading, by::

    e_ij = x_ij - p_i + p_j

What can be changed: p_i, by a correction of the whole cycle of a site. A shift for each flow would be more than is
needed and less than is safe, since windows of one sender must not overlap either: it could only use up guards. What
matters: arrivals at one receiver must not meet, so what all of them have in common does no harm, and neither p_j nor an
error of the way into j counts. So a receiver wants of each sender the correction with which it is as late as all are in
the mean, and a sender takes the mean of what receivers want::

    wanted_ij = x_ij - p_i - mean over k of (x_kj - p_k - c_k)        c_i <- c_i + gain (mean over j of wanted_ij - c_i)

That is alternating least squares for x_ij - p_i - c_i - u_j, over the departures c and one free arrival u of each
receiver: it ends at their minimum from any start. Each round leaves 1 - gain (1 - 1 / (S-1)^2) of an error at most.
Wanted is a correction, not a change, so what is told late or lost adds nothing up, and noise moves corrections by no
more than itself. (All of them together may wander, which nobody notices.) Of the S (S-1) delays' errors it mends
2 S - 1 combinations, which with three sites is all but one. What is left is seen by receivers, as the spread of their
arrivals; all tell it each other, and guards have to cover it.

Arrivals are seen in marks, small messages that say when they departed. Queues and sleeping hosts only delay, so of the
last marks of a sender the least late one counts. The job's time comes from exchanges with one site (`ClockFilter`),
which follow offsets of hours, drift, and steps of more than half a round trip. What they cannot see, ways that are
unequal there and back, is left to this loop, and smaller steps show here as a jump of what arrives. After a step a site
starts anew under a new epoch. What was seen of it before counts no more, nor does a mark that left before its sender
heard of the receiver's epoch.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag

from detcoll.errors import FrameError, UsageError

_RECORD = struct.Struct("<4sIIIqqqq")
_MARK = b"dcM1"
MARK_BYTES = _RECORD.size
"""Size of a mark: a kind, epochs of sender and receiver, flags; departure, correction, what is wanted, spread in ns."""

_UNHEARD = 2**32 - 1

TOLERANCE_NS = 20_000
"""A sender that is asked to move by less than this is where it should be."""

LOST_NS = 1_000_000
"""One that is asked to move by more than this is not, whatever it was before; and what arrives so much earlier than
ever, or later for long, tells of a step."""


class _Said(IntFlag):
    """What holds of the site that sends a mark."""

    WANTS = 1
    SETTLED = 2
    DOUBTS = 4


@dataclass(slots=True)
class _Other:
    """What is known of one other site."""

    delay_ns: int
    late_ns: deque[int]
    epoch: int = _UNHEARD
    correction_ns: int = 0
    wanted_ns: int | None = None
    spread_ns: int = 0
    settled: bool = False
    doubted: bool = False
    """Whether its marks have jumped in its present epoch."""
    told: bool = False
    """Whether a mark that says that this site has settled has gone there."""


class ArrivalLoop:
    """One site's part of the loop.

    Times are the job's, as this site reads it, without the correction.

    Parameters
    ----------
    delays_ns : mapping
        Of each other site: how long the way from there to here takes by the plan.
    window : int
        How many marks of a site count.
    settle : int
        How many of each it takes until this site wants something.
    gain : float
        Which part of the way to what is wanted a correction moves at once.
    burst : int
        Rounds of marks ``spacing_ns`` apart at the most, at the start and after any site's restart, until all settle.
    spacing_ns, interval_ns : int
        Time between rounds in a burst, and after it.
    """

    def __init__(
        self, delays_ns: Mapping[int, int], *, window: int = 16, settle: int = 4, gain: float = 0.5, burst: int = 100,
        spacing_ns: int = 20 * 10**6, interval_ns: int = 250 * 10**6,
    ) -> None:  # fmt: skip
        if len(delays_ns) < 2:
            raise UsageError(f"delays_ns names {len(delays_ns)} other sites; with fewer than 2 nothing can meet")
        if not 1 <= settle <= window:
            raise UsageError(f"settle={settle} must be from 1 to window={window}")
        if not 0 < gain <= 1:
            raise UsageError(f"gain={gain} must be above 0 and at most 1")
        if burst < 1 or spacing_ns < 1 or interval_ns < 1:
            raise UsageError(f"burst={burst}, spacing_ns={spacing_ns}, interval_ns={interval_ns} must be at least 1")
        self._others = {site: _Other(delay_ns, deque(maxlen=window)) for site, delay_ns in delays_ns.items()}
        self._settle, self._gain = settle, gain
        self._burst, self._spacing_ns, self._interval_ns = burst, spacing_ns, interval_ns
        self._epoch = 0
        self._correction_ns = 0.0
        self._left = burst
        self._next_ns: int | None = None
        self._settled = False
        self._late: list[int] | None = None
        self._is_fresh = False
        self.limit_ns: int | None = None
        """What guards allow for: `holds` while `error_ns` is not more. None: anything."""

    @property
    def correction_ns(self) -> int:
        """What this site adds to its time, so that it departs so much earlier."""
        return round(self._correction_ns)

    @property
    def error_ns(self) -> int | None:
        """How far apart arrivals are that should meet exactly, at the worst receiver; None until it is known."""
        own_ns = self._spread_ns()
        if own_ns is None or any(other.wanted_ns is None for other in self._others.values()):
            return None
        return max(own_ns, *(other.spread_ns for other in self._others.values()))

    @property
    def settled(self) -> bool:
        """Whether this site came where it should be, or near it by the end of the burst, and was not lost since."""
        return self._settled

    @property
    def all_settled(self) -> bool:
        """Whether all sites have settled, and all were told of this one."""
        return self._settled and all(other.settled and other.told for other in self._others.values())

    @property
    def holds(self) -> bool:
        """Whether windows may be trusted: settled, and arrivals are no further apart than guards allow for."""
        if not self._settled:
            return False
        error_ns = self.error_ns  # unknown while another site starts anew, which shares by rate meanwhile
        return self.limit_ns is None or error_ns is None or error_ns <= self.limit_ns

    def restart(self) -> None:
        """Start anew: this site's time has stepped. The correction stays, since ways are as unequal as before."""
        self._epoch = (self._epoch + 1) % _UNHEARD
        self._settled, self._left, self._next_ns, self._is_fresh = False, self._burst, None, False
        for other in self._others.values():
            other.late_ns.clear()
            other.wanted_ns = None
            other.settled = other.told = False

    def next_ns(self, now_ns: int) -> int:
        """Return when marks are due, at the earliest ``now_ns``; times of `next_ns` and `turn` are of any one clock."""
        return now_ns if self._next_ns is None else max(now_ns, self._next_ns)

    def turn(self, now_ns: int) -> bool:
        """Move the correction where it is time to; tell whether each other site should get a mark now."""
        if self.next_ns(now_ns) > now_ns:
            return False
        self._left = max(self._left - 1, 0)
        self._move()
        is_calm = self._settled and all(other.settled for other in self._others.values())
        self._next_ns = now_ns + (self._interval_ns if is_calm or not self._left else self._spacing_ns)
        return True

    def make_mark(self, site: int, departs_ns: int) -> bytes:
        """Return the mark that departs for ``site`` at ``departs_ns``."""
        other = self._others[site]
        wanted_ns, spread_ns = self._wanted_ns(other), self._spread_ns()
        flags = (_Said.SETTLED if self._settled else 0) | (_Said.WANTS if wanted_ns is not None else 0)
        flags |= _Said.DOUBTS if other.doubted else 0
        other.told = self._settled
        return _RECORD.pack(
            _MARK, self._epoch, other.epoch, flags, departs_ns, self.correction_ns, wanted_ns or 0, spread_ns or 0
        )

    def handle_mark(self, site: int, mark: bytes, arrives_ns: int) -> bool:
        """Take into account what ``site`` sent, which arrived at ``arrives_ns``.

        Returns
        -------
        bool
            Whether marks of that site have jumped after this one had settled, or it says so of ours: a reading of time
            has stepped, and neither can tell which. The caller should find out the job's time anew, and `restart`.

        Raises
        ------
        FrameError
            If it is no mark.
        """
        if len(mark) != MARK_BYTES or mark[:4] != _MARK:
            raise FrameError(f"{len(mark)} bytes that start {mark[:4]!r} are no mark of {MARK_BYTES} bytes")
        _, epoch, heard, flags, departed_ns, correction_ns, wanted_ns, spread_ns = _RECORD.unpack(mark)
        other = self._others[site]
        self._is_fresh = False
        if epoch != other.epoch:
            other.epoch, other.doubted = epoch, False
            other.late_ns.clear()
            self._left, self._next_ns = self._burst, None
        if heard != self._epoch:
            return False
        has_jumped = _add(other.late_ns, arrives_ns - departed_ns - other.delay_ns) and self._settled
        other.correction_ns = correction_ns
        other.settled = bool(flags & _Said.SETTLED)
        if flags & _Said.WANTS:
            other.wanted_ns, other.spread_ns = wanted_ns, spread_ns
        other.doubted |= has_jumped
        return has_jumped or bool(flags & _Said.DOUBTS)

    def _move(self) -> None:
        wanted = [other.wanted_ns for other in self._others.values() if other.wanted_ns is not None]
        spread_ns = self._spread_ns()
        if len(wanted) < len(self._others) or spread_ns is None:
            return
        change_ns = sum(wanted) / len(wanted) - self._correction_ns
        self._correction_ns += self._gain * change_ns
        if abs(change_ns) > LOST_NS:
            self._left = self._burst if self._settled else self._left
            self._settled = False
        elif not self._left or (abs(change_ns) <= TOLERANCE_NS and spread_ns <= LOST_NS):
            self._settled = True

    def _late_ns(self) -> list[int] | None:
        """Return how late each other site's bytes arrive, corrected; None until enough marks of all have come."""
        if not self._is_fresh:  # it is asked for far more often than marks arrive
            are_enough = all(len(other.late_ns) >= self._settle for other in self._others.values())
            late_ns = (min(other.late_ns) - other.correction_ns for other in self._others.values())
            self._late, self._is_fresh = list(late_ns) if are_enough else None, True
        return self._late

    def _spread_ns(self) -> int | None:
        late_ns = self._late_ns()
        return None if late_ns is None else max(late_ns) - min(late_ns)

    def _wanted_ns(self, other: _Other) -> int | None:
        late_ns = self._late_ns()
        return None if late_ns is None else min(other.late_ns) - round(sum(late_ns) / len(late_ns))


def _add(kept_ns: deque[int], late_ns: int) -> bool:
    """Keep how late one more mark is; tell whether it, or the newer half of the window, is far off a full window.

    Only what is off is kept then.
    """
    half, is_full = (kept_ns.maxlen or 0) // 2, len(kept_ns) == kept_ns.maxlen
    is_early = is_full and late_ns < min(kept_ns) - LOST_NS
    newer_ns = [late_ns] if is_early else [*list(kept_ns)[1 - half :], late_ns]
    is_late = is_full and half > 1 and min(newer_ns) - min(kept_ns) > LOST_NS
    if is_early or is_late:
        kept_ns.clear()
        kept_ns.extend(newer_ns)
    else:
        kept_ns.append(late_ns)
    return is_early or is_late
