"""Groups, how they begin and end, and what goes wrong: ``torch_groups.py NAME [ARGUMENT ...]`` on every rank."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch_ranks import begin, say

import detcoll
from detcoll.topology import Topology
from detcoll.torch import Options, communicator, jobs, process_group

FAR_S = 60.0


def total(group: Any = None) -> float:
    """Return the sum of one for each rank of a group."""
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    return float(x[0].item())


def error_of(call: Callable[[], Any]) -> Exception:
    """Return the error that a call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError(f"{call} raised nothing")


def shown(error: Exception) -> str:
    """Return what is printed of an error that nobody catches."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        sys.excepthook(type(error), error, error.__traceback__)
    return printed.getvalue()


def beginnings(folder: str) -> None:
    """Open the default group in every way that torch knows, again and again in one process."""
    rank, size = begin()
    assert total() == size
    refused = shown(error_of(lambda: communicator().all_reduce(1)))  # type: ignore[arg-type]
    assert (refused.count("\n"), "UsageError in " in refused) == (1, True), refused
    dist.destroy_process_group()
    for _ in range(2):
        begin(init_method="env://")
        assert total() == size
        sub = dist.new_group([0, 1])
        assert sub == dist.GroupMember.NON_GROUP_MEMBER or total(sub) == 2
        dist.destroy_process_group()
    for members in (size - 1, size):
        if rank < members:
            begin(init_method="env://", rank=rank, world_size=members)
            assert total() == members
            if members == size:
                a_forked_child_begins_anew(f"{folder}/child{rank}")
            dist.destroy_process_group()
    begin(init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    assert total() == size
    dist.destroy_process_group()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.FileStore(f"{folder}/store", size)
    begin(store=store, rank=rank, world_size=size, pg_options=Options(transport="tcp"))
    assert communicator().transport == "tcp"
    assert total() == size
    dist.destroy_process_group()
    begin(init_method=f"tcp://{address}:{port}", rank=rank, world_size=size)
    assert total() == size
    say(rank, "done")  # and end without destroying the group


def a_forked_child_begins_anew(file: str) -> None:
    """Let a child leave the groups that it has inherited, and open one of its own."""
    warnings.simplefilter("ignore", DeprecationWarning)  # there are threads
    child = os.fork()
    if not child:
        try:
            dist.destroy_process_group()
            begin(init_method=f"file://{file}", rank=0, world_size=1)
            assert total() == 1
            dist.destroy_process_group()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert total() == dist.get_world_size()


def groups() -> None:
    """Make groups in the ways that torch knows, and use several at once."""
    rank, size = begin()
    group = dist.group.WORLD
    assert (group.name(), group.rank(), group.size(), dist.get_backend()) == ("detcoll", rank, size, "detcoll")
    halves = [dist.new_group(ranks) for ranks in ([0, 2], [1])]
    assert [total(half) for half in halves if half != dist.GroupMember.NON_GROUP_MEMBER] == [2.0 - rank % 2]
    if rank != 1:
        local = dist.new_group([2, 0], use_local_synchronization=True)
        assert total(local) == 2
        assert dist.get_group_rank(local, 2) == 1
        reverse = dist.new_group([2, 0], use_local_synchronization=True, sort_ranks=False)
        whole = [torch.zeros(1), torch.zeros(1)]
        dist.all_gather(whole, torch.tensor([float(rank)]), group=reverse)
        assert [each.item() for each in whole] == [2.0, 0.0]
        dist.send(torch.tensor([rank]), 2 - rank, group=reverse, tag=3) if rank == 0 else None
        if rank == 2:
            found = torch.zeros(1, dtype=torch.int64)
            assert dist.recv(found, group=reverse, tag=3) == 0
        dist.destroy_process_group(local)
    dist.barrier()
    world = dist.new_group(list(range(size)))
    everyone = dist.new_subgroups(group_size=1)[0]
    assert (total(world), total(everyone)) == (size, 1)
    assert dist.get_process_group_ranks(world) == list(range(size))
    group.monitored_barrier(timedelta(seconds=FAR_S))
    assert communicator(world).size == size
    mesh = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("all",))
    assert total(mesh.get_group("all")) == size
    dist.destroy_process_group()
    beside_another_backend(size)
    say(rank, "done")


def beside_another_backend(size: int) -> None:
    """Open groups of detcoll where the default group is Gloo's: a job of some ranks, and a group of that job."""
    rank, _ = begin("gloo")
    pair = dist.new_group([0, 2], backend="detcoll")
    if rank != 1:
        assert total(pair) == 2
        assert communicator(pair).ranks == (0, 1)
    again = dist.new_group([0, 2], backend="detcoll")
    if rank != 1:
        assert total(again) == 2
        assert communicator(again)._job is communicator(pair)._job
    mesh = dist.init_device_mesh(
        "cpu", (1, size), mesh_dim_names=("replicate", "shard"), backend_override={"shard": "detcoll"}
    )
    assert total(mesh.get_group("shard")) == size
    assert dist.get_backend(mesh.get_group("shard")) == "detcoll"
    assert total() == size
    create = dist.Backend._plugins["DETCOLL"].creator_fn  # as torchft does, whose ranks are not those of torch
    apart = create(dist.PrefixStore("apart", dist.distributed_c10d._get_default_store()), (rank + 1) % size, size)
    values = [torch.zeros(1) for _ in range(size)]
    apart.allgather([values], [torch.tensor([float(rank)])]).wait()
    assert [each.item() for each in values] == [(number - 1) % size for number in range(size)]
    other = dist.new_group([0, 1], backend="detcoll")
    assert other == dist.GroupMember.NON_GROUP_MEMBER or total(other) == 2
    dist.barrier()  # an abort ends what other ranks are still in
    apart.abort()
    dist.destroy_process_group()


