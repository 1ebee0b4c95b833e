"""What every transport must do: the SPI of `detcoll.transport` as a suite of tests.

Subclass `TransportContract` in a pytest module, state the capabilities, and supply two fabrics::

    class TestMemory(TransportContract):
        capabilities = MemoryTransport.capabilities

        def fabric(self, n):
            return ThreadFabric(MemoryTransport(), n)

        def clogged_fabric(self):
            return ThreadFabric(MemoryTransport(), 2, {"capacity_bytes": 0})

Each test runs one program of `detcoll.testing.programs` on all ranks of a fabric. What the capabilities do not
promise is skipped, with the reason.
"""

# ruff: noqa: D102 (the names of the tests say what they check)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pytest

from detcoll.testing.fabric import Fabric
from detcoll.testing.programs import (
    beside,
    blocks,
    collectives,
    devices,
    discarding,
    endings,
    messages,
    ownership,
    windows,
)
from detcoll.transport import Capabilities

MIB = 2**20
WORLDS = (1, 2, 3, 4, 7)
SIZES_BYTES = (0, 1, 2, 7, 63, 1001, 65_537, 5 * MIB + 3)
COUNTS = (0, 1, 2, 3, 7, 1001)
LARGE_COUNT = 3 * MIB // 4 + 1
BLOCK_KINDS = ("reduce", "all_gather", "reduce_scatter", "gather", "scatter", "all_to_all")


