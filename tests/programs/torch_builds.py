"""Trainings with everything that PyTorch builds on a process group: ``torch_builds.py BACKEND [CASE ...]``.

Each rank prints what each case gives as lines of JSON, equal for every right backend.
"""

import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as checkpoint
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def layers(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3)], nn.Linear(width, 4))


def batches(count: int, seed: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + (dist.get_rank() if seed is None else seed))
    return [torch.randn(8, 24, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4]).square().mean()


def train(model: nn.Module, data: list[Tensor], optimizer: Any = None, every: int = 1) -> list[float]:
    """Return the losses; with ``every``, gradients of so many batches are added before they are averaged."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for number, x in enumerate(data, 1):
        if number % every:
            with model.no_sync():
                loss = loss_of(model, x)
                loss.backward()
        else:
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    return losses


@case
def ddp() -> Any:
    return [
        train(DDP(layers(), bucket_cap_mb=0.002), batches(4)),
        train(DDP(layers(), bucket_cap_mb=0.002, gradient_as_bucket_view=True), batches(4)),
        train(DDP(layers(), bucket_cap_mb=0.002, static_graph=True), batches(4)),
        train(DDP(layers(), bucket_cap_mb=0.002), batches(4), every=2),
    ]


@case
def ddp_unused() -> Any:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(24, 4), nn.Linear(24, 4)
            self.turn = itertools.count(dist.get_rank())

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) if next(self.turn) % 2 else self.right(x)

    return train(DDP(Branches(), find_unused_parameters=True), batches(4))


def renamed(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook under another name, since torch refuses some by their name where it has no CUDA."""
    return lambda state, bucket: hook(state, bucket)


@case
def ddp_hooks() -> Any:
    given = []
    for hook in (default_hooks.allreduce_hook, default_hooks.bf16_compress_hook, default_hooks.fp16_compress_hook):
        model = DDP(layers(), bucket_cap_mb=0.002)
        model.register_comm_hook(None, renamed(hook))
        given.append([round(loss, 2) for loss in train(model, batches(4))])
    return given


@case
def ddp_join() -> Any:
    model = DDP(layers(), bucket_cap_mb=0.002)
    with Join([model]):
        train(model, batches(2 + dist.get_rank()))
    return [round(p.sum().item(), 4) for p in model.parameters()]


@case
def ddp_buffers() -> Any:
    model = DDP(nn.Sequential(layers(), nn.BatchNorm1d(4)))
    losses = train(model, batches(3))
    model.eval()
    return losses


@case
def zero_optimizer() -> Any:
    model = DDP(layers())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    losses = train(model, batches(3), optimizer)
    optimizer.consolidate_state_dict(to=0)
    return losses


def sharded(mesh: Any, **options: Any) -> nn.Module:
    model = layers()
    for block in model[:-1]:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


@case
def fsdp() -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return [
        train(sharded(mesh), batches(4)),
        train(sharded(mesh, reshard_after_forward=False), batches(4)),
        [round(loss, 2) for loss in train(sharded(mesh, mp_policy=mixed), batches(4))],
    ]


def two_dimensions(**options: Any) -> Any:
    """Return a mesh with an outer dimension of two."""
    return init_device_mesh(
        "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp_replicate", "dp_shard"), **options
    )


@case
def hsdp() -> Any:
    if dist.get_world_size() % 2:
        return None
    return train(sharded(two_dimensions()), batches(4))


@case
def hsdp_override() -> Any:
    """Replicas over detcoll, whatever carries the rest."""
    if dist.get_world_size() % 2:
        return None
    mesh = two_dimensions(backend_override={"dp_replicate": "detcoll"})
    assert dist.get_backend(mesh.get_group("dp_replicate")) == "detcoll"
    return train(sharded(mesh), batches(4))


@case
def tensor_parallel() -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 4))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return train(model, batches(4, seed=0))


@case
def dtensor() -> Any:
    mesh, size = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
    torch.manual_seed(0)
    whole = torch.randn(2 * size + 1, 3 * size)
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    columns = rows.redistribute(mesh, [Shard(1)])
    partial = DTensor.from_local(torch.full((size, 2), float(dist.get_rank())), mesh, [Partial()])
    return [
        torch.equal(rows.full_tensor(), whole),
        torch.equal(columns.full_tensor(), whole),
        torch.equal(columns.redistribute(mesh, [Replicate()]).to_local(), whole),
        partial.redistribute(mesh, [Shard(0)]).to_local().tolist(),
        partial.full_tensor().tolist(),
    ]


@case
def functional_collectives() -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.arange(2 * size, dtype=torch.float32) + rank
    sizes = [rank + 1] * size
    given = [
        functional.all_reduce(x, "sum", dist.group.WORLD),
        functional.all_reduce(x, "avg" if dist.get_backend() != "gloo" else "max", dist.group.WORLD)[:0],
        functional.all_gather_tensor(x, 0, dist.group.WORLD),
        functional.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD),
        functional.broadcast(x, 0, dist.group.WORLD),
        functional.all_to_all_single(
            torch.arange(sum(sizes)) + rank, list(range(1, size + 1)), sizes, dist.group.WORLD
        ),
        *functional.all_reduce_coalesced([x, 3 * x], "sum", dist.group.WORLD),
        *functional.all_gather_into_tensor_coalesced([x, 2 * x], dist.group.WORLD),
        *functional.reduce_scatter_tensor_coalesced([x, 2 * x], "sum", [0, 0], dist.group.WORLD),
    ]
    return [each.tolist() for each in given]


@case
def differentiable_collectives() -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = (torch.arange(2 * size, dtype=torch.float32) + rank).requires_grad_()
    (differentiable.all_reduce(x * x) * (rank + 1)).sum().backward()
    differentiable.broadcast(x * x, 0).sum().backward()
    differentiable.reduce(x * x, 0).sum().backward()
    torch.cat(differentiable.all_gather(x * (rank + 1))).sum().backward()
    torch.cat(differentiable.all_to_all([torch.empty(2) for _ in range(size)], list(x.chunk(size)))).sum().backward()
    return x.grad.tolist()


@case
def compiled() -> Any:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return functional.all_reduce(x * 2, "sum", dist.group.WORLD) + 1

    losses = train(torch.compile(DDP(layers()), backend="aot_eager"), batches(3))
    return [step(torch.full((3,), float(dist.get_rank()))).tolist(), losses]


@case
def profiled() -> Any:
    """Return how often each call shows in a profile, under the name of the backend."""
    x, size = torch.ones(10), dist.get_world_size()
    with torch.profiler.profile() as profile:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        dist.broadcast(x, 0)
        dist.all_gather([torch.empty(10) for _ in range(size)], x)
        dist.reduce(x, 0)
        dist.barrier()
        train(DDP(layers()), batches(1))
    names = [event.name for event in profile.events() if event.name.startswith(f"{dist.get_backend()}:")]
    return sorted(name.partition(":")[2] for name in names)


@case
def checkpoints() -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, fresh = sharded(mesh), sharded(mesh)
    train(model, batches(2))
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder[0])
    state = {"model": get_model_state_dict(fresh)}
    checkpoint.load(state, checkpoint_id=folder[0])
    set_model_state_dict(fresh, state["model"])
    later = sharded(mesh)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    set_model_state_dict(
        later, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    )
    return [
        [torch.equal(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
        for other in (fresh, later)
    ]


def main() -> None:
    dist.init_process_group(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        try:
            result = CASES[name]()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        os.write(1, (json.dumps({"rank": dist.get_rank(), "said": [name, result]}) + "\n").encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
