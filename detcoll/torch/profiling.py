"""Ranges of torch's profiler, so that calls show in its traces as those of its own backends do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from detcoll.torch.work import Work


def profiled(kind: str, call: Callable[[], Work]) -> Work:
    """Make a call; where this thread is profiled, inside a range ``detcoll:KIND`` that ends with the call."""
    if not torch.autograd._profiler_enabled():
        return call()
    measured = torch.autograd.profiler.record_function(f"detcoll:{kind}")
    measured.__enter__()
    try:
        work = call()
    except BaseException:
        measured.__exit__(None, None, None)
        raise
    if work.is_completed():
        measured.__exit__(None, None, None)
    else:
        measured._call_end_callbacks_on_future(work.get_future())
    return work
