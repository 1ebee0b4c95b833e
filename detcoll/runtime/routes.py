"""Whom a rank reaches through what, and whom it compares its calls with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detcoll.transport import Endpoint


@dataclass(frozen=True, slots=True)
class Routes:
    """Which endpoint leads to which rank, and in which site it is. ``wide`` are those behind the line."""

    endpoint_of: Mapping[int, Endpoint]
    site_of: Sequence[int]
    wide: frozenset[int]

    @property
    def endpoints(self) -> list[Endpoint]:
        """Every endpoint once."""
        return list(dict.fromkeys(self.endpoint_of.values()))


def acquaintances(rank: int, site_of: Sequence[int]) -> set[int]:
    """Return with whom ``rank`` compares every call: the last rank of its site, which knows its site and its likes.

    They connect all ranks, so two that called differently are found whatever they called. Plans of small arrays move
    them between the last ranks, and plans of large ones between all of a site, so hardly a message is made for this.
    """
    last = {site: member for member, site in enumerate(site_of)}
    here = site_of[rank]
    if last[here] != rank:
        return {last[here]}
    sites = sorted(last)
    at = sites.index(here)
    neighbours = {last[sites[at - 1]], last[sites[(at + 1) % len(sites)]]}
    return {member for member, site in enumerate(site_of) if site == here} ^ {rank} | neighbours - {rank}
