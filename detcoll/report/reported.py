"""Files that a report reads: results of `detcoll measure`, `bench` and `simulate`, and files of sites."""

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
from detcoll.measure.results import BENCH_SCHEMA, MEASURE_SCHEMA, AuditResult, LeftOut, Row, Run
from detcoll.scenarios.study import SCHEMA as STUDY_SCHEMA
from detcoll.scenarios.study import Study
from detcoll.topology import Topology


@dataclass(frozen=True, slots=True)
class ReportedResult:
    """A result file: `detcoll bench` writes ``rows``, `detcoll measure` writes ``runs``."""

    schema: str
    host: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()
    rows: tuple[Row, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    digests_equal: bool | None = None
    audit: AuditResult | None = None
    command: str | None = None
    ended_early: str | None = None


Reported = ReportedResult | Study


@dataclass(frozen=True, slots=True)
class SiteMap:
    """The positions of sites, and the pairs of sites that have a link."""

    name: str
    places: tuple[Place, ...]
    links: tuple[tuple[int, int], ...]


def parse_result(data: bytes, name: str) -> Reported:
    """Return the result in ``data``; ``name`` is for error messages.

    Raises
    ------
    UsageError
        If it is not a result of `detcoll measure`, `detcoll bench` or `detcoll simulate`.
    """
    schema = schema_of(data, name)
    if schema not in _READ_AS:
        raise UsageError(
            f"file={name!r} has schema={schema!r}; a report takes files of measure, bench and simulate --json "
            f"({', '.join(_READ_AS)}) and traces of ranks ({TRACE_SCHEMA})"
        )
    try:
        return msgspec.json.decode(data, type=_READ_AS[schema])
    except msgspec.MsgspecError as error:
        raise UsageError(f"file={name!r} is not a valid result of schema {schema}: {error}") from error


_READ_AS: dict[str, type[ReportedResult] | type[Study]] = {
    MEASURE_SCHEMA: ReportedResult,
    BENCH_SCHEMA: ReportedResult,
    STUDY_SCHEMA: Study,
}


class _Head(msgspec.Struct, frozen=True):
    schema: str = ""


def schema_of(data: bytes, name: str) -> str:
    """Return the value of ``schema`` in a JSON object, or an empty string if it has none.

    Raises
    ------
    UsageError
        If ``data`` is not a JSON object.
    """
    try:
        return msgspec.json.decode(data, type=_Head).schema
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"file={name!r} is not a JSON object: {error}") from error


class _SiteTable(msgspec.Struct, frozen=True):
    name: str
    latitude: float | None = None
    longitude: float | None = None


class _LinkTable(msgspec.Struct, frozen=True):
    between: tuple[str, str]


class _MapFile(msgspec.Struct, frozen=True):
    site: tuple[_SiteTable, ...]
    link: tuple[_LinkTable, ...] = ()


def read_sites(path: Path) -> SiteMap | Topology:
    """Return what a TOML file tells of its sites: their positions, or a topology, which has none.

    ``[[site]]`` tables have ``name``, and for a map ``latitude`` and ``longitude`` in degrees. ``[[link]]`` tables list
    the linked pairs; on a map without any, all pairs are linked. Other content of a map is ignored.

    Raises
    ------
    UsageError
        If the file cannot be read, is neither a map nor a topology, or a link names an unknown site.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"file={str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"file={str(path)!r} has no map: {error}") from error
    found = parse_site_map(text, path.stem, str(path))
    if found is not None:
        return found
    try:
        return Topology.parse(text, name=str(path))
    except UsageError as error:
        raise UsageError(
            f"file={str(path)!r} has no map, since not every site has a latitude and a longitude, and it is no "
            f"topology: {error}"
        ) from error


def parse_site_map(text: str, name: str, file: str) -> SiteMap | None:
    """Return the map in a TOML ``text``, or None if not every site has a position.

    Raises
    ------
    UsageError
        If ``text`` has no sites, or a link names an unknown one; ``file`` is for the message.
    """
    try:
        tables = msgspec.convert(tomllib.loads(text), _MapFile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"file={file!r} has no map: {error}") from error
    numbers = {site.name: index for index, site in enumerate(tables.site)}
    unknown = [name for link in tables.link for name in link.between if name not in numbers]
    if unknown:
        raise UsageError(f"file={file!r}: a link names the unknown site {unknown[0]!r}")
    places: list[Place] = []
    for site in tables.site:
        if site.latitude is None or site.longitude is None:
            return None
        places.append(Place(site.name, site.latitude, site.longitude))
    pairs = [(numbers[link.between[0]], numbers[link.between[1]]) for link in tables.link]
    return SiteMap(name, tuple(places), tuple(pairs or combinations(range(len(places)), 2)))
