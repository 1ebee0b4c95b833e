"""What a report takes from files: results of `detcoll measure` and `detcoll bench`, and places of sites.

Files of other versions are read too: what they have beyond this is passed over, what they lack is left out of the
report. So nothing here but a run's name and times has to be there.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec

from detcoll.draw import Place
from detcoll.draw.traces import TRACE_SCHEMA
from detcoll.errors import UsageError
from detcoll.measure.results import BENCH_SCHEMA, MEASURE_SCHEMA
from detcoll.measure.statistics import Summary
from detcoll.scenarios.study import SCHEMA as STUDY_SCHEMA


@dataclass(frozen=True, slots=True)
class ReportedCoTenant:
    """Round trips of somebody else's small packets on the same lines, in seconds."""

    median_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class ReportedLine:
    """What the lines saw of a run."""

    queue_dropped_segments: int | None = None
    policed_segments: int | None = None
    peak_queue_bytes: int | None = None
    co_tenant: ReportedCoTenant | None = None


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """One setting of a measurement; see `detcoll.measure.results.Run`."""

    name: str
    iteration_s: Summary
    transport: str = ""
    setting: str = "wide-area"
    service: str = "best-effort"
    cross_traffic: float = 0.0
    sync_s: Summary | None = None
    efficiency: float | None = None
    efficiency_spread: tuple[float, float] | None = None
    wire_busy_fraction: float | None = None
    algorithm: str | None = None
    result_digest: str | None = None
    retransmits: int | None = None
    slot_misses: int | None = None
    accuracy: float | None = None
    arithmetic_ratio: float | None = None
    line: ReportedLine | None = None

    @property
    def is_wide(self) -> bool:
        """Whether it ran across sites."""
        return self.setting != "single-cluster"


@dataclass(frozen=True, slots=True)
class ReportedRow:
    """One collective at one size; see `detcoll.measure.results.Row`."""

    collective: str
    transport: str
    bytes: int
    median_s: float
    min_s: float | None = None
    max_s: float | None = None
    p99_s: float | None = None
    algorithm: str | None = None
    ranks: int | None = None
    sites: int | None = None
    dtype: str | None = None
    bound_s: float | None = None
    predicted_s: float | None = None
    fraction_of_bound: float | None = None
    prediction_error: float | None = None
    iterations: int | None = None
    service: str = "best-effort"
    cross_traffic: float = 0.0


@dataclass(frozen=True, slots=True)
class ReportedLeftOut:
    """What was not measured, and why."""

    transport: str
    why: str
    network: str | None = None


@dataclass(frozen=True, slots=True)
class ReportedAudit:
    """What the router saw of a slotted run; see `detcoll.measure.results.AuditResult`."""

    slotting: str
    passed: bool
    inside_share: float


@dataclass(frozen=True, slots=True)
class ReportedResult:
    """A result file; ``rows`` are a sweep's, ``runs`` a measurement's."""

    schema: str
    host: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    runs: tuple[ReportedRun, ...] = ()
    rows: tuple[ReportedRow, ...] = ()
    left_out: tuple[ReportedLeftOut, ...] = ()
    digests_equal: bool | None = None
    audit: ReportedAudit | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class ReportedSetting:
    """One network of a simulation; see `detcoll.scenarios.study.SettingResult`."""

    setting: str
    iteration_s: float
    efficiency: float
    line_bit_per_s: float | None = None
    exposed_s: float | None = None
    sync_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReportedPoint:
    """A variant of a simulation; see `detcoll.scenarios.study.Point`."""

    setting: str
    changed: str
    value: float
    iteration_s: float
    efficiency: float


@dataclass(frozen=True, slots=True)
class ReportedNeed:
    """The line that an efficiency needs; see `detcoll.scenarios.study.Needed`."""

    condition: str
    target: float
    line_bit_per_s: float | None
    efficiency: float
    iteration_s: float
    ordinary_efficiency: float | None = None


