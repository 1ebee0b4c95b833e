"""The quota of processor time that a control group has, as containers do.

In each period (100 ms unless said otherwise) the processes of a group may use so much processor time together; then the
kernel stops them until the next one. So a quota can be the limit while cores are idle, and ``/proc/stat`` does not show
it. What shows it is the count of periods in which the group was stopped. Sources: the kernel's documentation of control
groups, version 2 (cpu.max, cpu.stat) and 1 (cpu.cfs_quota_us), and of CFS bandwidth control.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class Quota:
    """A quota: ``cores`` of processor time at most, of each ``period_s``; ``counts`` is the file ``cpu.stat``."""

    cores: float
    period_s: float
    counts: Path

    def stopped_s(self) -> float:
        """Return the length of all periods so far in which the group was stopped; 0 where that cannot be read."""
        with suppress(OSError, ValueError):
            for line in self.counts.read_text("ascii").splitlines():
                name, _, value = line.partition(" ")
                if name == "nr_throttled":
                    return int(value) * self.period_s
        return 0.0


def find_quota(root: Path = Path("/")) -> Quota | None:
    """Return the smallest quota of this process's groups, if any; ``root`` is where ``/proc`` and ``/sys`` hang."""
    found = []
    for folder in _groups(root):
        with suppress(OSError, ValueError):
            if (quota := _read(folder)) is not None:
                found.append(quota)
    return min(found, key=lambda quota: quota.cores, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups that may have a quota, the innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see its own group as the mount itself, and the group's path from outside.
        for inside in (group, *map(str, PurePosixPath(group).parents)):
            yield mounts / controllers / inside.lstrip("/")


def _read(folder: Path) -> Quota | None:
    """Return the quota of one group, or None where it is not limited."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text("ascii").split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text("ascii").strip() for name in ("quota", "period"))
    if quota in ("max", "-1"):
        return None
    return Quota(int(quota) / int(period), int(period) / 1e6, folder / "cpu.stat")
