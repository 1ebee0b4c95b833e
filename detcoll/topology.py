"""Where ranks live: sites, their uplinks, and the delays between them.

A topology is plain data, the same on every rank. It fixes the grouping, and so the order in which contributions are
folded: rank order inside a site, site order between sites.

Rates count bytes of IP packets on the wire (headers included, link framing not), since that is what a shaper on the
line counts; `Topology.payload_share` is the part of them that TCP carries as payload.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec

from detcoll.errors import UsageError
from detcoll.quantities import format_rate, parse_duration_ns, parse_rate_bytes_per_s

TCP_IP_HEADER_BYTES = 52
"""IPv4 (20) and TCP with the timestamp option (32), which Linux sends on every data segment."""

LARGEST_WORLD = 65536
BRIEF_SITES = 4
"""How many sites a message names."""


@dataclass(frozen=True, slots=True)
class Site:
    """Ranks that share a fast local network and one line to the wide area.

    ``ranks`` are global ranks in rising order; rates are bytes per second on the wire, None where there is no line
    (a single cluster).
    """

    name: str
    ranks: tuple[int, ...]
    uplink_bytes_per_s: float | None = None
    downlink_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        _make_float(self, "uplink_bytes_per_s")
        _make_float(self, "downlink_bytes_per_s")


@dataclass(frozen=True, slots=True)
class Link:
    """The path between two sites: half the round trip, and by how much the way there is longer than the way back.

    ``asymmetry_ns`` is there minus back; there is from the first site to the second. ``reserved_bytes_per_s`` is what
    the carrier promised.
    """

    one_way_ns: int
    asymmetry_ns: int = 0
    reserved_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        _make_float(self, "reserved_bytes_per_s")


@dataclass(frozen=True, slots=True)
class Topology:
    """Sites in order, and the links between them by index pair (lower, higher).

    Build one with `single_site`, `uniform`, `from_file` or `parse`; all of them validate.
    """

    sites: tuple[Site, ...]
    links: tuple[tuple[tuple[int, int], Link], ...] = ()
    mtu_bytes: int = 1500

    @property
    def size(self) -> int:
        """Number of ranks in all sites."""
        return sum(len(site.ranks) for site in self.sites)

    @property
    def payload_share(self) -> float:
        """The share g of wire bytes that is TCP payload in full segments of this MTU."""
        return (self.mtu_bytes - TCP_IP_HEADER_BYTES) / self.mtu_bytes

    @property
    def digest(self) -> str:
        """A hexadecimal digest that is equal on ranks that hold the same topology."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()

    @property
    def brief(self) -> str:
        """Sites and lines in a few words, for messages."""
        names = [f"{site.name!r} of {len(site.ranks)}" for site in self.sites[:BRIEF_SITES]]
        names += ["..."] * (len(self.sites) > BRIEF_SITES)
        sites = f"{len(self.sites)} site{'s' * (len(self.sites) > 1)} for {self.size} ranks ({', '.join(names)})"
        return f"{sites} {'with' if self.is_wide else 'without'} lines"

    def site_of(self, rank: int) -> int:
        """Return the index of the site that ``rank`` is in."""
        for index, site in enumerate(self.sites):
            if rank in site.ranks:
                return index
        raise UsageError(f"rank={rank} is in no site of a topology of {self.size} ranks")

    def one_way_ns(self, source: int, destination: int) -> int:
        """Return the one-way delay from site ``source`` to site ``destination`` in nanoseconds (0 inside a site)."""
        if source == destination:
            return 0
        link = dict(self.links).get((min(source, destination), max(source, destination)))
        if link is None:  # a grouping of one cluster has no links
            return 0
        there_ns = link.one_way_ns + link.asymmetry_ns // 2
        return there_ns if source < destination else there_ns - link.asymmetry_ns

    @property
    def is_wide(self) -> bool:
        """Whether there are lines between sites; False for one site and for a mere grouping of one cluster."""
        return len(self.sites) > 1 and all(site.uplink_bytes_per_s is not None for site in self.sites)

    def reserved_bytes_per_s(self, source: int, destination: int) -> float | None:
        """Return what is reserved between two sites, the same in both directions; None where nothing is."""
        link = dict(self.links).get((min(source, destination), max(source, destination)))
        return None if link is None else link.reserved_bytes_per_s

    @property
    def has_reservations(self) -> bool:
        """Whether a rate is reserved between any two sites."""
        return any(link.reserved_bytes_per_s is not None for _, link in self.links)

    def with_reserved(self, bytes_per_s: float | None) -> Topology:
        """Return this topology with the same rate reserved on every link, or with None nothing."""
        links = tuple((ends, replace(link, reserved_bytes_per_s=bytes_per_s)) for ends, link in self.links)
        return replace(self, links=links)

    @property
    def granted(self) -> Topology:
        """The same with lines no faster than what is reserved: what plans, pacing and bounds may count on.

        A site with S - 1 links sends to all others at once, so its lines count as S - 1 times its smallest reservation.
        """
        if not self.has_reservations:
            return self
        sites = []
        for index, site in enumerate(self.sites):
            links = [self.reserved_bytes_per_s(index, other) for other in range(len(self.sites)) if other != index]
            most = (len(self.sites) - 1) * min(rate for rate in [*links, float("inf")] if rate is not None)
            up, down = (
                None if rate is None else min(rate, most)
                for rate in (site.uplink_bytes_per_s, site.downlink_bytes_per_s)
            )
            sites.append(replace(site, uplink_bytes_per_s=up, downlink_bytes_per_s=down))
        return replace(self, sites=tuple(sites))

    def as_single_cluster(self) -> Topology:
        """Return the same grouping with no lines between: the baseline that gives the same bits."""
        return Topology(tuple(Site(site.name, site.ranks) for site in self.sites), (), self.mtu_bytes)

    def restricted(self, ranks: Sequence[int]) -> Topology:
        """Return the topology of some ranks, numbered in the order given: sites that have one of them, in order.

        A site's line counts in the proportion of its ranks that are there, since the others go on using their part.
        """
        kept, sites, shares = [], [], []
        for index, site in enumerate(self.sites):
            members = tuple(number for number, rank in enumerate(ranks) if rank in site.ranks)
            if not members:
                continue
            share = len(members) / len(site.ranks)
            up, down = (
                None if rate is None else rate * share for rate in (site.uplink_bytes_per_s, site.downlink_bytes_per_s)
            )
            kept.append(index)
            shares.append(share)
            sites.append(Site(site.name, members, up, down))
        links = []
        for (low, high), link in self.links:
            if low in kept and high in kept:
                ends = kept.index(low), kept.index(high)
                reserved = link.reserved_bytes_per_s
                if reserved is not None:
                    reserved *= min(shares[end] for end in ends)
                links.append((ends, replace(link, reserved_bytes_per_s=reserved)))
        return Topology(tuple(sites), tuple(links), self.mtu_bytes)

    def placed(self, site_names: Sequence[str]) -> Topology:
        """Return this topology with rank r in the site named ``site_names[r]``.

        Raises
        ------
        UsageError
            If a name is unknown or a site gets another number of ranks than it declares.
        """
        known = {site.name for site in self.sites}
        for rank, name in enumerate(site_names):
            if name not in known:
                raise UsageError(
                    f"rank {rank} says it is in site {name!r}; the topology has {', '.join(sorted(known))}"
                )
        placed = []
        for site in self.sites:
            ranks = tuple(rank for rank, name in enumerate(site_names) if name == site.name)
            if len(ranks) != len(site.ranks):
                raise UsageError(f"site {site.name!r} declares {len(site.ranks)} ranks but {len(ranks)} are in it")
            placed.append(Site(site.name, ranks, site.uplink_bytes_per_s, site.downlink_bytes_per_s))
        return Topology(tuple(placed), self.links, self.mtu_bytes)

    @classmethod
    def single_site(cls, size: int, name: str = "local") -> Topology:
        """Return one site of ``size`` ranks with no line."""
        _require_count(size, "size")
        return cls((Site(name, tuple(range(size))),))

    @classmethod
    def uniform(
        cls,
        sites: int,
        ranks_per_site: int,
        uplink_bytes_per_s: float,
        one_way_ns: int,
        mtu_bytes: int = 1500,
    ) -> Topology:
        """Return ``sites`` equal sites, all pairs ``one_way_ns`` apart, ranks numbered site by site."""
        _require_count(sites, "sites")
        _require_count(ranks_per_site, "ranks_per_site")
        if not 0 < uplink_bytes_per_s < float("inf"):
            raise UsageError(f"uplink_bytes_per_s={uplink_bytes_per_s} must be greater than zero")
        if not isinstance(one_way_ns, int) or one_way_ns < 0:
            raise UsageError(f"one_way_ns={one_way_ns!r} must be a whole number and not negative")
        made = tuple(
            Site(f"site{i}", tuple(range(i * ranks_per_site, (i + 1) * ranks_per_site)), uplink_bytes_per_s,
                 uplink_bytes_per_s)
            for i in range(sites)
        )  # fmt: skip
        links = tuple((pair, Link(one_way_ns)) for pair in combinations(range(sites), 2))
        return _validated(cls(made, links, mtu_bytes))

    @classmethod
    def from_file(cls, path: str | Path, size: int | None = None) -> Topology:
        """Read a topology file (TOML); ``size`` is the world it must add up to.

        Raises
        ------
        UsageError
            If the file cannot be read, has unknown keys, lacks a link, or does not add up to ``size`` ranks.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"topology={str(path)!r} cannot be read: {error}") from error
        return cls.parse(text, size, name=str(path))

    @classmethod
    def parse(cls, text: str, size: int | None = None, name: str = "topology") -> Topology:
        """Parse the text of a topology file; see `from_file`."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{name} is not TOML: {error}") from error
        _only_keys(data, {"site", "link", "mtu"}, name)
        sites = _parse_sites(data.get("site"), name)
        links = _parse_links(data.get("link", []), [site.name for site in sites], name)
        mtu = data.get("mtu", 1500)
        if not isinstance(mtu, int) or isinstance(mtu, bool):
            raise UsageError(f"{name}: mtu={mtu!r} must be a whole number of bytes")
        topology = _validated(cls(sites, links, mtu), name)
        if size is not None and topology.size != size:
            raise UsageError(f"{name} declares {topology.size} ranks but the world has {size}")
        return topology

    def to_toml(self) -> str:
        """Return the text of a topology file that parses to this topology (ranks numbered site by site)."""
        lines = [f"mtu = {self.mtu_bytes}"]
        for site in self.sites:
            lines += ["", "[[site]]", f"name = {_quoted(site.name)}", f"ranks = {len(site.ranks)}"]
            if site.uplink_bytes_per_s is not None:
                lines.append(f"uplink = {_rate_text(site.uplink_bytes_per_s)}")
            if site.downlink_bytes_per_s is not None and site.downlink_bytes_per_s != site.uplink_bytes_per_s:
                lines.append(f"downlink = {_rate_text(site.downlink_bytes_per_s)}")
        for (low, high), link in self.links:
            ends = [_quoted(self.sites[index].name) for index in (low, high)]
            if link.asymmetry_ns < 0:  # a quantity has no sign; the direction has
                ends.reverse()
            lines += ["", "[[link]]", f"between = [{', '.join(ends)}]", f'one_way = "{link.one_way_ns} ns"']
            if link.asymmetry_ns:
                lines.append(f'asymmetry = "{abs(link.asymmetry_ns)} ns"')
            if link.reserved_bytes_per_s is not None:
                lines.append(f"reserved = {_rate_text(link.reserved_bytes_per_s)}")
        return "\n".join(lines) + "\n"


