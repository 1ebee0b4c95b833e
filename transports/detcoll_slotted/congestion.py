"""Which congestion control a connection runs, by what its path shows; no socket, and no clock is read.

On a reserved, paced path loss does not happen, so a loss-based control never slows down, while BBR empties the pipe for
200 ms every 10 s to probe the round trip. So a reserved path keeps CUBIC (RFC 9438).

A line that nobody reserved is shared, and no control is right for all that others do there. 2 x 2 ranks, 250 Mbit/s,
20 ms, all-reduce of 4 MiB, others offer bursts that mind nobody, in ms:

    others offer                50 %     90 %    100 % of the line
    CUBIC                        268    1,230    6,742
    BBR                          285    1,431    2,039

CUBIC takes what others leave and a little more, as it fills the queue. Where others leave nothing, a loss of 1 % at a
round trip of 150 ms, which is that of a full queue, holds it at 2 to 4 % of its rate. BBR does not take a loss for
congestion (Cardwell and others, "BBR: Congestion-Based Congestion Control", ACM Queue 14(5), 2016), and goes on.

**The rule.** CUBIC runs until it *starves*: twice in a row it got less than 1/16 of the rate that its calendar grants,
counted in the time in which nothing but the path held it up, and the path showed why: segments were lost, or the round
trip is above twice that of the empty path. Measured at the above, a rank got 10 to 16 % of its rate beside 90 % and 2
to 4 % beside 100 %. What is counted is TCP's own (``TCP_INFO``): bytes acknowledged, and the time in which it was busy,
less that in which the receiver's window or the send buffer held it up. Small messages keep a connection busy as well,
since each is waited for, but they leave nothing unsent: so something must wait to be sent more often than not.

**Others' share.** Beside others that give way as it does, a flow gets so little only where there are fifteen of them
for each rank of its site. Then BBR would take more than its part: its share does not depend on how many others there
are (Ware and others, "Modeling BBR's Interactions with Loss-Based Congestion Control", IMC 2019). So in BBR a
connection is paced at a quarter of what its calendar grants at most. Connections that share one granted rate take turns
(`detcoll_slotted.pacing`), and what is handed to one in BBR counts as four times as long, so that all of them together
keep to that quarter.

**The way back.** A connection that begins beside 90 % loses much at first, and CUBIC then starves for some ten seconds
as it would beside 100 %. BBR tells the two apart: beside 90 % it lost nothing in ten calls, beside 100 % hundreds of
segments once it had found its rate. So six spans in a row without a loss, with more than what CUBIC starves at, mean
that others leave room, and CUBIC takes it. Else CUBIC is tried again after a minute. Each time that CUBIC starves again
soon after, both ways back wait for twice as long as before, up to sixteen minutes; so it does not flap.

**A span** that is judged covers half a second of a busy connection, or 25 round trips where these take longer, so that
slow start is not taken for starving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

LOSS_BASED, MODEL_BASED = "cubic", "bbr"
"""The control that gives way to losses, and the one that does not."""

STARVED_SHARE = 1 / 16
"""A connection that gets less of its granted rate starves."""
LIMIT_SHARE = 1 / 4
"""What a connection may take of its granted rate while its control does not give way."""

STARVED_SPANS, CLEAN_SPANS = 2, 6
"""How many spans in a row must have starved, or been without a loss, before the control changes."""
_SPAN_BUSY_NS = 500_000_000
_SPAN_ROUND_TRIPS = 25
_QUEUED = 2.0
_SETTLE_NS = 3_000_000_000
_TRY_AGAIN_NS, _LONGEST_NS = 60_000_000_000, 960_000_000_000


class PathFacts(NamedTuple):
    """What TCP has counted on a connection since it was made, and its round trip now.

    ``limited_ns`` : for how long something was under way and neither the receiver nor the send buffer held it up.
    ``least_round_trip_ns`` : the shortest that TCP saw.  ``unsent_bytes`` : what waits to be sent now.
    """

    acknowledged_bytes: int
    limited_ns: int
    retransmits: int
    round_trip_ns: int
    least_round_trip_ns: int
    unsent_bytes: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The control that is to run, and the share of the granted rate that it may take."""

    control: str
    share: float


