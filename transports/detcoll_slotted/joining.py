"""Joining other ranks: hellos in both directions, and opening TCP's windows before the first message counts on them.

All ranks know all addresses, and connect to those that they need. Who is greeted by a rank that it is not connected to
connects back. A hello says whether an answer is wanted, and is repeated until it has come: whatever else is to be said
waits for that, since a rank that does not know the other one yet would not take it in.

A hello goes over each connection, and a rank waits until something has come over all of the peer's connections. A rank
that has joined may not poll for a while, and only a rank that polls can accept other ranks' connections (`Gate.admit`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detcoll.errors import ConnectError, PeerLost
from detcoll.transport import Clock
from detcoll_slotted.descriptors import shortage
from detcoll_slotted.line import Line
from detcoll_slotted.options import Options
from detcoll_slotted.peer import Peer
from detcoll_slotted.post import Post
from detcoll_slotted.wire import FrameKind, Lane

_HELLO_EVERY_NS = 200_000_000
_WARM_FRAME_BYTES = 65_536
_LOOK_EVERY_NS = 2_000_000


class Joining:
    """Joins peers of one rank; ``wait`` moves what can be moved until something happens or a time has come."""

    def __init__(self, rank: int, options: Options, post: Post, clock: Clock, wait: Callable[[int], None]) -> None:
        self._rank, self._options, self._post, self._clock, self._wait = rank, options, post, clock, wait
        self._pending: dict[int, tuple[Peer, int]] = {}
        self._hello_ns = 0

    def begin(self, peer: Peer, deadline_ns: int) -> None:
        """Greet a peer until it is joined, or given up at the deadline."""
        self._pending[peer.rank] = peer, deadline_ns
        self._hello_ns = 0

    def greet(self, peer: Peer) -> None:
        """Say hello, and whether an answer is wanted."""
        self._say_hello(peer, wants_answer=not peer.is_heard)

    def answer(self, peer: Peer) -> None:
        """Say hello to who wants to hear it."""
        self._say_hello(peer, wants_answer=False)

    def _say_hello(self, peer: Peer, *, wants_answer: bool) -> None:
        for lane in peer.own_lanes:
            self._post.transmit(peer, lane, FrameKind.HELLO, place=(int(wants_answer), 0))

    def turn(self, now_ns: int) -> list[tuple[Peer, PeerLost]]:
        """Greet those who are not joined yet; returns who was not reached in time, and what to say of it."""
        if not self._pending:
            return []
        for rank in [rank for rank, (peer, _) in self._pending.items() if peer.is_joined or peer.lost]:
            del self._pending[rank]
        if not self._pending or now_ns < self._hello_ns:
            return []
        self._hello_ns = now_ns + _HELLO_EVERY_NS
        late = []
        for peer, deadline_ns in self._pending.values():
            if peer.lines[Lane.EXPRESS].connected:
                self.greet(peer)
            if now_ns >= deadline_ns:
                late.append((peer, PeerLost(self._not_reached(peer.rank, self._options.tolerance_ns / 1e9))))
        return late

    def next_ns(self) -> int | None:
        """Return when to greet again; None where everybody is joined."""
        return self._hello_ns if self._pending else None

    def join(self, peers: Sequence[Peer], deadline_ns: int) -> None:
        """Return once hellos have passed in both directions with all of them, and their connections are warm.

        Raises
        ------
        ConnectError
            If that takes longer than the deadline, or one of them is lost.
        """
        while missing := [peer for peer in peers if not peer.is_joined]:
            self._check_reachable(missing, self._clock.now_ns() >= deadline_ns)
            self._wait(deadline_ns)
        if self._options.warm_up_bytes:
            self._warm_up([peer for peer in peers if peer.rank in self._options.warm_up_peers], deadline_ns)

    def _not_reached(self, rank: int, seconds: float) -> str:
        lacking = shortage(1)
        return f"rank {rank} was not reached within {seconds:g} s" + (f": {lacking}" if lacking else "")

    def _check_reachable(self, missing: Sequence[Peer], is_late: bool) -> None:
        for peer in missing:
            if peer.lost:
                raise ConnectError(f"rank {self._rank} did not reach rank {peer.rank}: {peer.lost}") from peer.lost
        if is_late:
            ranks, lacking = ", ".join(str(peer.rank) for peer in missing), shortage(1)
            reason = f": {lacking}" if lacking else ""
            raise ConnectError(f"rank {self._rank} did not reach rank {ranks} before the deadline{reason}")

    def _warm_up(self, peers: Sequence[Peer], deadline_ns: int) -> None:
        nothing = memoryview(bytes(_WARM_FRAME_BYTES))
        for peer in sorted(peers, key=lambda peer: (peer.rank < self._rank, peer.rank)):
            peer.lines[Lane.BULK].pace(self._options.warm_up_bytes_per_s)
            for _ in range(0, self._options.warm_up_bytes, _WARM_FRAME_BYTES):
                self._post.transmit(peer, Lane.BULK, FrameKind.WARM, nothing)
            if self._options.warm_up_in_turn:
                self._let_leave(peer.lines[Lane.BULK], self._options.warm_up_bytes, deadline_ns)
        while cold := [peer.rank for peer in peers if peer.inbound.warm_bytes < self._options.warm_up_bytes]:
            if self._clock.now_ns() >= deadline_ns:
                raise ConnectError(
                    f"rank {self._rank}: warming up with rank {cold} took longer than the deadline; if large packets "
                    "vanish on the way, detcoll doctor --towards HOST finds it"
                )
            self._wait(deadline_ns)

    def _let_leave(self, line: Line, nbytes: int, deadline_ns: int) -> None:
        """Wait until bytes given to a line at its pace have left, as far as the kernel knows of them."""
        paced_ns = self._clock.now_ns() + int(nbytes / self._options.warm_up_bytes_per_s * 1e9)
        while (now_ns := self._clock.now_ns()) < deadline_ns and (now_ns < paced_ns or line.unsent_bytes()):
            self._wait(min(deadline_ns, max(paced_ns, now_ns + _LOOK_EVERY_NS)))
