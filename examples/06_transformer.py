"""Train a small transformer on Python's own manual, in one cluster and across two sites, with the same losses.

The model predicts the next character of the text that ``help("topics")`` shows. DistributedDataParallel averages the
gradients, over detcoll. First in one cluster whose ranks are grouped like two sites, then in two sites that are joined
by an emulated line of 1 Gbit/s and 20 ms there and back::

    detcoll run -n 4 --sites 2 examples/06_transformer.py
    detcoll lab --sites 2 --ranks-per-site 2 -- python examples/06_transformer.py

Both print the same losses to the last digit, because the order of summation depends on the grouping alone and not on
the network. The digits of ``loss`` are exact, so comparing the outputs compares bits.

Needs: ``pip install -e ".[measure,torch]"``
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WIDTH, HEADS, LAYERS, LENGTH, BATCH, RATE = 64, 4, 2, 64, 8, 3e-3

parser = argparse.ArgumentParser(description="A transformer of characters")
parser.add_argument("--backend", default="detcoll")
parser.add_argument("--iterations", type=int, default=60)
arguments = parser.parse_args()

torch.set_num_threads(1)  # more threads may round differently from run to run
dist.init_process_group(arguments.backend)
rank, size = dist.get_rank(), dist.get_world_size()

text = "".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
number = {character: index for index, character in enumerate(characters)}
encoded = torch.tensor([number[character] for character in text])
mine = encoded[rank * len(encoded) // size : (rank + 1) * len(encoded) // size]  # this rank's shard
draw = torch.Generator().manual_seed(rank + 1)


class Transformer(nn.Module):
    """Predicts each character from those before it: (batch, length) numbers in, (batch, length, characters) out."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.characters, self.places = nn.Embedding(len(characters), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, len(characters))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the score of each character that may follow."""
        embedded = self.characters(x) + self.places.weight
        return self.out(self.layers(embedded, mask=self.mask, is_causal=True))


torch.manual_seed(0)  # the same model on every rank
model = DistributedDataParallel(Transformer())
optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

for iteration in range(arguments.iterations):
    begins = torch.randint(len(mine) - LENGTH, (BATCH,), generator=draw)
    batch = torch.stack([mine[begin : begin + LENGTH + 1] for begin in begins])
    scores = model(batch[:, :-1])
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    if iteration % 10 == 0 or iteration == arguments.iterations - 1:
        mean = loss.detach().double()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"iteration {iteration:4d}  loss {mean.item() / size:.17g}", flush=True)
dist.destroy_process_group()