def in_a_job(folder: str) -> None:
    """Open groups in the job that the program opened before, which goes on when they end."""
    world = detcoll.init()
    rank, size = world.rank, world.size
    asked = Options(transport="tcp"), Options(reproducible=True), Options(topology=Topology.uniform(size, 1, 1e9, 0))
    for number, options in enumerate(asked):
        store = dist.FileStore(f"{folder}/asks{number}", size)
        error = error_of(lambda: begin(store=store, rank=rank, world_size=size, pg_options=options))  # noqa: B023
        assert isinstance(error, detcoll.errors.UsageError), error
        assert "the job of detcoll.init()" in str(error)
    for number, options in enumerate((None, Options(topology=Topology.single_site(size)))):
        store = dist.FileStore(f"{folder}/job{number}", size)
        begin(store=store, rank=size - 1 - rank, world_size=size, pg_options=options)  # in another order
        assert communicator()._job is world._job
        assert communicator().ranks == tuple(reversed(range(size)))
        pair = dist.new_group([0, 2])
        if pair != dist.GroupMember.NON_GROUP_MEMBER:
            assert total(pair) == 2
            assert (communicator(pair)._job, set(communicator(pair).ranks)) == (world._job, {0, 2})
        twice = dist.all_reduce(torch.ones(1), async_op=True).get_future().then(lambda ended: total())
        assert twice.wait() == size
        gathered = [torch.zeros(1) for _ in range(size)]
        dist.all_gather(gathered, torch.tensor([float(rank)]))
        assert [each.item() for each in gathered] == list(reversed(range(size)))
        dist.destroy_process_group()
        assert detcoll.all_gather_object(rank) == list(range(size))
        assert world._job.loop.ask(lambda now_ns: len(world._job.loop.engine.groups)) == 1, "a group is left over"
    begin("gloo", store=dist.FileStore(f"{folder}/beside", size), rank=rank, world_size=size)
    pair = dist.new_group([0, 2], backend="detcoll")
    again = dist.new_group([2, 0], backend="detcoll")
    if rank != 1:
        assert total(pair) == total(again) == 2
        assert communicator(pair)._job is communicator(again)._job is world._job
    dist.barrier()  # Gloo fails where a rank leaves before all others have connected to it
    dist.destroy_process_group()
    begin(store=dist.FileStore(f"{folder}/last", size), rank=rank, world_size=size)
    assert total() == size
    detcoll.finalize()
    dist.destroy_process_group()
    say(rank, "done")


