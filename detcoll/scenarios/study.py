"""What a scenario comes to: one cluster, the deterministic and the ordinary network, and what that depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from detcoll.plan import Calendar, Slotting, floor_ns
from detcoll.scenarios.buckets import Buckets, Together, default_calendar, taken_together
from detcoll.scenarios.requirement import require_efficiency, required_rate
from detcoll.scenarios.scenario import Ordinary, Scenario, with_rate
from detcoll.scenarios.workload import BucketTimes, Workload, iteration_ns
from detcoll.topology import Topology

SCHEMA = "detcoll.simulate/1"

Say = Callable[[str, float], None]
"""Told what is being simulated, and which share of that is done."""

SINGLE, DETERMINISTIC, ORDINARY = "single-cluster", "deterministic", "ordinary"


def _silent(what: str, share: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class SettingResult:
    """One network. Times in seconds.

    ``line_bit_per_s`` : the slowest site's line, or what is reserved of it; None in one cluster.  ``exposed_s`` : what
    the iteration takes beyond its computing.  ``sync_s`` : all buckets one behind the other.  ``bucket_s`` : the first
    one's time.  ``interval_s`` : what each further one adds.  ``bound_s`` : the floor of a bucket.
    """

    setting: str
    line_bit_per_s: float | None = None
    iteration_s: float = field(kw_only=True)
    efficiency: float = field(kw_only=True)
    exposed_s: float | None = None
    sync_s: float | None = None
    bucket_s: float | None = None
    interval_s: float | None = None
    bound_s: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One variant: what was changed, to what, and what an iteration then takes on which network."""

    setting: str
    changed: str
    value: float
    iteration_s: float
    efficiency: float


@dataclass(frozen=True, slots=True)
class Needed:
    """The line that every site needs for an efficiency, and what the ordinary network gives on the same line.

    ``condition`` : what is assumed of the overlap.  ``line_bit_per_s`` : None where no line is fast enough;
    ``efficiency`` is then what an endless one gives.
    """

    condition: str
    target: float
    line_bit_per_s: float | None
    efficiency: float
    iteration_s: float
    ordinary_iteration_s: float | None = None
    ordinary_efficiency: float | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """The file of `detcoll simulate --json`, written and read as this; what files of other versions lack is as here.

    ``together_error`` : by how much the quick figures (sensitivity, needed) differ from the full simulation, of an
    iteration on the ordinary network. What is inside a site was taken from the deterministic one.  ``command`` :
    the command line that it came from.
    """

    schema: str
    scenario: dict[str, Any] = field(default_factory=dict)
    algorithm: str = ""
    runs: tuple[SettingResult, ...] = ()
    sensitivity: tuple[Point, ...] = ()
    needed: tuple[Needed, ...] = ()
    together_error: float = 0.0
    command: str | None = None


