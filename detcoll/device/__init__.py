"""Arrays in the memory of CUDA devices: the driver, pinned memory, and copies between device and host.

Nothing of CUDA is loaded before `driver` is called first, which the first device array causes. Tests hand in
`detcoll.testing.device.StrictDevice` instead.
"""

from detcoll.device.copies import Copies, Copy, DeviceBuffer, Segment
from detcoll.device.cuda import Cuda, driver
from detcoll.device.driver import Driver, MemoryType
from detcoll.device.gate import Gate
from detcoll.device.now import copy_now, give_copies, pinned_counts, pinned_memory, pins, take_copies
from detcoll.device.pinned import PinnedPool
from detcoll.device.pins import Pins
from detcoll.device.rates import CopyRates, copy_rates

__all__ = [
    "Copies", "Copy", "CopyRates", "Cuda", "DeviceBuffer", "Driver", "Gate", "MemoryType", "PinnedPool", "Pins",
    "Segment", "copy_now", "copy_rates", "driver", "give_copies", "pinned_counts", "pinned_memory", "pins",
    "take_copies",
]  # fmt: skip
