"""A wide-area network on one machine: real processes, the kernel's own TCP, emulated lines.

Every site is a network namespace with the address 10.77.<site>.1 on ``wan0``; one router process carries what goes
between them with the rates, delays and queues of a topology (`detcoll.emulation.lab.line`).
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from detcoll.emulation.helper import ASK_STATISTICS, Helper
from detcoll.emulation.lab.conditions import Conditions, CrossTrafficKind
from detcoll.emulation.lab.flows import FlowCounts, FlowsConfig
from detcoll.emulation.lab.line import TENANT_HOST
from detcoll.emulation.lab.namespaces import Namespace, end_processes, new_namespace, run_inside
from detcoll.emulation.lab.privilege import why_unavailable
from detcoll.emulation.lab.router import RouterConfig
from detcoll.emulation.lab.statistics import FlowStatistics, Statistics
from detcoll.emulation.lab.tun import open_tun
from detcoll.errors import Closed, DetcollError, TransportUnavailable, UsageError
from detcoll.topology import Topology

T = TypeVar("T")

LARGEST_LAB = 200

_GRACE_NS = 2 * 10**9
_REAP_PATIENCE_S = 5.0
# The kernel's own bound, and one below which it refuses or hands over single segments.
_LARGEST_GSO_BYTES = 65_536
_SMALLEST_GSO_BYTES = 6_000
# How long one unit may hold a line: at 1 Gbit/s that is 31 kB, and the router takes a quarter of a core per Gbit/s.
_UNIT_NS = 500_000
# Of the few TCP flows beside bursts, so that what is measured beside these does not depend on the kernel's default.
_BESIDE_BURSTS = "cubic"


class Lab:
    """An emulated wide-area network; a context manager that is open from the start.

    Parameters
    ----------
    topology : Topology
        Two to 200 sites with uplinks, and the delays between them. Rates count IP packets with all their headers.
    conditions : Conditions
        What the lines do to traffic beside rate and delay: queues, loss, classes, others' traffic, failures.
    log_path : str or Path, optional
        File for the arrival log (`detcoll.emulation.lab.log`), complete once the lab is closed.
    slow_start_after_idle : bool
        False sets ``net.ipv4.tcp_slow_start_after_idle`` to 0 in every site.
    gso_max_bytes : int, optional
        The largest run of segments that the kernel hands over at once. Larger ones cost the router less and hold the
        line for longer. By default what the slowest uplink sends in 0.5 ms, from 6 kB to 64 kB.

    Raises
    ------
    UsageError
        If an argument cannot be used.
    TransportUnavailable
        If this is not Linux, pyroute2 is missing, or this process may not make networks; `why_unavailable` says why,
        and `obtain` helps.
    DetcollError
        If the kernel refuses, or the router does not start.

    Guarantees
    ----------
    Any number of labs may be open at once. When a lab is closed, or its process ends in whatever way, nothing of it
    is left: no process that ran in a site, no router, no namespace, no device.
    """

    def __init__(
        self,
        topology: Topology,
        conditions: Conditions | None = None,
        *,
        log_path: str | Path | None = None,
        slow_start_after_idle: bool = False,
        gso_max_bytes: int | None = None,
    ) -> None:
        conditions = conditions or Conditions()
        _check(topology)
        conditions.validate(topology)
        gso_max_bytes = _gso_max_bytes(topology, gso_max_bytes)
        if (reason := why_unavailable()) is not None:
            raise TransportUnavailable(reason)
        self.topology, self.conditions = topology, conditions
        self._children: list[subprocess.Popen[Any]] = []
        self._final: Statistics | None = None
        self._flows: Helper | None = None
        self._flows_counted = FlowCounts()
        self._lock = threading.Lock()
        self._closed = False
        with ExitStack() as stack, ExitStack() as devices:
            self._namespaces: list[Namespace] = []
            self._tenants: list[Namespace] = []
            sites = range(len(topology.sites))
            open_site = partial(self._open_site, stack, devices, slow_start_after_idle, gso_max_bytes)
            tuns = [open_site(self.address(site), self._namespaces) for site in sites]
            flows = self._flows_config()
            tenant_tuns = [open_site(address, self._tenants) for address in flows.addresses]
            config = RouterConfig(
                topology, conditions, None if log_path is None else os.path.abspath(log_path),
                tuple(tuns), tuple(tenant_tuns), self._networks, os.getpid(),
            )  # fmt: skip
            self._start_router(stack, config)
            stack.callback(self._end_processes)
            if flows.addresses:
                self._start_flows(stack, flows)
            self._resources = stack.pop_all()

    def _open_site(
        self, stack: ExitStack, devices: ExitStack, slow_start_after_idle: bool, gso_max_bytes: int, address: str,
        namespaces: list[Namespace],
    ) -> int:  # fmt: skip
        """Make a namespace, put it in ``namespaces``, and return the descriptor of its device."""
        open_device = partial(open_tun, address, self.topology.mtu_bytes, gso_max_bytes, slow_start_after_idle)
        try:
            namespace, tun = new_namespace(open_device)
        except OSError as error:
            raise DetcollError(f"the lab cannot make the network of {address}: {error}") from error
        stack.callback(namespace.close)
        devices.callback(os.close, tun)  # the router's copy keeps the device
        namespaces.append(namespace)
        return tun

    def _flows_config(self) -> FlowsConfig:
        """Return what others' TCP flows offer; no addresses where there are none. Descriptors are not known yet."""
        share = self.conditions.tcp_share * self.topology.payload_share
        if share <= 0:
            return FlowsConfig((), (), ())
        is_tcp = self.conditions.cross_traffic_kind is CrossTrafficKind.TCP
        sites = range(len(self.topology.sites))
        rates = tuple(share * (site.uplink_bytes_per_s or 0.0) for site in self.topology.sites)
        return FlowsConfig(
            tuple(f"10.77.{site}.{TENANT_HOST}" for site in sites), (), rates,
            is_greedy=is_tcp and self.conditions.cross_traffic >= 1,
            congestion="" if is_tcp else _BESIDE_BURSTS,
        )  # fmt: skip

    def _start_router(self, stack: ExitStack, config: RouterConfig) -> None:
        descriptors = [*config.tuns, *config.tenant_tuns, *config.namespaces]
        self._router = Helper("the lab's router", "detcoll.emulation.lab.router", descriptors)
        stack.callback(self._stop_router)
        self._router.configure(config, bool)

    def _start_flows(self, stack: ExitStack, config: FlowsConfig) -> None:
        """Start the process of others' TCP flows."""
        networks = tuple(namespace.network for namespace in self._tenants)
        flows = Helper("the process of others' TCP flows", "detcoll.emulation.lab.flows", networks)
        stack.callback(self._stop_flows, flows)
        flows.configure(replace(config, namespaces=networks), bool)
        self._flows = flows

    def _stop_flows(self, flows: Helper) -> None:
        """Let others' TCP flows end, and keep what they counted."""
        if self._flows is not None:
            self._flows_counted = flows.quit(FlowCounts) or FlowCounts()
            self._flows = None
        flows.close()

    def _stop_router(self) -> None:
        """Let the router finish its log and end, or kill it."""
        self._final = self._router.quit(Statistics)
        self._router.close()

    def _end_processes(self) -> None:
        """End all that runs in the sites, and reap what was started by `popen`."""
        end_processes(self._networks, _GRACE_NS)
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_REAP_PATIENCE_S)

    def address(self, site: int) -> str:
        """Return the IPv4 address of site number ``site``."""
        return f"10.77.{self._require_site(site)}.1"

    @property
    def _networks(self) -> tuple[int, ...]:
        return tuple(namespace.network for namespace in (*self._namespaces, *self._tenants))

    def namespace_paths(self, site: int) -> tuple[str, ...]:
        """Return paths under which a process outside can open the namespaces of a site: network, and mounts if any."""
        namespace = self._namespaces[self._require_site(site)]
        held = (namespace.network, namespace.mounts)
        return tuple(f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in held if descriptor is not None)

    @property
    def router_pid(self) -> int:
        """The process id of the router."""
        return self._router.pid

    def popen(
        self, site: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a process in site number ``site``; the rest is as with `subprocess.Popen`.

        It gets a session of its own unless ``options`` say otherwise, so that Ctrl-C reaches the lab alone, and ends
        with the lab at the latest.

        Raises
        ------
        UsageError
            If there is no such site.
        Closed
            If the lab is closed.
        OSError
            If the program cannot be started.
        """
        self._require_site(site)
        with self._lock:
            if self._closed:
                raise Closed("the lab is closed")
            options = {"start_new_session": True, **options}
            start = partial(subprocess.Popen, list(argv), env=None if env is None else dict(env), **options)
            child: subprocess.Popen[Any] = run_inside(self._namespaces[site], start)
            # Who started them reaps them, once what they left in their groups has ended.
            self._children = [known for known in self._children if known.returncode is None]
            self._children.append(child)
        return child

    def call(self, site: int, work: Callable[[], T]) -> T:
        """Call ``work`` in the network of site number ``site``, in a thread of its own, and return what it returns.

        Raises
        ------
        UsageError
            If there is no such site.
        Closed
            If the lab is closed.
        """
        self._require_site(site)
        with self._lock:
            if self._closed:
                raise Closed("the lab is closed")
            return run_inside(self._namespaces[site], work)

    def statistics(self) -> Statistics:
        """Return what the router and others' TCP flows counted so far, or until the lab was closed.

        Raises
        ------
        DetcollError
            If the router or the process of the flows has died.
        """
        with self._lock:
            if self._closed:
                if self._final is None:
                    raise Closed("the lab is closed and its router died before")
                return _joined(self._final, self._flows_counted)
            counted = FlowCounts() if self._flows is None else self._flows.ask(ASK_STATISTICS, FlowCounts)
            return _joined(self._router.ask(ASK_STATISTICS, Statistics), counted)

    def close(self) -> None:
        """End every process in the sites (SIGTERM, then SIGKILL), the router and the sites. Idempotent."""
        with self._lock:
            self._closed = True
            self._resources.close()

    def __enter__(self) -> Lab:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close."""
        self.close()

    def _require_site(self, site: int) -> int:
        if isinstance(site, bool) or not isinstance(site, int) or not 0 <= site < len(self.topology.sites):
            raise UsageError(f"site={site!r} must be a number from 0 to {len(self.topology.sites) - 1}")
        return site


def _joined(router: Statistics, flows: FlowCounts) -> Statistics:
    """Return what both counted."""
    pairs = zip(flows.offered_bytes, flows.arrived_bytes, strict=True)
    by_site = tuple(FlowStatistics(site, offered, arrived) for site, (offered, arrived) in enumerate(pairs))
    return replace(router, flows=by_site, flows_at_ns=flows.looked_ns)


def _check(topology: Topology) -> None:
    """Refuse a topology that cannot be emulated, before anything is made."""
    if not 2 <= len(topology.sites) <= LARGEST_LAB:
        raise UsageError(f"topology has {len(topology.sites)} sites; the lab takes from 2 to {LARGEST_LAB}")
    for site in topology.sites:
        if site.uplink_bytes_per_s is None or site.downlink_bytes_per_s is None:
            raise UsageError(f"topology: site {site.name!r} has no uplink; every site of a lab needs one")


def _gso_max_bytes(topology: Topology, asked: int | None) -> int:
    """Return the size of the largest unit, as asked for or as suits the slowest uplink."""
    lowest = min(max(_SMALLEST_GSO_BYTES, 2 * topology.mtu_bytes), _LARGEST_GSO_BYTES)
    if asked is None:
        slowest = min(site.uplink_bytes_per_s or 0.0 for site in topology.sites)
        return max(lowest, min(int(slowest * _UNIT_NS / 1e9), _LARGEST_GSO_BYTES))
    if not lowest <= asked <= _LARGEST_GSO_BYTES:
        raise UsageError(f"gso_max_bytes={asked} must be from {lowest} to {_LARGEST_GSO_BYTES} bytes")
    return asked