_ORDINARY, _BOLD = Verdict(LOSS_BASED, 1.0), Verdict(MODEL_BASED, LIMIT_SHARE)


class SharedPath:
    """The rule for one connection on a line that nobody reserved; tell it the facts now and then.

    Parameters
    ----------
    round_trip_ns : int
        Of the empty path, as the topology states it; a shorter one that TCP sees counts instead.

    Guarantees
    ----------
    The same facts at the same times give the same verdicts. Between two changes of the control there are at least two
    spans.
    """

    def __init__(self, round_trip_ns: int) -> None:
        self._stated_ns = round_trip_ns
        self._verdict = _ORDINARY
        self._begin: PathFacts | None = None
        self._last: PathFacts | None = None
        self._looks = self._unsent_looks = 0
        self._hints = 0
        self._since_ns = 0
        self._back_ns = _SETTLE_NS
        self._try_again_ns = _TRY_AGAIN_NS
        self._is_offered = True

    @property
    def verdict(self) -> Verdict:
        """What counts now."""
        return self._verdict

    def begin(self) -> None:
        """Take note that the connection is a new one, whose counts begin at zero."""
        self._begin, self._last, self._hints, self._is_offered = None, None, 0, True
        self._looks = self._unsent_looks = 0

    def refused(self, runs: Verdict = _ORDINARY) -> None:
        """Take note that the other control cannot be had: the one that ``runs`` stays on this connection, at its share.

        That is the model-based one where the way back is refused, and going on at the whole rate would be unfair.
        """
        self._is_offered, self._verdict = False, runs

    def look(self, facts: PathFacts, granted_bytes_per_s: float, now_ns: int) -> Verdict:
        """Take the facts in, and return what counts from now on.

        Parameters
        ----------
        facts : PathFacts
            What TCP has counted.
        granted_bytes_per_s : float
            The rate at which the calendar lets this connection send; 0 where it says none.
        now_ns : int
            The time.
        """
        begin, last, self._last = self._begin or facts, self._last or facts, facts
        self._begin, self._since_ns = begin, self._since_ns or now_ns
        if not self._is_offered or granted_bytes_per_s <= 0 or facts.limited_ns == last.limited_ns:
            return self._verdict
        self._looks += 1
        self._unsent_looks += facts.unsent_bytes > 0
        empty_ns = min((ns for ns in (self._stated_ns, facts.least_round_trip_ns) if ns > 0), default=0)
        busy_ns = facts.limited_ns - begin.limited_ns
        if busy_ns < max(_SPAN_BUSY_NS, _SPAN_ROUND_TRIPS * empty_ns):
            return self._verdict
        is_lossy = facts.retransmits > begin.retransmits
        share = (facts.acknowledged_bytes - begin.acknowledged_bytes) / busy_ns * 1e9 / granted_bytes_per_s
        is_held_up = share < STARVED_SHARE and 2 * self._unsent_looks > self._looks
        if self._verdict is _ORDINARY:
            is_hint = is_held_up and (is_lossy or facts.round_trip_ns > _QUEUED * empty_ns)
        else:
            is_hint = not is_lossy and not is_held_up
        self._begin, self._hints = facts, self._hints + 1 if is_hint else 0
        self._looks = self._unsent_looks = 0
        self._change(now_ns)
        return self._verdict

    def _change(self, now_ns: int) -> None:
        """Change the control where that is due."""
        lasted_ns = now_ns - self._since_ns
        if self._verdict is _ORDINARY:
            if self._hints < STARVED_SPANS:
                return
            if lasted_ns > self._try_again_ns:  # it went well for long: what was learnt is out of date
                self._back_ns, self._try_again_ns = _SETTLE_NS, _TRY_AGAIN_NS
            self._verdict = _BOLD
        else:
            is_clean = self._hints >= CLEAN_SPANS and lasted_ns >= self._back_ns
            if not is_clean and lasted_ns < self._try_again_ns:
                return
            self._back_ns = min(2 * self._back_ns, _LONGEST_NS)
            self._try_again_ns = min(2 * self._try_again_ns, _LONGEST_NS)
            self._verdict = _ORDINARY
        self._hints, self._since_ns = 0, now_ns
