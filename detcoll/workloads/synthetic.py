"""A training iteration with given compute time and gradient size, and no arithmetic.

The forward pass takes a third of the compute time and the backward pass two thirds, both as a wait on the wall clock
or busy (`detcoll.workloads.compute`).
The gradient becomes final evenly through the backward pass: of n buckets, bucket k is ready at (k + 1) / n of it, and
is reduced from then on. An iteration ends when the whole gradient is reduced; the next one begins at once. Its
arithmetic is thus the compute time, and everything above it is communication that was not hidden.

Values name themselves: element j of rank r in iteration i is ``j mod 1021 + r + i mod 7``, whose sums float32 holds
exactly. The next gradient is written, and one bucket of the last result is checked, in the forward pass; before
the first and after the last measured iteration the whole result is checked.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np

from detcoll.errors import TransportError, UsageError
from detcoll.workloads.arrays import Arrays, HostArrays
from detcoll.workloads.buckets import Buckets, Collectives, as_float32
from detcoll.workloads.compute import COMPUTE
from detcoll.workloads.workload import Stamps, WorkloadSpec

PATTERN = 1021
PHASES = 7


class Synthetic:
    """One rank's part of the synthetic training."""

    def __init__(self, comm: Collectives, spec: WorkloadSpec, arrays: Arrays | None = None) -> None:
        if spec.gradient_bytes < 4 or spec.gradient_bytes % 4:
            raise UsageError(f"gradient_bytes={spec.gradient_bytes} must be a positive multiple of 4 bytes (float32)")
        elements = spec.gradient_bytes // 4
        self._rank, self._size = comm.rank, comm.size
        self._forward_ns = spec.compute_ns // 3
        self._backward_ns = spec.compute_ns - self._forward_ns
        self._pattern = (np.arange(elements, dtype=np.int64) % PATTERN).astype(np.float32)
        self._arrays = arrays or HostArrays()
        self._template, self._gradient = self._arrays.put(self._pattern), self._arrays.put(as_float32(elements))
        self._buckets = Buckets(comm, self._gradient, spec.bucket_bytes, "sum", spec.overlap)
        self._compute = COMPUTE[spec.compute_kind]
        self._reduced: int | None = None
        self.losses: list[float] = []

    def iterate(self, index: int) -> Stamps:
        """Run iteration ``index`` and return when it passed its marks."""
        forward_end_ns = self._compute.clock_ns() + self._forward_ns
        ends = self._buckets.ends_elems
        if self._reduced is not None:
            self._check(self._reduced % len(ends))
        self._arrays.functions.add(self._template, float(self._rank + index % PHASES), out=self._gradient)
        self._reduced = index
        self._compute.until_ns(forward_end_ns)
        begin_ns, backward_ns = time.monotonic_ns(), self._compute.clock_ns()
        for number, end in enumerate(ends, start=1):
            self._compute.until_ns(backward_ns + self._backward_ns * number // len(ends))
            self._buckets.ready(end)
        self._arrays.settle()
        backward_end_ns = time.monotonic_ns()
        self._buckets.wait()
        reduced_ns = time.monotonic_ns()
        return Stamps(begin_ns, backward_end_ns, reduced_ns, reduced_ns)

    def rehearse(self) -> None:
        """Run an iteration that is not measured, and check all of its result."""
        self.iterate(0)
        self.verify()

    def verify(self) -> None:
        """Check the whole result of the last iteration.

        Raises
        ------
        TransportError
            If an element differs; names it, its value and the one expected.
        """
        for number in range(len(self._buckets.ends_elems)):
            self._check(number)

    def digest(self) -> str:
        """Return a digest of the last reduced gradient's bytes."""
        return hashlib.blake2b(self._arrays.get(self._gradient).tobytes(), digest_size=16).hexdigest()

    def accuracy(self) -> None:
        """Return nothing: there is nothing to classify."""

    def save(self, path: Path) -> None:
        """Keep nothing: iterations do not build on each other."""

    def resume(self, path: Path) -> None:
        """Take up nothing."""

    def _check(self, number: int) -> None:
        """Check one bucket of the last result."""
        assert self._reduced is not None
        ends = self._buckets.ends_elems
        begin = ends[number - 1] if number else 0
        seen = self._arrays.get(self._gradient[begin : ends[number]])
        shared = self._size * (self._size - 1) // 2 + self._size * (self._reduced % PHASES)
        expected = self._pattern[begin : ends[number]] * np.float32(self._size) + np.float32(shared)
        if not np.array_equal(seen, expected):
            wrong = int(np.flatnonzero(seen != expected)[0])
            raise TransportError(
                f"rank {self._rank}, iteration {self._reduced}: element {begin + wrong} of the reduced gradient is "
                f"{seen[wrong]}, expected {expected[wrong]}"
            )
