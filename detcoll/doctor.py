"""Looks at a host before training starts, and says what to change.

Each check compares what the system says with what a wide-area collective needs, and answers with a `Finding`. What is
read comes through `System`, so every check can be tested on a made-up host.

What is needed follows from the lines: a flow has rate x round trip bytes in flight, so TCP's largest buffers must hold
twice that; slow start after idle closes TCP's window in every compute phase; a disciplined clock tells its own bound
(``maxerror`` of adjtimex(2)); and a host whose threads wake up late uses its reservation late.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

from detcoll import pci, registry
from detcoll.device import Cuda, driver
from detcoll.device.pinned import LIMIT_BYTES
from detcoll.errors import DeviceError, TransportUnavailable
from detcoll.installation import install_command
from detcoll.job.settings import AUTO
from detcoll.path_mtu import PORT, PathMtu, probe
from detcoll.priority import make_prompt
from detcoll.quantities import format_bytes
from detcoll.topology import Topology

DEFAULT_RATE_BYTES_PER_S, DEFAULT_ROUND_TRIP_NS = 125e6, 20_000_000
"""Of the line that is assumed where no topology is given: 1 Gbit/s over 20 ms."""

GOOD_CLOCK_SOURCES = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", "xen")
LEAST_PACING_KERNEL = (5, 1)
"""Since then the kernel takes 64-bit pacing rates (``SO_MAX_PACING_RATE``)."""

_CUPY = ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy")
_NCCL = ("nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_NO_LIMIT_BYTES = 2**60
"""What control groups of version 1 say where there is no limit is about 2**63."""

LATE_NS = 1_000_000
_SLEEPS, _SLEEP_NS = 200, 1_000_000
_STA_UNSYNC = 0x0040
_TIMEX_BYTES, _MAXERROR_AT, _STATUS_AT = 208, 24, 40  # struct timex of linux/timex.h on 64-bit systems


class Verdict(Enum):
    """What a check found."""

    GOOD = "good"
    CHANGE = "change"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: its ``value``, and where it is not good what to do."""

    name: str
    value: str
    verdict: Verdict
    advice: str = ""


@dataclass(frozen=True, slots=True)
class System:
    """What is looked at; ``root`` is where ``/proc`` and ``/sys`` hang."""

    root: Path = Path("/")
    kernel: str = os.uname().release
    cores: int = len(os.sched_getaffinity(0))

    def text(self, path: str) -> str | None:
        """Return a file's text without white space at its ends, or None where it cannot be read."""
        return pci.text(self.root / path)


def examine(
    topology: Topology | None = None, system: System | None = None, towards: Sequence[str] = ()
) -> list[Finding]:
    """Return everything that was found on this host.

    Parameters
    ----------
    topology : Topology, optional
        Whose lines this host is to serve; without lines, one of 1 Gbit/s over 20 ms is assumed.
    system : System, optional
        What is looked at instead of this host.
    towards : sequence of str, optional
        Other hosts, to which the size of packets is tried.

    Raises
    ------
    ConnectError
        If one of these hosts cannot be resolved, or there is no route to it.
    """
    seen = system or System()
    rate, round_trip_ns = _line(topology)
    return [
        _kernel(seen),
        *(_packets(host, probe(host)) for host in towards),
        _mtu_probing(seen),
        *_buffers(seen, rate, round_trip_ns),
        _slow_start(seen),
        _congestion(seen),
        _clock_source(seen),
        _discipline(_adjtimex()),
        _priority(make_prompt),
        _lateness(late_ns()),
        _cores(seen, topology),
        *_transports(),
        *_cuda(seen),
    ]


def _line(topology: Topology | None) -> tuple[float, int]:
    """Return the fastest line and the longest round trip."""
    if topology is None or not topology.is_wide:
        return DEFAULT_RATE_BYTES_PER_S, DEFAULT_ROUND_TRIP_NS
    rate = max(site.uplink_bytes_per_s or 0.0 for site in topology.sites)
    return rate, 2 * max(link.one_way_ns for _, link in topology.links)


