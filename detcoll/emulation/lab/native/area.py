"""The lines in C behind the interface of the lines in Python, which work out their parameters and keep their counts."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from detcoll.emulation.lab.conditions import Conditions, Service
from detcoll.emulation.lab.line import WideArea
from detcoll.emulation.lab.log import ArrivalLog
from detcoll.emulation.lab.native.library import Draw, Log
from detcoll.emulation.lab.path import Path
from detcoll.emulation.lab.statistics import BurstStatistics, DirectionStatistics, ProbeStatistics
from detcoll.topology import Topology

_DRAWS = 512
_LARGEST_UNIT_BYTES = 65536 + 64
_COUNTS = ("units", "segments", "wire_bytes", "payload_bytes", "up_drops", "policed", "lost", "failed", "down_drops")
"""What a path counts, in the order of the C side."""


class _Draws(IntEnum):
    """What random numbers are for."""

    LOSSES = 0
    JITTER = 1
    PROBES = 2
    BURSTS = 3


class NativeArea(WideArea):
    """All lines and paths between the sites of a topology, moved by C; ``library`` is what `library.load` returns.

    Parameters, guarantees and results are those of `WideArea`.
    """

    def __init__(
        self, library: ctypes.CDLL, topology: Topology, conditions: Conditions, log: ArrivalLog | None = None,
        opened_ns: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(topology, conditions, log, opened_ns)
        self._library = library
        self._error: BaseException | None = None
        # ctypes keeps no reference to what C may call.
        self._calls = Draw(self._draw), Log(self._write) if log is not None else Log()
        self.handle = library.area_new(
            len(topology.sites), opened_ns, self._catch_up_ns, self._has_classes, bytes(self._is_marked), *self._calls
        )
        weakref.finalize(self, library.area_free, self.handle)
        self._c_asleep_ns = library.area_asleep(self.handle)
        self._make(conditions)

    def _make(self, conditions: Conditions) -> None:
        """Tell C what the lines are like."""
        library, handle = self._library, self.handle
        for index, port in enumerate((*self._uplinks, *self._downlinks)):
            library.area_port(handle, index, port.bytes_per_ns, port.ns_per_byte, port.limit_bytes, port.packet_ns)
        for index, path in self._numbered_paths():
            gap = path.losses.gap if path.losses.any else math.nan
            library.area_path(handle, index, path.delay_ns, path.jitter_ns, gap)
            if path.policer is not None:
                library.area_reserve(handle, index, path.policer.bytes_per_ns, path.policer.burst_bytes)
        for site, bursts in enumerate(self._bursts):
            library.area_bursts(handle, site, bursts.packet_bytes, bursts.at_ns)
        library.area_probes(handle, self._probes.next_ns)
        for failure in conditions.failures:
            low, high = sorted(failure.between) if failure.between is not None else (-1, -1)
            library.area_failure(handle, failure.start_ns, failure.end_ns, low, high)

    def _numbered_paths(self) -> Iterator[tuple[int, Path]]:
        """Yield all paths with their numbers on the C side."""
        slots = (path for row in self._paths for pair in row for path in pair)
        return ((index, path) for index, path in enumerate(slots) if path is not None)

    def _path(self, index: int) -> Path:
        sites = len(self._paths)
        path = self._paths[index // 2 // sites][index // 2 % sites][index % 2]
        assert path is not None
        return path

    def _draw(self, kind: int, index: int, values: Any, most: int) -> int:
        """Draw random numbers from the generator that the reference draws from."""
        try:
            drawn = self._drawn(_Draws(kind), index)
            if len(drawn) > most:
                raise ValueError(f"{len(drawn)} random numbers do not fit where {most} do")
            ctypes.memmove(values, (ctypes.c_double * len(drawn))(*drawn), 8 * len(drawn))
        except BaseException as error:
            self._error = error
            return 0
        return len(drawn)

    def _drawn(self, kind: _Draws, index: int) -> list[float]:
        if kind is _Draws.LOSSES:
            losses = self._path(index).losses
            return [losses.draw() for _ in range(_DRAWS)]
        if kind is _Draws.JITTER:
            jitter = self._path(index).jitter
            return [jitter.random() for _ in range(_DRAWS)]
        if kind is _Draws.PROBES:
            return [self._probes.gap_ns() for _ in range(_DRAWS)]
        return [value for burst in reversed(self._bursts[index].draw()) for value in burst]

    def _write(self, records: int, nbytes: int) -> int:
        """Add records to the log; returns whether that was possible."""
        assert self._log is not None
        try:
            self._log.extend(ctypes.string_at(records, nbytes))
        except BaseException as error:
            self._error = error
            return 0
        return 1

    def check(self) -> None:
        """Raise what was raised while C called Python."""
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Put all records so far into the log."""
        self._library.area_write_log(self.handle)
        self.check()

    @property
    def next_ns(self) -> float:
        """When `due` has something to do next; infinite when nothing is under way."""
        next_ns: float = self._library.area_next(self.handle)
        return next_ns

    @property
    def under_way(self) -> int:
        """How many units are on their way, roughly."""
        count: int = self._library.area_under_way(self.handle)
        return count

    @property
    def is_urgent(self) -> bool:
        """Whether a kernel waits for what is due next; nobody notices when a probe or a burst is looked at late."""
        return bool(self._library.area_urgent(self.handle))

    @property
    def is_awaited(self) -> bool:
        """Whether a kernel waits for anything that is under way."""
        return bool(self._library.area_awaited(self.handle))

    def arrive(self, source: int, unit: bytes, now_ns: int, is_tenant: bool = False) -> None:
        """Take ``unit`` from site ``source`` into its uplink; what tenants send is best effort however it is marked."""
        self._c_asleep_ns[0] = self.asleep_ns
        self._library.area_take(self.handle, source, unit, len(unit), now_ns, is_tenant)
        self.unroutable = self._library.area_unroutable(self.handle)
        self.check()

    def due(self, now_ns: int) -> list[tuple[float, int, bytes]]:
        """Return what is to be handed over by ``now_ns``: when it was due, the destination site and the unit."""
        self._library.area_advance(self.handle, now_ns)
        self.check()
        due_ns, destination = ctypes.c_double(), ctypes.c_int()
        unit = ctypes.create_string_buffer(_LARGEST_UNIT_BYTES)
        done: list[tuple[float, int, bytes]] = []
        while (nbytes := self._library.area_arrival(self.handle, len(done), due_ns, destination, unit)) >= 0:
            done.append((due_ns.value, destination.value, unit.raw[:nbytes]))
        return done

    def directions(self) -> tuple[DirectionStatistics, ...]:
        """Return what was counted between each ordered pair of sites, in each class that it has."""
        counts, longest_ns = (ctypes.c_int64 * len(_COUNTS))(), ctypes.c_double()
        for index, path in self._numbered_paths():
            self._library.area_counts(self.handle, index, counts)
            for name, count in zip(_COUNTS, counts, strict=True):
                setattr(path, name, count)
            size = self._library.area_delays(self.handle, index, longest_ns, None, None)
            buckets, in_bucket = ((ctypes.c_int64 * size)() for _ in range(2))
            self._library.area_delays(self.handle, index, longest_ns, buckets, in_bucket)
            path.delays.counts = dict(zip(buckets, in_bucket, strict=True))
            path.delays.longest_ns = longest_ns.value
        self.unroutable = self._library.area_unroutable(self.handle)
        return super().directions()

    def peaks(self, service: Service = Service.BEST_EFFORT) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the longest queue of a class at each uplink and at each downlink in bytes."""
        both = (ctypes.c_double * 2)()
        for index, port in enumerate((*self._uplinks, *self._downlinks)):
            self._library.area_peaks(self.handle, index, both)
            port.peak_bytes, port.reserved_peak_bytes = both
        return super().peaks(service)

    def bursts(self) -> tuple[BurstStatistics, ...]:
        """Return what the router's own bursts did at each uplink; nothing where there are none."""
        both = (ctypes.c_int64 * 2)()
        for site, bursts in enumerate(self._bursts):
            self._library.area_burst_counts(self.handle, site, both)
            bursts.offered_bytes, bursts.dropped_bytes = both
        return super().bursts()

    def probe(self) -> ProbeStatistics:
        """Return what the probes found."""
        sent = ctypes.c_int64()
        pairs = (ctypes.c_int64 * (2 * self._library.area_probes_seen(self.handle, sent, None)))()
        self._library.area_probes_seen(self.handle, sent, pairs)
        self._probes.sent = sent.value
        self._probes.seen.clear()
        self._probes.seen.extend(zip(pairs[::2], pairs[1::2], strict=True))
        return super().probe()