class _Setting:
    """A scenario whose single cluster and deterministic network have been simulated."""

    def __init__(self, scenario: Scenario, mode: Slotting | None, say: Say) -> None:
        self.scenario, self.mode, self.work = scenario, mode, scenario.work
        self.full = Buckets(scenario.work, scenario.reserved, scenario.costs)
        self.local = self.full.in_one_cluster(lambda share: say(SINGLE, share))
        self.baseline_ns = iteration_ns(scenario.work, self.local)
        self.together = Together(scenario.work, scenario.reserved, scenario.costs, self.local)
        topology = taken_together(scenario.reserved)
        alone = self.together.alone(topology, self.calendar(topology))
        self.deterministic = self.full.across_sites(
            scenario.reserved, self.calendar(scenario.reserved), alone.interval_ns,
            lambda share: say(DETERMINISTIC, share),
        )  # fmt: skip
        self.together.inside_ns = self.deterministic.first_ns - alone.first_ns
        self._about: dict[float, BucketTimes] = {}

    def calendar(self, topology: Topology) -> Calendar:
        """Return the calendar of the deterministic network."""
        return default_calendar(topology, self.mode)

    def result(self, name: str, times: BucketTimes, topology: Topology | None) -> SettingResult:
        """Return the row of one network."""
        takes_ns = iteration_ns(self.work, times)
        bound_ns = floor_ns(topology, "all_reduce", self.work.bucket().nbytes) if topology is not None else None
        return SettingResult(
            name,
            slowest_bit_per_s(topology) if topology is not None else None,
            iteration_s=takes_ns / 1e9,
            efficiency=self.baseline_ns / takes_ns,
            exposed_s=(takes_ns - self.work.compute_ns) / 1e9,
            sync_s=times.all_ns(self.work.buckets) / 1e9,
            bucket_s=times.first_ns / 1e9,
            interval_s=times.interval_ns / 1e9,
            bound_s=None if bound_ns is None else bound_ns / 1e9,
        )

    def about(self, rate_bytes_per_s: float) -> BucketTimes:
        """Return about what the deterministic network gives with lines of this rate at every site."""
        if rate_bytes_per_s not in self._about:
            topology = with_rate(taken_together(self.scenario.reserved), rate_bytes_per_s)
            self._about[rate_bytes_per_s] = self.together.about(topology, self.calendar(topology))
        return self._about[rate_bytes_per_s]

    def about_ordinary(self, lines: Topology, ordinary: Ordinary) -> BucketTimes:
        """Return about what an ordinary network gives on ``lines``."""
        topology = taken_together(lines)
        return self.together.about(topology, together_ordinary(ordinary, lines).calendar(topology))


def together_ordinary(ordinary: Ordinary, lines: Topology) -> Ordinary:
    """Return the ordinary network of ranks taken together: as many connections as their flows have."""
    return replace(ordinary, connections=ordinary.connections * max(len(site.ranks) for site in lines.sites))


def study(
    scenario: Scenario, target: float = 0.98, mode: Slotting | None = None, *, variants: bool = True, say: Say = _silent
) -> Study:
    """Simulate a scenario.

    Parameters
    ----------
    scenario : Scenario
        Sites, lines and workload.
    target : float
        The efficiency to find the line for.
    mode : Slotting, optional
        How flows share lines; what jobs do unless told otherwise by default.
    variants : bool
        Whether to look at the sensitivities and at what the target needs as well.
    say : callable
        Told of progress.

    Raises
    ------
    UsageError
        If the target is not above 0 and at most 1.
    PlanError
        If no calendar is found.
    """
    require_efficiency(target)
    setting = _Setting(scenario, mode, say)
    reserved, lines = scenario.reserved, scenario.lines
    about = setting.about_ordinary(lines, scenario.ordinary)
    ordinary = setting.full.across_sites(
        lines, scenario.ordinary.calendar(lines), about.interval_ns, lambda share: say(ORDINARY, share)
    )
    return Study(
        SCHEMA, facts(scenario), setting.full.algorithm,
        (
            setting.result(SINGLE, setting.local, None),
            setting.result(DETERMINISTIC, setting.deterministic, reserved),
            setting.result(ORDINARY, ordinary, lines),
        ),
        tuple(_sensitivity(setting, say)) if variants else (),
        tuple(_needed(setting, target, say)) if variants else (),
        iteration_ns(scenario.work, about) / iteration_ns(scenario.work, ordinary) - 1,
    )  # fmt: skip


def need(scenario: Scenario, target: float, mode: Slotting | None = None, say: Say = _silent) -> Needed:
    """Find the line that every site needs for an efficiency; arguments and errors are those of `study`."""
    require_efficiency(target)
    setting = _Setting(scenario, mode, say)
    return needed(setting, scenario.work, "as given", target)


