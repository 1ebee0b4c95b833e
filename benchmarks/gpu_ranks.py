"""What the ranks of ``benchmarks/gpu.py`` do, which starts them: ``python gpu_ranks.py TASK.json``.

A rank times all-reduces of arrays of several libraries in turns, or trains. With ``facts`` instead of a file, it prints
what is installed here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import detcoll
from detcoll.bench.start import Starter, combine
from detcoll.bench.sweep import Case, Sweep
from detcoll.device import cuda, driver
from detcoll.errors import DetcollError, UsageError
from detcoll.measure import step
from detcoll.testing.device import StrictDevice
from detcoll.workloads.arrays import Arrays, CupyArrays, HostArrays, TorchArrays, cupy_lacks, torch_lacks

HOST, TORCH, CUPY, DOUBLE, GLOO = "host", "torch", "cupy", "double", "gloo"
RATE, LAYERS, BUCKET_MB = 0.05, 8, 1
ITERATION_S, WARMUP = 0.5, 2
TRIED_BATCH, BATCH_STEP = 4096, 1024
MOST_OF_MEMORY, KEPT = 0.3, 3 * LAYERS
"""How much of the free memory of the device a rank may use, and how many tensors of activations it keeps, at most."""
CALLS_OF_MEMORY = 2


@dataclass(frozen=True, slots=True)
class Task:
    """What ranks are told.

    ``library`` : whose arrays are timed in turns with the host's, and with Gloo on tensors of torch if ``beside_gloo``.
    ``sizes`` and ``calls`` : bytes, and how many calls of them a round.  ``train_on`` : a device of torch to train on,
    instead of all that; ``width`` of the model; ``batch`` : examples in an iteration, 0 for as many as take some
    `ITERATION_S`.
    """

    folder: str
    library: str = DOUBLE
    beside_gloo: bool = False
    sizes: tuple[int, ...] = ()
    calls: tuple[int, ...] = ()
    rounds: int = 1
    train_on: str | None = None
    width: int = 1024
    batch: int = 0
    steps: int = 12
    timeout_s: float = 30

    def write(self) -> Path:
        """Write the task to its folder, and return the file."""
        path = Path(self.folder) / "task.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


class DoubleArrays(Arrays):
    """Arrays of the strict double of CUDA, on which the whole program can be tried without a device."""

    device = "double"

    def __init__(self) -> None:
        self._strict = StrictDevice()
        self._strict.seeded(1)
        cuda._driver = self._strict  # type: ignore[assignment]

    def array(self, host: NDArray[Any]) -> Any:
        return self._strict.array(host)

    def upload(self, host: NDArray[Any], array: Any) -> None:
        self._strict.poke(array, host)

    def download(self, array: Any, host: NDArray[Any]) -> None:
        host[:] = self._strict.peek(array)

    def settle(self) -> None: ...


class GlooCase(Case):
    """The same all-reduce by Gloo, on the same tensors."""

    def call(self) -> None:
        import torch.distributed as dist

        dist.all_reduce(self.array)
        self.arrays.settle()


MAKERS: dict[str, Callable[[], Arrays]] = {
    TORCH: lambda: TorchArrays(0), CUPY: lambda: CupyArrays(0), DOUBLE: DoubleArrays,
}  # fmt: skip


def compare(task: Task) -> None:
    """Time all ways in turns; rank 0 writes what they took."""
    comm = detcoll.init(timeout=task.timeout_s)
    arrays: dict[str, Arrays] = {HOST: HostArrays(), task.library: MAKERS[task.library]()}
    memory, rows = _memory(comm, task, arrays[task.library]), []
    if task.beside_gloo:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", init_method=f"file://{task.folder}/gloo", rank=comm.rank, world_size=comm.size,
            timeout=timedelta(seconds=task.timeout_s),
        )  # fmt: skip
        arrays[GLOO] = arrays.get(TORCH) or TorchArrays(0)
    start = Starter(comm)
    for nbytes, calls in zip(task.sizes, task.calls, strict=True):
        sweep = Sweep(("all_reduce",), (nbytes,), "float32", calls, 1)
        cases = {
            way: (GlooCase if way == GLOO else Case)(comm, "all_reduce", nbytes, sweep, own)
            for way, own in arrays.items()
        }
        for number in range(task.rounds):
            ways = list(cases)
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                samples_s, began_ns = _timed(comm, start, cases[way], calls)
                rows.append(
                    {"way": way, "bytes": nbytes, "round": number, "samples_s": samples_s, "began_ns": began_ns}
                )
    if comm.rank == 0:
        (Path(task.folder) / "rows.json").write_text(json.dumps({"rows": rows, "memory": memory}), encoding="utf-8")
    comm.barrier()
    if task.beside_gloo:
        dist.destroy_process_group()
    detcoll.finalize()


def _timed(comm: Any, start: Starter, case: Case, calls: int) -> tuple[list[float], list[int]]:
    """Return the times of calls after one that does not count, and when each began; every result is checked."""
    entered, left = np.zeros(calls + 1, np.int64), np.zeros(calls + 1, np.int64)
    for number in range(calls + 1):
        case.prepare()
        start()
        entered[number] = time.monotonic_ns()
        case.call()
        left[number] = time.monotonic_ns()
        case.verify()
    times = combine(comm, start.kind, entered[1:], left[1:])
    return list(times.calls_s), list(times.began_ns)


def _memory(comm: Any, task: Task, arrays: Arrays) -> dict[str, int | None]:
    """Return what the first calls of the largest size take beyond their arrays, of the ranks together or the greatest.

    What is not told is None: free memory by the double, and pinned memory by communicators that do not count it.
    """
    case = Case(comm, "all_reduce", max(task.sizes), Sweep(("all_reduce",), task.sizes, "float32", 1, 0), arrays)
    case.prepare()
    comm.barrier()
    before = _free_bytes(task.library)
    comm.barrier()
    for _ in range(CALLS_OF_MEMORY):
        case.prepare()
        case.call()
        case.verify()
    comm.barrier()
    after, found = _free_bytes(task.library), dict[str, int | None]()
    comm.barrier()
    found["device_bytes"] = None if before is None or after is None else max(before - after, 0)
    for name in ("pinned_bytes", "unpinned_bytes"):
        most = np.array([comm.counters().get(name, -1)], np.int64)
        comm.all_reduce(most, op="max")
        found[name] = int(most[0]) if most[0] >= 0 else None
    return found


def _free_bytes(library: str) -> int | None:
    if library == TORCH:
        import torch

        return int(torch.cuda.mem_get_info(0)[0])
    if library == CUPY:
        import cupy

        return int(cupy.cuda.runtime.memGetInfo()[0])
    return None


class Refused(Exception):
    """The process group does not take tensors of this device."""


def train(task: Task) -> None:
    """Train a model by DDP, and write a digest of its parameters."""
    import torch
    import torch.distributed as dist
    from torch.nn import Linear, ReLU, Sequential
    from torch.nn.parallel import DistributedDataParallel

    if not entry_points(group="torch.backends", name="detcoll"):
        raise Refused("torch does not find detcoll; install it, instead of naming its folder in PYTHONPATH")
    torch.manual_seed(1)
    dist.init_process_group("detcoll", timeout=timedelta(seconds=task.timeout_s))
    try:
        dist.all_reduce(torch.ones(4, device=task.train_on))
    except UsageError as error:
        raise Refused(str(error)) from error
    layers = [layer for _ in range(LAYERS) for layer in (Linear(task.width, task.width), ReLU())]
    model = DistributedDataParallel(Sequential(*layers).to(task.train_on), bucket_cap_mb=BUCKET_MB)
    batch = task.batch or _fitting_batch(model, task)
    (Path(task.folder) / "batch.txt").write_text(str(batch), encoding="ascii")
    examples = torch.Generator(task.train_on).manual_seed(2 + dist.get_rank())
    for number in range(WARMUP + task.steps):
        if number == WARMUP:
            step()
        _pass(model, torch.randn(batch, task.width, generator=examples, device=task.train_on))
        with torch.no_grad():  # an optimizer would import the compiler of torch, which takes seconds
            for each in model.parameters():
                each -= RATE * each.grad
        _settle(task)
        if number >= WARMUP:
            step()
    held = b"".join(each.detach().cpu().numpy().tobytes() for each in model.parameters())
    path = Path(task.folder) / f"digest{dist.get_rank()}.txt"
    path.write_text(hashlib.sha256(held).hexdigest(), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()


def _pass(model: Any, examples: Any) -> None:
    """Compute the gradients of one iteration."""
    model.zero_grad()
    model(examples).square().mean().backward()


def _settle(task: Task) -> None:
    """Return when the device has done what was queued on it."""
    import torch

    if task.train_on == "cuda":
        torch.cuda.synchronize()


def _fitting_batch(model: Any, task: Task) -> int:
    """Return how many examples let an iteration take `ITERATION_S` beside the other ranks, as far as memory goes."""
    import torch
    import torch.distributed as dist

    examples = torch.ones(TRIED_BATCH, task.width, device=task.train_on)
    took_s = 0.0
    with model.no_sync():
        for _ in range(3):
            began_s = time.monotonic()
            _pass(model, examples)
            _settle(task)
            took_s = time.monotonic() - began_s
    fits = MOST_OF_MEMORY * torch.cuda.mem_get_info()[0] / (4 * task.width * KEPT)
    found = torch.tensor([min(ITERATION_S / took_s * TRIED_BATCH, fits)])
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return max(1, int(found) // BATCH_STEP) * BATCH_STEP


def facts() -> dict[str, Any]:
    """Return what of CUDA is here; None for what is not, and why arrays cannot be made."""
    found: dict[str, Any] = {"torch_lacks": torch_lacks(), "cupy_lacks": cupy_lacks(), "card": _card()}
    try:
        found["driver_cuda"] = ".".join(map(str, driver().version()))
    except DetcollError as error:
        found["driver_cuda"], found["driver_lacks"] = None, str(error)
    if found["torch_lacks"] is None:
        import torch

        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
        found |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl))}
    if found["cupy_lacks"] is None:
        import cupy

        found["cupy"] = cupy.__version__
    return found


def _card() -> str | None:
    """Return name, driver, memory and MIG mode of the devices, as nvidia-smi tells them."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = "--query-gpu=name,driver_version,memory.total,mig.mode.current"
    argv = [command, asked, "--format=csv,noheader"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    return "; ".join(done.stdout.split("\n")).strip("; ") or None


def main() -> None:
    """Do what the file says; what fails is written for the process that started this one."""
    if sys.argv[1] == "facts":
        print(json.dumps(facts()))
        return
    told = json.loads(Path(sys.argv[1]).read_bytes())
    task = Task(**told | {"sizes": tuple(told["sizes"]), "calls": tuple(told["calls"])})
    try:
        (compare if task.train_on is None else train)(task)
    except Exception as error:
        name = "refused.txt" if isinstance(error, Refused) else "failed.txt"
        with (Path(task.folder) / name).open("a", encoding="utf-8") as file:
            file.write(f"{error}\n" if isinstance(error, Refused) else f"{type(error).__name__}: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