def _kernel(seen: System) -> Finding:
    numbers = tuple(int(part) for part in seen.kernel.split("-")[0].split(".")[:2] if part.isdecimal())
    if numbers < LEAST_PACING_KERNEL:
        return Finding("kernel", seen.kernel, Verdict.CHANGE, "pacing beyond 34 Gbit/s needs Linux 5.1 or newer")
    return Finding("kernel", seen.kernel, Verdict.GOOD)


def _buffers(seen: System, rate_bytes_per_s: float, round_trip_ns: int) -> Iterator[Finding]:
    needed = int(2 * rate_bytes_per_s * round_trip_ns / 1e9)
    for name in ("tcp_wmem", "tcp_rmem"):
        text = seen.text(f"proc/sys/net/ipv4/{name}")
        if text is None or len(text.split()) != 3:
            yield Finding(name, "unknown", Verdict.NOTE, "this system does not tell")
            continue
        least, usual, most = text.split()
        advice = f"sysctl -w net.ipv4.{name}='{least} {usual} {needed}' (twice what is in flight on this line)"
        verdict = Verdict.GOOD if int(most) >= needed else Verdict.CHANGE
        yield Finding(name, f"up to {int(most):,} bytes", verdict, "" if verdict is Verdict.GOOD else advice)


def _packets(host: str, found: PathMtu) -> Finding:
    name = f"packets to {host}"
    if not found.passed_bytes:
        note = f"it may be reached all the same; a firewall on the way may drop UDP to port {PORT}, or the answers"
        return Finding(name, "no probe was answered", Verdict.NOTE, note)
    value = f"up to {found.passed_bytes:,} bytes"
    if found.passed_bytes == found.device_bytes:
        return Finding(name, value, Verdict.GOOD)
    if found.is_told:
        return Finding(name, f"{value}; a router refuses larger ones, so TCP sends smaller ones", Verdict.GOOD)
    advice = (
        f"connections open and then hang; on both hosts: ip link set dev DEVICE mtu {found.passed_bytes}, "
        "or sysctl -w net.ipv4.tcp_mtu_probing=1, with which each connection stalls for some seconds only"
    )
    return Finding(name, f"{value}; larger ones vanish without a word", Verdict.CHANGE, advice)


def _mtu_probing(seen: System) -> Finding:
    text = seen.text("proc/sys/net/ipv4/tcp_mtu_probing")
    if text in ("1", "2"):
        return Finding("MTU probing", "on", Verdict.GOOD)
    advice = "matters where large packets vanish on the way; detcoll doctor --towards HOST tries that"
    return Finding("MTU probing", "unknown" if text is None else "off", Verdict.NOTE, advice)


def _slow_start(seen: System) -> Finding:
    text = seen.text("proc/sys/net/ipv4/tcp_slow_start_after_idle")
    if text is None:
        return Finding("slow start after idle", "unknown", Verdict.NOTE, "this system does not tell")
    if text == "0":
        return Finding("slow start after idle", "off", Verdict.GOOD)
    advice = "sysctl -w net.ipv4.tcp_slow_start_after_idle=0, else TCP's window closes in every compute phase"
    return Finding("slow start after idle", "on", Verdict.CHANGE, advice)


def _congestion(seen: System) -> Finding:
    usual = seen.text("proc/sys/net/ipv4/tcp_congestion_control") or "unknown"
    offered = (seen.text("proc/sys/net/ipv4/tcp_available_congestion_control") or "").split()
    asked = os.environ.get("DETCOLL_CONGESTION", AUTO)
    wanted = "cubic" if asked == AUTO else asked or usual
    if wanted in offered:
        note = "" if wanted == usual else f"; the kernel's default is {usual}"
        if asked == AUTO and "bbr" not in offered:
            note += "; bbr is not offered, so beside a line that others fill it stays with cubic"
        return Finding("congestion control", f"slotted uses {wanted}{note}", Verdict.GOOD)
    return Finding(
        "congestion control", f"{wanted} is not offered; slotted gets {usual}", Verdict.CHANGE,
        f"modprobe tcp_{wanted}; BBR, for one, empties a paced line for 200 ms every 10 s",
    )  # fmt: skip


def _clock_source(seen: System) -> Finding:
    name = seen.text("sys/devices/system/clocksource/clocksource0/current_clocksource")
    if name is None:
        return Finding("clock source", "unknown", Verdict.NOTE, "this system does not tell")
    if name.startswith(GOOD_CLOCK_SOURCES):
        return Finding("clock source", name, Verdict.GOOD)
    return Finding("clock source", name, Verdict.CHANGE, "reading this clock is slow; prefer tsc where it is stable")


