"""Replicas of torchft, each a process: ``torchft_replicas.py BACKEND steady | fault``.

``steady``: two replicas train together from the first step to the last. ``fault``: one of them kills itself, the other
goes on alone, a new one takes its parameters from it, and both train on together.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from problem import STEPS, Model, batches, say, total
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.coordination import LighthouseServer

socket.gethostname = lambda: "localhost"  # torchft's servers of checkpoints shall be found without a name service

TIMEOUT = timedelta(seconds=30)
TOGETHER = 3
"""Steps that both replicas take before one dies, and again before they end."""


def group_of(backend: str) -> Any:
    if backend == "gloo":
        return ProcessGroupGloo(TIMEOUT)
    from detcoll.torch.torchft import ProcessGroupDetcoll

    return ProcessGroupDetcoll(TIMEOUT)


class Replica:
    """A model under a manager."""

    def __init__(self, backend: str, number: int, lighthouse: str, least: int) -> None:
        self.number, self.group = number, group_of(backend)
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        model = Model()
        inner = torch.optim.SGD(model.parameters(), lr=0.02)
        self.manager = Manager(
            self.group, lambda state: load(model, inner, state), lambda: saved(model, inner), min_replica_size=least,
            use_async_quorum=False, init_sync=False, timeout=TIMEOUT, rank=0, world_size=1, store_addr="localhost",
            store_port=self.store.port, lighthouse_addr=lighthouse, replica_id=f"replica{number}", hostname="localhost",
        )  # fmt: skip
        self.optimizer = Optimizer(self.manager, inner)
        self.plain = model
        self.model = DistributedDataParallel(self.manager, model) if least == 2 else model

    def step(self, batch: dict[str, torch.Tensor], dies: bool = False) -> float:
        """Train one step and return the loss; ``dies``: while the other replica counts on this one."""
        self.optimizer.zero_grad()
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = self.model(**batch)["loss"]
        loss.backward()
        if self.model is self.plain:  # torchft's DDP fails itself when a replica is lost
            for work in [self.manager.allreduce(parameter.grad) for parameter in self.plain.parameters()]:
                work.wait()
        self.optimizer.step()
        return float(loss.item())

    def end(self) -> None:
        self.manager.shutdown(wait=False)
        self.group.shutdown()


def saved(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def steady(replica: Replica) -> None:
    losses = [replica.step(batch) for batch in batches(replica.number, 2)]
    say(replica.number, [replica.group.getBackendName(), replica.manager.current_step(), losses, total(replica.plain)])


def faulty(replica: Replica, is_first: bool) -> None:
    """Train until one replica is lost and a new one has come; ``is_first``: this one is to be lost."""
    manager, alone, lost, together = replica.manager, 0, 0, 0
    data = list(batches(replica.number, 2))
    while together < TOGETHER or is_first or (replica.number == 0 and not lost):
        before = manager.current_step()
        replica.step(data[before % STEPS], dies=is_first and together == TOGETHER)
        count = manager.num_participants()
        if manager.current_step() == before:
            lost, together = lost + 1, 0
        elif count == 2:
            together += 1
        else:
            alone += 1
    went_on = replica.number == 1 or alone > 0
    name = replica.group.getBackendName()
    say(replica.number, [name, went_on, lost > 0, manager.current_step(), total(replica.plain)])


def main(backend: str, case: str) -> None:
    least = 2 if case == "steady" else 1
    lighthouse = LighthouseServer("[::]:0", least, join_timeout_ms=1000, heartbeat_timeout_ms=2000)
    address = f"http://localhost:{lighthouse.address().rpartition(':')[2]}"

    def start(number: int, role: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, __file__, backend, role, str(number), address])

    started = [start(0, case), start(1, "steady" if case == "steady" else "lost")]
    try:
        if case == "fault":
            started[1].wait()
            started.append(start(1, "fault"))
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
        lighthouse.shutdown()
    assert codes == ([0, 0] if case == "steady" else [0, -signal.SIGKILL, 0]), codes


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        backend, role, number, address = sys.argv[1:]
        torch.set_num_threads(1)
        replica = Replica(backend, int(number), address, 2 if role == "steady" else 1)
        if role == "steady":
            steady(replica)
        else:
            faulty(replica, role == "lost")
        replica.end()
