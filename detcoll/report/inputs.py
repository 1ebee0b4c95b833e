"""The inputs of a report, and how they are found in files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import resources
from pathlib import Path

from detcoll.draw import RankTrace, read_rank_traces
from detcoll.draw.timespace import OneWay
from detcoll.draw.traces import TRACE_SCHEMA
from detcoll.errors import UsageError
from detcoll.report.reported import (
    Reported,
    SiteMap,
    parse_result,
    parse_site_map,
    read_sites,
    schema_of,
)
from detcoll.scenarios import Study, shipped
from detcoll.topology import Topology

RESULTS, TRACES, TOPOLOGY = "results.json", "traces", "topology.toml"
"""Files that `detcoll measure --report` writes beside the page; the folder of traces has one folder for each run."""

MOST_NAMED = 4
"""Files that are named in a remark; the others are counted."""


@dataclass(frozen=True, slots=True)
class TracedRun:
    """The traces of the ranks of one run, and the name of the run."""

    name: str
    traces: tuple[RankTrace, ...]


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """The inputs of a report.

    ``names`` : of the files of ``results``, in their order.  ``topology`` : supplies names and delays of the sites in
    traces.  ``topologies`` : name and content of the topology files to be shown.  ``remarks`` : what was done with
    files otherwise than asked.
    """

    results: tuple[Reported, ...] = ()
    traced: tuple[TracedRun, ...] = ()
    maps: tuple[SiteMap, ...] = ()
    topology: Topology | None = None
    names: tuple[str, ...] = ()
    topologies: tuple[tuple[str, Topology], ...] = ()
    remarks: tuple[str, ...] = ()

    def name_of(self, index: int) -> str:
        """Return the name of result ``index``."""
        return self.names[index] if index < len(self.names) else f"result {index + 1}"

    @property
    def site_names(self) -> tuple[str, ...]:
        """The names of the sites in order; empty if they are not known."""
        return tuple(site.name for site in self.topology.sites) if self.topology is not None else ()

    def one_way_ns(self) -> OneWay | None:
        """Return the delays between sites: the topology's, else from the results' round trips if equal, else None."""
        if self.topology is not None:
            return self.topology.one_way_ns
        for result in self.results:
            if isinstance(result, Study):
                continue
            round_trips = result.workload.get("round_trip_s") or ()
            if round_trips and len(set(round_trips)) == 1:
                one_way = round(round_trips[0] / 2 * 1e9)
                return lambda source, destination: one_way
        return None


def forget_traces(folder: Path) -> None:
    """Remove the traces of an earlier measurement from its report folder, so that they do not mix with new ones."""
    for path in (folder / TRACES).glob("*/rank*.json"):
        path.unlink()


def gather(paths: Sequence[Path], topology: Path | None = None) -> ReportInputs:
    """Read result files, traces, TOML files with positions of sites, topology files, and folders of these.

    Parameters
    ----------
    paths : sequence of Path
        From a folder, ``results.json``, ``topology.toml`` and all ``rank*.json`` in it and below are read. Traces in
        one folder belong to one run. A file that is given twice, or holds what another one holds, is taken once.
    topology : Path, optional
        A topology file, which supplies names and delays of the sites. One in a folder takes precedence; one among
        ``paths`` is used where there is no other.

    Raises
    ------
    UsageError
        If a file does not exist, cannot be read, or is none of these.
    """
    found = _Found()
    for path in paths:
        if path.is_dir():
            topology = _gather_folder(path, found) or topology
        else:
            _gather_file(path, found)
    results = tuple(found.results.values())
    maps = _distinct_maps({path: each for path, each in found.sites.items() if isinstance(each, SiteMap)})
    topologies = {path: each for path, each in found.sites.items() if isinstance(each, Topology)}
    scenarios = [shipped_map(each) for each in shipped() if each in _scenarios(results, maps)]
    used = next(iter(topologies.values()), None) if topology is None else Topology.from_file(topology)
    runs = zip(distinct_names(list(found.traces)), found.traces.values(), strict=True)
    shown = distinct_names(list(topologies))
    return ReportInputs(
        results=results,
        traced=tuple(TracedRun(name, read_rank_traces(files)) for name, files in runs),
        maps=(*maps, *(each for each in scenarios if each is not None)),
        topology=used,
        names=distinct_names(list(found.results)),
        topologies=tuple(zip(shown, topologies.values(), strict=True)),
        remarks=tuple(found.remarks()),
    )


@dataclass(slots=True)
class _Found:
    """What was found so far, by path; ``first`` is where each content was found first."""

    results: dict[Path, Reported] = field(default_factory=dict)
    traces: dict[Path, list[Path]] = field(default_factory=dict)
    sites: dict[Path, SiteMap | Topology] = field(default_factory=dict)
    first: dict[tuple[Path | None, bytes], Path] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    def is_new(self, path: Path, data: bytes, folder: Path | None = None) -> bool:
        """Tell whether no file before, or none in ``folder``, had this content."""
        key = folder, sha256(data).digest()
        first = self.first.get(key)
        if first is None:
            self.first[key] = path
            return True
        is_same = first.resolve() == path.resolve()
        self.twice.append(str(path) if is_same else f"{path} (as {first})")
        return False

    def remarks(self) -> list[str]:
        """Return what a reader must know about files."""
        told = [
            f"{path} is a topology: its sites have no latitude and longitude, so there is a table and no map."
            for path, each in self.sites.items()
            if isinstance(each, Topology)
        ]
        if self.twice:
            more = f" and {len(self.twice) - MOST_NAMED} more" if len(self.twice) > MOST_NAMED else ""
            told.append(f"Given twice, and shown once: {', '.join(self.twice[:MOST_NAMED])}{more}.")
        return told


def _gather_file(path: Path, found: _Found) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"file={str(path)!r} cannot be read: {error.strerror}") from error
    if path.suffix.lower() == ".toml":
        if found.is_new(path, data):
            found.sites[path] = read_sites(path)
    elif schema_of(data, str(path)) == TRACE_SCHEMA:
        folder = path.resolve().parent
        if found.is_new(path, data, folder):
            found.traces.setdefault(folder, []).append(path)
    elif found.is_new(path, data):
        found.results[path] = parse_result(data, str(path))


def _gather_folder(folder: Path, found: _Found) -> Path | None:
    """Add the results and traces in a folder; return its topology file, None if there is none."""
    result, topology = folder / RESULTS, folder / TOPOLOGY
    ranks = sorted(folder.rglob("rank*.json"))
    if not result.is_file() and not ranks:
        raise UsageError(f"folder={str(folder)!r} contains neither {RESULTS} nor rank*.json")
    for path in [result] * result.is_file() + ranks:
        _gather_file(path, found)
    return topology if topology.is_file() else None


def _distinct_maps(maps: dict[Path, SiteMap]) -> list[SiteMap]:
    names = distinct_names(list(maps))
    return [replace(each, name=name.removesuffix(".toml")) for name, each in zip(names, maps.values(), strict=True)]


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the shortest ends of ``paths`` that tell them apart: ``b.json``, or ``old/b.json`` if there are several.

    Parameters
    ----------
    paths : sequence of Path
        No two lead to the same file.
    """
    parts = [path.resolve().parts for path in paths]
    names: list[str] = []
    for own in parts:
        lengths = range(1, len(own) + 1)
        length = next(at for at in lengths if sum(other[-at:] == own[-at:] for other in parts) == 1)
        names.append("/".join(own[-length:]))
    return tuple(names)


def _scenarios(results: Sequence[Reported], maps: Sequence[SiteMap]) -> set[str]:
    """Return the names of the simulated scenarios without a map among ``maps``."""
    named = {str(each.scenario.get("name")) for each in results if isinstance(each, Study)}
    return named - {each.name for each in maps}


def shipped_map(name: str) -> SiteMap | None:
    """Return the map of a scenario that is shipped with detcoll, None if its sites have no positions."""
    file = resources.files("detcoll.scenarios").joinpath(f"{name}.toml")
    return parse_site_map(file.read_text(encoding="utf-8"), name, name)
