"""Real training: a perceptron on scikit-learn's handwritten digits, data-parallel, in NumPy, torch or CuPy.

64 pixels, three hidden layers of 512 units and 10 classes make 563,210 parameters, so every iteration moves a gradient
of 2.15 MiB in float32: about 19 ms of a line of 1 Gbit/s, as long as the arithmetic of one iteration takes. Each rank
trains on its own shard with 256 samples a batch; stochastic gradient descent with momentum; gradients are averaged with
``op="avg"``, bucket by bucket, while the backward pass goes on.

Everything is seeded, and sums inside a rank run on one thread, so the training depends on nothing but the bits that
the all-reduce gave. The digest of a run covers the parameters at the end and a checksum of every averaged gradient,
since a parameter's rounding would swallow a difference in a gradient's last bit.

On a device, all arithmetic is the device's. A pass ends when the device has done it. An iteration of several batches
reduces once: the last batch's backward pass adds what the earlier ones gave, layer by layer.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import TransportUnavailable, UsageError
from detcoll.installation import install_command
from detcoll.workloads.arrays import Arrays, HostArrays
from detcoll.workloads.buckets import Buckets, Collectives, as_float32
from detcoll.workloads.workload import Stamps, WorkloadSpec

LAYERS = (64, 512, 512, 512, 10)
BATCH = 256
LEARNING_RATE = 0.05
MOMENTUM = 0.9
HELD_OUT = 360

_ODD = 6364136223846793005  # makes the checksum depend on the order of iterations

_Array = NDArray[np.float32]

PARAMETERS = sum((inputs + 1) * outputs for inputs, outputs in pairwise(LAYERS))


def save_digits(path: Path) -> None:
    """Write the digits to ``path`` as NumPy arrays, pixels from 0 to 1, so that ranks need no scikit-learn.

    Raises
    ------
    TransportUnavailable
        If scikit-learn is not installed; the message tells how to install it.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise TransportUnavailable(
            f"the digits workload needs scikit-learn; install it with: {install_command('measure')}"
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    np.savez(path, pixels=(pixels / 16).astype(np.float32), labels=labels.astype(np.int64))


class Digits:
    """One rank's part of the training."""

    def __init__(self, comm: Collectives, spec: WorkloadSpec, arrays: Arrays | None = None) -> None:
        if spec.data_path is None:
            raise UsageError("data_path=None: the digits workload needs the file that save_digits wrote")
        self._rank, self._seed = comm.rank, spec.seed
        self._arrays = arrays or HostArrays()
        self._functions = self._arrays.functions
        self._load(Path(spec.data_path), comm.size)
        self._parameters = self._arrays.put(_initial(spec.seed))
        self._velocity, self._gradient = (self._arrays.put(as_float32(PARAMETERS)) for _ in range(2))
        self._layers = _layer_views(self._parameters)
        self._slopes = _layer_views(self._gradient)
        self._batches = spec.batches
        self._earlier = self._arrays.put(as_float32(PARAMETERS if spec.batches > 1 else 0))
        self._buckets = Buckets(comm, self._gradient, spec.bucket_bytes, "avg", spec.overlap)
        self._checksum = 0
        self.losses: list[float] = []

    def iterate(self, index: int) -> Stamps:
        """Train iteration ``index`` and return when it passed its marks."""
        loss, begin_ns, backward_end_ns, reduced_ns = self._gradient_of(index)
        self._checksum = (self._checksum * _ODD + self._arrays.total(self._gradient)) % 2**64
        self._velocity *= MOMENTUM
        self._velocity += self._gradient
        self._functions.multiply(self._velocity, LEARNING_RATE, out=self._gradient)
        self._parameters -= self._gradient
        self.losses.append(float(loss))
        self._arrays.settle()
        return Stamps(begin_ns, backward_end_ns, reduced_ns, time.monotonic_ns())

    def rehearse(self) -> None:
        """Do what an iteration does but leave the parameters as they are."""
        self._gradient_of(0)

    def verify(self) -> None:
        """Nothing to verify in passing: the digest at the end tells."""

    def digest(self) -> str:
        """Return a digest of the parameters' bytes and of every gradient's checksum."""
        state = self._arrays.get(self._parameters).tobytes() + self._checksum.to_bytes(8, "little")
        return hashlib.blake2b(state, digest_size=16).hexdigest()

    def accuracy(self) -> float:
        """Return the share of held-out digits that are classified right."""
        guesses = self._arrays.get(self._forward(self._arrays.put(self._test_pixels))[-1]).argmax(axis=1)
        return float((guesses == self._test_labels).mean())

    def save(self, path: Path) -> None:
        """Write the state that training goes on from."""
        with path.open("wb") as file:
            checksum = np.uint64(self._checksum)
            parameters, velocity = self._arrays.get(self._parameters), self._arrays.get(self._velocity)
            np.savez(file, parameters=parameters, velocity=velocity, checksum=checksum)

    def resume(self, path: Path) -> None:
        """Go on from a state that `save` wrote."""
        with np.load(path) as state:
            self._parameters[:] = self._arrays.put(state["parameters"])
            self._velocity[:] = self._arrays.put(state["velocity"])
            self._checksum = int(state["checksum"])

    def _load(self, path: Path, size: int) -> None:
        with np.load(path) as data:
            pixels, labels = data["pixels"], data["labels"]
        order = np.random.default_rng(self._seed).permutation(len(pixels))
        train, test = order[HELD_OUT:], order[:HELD_OUT]
        if size > len(train):
            raise UsageError(f"size={size} ranks are more than the {len(train)} digits to train on")
        shard = train[self._rank :: size][: len(train) // size]
        self._pixels, self._labels = self._arrays.put(pixels[shard]), self._arrays.put(labels[shard])
        self._rows = self._arrays.put(np.arange(len(shard)))
        self._test_pixels, self._test_labels = pixels[test], labels[test]

    def _batch(self, index: int) -> tuple[Any, Any]:
        """Return the batch of iteration ``index``, whatever came before: a new order of the shard every epoch."""
        batch = min(BATCH, len(self._pixels))
        epoch, position = divmod(index, len(self._pixels) // batch)
        order = np.random.default_rng([self._seed, self._rank, epoch]).permutation(len(self._pixels))
        chosen = self._arrays.put(order[position * batch : (position + 1) * batch])
        return self._pixels[chosen], self._labels[chosen]

    def _forward(self, pixels: Any) -> list[Any]:
        """Return the input of each layer, and the logits last."""
        activations = [pixels]
        for depth, (weights, bias) in enumerate(self._layers):
            out = activations[-1] @ weights + bias
            activations.append(out if depth == len(self._layers) - 1 else self._functions.clip(out, 0, None))
        return activations

    def _gradient_of(self, index: int) -> tuple[Any, int, int, int]:
        """Leave the averaged gradient of iteration ``index``; return the loss and the marks of its backward pass."""
        first, loss, began_ns = index * self._batches, 0.0, time.monotonic_ns()
        for batch in range(first, first + self._batches - 1):
            activations, delta, own = self._ahead(batch)
            self._back(activations, delta, lambda depth: None)
            loss += own
            self._earlier[:] = self._gradient if batch == first else self._earlier + self._gradient
        activations, delta, own = self._ahead(first + self._batches - 1)
        begin_ns = began_ns if self._batches > 1 else time.monotonic_ns()
        self._back(activations, delta, self._layer_done)
        self._arrays.settle()
        backward_end_ns = time.monotonic_ns()
        self._buckets.wait()
        return (loss + own) / self._batches, begin_ns, backward_end_ns, time.monotonic_ns()

    def _ahead(self, batch: int) -> tuple[list[Any], Any, Any]:
        """Return the inputs of the layers, the slope of the loss with respect to the logits, and the loss."""
        pixels, labels = self._batch(batch)
        activations = self._forward(pixels)
        loss, delta = self._cross_entropy(activations[-1], labels)
        return activations, delta, loss

    def _back(self, activations: list[Any], delta: Any, layer_done: Callable[[int], None]) -> None:
        """Leave the gradient of one batch, layer by layer."""
        for depth in reversed(range(len(self._layers))):
            slope, bias_slope = self._slopes[depth]
            self._functions.matmul(activations[depth].T, delta, out=slope)
            self._functions.sum(delta, axis=0, out=bias_slope)
            layer_done(depth)
            if depth:
                delta = (delta @ self._layers[depth][0].T) * (activations[depth] > 0)

    def _layer_done(self, depth: int) -> None:
        """Add what earlier batches gave to the gradient of a layer, and let it be reduced."""
        begin, end = _place(depth)
        if self._batches > 1:
            self._gradient[begin:end] += self._earlier[begin:end]
        self._buckets.ready(end)

    def _cross_entropy(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        """Return the mean loss over a batch and its slope with respect to the logits."""
        functions, rows = self._functions, self._rows[: len(labels)]
        weights = functions.exp(logits - functions.amax(logits, axis=1, keepdims=True))
        shares = weights / weights.sum(axis=1, keepdims=True)
        loss = -functions.log(functions.clip(shares[rows, labels], 1e-12, None)).mean()
        shares[rows, labels] -= 1
        return loss, shares / (len(labels) * self._batches)


def _place(depth: int) -> tuple[int, int]:
    """Return where weights and bias of a layer lie in a flat array, where the last layer comes first."""
    sizes = [(inputs + 1) * outputs for inputs, outputs in pairwise(LAYERS)]
    begin = sum(sizes[depth + 1 :])
    return begin, begin + sizes[depth]


def _layer_views(flat: Any) -> list[tuple[Any, Any]]:
    """Return weights and bias of each layer, first to last, as views of ``flat``, where the last layer comes first."""
    views: list[tuple[Any, Any]] = []
    position = 0
    for inputs, outputs in reversed(list(pairwise(LAYERS))):
        weights = flat[position : position + inputs * outputs].reshape(inputs, outputs)
        position += inputs * outputs
        views.append((weights, flat[position : position + outputs]))
        position += outputs
    return views[::-1]


def _initial(seed: int) -> _Array:
    """Return the parameters that every rank starts from (He initialisation, no bias)."""
    flat = as_float32(PARAMETERS)
    generator = np.random.default_rng(seed)
    for weights, _ in _layer_views(flat):
        scale = np.float32(np.sqrt(2 / weights.shape[0]))
        weights[:] = generator.standard_normal(weights.shape, dtype=np.float32) * scale
    return flat
