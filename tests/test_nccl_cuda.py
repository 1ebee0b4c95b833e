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


@pytest.mark.parametrize(("library", "size", "sites"), [("torch", 4, 2), ("cupy", 2, 1)])
def test_drawn_calls_give_what_numpy_gives_and_ddp_its_bits(library: str, size: int, sites: int) -> None:
    """Two ranks a site add once, whoever adds."""
    require(library)
    more, said = (["ddp"], ["DDP has the same bits with NCCL and without"]) if library == "torch" else ([], [])
    options = ["--sites", str(sites)]
    ended = launch(size, "nccl_ranks.py", library, 20, *more, options=options, environ=NCCL, timeout_s=100.0)
    assert ended.said == {rank: ["20 cases", *said] for rank in range(size)}, ended.err