@dataclass(frozen=True, slots=True)
class ReportedStudy:
    """The file of `detcoll simulate`."""

    schema: str
    scenario: dict[str, Any] = field(default_factory=dict)
    algorithm: str = ""
    runs: tuple[ReportedSetting, ...] = ()
    sensitivity: tuple[ReportedPoint, ...] = ()
    needed: tuple[ReportedNeed, ...] = ()
    command: str | None = None


Reported = ReportedResult | ReportedStudy


@dataclass(frozen=True, slots=True)
class SiteMap:
    """Places of sites and the pairs that are joined."""

    name: str
    places: tuple[Place, ...]
    links: tuple[tuple[int, int], ...]


def read_result(path: Path) -> Reported:
    """Return the result file at ``path``.

    Raises
    ------
    UsageError
        If it cannot be read or is no result of `detcoll measure`, `detcoll bench` or `detcoll simulate`.
    """
    try:
        return parse_result(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"file={str(path)!r} cannot be read: {error.strerror}") from error


def parse_result(data: bytes, name: str) -> Reported:
    """Return the result in ``data``, which errors call ``name``; raises as `read_result` does."""
    schema = schema_of(data, name)
    if schema not in _READ_AS:
        raise UsageError(
            f"file={name!r} has schema={schema!r}; a report takes files of measure, bench and simulate --json "
            f"({', '.join(_READ_AS)}) and traces of ranks ({TRACE_SCHEMA})"
        )
    try:
        return msgspec.json.decode(data, type=_READ_AS[schema])
    except msgspec.MsgspecError as error:
        raise UsageError(f"file={name!r} is no result of schema {schema}: {error}") from error


_READ_AS: dict[str, type[ReportedResult] | type[ReportedStudy]] = {
    MEASURE_SCHEMA: ReportedResult,
    BENCH_SCHEMA: ReportedResult,
    STUDY_SCHEMA: ReportedStudy,
}


class _Head(msgspec.Struct, frozen=True):
    schema: str = ""


def schema_of(data: bytes, name: str) -> str:
    """Return the schema that a JSON object says it has, nothing where it says none.

    Raises
    ------
    UsageError
        If ``data`` is no JSON object.
    """
    try:
        return msgspec.json.decode(data, type=_Head).schema
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"file={name!r} is no JSON object: {error}") from error


class _SiteTable(msgspec.Struct, frozen=True):
    name: str
    latitude: float
    longitude: float


class _LinkTable(msgspec.Struct, frozen=True):
    between: tuple[str, str]


class _MapFile(msgspec.Struct, frozen=True):
    site: tuple[_SiteTable, ...]
    link: tuple[_LinkTable, ...] = ()


def read_site_map(path: Path) -> SiteMap:
    """Return the sites of a TOML file whose ``[[site]]`` tables have ``name``, ``latitude`` and ``longitude``.

    All pairs are joined, unless ``[[link]]`` tables say which. Anything else in the file is passed over.

    Raises
    ------
    UsageError
        If it cannot be read, a site lacks its place, or a link names no site.
    """
    try:
        return parse_site_map(path.read_text(encoding="utf-8"), path.stem, str(path))
    except OSError as error:
        raise UsageError(f"file={str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"file={str(path)!r} has no map: {error}") from error


def parse_site_map(text: str, name: str, file: str) -> SiteMap:
    """Return the map in a TOML ``text``, which errors call ``file``; raises as `read_site_map` does."""
    try:
        tables = msgspec.convert(tomllib.loads(text), _MapFile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"file={file!r} has no map: {error}") from error
    numbers = {site.name: index for index, site in enumerate(tables.site)}
    unknown = [name for link in tables.link for name in link.between if name not in numbers]
    if unknown:
        raise UsageError(f"file={file!r}: a link names site {unknown[0]!r}, which is not there")
    pairs = [(numbers[link.between[0]], numbers[link.between[1]]) for link in tables.link]
    places = tuple(Place(site.name, site.latitude, site.longitude) for site in tables.site)
    return SiteMap(name, places, tuple(pairs or combinations(range(len(places)), 2)))
