"""The result files of `detcoll measure` and `detcoll bench`. Times in seconds, sizes in bytes, null: does not apply.

They are written and read as this. Files of other versions are read too: what they have beyond this is passed over, and
what they lack has the value given here, so that nothing but a run's name and times has to be there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec

from detcoll.measure.lines import CoTenant, LineUse
from detcoll.measure.load import Load
from detcoll.measure.statistics import Summary
from detcoll.outputs import write_file
from detcoll.scenarios import Study

MEASURE_SCHEMA = "detcoll.measure/1"
BENCH_SCHEMA = "detcoll.bench/1"

SINGLE_CLUSTER, WIDE_AREA = "single-cluster", "wide-area"
"""Where a setting runs."""

LAB, RELAY = "lab", "relay"
"""What lines between sites can be made by."""


class LimitKind(Enum):
    """What of the lab can limit a row instead of the lines that it plays."""

    ROUTER = "router"
    PROCESSORS = "processors"
    BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Limit:
    """What of the lab limited a row, why it is thought so, and what would fit; both in words for people."""

    by: LimitKind
    why: str
    fits: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One setting of a measurement. It has many fields because each is a key of the result file.

    ``efficiency_spread`` : the range that efficiency moves in, low and high.
    ``arithmetic_ratio`` : median iteration time over the workload's own compute time, where that is given.
    ``losses`` : mean loss over ranks, one an iteration.
    ``slot_misses``, ``slot_trims`` : windows of all ranks in which data waited and nothing was sent, and those in which
    some of it came too late; None where lines have no slots, 0 where a slot never closes.
    ``line`` : what the lab's lines saw of it, None for the single cluster.  ``without`` : what was switched off of
    `detcoll.measure.gains.MEANS`, None where nothing was.  ``round_s`` : the median iteration time of each round.
    ``load`` : what the machine did meanwhile.  ``limits`` : what of the lab limited it; an efficiency with any says
    little of the lines. None where nobody looked.
    """

    name: str
    transport: str = ""
    setting: str = WIDE_AREA
    service: str = "best-effort"
    cross_traffic: float = 0.0
    iteration_s: Summary = field(kw_only=True)
    sync_s: Summary | None = None
    efficiency: float | None = None
    efficiency_spread: tuple[float, float] | None = None
    wire_busy_fraction: float | None = None
    algorithm: str | None = None
    result_digest: str | None = None
    retransmits: int | None = None
    slot_misses: int | None = None
    arithmetic_ratio: float | None = None
    losses: tuple[float, ...] | None = None
    accuracy: float | None = None
    total_s: float | None = None
    slot_trims: int | None = None
    line: LineUse | None = None
    without: str | None = None
    round_s: tuple[float, ...] = ()
    load: Load | None = None
    limits: tuple[Limit, ...] | None = None

    @property
    def is_wide(self) -> bool:
        """Whether it ran across sites."""
        return self.setting != SINGLE_CLUSTER


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A setting that was asked for and not measured, and why; ``network`` where it was left out on one alone."""

    transport: str
    why: str
    network: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """The file of `detcoll measure --json`.

    ``digests_equal`` : whether every slotted run across sites gave the bits of the single-cluster run, but for those
    without topology, whose grouping is another; None where the workload has no digest or there is no such run.
    ``command`` : the command line that it came from.  ``doubts`` : why efficiencies may be no good, in words.
    ``ended_early`` : why there are fewer rounds than were asked for, in words; None where all of them are there.
    """

    schema: str
    host: dict[str, str | int | None]
    workload: dict[str, Any]
    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
    digests_equal: bool | None
    command: str | None = None
    doubts: tuple[str, ...] = ()
    ended_early: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One collective at one size. It has many fields because each is a key of the result file.

    A call's time is the slowest rank's. ``prediction_error`` is predicted / measured - 1. ``start`` tells how ranks
    began together: at one "instant" of a clock they share, or from a "barrier"; ``skew_s`` is the median of how far
    apart they began, where that is known. ``empty`` : the array came from `Communicator.empty`. ``slot_misses`` and
    ``slot_trims`` are as in `Run`, of the timed calls. ``cpu_s_per_gb`` is processor time in seconds of all ranks
    together, for each 10**9 bytes of array that all together reduce or broadcast (bytes times ranks);
    ``extra_memory_bytes`` is the greatest of the ranks' memory beyond their arrays. `detcoll.bench.consumption` says
    what counts. ``retransmits`` are TCP segments that the sites' kernels sent again from the first call on, warm-up
    included. ``samples_s`` are the times of all timed calls in their order, and ``began_s`` when each began by the
    monotonic clock of the host. ``co_tenant`` : others' small packets that left in the lab during these calls.
    ``load`` : what the machine did during these calls; ``limits`` : what of the lab limited them, None where nobody
    looked. Where there is any, ``fraction_of_bound`` and ``prediction_error`` do not apply. ``device`` :
    where the arrays were, "cpu" or "cuda".
    """

    collective: str
    transport: str
    algorithm: str | None = None
    ranks: int | None = None
    sites: int | None = None
    dtype: str | None = None
    bytes: int = field(kw_only=True)
    median_s: float = field(kw_only=True)
    min_s: float | None = None
    max_s: float | None = None
    p99_s: float | None = None
    bound_s: float | None = None
    predicted_s: float | None = None
    fraction_of_bound: float | None = None
    prediction_error: float | None = None
    iterations: int | None = None
    start: str | None = None
    skew_s: float | None = None
    empty: bool = False
    slot_misses: int | None = None
    slot_trims: int | None = None
    cpu_s_per_gb: float | None = None
    extra_memory_bytes: int | None = None
    retransmits: int | None = None
    service: str = "best-effort"
    cross_traffic: float = 0.0
    samples_s: tuple[float, ...] = ()
    began_s: tuple[float, ...] = ()
    co_tenant: CoTenant | None = None
    load: Load | None = None
    limits: tuple[Limit, ...] | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What the lab's router saw of a slotted run, held against the calendar.

    ``passed`` : at least 99 % of the payload of bulk connections reached its site's uplink inside the sender's own
    windows and reserved rates, windows open at a site never add up to more than its line, and no uplink queued more
    than a window. ``ranks_share`` : windows of a part of the line each, open together. ``warm_up_bytes`` opened TCP's
    windows before the last rank was ready and count nowhere else. ``inside_share`` counts bulk payload and, as outside,
    ``express_beyond_bytes``: what small and control messages sent beyond the headroom that calendars leave them;
    ``payload_inside_share`` counts all TCP payload. ``peak_queue_bytes`` is each uplink's longest queue,
    to be read against ``window_capacity_bytes``, what it carries in one window, and ``asleep_bytes``, what it carries
    in the longest time that the router itself was late.
    """

    slotting: str
    passed: bool
    inside_share: float
    payload_inside_share: float = 0.0
    bulk_bytes: int = 0
    express_bytes: int = 0
    other_bytes: int = 0
    warm_up_bytes: int = 0
    overlap_ns: tuple[int, ...] = ()
    clock_spread_ns: tuple[int, ...] = ()
    peak_queue_bytes: tuple[int, ...] = ()
    window_capacity_bytes: tuple[int, ...] = ()
    ranks_share: bool = False
    asleep_bytes: tuple[int, ...] = ()
    express_beyond_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BenchLine:
    """What the lab's lines saw of all rows of one transport on one network."""

    transport: str
    service: str
    cross_traffic: float
    use: LineUse


@dataclass(frozen=True, slots=True)
class BenchResult:
    """The file of `detcoll bench --json`; ``audit`` is there for slotted runs in the lab, ``lines`` for all in it.

    ``emulation`` : what the lines were made by, "lab" or "relay"; None where the ranks were those of a launcher.
    Of slotted runs on several networks the audit is the first that failed, or else the last.
    """

    schema: str
    host: dict[str, str | int | None]
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...] = ()
    audit: AuditResult | None = None
    lines: tuple[BenchLine, ...] = ()
    command: str | None = None
    emulation: str | None = None


def write_result(path: Path, result: Measurement | BenchResult | Study) -> None:
    """Write a result file, indented for people."""
    write_file(path, msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
