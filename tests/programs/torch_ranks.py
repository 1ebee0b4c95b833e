"""What programs of torch tests share; each runs on every rank, under any launcher that torch knows."""

from __future__ import annotations

import json
import os
from typing import Any

import torch.distributed as dist

if "detcoll" not in dist.Backend.backend_list:  # detcoll is not installed, or by a version without its entry point
    from detcoll_registration import register

    register()


def begin(backend: str = "detcoll", **options: Any) -> tuple[int, int]:
    """Open the default group; return rank and size."""
    dist.init_process_group(backend, **options)
    return dist.get_rank(), dist.get_world_size()


def say(rank: int, something: object) -> None:
    """Print one line of JSON, whole, whoever prints at the same time."""
    os.write(1, (json.dumps({"rank": rank, "said": something}, default=str) + "\n").encode())
