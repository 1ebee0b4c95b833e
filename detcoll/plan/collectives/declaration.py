"""The form in which a kind of collective is declared.

A declaration holds all that is particular to the kind. The planner, the checker, the floor and the prediction read it,
and ask no kind for its name. A file of this package makes one, and `detcoll.plan.collectives` makes it known.

The wide stage of an algorithm is stated as `Hop`s, one after another. From them follow how many one-way delays pass
(`Algorithm.delays`). Of algorithms that cut one array, so do how much an uplink carries (`Algorithm.uplink_share`) and
when the stage ends (`detcoll.plan.predict`). Of those that move blocks, both follow from what moves
(`detcoll.plan.collectives.legs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.errors import UsageError
from detcoll.plan.collectives.blocks import Blocks
from detcoll.plan.collectives.part import Part
from detcoll.plan.ir import Collective
from detcoll.plan.symbols import Symbols
from detcoll.signature import Signature, signature_of
from detcoll.topology import Topology

Floats = NDArray[np.float64]


class Homes(Enum):
    """Which chunks two sites exchange in a hop."""

    ALL = "all"
    SOURCE = "those whose home is the site that sends"
    DESTINATION = "those whose home is the site that receives"


@dataclass(frozen=True, slots=True)
class Hop:
    """Messages between owners that leave together, each chunk as soon as its owner has it from the hop before.

    ``pairs`` : the sites that send and receive.  ``homes`` : of the chunks that they exchange.
    ``folds`` : receivers fold what they get.  ``accumulated`` : it is in the accumulation type.
    ``from_user`` : it is sent from the caller's array, which therefore waits for the acknowledgement.
    ``behind`` : the number of an earlier hop whose messages leave on the same lines before.
    """

    pairs: tuple[tuple[int, int], ...]
    homes: Homes = Homes.ALL
    folds: bool = False
    accumulated: bool = False
    from_user: bool = False
    behind: int | None = None


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to do a collective between sites.

    ``name`` : the name by which a caller selects it.
    ``add_chunk`` : adds one rank's steps for a chunk, or for a piece of a block.
    ``hops`` : of the wide stage, by the number of sites and the site of the root.
    ``owner_work`` : by the number of sites, the steps of a chunk's owner in the wide stage and how often it reads or
    writes the chunk for them. Unused with blocks.
    ``accumulates`` : it keeps and sends sums in the accumulation type.
    ``blocks`` : what moves, where input and output are different arrays; None where one array is cut into chunks.
    ``at_home`` : pieces are folded in sites other than the root's, in turn; see `detcoll.plan.collectives.routes`.
    ``awaits`` : owners hold scratch for pieces that they await from other sites besides those that they send.
    """

    name: str
    add_chunk: Callable[[Part, Any, Collective], None]
    hops: Callable[[int, int], tuple[Hop, ...]]
    owner_work: Callable[[int], tuple[float, float]] = lambda sites: (0, 0)
    accumulates: bool = False
    blocks: Blocks | None = None
    at_home: bool = False
    awaits: bool = False

    def delays(self, sites: int) -> int:
        """Return how many one-way delays pass until every site has its result."""
        return len(self.hops(sites, 0))

    def uplink_share(self, sites: int, root_site: int = 0) -> Fraction:
        """Return the most that leaves one of ``sites``, as a multiple of the array's size V."""
        sent = [Fraction(0)] * sites
        for hop in self.hops(sites, root_site):
            for source, _ in hop.pairs:
                sent[source] += 1 if hop.homes is Homes.ALL else Fraction(1, sites)
        return max(sent)


@dataclass(frozen=True, slots=True)
class Load:
    """What falls to each rank of a collective that is cut into chunks; arrays are by rank.

    ``chunks``, ``nbytes`` : of the whole array.  ``owned_chunks``, ``owned_bytes`` : what a rank owns of it.
    ``peers`` : how many others its site has.
    """

    sites: int
    chunks: float
    nbytes: float
    owned_chunks: Floats
    owned_bytes: Floats
    peers: Floats


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of an array, one after another: ``length`` of them, whose expression is ``expression``.

    ``element`` : the number of the first one. Elements of different arrays that are folded have the same number.
    """

    expression: int
    element: int
    length: int


Content = Callable[[Symbols, Collective, Topology, int], list[Run]]
"""States what a rank's array holds, from its first element to its last."""


