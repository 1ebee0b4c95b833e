"""Collectives of shared memory: the same bits as plans give, whatever the grouping, type, size and chunk."""

from __future__ import annotations

import numpy as np
import pytest

from detcoll.errors import Closed, DeadlineMissed, PeerLost, PlanMismatch, UsageError
from detcoll.fold import reference
from detcoll.testing.fabric import Here, ThreadFabric
from detcoll.testing.worlds import ProcessFabric, Worlds
from detcoll.types import DTYPES, ReduceOp, is_integer
from detcoll_shm import ShmTransport

GROUPINGS = {
    "1": [[0]], "2": [[0, 1]], "1+1": [[0], [1]], "3": [[0, 1, 2]], "2+1": [[0, 1], [2]], "placed": [[1, 2], [0]],
    "4": [[0, 1, 2, 3]], "2+2": [[0, 1], [2, 3]], "1+3": [[0], [1, 2, 3]], "2+3+2": [[0, 1], [2, 3, 4], [5, 6]],
}  # fmt: skip
TINY = {"chunk_bytes": 64, "direct_bytes": 16, "wait_ns": 0}
COUNTS = (0, 1, 2, 3, 17, 100, 1001)


def contribution(rank: int, count: int, dtype: np.dtype) -> np.ndarray:
    draw = np.random.default_rng([rank, count])
    if is_integer(dtype):
        return draw.integers(0, 100, count).astype(dtype)
    return (draw.standard_normal(count) * 3).astype(dtype)


def all_reduces(here: Here, groups: list[list[int]], counts: tuple[int, ...]) -> None:
    """Every operation on every type gives the bits of the promise."""
    here.endpoint.arrange(groups)
    for dtype in DTYPES.values():
        for op in ReduceOp:
            if op is ReduceOp.AVG and is_integer(dtype):
                continue
            for count in counts:
                given = [contribution(rank, count, dtype) for rank in range(here.size)]
                mine = given[here.rank].copy()
                here.endpoint.all_reduce(mine, op, here.deadline_ns())
                expected = reference(op, given, groups, dtype)
                assert mine.tobytes() == expected.tobytes(), f"{op.value} of {count} {dtype}, rank {here.rank}"


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("options", [{}, TINY], ids=["whole", "chunks"])
def test_the_fold_is_the_promised_one(groups: list[list[int]], options: dict[str, int]) -> None:
    size = sum(map(len, groups))
    counts = COUNTS if size < 7 or not options else (0, 1, 17, 100)
    with ThreadFabric(ShmTransport(), size, options) as fabric:
        fabric.run(all_reduces, groups=groups, counts=counts)


def mixture(here: Here, rounds: int) -> None:
    """Calls of all kinds and sizes follow each other; no half of a stage is written while another rank reads it."""
    draw = np.random.default_rng(5)
    for number in range(rounds):
        kind, count, root = draw.integers(0, 4), int(draw.integers(0, 400)), int(draw.integers(0, here.size))
        x = np.arange(count, dtype=np.int64) * 7 + number + here.rank
        if kind == 0:
            here.endpoint.broadcast(x, root, here.deadline_ns())
            np.testing.assert_array_equal(x, np.arange(count) * 7 + number + root)
        elif kind == 1:
            here.endpoint.barrier(here.deadline_ns())
        else:
            here.endpoint.all_reduce(x, ReduceOp.SUM, here.deadline_ns())
            others = here.size * (here.size - 1) // 2
            np.testing.assert_array_equal(x, (np.arange(count) * 7 + number) * here.size + others)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_calls_of_all_kinds_follow_each_other(n: int) -> None:
    worlds = Worlds()
    try:
        with ProcessFabric(worlds.of(n), "detcoll_shm:ShmTransport", TINY | {"direct_bytes": 400}) as fabric:
            fabric.run(mixture, rounds=400)
    finally:
        worlds.end()


def different(here: Here) -> None:
    """Every rank is shown both descriptors, and no later call is taken."""
    with pytest.raises(PlanMismatch) as seen:
        here.endpoint.all_reduce(np.ones(100 + (here.rank == 2), np.float32), ReduceOp.SUM, here.deadline_ns(), 2)
    assert '"count":100,"root":0,"arrays":2' in str(seen.value)
    assert '"count":101' in str(seen.value)
    with pytest.raises(Closed):
        here.endpoint.barrier(here.deadline_ns())


def test_calls_that_differ() -> None:
    with ThreadFabric(ShmTransport(), 4) as fabric:
        fabric.run(different)


def one_is_missing(here: Here) -> None:
    """The deadline names who did not come."""
    if here.rank != 1:
        with pytest.raises((DeadlineMissed, PeerLost)) as seen:
            here.endpoint.barrier(here.clock.now_ns() + 50 * 10**6)
        assert "waits for rank 1, which has not called it" in str(seen.value) or "aborted" in str(seen.value)
    here.meet()


def test_who_has_not_come_is_named() -> None:
    with ThreadFabric(ShmTransport(), 3) as fabric:
        fabric.run(one_is_missing)


def test_groups_must_hold_every_rank_once() -> None:
    with ThreadFabric(ShmTransport(), 2) as fabric:
        for groups in ([[0]], [[0, 1], [1]], [[0, 1], []], [[0, 2]]):
            with pytest.raises(UsageError, match="must hold each of 2 ranks once"):
                fabric[0].arrange(groups)
