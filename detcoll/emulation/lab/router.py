"""The router's process: moves units between the sites' TUN devices as `detcoll.emulation.lab.line` says, and counts.

It sleeps in one `select` until a unit arrives or one is due; select's timeout has microseconds, and with a real-time
priority the kernel adds no slack to it. The lab talks to it over a socket, one letter a request, one line of JSON an
answer. When the lab's process goes away without saying goodbye, the router ends whatever runs in the lab's namespaces
and then itself, so that nothing is left of a lab that was killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import math
import os
import select
import socket
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from detcoll.emulation.helper import ASK_QUIT, answer, configured
from detcoll.emulation.lab.conditions import Conditions, Service
from detcoll.emulation.lab.line import HOST, TENANT_HOST, WideArea
from detcoll.emulation.lab.log import ArrivalLog
from detcoll.emulation.lab.namespaces import end_processes
from detcoll.emulation.lab.native.area import NativeArea
from detcoll.emulation.lab.native.library import Clock, NotCompiled, load
from detcoll.emulation.lab.statistics import Statistics
from detcoll.errors import DetcollError, UsageError
from detcoll.topology import Topology

ROUTER_VARIABLE = "DETCOLL_ROUTER"

_LARGEST_UNIT_BYTES = 65536 + 64
# So many units are read from one device before the others, and what is due, get their turn.
_BATCH_UNITS = 8
# A sleeping processor needs some 100 us to come back, which every ping would see twice. While so few units are under
# way the router waits awake for the last of the time; with more it would take too much of the machine.
_FEW_UNITS = 4
_AWAKE_NS = 120_000
# So late may it look at probes and bursts, which nobody notices, so that one look serves many. Where more units are
# under way, to find that none is awaited would cost more than it saves.
_LAZY_NS = 1_000_000
_MOST_LOOKED_THROUGH = 256
_REAL_TIME_PRIORITY = 10
_NICENESS = -10
# The lowest descriptors that select takes are below 1024; the lab's own numbers may be beyond.
_LOWEST_FREE = 3
_ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What the router is told when it starts; descriptors are those of the router's process.

    ``tenant_tuns`` : devices of others beside each site, none where there are no others.
    """

    topology: Topology
    conditions: Conditions
    log_path: str | None
    tuns: tuple[int, ...]
    tenant_tuns: tuple[int, ...]
    namespaces: tuple[int, ...]
    lab_process: int