def two_threads(calls: int) -> None:
    """Make small and large calls on two groups at once from two threads, and look for what is left of them."""
    rank, size = begin()
    other = dist.new_group(list(range(size)))
    trouble: list[BaseException] = []

    def work(group: Any, kind: int) -> None:
        try:
            for number in range(calls):
                x = torch.full((300_000 if number % 50 == kind else 5,), float(number % 7 + rank))
                pending = dist.all_reduce(x, group=group, async_op=number % 2 == 0)
                if pending is not None:
                    pending.wait()
                expected = (number % 7) * size + size * (size - 1) / 2
                assert x[0].item() == x[-1].item() == expected, (number, x, expected)
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=work, args=(group, kind)) for kind, group in enumerate((None, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if trouble:
        raise trouble[0]
    say(rank, {"threads": threading.active_count(), "open": len(os.listdir("/proc/self/fd"))})
    dist.destroy_process_group()


def others_called(rank: int) -> dict[str, Callable[[Any], Any]]:
    """Return calls of which the last rank makes another one than its peers, by name."""
    odd = rank == dist.get_world_size() - 1
    ones = torch.ones(4)
    return {
        "kind": lambda group: dist.broadcast(ones, 0, group=group) if odd else dist.all_reduce(ones, group=group),
        "size": lambda group: dist.all_reduce(torch.ones(5 if odd else 4), group=group),
        "shape": lambda group: dist.all_reduce(torch.ones((3, 2) if odd else (2, 3)), group=group),
        "shapes": lambda group: dist.all_reduce_coalesced(
            [ones, torch.ones((1, 6) if odd else (6, 1))], group=group
        ),
        "gathered": lambda group: dist.all_gather_into_tensor(
            torch.ones(6 * dist.get_world_size()), torch.ones(6 if odd else (2, 3)), group=group
        ),
        "dtype": lambda group: dist.all_reduce(torch.ones(4, dtype=torch.int32 if odd else torch.float32), group=group),
        "half": lambda group: dist.all_reduce(
            torch.ones(4, dtype=torch.float16 if odd else torch.bfloat16), group=group
        ),
        "bytes": lambda group: dist.broadcast(
            torch.ones(4).to(torch.float8_e4m3fn if odd else torch.float8_e5m2), 0, group=group
        ),
        "op": lambda group: dist.all_reduce(ones, dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM, group=group),
        "average": lambda group: dist.all_reduce(
            torch.ones(4, dtype=torch.int64), dist.ReduceOp.AVG if odd else dist.ReduceOp.SUM, group=group
        ),
        "root": lambda group: dist.reduce(ones, 1 if odd else 0, group=group),
        "async": lambda group: dist.all_reduce(torch.ones(5 if odd else 4), group=group, async_op=True).wait(),
        **{name: lambda group, odd_x=odd_x: mail(group, odd_x) for name, odd_x in (
            ("message", torch.ones(3)), ("message type", torch.ones(2, dtype=torch.int32)),
            ("long message", torch.ones(9999)),
        )},
        "list": lambda group: dist.all_gather([torch.ones(6 if odd else 4) for _ in range(dist.get_world_size())],
                                              torch.ones(6 if odd else 4), group=group),
        "split": lambda group: dist.all_to_all_single(
            torch.ones(6), torch.ones(6), [1, 2, 3] if odd else None, [2, 2, 2] if odd else None, group=group
        ),
    }  # fmt: skip


def mail(group: Any, x: torch.Tensor) -> None:
    """Let rank 0 send to the last rank, which receives into ``x`` and raises if that does not fit; others wait."""
    last = dist.get_world_size() - 1
    if dist.get_rank() == 0:
        dist.send(torch.ones(9998 if x.numel() == 9999 else 2), last, group=group)
    elif dist.get_rank() == last:
        dist.recv(x, 0, group=group)
    else:
        dist.barrier(group=group)


def mismatches() -> None:
    """Let the last rank call something else, each time in a group of its own; all ranks hear what both called."""
    rank, size = begin()
    heard = {}
    for name, call in others_called(rank).items():
        group = dist.new_group(list(range(size)))
        began = time.monotonic()
        error = error_of(lambda call=call, group=group: call(group))  # type: ignore[misc]
        heard[name] = (type(error).__name__, str(error), round(time.monotonic() - began, 2))
        still = jobs._standing_of(communicator(group))()
        assert still is None, f"{name}: nothing is under way in a group that has failed, {still}"
    refused = {
        "device": lambda: dist.all_reduce(torch.ones(1, device="meta")),
        "sparse": lambda: dist.all_reduce(torch.ones(2).to_sparse(), dist.ReduceOp.MAX),
        "expanded": lambda: dist.all_reduce(torch.ones(1).expand(4)),
        "float8": lambda: dist.all_reduce(torch.ones(4).to(torch.float8_e5m2)),
        "bool": lambda: dist.all_reduce(torch.ones(4, dtype=torch.bool), dist.ReduceOp.AVG),
        "list": lambda: dist.all_gather([torch.ones(1)], torch.ones(1)),
    }
    for name, refusal in refused.items():
        error = error_of(refusal)
        heard[name] = (type(error).__name__, str(error), 0.0)
    received = torch.full((3, 2) if rank else (2, 3), float(rank))
    dist.broadcast(received, 0)  # torch asks for as many elements, not for one shape
    assert received.count_nonzero() == 0
    assert total() == size  # what was refused ended that call alone
    error = error_of(lambda: dist.all_reduce(torch.ones(4).expand(2, 4) if rank else torch.ones(8)))
    heard["one rank"] = (type(error).__name__, str(error), 0.0)
    say(rank, heard)
    dist.destroy_process_group()


def lost() -> None:
    """Kill the last rank in the middle of everything, and tell what the others get for each call."""
    rank, size = begin()
    other = dist.new_group(list(range(size)))
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    for _ in range(3):  # DDP makes its buckets anew after the first pass
        model(torch.ones(2, 4)).sum().backward()
    total(other)
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    work = dist.all_reduce(torch.ones(1), group=other, async_op=True)
    after = work.get_future().then(lambda future: future.wait())
    calls: dict[str, Callable[[], Any]] = {
        "backward": lambda: model(torch.ones(2, 4)).sum().backward(),
        "work": work.wait, "future": work.get_future().wait, "callback": after.wait,
        "later": lambda: total(other),
    }  # fmt: skip
    heard = {name: (type(error).__name__, str(error)) for name, call in calls.items() if (error := error_of(call))}
    assert work.is_completed()
    assert not work.is_success()
    assert str(work.exception()) == heard["work"][1]
    say(rank, heard)
    process_group.CLOSING_S = 0.5  # a lost rank makes no progress
    dist.destroy_process_group()


def slow_ends() -> None:
    """Destroy a group whose calls take some seconds, though calls that make no progress are given less."""
    given, process_group.CLOSING_S = process_group.CLOSING_S, 1.0
    rank, size = begin(pg_options=Options(topology=Topology.uniform(3, 1, 2e6, 1_000_000)))
    x, y = torch.ones(500_000), torch.ones(1000)
    works = [dist.all_reduce(x, async_op=True), dist.all_reduce(y, async_op=True)]
    dist.destroy_process_group()
    process_group.CLOSING_S = given
    for work in works:
        work.wait()
    assert x.eq(size).all()
    assert y.eq(size).all()
    say(rank, "done")


def timeouts() -> None:
    """Wait too short for a call that another rank makes late, and then long enough."""
    rank, _ = begin()
    if rank:
        dist.recv(torch.zeros(1), 0)
        dist.all_reduce(torch.ones(1))
    else:
        work = dist.all_reduce(torch.ones(1), async_op=True)
        error = error_of(lambda: work.wait(timedelta(milliseconds=50)))
        assert isinstance(error, detcoll.errors.DeadlineMissed), error
        for rank_told in range(1, dist.get_world_size()):
            dist.send(torch.zeros(1), rank_told)
        work.wait()
    dist.barrier(timeout=timedelta(seconds=FAR_S))
    dist.destroy_process_group()
    say(rank, "done")


def works(folder: str, calls: str) -> None:
    """Do one after another what ends well."""
    in_a_job(folder)
    slow_ends()
    groups()
    two_threads(int(calls))
    timeouts()
    beginnings(folder)


PROGRAMS: dict[str, Callable[..., None]] = {
    "beginnings": beginnings, "in_a_job": in_a_job, "groups": groups, "slow_ends": slow_ends,
    "two_threads": lambda calls: two_threads(int(calls)),
    "mismatches": mismatches, "lost": lost, "timeouts": timeouts, "works": works,
}  # fmt: skip

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
