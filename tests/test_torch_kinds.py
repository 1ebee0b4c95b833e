"""The process group of torch: every kind, type and operator, against NumPy; and torch's names of 2.4 to 2.14."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from forked import TORCH, launch_forked

pytest.importorskip("torch")

OLD = {
    "_allgather_base", "_reduce_scatter_base", "alltoall_base", "allgather_into_tensor_coalesced",
    "reduce_scatter_tensor_coalesced",
}  # fmt: skip
"""What torch up to 2.12 calls."""
NEW = {
    "all_gather_single", "reduce_scatter_single", "all_to_all_single", "all_gather_single_coalesced",
    "reduce_scatter_single_coalesced",
}  # fmt: skip
"""The same in 2.13."""
ALWAYS = {
    "allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "reduce_scatter", "broadcast", "reduce",
    "gather", "scatter", "alltoall", "send", "recv", "recv_anysource", "barrier", "monitored_barrier", "rank", "size",
    "name", "getBackendName", "setGroupName", "getGroupName", "abort", "shutdown", "_start_coalescing",
    "_end_coalescing", "bound_device_id", "_device_types",
}  # fmt: skip
NAMES = {
    **{f"2.{minor}": ALWAYS | OLD for minor in range(4, 6)},
    **{f"2.{minor}": ALWAYS | OLD | {"setGroupDesc", "getGroupDesc"} for minor in range(6, 13)},
    "2.13": ALWAYS | NEW | {"setGroupDesc", "getGroupDesc"},
    "2.14": ALWAYS | NEW | {"setGroupDesc", "getGroupDesc", "recvAnysource", "start_coalescing"},
}
"""What each release of torch calls on a process group made in Python, by the wheels of those releases."""


@pytest.mark.parametrize("release", NAMES)
def test_methods_have_the_names_that_a_release_calls(release: str) -> None:
    from detcoll.torch import ProcessGroup

    own = {name for kind in ProcessGroup.__mro__ if kind.__module__.startswith("detcoll.") for name in vars(kind)}
    assert NAMES[release] - own <= {"rank", "size"}, "the base class has rank() and size()"
    assert "new_group" not in own, "torch 2.13 would take it for a hook"


def test_options_are_the_last_argument_and_may_be_left_out() -> None:
    from detcoll.torch import ProcessGroup

    for name in sorted(OLD | NEW | {"allreduce", "allgather", "broadcast", "gather", "scatter", "barrier"}):
        parameters = inspect.signature(getattr(ProcessGroup, name)).parameters
        assert parameters["opts"].default is None, name


@pytest.mark.parametrize(
    ("size", "environ", "cases"), [(3, {}, 204), (2, {"DETCOLL_TRANSPORT": "tcp"}, 102)], ids=["shm", "tcp"]
)
def test_drawn_calls_give_what_numpy_gives(size: int, environ: dict[str, str], cases: int) -> None:
    ended = launch_forked(
        size, "torch_kinds.py", f"seed {size}", cases, modules=TORCH, environ=environ, timeout_s=100.0
    )
    assert ended.said == {rank: [f"{cases} cases"] for rank in range(size)}, ended.err


def test_a_list_of_parts_that_lie_together_is_bound_as_one_array() -> None:
    import torch

    from detcoll.buffers import Pieces
    from detcoll.torch.tensors import joined

    whole = torch.arange(12.0).to(torch.bfloat16)
    parts = list(whole[3:].chunk(3))
    bound = joined(parts, "x", is_written=True)
    assert not isinstance(bound, Pieces)
    assert bound.astype("float32").tolist() == list(range(3, 12))
    bound[0] = 7
    assert whole[3] == 7
    for apart in (parts[::-1], parts[::2], [torch.zeros(3), torch.zeros(3)]):
        assert isinstance(joined(apart, "x", is_written=True), Pieces)


def test_elements_that_share_memory_are_found_exactly() -> None:
    import torch

    from detcoll.errors import UsageError
    from detcoll.torch.tensors import joined

    def refused(*tensors: torch.Tensor) -> bool:
        try:
            joined(tensors, "x", is_written=True)
        except UsageError:
            return True
        return False

    chance = random.Random(0)
    seen = set()
    for _ in range(400):
        place = torch.arange(200)
        drawn = []
        for _ in range(chance.randrange(1, 4)):
            axes = chance.randrange(1, 4)
            shape, strides = [[chance.randrange(most) for _ in range(axes)] for most in (4, 9)]
            drawn.append(place.as_strided(shape, strides, chance.randrange(60)))
        used = torch.cat([each.reshape(-1) for each in drawn]).tolist()
        shared = len(set(used)) < len(used)
        seen.add((shared, len(drawn)))
        assert refused(*drawn) == shared, [(each.shape, each.stride(), each.storage_offset()) for each in drawn]
    assert len(seen) == 6, "both answers for each number of tensors"
    same, empty = torch.zeros(3), torch.zeros(0)
    assert refused(same, torch.zeros(3), same)
    assert not refused(empty, empty, same, empty)
    assert not refused(*torch.zeros(50, 60).unbind(1))
    assert refused(torch.zeros(1).expand(2**40))


@pytest.fixture
def alone() -> Iterator[Any]:
    """A group of one rank in this process."""
    import torch.distributed as dist

    from detcoll.torch.process_group import create_apart

    group = create_apart(dist.HashStore(), 0, 1, timedelta(seconds=60))
    yield group
    group.shutdown()


def test_calls_compare_shapes_where_torch_asks_for_equal_tensors(alone: Any) -> None:
    import torch

    x, y, other, flat = (torch.ones(*shape) for shape in ((2, 3), (2, 3), (3, 2), (6,)))
    alone.allreduce([x])
    alone.allreduce_coalesced([x, flat])
    alone.allreduce_coalesced([torch.ones(1, 1, 1, 1, 1) for _ in range(9)] + [x])
    alone.reduce([x])
    alone.reduce_scatter([x], [[y]])
    alone.reduce_scatter_single(flat, x)
    alone.allgather([[other]], [x])
    alone.all_gather_single(flat, x)
    alone.gather([[y]], [x])
    alone.scatter([x], [[y]])
    alone.broadcast([x])
    alone.alltoall([x], [y]).wait()
    called = [row["called"] for row in alone.communicator._job.recorder.rows() if row["event"] == "call"]
    said = [(call["kind"], call["shape"]) for call in called]
    long = said[2][1]
    assert long.startswith("(1, 1, 1, 1, 1) (1, 1")
    assert len(long) <= 48
    assert said == [
        ("all_reduce", "(2, 3)"), ("all_reduce", "(2, 3) (6,)"), ("all_reduce", long), ("reduce", "(2, 3)"),
        ("reduce_scatter", "(2, 3)"), ("reduce_scatter", "(2, 3)"), ("all_gather", "(2, 3)"), ("all_gather", "(2, 3)"),
        ("gather", "(2, 3)"), ("scatter", "(2, 3)"), ("broadcast", ""), ("all_to_all", ""),
    ]  # fmt: skip


def test_inputs_of_a_list_may_share_memory(alone: Any) -> None:
    import torch

    x = torch.arange(4.0)
    outputs = [torch.zeros(3), torch.zeros(3)]
    alone.all_gather_single_coalesced(outputs, [x[:3], x[1:]]).wait()
    assert [each.tolist() for each in outputs] == [[0, 1, 2], [1, 2, 3]]
    alone.reduce_scatter_single_coalesced([x[:2], x[2:]], [outputs[1][:2]] * 2).wait()
    assert x.tolist() == [1, 2, 1, 2]