class _Router:
    """One lab's router."""

    is_compiled = False

    def __init__(self, config: RouterConfig, area: WideArea, control: socket.socket, lab_process: int) -> None:
        self._area = area
        self._control = control
        self._tuns, self._tenant_tuns = _low(config.tuns), _low(config.tenant_tuns)
        self._site_of = {tun: (site, False) for site, tun in enumerate(self._tuns)}
        self._site_of |= {tun: (site, True) for site, tun in enumerate(self._tenant_tuns)}
        self._lab_process = lab_process
        self._started_ns = self._looked_ns = time.monotonic_ns()
        self._has_more = False
        self._handed_over = self._refused = 0
        self._late_sum_ns = self._late_peak_ns = 0.0

    def forward(self) -> bool:
        """Forward until the lab says goodbye (True) or is gone (False)."""
        area, site_of, control = self._area, self._site_of, self._control.fileno()
        monotonic_ns, wait = time.monotonic_ns, select.select
        watched = [*self._tuns, *self._tenant_tuns, control, self._lab_process]
        while True:
            due_ns, wake_ns = self.next_look()
            timeout_s = None if wake_ns == math.inf else max(0.0, (wake_ns - monotonic_ns()) / 1e9)
            began_ns = monotonic_ns()
            readable = wait(watched, (), (), timeout_s)[0]
            self._look(began_ns, due_ns)
            for ready in readable:
                owner = site_of.get(ready)
                if owner is not None:
                    self._read(ready, *owner)
                elif ready == self._lab_process:
                    return False
                elif (goodbye := self._answer()) is not None:
                    return goodbye
            if area.next_ns <= monotonic_ns():
                self._hand_over()

    def next_look(self) -> tuple[float, float]:
        """Return when to look next at what is due, and when to wake up for it."""
        area = self._area
        due_ns = area.next_ns
        if area.under_way <= _MOST_LOOKED_THROUGH and not area.is_awaited:
            due_ns += _LAZY_NS
        return due_ns, due_ns - _AWAKE_NS if area.under_way <= _FEW_UNITS and area.is_urgent else due_ns

    def _look(self, began_ns: int, due_ns: float) -> None:
        """Note for how long nobody looked for arrivals before now: while at work, and past the time to wake up."""
        now_ns = time.monotonic_ns()
        asleep_ns = began_ns - self._looked_ns + max(0.0, now_ns - due_ns)
        # What is left in a device since the time before may have come in that.
        self._area.asleep_ns = max(self._area.asleep_ns, asleep_ns) if self._has_more else asleep_ns
        self._looked_ns, self._has_more = now_ns, False

    def _read(self, tun: int, site: int, is_tenant: bool) -> None:
        """Take what waits at a device, up to a batch."""
        area, read, monotonic_ns = self._area, os.read, time.monotonic_ns
        with suppress(BlockingIOError):
            for _ in range(_BATCH_UNITS):
                unit = read(tun, _LARGEST_UNIT_BYTES)
                now_ns = monotonic_ns()
                if now_ns - self._looked_ns > area.asleep_ns:
                    area.asleep_ns = now_ns - self._looked_ns
                area.arrive(site, unit, now_ns, is_tenant)
            self._has_more = True

    def _hand_over(self) -> None:
        """Write what is due to the devices of its destinations."""
        monotonic_ns, write, tuns, tenant_tuns = time.monotonic_ns, os.write, self._tuns, self._tenant_tuns
        for due_ns, destination, unit in self._area.due(monotonic_ns()):
            late_ns = monotonic_ns() - due_ns
            self._late_sum_ns += late_ns
            if late_ns > self._late_peak_ns:
                self._late_peak_ns = late_ns
            self._handed_over += 1
            is_tenant = tenant_tuns and unit[HOST] == TENANT_HOST
            try:
                write((tenant_tuns if is_tenant else tuns)[destination], unit)
            except OSError:
                self._refused += 1

    def _answer(self) -> bool | None:
        """Answer a request of the lab; returns whether it said goodbye, None if it goes on."""
        try:
            request = self._control.recv(1)
            if request:
                answer(self._control, self.statistics())
        except OSError:
            return False
        return {ASK_QUIT: True, b"": False}.get(request)

    def statistics(self) -> Statistics:
        """Return the counts so far."""
        up_peaks, down_peaks = self._area.peaks()
        reserved_up_peaks, reserved_down_peaks = self._area.peaks(Service.DETERMINISTIC)
        return Statistics(
            directions=self._area.directions(),
            uplink_peak_bytes=up_peaks,
            downlink_peak_bytes=down_peaks,
            reserved_uplink_peak_bytes=reserved_up_peaks,
            reserved_downlink_peak_bytes=reserved_down_peaks,
            bursts=self._area.bursts(),
            probe=self._area.probe(),
            unroutable=self._area.unroutable,
            refused=self._refused,
            late_mean_ns=self._late_sum_ns / max(1, self._handed_over),
            late_peak_ns=round(self._late_peak_ns),
            cpu_s=time.process_time(),
            elapsed_s=(time.monotonic_ns() - self._started_ns) / 1e9,
            is_compiled=self.is_compiled,
        )


