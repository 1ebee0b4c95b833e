"""What a training does with tensors on a device: ``torch_cuda.py DEVICE BACKEND [CASE ...]`` on every rank.

Each rank prints what each case gives as lines of JSON, equal for every right backend. Some cases are for detcoll alone.
All ranks share one device. With the device "cpu" everything but streams is tried; see `torch_far.py`.
"""

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch_ranks import begin, say

from detcoll.errors import PlanMismatch, UsageError

warnings.filterwarnings("ignore")

DEVICE, BACKEND = sys.argv[1], sys.argv[2]
ON_CUDA, OWN = DEVICE == "cuda", BACKEND == "detcoll"
LARGE = 3_000_017 if ON_CUDA else 30_017

CASES: dict[str, Callable[[int, int], Any]] = {}


def case(function: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    CASES[function.__name__] = function
    return function


@contextlib.contextmanager
def side_stream() -> Iterator[Any]:
    """Run a body on a stream of its own, which nothing else is ordered with; yield the stream."""
    if not ON_CUDA:
        yield None
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
        assert torch.cuda.current_stream() == stream, "a call changed the current stream"


def late(value: float, elems: int = LARGE) -> Tensor:
    """Return a tensor whose values come late on the current stream, and are others until then."""
    x = torch.full((elems,), -1.0, device=DEVICE)
    for _ in range(50):
        x = x * 1.0 + torch.rand((elems,), device=DEVICE)
    return x.fill_(value)


@case
def streams(rank: int, size: int) -> Any:
    """Compute, call and use the result on streams that differ, without synchronizing."""
    given = []
    for is_async in (False, True):
        with side_stream() as first:
            x, parts = late(rank + 1.0), late(0.0, LARGE * size)
            works = [
                dist.all_reduce(x, async_op=is_async),
                dist.all_gather_into_tensor(parts, late(rank + 1.0), async_op=is_async),
            ]
        with side_stream() as second:
            if is_async:
                for work in works:
                    work.wait()
            elif ON_CUDA and not OWN:  # its results are there for the stream of the call, detcoll's for every stream
                second.wait_stream(first)
            summed, gathered = x * 2, parts * 2
            given.append([summed.min().item(), summed.max().item(), *gathered[:: LARGE - 1].tolist()])
            given.append(dist.all_reduce(late(1.0, 5)))
    return given


@case
def memory_dropped_early(rank: int, size: int) -> Any:
    """Drop a tensor and its work at once on all ranks but one, and write over what the allocator gives next."""
    given = []
    for turn in range(20):
        kept = turn % size
        x = late(turn + rank, 100_003)
        work = dist.all_reduce(x, async_op=True)
        if rank != kept:
            del x, work
            gc.collect()
            torch.full((100_003,), 1e9, device=DEVICE)
        else:
            work.wait()
            given.append([x.min().item(), x.max().item()])
    dist.barrier()
    return given


@case
def callbacks(rank: int, size: int) -> Any:
    """Chain callbacks, and use what they return on another stream than theirs."""

    def doubled(future: Any) -> Tensor:
        x = future.value()[0]
        for _ in range(20):
            x = x * 1.0
        return x * 2

    with side_stream():
        future = dist.all_reduce(late(rank + 1.0), async_op=True).get_future().then(doubled)
        future = future.then(lambda ended: [ended.wait() + 1])
    with side_stream():
        x = future.wait()[0] * 1
        return [x.min().item(), x.max().item()]


@case
def a_call_that_fails(rank: int, size: int) -> Any:
    """Get the error of a call from its future, and from what a callback returns."""
    if not OWN:
        return None
    group = dist.new_group(list(range(size)))
    dtype = torch.float32 if rank else torch.float64
    work = dist.all_reduce(torch.ones(4, dtype=dtype, device=DEVICE), group=group, async_op=True)
    future = work.get_future()
    for each in (future, future.then(lambda ended: ended.wait())):
        with pytest.raises(PlanMismatch, match="float64"):
            each.wait()
    return None


@case
def results_copied_into_place(rank: int, size: int) -> Any:
    """Let calls use memory whose results an earlier call still has to copy into place, waited for in any order."""
    if not OWN:
        return None
    x = torch.full((3, 4), rank, device=DEVICE, dtype=torch.int8)
    rows = torch.zeros((6, 5), device=DEVICE)
    columns = rows[::2].t()
    columns += rank
    works = [
        dist.all_reduce(x, dist.ReduceOp.AVG, async_op=True), dist.all_reduce(x, async_op=True),
        dist.all_reduce(columns, async_op=True), dist.broadcast(rows, 0, async_op=True),
    ]  # fmt: skip
    futures = [work.get_future() for work in works]
    for work in reversed(works):
        work.wait()
    assert all(future.wait() for future in futures)
    average = sum(range(size)) // size
    assert x.unique().tolist() == [average * size]
    assert rows.sum().item() == 15 * sum(range(size))
    dropped = torch.full((4,), rank, device=DEVICE, dtype=torch.int64)
    dist.all_reduce(dropped, dist.ReduceOp.AVG, async_op=True)
    dist.all_reduce(torch.ones(1, device=DEVICE))
    assert dropped.tolist() == [average] * 4, "the next call of the group ends it"
    return None


@case
def mixed(rank: int, size: int) -> Any:
    """Use one group for tensors on the host, tensors on the device, both in a call, and objects."""
    if not OWN:
        return None
    here, there, both = torch.ones(3), torch.full((3,), 2.0, device=DEVICE), torch.zeros(3 * size, device=DEVICE)
    works = [dist.all_reduce(here, async_op=True), dist.all_reduce(there, async_op=True)]
    dist.barrier()
    dist.all_gather_into_tensor(both, torch.full((3,), float(rank)))
    told: list[Any] = [None] * size
    dist.all_gather_object(told, {"rank": rank})
    for work in works:
        work.wait()
    assert (here.tolist(), there.tolist()) == ([size] * 3, [2.0 * size] * 3)
    assert both.tolist() == [float(each) for each in range(size) for _ in range(3)]
    assert [each["rank"] for each in told] == list(range(size))
    if ON_CUDA:
        group = dist.new_group(list(range(size)))
        with pytest.raises(UsageError, match="expected one device"):
            dist.all_gather([torch.zeros(3, device="cpu" if each else DEVICE) for each in range(size)], here,
                            group=group)  # fmt: skip
        with pytest.raises(UsageError, match="is sparse and on cuda"):
            dist.all_reduce(torch.ones(2, device=DEVICE).to_sparse(), group=dist.new_group(list(range(size))))
    return None


def layers(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3)], nn.Linear(width, 4))
    return made.to(DEVICE)


