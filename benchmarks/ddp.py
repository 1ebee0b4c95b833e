"""Compares DDP over Gloo with DDP over detcoll, step by step in turns, on the same processes.

    detcoll run -n 2 python benchmarks/ddp.py --json ddp.json

Any launcher that torch knows will do. Each backend has a copy of one model, of ``--layers`` square layers of
``--width`` (25 million parameters by default), and both are trained on the same values. ``none`` is a step without
averages and optimizer. In each of ``--rounds`` all three make ``--steps`` steps, in an order that changes. What is told
are medians over rounds of the time of a step on the slowest rank, and of the processor time that rank 0 spends on it.
In the end the parameters over both backends are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from detcoll.measure.host import host_facts

SCHEMA = "detcoll.ddp/1"
NONE = "none"
BATCH = 4

Step = Callable[[], None]


def made(layers: int, width: int) -> torch.nn.Module:
    """Return the model, with the same parameters on every call."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))


def step_of(model: DistributedDataParallel, x: torch.Tensor, *, averages: bool) -> Step:
    """Return what trains a model for one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        with contextlib.nullcontext() if averages else model.no_sync():
            model(x).square().mean().backward()
        if averages:
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def took_s(step: Step, steps: int) -> tuple[float, float]:
    """Return the time of a step on the slowest rank, and this rank's processor time."""
    dist.barrier()
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    longest = torch.tensor([(time.perf_counter() - begun_s) / steps], dtype=torch.float64)
    spent_s = (time.process_time() - cpu_s) / steps
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest.item()), spent_s


def measure(steps_of: dict[str, Step], rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Return what `took_s` does in each round, by backend; the first round does not count."""
    names, times = list(steps_of), {name: list[tuple[float, float]]() for name in steps_of}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found = took_s(steps_of[name], steps)
            if number:
                times[name].append(found)
    return times


def main() -> None:
    """Measure; rank 0 prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    dist.init_process_group("gloo")
    rank, groups = dist.get_rank(), {"gloo": None, "detcoll": dist.new_group(backend="detcoll")}
    x = torch.randn(BATCH, given.width, generator=torch.Generator().manual_seed(rank))
    models: dict[str, Any] = {
        name: DistributedDataParallel(made(given.layers, given.width), process_group=group)
        for name, group in groups.items()
    }
    steps_of = {name: step_of(model, x, averages=True) for name, model in models.items()}
    idle = DistributedDataParallel(made(given.layers, given.width))
    times = measure(steps_of | {NONE: step_of(idle, x, averages=False)}, given.rounds, given.steps)
    ends = [torch.cat([each.detach().reshape(-1) for each in model.parameters()]) for model in models.values()]
    if not torch.allclose(*ends, rtol=1e-4, atol=1e-6):
        raise SystemExit(f"parameters differ by {(ends[0] - ends[1]).abs().max().item()}")
    ratio = statistics.median(
        own / gloo for (gloo, _), (own, _) in zip(times["gloo"], times["detcoll"], strict=True)
    )  # fmt: skip
    if rank == 0:
        print(f"{ends[0].numel() / 1e6:.1f} M parameters, {dist.get_world_size()} ranks")
        for name, found in times.items():
            step_ms, cpu_ms = (1e3 * statistics.median(column) for column in zip(*found, strict=True))
            print(f"{name:>8}: a step takes {step_ms:7.1f} ms, and {cpu_ms:7.1f} ms of processor time")
        print(f"detcoll takes {ratio:.2f} times as long as gloo (median over {given.rounds} rounds)")
        if given.json:
            facts = {"schema": SCHEMA, "host": host_facts(), "torch": torch.__version__,
                     "ranks": dist.get_world_size(), "parameters": ends[0].numel(), "step_and_cpu_s": times,
                     "detcoll_by_gloo": ratio}  # fmt: skip
            given.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
