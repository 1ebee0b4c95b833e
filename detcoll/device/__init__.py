"""Arrays in the memory of CUDA devices: the driver.

Nothing of CUDA is loaded before `driver` is called first, which the first device array causes. Tests hand in
`detcoll.testing.device.StrictDevice` instead.
"""

from detcoll.device.cuda import Cuda, driver
from detcoll.device.driver import Driver, MemoryType

__all__ = ["Cuda", "Driver", "MemoryType", "driver"]
