"""Train a perceptron on handwritten digits, data-parallel, with one all-reduce an iteration.

The same loss curve, bit for bit, under every launcher and transport::

    detcoll run -n 4 examples/02_digits.py
    mpiexec -n 4 python examples/02_digits.py
    torchrun --nproc-per-node 4 examples/02_digits.py

Against an ordinary loop two things are new: the line that averages the gradients, and ``reproducible=True``, which
fixes the order of summation whatever transport the launcher leads to. ``--transport mpi`` and the like choose one by
hand; across sites give a topology with DETCOLL_TOPOLOGY.

Needs: ``pip install -e ".[measure]"``; mpiexec also needs ``".[mpi]"``, and torchrun ``".[torch]"``.
"""

import os

# Matrix products on several threads may round differently from run to run; set before NumPy is imported.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse

import numpy as np
from sklearn.datasets import load_digits

import detcoll

HIDDEN, BATCH, RATE = 256, 64, np.float32(0.2)

parser = argparse.ArgumentParser(description="Data-parallel digits")
parser.add_argument("--transport", default="auto")
parser.add_argument("--iterations", type=int, default=100)
arguments = parser.parse_args()

comm = detcoll.init(transport=arguments.transport, reproducible=True)

pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)
mine = np.arange(comm.rank, len(pixels), comm.size)  # this rank's shard

start = np.random.default_rng(0)  # the same on all ranks
w1 = start.standard_normal((64, HIDDEN), dtype=np.float32) * np.float32(0.18)
w2 = start.standard_normal((HIDDEN, 10), dtype=np.float32) * np.float32(0.09)
shuffle = np.random.default_rng(comm.rank + 1)

for iteration in range(arguments.iterations):
    batch = shuffle.choice(mine, BATCH)
    x, y = pixels[batch], labels[batch]
    hidden = np.maximum(x @ w1, 0)
    logits = hidden @ w2
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    loss = np.array([-np.log(shares[np.arange(BATCH), y] + 1e-12).mean()])

    shares[np.arange(BATCH), y] -= 1
    slope2 = hidden.T @ shares / BATCH
    slope1 = x.T @ ((shares @ w2.T) * (hidden > 0)) / BATCH

    detcoll.all_reduce([slope1, slope2], op="avg")
    w1 -= RATE * slope1
    w2 -= RATE * slope2

    if iteration % 10 == 0 or iteration == arguments.iterations - 1:
        detcoll.all_reduce(loss, op="avg")
        if comm.rank == 0:
            print(f"iteration {iteration:4d}  loss {loss[0]:.17g}", flush=True)

if comm.rank == 0:
    guesses = (np.maximum(pixels @ w1, 0) @ w2).argmax(axis=1)
    print(f"accuracy {np.mean(guesses == labels):.3f}", flush=True)
detcoll.finalize()
