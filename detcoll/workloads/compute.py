"""How a synthetic iteration spends its compute time.

- ``wait`` sleeps until the wall clock has moved on by it: a processor that is not this host's, such as a GPU, computes.
- ``python`` and ``numpy`` work until this thread has had that much *processor* time. So what communication takes from
  the processor makes the iteration longer, as it would a real one; a loop that ended by the wall clock would hide it.
  A loop in Python keeps the interpreter's lock, a product of matrices lets go of it.

Where busy ranks are more than processors, an iteration takes as many times longer, in one cluster too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

ComputeKind = Literal["wait", "python", "numpy"]

_STEPS = 200
_MATRIX = np.eye(192, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Compute:
    """``clock_ns`` measures compute time, and ``until_ns`` spends it until that clock shows what it is given."""

    clock_ns: Callable[[], int]
    until_ns: Callable[[int], None]


def wait_until_ns(deadline_ns: int) -> None:
    """Sleep until the monotonic clock shows ``deadline_ns``; return at once where it has passed."""
    while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
        time.sleep(left_ns / 1e9)


def run_python_until_ns(deadline_ns: int) -> None:
    """Keep the interpreter busy until this thread's processor time is ``deadline_ns``."""
    value = 1
    while time.thread_time_ns() < deadline_ns:
        for _ in range(_STEPS):
            value = value * 31 % 1021


def run_numpy_until_ns(deadline_ns: int) -> None:
    """Multiply matrices until this thread's processor time is ``deadline_ns``."""
    out = np.empty_like(_MATRIX)
    while time.thread_time_ns() < deadline_ns:
        np.matmul(_MATRIX, _MATRIX, out=out)


COMPUTE: Mapping[ComputeKind, Compute] = {
    "wait": Compute(time.monotonic_ns, wait_until_ns),
    "python": Compute(time.thread_time_ns, run_python_until_ns),
    "numpy": Compute(time.thread_time_ns, run_numpy_until_ns),
}