def train(model: nn.Module, steps: int = 5) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 24, generator=generator).to(DEVICE)
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    return losses


@case
def ddp(rank: int, size: int) -> Any:
    given = [
        train(DDP(layers(), bucket_cap_mb=0.002)),
        train(DDP(layers(), bucket_cap_mb=0.002, gradient_as_bucket_view=True)),
        train(DDP(nn.Sequential(layers(), nn.BatchNorm1d(4).to(DEVICE)))),
    ]
    with side_stream():
        given.append(train(DDP(layers(), bucket_cap_mb=0.002)))
    model = DDP(layers(), bucket_cap_mb=0.002)
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return [*given, [round(loss, 2) for loss in train(model)]]


@case
def fsdp(rank: int, size: int) -> Any:
    mesh, model = init_device_mesh(DEVICE, (size,)), layers()
    for block in model[:-1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if ON_CUDA and hasattr(model, "set_gradient_divide_factor"):
        model.set_gradient_divide_factor(float(size))  # asks for PREMUL_SUM on CUDA
    return train(model)


@case
def hsdp(rank: int, size: int) -> Any:
    """Shard inside two sites by the backend, and replicate across them: by it too, or with four ranks by detcoll."""
    across = {"backend_override": {"replicate": "detcoll"}} if size > 2 else {}
    mesh = init_device_mesh(DEVICE, (2, size // 2), mesh_dim_names=("replicate", "shard"), **across)
    model = layers()
    fully_shard(model, mesh=mesh)
    return train(model)


@case
def dtensor(rank: int, size: int) -> Any:
    mesh = init_device_mesh(DEVICE, (size,))
    torch.manual_seed(0)
    whole = torch.randn(2 * size + 1, 3 * size).to(DEVICE)
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    partial = DTensor.from_local(torch.full((size, 2), float(rank), device=DEVICE), mesh, [Partial()])
    return [
        torch.equal(rows.redistribute(mesh, [Shard(1)]).full_tensor(), whole), partial.full_tensor().tolist(),
        functional.all_reduce(torch.ones(3, device=DEVICE).t(), "sum", mesh).tolist(),
    ]  # fmt: skip


def main(names: list[str]) -> None:
    options: dict[str, Any] = {}
    if ON_CUDA:
        torch.cuda.set_device(0)
        os.environ.update(NCCL_HOSTID=f"host{os.environ['RANK']}", NCCL_SOCKET_IFNAME="lo")  # ranks share a device
        options = {"device_id": torch.device("cuda:0")}
    rank, size = begin(BACKEND, **options)
    for name in names or CASES:
        say(rank, [name, CASES[name](rank, size)])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[3:])
