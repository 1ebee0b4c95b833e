"""Sums of sparse tensors: every rank gathers the elements of all, and adds them up.

Ranks have different numbers of elements, so they exchange these first. The call itself waits for that, also where it is
asynchronous. Elements at one place are added in the order of ranks, so that all ranks have the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from detcoll.arguments import of_blocks
from detcoll.errors import PlanMismatch, UsageError
from detcoll.job.caller import Request
from detcoll.torch.tensors import readable, writable
from detcoll.torch.work import Work, all_of


def all_reduce(group: Any, tensor: torch.Tensor, op: Any, opts: Any) -> Work:
    """Add a tensor in coordinate format (COO) over all ranks of a process group, in place.

    Raises
    ------
    UsageError
        On all ranks, if ``op`` is not a sum.
    PlanMismatch
        On all ranks, if shapes differ, or the number of dimensions that are sparse.
    """
    with torch.no_grad():
        own = tensor.coalesce()
    size, shape = group.getSize(), [own.sparse_dim(), *own.shape]
    told = torch.zeros(size, 1 + len(shape), dtype=torch.int64)

    def check() -> Request:
        if op != dist.ReduceOp.SUM:
            raise UsageError(f"op={op} of a sparse tensor; expected SUM")
        if tensor.device.type != "cpu":
            raise UsageError(f"tensor is sparse and on {tensor.device}; expected it on the CPU, or a dense one")
        given = torch.tensor([own._nnz(), *shape])
        return of_blocks("all_gather", size, group.getRank(), readable(given), writable(told))

    group._run("all_gather", check, [told], opts, "sparse all_reduce").wait()
    counts = told[:, 0].tolist()
    _compare(told[:, 1:].tolist())
    indices = [torch.empty(own.sparse_dim(), count, dtype=torch.int64) for count in counts]
    values = [torch.empty(count, *own.values().shape[1:], dtype=tensor.dtype) for count in counts]

    def add() -> None:
        with torch.no_grad():
            total = torch.sparse_coo_tensor(
                torch.cat(indices, dim=1), torch.cat(values), tensor.shape, check_invariants=False
            )
            tensor.copy_(total.coalesce())

    gathered = [group.allgather([indices], [own.indices()], opts), group.allgather([values], [own.values()], opts)]
    work = all_of(gathered, add, [tensor])
    if not getattr(opts, "asyncOp", True):
        work.wait()
    return work


def _compare(shapes: list[list[int]]) -> None:
    """Raise PlanMismatch where a rank's sparse dimensions and shape are not those of rank 0."""
    for rank, (sparse, *shape) in enumerate(shapes):
        if [sparse, *shape] != shapes[0]:
            raise PlanMismatch(
                f"all_reduce of sparse tensors: rank {rank} has shape {tuple(shape)}, {sparse} dimensions sparse; "
                f"rank 0 has {tuple(shapes[0][1:])}, {shapes[0][0]} sparse"
            )