class MessageContract(ABC):
    """Point-to-point messages.

    Attributes
    ----------
    capabilities : Capabilities
        Of the transport under test.
    abort_unseen : str
        Why an endpoint cannot learn that another one has aborted; empty where it can.
    clogged_bytes : int
        The size of a message which the peer of `clogged_fabric` does not take before it has posted the receive.
    worlds : Sequence of int
        Numbers of ranks to test with.
    large_count : int
        How many elements are a large array; fewer where the transport cuts it into very small parts.
    """

    capabilities: Capabilities
    abort_unseen: str = ""
    clogged_bytes: int = 8 * MIB
    worlds: Sequence[int] = WORLDS
    large_count: int = LARGE_COUNT

    @abstractmethod
    def fabric(self, n: int) -> Fabric:
        """Return a fabric of ``n`` ranks, not yet entered."""

    @abstractmethod
    def clogged_fabric(self) -> Fabric:
        """Return a fabric of two ranks that take little before a receive is posted, not yet entered."""

    @pytest.mark.parametrize("n", WORLDS)
    @pytest.mark.parametrize("nbytes", [0, 1001, 300_001])
    def test_each_sends_to_each(self, n: int, nbytes: int) -> None:
        with self._world(n) as fabric:
            fabric.run(messages.each_to_each, nbytes=nbytes)

    @pytest.mark.parametrize("lent", [False, True], ids=["into", "lent"])
    def test_sizes_there_and_back(self, lent: bool) -> None:
        with self.fabric(2) as fabric:
            for nbytes in SIZES_BYTES:
                fabric.run(messages.there_and_back, nbytes=nbytes, lent=lent)

    def test_tags_out_of_order(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(messages.tags_out_of_order)

    def test_same_tag_keeps_order(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(messages.same_tag_in_order)

    def test_small_do_not_overtake_large(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(messages.same_tag_sizes_in_order)

    @pytest.mark.parametrize("n", [2, 3])
    def test_many_in_both_directions(self, n: int) -> None:
        with self.fabric(n) as fabric:
            fabric.run(messages.flood)

    @pytest.mark.parametrize("nbytes", [0, 1000, 3 * MIB])
    def test_unexpected_messages(self, nbytes: int) -> None:
        with self.fabric(2) as fabric:
            fabric.run(messages.unexpected, nbytes=nbytes)

    def test_notes_past_unasked_messages(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(messages.notes_past_unasked)

    @pytest.mark.parametrize("early", [False, True], ids=["posted-late", "posted-early"])
    @pytest.mark.parametrize("lent", [False, True], ids=["into", "lent"])
    @pytest.mark.parametrize(("sent_bytes", "stated_bytes"), [(10, 20), (20, 10), (0, 5), (5, 0)])
    def test_wrong_size(self, sent_bytes: int, stated_bytes: int, lent: bool, early: bool) -> None:
        with self.fabric(2) as fabric:
            fabric.run(messages.wrong_size, sent_bytes=sent_bytes, stated_bytes=stated_bytes, lent=lent, early=early)

    def test_lent_views_stay(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(ownership.lent_views_stay)

    def test_released_memory_serves_again(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(ownership.released_memory_serves_again)

    @pytest.mark.parametrize("nbytes", [0, 1, 1001, 3 * MIB])
    def test_into_is_filled(self, nbytes: int) -> None:
        with self.fabric(2) as fabric:
            fabric.run(ownership.into_is_filled, nbytes=nbytes)

    @pytest.mark.parametrize("nbytes", [100, 100_000, 3 * MIB])
    def test_memory_is_not_shared(self, nbytes: int) -> None:
        with self.fabric(2) as fabric:
            fabric.run(ownership.sender_may_overwrite, nbytes=nbytes)
            fabric.run(ownership.receiver_may_overwrite, nbytes=nbytes)

    def test_one_memory_to_many(self) -> None:
        with self.fabric(3) as fabric:
            fabric.run(ownership.one_memory_to_many, nbytes=MIB)

    def test_tickets_tell(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(ownership.tickets_tell)

    @pytest.mark.parametrize("n", [1, 2])
    def test_poll_keeps_its_deadline(self, n: int) -> None:
        with self.fabric(n) as fabric:
            fabric.run(endings.poll_keeps_its_deadline)

    def test_cancelled_receive(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(endings.cancelled_receive)

    def test_cancelled_between_others(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(endings.cancelled_between_others)

    def test_ended_is_not_cancelled(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(endings.ended_is_not_cancelled)

    @pytest.mark.parametrize("cancel", [False, True], ids=["kept", "cancelled"])
    def test_clogged_send(self, cancel: bool) -> None:
        with self.clogged_fabric() as fabric:
            fabric.run(endings.clogged_send, nbytes=self.clogged_bytes, cancel=cancel)

    def test_clogged_close(self) -> None:
        with self.clogged_fabric() as fabric:
            fabric.run(endings.clogged_close, nbytes=self.clogged_bytes)

    def test_aborted_peer(self) -> None:
        with self.fabric(3) as fabric:
            fabric.run(endings.aborted_peer, seen=not self.abort_unseen)

    def test_survivors_go_on(self) -> None:
        with self.fabric(3) as fabric:
            fabric.run(endings.survivors_go_on)

    @pytest.mark.parametrize("nbytes", [0, 5000, 3 * MIB])
    def test_lost_peer_costs_its_own_tickets(self, nbytes: int) -> None:
        if self.abort_unseen:
            pytest.skip(self.abort_unseen)
        with self.fabric(4) as fabric:
            fabric.run(endings.lost_peer_costs_its_own_tickets, nbytes=nbytes)

    def test_discarded_receives(self) -> None:
        with self.fabric(3) as fabric:
            fabric.run(discarding.discarded_receives)

    @pytest.mark.parametrize("nbytes", [0, 100, 100_000, 3 * MIB])
    def test_discarded_messages(self, nbytes: int) -> None:
        with self.fabric(2) as fabric:
            fabric.run(discarding.discarded_messages, nbytes=nbytes)

    @pytest.mark.parametrize("nbytes", [300, 8000, None], ids=["300", "8000", "clogging"])
    def test_discarded_messages_give_their_room_back(self, nbytes: int | None) -> None:
        rounds = 4 if nbytes is None else 20
        with self.clogged_fabric() as fabric:
            fabric.run(discarding.discarded_messages, nbytes=nbytes or self.clogged_bytes, rounds=rounds)

    def test_many_prefixes_are_discarded(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(discarding.discarded_messages, nbytes=100, others=4095)

    @pytest.mark.parametrize("nbytes", [100, 100_000, 3 * MIB])
    def test_discarded_while_they_arrive(self, nbytes: int) -> None:
        with self.fabric(2) as fabric:
            fabric.run(discarding.discarded_while_they_arrive, nbytes=nbytes)

    def test_sending_ends_discarding(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(discarding.sending_ends_it)

    def test_bad_prefixes(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(discarding.bad_prefixes)

    @pytest.mark.parametrize("n", [2, 3])
    def test_joined_when_needed(self, n: int) -> None:
        fabric = self.fabric(n)
        fabric.needed = ()
        with fabric:
            fabric.run(messages.each_to_each, nbytes=1001)
            fabric.run(messages.flood, count=20)

    @pytest.mark.parametrize("nbytes", [100, 3 * MIB])
    def test_close_finishes_sends(self, nbytes: int) -> None:
        with self.fabric(2) as fabric:
            fabric.run(endings.close_finishes_sends, nbytes=nbytes)

    def test_close_finishes_clogged_sends(self) -> None:
        with self.clogged_fabric() as fabric:
            fabric.run(endings.close_finishes_sends, nbytes=self.clogged_bytes)

    @pytest.mark.parametrize("abort_first", [False, True], ids=["close", "abort"])
    @pytest.mark.parametrize("n", [1, 2])
    def test_closed_twice(self, n: int, abort_first: bool) -> None:
        with self.fabric(n) as fabric:
            fabric.run(endings.closed_twice, abort_first=abort_first)

    def test_bad_arguments(self) -> None:
        with self.fabric(2) as fabric:
            fabric.run(endings.bad_arguments)

    def test_too_large(self) -> None:
        if self.capabilities.largest_message_bytes >= 2**32:
            pytest.skip("its largest message does not fit in memory here")
        with self.fabric(2) as fabric:
            fabric.run(endings.too_large)

    def test_waits_on_descriptor(self) -> None:
        with self.fabric(2) as fabric:
            if not any(fabric.run(endings.waits_on_descriptor)):
                pytest.skip("it has no descriptor to wait on")

    @pytest.mark.parametrize("open_ended", [False, True], ids=["closing", "open-ended"])
    def test_window_ahead(self, open_ended: bool) -> None:
        self._require_timed()
        with self.fabric(2) as fabric:
            fabric.run(windows.window_ahead, open_ended=open_ended)

    def test_window_passed(self) -> None:
        self._require_timed()
        with self.fabric(2) as fabric:
            fabric.run(windows.window_passed)

    def test_window_too_short(self) -> None:
        self._require_timed()
        with self.fabric(2) as fabric:
            fabric.run(windows.window_too_short)

    def test_window_cuts(self) -> None:
        self._require_timed()
        if not self.capabilities.splits:
            pytest.skip("it does not send parts of messages")
        with self.fabric(2) as fabric:
            fabric.run(windows.window_cuts)

    def _require_timed(self) -> None:
        if not self.capabilities.timed:
            pytest.skip("it does not hold sends until a window opens")

    def _world(self, n: int) -> Fabric:
        if n not in self.worlds:
            pytest.skip(f"not tested with {n} ranks")
        return self.fabric(n)


class CollectiveContract(MessageContract):
    """Collectives that the transport does itself, as far as its capabilities name them."""

    @pytest.mark.parametrize("n", WORLDS)
    def test_all_reduce(self, n: int) -> None:
        self._require("all_reduce")
        with self._world(n) as fabric:
            fabric.run(collectives.all_reduce, counts=list(COUNTS))

    def test_all_reduce_large(self) -> None:
        self._require("all_reduce")
        with self.fabric(2) as fabric:
            fabric.run(collectives.all_reduce, counts=[self.large_count], dtype_names=["float32", "bfloat16", "int64"])

    @pytest.mark.parametrize("groups", [[[0, 1, 2]], [[0, 1], [2]], [[1, 2], [0]]], ids=["3", "2+1", "placed"])
    def test_all_reduce_keeps_the_order(self, groups: list[list[int]]) -> None:
        self._require("all_reduce")
        if not self.capabilities.ordered:
            pytest.skip("its collectives fold in an order of their own")
        with self.fabric(3) as fabric:
            fabric.run(collectives.ordered, groups=groups, counts=list(COUNTS))
            fabric.run(collectives.edge_values, groups=groups)

    @pytest.mark.parametrize("n", [2, 3])
    def test_all_reduce_of_edge_values(self, n: int) -> None:
        self._require("all_reduce")
        with self._world(n) as fabric:
            fabric.run(collectives.edge_values)

    def test_all_reduce_of_a_slice(self) -> None:
        self._require("all_reduce")
        with self.fabric(3) as fabric:
            fabric.run(collectives.all_reduce_part)

    @pytest.mark.parametrize("n", WORLDS)
    def test_broadcast(self, n: int) -> None:
        self._require("broadcast")
        with self._world(n) as fabric:
            fabric.run(
                collectives.broadcast, counts=[*COUNTS, min(100_001, self.large_count)] if n == 2 else [0, 1, 1001]
            )

    @pytest.mark.parametrize("n", WORLDS)
    def test_barrier(self, n: int) -> None:
        self._require("barrier")
        with self._world(n) as fabric:
            of_ranks = fabric.run(collectives.barrier)
            for times in zip(*of_ranks, strict=True):
                assert max(entered for entered, _ in times) <= min(left for _, left in times)

    @pytest.mark.parametrize("n", [1, 2, 3])
    @pytest.mark.parametrize("kind", BLOCK_KINDS)
    def test_collectives_of_blocks(self, kind: str, n: int) -> None:
        self._require(kind)
        with self._world(n) as fabric:
            for count in (0, 1, 101):
                fabric.run(blocks.each_case, kind=kind, counts=(count,) * n)
            if kind in self.capabilities.native_uneven:
                fabric.run(blocks.each_case, kind=kind, counts=tuple(range(n)))

    @pytest.mark.parametrize("kind", BLOCK_KINDS)
    def test_large_collectives_of_blocks(self, kind: str) -> None:
        self._require(kind)
        with self.fabric(2) as fabric:
            fabric.run(
                blocks.each_case, kind=kind, counts=(self.large_count,) * 2, dtype_names=["float32", "bfloat16"]
            )  # fmt: skip

    @pytest.mark.parametrize("kind", BLOCK_KINDS)
    def test_blocks_of_different_counts(self, kind: str) -> None:
        self._require(kind)
        if kind not in self.capabilities.native_uneven:
            pytest.skip(f"its {kind} takes equal blocks only")
        with self.fabric(2) as fabric:
            fabric.run(blocks.different_counts, kind=kind)

    def test_collectives_of_arrays_on_devices(self) -> None:
        self._require_devices()
        with self.fabric(3) as fabric:
            fabric.run(devices.each_call, counts=[1, 301])

    @pytest.mark.parametrize("count", [1, 100_001])
    def test_a_device_is_late(self, count: int) -> None:
        self._require_devices()
        with self.fabric(2) as fabric:
            fabric.run(devices.late_stream, count=min(count, self.large_count))

    def test_collectives_of_groups(self) -> None:
        self._require_groups()
        with self.fabric(3) as fabric:
            fabric.run(blocks.in_a_group)

    @pytest.mark.parametrize("elems", [1, MIB // 2])
    def test_groups_wait_alone(self, elems: int) -> None:
        self._require_groups()
        with self.fabric(3) as fabric:
            fabric.run(blocks.groups_wait_alone, elems=min(elems, self.large_count))

    def test_a_group_ends_alone(self) -> None:
        self._require_groups()
        with self.fabric(3) as fabric:
            fabric.run(blocks.a_group_ends_alone)

    def test_a_group_is_stopped(self) -> None:
        self._require_groups()
        with self.fabric(2) as fabric:
            fabric.run(blocks.a_group_is_stopped)

    def test_calls_of_different_numbers(self) -> None:
        self._require("all_reduce")
        with self.fabric(2) as fabric:
            fabric.run(blocks.numbers_differ)

    def test_collectives_beside_messages(self) -> None:
        for name in ("all_reduce", "broadcast", "barrier"):
            self._require(name)
        with self.fabric(3) as fabric:
            fabric.run(collectives.mixed)

    @pytest.mark.parametrize("kind", ["all_reduce", "broadcast", "barrier"])
    def test_late_collective(self, kind: str) -> None:
        self._require(kind)
        with self.fabric(3) as fabric:
            fabric.run(collectives.late_collective, kind=kind)

    def test_natives_beside_messages(self) -> None:
        self._require("all_reduce")
        with self.fabric(3) as fabric:
            fabric.run(beside.natives_beside_messages)

    @pytest.mark.parametrize("line", [1, 5, 20, 40, 60, 80, 100, 120, 140, 200])
    @pytest.mark.parametrize("elems", [10, MIB // 2])
    def test_interrupted_collective(self, line: int, elems: int) -> None:
        for name in ("all_reduce", "barrier"):
            self._require(name)
        with self.fabric(3) as fabric:
            fabric.run(beside.interrupted, line=line, elems=elems)

    def test_interrupted_while_it_waits(self) -> None:
        for name in ("all_reduce", "barrier"):
            self._require(name)
        with self.fabric(3) as fabric:
            fabric.run(beside.interrupted_while_it_waits)

    def test_aborted_inside_a_collective(self) -> None:
        for name in ("all_reduce", "barrier"):
            self._require(name)
        with self.fabric(2) as fabric:
            fabric.run(beside.aborted_inside)

    def test_unsupported_collectives(self) -> None:
        for name in ("all_reduce", "broadcast", "barrier"):
            self._require(name)
        with self.fabric(2) as fabric:
            fabric.run(collectives.unsupported)

    def test_bad_collective_arguments(self) -> None:
        for name in ("all_reduce", "broadcast", "barrier"):
            self._require(name)
        with self.fabric(2) as fabric:
            fabric.run(collectives.bad_arguments)

    def _require_devices(self) -> None:
        if not self.capabilities.native_devices:
            pytest.skip("it takes no arrays on devices")

    def _require_groups(self) -> None:
        if not self.capabilities.native_groups:
            pytest.skip("it has no collectives of groups")

    def _require(self, name: str) -> None:
        if name not in self.capabilities.native:
            pytest.skip(f"it has no {name} of its own")


class TransportContract(CollectiveContract):
    """The whole contract; see the module's text for what a subclass supplies."""
