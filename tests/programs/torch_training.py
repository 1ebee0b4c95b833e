"""Train with Gloo and with detcoll in one process and compare: on every rank, under any launcher that torch knows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch_ranks import begin, say

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
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    before, after = losses("gloo"), losses("detcoll")
    assert torch.allclose(torch.tensor(before), torch.tensor(after), rtol=1e-5, atol=1e-6), (before, after)
    say(0, len(after))