def _adjtimex() -> tuple[int, int] | None:
    """Return ``maxerror`` in ns and the status bits, or None where there is no such call."""
    record = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        if ctypes.CDLL(None, use_errno=True).adjtimex(record) < 0:
            return None
    except (AttributeError, OSError):
        return None
    error_us = ctypes.c_long.from_buffer(record, _MAXERROR_AT).value
    return error_us * 1000, ctypes.c_int.from_buffer(record, _STATUS_AT).value


def _discipline(told: tuple[int, int] | None) -> Finding:
    if told is None:
        return Finding("clock discipline", "unknown", Verdict.NOTE, "this system does not tell")
    error_ns, status = told
    if status & _STA_UNSYNC:
        return Finding(
            "clock discipline", "none", Verdict.NOTE,
            "two sites need none; windows between more sites need PTP or NTP on every host",
        )  # fmt: skip
    return Finding("clock discipline", f"the kernel bounds the error at {error_ns / 1e6:.3f} ms", Verdict.GOOD)


def _priority(ask: Callable[[], bool]) -> Finding:
    granted: list[bool] = []
    thread = threading.Thread(target=lambda: granted.append(ask()))  # of its own, so that nothing else changes
    thread.start()
    thread.join()
    if granted[0]:
        return Finding("real-time priority", "may be used", Verdict.GOOD)
    limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
    advice = "allow rtprio 3 in limits.conf, or CAP_SYS_NICE; without, busy processes delay what is handed to the line"
    return Finding("real-time priority", f"refused (limit {limit})", Verdict.CHANGE, advice)


def late_ns(sleeps: int = _SLEEPS, sleep_ns: int = _SLEEP_NS) -> list[int]:
    """Return how late an ordinary thread of this host woke up, ``sleeps`` times, in rising order."""
    late = []
    for _ in range(sleeps):
        due_ns = time.monotonic_ns() + sleep_ns
        time.sleep(sleep_ns / 1e9)
        late.append(time.monotonic_ns() - due_ns)
    return sorted(late)


