"""How busy the machine and the lab's router were while something was measured.

A thread of the process that starts the ranks reads the kernel's counters every 20 ms: the idle time of the cores that
this process may use (``/proc/stat``, proc_stat(5)), and for how long the router had a core or waited for one
(``/proc/PID/task/TID/schedstat``). Afterwards the counters are read off at the times that were measured, as probes and
others' flows are. Idle time comes in steps of 10 ms, so a share over less than some 0.2 s says little.

A container may have a quota of processor time (`detcoll.measure.quota`); of that, the time is read in whose periods it
ran out.

Others' share is what programs other than this one, its ranks and its router took, from the first reading to the last:
time of all programs, less the processor time of this process and of the children that have ended.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from detcoll.measure.quota import find_quota

LEAST_S = 0.2
"""Of measured time; what the system counts in steps of 10 ms says nothing over less."""
GAP_S = 0.02
FULL = 0.9
"""A router that had a core or waited for one for so much of an interval had no time left in it."""

Spans = Sequence[tuple[int, int]]
"""Times that count, first and last, by the host's monotonic clock; they do not overlap."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the machine did while a row was measured. Shares are from 0 to 1, and None where the system does not tell.

    ``cores`` : those that this process may use.  ``processors_share`` : how much of their time they were busy, with
    whatever.  ``router_share`` : how much of the time the router had a core or waited for one.  ``router_full_share`` :
    the part of the time in which that was 90 % or more.  ``router_late_s`` : how late it handed units over in the mean,
    from the lab's opening on.  ``others_share`` : what other programs took of the cores, start-up of ranks included.
    ``quota_cores`` : how much processor time the control group of this process may use, in cores; None without a limit.
    ``quota_out_share`` : the part of the time in whose periods that ran out.
    """

    cores: int
    processors_share: float | None = None
    router_share: float | None = None
    router_full_share: float | None = None
    router_late_s: float | None = None
    others_share: float | None = None
    quota_cores: float | None = None
    quota_out_share: float | None = None

    @property
    def whole_cores(self) -> int:
        """How many ranks have a core each: cores that may be used, and no more than the quota has."""
        return self.cores if self.quota_cores is None else max(1, min(self.cores, int(self.quota_cores)))


@dataclass(frozen=True, slots=True)
class Readings:
    """Counters of one run, all rising, each list as long as ``at_ns``.

    ``idle_s`` is of all ``cores`` together; ``router_s`` is 0 until there is a router. ``others_s`` is what other
    programs took of the cores from the first reading to the last, and ``router_late_s`` how late the router handed
    units over in the mean; None where that is not known. ``quota_out_s`` is the time in whose periods a quota of
    ``quota_cores`` ran out; empty without a quota.
    """

    cores: int
    at_ns: tuple[int, ...]
    idle_s: tuple[float, ...]
    router_s: tuple[float, ...]
    others_s: float | None = None
    router_late_s: float | None = None
    quota_out_s: tuple[float, ...] = ()
    quota_cores: float | None = None


def load_of(runs: Sequence[Readings], spans_ns: Sequence[Spans | None]) -> Load:
    """Return the load of all rounds of a setting; a round's readings count within its spans, or all without spans."""
    parts = [_intervals(run, spans) for run, spans in zip(runs, spans_ns, strict=True)]
    counted_s, idle_s, quota_out_s, router = (np.concatenate([part[kind] for part in parts]) for kind in range(4))
    cores = min((run.cores for run in runs), default=0)
    took_s, has_router = float(counted_s.sum()), any(run.router_s[-1] > 0 for run in runs if run.router_s)
    router_late_s = max((run.router_late_s for run in runs if run.router_late_s is not None), default=None)
    quota = min((run.quota_cores for run in runs if run.quota_cores is not None), default=None)
    if took_s < LEAST_S:
        return Load(cores, router_late_s=router_late_s, quota_cores=quota)
    return Load(
        cores=cores,
        processors_share=_clipped(1 - float(idle_s.sum()) / (cores * took_s)),
        router_share=float((router * counted_s).sum()) / took_s if has_router else None,
        router_full_share=float(counted_s[router >= FULL].sum()) / took_s if has_router else None,
        router_late_s=router_late_s,
        others_share=_others_share(runs),
        quota_cores=quota,
        quota_out_share=None if quota is None else _clipped(float(quota_out_s.sum()) / took_s),
    )


def _others_share(runs: Sequence[Readings]) -> float | None:
    known = [(run.others_s, run.cores * (run.at_ns[-1] - run.at_ns[0]) / 1e9) for run in runs if len(run.at_ns) > 1]
    taken_s = [others_s for others_s, _ in known if others_s is not None]
    capacity_s = sum(capacity for _, capacity in known)
    return _clipped(sum(taken_s) / capacity_s) if capacity_s and len(taken_s) == len(known) else None


