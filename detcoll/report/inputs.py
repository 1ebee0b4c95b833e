"""The inputs of a report, and how they are found in files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from detcoll.draw import RankTrace, read_rank_traces
from detcoll.draw.timespace import OneWay
from detcoll.draw.traces import TRACE_SCHEMA
from detcoll.errors import UsageError
from detcoll.report.reported import (
    Reported,
    SiteMap,
    parse_site_map,
    read_result,
    read_site_map,
    schema_of,
)
from detcoll.scenarios import Study, shipped
from detcoll.topology import Topology

RESULTS, TRACES, TOPOLOGY = "results.json", "traces", "topology.toml"
"""Files that `detcoll measure --report` writes beside the page; the folder of traces has one folder for each run."""


@dataclass(frozen=True, slots=True)
class TracedRun:
    """The traces of the ranks of one run, and the name of the run."""

    name: str
    traces: tuple[RankTrace, ...]


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """The inputs of a report; ``topology`` supplies names and delays of the sites in traces."""

    results: tuple[Reported, ...] = ()
    traced: tuple[TracedRun, ...] = ()
    maps: tuple[SiteMap, ...] = ()
    topology: Topology | None = None

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
    """Read result files, traces, TOML files with positions of sites, and folders of these.

    Parameters
    ----------
    paths : sequence of Path
        From a folder, ``results.json``, ``topology.toml`` and all ``rank*.json`` in it and below are read. Traces in
        one folder belong to one run.
    topology : Path, optional
        A topology file, which supplies names and delays of the sites; one in a folder takes precedence.

    Raises
    ------
    UsageError
        If a file does not exist, cannot be read, or is none of these.
    """
    results: list[Reported] = []
    maps: list[SiteMap] = []
    traces: dict[Path, list[Path]] = {}
    for path in paths:
        if path.is_dir():
            topology = _gather_folder(path, results, traces) or topology
        elif path.suffix.lower() == ".toml":
            maps.append(read_site_map(path))
        elif _schema_of(path) == TRACE_SCHEMA:
            traces.setdefault(path.resolve().parent, []).append(path)
        else:
            results.append(read_result(path))
    traced = tuple(TracedRun(folder.name, read_rank_traces(files)) for folder, files in traces.items())
    maps += [shipped_map(each) for each in shipped() if each in _scenarios(results, maps)]
    return ReportInputs(tuple(results), traced, tuple(maps), None if topology is None else Topology.from_file(topology))


def _gather_folder(folder: Path, results: list[Reported], traces: dict[Path, list[Path]]) -> Path | None:
    """Add the results and traces in a folder; return its topology file, None if there is none."""
    result, topology = folder / RESULTS, folder / TOPOLOGY
    ranks = sorted(folder.rglob("rank*.json"))
    if not result.is_file() and not ranks:
        raise UsageError(f"folder={str(folder)!r} contains neither {RESULTS} nor rank*.json")
    if result.is_file():
        results.append(read_result(result))
    for path in ranks:
        traces.setdefault(path.resolve().parent, []).append(path)
    return topology if topology.is_file() else None


def _schema_of(path: Path) -> str:
    try:
        return schema_of(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"file={str(path)!r} cannot be read: {error.strerror}") from error


def _scenarios(results: Sequence[Reported], maps: Sequence[SiteMap]) -> set[str]:
    """Return the names of the simulated scenarios without a map among ``maps``."""
    named = {str(each.scenario.get("name")) for each in results if isinstance(each, Study)}
    return named - {each.name for each in maps}


def shipped_map(name: str) -> SiteMap:
    """Return the map of a scenario that is shipped with detcoll."""
    file = resources.files("detcoll.scenarios").joinpath(f"{name}.toml")
    return parse_site_map(file.read_text(encoding="utf-8"), name, name)
