"""Times steps of PyTorch training over the process groups of detcoll and of Gloo, in turns, on the same processes.

    python benchmarks/torch_ddp.py --json torch_ddp.json

The model is a transformer of 25 million parameters (``--layers``, ``--width``) that reads few tokens, so communication
decides. The cases, or those whose names contain ``--only``:

- ``one host``: DDP, 2 ranks. detcoll goes through shared memory there.
- ``DDP, wide area``: 2 sites of a rank, and of 2 ranks, in the lab: lines of ``--rate``, ``--round-trip`` there and
  back.
- ``HSDP``: 2 sites of 2 ranks in the lab; parameters are sharded inside a site and replicated across sites, and both
  dimensions of the mesh are groups of the backend that the row names.

``tcp`` is detcoll with the same plans over plain TCP connections, without slots or pacing (DETCOLL_TRANSPORT=tcp).
``none`` is the step of one rank alone, without communication: what a row takes beyond it is the cost of that.

In each round every row of a case makes its groups and its model anew, takes ``--warmup`` steps, and then the
steps that count; the order changes from round to round. A step lasts from the last rank's end of the step before to the
last rank's end of it. "Speed" is Gloo's median over the row's in the same round; the median over rounds is printed with
the least and the greatest. After every round, losses must agree with Gloo's. Needs Linux for the lab, and
``pip install -e ".[torch,measure]"``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from detcoll.emulation.lab import Conditions, Lab, obtain
from detcoll.launch.processes import ended_by_signals
from detcoll.marks import Marks
from detcoll.measure.aggregate import Setting, marked_times_s
from detcoll.measure.host import host_facts
from detcoll.measure.load import Load, Watch, load_of
from detcoll.measure.results import SINGLE_CLUSTER, WIDE_AREA
from detcoll.measure.runner import Runner
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s
from detcoll.topology import Topology

SCHEMA = "detcoll.torch-ddp/1"
NONE, GLOO, DETCOLL, TCP = "none", "gloo", "detcoll", "tcp"
HEADS, TOKEN_KINDS = 8, 256
RATE = 0.05
TOLERANCE = 1e-3
"""Losses of two backends may differ by this part, since they add in another order."""
TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True, slots=True)
class Case:
    """Ranks, and what they train.

    ``is_wide`` : in the lab, each site apart.  ``is_sharded`` : HSDP instead of DDP.
    """

    name: str
    sites: int
    ranks_per_site: int
    is_wide: bool
    is_sharded: bool
    rows: tuple[str, ...]
    rounds: int
    steps: int

    def topology(self, rate: str, round_trip: str) -> Topology:
        """Return the ranks and, in the lab, their lines."""
        if not self.is_wide:
            return Topology.single_site(self.ranks_per_site)
        one_way_ns = parse_duration_ns(round_trip, "round_trip") // 2
        return Topology.uniform(self.sites, self.ranks_per_site, parse_rate_bytes_per_s(rate, "rate"), one_way_ns)


CASES = (
    Case("DDP, one host, 2 ranks", 1, 2, False, False, (NONE, GLOO, DETCOLL), 16, 4),
    Case("DDP, wide area, 2 x 1 ranks", 2, 1, True, False, (NONE, GLOO, DETCOLL, TCP), 5, 4),
    Case("DDP, wide area, 2 x 2 ranks", 2, 2, True, False, (NONE, GLOO, DETCOLL, TCP), 5, 4),
    Case("HSDP, wide area, 2 x 2 ranks", 2, 2, True, True, (NONE, GLOO, DETCOLL, TCP), 5, 4),
)


@dataclass(frozen=True, slots=True)
class Task:
    """What ranks are told."""

    rows: tuple[str, ...]
    sites: int
    is_sharded: bool
    steps: int
    warmup: int
    rounds: int
    layers: int
    width: int
    tokens: int
    folder: str


# What a rank does. torch is imported there alone: the process that starts the ranks has no use for it.


def rank_main(task: Task) -> None:
    """Run all rows in all rounds on this rank, and write what they took."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, found = dist.get_rank(), []
    for number in range(task.rounds):
        turn = number % len(task.rows)
        for row in task.rows[turn:] + task.rows[:turn]:
            dist.barrier()
            found.append({"row": row, "round": number} | timed(task, row))
    (Path(task.folder) / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def timed(task: Task, row: str) -> dict[str, Any]:
    """Return when each step of a row ended, its last loss, and the processor time of a step."""
    import torch
    import torch.distributed as dist

    tokens = torch.Generator().manual_seed(1 + dist.get_rank())
    with trained(task, row) as model:
        optimizer, marks_ns = torch.optim.SGD(model.parameters(), lr=RATE), []
        for number in range(task.warmup + task.steps):
            if number == task.warmup:
                marks_ns.append(time.monotonic_ns())
                began_s = time.process_time()
            given = torch.randint(TOKEN_KINDS, (1, task.tokens + 1), generator=tokens)
            loss = torch.nn.functional.cross_entropy(model(given[:, :-1])[0], given[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            marks_ns.append(time.monotonic_ns()) if number >= task.warmup else None
        # DDP goes before its group: its destructor may wait for ever for a thread of Gloo that ends with the group.
        # torch may keep the first DDP in a cycle.
        del model
        gc.collect()
        return {"marks_ns": marks_ns, "loss": loss.item(), "cpu_s": (time.process_time() - began_s) / task.steps}


def made(task: Task) -> Any:
    """Return the model, with the same parameters on every call."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        task.width, HEADS, 4 * task.width, dropout=0.0, batch_first=True, norm_first=True
    )  # fmt: skip
    return torch.nn.Sequential(
        torch.nn.Embedding(TOKEN_KINDS, task.width),
        torch.nn.TransformerEncoder(layer, task.layers, enable_nested_tensor=False),
        torch.nn.Linear(task.width, TOKEN_KINDS),
    )


@contextmanager
def trained(task: Task, row: str) -> Iterator[Any]:
    """Give a model whose gradients are averaged as the row says; its groups end with the body."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if row == NONE:
        yield made(task)
        return
    group = new_group(row)
    if not task.is_sharded:
        yield DistributedDataParallel(made(task), process_group=group, gradient_as_bucket_view=True)
    else:
        with sharded(task, row) as model:
            yield model
    dist.barrier()
    dist.destroy_process_group(group)


def new_group(row: str) -> Any:
    """Make a group of all ranks."""
    import torch.distributed as dist

    if row == GLOO:
        return dist.new_group(backend=GLOO, timeout=TIMEOUT)
    from detcoll.torch import Options

    options = Options(transport=TCP if row == TCP else "auto")
    return dist.new_group(backend=DETCOLL, timeout=TIMEOUT, pg_options=options)


@contextmanager
def sharded(task: Task, row: str) -> Iterator[Any]:
    """Give the model sharded inside each site and replicated across them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("dp_replicate", "dp_shard")
    mesh = init_device_mesh(
        "cpu", (task.sites, dist.get_world_size() // task.sites), mesh_dim_names=names,
        backend_override=dict.fromkeys(names, GLOO if row == GLOO else DETCOLL),
    )  # fmt: skip
    model = made(task)
    for layer in model[1].layers:
        fully_shard(layer, mesh=mesh)
    yield fully_shard(model, mesh=mesh)
    dist.barrier()
    for name in names:
        dist.destroy_process_group(mesh.get_group(name))


# What the process that starts the ranks does.


def run(case: Case, given: argparse.Namespace) -> tuple[list[dict[str, Any]], Load]:
    """Run a case, and return what its ranks wrote, joined, and what the machine did meanwhile."""
    topology = case.topology(given.rate, given.round_trip)
    setting = Setting(case.name, "auto", WIDE_AREA if case.is_wide else SINGLE_CLUSTER)
    with tempfile.TemporaryDirectory(prefix="detcoll-torch-ddp-") as name, Watch() as watch:
        folder = Path(name)
        task = Task(
            case.rows, case.sites, case.is_sharded, given.steps or case.steps, given.warmup,
            given.rounds or case.rounds,
            given.layers, given.width, given.tokens, name,
        )  # fmt: skip
        (folder / "task.json").write_text(json.dumps(asdict(task)), encoding="utf-8")
        argv = [sys.executable, str(Path(__file__).resolve()), "--rank", str(folder / "task.json")]
        runner = Runner(topology, given.deadline)
        if case.is_wide:
            with Lab(topology, Conditions()) as lab:
                watch.router_pid = lab.router_pid
                runner.run(setting, argv, folder, None, lab)
        else:
            runner.run(setting, argv, folder)
        said = [json.loads((folder / f"rank{rank}.json").read_bytes()) for rank in range(topology.size)]
    return [joined(case, parts) for parts in zip(*said, strict=True)], load_of([watch.readings()], [None])


def joined(case: Case, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of a round, of what its ranks saw."""
    times_s = marked_times_s([Marks(rank, tuple(part["marks_ns"])) for rank, part in enumerate(parts)])
    return {
        "case": case.name, "row": parts[0]["row"], "round": parts[0]["round"], "step_s": times_s,
        "median_s": statistics.median(times_s), "cpu_s": sum(part["cpu_s"] for part in parts),
        "losses": [part["loss"] for part in parts],
    }  # fmt: skip


def require_equal(found: Sequence[dict[str, Any]]) -> None:
    """End the program if a backend trained something else than Gloo."""
    for one in found:
        for other in found:
            if (one["row"], other["round"]) == (GLOO, one["round"]) and other["row"] != NONE:
                pairs = zip(one["losses"], other["losses"], strict=True)
                if not all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in pairs):
                    sys.exit(f"{one['case']}: losses are {other['losses']} over {other['row']}, Gloo {one['losses']}")


def summary(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each row of a case."""
    base = {one["round"]: one["median_s"] for one in found if one["row"] == GLOO}
    lines = []
    for name in dict.fromkeys(one["row"] for one in found):
        own = [one for one in found if one["row"] == name]
        speeds = [base[one["round"]] / one["median_s"] for one in own]
        every_s = [step_s for one in own for step_s in one["step_s"]]
        lines.append({
            "case": own[0]["case"], "row": name, "steps": len(every_s), "median_s": statistics.median(every_s),
            "min_s": min(every_s), "max_s": max(every_s), "speed": statistics.median(speeds),
            "least_speed": min(speeds), "greatest_speed": max(speeds),
            "cpu_s": statistics.median(one["cpu_s"] for one in own),
        })  # fmt: skip
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as Markdown."""
    shown = [
        "| case | process group | steps | a step, median | least to greatest | speed / Gloo | by round | "
        "processor time, all ranks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shown += [
        f"| {line['case']} | {line['row']} | {line['steps']} | {line['median_s'] * 1e3:.0f} ms | "
        f"{line['min_s'] * 1e3:.0f} to {line['max_s'] * 1e3:.0f} | {line['speed']:.2f} | "
        f"{line['least_speed']:.2f} to {line['greatest_speed']:.2f} | {line['cpu_s'] * 1e3:.0f} ms |"
        for line in lines
    ]
    return "\n".join(shown)


def _said_of(case: Case, lines: Sequence[dict[str, Any]], load: Load) -> str:
    """Return what to know beside the rows of a case: the share of computing, and what else kept the machine busy."""
    median_s = {line["row"]: line["median_s"] for line in lines}
    said = f"{case.name}: a step without communication is {median_s[NONE] / median_s[GLOO]:.0%} of Gloo's"
    if load.others_share is not None:
        said += f"; other programs took {load.others_share:.0%} of the {load.cores} cores meanwhile"
    if load.router_share is not None:
        said += f", the lab's router {load.router_share:.0%} of one"
    return said


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this, such as HSDP")
    parser.add_argument("--rounds", type=int, help="of each row; by the case unless given")
    parser.add_argument("--steps", type=int, help="that count, of each row and round; by the case unless given")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16, help="that a rank reads in a step")
    parser.add_argument("--rate", default="1 Gbit/s")
    parser.add_argument("--round-trip", default="20 ms")
    parser.add_argument("--deadline", type=float, default=900, help="seconds that a case may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def parameters(given: argparse.Namespace) -> int:
    """Return how many parameters the model has."""
    layer = 12 * given.width**2 + 13 * given.width
    return int(given.layers * layer + 2 * TOKEN_KINDS * given.width + TOKEN_KINDS)


def main() -> None:
    """Measure, print the table, write the file."""
    given = _arguments()
    if given.rank is not None:
        task = json.loads(given.rank.read_bytes())
        rank_main(Task(**task | {"rows": tuple(task["rows"])}))
        return
    cases = [case for case in CASES if given.only in case.name]
    if not cases:
        sys.exit(f"--only {given.only!r} fits no case; there are: {'; '.join(case.name for case in CASES)}")
    if any(case.is_wide for case in cases) and (reason := obtain()) is not None:
        sys.exit(f"the lab cannot be opened: {reason}")
    rows, lines, notes = [], [], []
    with ended_by_signals():
        for case in cases:
            print(case.name, file=sys.stderr, flush=True)
            found, load = run(case, given)
            require_equal(found)
            own = summary(found)
            rows, lines, notes = rows + found, lines + own, [*notes, _said_of(case, own, load)]
    host = host_facts()
    print(table(lines))
    print("\n".join(notes))
    print(f"{parameters(given) / 1e6:.1f} million parameters, {given.tokens} tokens a rank and step")
    print(f"lines of {given.rate}, {given.round_trip} there and back, in the lab")
    print(", ".join(f"{name} {value}" for name, value in host.items() if value is not None))
    if given.json is not None:
        wrote = {"schema": SCHEMA, "host": host, "parameters": parameters(given), "lines": lines, "rows": rows}
        given.json.write_text(json.dumps(wrote, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
