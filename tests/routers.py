"""The lab's lines in Python and, where it can be compiled, in C."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from detcoll.emulation.lab.line import WideArea
from detcoll.emulation.lab.native import library
from detcoll.emulation.lab.native.area import NativeArea
from detcoll.emulation.lab.native.library import NotCompiled

try:
    LIBRARY, WHY = library.load(), ""
except NotCompiled as reason:
    LIBRARY, WHY = None, str(reason)  # type: ignore[assignment]

needs_compiler = pytest.mark.skipif(bool(WHY), reason=f"the router cannot be compiled: {WHY}")

ROUTERS: list[Any] = [
    pytest.param(WideArea, id="python"),
    pytest.param(partial(NativeArea, LIBRARY), id="c", marks=needs_compiler),
]
