"""Futures and callbacks: ``torch_callbacks.py STEPS`` on every rank."""

from __future__ import annotations

import sys
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power
from torch.nn.parallel import DistributedDataParallel
from torch_ranks import begin, say

from detcoll.errors import Closed, DeadlineMissed, PlanMismatch

TIMEOUT_S = 60.0


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has the same bits on all ranks."""
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor)
    return all(torch.equal(other, tensor) for other in others)


def model_of_four_buckets(rank: int, hook: Any = None, state: Any = None) -> DistributedDataParallel:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(48, 48, bias=index % 2 == 0) for index in range(8)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=4 * 48 * 48 * 2 / 2**20)
    if hook is not None:
        model.register_comm_hook(state, hook)
    return model


def train(model: DistributedDataParallel, rank: int, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        x = torch.randn(4, 48, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def power_sgd(rank: int, steps: int) -> None:
    """Train with a hook whose callbacks make collectives, one chain for each bucket."""
    state = power.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    buckets = set()

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are text
        buckets.add(bucket.index())
        return power.powerSGD_hook(state, bucket)

    end = train(model_of_four_buckets(rank, hook, state), rank, steps)
    assert len(buckets) >= 4, buckets
    assert torch.isfinite(end).all()
    assert same_everywhere(end)


def halved(state, bucket):  # type: ignore[no-untyped-def]
    """Do what torch's hook does, which torch refuses by its name where there is no CUDA."""
    return default_hooks.bf16_compress_hook(state, bucket)


def compression(rank: int) -> None:
    for hook in (halved, default_hooks.fp16_compress_hook, default_hooks.allreduce_hook):
        assert same_everywhere(train(model_of_four_buckets(rank, hook), rank, 3))
    assert same_everywhere(train(model_of_four_buckets(rank), rank, 3))


def callbacks_beside_the_program(rank: int, size: int) -> None:
    """Make the same calls in callbacks and beside them, in an order that differs between ranks."""
    inside = [torch.full((5,), float(10 * number + rank)) for number in range(12)]
    outside = [torch.full((5,), float(1000 + number)) for number in range(12)]

    def sum_inside(number: int) -> Any:
        def callback(future: Any) -> list[torch.Tensor]:
            assert future.value()[0].item() == size
            dist.all_reduce(inside[number])
            twice = dist.all_reduce(inside[number], async_op=True).get_future()
            return twice.then(lambda ended: [ended.value()[0] + 1]).wait()  # type: ignore[no-any-return]

        return callback

    ends = []
    for number in range(12):
        work = dist.all_reduce(torch.ones(1), async_op=True)
        if (rank + number) % 3 == 0:
            work.wait()  # so the callback is added after the call has ended
        future = work.get_future().then(sum_inside(number))
        if (rank + number) % 2 == 0:
            future.wait()  # so the callback's calls come before the next one of this thread
        dist.all_reduce(outside[number])
        ends.append(future)
    for number, future in enumerate(ends):
        expected = (10 * number * size + size * (size - 1) / 2) * size + 1
        assert future.wait()[0].tolist() == [expected] * 5, (number, future.value(), expected)
        assert outside[number].tolist() == [(1000.0 + number) * size] * 5


def turns(rank: int, size: int) -> None:
    """Let a callback of the ninth call come before that of the first one, on one rank alone."""
    later = threading.Event()
    first, ninth = torch.ones(2), torch.full((2,), 5.0)

    def late(_: Any) -> None:
        if rank == 0:
            assert later.wait(TIMEOUT_S)
            for _ in range(300):  # time for the ninth to go ahead
                torch.ones(10_000).sum()
        dist.all_reduce(first)

    def early(_: Any) -> None:
        later.set()
        dist.all_reduce(ninth)

    ends = [dist.all_reduce(torch.ones(1), async_op=True).get_future().then(late)]
    for _ in range(7):
        dist.all_reduce(torch.ones(1))
    ends.append(dist.all_reduce(torch.ones(1), async_op=True).get_future().then(early))
    for end in ends:
        end.wait()
    assert first.tolist() == [size] * 2
    assert ninth.tolist() == [5.0 * size] * 2


