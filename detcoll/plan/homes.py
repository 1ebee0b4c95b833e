"""Which sites fold chunks for all others.

Where one site folds a chunk and sends the result to the others, it sends S - 1 results and takes S - 1 contributions,
while another site sends and takes one. With h_i of all chunks at home in site i, the flow from i to j carries (h_i +
h_j) V bytes of an all-reduce of V bytes. Sites with equal lines share the homes evenly, and every flow ends at the same
time. A site whose line is much slower should be home of none: the others wait for each result that it sends.

Tried is each number k of homes, on the k sites that may send most, with 1/k of the chunks at each. Windows are as long
as flows with even homes need them, so there all sites stay homes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from detcoll.plan.calendar import Calendar
from detcoll.plan.collectives import Homes, Hop
from detcoll.plan.lines import Floats

WORTH_FEWER = 0.97
"""Fewer homes must make the last flow end before this part of the time with all sites: they fold more each."""


def home_sites(hops: tuple[Hop, ...], calendar: Calendar, sites: int) -> tuple[int, ...]:
    """Return the sites that should be homes, in order; empty for all of them.

    Parameters
    ----------
    hops : tuple of Hop
        What an algorithm sends between sites.
    calendar : Calendar
        Its rates say what a flow between two sites gets.
    sites : int
        How many there are.
    """
    if sites < 3 or calendar.has_windows or not any(calendar.rates) or all(hop.homes is Homes.ALL for hop in hops):
        return ()
    rates = np.array(calendar.rates, dtype=np.float64).reshape(sites, sites)
    flows = [(np.zeros((sites, sites)), hop.homes) for hop in hops]
    for (pairs, _), hop in zip(flows, hops, strict=True):
        pairs[tuple(np.array(hop.pairs).T)] = 1
    fastest_first = np.argsort(-rates.sum(axis=1), kind="stable")
    taken, least = tuple[int, ...](), _longest(flows, rates, fastest_first) * WORTH_FEWER
    for count in range(sites - 1, 0, -1):
        homes = fastest_first[:count]
        longest = _longest(flows, rates, homes)
        if longest < least:
            taken, least = tuple(sorted(homes.tolist())), longest
    return taken


def _longest(flows: list[tuple[Floats, Homes]], rates: Floats, homes: NDArray[np.int64]) -> float:
    """Return the time of the flow that ends last, for each byte of the array.

    ``flows`` : of each hop, 1 for each pair of sites that sends, and of which chunks.
    """
    share = np.zeros(len(rates))
    share[homes] = 1 / len(homes)
    parts = {Homes.ALL: np.ones((1, 1)), Homes.SOURCE: share[:, None], Homes.DESTINATION: share[None, :]}
    sent = np.zeros_like(rates)
    for pairs, which in flows:
        sent += pairs * parts[which]
    return float(np.divide(sent, rates, out=np.zeros_like(rates), where=rates > 0).max())