def contribution(symbols: Symbols, collective: Collective, topology: Topology, rank: int) -> list[Run]:
    """Return what ``rank`` contributes."""
    return [Run(symbols.leaf(rank), 0, collective.count)]


def one_array(collective: Collective, size: int, rank: int) -> tuple[int, int]:
    """Return the elements of input and output of a collective that works on one array, in place."""
    return 0, collective.count


def never_in_place(collective: Collective, size: int, rank: int) -> None:
    """Tell that input and output may share no memory."""


def no_work(load: Load, algorithm: Algorithm, opening: bool) -> tuple[Floats, Floats]:
    """Return nothing: the work for blocks follows from what moves."""
    return 0 * load.peers, 0 * load.peers


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration(Signature):
    """A kind of collective.

    ``algorithms`` : by rising number of one-way delays; the first is the default.
    ``before`` : what a rank's input holds when it calls; its only array, if it has one.
    ``after`` : what its output must end with: the promise that the checker proves.
    ``floor_ns`` : the least time that any schedule takes on a topology with lines.
    ``work`` : given (load, algorithm, opening), the steps of each rank's host and the bytes that it reads or writes: of
    the opening alone if ``opening``, else of the whole collective. Unused with blocks.
    ``elems`` : the elements of a rank's input and output, for the number of ranks and a rank; of one array, (0, n).
    ``in_place`` : where input and output may lie in one array; None where they may share no memory.
    """

    algorithms: tuple[Algorithm, ...]
    after: Content
    floor_ns: Callable[[Topology, Collective], float]
    work: Callable[[Load, Algorithm, bool], tuple[Floats, Floats]] = no_work
    before: Content = contribution
    elems: Callable[[Collective, int, int], tuple[int, int]] = one_array
    in_place: Callable[[Collective, int, int], tuple[int, int] | None] = never_in_place

    @property
    def has_one_array(self) -> bool:
        """Whether input and output are always the same array."""
        return self.elems is one_array

    def algorithm(self, name: str) -> Algorithm:
        """Return the algorithm of that name.

        Raises
        ------
        UsageError
            If it does not do this kind of collective.
        """
        for algorithm in self.algorithms:
            if algorithm.name == name:
                return algorithm
        known = ", ".join(algorithm.name for algorithm in self.algorithms)
        raise UsageError(f"algorithm={name!r} does not do {self.name}; expected one of {known}")


def declaration_of(kind: str) -> Declaration:
    """Return the declaration of ``kind``.

    Raises
    ------
    UsageError
        If no collective has that name.
    """
    declared = signature_of(kind)
    assert isinstance(declared, Declaration)
    return declared


def algorithms_for(kind: str) -> tuple[str, ...]:
    """Return the names of the algorithms that do ``kind``.

    Raises
    ------
    UsageError
        If no collective has that name.
    """
    return tuple(algorithm.name for algorithm in declaration_of(kind).algorithms)


def promised_ranks(kind: str, topology: Topology, rank: int, root: int = 0) -> list[int]:
    """Return the ranks whose contributions ``rank`` ends with, in fold order.

    Raises
    ------
    UsageError
        If no collective has the name ``kind``.
    """
    symbols, single = Symbols(), Collective(kind, 1, 1, 1, root)
    return [
        r
        for run in declaration_of(kind).after(symbols, single, topology, rank)
        for r in symbols.ranks_in(run.expression)
    ]


def all_pairs(sites: int) -> tuple[tuple[int, int], ...]:
    """Return all ordered pairs of sites."""
    return tuple((here, there) for here in range(sites) for there in range(sites) if here != there)


def longest_delay_ns(topology: Topology) -> int:
    """Return the longest one-way delay between two sites."""
    return max(topology.one_way_ns(i, j) for i, j in all_pairs(len(topology.sites)))
