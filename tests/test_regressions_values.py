"""Wrong values that calls once returned without a word; each test runs programs as users write them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from forked import PLAIN, TORCH, launch_forked
from jobs import PROGRAM, run

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A named pipe, by which ranks tell each other to go on."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture(scope="module", params=["shm", "slotted", "tcp", "gloo", "mpi"])
def reduced(request: pytest.FixtureRequest) -> dict[int, list[Any]]:
    """What ranks say of values that go wrong easily: on two sites of two ranks, or on four ranks of MPI."""
    transport = request.param
    if transport == "gloo" and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    if transport == "mpi":
        ended = run(4, "edge_values", transport, launcher=[*request.getfixturevalue("mpiexec"), "-n", "4"])
    else:
        modules = TORCH if transport == "gloo" else PLAIN
        ended = launch_forked(4, PROGRAM, "edge_values", transport, modules=modules, environ={"DETCOLL_SITES": "2"})
    assert ended.code == 0, ended.err
    assert sorted(ended.said) == [0, 1, 2, 3]
    return ended.said


def test_averages_of_16_bit_floats_stay_in_range(reduced: dict[int, list[Any]]) -> None:
    """Partial sums of ranks and sites leave the range of the type, and the mean does not."""
    for means, _ in reduced.values():
        assert means == {key: [1.0] for key in means}
        assert len(means) == 6


def test_a_nan_of_one_rank_comes_out_of_minimum_and_maximum_on_all(reduced: dict[int, list[Any]]) -> None:
    for _, lost in reduced.values():
        assert lost == []


@pytest.mark.parametrize("transport", ["shm", "slotted", "tcp"])
def test_calls_under_way_on_the_same_memory_keep_their_order(transport: str) -> None:
    """The whole array, a slice of it, and a list of its halves."""
    ended = launch_forked(2, PROGRAM, "same_memory", transport)
    assert ended.said == {rank: [{"broadcast": 0, "twice": 0, "slice": 0, "list": 0}] for rank in (0, 1)}, ended.err


def test_equal_calls_of_two_threads_are_told_apart_by_name() -> None:
    """Without names, sums of weights and biases would be mixed where two ranks call in another order."""
    ended = launch_forked(2, PROGRAM, "orders_of_threads", "names")
    for [[ends, _]] in ended.said.values():
        kinds = {end.partition(":")[0] for end in ends.values()}
        assert kinds in ({"PlanMismatch"}, {"PlanMismatch", "Closed"}), "Closed where the first had ended the group"
        assert all("(weights)" in end and "(biases)" in end for end in ends.values())
    assert sorted(ended.said) == [0, 1]


def test_threads_with_groups_of_their_own_may_call_in_any_order() -> None:
    ended = launch_forked(2, PROGRAM, "orders_of_threads", "groups")
    sums = {"weights": 3.0, "biases": 201.0}
    assert {rank: said[0][1] for rank, said in ended.said.items()} == {0: sums, 1: sums}, ended.err


def test_a_late_rank_fails_as_all_others_did(fifo: Path) -> None:
    """Shared memory gives a small array to whoever comes; a call that others gave up must not end well for one."""
    ended = launch_forked(3, PROGRAM, "late", fifo)
    for said in ended.said.values():
        assert [name for name, _ in said] == ["all_reduce", "barrier", "broadcast"]
        assert all(end.startswith("DeadlineMissed") for _, end in said), ended.said
    assert sorted(ended.said) == [0, 1, 2]


def test_an_unknown_collective_is_refused_where_transports_have_collectives_of_their_own() -> None:
    ended = launch_forked(1, PROGRAM, "unknown_kind", "shm")
    assert [text[:23] for text in ended.said[0]] == ["UsageError: kind='gossi"] * 3
