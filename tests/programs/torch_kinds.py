"""Draws calls of torch.distributed and compares each with NumPy: ``torch_kinds.py SEED CASES [DEVICE]`` on every rank.

A case is a kind, a type, an operator, shapes, and how tensors lie in memory. All ranks draw the same cases and know
each other's values, so every rank computes the result for itself. Calls go through torch's functions, or through the
methods of the group by an old or a new name. Before the cases come calls that are refused.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions
from torch_ranks import begin, say

from detcoll.errors import DetcollError

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
COMPLEX = ["complex64", "complex128"]
MOVED = [*INTEGERS, *FLOATS, *COMPLEX, "bool", "float8_e4m3fn", "float8_e5m2"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (5,), (4, 6), (3, 2, 4), (2, 3, 4, 5), (0, 3), (4099,)]
LAYOUTS = ["plain", "transposed", "stepped", "offset", "channels_last"]
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-6, "complex64": 1e-6}


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Return a tensor of zeros that lies in memory as asked."""
    if layout == "transposed" and len(shape) >= 2:
        return torch.zeros(shape[::-1], dtype=torch.uint8).to(dtype).permute(*range(len(shape) - 1, -1, -1))
    if layout == "stepped" and shape:
        return torch.zeros((*shape[:-1], 2 * shape[-1]), dtype=torch.uint8).to(dtype)[..., ::2]
    if layout == "offset" and shape:
        return torch.zeros((shape[0] + 3, *shape[1:]), dtype=torch.uint8).to(dtype)[3:]
    if layout == "channels_last" and len(shape) == 4:
        return torch.zeros(shape, dtype=torch.uint8).to(dtype).to(memory_format=torch.channels_last)
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