def _make_float(owner: Site | Link, name: str) -> None:
    """Turn a whole number into a float, so that equal topologies have equal digests."""
    value = getattr(owner, name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name}={value!r} must be a number of bytes per second")
    object.__setattr__(owner, name, float(value))


def _quoted(text: str) -> str:
    """Return a TOML basic string: JSON's, but for the one control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _rate_text(bytes_per_s: float) -> str:
    """Return a quoted rate that parses to exactly this one: in bits where that is exact, else in bytes."""
    text = format_rate(bytes_per_s)
    return f'"{text}"' if parse_rate_bytes_per_s(text) == bytes_per_s else f'"{bytes_per_s!r} B/s"'


def _require_count(value: object, name: str, context: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_WORLD:
        raise UsageError(f"{context}{name}={value!r} must be a whole number from 1 to {LARGEST_WORLD}")
    return value


def _only_keys(table: dict[str, Any], allowed: set[str], name: str) -> None:
    unknown = sorted(set(table) - allowed)
    if unknown:
        raise UsageError(f"{name} has unknown keys {', '.join(unknown)}; expected {', '.join(sorted(allowed))}")


def _tables(value: object, key: str, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UsageError(f"{name} needs tables of the form [[{key}]]")
    return value


def _text(table: dict[str, Any], key: str, context: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{context}: {key}={value!r} must be a non-empty string")
    return value


def _parse_sites(value: object, name: str) -> tuple[Site, ...]:
    tables = _tables(value, "site", name)
    if not tables:
        raise UsageError(f"{name} has no [[site]]")
    sites: list[Site] = []
    first = 0
    for index, table in enumerate(tables):
        context = f"{name}, site {index}"
        _only_keys(table, {"name", "ranks", "uplink", "downlink"}, context)
        site_name = _text(table, "name", context)
        count = _require_count(table.get("ranks"), "ranks", f"{context}: ")
        up = parse_rate_bytes_per_s(table["uplink"], f"{context}: uplink") if "uplink" in table else None
        down = parse_rate_bytes_per_s(table["downlink"], f"{context}: downlink") if "downlink" in table else up
        if len(tables) > 1 and up is None:
            raise UsageError(f"{context} ({site_name!r}) has no uplink; sites of a wide-area topology need one")
        sites.append(Site(site_name, tuple(range(first, first + count)), up, down))
        first += count
    return tuple(sites)


def _parse_links(value: object, names: list[str], name: str) -> tuple[tuple[tuple[int, int], Link], ...]:
    links: dict[tuple[int, int], Link] = {}
    for index, table in enumerate(_tables(value, "link", name)):
        context = f"{name}, link {index}"
        _only_keys(table, {"between", "one_way", "asymmetry", "reserved"}, context)
        between = table.get("between")
        if not isinstance(between, list) or len(between) != 2 or between[0] == between[1]:
            raise UsageError(f"{context}: between={between!r} must name two different sites")
        for end in between:
            if end not in names:
                raise UsageError(f"{context}: between names {end!r}; the sites are {', '.join(names)}")
        one_way_ns = parse_duration_ns(_text(table, "one_way", context), f"{context}: one_way")
        asymmetry_ns = parse_duration_ns(table["asymmetry"], f"{context}: asymmetry") if "asymmetry" in table else 0
        reserved = parse_rate_bytes_per_s(table["reserved"], f"{context}: reserved") if "reserved" in table else None
        source, destination = names.index(between[0]), names.index(between[1])
        if source > destination:
            source, destination, asymmetry_ns = destination, source, -asymmetry_ns
        if (source, destination) in links:
            raise UsageError(f"{context}: the link between {between[0]!r} and {between[1]!r} is given twice")
        if abs(asymmetry_ns) > 2 * one_way_ns:
            raise UsageError(f"{context}: asymmetry={table['asymmetry']!r} exceeds the round trip")
        links[source, destination] = Link(one_way_ns, asymmetry_ns, reserved)
    return tuple(sorted(links.items()))


def _validated(topology: Topology, name: str = "topology") -> Topology:
    names = [site.name for site in topology.sites]
    if len(set(names)) != len(names):
        raise UsageError(f"{name} has two sites of one name: {', '.join(sorted(names))}")
    if topology.size > LARGEST_WORLD:
        raise UsageError(f"{name} declares {topology.size} ranks; expected at most {LARGEST_WORLD}")
    if not 576 <= topology.mtu_bytes <= 65535:
        raise UsageError(f"{name}: mtu={topology.mtu_bytes} must be from 576 to 65535 bytes")
    if len(names) > 1:
        present = {pair for pair, _ in topology.links}
        missing = [pair for pair in combinations(range(len(names)), 2) if pair not in present]
        if missing:
            shown = ", ".join(f"{names[low]} - {names[high]}" for low, high in missing[:4])
            raise UsageError(f"{name} lacks {len(missing)} links: {shown}{', ...' if len(missing) > 4 else ''}")
    return topology
