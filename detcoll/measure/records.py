"""What passes between `detcoll measure` and its ranks: a configuration in, one record a rank out; both JSON files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from detcoll.marks import Marks
from detcoll.topology import Topology
from detcoll.workloads.workload import Stamps, WorkloadSpec


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One setting's part of a measurement, the same for all its ranks.

    Iterations ``first_iteration`` and the ``iterations - 1`` that follow are measured, after ``warmup`` rehearsals.
    State goes on from ``resume_path`` and is left in ``checkpoint_path``.
    """

    workload: WorkloadSpec
    transport: str
    topology: Topology
    iterations: int
    warmup: int
    timeout_s: float
    output_dir: str
    first_iteration: int = 0
    resume_path: str | None = None
    checkpoint_path: str | None = None

    def record_path(self, rank: int) -> Path:
        """Return where ``rank`` writes its record."""
        return Path(self.output_dir) / f"rank{rank}.json"


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one rank saw of one setting."""

    rank: int
    start_ns: int
    stamps: tuple[Stamps, ...]
    losses: tuple[float, ...]
    accuracy: float | None
    digest: str
    algorithm: str
    predicted_s: float | None
    sent_bytes: int | None
    retransmits: int | None
    slot_misses: int | None
    slot_trims: int | None = None


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, so that a reader sees all of it or nothing."""
    draft = path.with_name(path.name + ".draft")
    draft.write_bytes(msgspec.json.encode(value))
    draft.replace(path)


def read_config(path: Path) -> WorkerConfig:
    """Read the configuration of a rank."""
    return msgspec.json.decode(path.read_bytes(), type=WorkerConfig)


def read_record(path: Path) -> RankRecord:
    """Read the record of a rank."""
    return msgspec.json.decode(path.read_bytes(), type=RankRecord)


def read_marks(path: Path) -> Marks:
    """Read the marks of a rank of a user's script."""
    return msgspec.json.decode(path.read_bytes(), type=Marks)
