"""Marks the steps of torch's optimizers where `detcoll measure` runs the script; see `detcoll.marks`."""

from __future__ import annotations

import functools
import os
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from detcoll.marks import MARKS_VARIABLE, optimizer_stepped


def mark_steps() -> None:
    """Mark the end of each step of the first optimizer from now on, where somebody measures."""
    if MARKS_VARIABLE in os.environ:
        _register()


@functools.cache
def _register() -> None:
    def ended(optimizer: Any, arguments: Any, options: Any) -> None:
        optimizer_stepped(optimizer)

    register_optimizer_step_post_hook(ended)
