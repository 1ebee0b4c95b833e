"""What programs of torch tests share; each runs on every rank, under any launcher that torch knows."""

from __future__ import annotations

import itertools
import json
import os
from functools import cache
from typing import Any

import torch.distributed as dist

if "detcoll" not in dist.Backend.backend_list:  # detcoll is not installed, or by a version without its entry point
    from detcoll_registration import register

    register()


NUMBERS = itertools.count()


@cache
def meeting() -> tuple[Any, int, int]:
    """Return the store of this job, rank and size.

    One store serves all groups. A group with a store of its own ends that of rank 0, to which others may have come
    already for the next group.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    return store, rank, size


def begin(backend: str = "detcoll", **options: Any) -> tuple[int, int]:
    """Open the default group, with what the environment says unless told otherwise; return rank and size."""
    if not {"store", "init_method"} & options.keys():
        store, rank, size = meeting()
        options |= {"store": dist.PrefixStore(str(next(NUMBERS)), store), "rank": rank, "world_size": size}
    dist.init_process_group(backend, **options)
    return dist.get_rank(), dist.get_world_size()


def say(rank: int, something: object) -> None:
    """Print one line of JSON, whole, whoever prints at the same time."""
    os.write(1, (json.dumps({"rank": rank, "said": something}, default=str) + "\n").encode())
