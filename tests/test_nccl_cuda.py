"""NCCL inside the sites on a real device, which all ranks share: each says that it is another host."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from ranks import launch

from detcoll.device import Cuda
from detcoll.device.cuda import LIBRARY
from detcoll.errors import DetcollError

pytestmark = pytest.mark.gpu
NCCL = {"DETCOLL_NCCL": "1", "OMP_NUM_THREADS": "1"}


def require(library: str) -> None:
    """Skip a test without a device, or without ``library``."""
    try:
        is_there = Cuda(LIBRARY).count() > 0
    except DetcollError as error:
        pytest.skip(str(error))
    if not is_there or find_spec(library) is None:
        pytest.skip("no device of CUDA" if not is_there else f"{library} is not installed")


@pytest.mark.parametrize(("library", "size", "sites"), [("torch", 2, 1), ("torch", 4, 2), ("cupy", 4, 2)])
def test_drawn_calls_give_what_numpy_gives(library: str, size: int, sites: int) -> None:
    require(library)
    ended = launch(size, "nccl_ranks.py", library, 20, options=["--sites", str(sites)], environ=NCCL)
    assert ended.said == {rank: ["20 cases"] for rank in range(size)}, ended.err


def test_ddp_ends_with_the_same_bits_as_without_nccl() -> None:
    """Two ranks a site add once, whoever adds."""
    require("torch")
    ended = [
        launch(4, "nccl_ranks.py", "torch", "ddp", options=["--sites", "2"], environ={**NCCL, "DETCOLL_NCCL": on})
        for on in "10"
    ]
    assert sorted(ended[0].said) == [0, 1, 2, 3], ended[0].err
    assert ended[0].said == ended[1].said, ended[1].err
