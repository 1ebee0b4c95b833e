"""Runs a program with tensors of the CPU taken for tensors on a device: ``torch_far.py PROGRAM [ARGUMENT ...]``.

What detcoll does with gaps, types, lists and reductions of those is done by torch on whatever device they are on, so it
is tried without one too.
"""

import runpy
import sys
from pathlib import Path

import torch_ranks

from detcoll.torch import devices

assert torch_ranks.begin, "it makes the backend known"
devices.is_far = lambda tensor: True
del sys.argv[0]
runpy.run_path(str(Path(__file__).with_name(sys.argv[0])), run_name="__main__")
