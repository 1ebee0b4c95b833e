"""Sum an array over all ranks: ``detcoll run -n 4 examples/01_all_reduce.py``, or under mpiexec or torchrun.

Needs: ``pip install -e .``
"""

import numpy as np

import detcoll

comm = detcoll.init()
x = np.full(1000, comm.rank + 1, dtype=np.float32)
detcoll.all_reduce(x, op="sum")
if comm.rank == 0:
    print(f"{comm.size} ranks over {comm.transport}: every element is {x[0]:g}")
detcoll.finalize()