class _NativeRouter(_Router):
    """One lab's router whose loop is C (``native/router.c``); what is not here it does as the other one."""

    is_compiled = True
    _LAB_IS_GONE = 2

    def __init__(
        self, config: RouterConfig, area: NativeArea, control: socket.socket, lab_process: int, library: ctypes.CDLL,
        clock: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, area, control, lab_process)
        self._native, self._library = area, library
        self._clock = Clock(clock) if clock is not None else Clock()
        watched = [*self._tuns, *self._tenant_tuns, control.fileno(), lab_process]
        self.handle = library.router_new(
            area.handle, (ctypes.c_int * len(watched))(*watched), len(self._tuns), len(self._tenant_tuns), self._clock
        )
        weakref.finalize(self, library.router_free, self.handle)

    def forward(self) -> bool:
        """Forward until the lab says goodbye (True) or is gone (False)."""
        while True:
            told = self._library.router_forward(self.handle)
            self._native.flush()
            if told < 0:
                raise OSError(-told, os.strerror(-told))
            if told == self._LAB_IS_GONE:
                return False
            if (goodbye := self._answer()) is not None:
                return goodbye

    def next_look(self) -> tuple[float, float]:
        """Return when to look next at what is due, and when to wake up for it."""
        wake_ns = ctypes.c_double()
        due_ns: float = self._library.router_next(self.handle, wake_ns)
        return due_ns, wake_ns.value

    def statistics(self) -> Statistics:
        """Return the counts so far."""
        counts, late_ns = (ctypes.c_int64 * 2)(), (ctypes.c_double * 2)()
        self._library.router_counts(self.handle, counts, late_ns)
        self._handed_over, self._refused = counts
        self._late_sum_ns, self._late_peak_ns = late_ns
        return super().statistics()


def _low(descriptors: Sequence[int]) -> list[int]:
    """Move descriptors to low numbers."""
    low = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LOWEST_FREE) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    return low


def _library() -> ctypes.CDLL | None:
    """Return the loop in C, or None where Python does: as ``DETCOLL_ROUTER`` asks, else by what is possible."""
    asked = os.environ.get(ROUTER_VARIABLE, "")
    if asked not in ("", "compiled", "python"):
        raise UsageError(f"{ROUTER_VARIABLE}={asked!r} must be compiled or python")
    if asked == "python":
        return None
    try:
        return load()
    except NotCompiled as error:
        if asked:
            raise UsageError(f"{ROUTER_VARIABLE}=compiled is not possible here: {error}") from error
        return None


def _made(config: RouterConfig, log: ArrivalLog | None, control: socket.socket, lab_process: int) -> _Router:
    """Make the router."""
    library, opened_ns = _library(), time.monotonic_ns()
    if library is None:
        area = WideArea(config.topology, config.conditions, log, opened_ns)
        return _Router(config, area, control, lab_process)
    native = NativeArea(library, config.topology, config.conditions, log, opened_ns)
    return _NativeRouter(config, native, control, lab_process, library)


def _raise_priority() -> None:
    """Ask for a real-time priority, or else for a better niceness; go on without where both are refused."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_REAL_TIME_PRIORITY))
    except OSError:
        with suppress(OSError):
            os.nice(_NICENESS)


def main(arguments: Sequence[str]) -> int:
    """Run a router; ``arguments`` are the number of the control socket's descriptor."""
    with configured(arguments, RouterConfig) as (config, control), ExitStack() as stack:
        control.settimeout(_ANSWER_TIMEOUT_S)
        goodbye = False
        try:
            lab_process = os.pidfd_open(config.lab_process)
            log = stack.enter_context(ArrivalLog(config.log_path)) if config.log_path is not None else None
            router = _made(config, log, control, lab_process)
            gc.collect()
            gc.disable()  # nothing here makes cycles
            _raise_priority()
            answer(control, True)
            goodbye = router.forward()
        except (OSError, DetcollError) as error:
            with suppress(OSError):
                answer(control, str(error))
        finally:
            if not goodbye:
                end_processes(config.namespaces, grace_ns=0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
