"""Train with Gloo and with detcoll in one process and compare: on every rank, under any launcher that torch knows.

``torch_training.py grouped`` trains over Gloo, across two sites with a line between, in one cluster of the same
grouping, and in one of another grouping, and tells the weights and losses of each.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch_ranks import begin, say

from detcoll.topology import Topology
from detcoll.torch import Options, communicator

OPTIONS = [{}, {"gradient_as_bucket_view": True, "static_graph": True}, {"find_unused_parameters": True}]


class Net(torch.nn.Module):
    """A net with buffers, and with a layer that some passes leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))
        self.other = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, whole: bool) -> torch.Tensor:
        x = self.layers(x)
        return self.other(x) if whole else x


def losses(backend: str) -> list[float]:
    """Return the losses of some training, with all that DDP does."""
    rank, _ = begin(backend)
    found = everything(rank)  # DDP ends before its group, see `steps`
    gc.collect()  # torch may keep the first DDP in a cycle
    dist.destroy_process_group()
    return found


def everything(rank: int) -> list[float]:
    """Return what `losses` does."""
    found = []
    for options in OPTIONS:
        torch.manual_seed(3)
        model = DistributedDataParallel(Net(), bucket_cap_mb=0.001, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(rank)
        for step in range(6):
            whole = step % 2 == 0 or "find_unused_parameters" not in options
            x = torch.randn(4, 8, generator=generator)
            if step == 3 and not options:
                with model.no_sync():
                    model(x, whole=whole).square().mean().backward()
            loss = model(x, whole=whole).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            dist.all_reduce(mean, dist.ReduceOp.SUM)
            found.append(mean.item())
    plain = DistributedDataParallel(torch.nn.Linear(4, 1))
    with Join([plain]):
        for _ in range(rank + 1):
            plain(torch.ones(2, 4)).sum().backward()
    total = torch.cat([each.grad.reshape(-1) for each in plain.parameters()]).sum()
    found.append(float(total))
    return found


def grouped() -> None:
    """Tell weights and losses of a few steps over Gloo, and over detcoll with several topologies of three ranks."""
    wide = Topology.parse(
        """
        [[site]]
        name = "near"
        ranks = 1
        uplink = "100 MB/s"
        [[site]]
        name = "far"
        ranks = 2
        uplink = "100 MB/s"
        [[link]]
        between = ["near", "far"]
        one_way = "1 ms"
        """
    )
    topologies = {"sites": wide, "cluster": wide.as_single_cluster(), "ungrouped": Topology.single_site(3)}
    told = {"gloo": trained("gloo")}
    for name, topology in topologies.items():
        told[name] = trained("detcoll", pg_options=Options(topology=topology, reproducible=True))
    say(0, told)


def trained(backend: str, **options: Any) -> tuple[str, list[float], str]:
    """Return the bits of the weights after some steps of DDP, the loss of each step, and the transport."""
    rank, _ = begin(backend, **options)
    weights, losses = steps(rank)
    transport = communicator().transport if backend == "detcoll" else backend
    gc.collect()  # torch may keep the first DDP in a cycle
    dist.destroy_process_group()
    return weights, losses, transport


def steps(rank: int) -> tuple[str, list[float]]:
    """Return what `trained` does of weights and losses.

    DDP ends with this function, before its group is destroyed. Else it is DDP that frees the group, which for Gloo
    joins threads that may wait for the lock of Python, and that is held meanwhile.
    """
    torch.manual_seed(3)
    model = DistributedDataParallel(Net(), bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(6):
        loss = model(torch.randn(4, 8, generator=generator), whole=True).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    return weights.numpy().tobytes().hex(), losses


if __name__ == "__main__" and sys.argv[1:] == ["grouped"]:
    grouped()
elif __name__ == "__main__":
    before, after = losses("gloo"), losses("detcoll")
    assert torch.allclose(torch.tensor(before), torch.tensor(after), rtol=1e-5, atol=1e-6), (before, after)
    say(0, len(after))
