"""Keeps ``torch.compile`` out of the calls of a process group.

A compiled program lets Dynamo trace the frames that it runs, also those that torch's C++ code calls, such as the
broadcast of DDP's buffers. Inside our calls there is nothing to compile, and Dynamo refuses the object that makes them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)


def untraced(*classes: type) -> Callable[[Kind], Kind]:
    """Return a class decorator that keeps Dynamo out of the methods which a class has of ``classes``."""

    def decorate(kind: Kind) -> Kind:
        for base in classes:
            for name, method in vars(base).items():
                if not name.startswith("__") and callable(method) and getattr(kind, name) is method:
                    setattr(kind, name, _untraced(method))
        return kind

    return decorate


def _untraced(method: Callable[..., Any]) -> Callable[..., Any]:
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if not disabled:
            dynamo: Any = sys.modules.get("torch._dynamo")  # takes seconds to import; programs that compile have it
            if not hasattr(dynamo, "disable"):
                return method(*arguments, **options)
            disabled.append(dynamo.disable(method))
        return disabled[0](*arguments, **options)

    return call
