"""The lab: an emulated wide-area network on one machine, with real processes and the kernel's own TCP.

`Lab` makes the network, `run_ranks` runs a program in it once per rank, and `audit` holds what its router saw against
the calendars that the ranks kept.
"""

from detcoll.emulation.lab.audit import Audit, audit, read_traces
from detcoll.emulation.lab.conditions import DEFAULT_QUEUE_BYTES, Conditions, Failure, Service
from detcoll.emulation.lab.emulation import Lab
from detcoll.emulation.lab.launch import Launcher, rank_environments, run_ranks
from detcoll.emulation.lab.log import RECORD, read_log
from detcoll.emulation.lab.privilege import obtain, why_unavailable
from detcoll.emulation.lab.statistics import DirectionStatistics, Statistics

__all__ = [
    "DEFAULT_QUEUE_BYTES",
    "RECORD",
    "Audit",
    "Conditions",
    "DirectionStatistics",
    "Failure",
    "Lab",
    "Launcher",
    "Service",
    "Statistics",
    "audit",
    "obtain",
    "rank_environments",
    "read_log",
    "read_traces",
    "run_ranks",
    "why_unavailable",
]
