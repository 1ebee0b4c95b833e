"""`detcoll.torch` for loops on another backend: DDP's communication hook, and equal parameters at the start."""

from __future__ import annotations

import pytest
from forked import TORCH, launch_forked

pytest.importorskip("torch")


def test_gradients_and_parameters_agree_as_over_the_own_backend() -> None:
    ended = launch_forked(3, "torch_hook.py", "averages", modules=TORCH)
    assert ended.code == 0, ended.err
    assert sorted(ended.said) == [0, 1, 2]
    for rank, said in ended.said.items():
        same, alike, buckets, copied, (flag, is_channels_last), (entry, step), number, text = said
        assert same == [True] * 6
        assert alike == 3, "ranks hold different parameters"
        assert buckets[:2] == ["bucket 0", "bucket 1"], "gradients did not go through the hook"
        assert copied == [True] * 3
        assert flag == [1.0, 0.0]
        assert is_channels_last
        assert (entry, step) == ([0, 0], rank)
        assert "of is a int; expected a module" in number
        assert "of has a str" in text


def test_an_error_of_detcoll_ends_the_backward_pass() -> None:
    ended = launch_forked(2, "torch_hook.py", "fails", modules=TORCH)
    told = [text for said in ended.said.values() for text in said]
    assert told
    assert "PlanMismatch: ranks called different collectives" in told[0]
    assert "rank 1 called all_reduce of 3 float64" in told[0]
