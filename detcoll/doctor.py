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
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from detcoll import registry
from detcoll.job.settings import AUTO
from detcoll.path_mtu import PORT, PathMtu, probe
from detcoll.priority import make_prompt
from detcoll.topology import Topology

DEFAULT_RATE_BYTES_PER_S, DEFAULT_ROUND_TRIP_NS = 125e6, 20_000_000
"""Of the line that is assumed where no topology is given: 1 Gbit/s over 20 ms."""

GOOD_CLOCK_SOURCES = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", "xen")
LEAST_PACING_KERNEL = (5, 1)
"""Since then the kernel takes 64-bit pacing rates (``SO_MAX_PACING_RATE``)."""

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
        try:
            return (self.root / path).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None


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
