"""The collectives and messages of torch, under their old and new names, as calls of a communicator.

torch 2.4 to 2.14 call the same things by different names, and its C++ code calls some of them too. Arguments are
checked inside the call of detcoll, so what one rank refuses ends that call on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from detcoll.arguments import of_blocks, on_one_array, rank_of, to_root
from detcoll.communicator import Communicator
from detcoll.errors import UsageError
from detcoll.job.caller import Request
from detcoll.torch import devices, sparse
from detcoll.torch.lists import (
    are_alike,
    as_list,
    by_type,
    check_pairs,
    check_sizes,
    check_types,
    flat,
    inner,
    only,
    pairs_by_type,
    shape_name,
    type_name,
    uneven,
)
from detcoll.torch.profiling import profiled
from detcoll.torch.tensors import (
    Buffer,
    Reduction,
    all_writable,
    joined,
    name_of,
    readable,
    received,
    reduction_of,
    sent,
    writable,
)
from detcoll.torch.work import Work, after, all_of


class Kinds:
    """The part of a process group that makes calls.

    Methods take what torch's own groups take: tensors, and an object of options. They return a `Work`, of which those
    that torch asks to wait for have ended.
    """

    @property
    def communicator(self) -> Communicator:
        """The communicator that carries out the calls."""
        raise NotImplementedError

    def _run(
        self, kind: str, check: Callable[[], Request], result: list[Tensor], opts: Any, name: str
    ) -> Work:  # fmt: skip
        """Make a collective call."""
        raise NotImplementedError

    def _kept(self, work: Work) -> Work:
        """Return a work, after taking note of it."""
        raise NotImplementedError

    def getSize(self) -> int:
        """Return the number of ranks."""
        return self.communicator.size

    def getRank(self) -> int:
        """Return this rank's number in the group."""
        return self.communicator.rank

    def allreduce(self, tensors: Sequence[Tensor] | Tensor, opts: Any = None, *_: Any) -> Work:
        """Reduce a tensor over all ranks, in place; a sparse one is added."""
        listed = as_list(tensors)
        if len(listed) == 1 and listed[0].layout is torch.sparse_coo:
            return self._kept(sparse.all_reduce(self, listed[0], _op(opts), opts))
        return self._all_reduce(listed, opts) if len(listed) == 1 else self.allreduce_coalesced(listed, opts)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Reduce several tensors over all ranks, in place."""
        return _each(opts, by_type(tensors), lambda alike: self._all_reduce(alike, opts))

    def _all_reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        def check(reduction: Reduction) -> Request:
            return on_one_array(
                "all_reduce", _single([reduction.of(each) for each in all_writable(tensors, "tensor")]), reduction.op,
                shape=shape_name(tensors),
            )  # fmt: skip

        return self._reduce("all_reduce", tensors, check, tensors, opts)

    def reduce(self, tensors: Sequence[Tensor] | Tensor, opts: Any = None, *_: Any) -> Work:
        """Reduce a tensor over all ranks into that of the root."""
        listed, root = as_list(tensors), _root(opts)

        def check(reduction: Reduction) -> Request:
            tensor = only(listed)
            own, rank = self.getRank(), rank_of("rootRank", root, self.getSize())
            is_root = own == rank
            buffer = reduction.of(writable(tensor) if is_root else readable(tensor), is_written=is_root)
            return to_root("reduce", buffer, reduction.op, rank, own, shape_name(listed))

        return self._reduce("reduce", listed, check, listed, opts)

    def reduce_scatter(self, outputs: Sequence[Tensor] | Tensor, inputs: Any, opts: Any = None, *_: Any) -> Work:
        """Reduce a list of tensors over all ranks and give each rank one of the results."""
        listed = as_list(outputs)

        def check(reduction: Reduction) -> Request:
            output, given = only(listed), inner(inputs)
            self._one_for_each(given, "input_list")
            check_types(output, given[0], "output", "input_list[0]")
            return of_blocks(
                "reduce_scatter", self.getSize(), self.getRank(),
                reduction.of(joined(given, "input_list", is_written=False), is_written=False),
                reduction.of(writable(output, "output")), op=reduction.op, counts=uneven(given),
                shape=shape_name(given),
            )  # fmt: skip

        return self._reduce("reduce_scatter", listed, check, listed, opts)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None, *_: Any) -> Work:
        """Reduce a tensor over all ranks and give each rank its block of the result."""
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:  # fmt: skip
        """Reduce several tensors over all ranks and give each rank its blocks of the results."""
        return _each(opts, pairs_by_type(outputs, inputs), lambda pair: self._reduce_scatter(pair[0], pair[1], opts))

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reduce_scatter(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Work:
        def check(reduction: Reduction) -> Request:
            check_pairs(outputs, inputs)
            return of_blocks(
                "reduce_scatter", self.getSize(), self.getRank(),
                _single([reduction.of(readable(each, "input"), is_written=False) for each in inputs]),
                _single([reduction.of(each) for each in all_writable(outputs, "output")]), op=reduction.op,
                shape=shape_name(inputs),
            )  # fmt: skip

        return self._reduce("reduce_scatter", inputs, check, outputs, opts)

    def broadcast(self, tensors: Sequence[Tensor] | Tensor, opts: Any = None, *_: Any) -> Work:
        """Copy a tensor of the root into those of all ranks."""
        listed, root = as_list(tensors), _root(opts)

        def check() -> Request:
            buffer = writable(only(listed))
            return on_one_array("broadcast", buffer, root=rank_of("rootRank", root, self.getSize()))

        return self._run("broadcast", check, listed, opts, type_name(listed))

    def allgather(self, outputs: Any, inputs: Sequence[Tensor] | Tensor, opts: Any = None, *_: Any) -> Work:
        """Gather a tensor of each rank into a list on all ranks; sizes may differ between ranks."""
        listed = as_list(inputs)

        def check() -> Request:
            given, taken = only(listed), inner(outputs)
            self._one_for_each(taken, "tensor_list")
            check_types(taken[0], given, "tensor_list[0]", "tensor")
            if given.numel() != taken[self.getRank()].numel():
                raise UsageError(
                    f"tensor has {given.numel()} elements; expected {taken[self.getRank()].numel()}, as tensor_list "
                    f"has for rank {self.getRank()}"
                )
            return of_blocks(
                "all_gather", self.getSize(), self.getRank(), readable(given),
                joined(taken, "tensor_list", is_written=True), counts=uneven(taken),
                shape=shape_name(listed) if are_alike(taken) else "",
            )  # fmt: skip

        return self._run("all_gather", check, flat(outputs), opts, type_name(listed))

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:  # fmt: skip
        """Gather a list of tensors of each rank into a list for each rank, on all ranks."""
        given, taken = list(inputs), flat(outputs)

        def check() -> Request:
            self._one_for_each(outputs, "output_tensor_lists")
            for index, row in enumerate(outputs):
                name = f"output_tensor_lists[{index}]"
                if len(row) != len(given):
                    raise UsageError(f"{name} has {len(row)} entries; expected {len(given)}, as input_tensor_list has")
                check_sizes(row, [each.numel() for each in given], name, "input_tensor_list has there")
            if given:
                check_types(taken[0], given[0], "output_tensor_lists[0][0]", "input_tensor_list[0]")
            return of_blocks(
                "all_gather", self.getSize(), self.getRank(), joined(given, "input_tensor_list", is_written=False),
                joined(taken, "output_tensor_lists", is_written=True), shape=shape_name(given),
            )  # fmt: skip

        return self._run("all_gather", check, taken, opts, type_name(given))

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None, *_: Any) -> Work:
        """Concatenate the tensors of all ranks on all ranks."""
        return self.all_gather_single_coalesced([output], [given], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:  # fmt: skip
        """Concatenate, for each of several tensors, those of all ranks on all ranks."""
        return _each(opts, pairs_by_type(outputs, inputs), lambda pair: self._all_gather(pair[0], pair[1], opts))

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def _all_gather(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Work:
        def check() -> Request:
            check_pairs(outputs, inputs)
            return of_blocks(
                "all_gather", self.getSize(), self.getRank(), _single([readable(each, "input") for each in inputs]),
                _single(all_writable(outputs, "output")), shape=shape_name(inputs),
            )  # fmt: skip

        return self._run("all_gather", check, outputs, opts, type_name(inputs))

    def gather(self, outputs: Any, inputs: Sequence[Tensor] | Tensor, opts: Any = None, *_: Any) -> Work:
        """Gather a tensor of each rank into a list on the root."""
        listed, root = as_list(inputs), _root(opts)

        def check() -> Request:
            given, taken = only(listed), inner(outputs)
            is_root = rank_of("rootRank", root, self.getSize()) == self.getRank()
            if is_root:
                self._one_for_each(taken, "gather_list")
                check_sizes(taken, [given.numel()] * len(taken), "gather_list", "tensor has")
                check_types(taken[0], given, "gather_list[0]", "tensor")
            out = joined(taken, "gather_list", is_written=True) if is_root else None
            shape = shape_name(listed)
            return of_blocks("gather", self.getSize(), self.getRank(), readable(given), out, root=root, shape=shape)

        return self._run("gather", check, flat(outputs), opts, type_name(listed))

    def scatter(self, outputs: Sequence[Tensor] | Tensor, inputs: Any, opts: Any = None, *_: Any) -> Work:
        """Give each rank one tensor of a list of the root."""
        listed, root = as_list(outputs), _root(opts)

        def check() -> Request:
            output, given = only(listed), inner(inputs)
            is_root = rank_of("rootRank", root, self.getSize()) == self.getRank()
            if is_root:
                self._one_for_each(given, "scatter_list")
                check_sizes(given, [output.numel()] * len(given), "scatter_list", "tensor has")
                check_types(output, given[0], "tensor", "scatter_list[0]")
            x = joined(given, "scatter_list", is_written=False) if is_root else None
            shape = shape_name(listed)
            return of_blocks("scatter", self.getSize(), self.getRank(), x, writable(output), root=root, shape=shape)

        return self._run("scatter", check, listed, opts, type_name(listed))

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None, *_: Any) -> Work:
        """Send a tensor to every rank, and get one from each; sizes may differ."""
        given, taken = list(inputs), list(outputs)

        def check() -> Request:
            self._one_for_each(given, "input_tensor_list")
            self._one_for_each(taken, "output_tensor_list")
            check_types(taken[0], given[0], "output_tensor_list[0]", "input_tensor_list[0]")
            return self._to_all(
                joined(given, "input_tensor_list", is_written=False),
                joined(taken, "output_tensor_list", is_written=True),
                [each.numel() for each in given], [each.numel() for each in taken],
            )  # fmt: skip

        return self._run("all_to_all", check, taken, opts, type_name(given))

    def all_to_all_single(
        self, output: Tensor, given: Tensor, out_splits: Sequence[int] = (), splits: Sequence[int] = (),
        opts: Any = None, *_: Any,
    ) -> Work:  # fmt: skip
        """Send a block of a tensor to every rank, and get one from each; splits count rows of the first axis."""

        def check() -> Request:
            check_types(output, given, "output", "input")
            return self._to_all(
                readable(given, "input"), writable(output, "output"),
                self._counts(given, splits, "input"), self._counts(output, out_splits, "output"),
            )  # fmt: skip

        return self._run("all_to_all", check, [output], opts, name_of(given.dtype))

    alltoall_base = all_to_all_single

    def _to_all(self, x: Buffer, out: Buffer, counts: list[int], out_counts: list[int]) -> Request:
        """Return the request for an all-to-all, which always states its sizes: another rank's may differ."""
        size, rank = self.getSize(), self.getRank()
        return of_blocks("all_to_all", size, rank, x, out, counts=counts, out_counts=out_counts)

    def _counts(self, tensor: Tensor, splits: Sequence[int], name: str) -> list[int]:
        """Return how many elements each rank has of a tensor, by rows for each rank; equal parts without those."""
        rows, size = tensor.shape[0] if tensor.dim() else 1, self.getSize()
        if splits:
            if len(splits) != size or sum(splits) != rows or min(splits) < 0:
                raise UsageError(
                    f"{name}_split_sizes={list(splits)}; expected {size} numbers that add up to the {rows} rows"
                )
            row = tensor.numel() // rows if rows else 0
            return [count * row for count in splits]
        if rows % size:
            raise UsageError(f"{name} has {rows} rows; expected a multiple of {size}, as many for each rank")
        return [tensor.numel() // size] * size

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int = 0) -> Work:
        """Send a tensor to another rank; the work ends when that has received it."""
        tensor = only(tensors)
        array = sent(tensor)

        def call() -> Work:
            inner = self.communicator._send_checked(array, dst, tag, name_of(tensor.dtype))
            return self._kept(Work((inner,), [tensor], None))

        return profiled("send", call)

    def recv(self, tensors: Sequence[Tensor], src: int | None, tag: int = 0) -> Work:
        """Receive a tensor from another rank; from any if ``src`` is None."""
        tensor = only(tensors)
        devices.begin()
        buffer, leftover = received(tensor), devices.taken()

        def call() -> Work:
            inner = self.communicator.recv(buffer, src, tag, async_op=True, name=name_of(tensor.dtype))
            return self._kept(after(Work((inner,), [tensor], None), leftover))

        return profiled("recv", call)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        """Receive a tensor from any rank; `Work.source_rank` tells which."""
        return self.recv(tensors, None, tag)

    recvAnysource = recv_anysource

    def barrier(self, opts: Any = None, *_: Any) -> Work:
        """Block until all ranks have called it."""

        def check() -> Request:
            return on_one_array("barrier", np.zeros(1, np.uint8), "max")

        return self._run("barrier", check, [], opts, "")

    def _reduce(
        self, kind: str, tensors: list[Tensor], check: Callable[[Reduction], Request], result: list[Tensor], opts: Any
    ) -> Work:  # fmt: skip
        """Make a call that reduces ``tensors``."""

        def reduction() -> Reduction:
            if not tensors:
                raise UsageError("no tensors; expected at least one")
            return reduction_of(_op(opts), tensors[0].dtype, self.getSize())

        try:
            found = reduction()
        except UsageError:  # raised again inside the call
            return self._run(kind, lambda: check(reduction()), result, opts, "")
        return self._run(kind, lambda: check(found), result, opts, found.name)

    def _one_for_each(self, listed: Sequence[Any], name: str) -> None:
        if len(listed) != self.getSize():
            raise UsageError(f"{name} has {len(listed)} entries; expected one for each of {self.getSize()} ranks")


def _single(buffers: list[Buffer]) -> Any:
    return buffers[0] if len(buffers) == 1 else buffers


def _each(opts: Any, groups: Sequence[Any], call: Callable[[Any], Work]) -> Work:
    """Make a call for each group of tensors, and return them as one.

    A refused call is raised at once, also where it is asynchronous. The other ranks do not wait for it then and make
    the calls that follow, so this rank makes them before it raises.
    """
    works: list[Work] = []
    refused: list[UsageError] = []
    for group in groups:
        try:
            works.append(call(group))
        except UsageError as error:
            if not getattr(opts, "asyncOp", True):
                raise
            refused.append(error)
    if refused:
        raise refused[0]
    return all_of(works)


def _op(opts: Any) -> Any:
    """Return the reduction that is asked for; torch also passes it bare."""
    if opts is None:
        return dist.ReduceOp.SUM
    return getattr(opts, "reduceOp", opts)


def _root(opts: Any) -> int:
    if isinstance(opts, int):
        return opts
    return int(getattr(opts, "rootRank", 0))
