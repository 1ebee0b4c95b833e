"""The same training over point-to-point messages of MPI: ``mpirun -n 4 python examples/03_digits_mpi.py``.

``transport="mpi"`` asks for MPI by name instead of leaving the choice to detcoll. Since the loop also asks for
``reproducible=True``, detcoll sums in its own order over MPI's messages, and the loss curve is the one that
``detcoll run`` gives.

Needs: ``pip install -e ".[measure,mpi]"``
"""

import runpy
import sys
from pathlib import Path

sys.argv[1:1] = ["--transport", "mpi"]
runpy.run_path(str(Path(__file__).with_name("02_digits.py")), run_name="__main__")