def _lateness(late: list[int]) -> Finding:
    middle, tail = late[len(late) // 2], late[len(late) * 99 // 100]
    value = f"{middle / 1e6:.2f} ms late in the middle, {tail / 1e6:.2f} ms one time in a hundred"
    if tail < LATE_NS:
        return Finding("waking up", value, Verdict.GOOD)
    return Finding("waking up", value, Verdict.CHANGE, "something keeps the processors busy; leave it fewer of them")


def _cores(seen: System, topology: Topology | None) -> Finding:
    most = max(len(site.ranks) for site in topology.sites) if topology is not None else 1
    value = f"{seen.cores} for this process"
    if most <= seen.cores:
        return Finding("cores", value, Verdict.GOOD)
    advice = f"a site of {most} ranks on this host alone would share them; calls then begin and end later"
    return Finding("cores", value, Verdict.NOTE, advice)


def _transports() -> Iterator[Finding]:
    for name in registry.names():
        why = registry.why_missing(name)
        if why is None:
            yield Finding(f"transport {name}", "installed", Verdict.GOOD)
        else:
            yield Finding(f"transport {name}", "not installed", Verdict.NOTE, why)


def _cuda(seen: System) -> Iterator[Finding]:
    """Look at CUDA's devices. Without a driver library nothing is loaded; with one, no context is made."""
    try:
        cuda = driver()
        of_cuda, count = ".".join(map(str, cuda.version())), cuda.count()
        places = [cuda.pci_bus_id(number) for number in range(count)]
    except TransportUnavailable:
        yield Finding("CUDA", "no driver of NVIDIA on this host", Verdict.NOTE)
        return
    except DeviceError as error:
        advice = "in a container, start it with the devices (docker run --gpus all); else see what nvidia-smi says"
        verdict = Verdict.NOTE if error.code == _NO_DEVICE else Verdict.CHANGE
        yield Finding("CUDA", str(error), verdict, advice)
        return
    many = "1 device" if count == 1 else f"{count} devices"
    yield Finding("CUDA", f"the driver carries out CUDA {of_cuda}; {many}", Verdict.GOOD if count else Verdict.NOTE)
    for number, place in enumerate(places):
        yield _device(seen, number, place)
    if count > 1:
        yield _peers(cuda, count)
    if count:
        yield _pinning(seen, count)
        yield _arrays()
        yield _nccl()


def _device(seen: System, number: int, place: str) -> Finding:
    node = pci.numa_node(seen.root, place)
    where = f"PCI {place}" + ("" if node is None else f", NUMA node {node}")
    near = pci.nearest(seen.root, place)
    if near is None:
        return Finding(f"cuda:{number}", f"{where}; no network card is known", Verdict.GOOD)
    value = f"{where}; {near.how} {', '.join(near.cards)}"
    if near.is_far:
        advice = (
            f"what leaves by {', '.join(near.cards)} crosses between processors; a card on node {node} would be near"
        )
        return Finding(f"cuda:{number}", value, Verdict.NOTE, advice)
    return Finding(f"cuda:{number}", value, Verdict.GOOD)


def _peers(cuda: Cuda, count: int) -> Finding:
    """Return whether all devices read and write each other's memory."""
    try:
        apart = [(one, other) for one, other in permutations(range(count), 2) if not cuda.reaches(one, other)]
    except DeviceError as error:
        return Finding("peer access", str(error), Verdict.NOTE)
    if not apart:
        return Finding("peer access", f"all {count} devices reach each other's memory", Verdict.GOOD)
    one, other = apart[0]
    more = f" and {len(apart) - 1} more pairs" if len(apart) > 1 else ""
    advice = "between these, NCCL goes through the host's memory; nvidia-smi topo -m shows how devices are joined"
    return Finding("peer access", f"cuda:{one} does not reach cuda:{other}{more}", Verdict.NOTE, advice)


def _pinning(seen: System, count: int) -> Finding:
    """Return whether a container leaves room for pinned memory, which counts in its limit; memlock does not matter."""
    needed = count * LIMIT_BYTES
    pool = f"up to {format_bytes(LIMIT_BYTES)} a process (ulimit -l does not limit it)"
    limits = [
        int(text)
        for path in ("memory.max", "memory/memory.limit_in_bytes")
        if (text := seen.text(f"sys/fs/cgroup/{path}")) is not None and text.isdecimal()
    ]
    if not limits or min(limits) >= _NO_LIMIT_BYTES:
        return Finding("pinned memory", pool, Verdict.GOOD)
    value = f"{pool}; this container may use {format_bytes(min(limits))}"
    if min(limits) >= 2 * needed:
        return Finding("pinned memory", value, Verdict.GOOD)
    advice = (
        f"a rank for each device may pin {format_bytes(needed)} together, which counts in the container's limit: raise "
        "that (docker run --memory); what cannot be pinned is copied slowly"
    )
    return Finding("pinned memory", value, Verdict.CHANGE, advice)


def _arrays() -> Finding:
    """Return which libraries make arrays on devices; none is imported, since that takes seconds."""
    name = "arrays on devices"
    torch = find_spec("torch")
    made_for = None if torch is None or torch.origin is None else pci.text(Path(torch.origin).with_name("version.py"))
    built = None if made_for is None else re.search(r"^cuda\b[^=]*= '([\d.]+)'", made_for, re.MULTILINE)
    found = [] if built is None else [f"torch for CUDA {built[1]}"]
    found += [f"{each} {own}" for each in _CUPY if (own := _installed(each)) is not None]
    if found:
        return Finding(name, ", ".join(found), Verdict.GOOD)
    if torch is not None:
        advice = "install torch for CUDA, see https://pytorch.org/get-started"
        return Finding(name, "this torch is a build without CUDA", Verdict.CHANGE, advice)
    advice = f"pip install torch, or CuPy by {install_command('cuda12')} or {install_command('cuda13')}"
    return Finding(name, "neither torch nor CuPy is installed", Verdict.NOTE, advice)


def _nccl() -> Finding:
    found = [f"{each} {own}" for each in _NCCL if (own := _installed(each)) is not None]
    return Finding("NCCL", ", ".join(found) or "no package of it is installed", Verdict.GOOD if found else Verdict.NOTE)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
