"""What collectives need of an endpoint, and all that they share with its messages.

Collectives may run on one thread while another one sends, receives and polls. So they have a doorbell, counters and a
view of who has died of their own. What is left in common is written before either side begins (peers, stages), or by
one side alone and read as one word (states of peers, `_Peer.error`), and needs no lock.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from detcoll.errors import ConnectError, PeerLost, TransportError
from detcoll_shm.bell import Bell, RemoteBell, process_ended
from detcoll_shm.call_layout import Cutter
from detcoll_shm.collectives import Collectives
from detcoll_shm.layout import Address
from detcoll_shm.lockstep import EndpointHooks, Lockstep, PeerStage
from detcoll_shm.memory import open_descriptor
from detcoll_shm.reading import Reader
from detcoll_shm.regions import Mapped, Regions
from detcoll_shm.stage import BELL, Stage
from detcoll_shm.stores import Counts


@dataclass(frozen=True, slots=True)
class NativePeer:
    """Another rank, as collectives see it.

    ``rank`` : its number in the group.  ``name`` : its rank in the job, for errors.  ``process_fd`` : its pidfd, None
    in this process.  ``why_gone`` : why its messages have ended, or None.
    """

    rank: int
    address: Address
    process_fd: int | None
    stage: Stage
    mapped: Mapped
    why_gone: Callable[[], TransportError | None]
    name: int


@dataclass(frozen=True, slots=True)
class NativeSettings:
    """What the endpoint's settings say about collectives, and how its ranks are grouped."""

    groups: Sequence[Sequence[int]]
    chunk_bytes: int
    device_chunk_bytes: int
    direct_bytes: int
    wait_ns: int
    read_bytes: int


class Watch:
    """The doorbell of a rank's collectives, and who it has heard to have died."""

    def __init__(self, peers: Sequence[NativePeer]) -> None:
        self.bell = Bell()
        self._peers = {peer.rank: peer for peer in peers}
        self._ended: dict[int, PeerLost] = {}
        for peer in peers:
            if peer.process_fd is not None:
                self.bell.watch(peer.rank, peer.process_fd)

    def hear(self, timeout_ns: int) -> None:
        """Wait on the doorbell, and note whose process ended."""
        for rank in self.bell.wait(timeout_ns):
            self.bell.forget(rank)
            self._ended[rank] = process_ended(self._peers[rank].name)

    def why_lost(self, rank: int) -> TransportError | None:
        """Return why ``rank`` is gone, or None."""
        return self._peers[rank].why_gone() or self._ended.get(rank)


class Natives:
    """The collectives of one endpoint.

    Parameters
    ----------
    rank
        This rank's number in the group.
    name
        Its rank in the job, for errors.
    own
        Its stage.
    key
        What marks its memory.
    regions
        Where its arrays may lie.
    peers
        All other ranks, in order.
    settings
        Sizes and times.
    is_open
        False once the endpoint was closed.
    counts
        What collectives count.
    """

    def __init__(
        self, rank: int, name: int, own: Stage, key: bytes, regions: Regions, peers: Sequence[NativePeer],
        settings: NativeSettings, is_open: Callable[[], bool], counts: Counts,
    ) -> None:  # fmt: skip
        self._own = own
        self._watch = watch = Watch(peers)
        self._bells = {peer.rank: RemoteBell(_opener(peer)) for peer in peers}
        shown = [PeerStage(peer.rank, peer.name, peer.stage, self._bells[peer.rank].ring) for peer in peers]
        stages = {peer.rank: peer.stage for peer in peers} | {rank: own}
        self._stopped = stopped = threading.Event()  # so that the hook does not hold all this in a cycle
        hooks = EndpointHooks(
            watch.bell.writer, watch.hear, lambda: is_open() and not stopped.is_set(), watch.why_lost
        )  # fmt: skip
        lockstep = Lockstep(rank, name, own, shown, hooks, settings.wait_ns, counts)
        in_order = [stages[other] for other in sorted(stages)]
        cutter = Cutter(
            rank, in_order, settings.groups, settings.chunk_bytes, settings.direct_bytes, settings.device_chunk_bytes
        )  # fmt: skip
        marked = {peer.rank: (peer.stage.words, peer.mapped.key) for peer in peers}
        reader = Reader(own.words, key, marked, watch.why_lost)
        mapped: Mapping[int, Mapped] = {peer.rank: peer.mapped for peer in peers}
        self.collectives = Collectives(lockstep, cutter, regions, mapped, reader, settings.read_bytes)

    def wake(self) -> None:
        """Let a collective under way on another thread see that the endpoint was closed."""
        self._watch.bell.wake()

    def stop(self) -> None:
        """Take no more calls, and let one under way on another thread see it."""
        self._stopped.set()
        self.collectives.refuse("the group has ended")
        self.wake()

    def close(self) -> None:
        """Give everything back, once a collective under way on another thread has ended."""
        with self.collectives.turn:
            self.collectives.refuse("the endpoint was closed")
            self.collectives.transfers.close()
            self._own.words[BELL] = 0
            self._watch.bell.close()
            for bell in self._bells.values():
                bell.close()


def _opener(peer: NativePeer) -> Callable[[], int]:
    def open_bell() -> int:
        # Zero is the standard input of a rank that has begun no collective yet, or none any more. What is no pipe is
        # not a bell either: the descriptor was closed and is used for something else.
        if not (descriptor := peer.stage.words[BELL]):
            raise ConnectError(f"rank {peer.rank} has no bell")
        opened = open_descriptor(peer.rank, peer.address, descriptor, os.O_WRONLY | os.O_NONBLOCK)
        if not stat.S_ISFIFO(os.fstat(opened).st_mode):
            os.close(opened)
            raise ConnectError(f"rank {peer.rank} has closed its bell")
        return opened

    return open_bell
