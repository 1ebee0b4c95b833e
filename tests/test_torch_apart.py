"""A process group of ranks that torch's default group knows nothing of has a job of its own."""

from __future__ import annotations

import pytest
from forked import TORCH, launch_forked

pytest.importorskip("torch")


def test_a_group_apart_has_its_own_ranks_beside_the_default_group() -> None:
    size = 3
    ended = launch_forked(size, "torch_apart.py", modules=TORCH)
    assert ended.code == 0, ended.err
    # Rank 0 of the mirrored group is the last rank of torch; the group of the first and the last rank follows rank 0.
    said = {rank: records[0] for rank, records in ended.said.items()}
    assert said == {0: [2, size, 2, 0], 1: [1, size, 2, 1], 2: [0, size, 2, 0]}