def branches(rank: int, size: int) -> None:
    """Add several callbacks to one future, each with calls of its own."""
    work = dist.all_reduce(torch.ones(1), async_op=True)
    if rank == 0:
        work.wait()
    future, outs = work.get_future(), [torch.full((3,), float(number)) for number in range(3)]

    def reduce(number: int) -> Any:
        return lambda _: [dist.all_reduce(outs[number], async_op=number == 1), outs[number]][1]

    ends = [future.then(reduce(number)) for number in range(3)]
    ends.append(ends[0].then(lambda ended: dist.all_reduce(ended.value())))
    for end in ends:
        end.wait()
    dist.barrier()
    assert outs[2].tolist() == [2.0 * size] * 3
    assert outs[0].tolist() == [0.0] * 3


def added_in_reverse(rank: int, size: int) -> None:
    """Add callbacks in another order than calls, on one rank each after the one before has returned."""
    all_added = threading.Event()

    def callback(ended: Any) -> torch.Tensor:
        assert rank == 0 or all_added.wait(TIMEOUT_S)
        x = ended.value()[0] if isinstance(ended.value(), list) else ended.value()
        dist.all_reduce(x)
        return x  # type: ignore[no-any-return]

    works, ends = [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(10)], []
    for number, work in enumerate(reversed(works)):
        ends.append((work.get_future() if number < 9 else ends[0]).then(callback))
        if rank == 0:
            ends[-1].wait()
    all_added.set()
    assert [end.wait().item() for end in ends[1:]] == [size**2] * 8 + [size**3]


def swapped(rank: int, size: int) -> None:
    """Add callbacks to two calls in an order that differs between ranks, as two threads could: no wrong values."""
    group = dist.new_group(list(range(size)))
    works = [dist.all_reduce(torch.ones(1), group=group, async_op=True) for _ in range(2)]
    ends = [
        works[number].get_future().then(lambda _, number=number: dist.all_reduce(torch.ones(1) + number, group=group))
        for number in ((0, 1) if rank else (1, 0))
    ]
    for end in ends:
        with pytest.raises((PlanMismatch, Closed)):
            end.wait()
    dist.barrier()
    dist.destroy_process_group(group)


def a_group_with_lanes_is_closed(rank: int, size: int) -> None:
    """Close a group whose callbacks have made lanes, before the job ends."""
    group = dist.new_group(list(range(size)))
    x = torch.ones(1)
    end = dist.all_reduce(torch.ones(1), group=group, async_op=True).get_future()
    again = end.then(lambda _: dist.all_reduce(x, group=group))
    again.wait()
    assert x.item() == size
    group.set_timeout(timedelta(milliseconds=100))
    if rank == 0:
        with pytest.raises(DeadlineMissed):
            again.then(lambda _: dist.all_reduce(x, group=group)).wait()
    dist.barrier()
    dist.destroy_process_group(group)


def blocked_callbacks(rank: int) -> None:
    """Block many callbacks; others complete all the same, and errors arrive where they belong."""
    release = threading.Event()
    blocked = [
        dist.all_reduce(torch.ones(1), async_op=True).get_future().then(lambda _: release.wait(TIMEOUT_S))
        for _ in range(20)
    ]
    free = dist.all_reduce(torch.ones(1), async_op=True).get_future().then(lambda ended: ended.value()[0].item())
    assert free.wait() == dist.get_world_size()
    release.set()
    assert all(each.wait() for each in blocked)

    def fail(_: Any) -> None:
        raise KeyError("mine")

    failed = free.then(fail)
    handled = failed.then(lambda future: str(future))
    with pytest.raises(KeyError, match="mine"):
        failed.wait()
    handled.wait()
    ended = free.then(lambda _: sys.exit(3))
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        ended.wait()
    done = threading.Event()
    free.add_done_callback(lambda _: sys.exit("ends its thread alone"))
    free.add_done_callback(lambda _: done.set())
    assert done.wait(TIMEOUT_S)
    collected = torch.futures.collect_all([free, handled]).wait()
    assert collected[0].value() == dist.get_world_size()


def main(steps: int) -> None:
    rank, size = begin()
    power_sgd(rank, steps)
    compression(rank)
    callbacks_beside_the_program(rank, size)
    turns(rank, size)
    branches(rank, size)
    added_in_reverse(rank, size)
    dist.all_reduce(torch.ones(1), async_op=True).get_future().then(lambda _: added_in_reverse(rank, size)).wait()
    swapped(rank, size)
    a_group_with_lanes_is_closed(rank, size)
    blocked_callbacks(rank)
    say(rank, "done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
