"""MPI as a transport of detcoll: messages and native collectives through mpi4py.

Ranks are started by an MPI launcher (``mpiexec -n 4 python train.py``). A job may be all of its MPI world or part of
it, in any order of ranks. ``pip install "detcoll[mpi]"`` brings mpi4py and an MPI library.

- Messages are MPI's own nonblocking sends and receives. MPI has fewer tags than the SPI, so each message begins with a
  letter that says its tag and size. Small ones travel in the letter; larger ones follow it, and go straight into the
  caller's memory.
- Collectives of all kinds are MPI's, in the world and in groups, each on communicators of its own. An all-to-all of
  blocks that differ in size goes through a plan, and so does what moves more than 2 GiB in blocks.
- MPI's fold order is its own: results agree on all ranks, and may differ in the last bits from those of another number
  of ranks or another library. 16-bit floats travel and fold in float32
  and are rounded once, since MPI libraries know no bfloat16; their averages do not overflow on the way. NaN comes
  through a minimum or maximum, where MPI's own loses it.
- What ranks call is compared while they call it, over a communicator for that alone, since MPI compares nothing.
- A rank that gives up a collective, at its deadline or because an exception interrupts it, tells the others, who then
  raise PeerLost with its reason. Messages go on.
- MPI has no failure that survivors could handle: when a process dies, its launcher ends the job. An endpoint that
  aborts says nothing, and its peers find out at their deadlines. ``abort_job=True`` lets `abort` end the job at once.
- MPI has no descriptor to wait on: `poll` spins shortly and then sleeps ever longer, up to 200 us.

Options: ``abort_job`` (False) and ``open_timeout_ns`` (60 s).
"""

from __future__ import annotations

from detcoll_mpi.transport import MpiTransport

__all__ = ["MpiTransport"]