def _sensitivity(setting: _Setting, say: Say) -> Sequence[Point]:
    scenario, points = setting.scenario, []
    tried = scenario.sensitivity

    def point(name: str, changed: str, value: float, times: BucketTimes) -> None:
        takes_ns = iteration_ns(setting.work, times)
        points.append(Point(name, changed, value, takes_ns / 1e9, setting.baseline_ns / takes_ns))
        say("sensitivity", len(points) / count)

    count = len(tried.reserved_bytes_per_s) + len(tried.loss) + len(tried.cross_traffic)
    for rate in tried.reserved_bytes_per_s:
        point(DETERMINISTIC, "reserved_bit_per_s", rate * 8, setting.about(rate))
    for loss in tried.loss:
        times = setting.about_ordinary(scenario.lines, replace(scenario.ordinary, loss=loss))
        point(ORDINARY, "loss", loss, times)
    for share in tried.cross_traffic:
        times = setting.about_ordinary(scenario.lines, replace(scenario.ordinary, cross_traffic=share))
        point(ORDINARY, "cross_traffic", share, times)
    return points


def _needed(setting: _Setting, target: float, say: Say) -> Sequence[Needed]:
    found: list[Needed] = []
    cases = conditions(setting.work)
    for condition, work in cases:
        found.append(needed(setting, work, condition, target))
        say(f"what {target:.0%} needs", len(found) / len(cases))
    return found


def conditions(work: Workload) -> tuple[tuple[str, Workload], ...]:
    """Return the workload as it is, and with less of the synchronisation beside the backward pass."""
    return (
        ("as given", work),
        ("gradients of 8 micro-batches summed first", replace(work, backward=work.backward / 8)),
        ("nothing beside the backward pass", replace(work, overlap=0.0)),
    )


def needed(setting: _Setting, work: Workload, condition: str, target: float) -> Needed:
    """Find the line for the target, and what the ordinary network gives on it."""
    # A single cluster hides less as well where less can be hidden.
    baseline_ns = iteration_ns(work, setting.local)
    guess = slowest_bit_per_s(setting.scenario.reserved) / 8
    answer = required_rate(work, baseline_ns, target, setting.about, guess)
    if answer.rate_bytes_per_s is None:
        return Needed(condition, target, None, answer.reached, baseline_ns / answer.reached / 1e9, None, None)
    lines = with_rate(setting.scenario.lines, answer.rate_bytes_per_s)
    ordinary_ns = iteration_ns(work, setting.about_ordinary(lines, setting.scenario.ordinary))
    return Needed(
        condition, target, answer.rate_bytes_per_s * 8, answer.reached, baseline_ns / answer.reached / 1e9,
        ordinary_ns / 1e9, baseline_ns / ordinary_ns,
    )  # fmt: skip


def slowest_bit_per_s(topology: Topology) -> float:
    """Return the rate of the slowest site's line in bits per second."""
    return 8 * min(site.uplink_bytes_per_s or 0.0 for site in topology.sites)


def facts(scenario: Scenario) -> dict[str, Any]:
    """Return what a reader has to know of a scenario beside its file."""
    work, lines = scenario.work, scenario.lines
    return {
        "name": scenario.name, "description": scenario.description, "sites": len(lines.sites), "ranks": lines.size,
        "parameters": work.parameters, "precision": work.precision, "gradient_bytes": work.gradient_bytes,
        "compute_s": work.compute_ns / 1e9, "backward": work.backward, "buckets": work.buckets, "overlap": work.overlap,
        "longest_km": scenario.longest_km, "longest_one_way_s": max(link.one_way_ns for _, link in lines.links) / 1e9,
        "line_bit_per_s": slowest_bit_per_s(lines), "reserved_bit_per_s": slowest_bit_per_s(scenario.reserved),
        "loss": scenario.ordinary.loss, "cross_traffic": scenario.ordinary.cross_traffic,
        "control": scenario.ordinary.control, "connections": scenario.ordinary.connections,
        "payload_share": lines.payload_share, "mtu_bytes": lines.mtu_bytes,
    }  # fmt: skip
