"""What limited a row: the lines that it is about, or the lab that plays them.

The lab shares one machine with the ranks, so it can be the limit itself. Three parts of it can:

- **The router**, where it had no time left in more than a tenth of the measured time (it then had a core or waited for
  one for 90 % of each 20 ms), or handed units over later in the mean than a tenth of the shortest one-way delay.
- **The processors**, where they were busy for 90 % of the measured time, or a container's quota of them ran out in more
  than a tenth of it. Of training also where there are more ranks than cores and those were so busy in the single
  cluster: computing then takes as long as the cores need, not as long as ranks need, so the lines have more time beside
  it than they would have elsewhere.
- **The baseline**, the single cluster that efficiencies are compared with: `doubts`.

A row that reaches nine tenths of its floor was limited by its lines, however busy the rest was. So each threshold lets
a tenth pass: what the lab adds below it costs a row about that much at most. docs/lab.md has the measurements.

What would fit is an estimate, on the safe side. The router's work is in units, and the kernel cuts a paced flow into
units of a millisecond, of two segments at least and of half a millisecond of the site's line at most. So up to some 25
Mbit/s a flow, fewer bytes are fewer units; beyond that, only fewer flows are, up to the largest unit. Some work does
not shrink with the rate (probes, waking up), so 0.4 of what was borne is taken, and no rate below a twentieth is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from detcoll.measure.load import Load
from detcoll.measure.results import Limit, LimitKind, Run
from detcoll.quantities import format_count, format_duration, format_rate
from detcoll.topology import Topology

LINES_SHARE = 0.9
MOST_FULL = 0.1
MOST_LATE = 0.1
MOST_BUSY = 0.9
MOST_STOPPED = 0.1
MOST_OF_OTHERS = 0.1
LARGEST_ARITHMETIC_RATIO = 1.01
LARGEST_UNEVENNESS = 1.5
LARGEST_MOVE = 1.25
LARGEST_EFFICIENCY = 1.005
"""What is shown as 100 %."""

_MARGIN = 0.4
_SHARES = tuple(percent / 100 for percent in range(99, 4, -1))
_PACED_S, _UNIT_S, _LARGEST_UNIT_BYTES = 1e-3, 5e-4, 65_536


@dataclass(frozen=True, slots=True)
class Scale:
    """How much a lab has to carry; of sites that differ, the largest. ``has_one_rate`` : all sites have the same."""

    sites: int
    ranks_per_site: int
    rate_bytes_per_s: float
    one_way_s: float
    mtu_bytes: int
    has_one_rate: bool = True

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.sites * self.ranks_per_site

    @property
    def units_per_s(self) -> float:
        """Data units that the router has to carry in a second where all lines are full."""
        flows = self.ranks_per_site * (self.sites - 1)
        largest = min(self.rate_bytes_per_s * _UNIT_S, _LARGEST_UNIT_BYTES)
        unit_bytes = max(min(self.rate_bytes_per_s / flows * _PACED_S, largest), 2.0 * self.mtu_bytes)
        return self.sites * self.rate_bytes_per_s / unit_bytes


def scale_of(topology: Topology) -> Scale:
    """Return what a lab of ``topology`` has to carry."""
    rates = {site.uplink_bytes_per_s or 0.0 for site in topology.sites}
    return Scale(
        sites=len(topology.sites),
        ranks_per_site=max(len(site.ranks) for site in topology.sites),
        rate_bytes_per_s=max(rates),
        one_way_s=min((link.one_way_ns for _, link in topology.links), default=0) / 1e9,
        mtu_bytes=topology.mtu_bytes,
        has_one_rate=len(rates) == 1,
    )


def limits_of_row(fraction_of_bound: float | None, load: Load, scale: Scale) -> tuple[Limit, ...] | None:
    """Return what of the lab limited a collective; nothing where it reached what its lines allow.

    None where that is not known, since the system did not tell how busy it was, or not for so short a time.
    """
    if fraction_of_bound is not None and fraction_of_bound >= LINES_SHARE:
        return ()
    reached = 0.5 if fraction_of_bound is None else fraction_of_bound
    found = (*_router(load, scale, reached), *_processors(load, scale, _fitting_cores(load, scale, reached)))
    return found if found or load.processors_share is not None else None


def limits_of_run(load: Load, baseline: Load | None, scale: Scale, *, computes: bool) -> tuple[Limit, ...]:
    """Return what of the lab limited a run across sites; ``computes`` unless its ranks wait instead of computing.

    ``baseline`` is the load of the single cluster, None where the run is that itself.
    """
    found = _router(load, scale, 0.5) if baseline is not None else ()
    fits = _fitting_ranks(load, scale) if computes else _fitting_cores(load, scale, 0.5)
    crowded = baseline is not None and scale.ranks > baseline.whole_cores and _is_busy(baseline)
    own = _processors(load, scale, fits) if baseline is not None or scale.ranks > load.whole_cores else ()
    if own or not crowded or baseline is None:
        return (*found, *own)
    if _ran_out(baseline):
        how = f"{_quota(baseline)}, which ran out in {baseline.quota_out_share:.0%} of the time"
    else:
        how = f"{_cores(baseline.cores)}, {baseline.processors_share:.0%} busy"
    why = f"{scale.ranks} ranks compute on {how} in one cluster"
    return (*found, Limit(LimitKind.PROCESSORS, why, fits))


def _router(load: Load, scale: Scale, reached: float) -> tuple[Limit, ...]:
    full, late_s = load.router_full_share or 0.0, load.router_late_s or 0.0
    why = ""
    if full > MOST_FULL:
        why = f"the router had no time left in {full:.0%} of the measured time"
    elif scale.one_way_s and late_s > MOST_LATE * scale.one_way_s:
        share = late_s / scale.one_way_s
        why = f"the router was {format_duration(late_s * 1e9)} late in the mean, {share:.0%} of the one-way delay"
    if not why:
        return ()
    borne = _MARGIN * reached / max(load.router_share or 1.0, 0.1)
    return (Limit(LimitKind.ROUTER, why, _fitting(scale, lambda it: it.units_per_s <= borne * scale.units_per_s)),)


def _processors(load: Load, scale: Scale, fits: str) -> tuple[Limit, ...]:
    if not _is_busy(load):
        return ()
    who = f"{scale.ranks} ranks and the router" if load.router_share is not None else f"{scale.ranks} ranks"
    whys = []
    if _are_full(load):
        busy = f"{_cores(load.cores)} were {load.processors_share:.0%} busy"
        taken = load.others_share or 0.0
        whys.append(
            f"{busy} with {who}" if taken <= MOST_OF_OTHERS else f"{busy}, {taken:.0%} with programs other than {who}"
        )
        if taken > MOST_OF_OTHERS:
            fits = f"a quiet machine, and {fits}" if scale.ranks > load.whole_cores else "a quiet machine"
    if _ran_out(load):
        whys.append(f"{_quota(load)} ran out in {load.quota_out_share:.0%} of the measured time with {who}")
    return (Limit(LimitKind.PROCESSORS, "; ".join(whys), fits),)


def _is_busy(load: Load) -> bool:
    return _are_full(load) or _ran_out(load)


def _are_full(load: Load) -> bool:
    return load.processors_share is not None and load.processors_share >= MOST_BUSY


def _ran_out(load: Load) -> bool:
    return (load.quota_out_share or 0.0) > MOST_STOPPED


def _quota(load: Load) -> str:
    return f"a container's quota of {load.quota_cores:.3g} core{'s' if load.quota_cores != 1 else ''}"


def _fitting_cores(load: Load, scale: Scale, reached: float) -> str:
    """Return what fits where ranks send and fold: a core each; between two sites, of one flow a rank, fewer bytes."""
    borne = _MARGIN * reached * scale.rate_bytes_per_s if scale.sites == 2 else 0.0
    fits = _fitting(
        scale, lambda it: it.rate_bytes_per_s <= borne or it.ranks <= min(load.whole_cores, scale.ranks - 1)
    )
    return ", or ".join(filter(None, (fits, _cores(scale.ranks + 1))))


def _fitting_ranks(load: Load, scale: Scale) -> str:
    """Return what fits where ranks compute: a core each, and one for the router where that was not enough."""
    most = load.whole_cores if scale.ranks > load.whole_cores else load.whole_cores - 1
    fits = _fitting(scale, lambda it: it.ranks <= most)
    return ", or ".join(filter(None, (fits, _cores(scale.ranks + 1), "a workload that waits instead of computing")))


def _fitting(scale: Scale, fits: Callable[[Scale], bool]) -> str:
    """Return in words the largest rate, number of sites and number of ranks that fit, each on its own."""
    slower = [(share, replace(scale, rate_bytes_per_s=share * scale.rate_bytes_per_s)) for share in _SHARES]
    words = [_rate(scale, share) for share, it in slower if fits(it)][:1]
    fewer_sites = [replace(scale, sites=count) for count in range(scale.sites - 1, 1, -1)]
    words += [f"{it.sites} sites" for it in fewer_sites if fits(it)][:1]
    fewer_ranks = [replace(scale, ranks_per_site=count) for count in range(scale.ranks_per_site - 1, 0, -1)]
    words += [f"{format_count(it.ranks_per_site, 'rank')} a site" for it in fewer_ranks if fits(it)][:1]
    return " or ".join(words)


def _rate(scale: Scale, share: float) -> str:
    if not scale.has_one_rate:
        return f"lines at {share:.0%} of their rates"
    return f"lines of {format_rate(float(f'{share * scale.rate_bytes_per_s * 8:.2g}') / 8)}"


def _cores(count: int) -> str:
    return format_count(count, "core")


def doubts(runs: Sequence[Run]) -> list[str]:
    """Return why the efficiencies of ``runs`` may be no good: what is wrong with the single cluster, their first."""
    if not runs or runs[0].is_wide:
        return []
    found, baseline = _own_doubts(runs[0]), runs[0]
    taken = _others_share(baseline)
    for run in runs[1:]:
        if (beside := _others_share(run)) - taken > MOST_OF_OTHERS >= taken:
            found.append(
                f"other programs took {taken:.0%} of the processors beside it and {beside:.0%} beside {run.name}"
            )
    faster = [f"{run.name} ({run.efficiency:.0%})" for run in runs[1:] if (run.efficiency or 0.0) > LARGEST_EFFICIENCY]
    if faster:
        found.append(f"slower than {', '.join(faster)}, though lines make nothing faster")
    return found


def _own_doubts(baseline: Run) -> list[str]:
    """Return what is wrong with the single cluster, without a look at the others."""
    found, iteration_s, ratio = [], baseline.iteration_s, baseline.arithmetic_ratio
    if ratio is not None and ratio > LARGEST_ARITHMETIC_RATIO:
        found.append(f"its median lies {100 * (ratio - 1):.1f} % above its own arithmetic")
    if (unevenness := iteration_s.p99 / iteration_s.median) > LARGEST_UNEVENNESS:
        found.append(f"its p99 is {unevenness:.1f} times its median")
    if (times := baseline.round_s) and max(times) > LARGEST_MOVE * min(times):
        low, high = (format_duration(value * 1e9) for value in (min(times), max(times)))
        found.append(f"its median was {low} in one round and {high} in another")
    if (taken := _others_share(baseline)) > MOST_OF_OTHERS:
        found.append(f"other programs took {taken:.0%} of the processors beside it")
    return found


def _others_share(run: Run) -> float:
    return (run.load.others_share if run.load is not None else None) or 0.0


def with_doubts(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Return ``runs`` with the baseline among the limits of those that are compared with it, where it is in doubt."""
    if not (found := doubts(runs)):
        return tuple(runs)
    limit = Limit(LimitKind.BASELINE, f"the single cluster is in doubt: {found[0]}", "a quiet machine, or more rounds")
    return tuple(replace(run, limits=(*(run.limits or ()), limit)) if run.is_wide else run for run in runs)


def limit_word(limits: Sequence[Limit] | None, fraction_of_bound: float | None = None) -> str | None:
    """Return what limited a row, in a word or two for a table; None where nobody looked.

    Without a floor to hold it against, lines and transport are not told apart.
    """
    if limits is None:
        return None
    if limits:
        return ", ".join(limit.by.value for limit in limits)
    if fraction_of_bound is None:
        return "lines or transport"
    return "lines" if fraction_of_bound >= LINES_SHARE else "transport"


def limit_of_run(run: Run) -> str | None:
    """Return what limited a run of `detcoll measure`, in words; None where nobody looked, or for one cluster."""
    return limit_word(run.limits) if run.is_wide or run.limits else None
