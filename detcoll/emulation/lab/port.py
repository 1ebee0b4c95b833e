"""One end of a line in any time: a rate, two classes with strict priority, and the policer before it.

What a port still has to send is kept as two times, W and D: when it is done with all that it took, and with the
deterministic class alone. For bytes that come between F, when their first bit could leave, and A, when all of them are
there:

- best effort waits for everything: W becomes max(A, max(W, F) + bytes / rate), which is when it is done, unless ...
- ... deterministic bytes come before that. They wait for their own class and for the packet that is on the line
  (802.1Q, strict priority without preemption): D becomes max(A, max(D, F + rest of that packet) + bytes / rate), and
  all of best effort that is not done is done later by as much time as they take.

So the end of a deterministic unit is known at once, that of a best-effort unit only when it has come; those wait in a
list with the delay that others caused them. Without a deterministic class nothing is ever delayed and W tells at once.

A best-effort unit that was overtaken at its uplink reaches the downlink in parts, and is told of when the last has
come. So a port remembers when it had nothing to do before deterministic bytes: those gaps carried what had come of it.

How large the packet on the line is the port does not know; it takes them to be full ones, counted since best effort
began to send, which errs by less than a packet.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

_MOST_GAPS = 256
"""More than there are deterministic units in the time that a best-effort unit takes."""


class Port(Generic[T]):
    """An uplink or a downlink; ``T`` is what is remembered of a best-effort unit until it is done."""

    __slots__ = ("_delayed_ns", "_gaps", "_since_ns", "_waiting", "bytes_per_ns", "free_ns", "limit_bytes",
                 "ns_per_byte", "packet_ns", "peak_bytes", "reserved_free_ns", "reserved_peak_bytes")  # fmt: skip

    def __init__(self, bytes_per_s: float, limit_bytes: int, packet_bytes: int) -> None:
        self.bytes_per_ns = bytes_per_s / 1e9
        self.ns_per_byte = 1e9 / bytes_per_s
        self.limit_bytes = limit_bytes
        self.free_ns = self.reserved_free_ns = 0.0
        self.peak_bytes = self.reserved_peak_bytes = 0.0
        self.packet_ns = packet_bytes * self.ns_per_byte
        self._since_ns = 0.0  # since when best effort sends without a break
        self._delayed_ns = 0.0
        self._waiting: deque[tuple[float, T]] = deque()
        self._gaps: deque[tuple[float, float]] = deque(maxlen=_MOST_GAPS)

    def room_bytes(self, now_ns: float) -> float:
        """Return how many bytes the best-effort queue can still take; what is leaving counts."""
        busy_ns = self.free_ns - max(now_ns, self.reserved_free_ns)
        return self.limit_bytes - busy_ns * self.bytes_per_ns if busy_ns > 0 else self.limit_bytes

    def reserved_room_bytes(self, now_ns: float) -> float:
        """Return how many bytes the deterministic queue can still take."""
        busy_ns = self.reserved_free_ns - now_ns
        return self.limit_bytes - busy_ns * self.bytes_per_ns if busy_ns > 0 else self.limit_bytes

    def take(self, wire_bytes: int, first_ns: float, last_ns: float, came_ns: float | None = None) -> float:
        """Take best-effort bytes; returns when they are done if nobody overtakes them.

        ``came_ns`` : since when parts of them may have come, where that is before ``first_ns``.
        """
        if self.free_ns <= first_ns:
            self._since_ns = first_ns
            start_ns = first_ns
        else:
            start_ns = self.free_ns
        takes_ns = wire_bytes * self.ns_per_byte
        if came_ns is not None and self._gaps:
            takes_ns -= self._carried_ns(came_ns, takes_ns)
        end_ns = start_ns + takes_ns
        self.free_ns = end_ns if end_ns > last_ns else last_ns
        queued = (self.free_ns - max(last_ns, self.reserved_free_ns)) * self.bytes_per_ns
        if queued > self.peak_bytes:
            self.peak_bytes = queued
        return self.free_ns

    def _carried_ns(self, came_ns: float, most_ns: float) -> float:
        """Take gaps since ``came_ns``, up to ``most_ns`` of them, and return how long they were."""
        gaps, carried_ns = self._gaps, 0.0
        while gaps and carried_ns < most_ns:
            start_ns, end_ns = gaps.popleft()
            start_ns = max(start_ns, came_ns)
            used_ns = min(max(end_ns - start_ns, 0.0), most_ns - carried_ns)
            carried_ns += used_ns
            if start_ns + used_ns < end_ns:
                gaps.appendleft((start_ns + used_ns, end_ns))
        return carried_ns

    def overtaking_ns(self, first_ns: float) -> float:
        """Return when deterministic bytes begin to leave whose first bit could leave at ``first_ns``."""
        if self.reserved_free_ns > first_ns or self.free_ns <= first_ns:
            return max(self.reserved_free_ns, first_ns)
        rest_ns = self.packet_ns - (first_ns - self._since_ns) % self.packet_ns
        return min(first_ns + rest_ns, self.free_ns)

    def take_first(self, wire_bytes: int, first_ns: float, last_ns: float) -> float:
        """Take deterministic bytes; returns when they are done. What `done` returns by then must be taken before."""
        takes_ns = wire_bytes * self.ns_per_byte
        end_ns = max(last_ns, self.overtaking_ns(first_ns) + takes_ns)
        if first_ns > self.free_ns:
            self._gaps.append((self.free_ns, first_ns))
        self.reserved_free_ns = self._since_ns = end_ns
        self.free_ns = max(end_ns, max(self.free_ns, first_ns) + takes_ns)
        self._delayed_ns += takes_ns
        queued = (end_ns - last_ns) * self.bytes_per_ns
        if queued > self.reserved_peak_bytes:
            self.reserved_peak_bytes = queued
        return end_ns

    def remember(self, end_ns: float, what: T) -> None:
        """Keep ``what`` until its bytes, the last that were taken, are done: at ``end_ns`` or later."""
        self._waiting.append((end_ns - self._delayed_ns, what))

    def done(self, now_ns: float) -> list[tuple[float, T]]:
        """Return what is done by ``now_ns`` of what was remembered, and when it was done."""
        waiting, ended = self._waiting, []
        # The same sum as in `next_done_ns`: rounded otherwise, what is due then would never be done.
        while waiting and (end_ns := waiting[0][0] + self._delayed_ns) <= now_ns:
            ended.append((end_ns, waiting.popleft()[1]))
        return ended

    @property
    def next_done_ns(self) -> float | None:
        """When the next of what is remembered is done if nobody overtakes it; None if there is nothing."""
        return self._waiting[0][0] + self._delayed_ns if self._waiting else None


class Policer:
    """A token bucket: lets pass a rate and, after silence, a burst (RFC 2697 with one colour)."""

    __slots__ = ("_at_ns", "_tokens", "burst_bytes", "bytes_per_ns")

    def __init__(self, bytes_per_s: float, burst_bytes: int) -> None:
        self.bytes_per_ns = bytes_per_s / 1e9
        self.burst_bytes = burst_bytes
        self._tokens = float(burst_bytes)
        self._at_ns = 0

    def tokens(self, now_ns: int, asleep_ns: float = 0.0) -> float:
        """Return how many bytes may pass at ``now_ns``, if nobody looked for the ``asleep_ns`` before.

        What came meanwhile seems to come at once; the bucket does not overflow with what was gained in that time.
        """
        gained = self._tokens + (now_ns - self._at_ns) * self.bytes_per_ns
        most = self.burst_bytes + asleep_ns * self.bytes_per_ns
        self._tokens = gained if gained < most else most
        self._at_ns = now_ns
        return self._tokens

    def spend(self, wire_bytes: int) -> None:
        """Note that so many bytes have passed."""
        self._tokens -= wire_bytes