def _intervals(run: Readings, spans: Spans | None) -> tuple[NDArray[np.float64], ...]:
    """Return of each interval: how much of it counts, of that part idle time and time without quota, router's share."""
    if len(run.at_ns) < 2:
        return (np.zeros(0),) * 4
    at_s = (np.array(run.at_ns, np.int64) - run.at_ns[0]) / 1e9
    length_s = np.maximum(np.diff(at_s), 1e-9)
    counted_s = length_s
    if spans is not None:
        inside_s = np.zeros(len(at_s))  # how much of the spans has passed at each reading
        for first_ns, last_ns in spans:
            inside_s += np.clip(at_s, (first_ns - run.at_ns[0]) / 1e9, (last_ns - run.at_ns[0]) / 1e9)
        counted_s = np.diff(inside_s)
    part = counted_s / length_s
    quota_out_s = np.diff(run.quota_out_s) * part if run.quota_out_s else np.zeros(len(part))
    return counted_s, np.diff(run.idle_s) * part, quota_out_s, np.diff(run.router_s) / length_s


def _clipped(share: float) -> float:
    return min(1.0, max(0.0, share))


def parse_processors(text: str, cores: frozenset[int], tick_s: float) -> tuple[float, float] | None:
    """Return idle time and the time of programs in seconds, of all ``cores``, from the text of ``/proc/stat``.

    Programs: user, nice, system, and what the hypervisor took. None where a core is missing.
    """
    idle = programs = found = 0
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        fields = rest.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores and len(fields) >= 8:
            user, nice, system, idle_ticks, waiting, _, _, stolen = map(int, fields[:8])
            idle, programs, found = idle + idle_ticks + waiting, programs + user + nice + system + stolen, found + 1
    return (idle * tick_s, programs * tick_s) if found == len(cores) and found else None


def parse_wanted_s(text: str) -> float:
    """Return for how long a thread had a core or waited for one, in seconds, from the text of its ``schedstat``."""
    ran_ns, waited_ns, *_ = text.split()
    return (int(ran_ns) + int(waited_ns)) / 1e9


class Watch:
    """Reads the counters while it is entered; ``router_pid`` may be set once there is a router.

    Enter it before the lab is opened and leave it after that is closed: only children that have ended are counted.
    ``router_late_s`` is for the readings, where it is known.
    """

    def __init__(self) -> None:
        self.router_pid: int | None = None
        self.router_late_s: float | None = None
        self._cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset({0})
        self._quota = find_quota()
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")
        self._at_ns: list[int] = []
        self._idle_s: list[float] = []
        self._router_s: list[float] = []
        self._quota_out_s: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read_on, name="detcoll-load", daemon=True)
        self._others_s: float | None = None
        self._before_s: float | None = None

    def __enter__(self) -> Watch:
        """Begin."""
        self._before_s = self._others_so_far_s()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End."""
        self._done.set()
        self._thread.join()
        after_s = self._others_so_far_s()
        if self._before_s is not None and after_s is not None:
            self._others_s = max(0.0, after_s - self._before_s)

    def readings(self) -> Readings:
        """Return what was read, once it has been left."""
        read = (tuple(self._at_ns), tuple(self._idle_s), tuple(self._router_s))
        quota_cores = None if self._quota is None else self._quota.cores
        return Readings(
            len(self._cores), *read, self._others_s, self.router_late_s, tuple(self._quota_out_s), quota_cores
        )

    def _read_on(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._done.wait(GAP_S)
            processors = self._processors()
            if processors is None:
                return
            self._at_ns.append(time.monotonic_ns())
            self._idle_s.append(processors[0])
            self._router_s.append(self._router_wanted_s())
            if self._quota is not None:
                self._quota_out_s.append(self._quota.stopped_s())

    def _processors(self) -> tuple[float, float] | None:
        return parse_processors(_text(Path("/proc/stat")), self._cores, self._tick_s)

    def _router_wanted_s(self) -> float:
        """Return the router's time so far, of all its threads; what was read last where it is not there."""
        last_s = self._router_s[-1] if self._router_s else 0.0
        if self.router_pid is None:
            return last_s
        try:
            tasks = list(Path(f"/proc/{self.router_pid}/task").iterdir())
            return max(last_s, sum(parse_wanted_s((task / "schedstat").read_text("ascii")) for task in tasks))
        except (OSError, ValueError):
            return last_s

    def _others_so_far_s(self) -> float | None:
        """Return the processor time of all programs, less ours; only differences mean something."""
        processors = self._processors()
        if processors is None:
            return None
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return processors[1] - sum(one.ru_utime + one.ru_stime for one in own)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
