"""Measures how close a training run across sites comes to the same run inside one cluster.

The same workload runs in several settings over the same ranks and the same grouping: in a single cluster (shared
memory, no lines), and over emulated lines with detcoll's slotted transport and with the transports it is compared
to. Figures, all from the hosts' own clock:

- Iteration time: from the moment the last rank ended one iteration to the moment the last rank ended the next. All
  ranks of a measurement run on one host, so they share a clock.
- Sync time: from the last rank's end of the backward pass until the last rank holds the whole reduced gradient. It is
  the communication that the backward pass did not hide.
- Efficiency: median iteration time in the single cluster / median iteration time in this setting; its spread is the
  same median over this setting's p99 and p01.
- Wire busy fraction: bytes that the busiest site sent into the wide area while iterations were measured, at the line's
  payload rate, as a share of the time that the backward passes took; 1 at most. Where an iteration has several
  batches, the time of all of them counts. A high efficiency at a small fraction
  says little, since the line had nothing to do.
- Retransmits: TCP segments sent again, as the kernel of each site counted them.
- Networks: each transport is measured on every service (best effort, deterministic) with every share of others'
  traffic, in a fresh lab each time. With a reserved rate, "line" above means that rate.
- Limits: whether the router, the processors or a doubtful baseline decided instead of the lines
  (`detcoll.measure.limits`). Such a run is no headline.
- A co-tenant's round trip: of somebody else's small best-effort packets through the same lines, while iterations were
  measured.
"""

from __future__ import annotations

from detcoll.marks import step

__all__ = ["step"]
