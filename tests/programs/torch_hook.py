"""Programs of DDP over Gloo whose gradients go through detcoll, for tests of `detcoll.torch`."""

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from calls import say
from torch.nn.parallel import DistributedDataParallel

import detcoll
import detcoll.torch


def train(hook: Callable[..., Any] | None, comm: detcoll.Communicator, steps: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(1)
    layers = torch.nn.Linear(20, 100), torch.nn.ReLU(), torch.nn.Linear(100, 100), torch.nn.Linear(100, 1)
    model = torch.nn.Sequential(*layers)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
    if hook is not None:
        ddp.register_comm_hook(comm, hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    data = torch.Generator().manual_seed(comm.rank + 1)
    for _ in range(steps):
        x = torch.randn(16, 20, generator=data)
        loss = (ddp(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def averages() -> None:
    comm = detcoll.init()
    dist.init_process_group("gloo")
    own, hooked = train(None, comm), train(detcoll.torch.comm_hook, comm)
    say([torch.allclose(a, b, atol=1e-6) for a, b in zip(own, hooked, strict=True)])
    say(detcoll.all_gather_object([t.numpy().tobytes() for t in hooked]).count([t.numpy().tobytes() for t in hooked]))
    say(sorted({name for name in seen if name.startswith("bucket")}))
    gc.collect()  # torch may keep the first DDP in a cycle
    dist.destroy_process_group()
    copies(comm)
    detcoll.finalize()


seen: list[str] = []
_all_reduce = detcoll.Communicator.all_reduce


def _noted(self: Any, *arguments: Any, **options: Any) -> Any:
    seen.append(options.get("name", ""))
    return _all_reduce(self, *arguments, **options)


def fails() -> None:
    """A rank that leaves lets the backward pass of the others raise, with detcoll's own text."""
    comm = detcoll.init()
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    ddp = DistributedDataParallel(torch.nn.Linear(4, 4))
    ddp.register_comm_hook(None, detcoll.torch.comm_hook)
    if comm.rank == 1:
        comm.all_reduce(torch.zeros(3, dtype=torch.float64))
    try:
        ddp(torch.ones(1, 4)).sum().backward()
        say("returned")
    except RuntimeError as error:
        say(str(error))


def copies(comm: detcoll.Communicator) -> None:
    torch.manual_seed(comm.rank)
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.register_buffer("small", torch.randn(5).to(torch.float8_e5m2))
    model.register_buffer("flag", torch.tensor(comm.rank == 2))
    model.register_buffer("nothing", torch.empty(0))
    model.register_buffer("turned", torch.randn(4, 6, dtype=torch.complex64).t())
    model.register_buffer("twice", model.bias.detach())
    detcoll.torch.broadcast_parameters(model, root=2)
    values = {key: torch.view_as_real(value.to(torch.complex64)) for key, value in model.state_dict().items()}
    mine = {key: value.flatten().tolist() for key, value in values.items()}
    say([other == mine for other in detcoll.all_gather_object(mine)])
    say([mine["flag"], model.weight.is_contiguous(memory_format=torch.channels_last)])
    entries = {"a": torch.full((2,), comm.rank), "step": comm.rank}
    detcoll.torch.broadcast_parameters(entries, comm=comm)
    say([entries["a"].tolist(), entries["step"]])
    for wrong in (3, [torch.ones(1), "x"]):
        try:
            detcoll.torch.broadcast_parameters(wrong)
        except detcoll.errors.UsageError as error:
            say(str(error))


if __name__ == "__main__":
    detcoll.Communicator.all_reduce = _noted
    globals()[sys.argv[1]]()
