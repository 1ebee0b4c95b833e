"""Declarations: every reader knows a kind by what it declares, and none by its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import detcoll
from detcoll.bench.sweep import Sweep
from detcoll.descriptor import Descriptor
from detcoll.errors import PlanError, UsageError
from detcoll.plan import ChunkSize, Collective, Phase, Planner, build_calendar, check, floor_ns, promised_ranks
from detcoll.plan.collectives import Algorithm, Declaration, Hop, Part, Run, declaration_of
from detcoll.plan.ir import Buffer
from detcoll.plan.layout import Chunk
from detcoll.signature import DECLARED, declare, signature_of
from detcoll.sim import simulate
from detcoll.testing.plans import all_parts, sites_of

ROOM = Path(detcoll.__file__).parent


def _shout_chunk(part: Part, chunk: Chunk, collective: Collective) -> None:
    """The root sends the chunk to every rank; nobody passes it on."""
    span, root_site = (Buffer.OUT, chunk.offset), part.topology.site_of(collective.root)
    if part.rank != collective.root:
        wide = part.site != root_site
        part.builder.recv(Phase.WIDE_GATHER, collective.root, chunk.number, span, chunk.length, wide=wide)
        return
    for rank in range(part.topology.size):
        if rank != part.rank:
            wide = part.topology.site_of(rank) != root_site
            part.builder.send(Phase.WIDE_GATHER, rank, chunk.number, span, chunk.length, [], wide=wide)


def _shout_hops(sites: int, root_site: int) -> tuple[Hop, ...]:
    return (Hop(tuple((root_site, other) for other in range(sites) if other != root_site), from_user=True),)


SHOUT = Declaration(
    name="shout",
    has_root=True,
    algorithms=(Algorithm("loud", _shout_chunk, _shout_hops, lambda sites: (sites, 0)),),
    after=lambda symbols, collective, topology, rank: [Run(symbols.leaf(collective.root), 0, collective.count)],
    floor_ns=lambda topology, collective: 3 * collective.nbytes / topology.payload_share,
    work=lambda load, algorithm, opening: (load.chunks + 0 * load.peers, load.nbytes + 0 * load.peers),
)
"""A kind as somebody else would declare it."""


@pytest.fixture
def shout() -> Iterator[None]:
    declare(SHOUT)
    yield
    del DECLARED["shout"]


@pytest.mark.usefixtures("shout")
def test_a_new_kind_is_known_to_planner_checker_floor_prediction_and_simulator() -> None:
    topology = sites_of([2, 1, 2])
    calendar = build_calendar(topology)
    collective = Collective("shout", 600, 4, 4, root=3)
    planner = Planner(topology, 0, calendar)
    assert planner.algorithm(collective) == "loud"
    parts = [Planner(topology, rank, calendar).plan(collective) for rank in range(topology.size)]
    check(parts, topology, calendar)
    assert planner.floor_ns(collective) == floor_ns(topology, "shout", 2400) == 3 * 2400 / topology.payload_share
    assert planner.predict_ns(collective) > 5_000_000
    arrays = [np.full(600, rank, np.float32) for rank in range(topology.size)]
    result = simulate(parts, topology, calendar, data=arrays)
    assert result.arrays is not None
    assert all((array == 3).all() for array in result.arrays)
    assert promised_ranks("shout", topology, 0, root=3) == [3]


@pytest.mark.usefixtures("shout")
def test_a_new_kind_is_known_to_descriptors_and_sweeps() -> None:
    called = Descriptor(0, "shout", "sum", "float32", 600, 3)
    assert called.brief == "shout of 600 float32, root 3"
    sweep = Sweep(("shout", "barrier"), (8, 16), "float32", 1, 0)
    sweep.validate()
    assert sweep.points() == [("shout", 8), ("shout", 16), ("barrier", 0)]


def test_the_checker_holds_a_new_kind_to_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    promises_more = replace(
        SHOUT, after=lambda symbols, collective, topology, rank: [Run(symbols.leaf(rank), 0, collective.count)]
    )
    monkeypatch.setitem(DECLARED, "shout", promises_more)
    topology = sites_of([2, 2])
    parts = all_parts(Collective("shout", 24, 4, 4, root=0), topology, "loud", ChunkSize(8, 2))
    with pytest.raises(PlanError, match="rank 1 ends with 0 of element 0 in element 0; promised is 1 of element 0"):
        check(parts, topology)


def test_a_kind_that_nobody_declared_is_unknown() -> None:
    for ask in (signature_of, declaration_of):
        with pytest.raises(UsageError, match="kind='shout' is not a collective known here; expected one of all_gather"):
            ask("shout")
    with pytest.raises(UsageError, match="kind='broadcast' is declared already"):
        declare(replace(SHOUT, name="broadcast"))


@pytest.mark.parametrize("kind", DECLARED)
def test_algorithms_are_declared_by_rising_number_of_delays(kind: str) -> None:
    """The planner takes the first of them where no other is better."""
    for sites in (2, 3, 4, 7):
        delays = [algorithm.delays(sites) for algorithm in declaration_of(kind).algorithms]
        assert delays == sorted(delays)


@pytest.mark.parametrize("kind", DECLARED)
def test_a_communicator_has_every_kind_and_so_has_the_module(kind: str) -> None:
    assert callable(getattr(detcoll.Communicator, kind))
    assert callable(getattr(detcoll, kind))
    assert kind in detcoll.__all__


MAY_NAME_KINDS = {
    "plan/collectives": "they are declared there",
    "communicator.py": "their methods",
    "__init__.py": "the façade",
    "bench/start.py": "a way in which ranks begin together, which happens to be a barrier",
    "device/nccl.py": "what NCCL calls its own",
    "job/rails.py": "the only one that NCCL takes part in",
    "testing": "programs for transports, which call each kind as its method",
}


def named_in(source: str) -> list[int]:
    """Return the lines that compare something with the name of a kind, or choose by one."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        compared: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        elif isinstance(node, ast.Dict):
            compared = [key for key in node.keys if key is not None]
        constants = [inner for each in compared for inner in ast.walk(each) if isinstance(inner, ast.Constant)]
        lines += [inner.lineno for inner in constants if inner.value in DECLARED]
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "kind == 'barrier'",
        "'all_reduce' != call.kind",
        "kind in ('broadcast', 'other')",
        "match kind:\n case 'barrier': pass",
        "{'all_reduce': 1}[kind]",
    ],
)
def test_what_the_search_for_names_finds(source: str) -> None:
    assert named_in(source)


def test_no_reader_asks_for_the_name_of_a_kind() -> None:
    found = {
        f"{path.relative_to(ROOM).as_posix()}:{line}"
        for path in ROOM.rglob("*.py")
        for line in named_in(path.read_text(encoding="utf-8"))
    }
    readers = [place for place in found if not place.startswith(tuple(MAY_NAME_KINDS))]
    assert not readers, f"these should ask `detcoll.signature.signature_of` or a declaration: {sorted(readers)}"
