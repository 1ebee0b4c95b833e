"""Ranges of torch's profiler, so that calls show in its traces as those of its own backends do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from detcoll.torch.work import Work


def profiled(kind: str, call: Callable[[], Work]) -> Work:
    """Make a call; where this thread is profiled, inside a range ``detcoll:KIND``.

    Of an asynchronous call, the range ends when the call has been started: torch crashes where a range ends on another
    thread after its profiler has stopped.
    """
    if not torch.autograd._profiler_enabled():
        return call()
    with torch.autograd.profiler.record_function(f"detcoll:{kind}"):
        return call()
