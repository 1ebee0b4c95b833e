"""Scenario files: where the sites are, how they are joined, and what is trained on them.

TOML; quantities carry units, unknown keys are refused. `detcoll/scenarios/*.toml` are shipped and found by name.

::

    ranks = 8                       # in each site, unless a site says otherwise; so are uplink and reserved
    uplink = "800 Gbit/s"           # the line
    reserved = "600 Gbit/s"         # what is reserved of it; the whole line unless given
    mtu = 9000
    [model]     parameters, precision
    [training]  compute, backward, buckets, overlap              (detcoll.scenarios.workload)
    [local]     bandwidth, latency, step                         inside a site, of one rank
    [fibre]     route_factor, refraction                         (detcoll.scenarios.geography)
    [ordinary]  loss, cross_traffic, control, connections, window, timeout   (detcoll.scenarios.tcp)
    [sensitivity]  reserved, loss, cross_traffic                 lists of what to try instead
    [[site]]    name, latitude, longitude

Cross traffic is a share of every line that others take from the ordinary network and do not give back; on the
deterministic one it costs nothing, since what is reserved is kept free.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import msgspec

from detcoll.errors import UsageError
from detcoll.plan import Calendar, Costs, Slotting, build_calendar
from detcoll.plan.calendar import flows_between
from detcoll.quantities import format_rate, parse_duration_ns, parse_rate_bytes_per_s, parse_size_bytes
from detcoll.scenarios.geography import great_circle_km, one_way_ns
from detcoll.scenarios.tcp import CONTROLS, throughput_bytes_per_s
from detcoll.scenarios.tcp import Path as TcpPath
from detcoll.scenarios.workload import Workload
from detcoll.topology import TCP_IP_HEADER_BYTES, Link, Site, Topology

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Factor = Annotated[float, msgspec.Meta(ge=1, le=10)]


class ModelTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is trained."""

    parameters: Count
    precision: str = "bfloat16"


class TrainingTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How; see `detcoll.scenarios.workload`."""

    compute: str
    backward: Share = 2 / 3
    buckets: Count = 32
    overlap: Share = 1.0


class LocalTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Inside a site: what one rank moves, a message's latency, and what a step costs its host."""

    bandwidth: str
    latency: str = "20 us"
    step: str = "30 us"


class FibreTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From kilometres to delay."""

    route_factor: Factor = 1.4
    refraction: Factor = 1.468


class OrdinaryTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The network in which nothing is reserved. ``connections`` : TCP connections of each pair of ranks."""

    loss: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    cross_traffic: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    control: str = "cubic"
    connections: Count = 1
    window: str = "64MiB"
    timeout: str = "200 ms"


class SensitivityTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to try instead, one at a time."""

    reserved: tuple[str, ...] = ()
    loss: tuple[float, ...] = ()
    cross_traffic: tuple[float, ...] = ()


class SiteTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One city."""

    name: str
    latitude: Annotated[float, msgspec.Meta(ge=-90, le=90)]
    longitude: Annotated[float, msgspec.Meta(ge=-180, le=180)]
    ranks: Count | None = None
    uplink: str | None = None
    reserved: str | None = None


class ScenarioFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file as it stands."""

    model: ModelTable
    training: TrainingTable
    local: LocalTable
    site: Annotated[tuple[SiteTable, ...], msgspec.Meta(min_length=2)]
    ranks: Count = 1
    uplink: str = "100 Gbit/s"
    reserved: str | None = None
    mtu: int = 1500
    description: str = ""
    fibre: FibreTable = FibreTable()
    ordinary: OrdinaryTable = OrdinaryTable()
    sensitivity: SensitivityTable = SensitivityTable()


@dataclass(frozen=True, slots=True)
class Ordinary:
    """What an ordinary network does to a flow; see `OrdinaryTable`."""

    loss: float
    cross_traffic: float
    control: str
    connections: int
    window_bytes: int
    timeout_ns: int

    def calendar(self, lines: Topology) -> Calendar:
        """Return the rates that flows reach between the sites of ``lines``, as a calendar without windows.

        A flow between two ranks gets an equal part of what cross traffic leaves of both lines that it crosses, or what
        its TCP connections carry together, whichever is less.
        """
        count = len(lines.sites)
        shared = build_calendar(lines, Slotting.SHARE)
        rates = []
        for i in range(count):
            for j in range(count):
                part = self._line_part(lines, i, j) if i != j else 0.0
                rates.append(min(part, self._tcp(lines, i, j)) if i != j else 0.0)
        return Calendar(Slotting.SHARE, shared.sites, tuple(rates))

    def _line_part(self, lines: Topology, i: int, j: int) -> float:
        up, down = lines.sites[i].uplink_bytes_per_s or 0.0, lines.sites[j].downlink_bytes_per_s or 0.0
        flows = (len(lines.sites) - 1) * flows_between(lines, i, j)
        return min(up, down) * lines.payload_share * (1 - self.cross_traffic) / flows

    def _tcp(self, lines: Topology, i: int, j: int) -> float:
        round_trip_s = (lines.one_way_ns(i, j) + lines.one_way_ns(j, i)) / 1e9
        segment_bytes = lines.mtu_bytes - TCP_IP_HEADER_BYTES
        path = TcpPath(self.loss, round_trip_s, segment_bytes, self.window_bytes, self.timeout_ns / 1e9)
        return self.connections * throughput_bytes_per_s(self.control, path)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Reserved rates in bytes per second, losses and cross traffic to try."""

    reserved_bytes_per_s: tuple[float, ...]
    loss: tuple[float, ...]
    cross_traffic: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A file with its quantities read.

    ``lines`` : sites with their whole lines.  ``reserved`` : the same sites with what is reserved of them.
    ``longest_km`` : between the two sites that are farthest apart.
    """

    name: str
    description: str
    lines: Topology
    reserved: Topology
    work: Workload
    costs: Costs
    ordinary: Ordinary
    sensitivity: Sensitivity
    longest_km: float


def shipped() -> tuple[str, ...]:
    """Return the names of the scenarios that come with detcoll."""
    files = resources.files("detcoll.scenarios").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load(name: str) -> Scenario:
    """Read a scenario by the name of a shipped one or the path of a file.

    Raises
    ------
    UsageError
        If there is none, or its content cannot be used; the message names the key.
    """
    if name in shipped():
        text = resources.files("detcoll.scenarios").joinpath(f"{name}.toml").read_text(encoding="utf-8")
        return parse(text, name)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"scenario={name!r} is neither a file that can be read nor one of {', '.join(shipped())}: {error}"
        ) from error
    return parse(text, Path(name).name)


def parse(text: str, name: str = "scenario") -> Scenario:
    """Read the text of a scenario file; see `load`."""
    try:
        file = msgspec.convert(tomllib.loads(text), ScenarioFile)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"{name}: {error}") from error
    names = [table.name for table in file.site]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise UsageError(f"{name} has two sites of one name: {', '.join(twice)}")
    lines, longest_km = _topology(file, name, reserved=False)
    reserved, _ = _topology(file, name, reserved=True)
    for line, kept in zip(lines.sites, reserved.sites, strict=True):
        if (kept.uplink_bytes_per_s or 0) > (line.uplink_bytes_per_s or 0):
            raise UsageError(f"{name}, site {line.name!r}: reserved must not exceed uplink")
    return Scenario(
        name.removesuffix(".toml"), file.description.strip(), lines, reserved, _workload(file, name),
        _costs(file.local, name), _ordinary(file.ordinary, name), _sensitivity(file.sensitivity, name), longest_km,
    )  # fmt: skip


def _topology(file: ScenarioFile, name: str, *, reserved: bool) -> tuple[Topology, float]:
    """Return the sites with their lines or with what is reserved of them, and the longest distance in km."""
    sites, first = [], 0
    for table in file.site:
        count = table.ranks or file.ranks
        own = (table.reserved or file.reserved) if reserved else None
        text, key = (own, "reserved") if own is not None else (table.uplink or file.uplink, "uplink")
        rate = parse_rate_bytes_per_s(text, f"{name}, site {table.name!r}: {key}")
        sites.append(Site(table.name, tuple(range(first, first + count)), rate, rate))
        first += count
    links, longest_km = [], 0.0
    for i, j in combinations(range(len(sites)), 2):
        here, there = file.site[i], file.site[j]
        km = great_circle_km((here.latitude, here.longitude), (there.latitude, there.longitude))
        longest_km = max(longest_km, km)
        links.append(((i, j), Link(one_way_ns(km, file.fibre.route_factor, file.fibre.refraction))))
    made = Topology(tuple(sites), tuple(links), file.mtu)
    return Topology.parse(made.to_toml(), name=name), longest_km  # which checks names, counts and the MTU


def _workload(file: ScenarioFile, name: str) -> Workload:
    training = file.training
    try:
        return Workload(
            file.model.parameters, file.model.precision, parse_duration_ns(training.compute, "training.compute"),
            training.backward, training.buckets, training.overlap,
        )  # fmt: skip
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


def _costs(table: LocalTable, name: str) -> Costs:
    return Costs(
        step_ns=parse_duration_ns(table.step, f"{name}: local.step"),
        copy_bytes_per_s=parse_rate_bytes_per_s(table.bandwidth, f"{name}: local.bandwidth"),
        local_latency_ns=parse_duration_ns(table.latency, f"{name}: local.latency"),
        late_ns=0,
    )


def _ordinary(table: OrdinaryTable, name: str) -> Ordinary:
    if table.control not in CONTROLS:
        raise UsageError(f"{name}: ordinary.control={table.control!r} must be one of {', '.join(CONTROLS)}")
    return Ordinary(
        table.loss, table.cross_traffic, table.control, table.connections,
        parse_size_bytes(table.window, f"{name}: ordinary.window"),
        parse_duration_ns(table.timeout, f"{name}: ordinary.timeout"),
    )  # fmt: skip


def _sensitivity(table: SensitivityTable, name: str) -> Sensitivity:
    for key in ("loss", "cross_traffic"):
        for value in getattr(table, key):
            if not 0 <= value < 1:
                raise UsageError(f"{name}: sensitivity.{key}={value} must be from 0 to below 1")
    rates = tuple(parse_rate_bytes_per_s(text, f"{name}: sensitivity.reserved") for text in table.reserved)
    return Sensitivity(rates, table.loss, table.cross_traffic)


def from_topology(topology: Topology, work: Workload, name: str, costs: Costs | None = None) -> Scenario:
    """Return a scenario of a topology with lines, all of them reserved; its ordinary network takes nothing from them.

    Raises
    ------
    UsageError
        If there are no lines between its sites.
    """
    if not topology.is_wide:
        raise UsageError(f"{name} has no lines between sites; expected two sites or more, each with an uplink")
    return Scenario(
        name, "", topology, topology, work, costs or Costs(late_ns=0), _ordinary(OrdinaryTable(), name),
        Sensitivity((), (), ()), 0.0,
    )  # fmt: skip


def is_scenario(text: str) -> bool:
    """Tell a scenario's text from a topology's: it says what is trained."""
    try:
        return "model" in tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False


def changed(
    scenario: Scenario, *, line_bytes_per_s: float | None = None, reserved_bytes_per_s: float | None = None,
    **values: Any,
) -> Scenario:  # fmt: skip
    """Return a scenario with other lines at every site, and with fields of its workload or ordinary network replaced.

    Where only the lines change, all of each is reserved.

    Raises
    ------
    UsageError
        If more is to be reserved than a line has, or a value is out of its range.
    """
    lines, reserved = scenario.lines, scenario.reserved
    if line_bytes_per_s is not None:
        lines = with_rate(lines, line_bytes_per_s)
        reserved = reserved if reserved_bytes_per_s is not None else with_rate(reserved, line_bytes_per_s)
    if reserved_bytes_per_s is not None:
        reserved = with_rate(reserved, reserved_bytes_per_s)
        if any(reserved_bytes_per_s > (site.uplink_bytes_per_s or 0) for site in lines.sites):
            raise UsageError(
                f"reserved={format_rate(reserved_bytes_per_s)} must not exceed the line; give a larger uplink as well"
            )
    given = {name: value for name, value in values.items() if value is not None}
    for name in ("loss", "cross_traffic"):
        if not 0 <= given.get(name, 0) < 1:
            raise UsageError(f"{name}={given[name]} must be from 0 to below 1")
    if given.get("connections", 1) < 1:
        raise UsageError(f"connections={given['connections']} must be at least 1")
    ordinary = {name: value for name, value in given.items() if name in Ordinary.__slots__}
    work = {name: value for name, value in given.items() if name in Workload.__slots__}
    return replace(
        scenario, lines=lines, reserved=reserved, ordinary=replace(scenario.ordinary, **ordinary),
        work=replace(scenario.work, **work),
    )  # fmt: skip


def with_rate(topology: Topology, bytes_per_s: float) -> Topology:
    """Return the same sites with lines of this rate."""
    sites = tuple(Site(site.name, site.ranks, bytes_per_s, bytes_per_s) for site in topology.sites)
    return Topology(sites, topology.links, topology.mtu_bytes)
