"""Connections that ended, and when a peer is lost for it.

ZeroMQ makes a new connection, and what is not acknowledged is sent again over it. A path that forgot a connection shows
by silence: TCP's keepalives and its limit for what is not acknowledged (``TCP_KEEPALIVE``, ``TCP_USER_TIMEOUT``, RFC
5482) end such a connection, and ZeroMQ's heartbeats do so where something between the hosts answers for TCP. Keepalives
also keep firewalls from forgetting.

A peer that is out of reach is borne for the tolerance. Where its host refuses new connections nobody listens there any
more, so it is lost at once; ZeroMQ does not tell, so a connection is tried beside its own.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Container
from dataclasses import dataclass

import zmq

from detcoll.errors import PeerLost
from detcoll_slotted.options import Options
from detcoll_slotted.peer import Peer
from detcoll_slotted.wire import Lane

_KEEPALIVE_IDLE_S, _KEEPALIVE_EVERY_S, _KEEPALIVE_PROBES = 10, 5, 3
_PATIENCE_NS = 5_000_000_000
_LEAST_PATIENCE_NS = 1_000_000_000
_HEARTBEAT_NS = 2_000_000_000
_CONNECT_NS = 3_000_000_000
_HANDSHAKE_NS = 10_000_000_000
_FIRST_TRY_NS, _LONGEST_TRY_NS = 20_000_000, 1_000_000_000


def patience_ns(tolerance_ns: int) -> int:
    """Return how long a connection may be silent where an answer is due."""
    return max(min(_PATIENCE_NS, tolerance_ns // 3), _LEAST_PATIENCE_NS)


def guard(made: zmq.Socket[bytes], tolerance_ns: int) -> None:
    """Let the connections of a socket end when their path goes silent, and new ones be tried often."""
    made.tcp_keepalive = 1
    made.tcp_keepalive_idle, made.tcp_keepalive_intvl = _KEEPALIVE_IDLE_S, _KEEPALIVE_EVERY_S
    made.tcp_keepalive_cnt = _KEEPALIVE_PROBES
    made.tcp_maxrt = patience_ns(tolerance_ns) // 10**6
    made.connect_timeout = _CONNECT_NS // 10**6
    made.handshake_ivl = _HANDSHAKE_NS // 10**6
    made.reconnect_ivl, made.reconnect_ivl_max = 20, 500


def beat(made: zmq.Socket[bytes], tolerance_ns: int) -> None:
    """Let a socket look after its connections end to end. Not for paced data, behind which an answer would be late."""
    patience = patience_ns(tolerance_ns)
    made.heartbeat_ivl, made.heartbeat_timeout = min(_HEARTBEAT_NS, patience) // 10**6, patience // 10**6


@dataclass(eq=False, slots=True)
class _Case:
    """A peer with a connection that ended."""

    peer: Peer
    since_ns: int
    try_ns: int
    try_every_ns: int = _FIRST_TRY_NS
    trial: socket.socket | None = None

    def end_trial(self, epoll: select.epoll) -> None:
        """Give a trial's socket back."""
        if self.trial is not None:
            epoll.unregister(self.trial)
            self.trial.close()
            self.trial = None


class Health:
    """Follows peers of one endpoint whose connections ended, with sockets of its own on the endpoint's ``epoll``."""

    def __init__(self, options: Options, epoll: select.epoll) -> None:
        self._options, self._epoll = options, epoll
        self._patience_ns = patience_ns(options.tolerance_ns)
        self._cases: dict[int, _Case] = {}

    def ended(self, peer: Peer, now_ns: int) -> None:
        """Take note that a connection to a peer has ended, if one has."""
        if peer.lost or not any(line.was_connected and not line.connected for line in peer.lines):
            return
        if peer.rank not in self._cases:
            # It may have been silent for as long as that takes to be noticed.
            # Where it ended by silence, that began earlier.
            unnoticed_ns = min(self._patience_ns, self._options.tolerance_ns // 6)
            since_ns = min(now_ns, max(peer.heard_ns, now_ns - unnoticed_ns))
            # A goodbye that is on its way comes before the first trial.
            self._cases[peer.rank] = _Case(peer, since_ns, now_ns + _FIRST_TRY_NS)
        bulk = peer.lines[Lane.BULK]
        is_stuck = now_ns - peer.acknowledged_ns > self._patience_ns or not peer.outbound.kept[Lane.BULK]
        if bulk.connected and not peer.lines[Lane.EXPRESS].connected and is_stuck:
            bulk.cut()  # it has no heartbeats, and went the same way

    def turn(self, ready: Container[int], now_ns: int) -> list[tuple[Peer, PeerLost]]:
        """Look after all cases; returns who is lost, and what to say of it."""
        lost: list[tuple[Peer, PeerLost]] = []
        if not self._cases:
            return lost
        for rank, case in list(self._cases.items()):
            peer = case.peer
            is_over = peer.lost is not None or all(line.connected for line in peer.lines)
            if not is_over and self._is_refused(case, ready, now_ns):
                lost.append((peer, PeerLost(f"rank {rank}: its connection ended and new ones are refused")))
                is_over = True
            elif not is_over and now_ns - case.since_ns >= self._options.tolerance_ns:
                seconds = self._options.tolerance_ns / 1e9
                is_heard = peer.heard_ns > case.since_ns
                what = "no new connection to it came about" if is_heard else "nothing came through"
                lost.append((peer, PeerLost(f"rank {rank}: {what} for {seconds:g} s")))
                is_over = True
            if is_over:
                case.end_trial(self._epoll)
                del self._cases[rank]
        return lost

    def next_ns(self) -> int | None:
        """Return when to look again even if nothing happens."""
        if not self._cases:
            return None
        tolerance_ns = self._options.tolerance_ns
        return min((min(case.try_ns, case.since_ns + tolerance_ns) for case in self._cases.values()), default=None)

    def close(self) -> None:
        """Give all sockets back."""
        for case in self._cases.values():
            case.end_trial(self._epoll)
        self._cases.clear()

    def _is_refused(self, case: _Case, ready: Container[int], now_ns: int) -> bool:
        """Tell whether a trial was refused; begin the next one when it is time."""
        if case.trial is not None and case.trial.fileno() in ready:
            answer = case.trial.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            case.end_trial(self._epoll)
            if answer == errno.ECONNREFUSED:
                return True
        if now_ns < case.try_ns:
            return False
        case.end_trial(self._epoll)
        case.try_ns = now_ns + case.try_every_ns
        case.try_every_ns = min(2 * case.try_every_ns, _LONGEST_TRY_NS)
        is_proxied = self._options.proxy and case.peer.rank in self._options.proxied_peers
        return not is_proxied and self._try(case)

    def _try(self, case: _Case) -> bool:
        """Begin a trial; True if it is refused at once."""
        host, _, port = case.peer.lines[0].address.removeprefix("tcp://").rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        with contextlib.suppress(OSError):  # no descriptor is left, or no way there: nothing is known
            trial = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            answer = trial.connect_ex((host.strip("[]"), int(port)))
            if answer == errno.EINPROGRESS:
                case.trial = trial
                self._epoll.register(trial, select.EPOLLOUT)
            else:
                trial.close()
            return answer == errno.ECONNREFUSED
        return False
