"""Gloo, the CPU backend of torch.distributed, as a transport of detcoll: for comparison and as a fallback.

It makes a process group of its own (``ProcessGroupGloo``), beside any default group of the program, and needs no
environment variables: rank 0 opens a store at its rendezvous address, over which the ranks of the job find each
other. ``GLOO_SOCKET_IFNAME`` chooses the network interfaces, otherwise the rendezvous address does.
``pip install "detcoll[gloo]"`` brings torch.

- Collectives are Gloo's, in the world and in groups, each over connections of its own. What Gloo lacks goes through a
  plan: reduce_scatter, and blocks that differ in size. Gloo's fold order is its own, and it adds and multiplies 16-bit
  floats in their own type; averages are divided once, after the last fold, and those of 16-bit floats fold in float32,
  where nothing overflows. NaN comes through a minimum or maximum, where Gloo's own loses it.
- Messages: Gloo matches sends and receives of equal size only, and cannot be asked whether one is done. So the
  messages of a pair travel one after the other, each led by a frame with its tag and size, and a thread for each
  direction of each pair waits for them. What no receive was posted for is held, up to ``unexpected_bytes`` for each
  sender; then that sender's messages wait at their source.
- Gloo knows one way to end a wait: closing every connection of the group. So a collective that misses its deadline, or
  that an exception interrupts, ends its group, and the peers see that this rank is gone; one of the world ends the
  endpoint, its messages included. Python handles Ctrl-C only when Gloo returns, at the deadline at the latest.
- Ranks tell each other what they are about to call before they call it, since Gloo compares nothing.

Options: ``unexpected_bytes`` (64 MiB), ``open_timeout_ns`` (60 s) and ``compare`` (True).
"""

from __future__ import annotations

from detcoll_gloo.transport import GlooTransport

__all__ = ["GlooTransport"]
