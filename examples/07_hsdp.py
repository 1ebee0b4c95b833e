"""Hybrid sharding across two sites: parameters are sharded inside each site and replicated across them.

FSDP (``fully_shard``) takes a mesh of two dimensions. Along ``dp_shard`` the ranks of a site gather parameters and
scatter gradients; along ``dp_replicate`` each rank averages its shard with its counterpart in the other site, and only
that crosses the line. It trains a perceptron on handwritten digits::

    detcoll run -n 4 --sites 2 examples/07_hsdp.py
    detcoll lab --sites 2 --ranks-per-site 2 -- python examples/07_hsdp.py

Both print the same losses to the last digit. ``--backend gloo`` leaves the sites to Gloo, and only the dimension across
them to detcoll::

    detcoll lab --sites 2 --ranks-per-site 2 -- python examples/07_hsdp.py --backend gloo

Needs: ``pip install -e ".[measure,torch]"``, with torch 2.10 or newer
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

SITES, HIDDEN, BATCH, RATE = 2, 256, 64, 0.2

parser = argparse.ArgumentParser(description="Digits with hybrid sharding")
parser.add_argument("--backend", default="detcoll", help="of all ranks, and of those inside a site")
parser.add_argument("--iterations", type=int, default=100)
arguments = parser.parse_args()

torch.set_num_threads(1)  # ranks share the processors
dist.init_process_group(arguments.backend)
rank, size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(
    "cpu",
    (SITES, size // SITES),  # ranks are numbered site by site
    mesh_dim_names=("dp_replicate", "dp_shard"),
    backend_override={"dp_replicate": "detcoll"},
)

pixels, labels = load_digits(return_X_y=True)
pixels, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
mine = torch.arange(rank, len(pixels), size)  # this rank's share of the data
shuffle = torch.Generator().manual_seed(rank + 1)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

for iteration in range(arguments.iterations):
    batch = mine[torch.randint(len(mine), (BATCH,), generator=shuffle)]
    loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    if iteration % 10 == 0 or iteration == arguments.iterations - 1:
        mean = loss.detach().double()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"iteration {iteration:4d}  loss {mean.item() / size:.17g}", flush=True)

with torch.no_grad():
    guesses = model(pixels).argmax(dim=1)  # gathers the parameters, so all ranks take part
if rank == 0:
    print(f"accuracy {(guesses == labels).float().mean():.3f}", flush=True)
dist.destroy_process_group()
