"""Read by each Python that tests start: let it look for garbage less often, and not in all that it imported at its end.

Importing torch makes a million objects. A process that looks through them again and again, and once more at its end,
spends a third of its time there. ``TEST_WHOLE_END=1`` lets it end as Python does, for tests of just that.
"""

import atexit
import gc
import os


def forget() -> None:
    """Keep the collector from searching all objects once more as the interpreter ends."""
    if "TEST_WHOLE_END" not in os.environ:
        gc.freeze()


gc.set_threshold(10_000)
atexit.register(forget)  # registered first, so called last
