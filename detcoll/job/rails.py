"""Groups whose sites reduce on their devices, by NCCL: which they are, and the plans of their calls.

With DETCOLL_NCCL, an all-reduce of arrays on devices is one of these if the sites of its group have equal sizes of at
least two ranks, and NCCL keeps what is promised of its operator and type (`detcoll.runtime.onsite.takes`). That depends
on nothing but what ranks compare.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from detcoll.device import DeviceBuffer, driver, nccl
from detcoll.errors import UsageError
from detcoll.job.job import Job
from detcoll.plan import Calendar, Collective, Plan, Planner, Slotting, build_calendar
from detcoll.plan.rails import railed
from detcoll.runtime import Group
from detcoll.runtime.onsite import OnSite, takes
from detcoll.topology import Topology
from detcoll.types import ReduceOp

LARGEST_KEPT_PLANS = 256

library: Callable[[], nccl.Library] = nccl.load
"""Returns NCCL in this process."""


class Rails:
    """The calls of a group that NCCL takes part in.

    ``onsite`` : the devices of this rank's site.

    Parameters
    ----------
    job : Job
        Carries out the calls.
    group : Group
        With sites of equal size.
    topology : Topology
        Of the group, see `detcoll.job.caller.Caller`.
    rank : int
        This rank's number in the group.
    calendar : Calendar
        Of the group.
    """

    def __init__(self, job: Job, group: Group, topology: Topology, rank: int, calendar: Calendar) -> None:
        sites, here = topology.sites, topology.site_of(rank)
        self._rank, self._mates, self._sites = rank, sites[here].ranks, len(sites)
        self._members = [site.ranks[self._mates.index(rank)] for site in sites]
        self._planner = _planner(topology.restricted(self._members), here, calendar, job) if len(sites) > 1 else None
        self.plan: Callable[[Collective, int], Plan] = lru_cache(LARGEST_KEPT_PLANS)(self._plan_now)
        """Returns this rank's plan of a collective, in which its share has so many elements."""
        own, mates = job.session.rank, [group.ranks[mate] for mate in self._mates]

        def meet(payload: bytes, deadline_ns: int) -> list[bytes]:
            return job.session.exchange(f"nccl {group.id:016x}", payload, deadline_ns, mates)

        def failed(error: Exception) -> None:
            job.loop.note(lambda now_ns: job.loop.engine.failures.fail_group(group, error, now_ns))

        self.onsite = OnSite(mates, own, self._sites, driver, lambda: library(), meet, failed)
        job.loop.ask(lambda now_ns: job.loop.engine.bind(group))

    @classmethod
    def of(cls, job: Job, group: Group, topology: Topology, rank: int, calendar: Calendar) -> Rails | None:
        """Return the rails of a group, or None if NCCL has no part in its calls."""
        sizes = {len(site.ranks) for site in topology.sites}
        if not job.settings.nccl or len(sizes) > 1 or sizes == {1}:
            return None
        rails = cls(job, group, topology, rank, calendar)
        job.keep_onsite(group, rails.onsite)
        return rails

    def take(self, kind: str, op: ReduceOp, dtype: np.dtype[Any], buffer: DeviceBuffer | None) -> bool:
        """Tell whether NCCL takes part in a call; reads nothing that ranks do not compare."""
        return kind == "all_reduce" and buffer is not None and takes(op, dtype.name, len(self._mates), self._sites)

    def _plan_now(self, collective: Collective, share: int) -> Plan:
        rail = None
        if self._planner is not None:
            of_share = Collective(collective.kind, share, collective.itemsize, collective.accumulator_itemsize)
            rail = self._planner.plan(of_share, device_out=True)
        return railed(rail, collective, self._rank, self._members, self._mates)


def _planner(topology: Topology, here: int, calendar: Calendar, job: Job) -> Planner:
    mode = Slotting.OFF if calendar.mode is Slotting.OFF else Slotting.SHARE
    return Planner(topology, here, build_calendar(topology, mode), job.costs)


def check_sites(topology: Topology) -> None:
    """Raise unless sites have equal sizes, so that every rank has one of its number in each site.

    Raises
    ------
    UsageError
        If sizes differ.
    """
    sizes = [len(site.ranks) for site in topology.sites]
    if len(set(sizes)) > 1:
        raise UsageError(f"DETCOLL_NCCL=1 needs sites of equal size; those of the topology have {sizes} ranks")
