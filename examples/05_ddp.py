"""An ordinary script with DistributedDataParallel, over Gloo or over detcoll: one word makes the difference.

It trains a perceptron on handwritten digits, and imports nothing of detcoll::

    torchrun --nproc-per-node 2 examples/05_ddp.py --backend gloo
    torchrun --nproc-per-node 2 examples/05_ddp.py --backend detcoll

Any launcher that torch knows will do, and so will those of detcoll, for instance across two emulated sites::

    detcoll lab --ranks-per-site 1 -- python examples/05_ddp.py --backend detcoll
    detcoll measure examples/05_ddp.py

The second one compares its steps with those in one cluster. Losses of the two backends agree but for rounding; with two
ranks they are equal.

Needs: ``pip install -e ".[measure,torch]"``
"""

import argparse
import gc

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

HIDDEN, BATCH, RATE = 256, 64, 0.2

parser = argparse.ArgumentParser(description="Digits with DistributedDataParallel")
parser.add_argument("--backend", default="detcoll")
parser.add_argument("--iterations", type=int, default=100)
arguments = parser.parse_args()

torch.set_num_threads(1)  # ranks share the processors
dist.init_process_group(arguments.backend)
rank, size = dist.get_rank(), dist.get_world_size()

pixels, labels = load_digits(return_X_y=True)
pixels, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
mine = torch.arange(rank, len(pixels), size)  # this rank's shard
shuffle = torch.Generator().manual_seed(rank + 1)

torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)))
optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

for iteration in range(arguments.iterations):
    batch = mine[torch.randint(len(mine), (BATCH,), generator=shuffle)]
    loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    if iteration % 10 == 0 or iteration == arguments.iterations - 1:
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"iteration {iteration:4d}  loss {mean.item() / size:.9g}", flush=True)

if rank == 0:
    with torch.no_grad():
        guesses = model.module(pixels).argmax(dim=1)
    print(f"accuracy {(guesses == labels).float().mean():.3f}", flush=True)
del model  # before its group ends: DDP's destructor over Gloo may wait for ever for a thread
gc.collect()  # torch may keep the first DDP in a cycle
dist.destroy_process_group()
