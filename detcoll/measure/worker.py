"""One rank of one setting: ``python -m detcoll.measure.worker CONFIG.json``, started by `detcoll measure`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Protocol

import detcoll
from detcoll.measure.kernel import network_counts
from detcoll.measure.records import RankRecord, WorkerConfig, read_config, write_json
from detcoll.workloads.arrays import CPU, Arrays, HostArrays, arrays_of
from detcoll.workloads.buckets import Collectives
from detcoll.workloads.digits import PARAMETERS, Digits
from detcoll.workloads.synthetic import Synthetic
from detcoll.workloads.workload import Stamps, WorkloadSpec


class Workload(Protocol):
    """What is run in every setting."""

    losses: list[float]

    def iterate(self, index: int) -> Stamps:
        """Run iteration ``index``."""

    def rehearse(self) -> None:
        """Run an iteration that leaves no trace in the result."""

    def verify(self) -> None:
        """Raise if the last result is wrong."""

    def digest(self) -> str:
        """Return a digest of the result."""

    def accuracy(self) -> float | None:
        """Return how good the result is, where that means something."""

    def save(self, path: Path) -> None:
        """Write the state to go on from."""

    def resume(self, path: Path) -> None:
        """Go on from a state."""


def make_workload(comm: Collectives, spec: WorkloadSpec, arrays: Arrays | None = None) -> Workload:
    """Return this rank's part of the workload that ``spec`` describes, on ``arrays`` or those of its device.

    All ranks are on one host. They use its devices in turn, so several may share one.
    """
    if arrays is None:
        arrays = HostArrays() if spec.device == CPU else arrays_of(comm.rank)
    return Digits(comm, spec, arrays) if spec.name == "digits" else Synthetic(comm, spec, arrays)


def largest_bucket_bytes(spec: WorkloadSpec) -> int:
    """Return the size of the workload's full buckets."""
    return min(spec.bucket_bytes, PARAMETERS * 4 if spec.name == "digits" else spec.gradient_bytes)


def measure_rank(comm: Any, config: WorkerConfig, arrays: Arrays | None = None) -> RankRecord:
    """Run the measured iterations of ``config`` on this rank and return what it saw; ``arrays`` as `make_workload`."""
    workload = make_workload(comm, config.workload, arrays)
    if config.resume_path is not None:
        workload.resume(Path(config.resume_path))
    for _ in range(config.warmup):
        workload.rehearse()
    comm.barrier()
    before = network_counts()
    start_ns = time.monotonic_ns()
    last = config.first_iteration + config.iterations
    stamps = tuple(workload.iterate(index) for index in range(config.first_iteration, last))
    counts = network_counts().since(before)
    workload.verify()
    if config.checkpoint_path is not None and comm.rank == 0:
        workload.save(Path(config.checkpoint_path))
    bucket_bytes = largest_bucket_bytes(config.workload)
    counters = comm.counters()
    return RankRecord(
        rank=comm.rank,
        start_ns=start_ns,
        stamps=stamps,
        losses=tuple(workload.losses),
        accuracy=workload.accuracy() if comm.rank == 0 else None,
        digest=workload.digest(),
        algorithm=comm.algorithm("all_reduce", bucket_bytes),
        predicted_s=comm.predict("all_reduce", bucket_bytes, on_device=config.workload.device != CPU),
        sent_bytes=counts.sent_bytes,
        retransmits=counts.retransmits,
        slot_misses=counters.get("slot_misses"),
        slot_trims=counters.get("slot_trims"),
    )


def main(argv: list[str]) -> None:
    """Run the rank that the launcher's environment and the configuration file describe."""
    config = read_config(Path(argv[1]))
    comm = detcoll.init(transport=config.transport, topology=config.topology, timeout=config.timeout_s)
    record = measure_rank(comm, config)
    detcoll.finalize()
    write_json(config.record_path(record.rank), record)


if __name__ == "__main__":
    main(sys.argv)