class Draw:
    """One case: what all ranks draw alike, and the values of each rank."""

    def __init__(self, seed: str, size: int, rank: int, dtypes: list[str]) -> None:
        self.chance, self.size, self.rank = random.Random(seed), size, rank
        self.name = self.chance.choice(dtypes)
        self.dtype = dtype_of(self.name)
        self.shape = self.chance.choice(SHAPES)
        self.root = self.chance.randrange(size)
        self.layout = random.Random(f"{seed} {rank}").choice(LAYOUTS)
        self.values_of = np.random.default_rng(self.chance.randrange(2**32))

    def values(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Return small whole numbers, different for each call, in a type that holds them."""
        drawn = self.values_of.integers(0, 2 if self.name == "bool" else 4, shape)
        if self.name in (*FLOATS, *COMPLEX, "int8", "int16", "int32", "int64"):
            drawn = drawn - 2
        return np.asarray(drawn + 1j * self.values_of.integers(-2, 3, shape) if self.name in COMPLEX else drawn)

    def tensor(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return a tensor of these values."""
        filled = laid_out(values.shape, self.dtype, self.layout)
        filled.copy_(torch.from_numpy(values))
        return filled

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return laid_out(shape, self.dtype, self.layout)

    def check(self, found: torch.Tensor, expected: np.ndarray[Any, Any], what: str) -> None:
        wide = torch.complex128 if self.name in COMPLEX else torch.float64
        got, wanted = found.to(wide).cpu().numpy(), np.asarray(expected)
        tolerance = TOLERANCE.get(self.name, 1e-12)
        assert got.shape == wanted.shape, f"{what}: {got.shape} instead of {wanted.shape}"
        assert np.allclose(got, wanted, rtol=tolerance, atol=tolerance), f"{what}: {got} instead of {wanted}"


def folded(name: str, parts: list[np.ndarray[Any, Any]], dtype: str) -> np.ndarray[Any, Any]:
    """Return the reduction of all ranks' values."""
    stack = np.stack(parts)
    if dtype == "bool":
        stack = stack.astype(bool)
        return {"SUM": stack.any, "PRODUCT": stack.all, "MIN": stack.all, "MAX": stack.any, "BOR": stack.any,
                "BAND": stack.all, "BXOR": lambda axis: np.bitwise_xor.reduce(stack, axis)}[name](axis=0)  # fmt: skip
    if name == "AVG":
        total = stack.sum(axis=0)
        return np.trunc(total / len(parts)) if dtype in INTEGERS else total / len(parts)
    function: Callable[..., Any] = {
        "SUM": np.sum, "PRODUCT": np.prod, "MIN": np.min, "MAX": np.max, "BAND": np.bitwise_and.reduce,
        "BOR": np.bitwise_or.reduce, "BXOR": np.bitwise_xor.reduce,
    }[name]  # fmt: skip
    return function(stack, axis=0)  # type: ignore[no-any-return]


def operators_of(name: str) -> list[str]:
    if name in COMPLEX:
        return ["SUM", "AVG"]
    known = ["SUM", "PRODUCT", "MIN", "MAX"]
    if name != "bool":
        known += ["AVG"]
    return known if name in FLOATS else [*known, "BAND", "BOR", "BXOR"]


def operator_for(draw: Draw) -> str:
    return draw.chance.choice(operators_of(draw.name))


REDUCED = [*INTEGERS, *FLOATS, *COMPLEX, "bool"]


def ended(work: Any) -> None:
    if work is not None:
        work.wait()


def all_reduce(draw: Draw, is_async: bool) -> None:
    op, parts = operator_for(draw), [draw.values(draw.shape) for _ in range(draw.size)]
    x = draw.tensor(parts[draw.rank])
    ended(dist.all_reduce(x, getattr(dist.ReduceOp, op), async_op=is_async))
    draw.check(x, folded(op, parts, draw.name), f"all_reduce {op} {draw.name} {draw.shape} {draw.layout}")


def premultiplied(draw: Draw, is_async: bool) -> None:
    parts = [draw.values(draw.shape) for _ in range(draw.size)]
    x = draw.tensor(parts[draw.rank])
    ended(dist.all_reduce(x, dist._make_nccl_premul_sum(0.5), async_op=is_async))
    draw.check(x, folded("SUM", parts, draw.name) * 0.5, f"premul_sum {draw.name} {draw.shape} {draw.layout}")


def all_reduce_coalesced(draw: Draw, is_async: bool) -> None:
    op, shapes = operator_for(draw), [draw.shape, (3,), draw.chance.choice(SHAPES)]
    parts = [[draw.values(shape) for shape in shapes] for _ in range(draw.size)]
    xs = [draw.tensor(values) for values in parts[draw.rank]]
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp, options.asyncOp = getattr(dist.ReduceOp, op), is_async
    ended(dist.group.WORLD.allreduce_coalesced(xs, options))
    for index, x in enumerate(xs):
        draw.check(x, folded(op, [values[index] for values in parts], draw.name), f"all_reduce_coalesced {op}")


def reduce(draw: Draw, is_async: bool) -> None:
    op, parts = operator_for(draw), [draw.values(draw.shape) for _ in range(draw.size)]
    if draw.name in COMPLEX:  # torch's reduce makes no real numbers of them
        op = "SUM"
    x = draw.tensor(parts[draw.rank])
    ended(dist.reduce(x, draw.root, getattr(dist.ReduceOp, op), async_op=is_async))
    expected = folded(op, parts, draw.name) if draw.rank == draw.root else parts[draw.rank]
    draw.check(x, expected, f"reduce {op} {draw.name} {draw.shape} {draw.layout}")


def broadcast(draw: Draw, is_async: bool) -> None:
    parts = [draw.values(draw.shape) for _ in range(draw.size)]
    x = draw.tensor(parts[draw.rank])
    ended(dist.broadcast(x, draw.root, async_op=is_async))
    draw.check(x, parts[draw.root], f"broadcast {draw.name} {draw.shape} {draw.layout}")


def all_gather(draw: Draw, is_async: bool) -> None:
    shapes = [draw.shape] * draw.size
    if draw.shape and draw.chance.random() < 0.3:  # of different sizes
        shapes = [(rank + draw.shape[0], *draw.shape[1:]) for rank in range(draw.size)]
    parts = [draw.values(shape) for shape in shapes]
    if draw.shape and draw.chance.random() < 0.3 and len(set(shapes)) == 1:  # the parts of one tensor
        outs = list(torch.stack([draw.empty(draw.shape)] * draw.size).unbind(0))
    else:
        outs = [draw.empty(shape) for shape in shapes]
    ended(dist.all_gather(outs, draw.tensor(parts[draw.rank]), async_op=is_async))
    for out, part in zip(outs, parts, strict=True):
        draw.check(out, part, f"all_gather {draw.name} {shapes} {draw.layout}")


def rows_for_all(draw: Draw) -> tuple[int, ...]:
    return (draw.size * draw.chance.randrange(4), *draw.shape[1:]) if draw.shape else (draw.size,)


def all_gather_single(draw: Draw, is_async: bool) -> None:
    parts = [draw.values(draw.shape or (1,)) for _ in range(draw.size)]
    whole = np.concatenate(parts)
    out, x, group = draw.empty(whole.shape), draw.tensor(parts[draw.rank]), dist.group.WORLD
    how = draw.chance.randrange(4)
    if how == 0 and hasattr(dist, "all_gather_single"):
        ended(dist.all_gather_single(out, x, async_op=is_async))
    elif how == 1:
        ended(dist.all_gather_into_tensor(out, x, async_op=is_async))
    elif how == 2:
        group._allgather_base(out, x).wait()
    else:
        other = torch.zeros(2 * draw.size, dtype=torch.int32)
        twice = torch.full((2,), draw.rank, dtype=torch.int32)
        name = draw.chance.choice(["allgather_into_tensor_coalesced", "all_gather_single_coalesced"])
        getattr(group, name)([out, other], [x, twice]).wait()
        assert other.tolist() == [rank for rank in range(draw.size) for _ in range(2)]
    draw.check(out, whole, f"all_gather_single {draw.name} {draw.shape} {draw.layout}")


def all_gather_coalesced(draw: Draw, is_async: bool) -> None:
    parts = [[draw.values(draw.shape), draw.values((3,))] for _ in range(draw.size)]
    outs = [[draw.empty(each.shape) for each in row] for row in parts]
    dist.group.WORLD.allgather_coalesced(outs, [draw.tensor(each) for each in parts[draw.rank]]).wait()
    for row, values in zip(outs, parts, strict=True):
        for out, value in zip(row, values, strict=True):
            draw.check(out, value, f"all_gather_coalesced {draw.name}")


def gather(draw: Draw, is_async: bool) -> None:
    parts = [draw.values(draw.shape) for _ in range(draw.size)]
    outs = [draw.empty(draw.shape) for _ in parts] if draw.rank == draw.root else None
    if draw.name in COMPLEX and outs is not None:
        outs = [torch.zeros(draw.shape, dtype=draw.dtype) for _ in parts]
    ended(dist.gather(draw.tensor(parts[draw.rank]), outs, draw.root, async_op=is_async))
    for out, part in zip(outs or [], parts, strict=False):
        draw.check(out, part, f"gather {draw.name} {draw.shape} {draw.layout}")


def scatter(draw: Draw, is_async: bool) -> None:
    parts = [draw.values(draw.shape) for _ in range(draw.size)]
    out = draw.empty(draw.shape)
    ended(dist.scatter(out, [draw.tensor(part) for part in parts] if draw.rank == draw.root else None, draw.root,
                       async_op=is_async))  # fmt: skip
    draw.check(out, parts[draw.rank], f"scatter {draw.name} {draw.shape} {draw.layout}")


def reduce_scatter(draw: Draw, is_async: bool) -> None:
    op = operator_for(draw)
    shapes = [draw.shape] * draw.size
    if draw.shape and draw.chance.random() < 0.3:
        shapes = [(rank + draw.shape[0], *draw.shape[1:]) for rank in range(draw.size)]
    parts = [[draw.values(shape) for shape in shapes] for _ in range(draw.size)]
    out = draw.empty(shapes[draw.rank])
    lists = [draw.tensor(each) for each in parts[draw.rank]]
    ended(dist.reduce_scatter(out, lists, getattr(dist.ReduceOp, op), async_op=is_async))
    expected = folded(op, [row[draw.rank] for row in parts], draw.name)
    draw.check(out, expected, f"reduce_scatter {op} {draw.name} {shapes} {draw.layout}")


def reduce_scatter_single(draw: Draw, is_async: bool) -> None:
    op, shape = operator_for(draw), rows_for_all(draw)
    parts = [draw.values(shape) for _ in range(draw.size)]
    rows = shape[0] // draw.size
    out, x, group = draw.empty((rows, *shape[1:])), draw.tensor(parts[draw.rank]), dist.group.WORLD
    options = dist.ReduceScatterOptions()
    options.reduceOp = getattr(dist.ReduceOp, op)
    how = draw.chance.randrange(4)
    if how == 0 and hasattr(dist, "reduce_scatter_single"):
        ended(dist.reduce_scatter_single(out, x, options.reduceOp, async_op=is_async))
    elif how == 1:
        ended(dist.reduce_scatter_tensor(out, x, options.reduceOp, async_op=is_async))
    elif how == 2:
        group._reduce_scatter_base(out, x, options).wait()
    else:
        name = draw.chance.choice(["reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"])
        getattr(group, name)([out], [x], options).wait()
    expected = folded(op, parts, draw.name)[rows * draw.rank : rows * (draw.rank + 1)]
    draw.check(out, expected, f"reduce_scatter_single {op} {draw.name} {shape} {draw.layout}")


def sizes_for(draw: Draw) -> list[list[int]]:
    return [[draw.chance.randrange(4) for _ in range(draw.size)] for _ in range(draw.size)]


def all_to_all(draw: Draw, is_async: bool) -> None:
    sizes = sizes_for(draw)
    parts = [[draw.values((n, 3)) for n in row] for row in sizes]
    outs = [draw.empty((row[draw.rank], 3)) for row in sizes]
    ended(dist.all_to_all(outs, [draw.tensor(each) for each in parts[draw.rank]], async_op=is_async))
    for out, row in zip(outs, parts, strict=True):
        draw.check(out, row[draw.rank], f"all_to_all {draw.name} {sizes} {draw.layout}")


def all_to_all_single(draw: Draw, is_async: bool) -> None:
    even = draw.chance.random() < 0.5
    sizes = [[2] * draw.size] * draw.size if even else sizes_for(draw)
    parts = [[draw.values((n, 2)) for n in row] for row in sizes]
    own = [row[draw.rank] for row in sizes]
    out, x = draw.empty((sum(own), 2)), draw.tensor(np.concatenate(parts[draw.rank]))
    says = not even or (draw.rank == 1)  # equal sizes may be left out, on some ranks as well
    splits = (own, sizes[draw.rank]) if says else (None, None)
    if draw.chance.random() < 0.5:
        ended(dist.all_to_all_single(out, x, *splits, async_op=is_async))
    else:
        dist.group.WORLD.alltoall_base(out, x, splits[0] or [], splits[1] or []).wait()
    expected = np.concatenate([row[draw.rank] for row in parts])
    draw.check(out, expected, f"all_to_all_single {draw.name} {sizes} {draw.layout}")


def messages(draw: Draw, is_async: bool) -> None:
    """Pass values round a ring, with tags out of order, and to rank 0 from any source."""
    parts = [[draw.values(draw.shape) for _ in range(2)] for _ in range(draw.size)]
    after, before = (draw.rank + 1) % draw.size, (draw.rank - 1) % draw.size
    mine = [draw.tensor(each) for each in parts[draw.rank]]
    got = [draw.empty(draw.shape) for _ in range(2)]
    if is_async:
        works = dist.batch_isend_irecv([
            *(dist.P2POp(dist.irecv, got[tag], before, tag=tag) for tag in (1, 0)),
            *(dist.P2POp(dist.isend, mine[tag], after, tag=tag) for tag in (0, 1)),
        ])  # fmt: skip
    else:
        works = [dist.irecv(got[tag], before, tag=tag) for tag in (1, 0)]
        for tag in (0, 1):
            dist.send(mine[tag], after, tag=tag)
    for work in works:
        work.wait()
    for tag in (0, 1):
        draw.check(got[tag], parts[before][tag], f"messages {draw.name} {draw.shape} {draw.layout}")
    if draw.rank:
        dist.send(mine[0], 0, tag=7)
        return
    for _ in range(draw.size - 1):
        source = dist.recv(got[0], tag=7)
        draw.check(got[0], parts[source][0], "a message of any source")


def objects(draw: Draw, is_async: bool) -> None:
    told = [{"rank": rank, "text": "x" * draw.chance.randrange(3000)} for rank in range(draw.size)]
    found: list[Any] = [None] * draw.size
    dist.all_gather_object(found, told[draw.rank])
    assert found == told
    listed = [told[draw.root] if draw.rank == draw.root else None]
    dist.broadcast_object_list(listed, draw.root)
    assert listed == [told[draw.root]]
    gathered: list[Any] | None = [None] * draw.size if draw.rank == draw.root else None
    dist.gather_object(told[draw.rank], gathered, draw.root)
    assert gathered in (told, None)
    scattered: list[Any] = [None]
    dist.scatter_object_list(scattered, told if draw.rank == draw.root else None, draw.root)
    assert scattered == [told[draw.rank]]
    dist.barrier(async_op=is_async)


def coalescing_manager(draw: Draw, is_async: bool) -> None:
    parts = [[draw.values((n,)) for n in (3, 5)] for _ in range(draw.size)]
    xs = [draw.tensor(each) for each in parts[draw.rank]]
    with dist.distributed_c10d._coalescing_manager(async_ops=is_async) as manager:
        for x in xs:
            dist.all_reduce(x)
    if is_async:
        manager.wait()
    for index, x in enumerate(xs):
        draw.check(x, folded("SUM", [row[index] for row in parts], draw.name), "coalescing_manager")


KINDS: list[tuple[Callable[[Draw, bool], None], list[str]]] = [
    (all_reduce, REDUCED), (premultiplied, [*FLOATS, *COMPLEX]), (all_reduce_coalesced, REDUCED), (reduce, REDUCED),
    (broadcast, MOVED), (all_gather, MOVED), (all_gather_single, MOVED), (all_gather_coalesced, MOVED),
    (gather, MOVED), (scatter, MOVED), (reduce_scatter, REDUCED), (reduce_scatter_single, REDUCED),
    (all_to_all, MOVED), (all_to_all_single, MOVED), (messages, MOVED), (objects, ["uint8"]),
    (coalescing_manager, ["float32", "int64"]),
]  # fmt: skip


def every_type_and_operator(seed: str, size: int, rank: int) -> None:
    """Reduce some values of every type by every operator that it has."""
    for name in REDUCED:
        for op in operators_of(name):
            draw = Draw(f"{seed} {name} {op}", size, rank, [name])
            parts = [draw.values((4, 9)) for _ in range(size)]
            x = draw.tensor(parts[rank])
            dist.all_reduce(x, getattr(dist.ReduceOp, op))
            draw.check(x, folded(op, parts, name), f"all_reduce {op} {name} {draw.layout}")


Refused = list[tuple[str, Callable[[Any], Any]]]
"""What the error says that all ranks get, and the call, of which the last rank has wrong arguments."""


def refused_lists(size: int, is_odd: bool) -> Refused:
    """Return calls with lists whose entries have other sizes."""
    last, wrong = size - 1, [2, 4, *[3] * (size - 2)]
    options = AllgatherOptions()
    options.asyncOp = False

    def zeros(sizes: list[int]) -> list[torch.Tensor]:
        return [torch.zeros(n) for n in sizes]

    return [
        ("scatter_list[0] has 2 elements; expected 3, as tensor has",
            lambda group: dist.scatter(torch.zeros(3), zeros(wrong) if is_odd else None, last, group=group)),
        ("gather_list[0] has 2 elements; expected 3, as tensor has",
            lambda group: dist.gather(torch.zeros(3), zeros(wrong) if is_odd else None, last, group=group)),
        ("output_tensor_lists[1][0] has 2 elements; expected 3, as input_tensor_list has there",
            lambda group: group.allgather_coalesced(
                [zeros([2, 4] if is_odd and row == 1 else [3, 3]) for row in range(size)], zeros([3, 3]), options
            )),
        ("output_tensor_lists[1] has 1 entries; expected 2, as input_tensor_list has",
            lambda group: group.allgather_coalesced(
                [zeros([6] if is_odd and row == 1 else [3, 3]) for row in range(size)], zeros([3, 3]), options
            )),
    ]  # fmt: skip


def refused_types(size: int, is_odd: bool) -> Refused:
    """Return calls with an output of another type than the input, or with another number of tensors."""
    other = torch.float64 if is_odd else torch.float32
    one, whole, count = torch.zeros(1), torch.zeros(size), 2 if is_odd else 1
    wrong_one, wrong_whole = torch.zeros(1, dtype=other), torch.zeros(size, dtype=other)
    options, in_background = AllgatherOptions(), AllgatherOptions()
    options.asyncOp = False
    # Both types travel as the same bytes.
    octets, others = (torch.zeros(size, dtype=each) for each in (torch.uint8, torch.float8_e5m2))
    integers = [torch.zeros(n, dtype=torch.int64) for n in (size, 1)]
    types = "output has dtype torch.float64, input torch.float32; expected one type"
    return [
        (types, lambda group: dist.all_gather_into_tensor(wrong_whole, one, group=group)),
        (types, lambda group: dist.reduce_scatter_tensor(wrong_one, whole, group=group)),
        ("output[1] has dtype torch.float64, input[1] torch.float32",
            lambda group: group.allgather_into_tensor_coalesced([whole, wrong_whole], [one, one.clone()], options)),
        (types, lambda group: group.allgather_into_tensor_coalesced(
            [wrong_whole, integers[0]], [one, integers[1]], in_background).wait()),
        ("output has dtype torch.float8_e5m2, input torch.uint8",
            lambda group: group.alltoall_base(others if is_odd else octets, octets.clone(), [], []).wait()),
        ("tensor_list[0] has dtype torch.float8_e5m2, tensor torch.uint8",
            lambda group: group.allgather([list((others if is_odd else octets).chunk(size))], [octets[:1]]).wait()),
        ("2 outputs for 1 inputs",
            lambda group: group.allgather_into_tensor_coalesced([whole] * count, [one], options)),
        ("2 outputs for 1 inputs", lambda group: group.reduce_scatter_tensor_coalesced([one] * count, [whole]).wait()),
        ("2 tensors; expected one", lambda group: group.broadcast([one] * count).wait()),
        ("2 tensors; expected one", lambda group: group.reduce([one] * count).wait()),
        ("2 lists of tensors; expected one",
            lambda group: group.allgather([list(whole.chunk(size))] * count, [one]).wait()),
        ("no tensors; expected at least one", lambda group: group.allreduce_coalesced([] if is_odd else [one]).wait()),
    ]  # fmt: skip


def refused_overlaps(size: int, is_odd: bool) -> Refused:
    """Return calls whose results would share memory."""
    whole, one, large = torch.zeros(2 * size), torch.zeros(1), torch.zeros(2, size)
    folded_up = whole.as_strided((2, size), (1, 1)) if is_odd else large
    repeated = [torch.zeros(2)] * size if is_odd else list(torch.zeros(2 * size).chunk(size))
    shifted = [whole[at : at + 2] for at in range(size)] if is_odd else list(torch.zeros(2 * size).chunk(size))
    twice = [whole, whole[1:]] if is_odd else [torch.zeros(2 * size), torch.zeros(2 * size - 1)]
    return [
        ("tensor has elements that share memory", lambda group: dist.all_reduce(folded_up, group=group)),
        ("output has elements that share memory",
            lambda group: dist.all_gather_into_tensor(folded_up, torch.zeros(2), group=group)),
        ("tensor_list[0] and tensor_list[1] share memory",
            lambda group: dist.all_gather(repeated, torch.zeros(2), group=group)),
        ("tensor_list[0] and tensor_list[1] share memory",
            lambda group: dist.all_gather(shifted, torch.zeros(2), group=group)),
        ("gather_list[0] and gather_list[1] share memory",
            lambda group: dist.gather(torch.zeros(2), repeated if is_odd else None, size - 1, group=group)),
        ("tensor[0] and tensor[1] share memory", lambda group: group.allreduce_coalesced(twice).wait()),
        ("output[0] and output[1] share memory",
            lambda group: group.allgather_into_tensor_coalesced(
                [large[0], large[0] if is_odd else large[1]], [one, one.clone()]).wait()),
    ]  # fmt: skip


def refusals(size: int, rank: int) -> None:
    """Let the last rank make calls that it has to refuse, each in a group of its own."""
    is_odd = rank == size - 1
    cases = (refused_lists, refused_types, refused_overlaps)
    for text, call in [case for cases_of in cases for case in cases_of(size, is_odd)]:
        group, heard = dist.new_group(list(range(size))), "no error"
        try:
            call(group)
        except DetcollError as error:
            heard = str(error)
        assert text in heard, f"{heard}; expected {text}"
        try:
            dist.all_reduce(torch.zeros(1), group=group)
            heard = text
        except DetcollError as error:  # the group has ended, if a rank was in the refused call already
            heard = str(error)
        assert text in heard, f"after {text}: {heard}"


def main(seed: str, cases: int, device: str = "cpu") -> None:
    if device != "cpu":
        torch.set_default_device(device)
    rank, size = begin(timeout=timedelta(seconds=20))
    refusals(size, rank)
    every_type_and_operator(seed, size, rank)
    chance = random.Random(seed)
    for number in range(cases):
        kind, dtypes = KINDS[number % len(KINDS)]
        draw = Draw(f"{seed} {number}", size, rank, dtypes)
        try:
            kind(draw, chance.random() < 0.5)
        except BaseException as error:
            error.add_note(
                f"case {number} of seed {seed}: {kind.__name__} {draw.name} {draw.shape} {draw.layout} root {draw.root}"
            )
            raise
    say(rank, f"{cases} cases")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
