"""All-reduces that NCCL does inside sites, on a device: ``nccl_ranks.py CONTAINER CASES [costs] [ddp]`` on each rank.

All ranks share one device; NCCL lets them, since each says that it is another host. Each rank says what was right as
lines of JSON.
"""

import os
import sys
import time

os.environ["NCCL_HOSTID"] = f"host{os.environ['DETCOLL_RANK']}"
os.environ["NCCL_SOCKET_IFNAME"] = "lo"

import contextlib
import hashlib
import json
import random
import warnings
from typing import Any

import numpy as np

import detcoll
from detcoll.fold import reference
from detcoll.testing.values import plain_bits, varied
from detcoll.types import DTYPES, is_float, operators_of

warnings.filterwarnings("ignore")


def say(something: object) -> None:
    """Print one line of JSON, whole, whoever prints at the same time."""
    line = json.dumps({"rank": int(os.environ["DETCOLL_RANK"]), "said": something}, default=str)
    os.write(1, (line + "\n").encode())


class Torch:
    """Tensors of torch."""

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def stream(self) -> Any:
        return self.torch.cuda.stream(self.torch.cuda.Stream())

    def late(self, values: np.ndarray) -> Any:
        """Return an array whose values come late on the current stream."""
        held = self.torch.from_numpy(values.view(np.uint8)).cuda().view(getattr(self.torch, values.dtype.name))
        busy, made = self.torch.ones(2_000_000, device="cuda"), self.torch.zeros_like(held)
        for _ in range(20):
            busy = busy * 1.0 + 1.0
        return made.copy_(held)

    def values(self, array: Any) -> np.ndarray:
        return array.cpu().view(self.torch.uint8).numpy().view(DTYPES[str(array.dtype).removeprefix("torch.")])

    def free_bytes(self) -> int:
        self.torch.cuda.empty_cache()
        return self.torch.cuda.mem_get_info()[0]


class Cupy:
    """Arrays of CuPy, which have no bfloat16."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy

    def stream(self) -> Any:
        return self.cupy.cuda.Stream(non_blocking=True)

    def late(self, values: np.ndarray) -> Any:
        held, busy = self.cupy.asarray(values), self.cupy.ones(2_000_000, np.float32)
        made = self.cupy.zeros_like(held)
        for _ in range(20):
            busy = busy * 1.0 + 1.0
        made[...] = held
        return made

    def values(self, array: Any) -> np.ndarray:
        return self.cupy.asnumpy(array)

    def free_bytes(self) -> int:
        self.cupy.get_default_memory_pool().free_all_blocks()
        return self.cupy.cuda.runtime.memGetInfo()[0]


def drawn(comm: Any, cases: int, library: Torch | Cupy) -> None:
    """Make random calls, some at once, and hold each against NumPy, bit for bit: two ranks a site add once."""
    draw = random.Random(cases)
    sites = [site.ranks for site in comm.topology.sites]
    names = [name for name in DTYPES if name != "bfloat16" or isinstance(library, Torch)]
    names = [name for name in names if not name.startswith("uint") or name == "uint8"]  # torch has few operators
    pending: list[Any] = []

    def check() -> None:
        work, arrays, expected, what = pending.pop(0)
        work.wait(30)
        for array, values in zip(arrays, expected, strict=True):
            got = library.values(array)
            plain = plain_bits if is_float(got.dtype) else lambda each: each
            assert plain(got).tobytes() == plain(values).tobytes(), f"{what}: {got[:5]}, expected {values[:5]}"

    for case in range(cases):
        dtype = DTYPES[draw.choice(names)]
        op = draw.choice(sorted(operators_of(dtype), key=lambda each: each.value))
        sizes = [draw.choice([1, 2, 3, 1001, draw.randrange(400_000)]) for _ in range(draw.choice([1, 1, 3]))]
        given = [[varied(dtype, size, case, at, part) for part, size in enumerate(sizes)] for at in range(comm.size)]
        expected = [reference(op, [of[part] for of in given], sites, dtype) for part in range(len(sizes))]
        with library.stream() if draw.random() < 0.7 else contextlib.nullcontext():
            arrays = [library.late(each) for each in given[comm.rank]]
            work = comm.all_reduce(arrays if len(arrays) > 1 else arrays[0], op, async_op=True)
        pending.append((work, arrays, expected, f"case {case}, {op.value} of {dtype}, {sizes}"))
        while len(pending) > 3:
            check()
    while pending:
        check()
    say(f"{cases} cases")


def costs(comm: Any, library: Torch | Cupy) -> None:
    """Tell what 64 MiB take, in milliseconds and in memory; all ranks share the device, so the time says little."""
    x = library.late(np.ones(16 * 2**20, np.float32))
    comm.barrier()
    free, times = library.free_bytes(), []
    for _ in range(4):
        comm.barrier()
        began = time.perf_counter()
        comm.all_reduce(x, "sum")
        times.append(round((time.perf_counter() - began) * 1e3, 1))
    comm.barrier()
    used = (free - library.free_bytes()) / 2**20
    say({"ms": times, "MiB of the device for all ranks": used, "pinned MiB": comm.counters()["pinned_bytes"] / 2**20})


def trained() -> str:
    """Train with DDP, in several buckets; return the digest of the parameters."""
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.manual_seed(3)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("detcoll")
    rank = dist.get_rank()
    model = nn.Sequential(*[nn.Linear(301, 301) for _ in range(6)]).cuda()
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.5)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.01)
    for step in range(6):
        x = torch.full((17, 301), 0.01 * (rank + step + 1), device="cuda")
        optimizer.zero_grad()
        parallel(x).square().mean().backward()
        optimizer.step()
    held = b"".join(each.detach().cpu().numpy().tobytes() for each in model.parameters())
    dist.destroy_process_group()
    return hashlib.sha256(held).hexdigest()


def main(container: str, cases: int, *more: str) -> None:
    library, comm = Torch() if container == "torch" else Cupy(), detcoll.init()
    drawn(comm, cases, library)
    if "costs" in more:
        costs(comm, library)
    detcoll.finalize()
    if "ddp" in more:
        digests = []
        for is_on in "10":
            os.environ["DETCOLL_NCCL"] = is_on
            digests.append(trained())
        say("DDP has the same bits with NCCL and without" if len(set(digests)) == 1 else digests)


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
