"""Collectives that ranks of one host do together in shared memory, in the promised order.

Small arrays: every rank gives its array whole, and folds those of all. One round of waiting. Larger ones go in chunks,
of which each rank folds a share from what the others give and shows the result, which all take::

    step         k            k+1          k+2
    this rank    give k       fold k       take k
                 fold k-1     take k-1
                 take k-2

Where the array of a rank is on a device (`detcoll_shm.transfers`), the device copies between it and the stages while
the processor folds, so a step ends when its copies are past::

    step         k                       k+1
    this rank    begin take k-2, give k  begin take k-1, give k+1
                 fold k-1                fold k
                 await, say GIVEN        await, say GIVEN

Such a rank gives its own share too, folds from its stage, and takes its own result from there, since the processor
cannot touch the array. It says GIVEN only when its copies from others' stages are past as well: then others write their
next results there. All ranks take larger chunks if there is such a rank.

The stage has two halves in turn, so that ranks may be a step apart. A half may be given again once its last chunk was
taken, since whoever shows a result has read what it was made from; and across calls, since whoever has arrived at a
call is through with the one before.

Where all arrays lie in regions (`detcoll_shm.regions`) nothing is given: every rank folds its share from all arrays
and writes it into all of them. Where ranks may read each other's processes (`detcoll_shm.reading`), every rank folds
its share from what it reads there, in rounds, and reads the shares that others have folded. It returns once all have
read its own.

Letters: n ranks, V bytes. A rank copies (n-1)/n V into its stage, folds V/n, and copies V out; where it
reads instead, it copies 2 (n-1)/n V and folds V/n.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.descriptor import Descriptor, digest_of
from detcoll.errors import Closed, UsageError
from detcoll.signature import signature_of
from detcoll.transport import DeviceArray, NativeCall
from detcoll.types import check_op, parse_dtype
from detcoll_shm.call_layout import CallLayout, Cut, Cutter
from detcoll_shm.lockstep import NEVER, Lockstep
from detcoll_shm.reading import Reader
from detcoll_shm.regions import DEVICE, NOWHERE, OPEN, Mapped, Place, Regions
from detcoll_shm.stage import FOLDED, GIVEN, TAKEN
from detcoll_shm.transfers import Transfers

LARGEST_KEPT_LAYOUTS = 256


class Collectives:
    """The collectives of one rank. One thread at a time.

    Parameters
    ----------
    lockstep
        How ranks wait for each other.
    cutter
        Cuts arrays and stages.
    regions
        Where this rank's arrays may lie.
    mapped
        The regions of all others, by rank.
    reader
        Reads arrays of other processes.
    read_bytes
        Size from which arrays are read so.
    """

    def __init__(
        self, lockstep: Lockstep, cutter: Cutter, regions: Regions, mapped: Mapping[int, Mapped], reader: Reader,
        read_bytes: int,
    ) -> None:  # fmt: skip
        self._lockstep, self._cutter = lockstep, cutter
        self._regions, self._mapped = regions, mapped
        self._reader, self._read_bytes = reader, read_bytes
        self._layouts: OrderedDict[tuple[Any, ...], CallLayout] = OrderedDict()
        self._chunk = 0
        """Chunks that went through the stages since the start, the same on all ranks between calls."""
        self._ended = ""
        """Why no later call is taken, or nothing."""
        self._cause: BaseException | None = None
        self.transfers = Transfers(lockstep, cutter.stages)
        """Copies to and from devices."""
        self.turn = threading.Lock()
        """Held while a collective uses shared memory."""

    def run(self, call: NativeCall, deadline_ns: int) -> None:
        """Carry out one collective."""
        array = call.array
        key: tuple[Any, ...] = (
            call.kind, call.op, array.dtype, array.size, call.root, call.arrays, call.cut, call.shape
        )  # fmt: skip
        layout = self._layouts.get(key) or self._lay_out(key, call)
        if call.name:
            layout = layout.named(call.name)
        lockstep = self._lockstep
        if not lockstep.peers:
            return
        with self.turn:
            if self._ended:
                raise Closed(self._ended) from self._cause
            before, lockstep.number, lockstep.timeout_ns = lockstep.sequence, call.sequence, call.timeout_ns
            try:
                _HOW[call.kind](self, layout, call, deadline_ns)
            except BaseException as error:
                self._end(error, layout, before)
                self.transfers.end()
                raise

    def refuse(self, reason: str) -> None:
        """Take no later call."""
        self._ended = self._ended or reason

    def _end(self, error: BaseException, layout: CallLayout, before: int) -> None:
        """Take no later call, and tell the others, even if this is interrupted again."""
        self._ended, self._cause = f"an earlier collective failed: {error!r}", error
        told = False
        while not told:
            with contextlib.suppress(KeyboardInterrupt):
                reason = self._lockstep.resign(error, layout.descriptor.kind, before)
                self._ended = f"an earlier collective failed: {reason}"
                told = True

    def _lay_out(self, key: tuple[Any, ...], call: NativeCall) -> CallLayout:
        dtype = parse_dtype(call.array.dtype)
        if call.kind not in _HOW:
            raise UsageError(f"kind={call.kind!r} is not a collective of shared memory; a plan does it")
        if signature_of(call.kind).has_op:
            check_op(call.op, dtype)
        if not 0 <= call.root <= len(self._lockstep.peers):
            raise UsageError(f"root={call.root} must be a rank from 0 to {len(self._lockstep.peers)}")
        descriptor = Descriptor(
            0, call.kind, call.op.value, dtype.name, call.array.size, call.root, call.arrays, cut=digest_of(call.cut),
            shape=call.shape,
        )  # fmt: skip
        return self._keep(key, self._cutter.layout(descriptor, call.op, dtype))

    def _keep(self, key: tuple[Any, ...], layout: CallLayout) -> CallLayout:
        if len(self._layouts) >= LARGEST_KEPT_LAYOUTS:
            self._layouts.popitem(last=False)
        self._layouts[key] = layout
        return layout

    def _for_devices(self, layout: CallLayout) -> CallLayout:
        """Return the layout of the same call where a rank has its array on a device."""
        key = "on devices", layout.descriptor.op, layout.dtype, layout.nbytes
        return self._layouts.get(key) or self._keep(key, self._cutter.for_devices(layout))

    def _barrier(self, layout: CallLayout, call: NativeCall, deadline_ns: int) -> None:
        self._lockstep.arrive(layout.descriptor, layout.digest, deadline_ns)
        self._lockstep.await_all_here()

    def _all_reduce(self, layout: CallLayout, call: NativeCall, deadline_ns: int) -> None:
        (self._all_reduce_in_chunks if layout.chunks else self._all_reduce_whole)(layout, call, deadline_ns)

    def _all_reduce_whole(self, layout: CallLayout, call: NativeCall, deadline_ns: int) -> None:
        half, out, device = self._chunk & 1, call.array, call.device
        given, lockstep = layout.whole[half], self._lockstep
        if device is None:
            given[lockstep.rank][...] = out
        else:
            out = layout.whole_out[half]
            lockstep.prepare(layout.descriptor, deadline_ns)
            self.transfers.open(device)
            self.transfers.copy(device, 0, given[lockstep.rank].view(np.uint8), to_device=False)
        lockstep.arrive(layout.descriptor, layout.digest, deadline_ns)
        lockstep.await_all_here()
        layout.fold(given, out, layout.rooms)
        self._chunk += 1
        if device is not None:
            self.transfers.copy(device, 0, out.view(np.uint8), to_device=True)

    def _all_reduce_in_chunks(self, layout: CallLayout, call: NativeCall, deadline_ns: int) -> None:
        lockstep, device = self._lockstep, call.device
        lockstep.last_word = FOLDED, NEVER
        if device is not None:
            lockstep.prepare(layout.descriptor, deadline_ns)
            lockstep.arrive(layout.descriptor, layout.digest, deadline_ns, DEVICE)
            lockstep.await_all_here()
            self._chunk += 1  # as on ranks that did not know of a device
            self._all_reduce_on_device(self._for_devices(layout), device)
            self._finish()
            return
        memory = call.array.view(np.uint8)
        place = self._place_of(layout, memory)
        if place is NOWHERE:
            self._give(layout, 0, memory)
        lockstep.arrive(layout.descriptor, layout.digest, deadline_ns, place)
        lockstep.await_all_here()
        if lockstep.anyone_is(DEVICE.region):
            layout = self._for_devices(layout)
            self._chunk += 1  # a rank that did not know that there are devices has given a small first chunk
            self._give(layout, 0, memory)
            self._all_reduce_staged(layout, memory)
            self._finish()
            return
        if place is NOWHERE:
            self._reader.try_all()
        else:
            places = lockstep.places()
            if all(place.region > 0 for place in places):
                self._all_reduce_in_place(layout, places, memory)
                self._finish()
                return
            if all(place.region == OPEN for place in places):
                self._all_reduce_by_reading(layout, places, memory)
                self._finish()
                return
            self._give(layout, 0, memory)
        self._all_reduce_staged(layout, memory)
        self._finish()

    def _finish(self) -> None:
        """End a collective that went on after all had arrived."""
        self._lockstep.confirm()
        self._lockstep.last_word = None

    def _place_of(self, layout: CallLayout, memory: NDArray[np.uint8]) -> Place:
        place = self._regions.place_of(memory)
        if place is NOWHERE and layout.nbytes >= self._read_bytes and self._reader.may_read:
            return Place(OPEN, 0, memory.__array_interface__["data"][0])
        return place

    def _all_reduce_staged(self, layout: CallLayout, memory: NDArray[np.uint8]) -> None:
        """Go through the stages; this rank has given its first chunk."""
        chunks = layout.chunks
        self._lockstep.last_word = FOLDED, self._chunk + chunks
        for step in range(1, chunks + 2):
            if step >= 2:
                self._take(layout, step - 2, memory)
            if step < chunks:
                self._give(layout, step, memory)
            if step <= chunks:
                self._fold(layout, step - 1, memory)
        self._chunk += chunks

    def _all_reduce_on_device(self, layout: CallLayout, device: DeviceArray) -> None:
        """Go through the stages, to which the device copies and from which it takes."""
        lockstep, transfers, chunks = self._lockstep, self.transfers, layout.chunks
        lockstep.last_word = FOLDED, self._chunk + chunks
        transfers.open(device)
        for step in range(chunks + 2):
            at, chunk = step * layout.chunk_bytes, self._chunk + step
            if step >= 2:
                self._begin_to_take(layout, step - 2, device)
            if step < chunks:
                transfers.begin(device, at, layout.cut(step, chunk & 1).given, to_device=False)
            if 1 <= step <= chunks:
                self._fold_given(layout, step - 1)
            transfers.settle()
            if step < chunks:
                lockstep.publish(GIVEN, chunk + 1)
        self._chunk += chunks

    def _fold_given(self, layout: CallLayout, number: int) -> None:
        chunk = self._chunk + number
        cut = layout.cut(number, chunk & 1)
        begin, end = cut.share
        self._lockstep.await_all(GIVEN, chunk + 1)
        if begin < end:
            mine = cut.given[begin:end].view(layout.dtype)
            layout.fold([mine if given is None else given for given in cut.inputs], cut.out, cut.rooms)
        self._lockstep.publish(FOLDED, chunk + 1)

    def _begin_to_take(self, layout: CallLayout, number: int, device: DeviceArray) -> None:
        at, chunk = number * layout.chunk_bytes, self._chunk + number
        cut = layout.cut(number, chunk & 1)
        self._lockstep.await_all(FOLDED, chunk + 1)
        for place, begin, end in (*cut.takes, (cut.out_bytes, *cut.share)):
            if begin < end:
                self.transfers.begin(device, at + begin, place, to_device=True)

    def _all_reduce_in_place(self, layout: CallLayout, places: Sequence[Place], memory: NDArray[np.uint8]) -> None:
        lockstep = self._lockstep
        arrays = [
            memory if rank == lockstep.rank else self._mapped[rank].view(place, layout.nbytes)
            for rank, place in enumerate(places)
        ]
        edges = self._cutter.edges(layout.nbytes, layout.dtype.itemsize)
        begin, end = edges[lockstep.rank], edges[lockstep.rank + 1]
        for at in range(begin, end, layout.chunk_bytes):
            inputs = [array[at : min(at + layout.chunk_bytes, end)].view(layout.dtype) for array in arrays]
            own = inputs[lockstep.rank]
            rooms = [room[: own.size] for room in layout.rooms]
            layout.fold(inputs, own, rooms)
            for rank, other in enumerate(inputs):
                if rank != lockstep.rank:
                    np.copyto(other, own)
        self._chunk += 1
        lockstep.last_word = FOLDED, self._chunk
        lockstep.publish(FOLDED, self._chunk)
        lockstep.await_all(FOLDED, self._chunk)

    def _all_reduce_by_reading(self, layout: CallLayout, places: Sequence[Place], memory: NDArray[np.uint8]) -> None:
        lockstep, step = self._lockstep, layout.read_step_bytes
        edges = self._cutter.edges(layout.nbytes, layout.dtype.itemsize)
        shares = list(pairwise(edges))
        rounds = -(-max(end - begin for begin, end in shares) // step)
        for number in range(rounds + 1):
            if number < rounds:
                begin, end = _part(shares[lockstep.rank], number, step)
                if begin < end:
                    self._fold_read(layout, places, memory[begin:end], begin)
                lockstep.publish(FOLDED, self._chunk + number + 1)
            if number:
                lockstep.await_all(FOLDED, self._chunk + number)
                for rank, place in enumerate(places):
                    begin, end = _part(shares[rank], number - 1, step)
                    if rank != lockstep.rank and begin < end:
                        self._reader.read(rank, place.offset + begin, memory[begin:end])
        self._chunk += rounds
        lockstep.last_word = TAKEN, lockstep.sequence
        lockstep.publish(TAKEN, lockstep.sequence)
        lockstep.await_all(TAKEN, lockstep.sequence)

    def _fold_read(self, layout: CallLayout, places: Sequence[Place], own: NDArray[np.uint8], begin: int) -> None:
        """Fold into ``own``, which lies ``begin`` bytes behind the beginning of the array, what all have there."""
        inputs = []
        for rank, place in enumerate(places):
            given = own
            if rank != self._lockstep.rank:
                given = self._reader.room(rank, own.size)
                self._reader.read(rank, place.offset + begin, given)
            inputs.append(given.view(layout.dtype))
        out = own.view(layout.dtype)
        layout.fold(inputs, out, [room[: out.size] for room in layout.rooms])

    def _give(self, layout: CallLayout, number: int, memory: NDArray[np.uint8]) -> None:
        at, chunk = number * layout.chunk_bytes, self._chunk + number
        for place, begin, end in layout.cut(number, chunk & 1).gives:
            np.copyto(place, memory[at + begin : at + end])
        self._lockstep.publish(GIVEN, chunk + 1)

    def _fold(self, layout: CallLayout, number: int, memory: NDArray[np.uint8]) -> None:
        at, chunk = number * layout.chunk_bytes, self._chunk + number
        cut: Cut = layout.cut(number, chunk & 1)
        begin, end = cut.share
        own = memory[at + begin : at + end]
        self._lockstep.await_all(GIVEN, chunk + 1)
        if begin < end:
            mine = own.view(layout.dtype)
            inputs = [mine if given is None else given for given in cut.inputs]
            layout.fold(inputs, cut.out, cut.rooms)
        self._lockstep.publish(FOLDED, chunk + 1)
        np.copyto(own, cut.out_bytes)

    def _take(self, layout: CallLayout, number: int, memory: NDArray[np.uint8]) -> None:
        at, chunk = number * layout.chunk_bytes, self._chunk + number
        self._lockstep.await_all(FOLDED, chunk + 1)
        for place, begin, end in layout.cut(number, chunk & 1).takes:
            np.copyto(memory[at + begin : at + end], place)

    def _broadcast(self, layout: CallLayout, call: NativeCall, deadline_ns: int) -> None:
        lockstep, step, root = self._lockstep, self._cutter.chunk_bytes, layout.descriptor.root
        nbytes, device = call.array.nbytes, call.device
        is_root, has_many = lockstep.rank == root, nbytes > step
        begins_here = is_root and not (has_many and device is not None)
        place = None
        if has_many:
            lockstep.last_word = FOLDED, NEVER
            place = NOWHERE if device is None else DEVICE
        if device is not None:
            lockstep.prepare(layout.descriptor, deadline_ns)
        if begins_here and nbytes:
            self._show(call, 0, step, self._chunk)
        lockstep.arrive(layout.descriptor, layout.digest, deadline_ns, place)
        lockstep.await_all_here()
        if has_many and lockstep.anyone_is(DEVICE.region):  # begin anew with large chunks, see `_all_reduce_in_chunks`
            step, begins_here = self._cutter.device_chunk_bytes, False
            self._chunk += 1
        first = self._chunk
        for chunk, at in enumerate(range(0, nbytes, step), first):
            if not is_root:
                lockstep.await_one(root, GIVEN, chunk + 1)
                self._see(call, at, step, chunk)
                lockstep.publish(FOLDED, chunk + 1)
            elif at or not begins_here:
                lockstep.await_all(FOLDED, chunk - 1 if chunk > first + 1 else 0)
                self._show(call, at, step, chunk)
            self._chunk += 1
        if has_many:
            if is_root:
                lockstep.await_all(FOLDED, self._chunk)
            self._finish()

    def _show(self, call: NativeCall, at: int, step: int, chunk: int) -> None:
        """Put ``step`` bytes of the array, or what is left, where all see them."""
        given = self._cutter.stages[self._lockstep.rank].given[chunk & 1][: min(step, call.array.nbytes - at)]
        if call.device is None:
            np.copyto(given, call.array.view(np.uint8)[at : at + step])
        else:
            self.transfers.open(call.device)
            self.transfers.copy(call.device, at, given, to_device=False)
        self._lockstep.publish(GIVEN, chunk + 1)

    def _see(self, call: NativeCall, at: int, step: int, chunk: int) -> None:
        """Copy what the root shows."""
        given = self._cutter.stages[call.root].given[chunk & 1][: min(step, call.array.nbytes - at)]
        if call.device is None:
            np.copyto(call.array.view(np.uint8)[at : at + step], given)
        else:
            self.transfers.open(call.device)
            self.transfers.copy(call.device, at, given, to_device=True)


_HOW: dict[str, Callable[[Collectives, CallLayout, NativeCall, int], None]] = {
    "all_reduce": Collectives._all_reduce,
    "broadcast": Collectives._broadcast,
    "barrier": Collectives._barrier,
}
"""What carries out each kind."""


def _part(share: tuple[int, int], number: int, step: int) -> tuple[int, int]:
    """Return the first and last byte of one step of a share; empty where it has fewer."""
    begin, end = share
    at = min(begin + number * step, end)
    return at, min(at + step, end)
