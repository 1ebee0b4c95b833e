"""Holds the lab's router against a C loop of read and write between the same devices, by a raw blast of units.

    python benchmarks/router_blast.py --rounds 5

One process puts units into the device of a first site as fast as it can; the loop, or the router, carries them to the
device of a second site, whose kernel drops them. That is the cheapest receiver, so the loop is as fast as it can be.
Both take turns, round by round, with units of two segments and with the largest. The sender has one
processor, what is measured another, and both a real-time priority; the sender sleeps where the device is full. Rates
count the processor time of what is measured.

Needs Linux, root, two processors and a C compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyroute2

from detcoll.emulation.lab import Conditions, Lab
from detcoll.emulation.lab.namespaces import new_namespace, run_inside
from detcoll.emulation.lab.tun import DEVICE, open_tun
from detcoll.measure.host import host_facts
from detcoll.quantities import parse_duration_ns, parse_rate_bytes_per_s
from detcoll.topology import Topology

SOURCE = Path(__file__).with_suffix(".c")
MTU_BYTES = 1500
HEADER_BYTES = 40
SEGMENT_BYTES = MTU_BYTES - HEADER_BYTES
UNITS = {"two segments": 2, "64 kB": 44}
"""Sizes of units, in segments."""

NOBODY = "10.77.1.9"
"""An address of the second site that it does not have: the kernel takes the unit and drops it."""

REAL_TIME_PRIORITY = 10
QUEUE_UNITS = 512
"""So many units wait in the first device at most, so that large ones do not fill the memory."""
PATIENCE_S = 30.0


def compile_blast(folder: Path) -> Path:
    """Return the program of ``router_blast.c``, compiled into ``folder``."""
    compiler = os.environ.get("CC") or "cc"
    if shutil.which(compiler) is None:
        sys.exit(
            f"router_blast.py compares with a C loop, and there is no C compiler {compiler!r}: install gcc or set CC"
        )
    program = folder / "router_blast"
    subprocess.run([compiler, "-O2", "-o", str(program), str(SOURCE)], check=True)
    return program


def own(processor: int, pid: int) -> None:
    """Give a process a processor that only the kernel and others of its priority share."""
    os.sched_setaffinity(pid, {processor})
    os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(REAL_TIME_PRIORITY))


def processors() -> tuple[int, int]:
    """Return the processors of the sender and of what is measured."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        sys.exit(f"router_blast.py needs two processors, one for the sender; it may use {len(usable)}")
    return usable[0], usable[-1]


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """End a process when its user is through."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def shorten_queue() -> None:
    """Bound what waits in the device of the calling thread's network."""
    with pyroute2.IPRoute() as netlink:
        netlink.link("set", index=netlink.link_lookup(ifname=DEVICE)[0], txqlen=QUEUE_UNITS)


def through_loop(program: Path, segments: int, for_s: float) -> dict[str, Any]:
    """Let the C loop forward for so long, and return what it counted."""
    opened = [new_namespace(partial(open_tun, f"10.77.{site}.1", MTU_BYTES, 65536, False)) for site in range(2)]
    (sending, from_fd), (_, to_fd) = opened
    try:
        run_inside(sending, shorten_queue)
        start = partial(subprocess.Popen, sender(program, segments), text=True)
        loop = [str(program), "forward", str(from_fd), str(to_fd), str(round(for_s * 1000))]
        forwarding = subprocess.Popen(loop, pass_fds=[from_fd, to_fd], stdout=subprocess.PIPE, text=True)
        with ended(forwarding):
            own(processors()[1], forwarding.pid)
            with ended(run_inside(sending, start)) as process:
                own(processors()[0], process.pid)
                told, _ = forwarding.communicate(timeout=for_s + PATIENCE_S)
    finally:
        for namespace, tun in opened:
            os.close(tun)
            namespace.close()
    counted: dict[str, Any] = json.loads(told)
    return counted


def through_router(program: Path, segments: int, for_s: float, rate: float, one_way_ns: int) -> dict[str, Any]:
    """Let the lab's router forward for so long, and return what it counted."""
    topology = Topology.uniform(2, 1, rate, one_way_ns, MTU_BYTES)
    with (
        Lab(topology, Conditions(2**32 - 1)) as lab,
        ended(lab.popen(0, sender(program, segments), text=True)) as process,
    ):
        own(processors()[0], process.pid)
        own(processors()[1], lab.router_pid)
        lab.call(0, shorten_queue)
        while not lab.statistics().direction(0, 1).units:
            time.sleep(0.01)
        before = lab.statistics()
        time.sleep(for_s)
        while (after := lab.statistics()).direction(0, 1).units == before.direction(0, 1).units:
            time.sleep(0.01)  # a busy machine may have let neither process run
    entries = [each.direction(0, 1) for each in (before, after)]
    units = entries[1].units - entries[0].units
    return {
        "units": units,
        "bytes": units * (HEADER_BYTES + segments * SEGMENT_BYTES),
        "elapsed_s": after.elapsed_s - before.elapsed_s,
        "cpu_s": after.cpu_s - before.cpu_s,
        "dropped": after.dropped_segments,
        "is_compiled": after.is_compiled,
    }


def sender(program: Path, segments: int) -> list[str]:
    return [str(program), "send", DEVICE, "10.77.0.1", NOBODY, str(segments), str(SEGMENT_BYTES)]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median rates on one core of several runs, and what was counted."""
    return {
        "units_per_s": round(statistics.median(run["units"] / run["cpu_s"] for run in runs)),
        "gbit_per_s": round(statistics.median(run["bytes"] * 8e-9 / run["cpu_s"] for run in runs), 3),
        "runs": runs,
    }


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    parser.add_argument("--rate", default="1000 Gbit/s", help="of the emulated lines")
    parser.add_argument("--one-way", default="0 ms", help="delay of the emulated lines")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rate, one_way_ns = parse_rate_bytes_per_s(given.rate, "rate"), parse_duration_ns(given.one_way, "one_way")
    facts: dict[str, Any] = {"schema": "detcoll.emulation.router-blast/1", "host": host_facts(), "units": {}}
    print("| units of | C loop, units/s | Gbit/s | router, units/s | Gbit/s | router / loop |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        program = compile_blast(Path(folder))
        for name, segments in UNITS.items():
            loops, routers = [], []
            for _ in range(given.rounds):
                loops.append(through_loop(program, segments, given.seconds))
                routers.append(through_router(program, segments, given.seconds, rate, one_way_ns))
            loop, router = summary(loops), summary(routers)
            ratio = router["units_per_s"] / loop["units_per_s"]
            facts["units"][name] = {"loop": loop, "router": router, "router_over_loop": ratio}
            rates = " | ".join(f"{one['units_per_s']:,} | {one['gbit_per_s']:.1f}" for one in (loop, router))
            print(f"| {name} | {rates} | {ratio:.2f} |")
    if given.json is not None:
        given.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
