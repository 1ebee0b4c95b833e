"""Measures what transports make of a line that is faster than a host: two network namespaces joined by a veth pair.

    python benchmarks/fast_lines.py --json fast_lines.json

No router stands between the sites and nothing limits the rate, so processors do: the topology states more than they
can send. Every row tells the time of an all-reduce, the bytes of the array over it, and the processor time of all ranks
for each 10**9 bytes that they reduce together. Transports take turns in each of ``--rounds``, on the same processes, so
that a busy minute does not fall on one of them. Every result is checked. Needs Linux.

A line keeps the packets of a connection in order; a veth pair by itself does not, since each packet is handled on the
processor that happens to send it, and acknowledgements make another one send. TCP then takes packets for lost that only
came late, sends them again and slows down. So each site hands all packets of a connection to one processor (receive
packet steering), as network cards do; that takes root, and ``--order any`` leaves it out.

Processor time is that of the ranks' processes; what the kernel does in interrupts may count for whoever runs just then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from detcoll.emulation.lab import obtain
from detcoll.emulation.lab.namespaces import Namespace, end_processes, new_namespace, run_inside
from detcoll.launch.environment import rank_numbers, without_place
from detcoll.launch.processes import ended_by_signals
from detcoll.launch.ranks import Outputs, run_crew
from detcoll.measure.host import host_facts
from detcoll.measure.runner import AS_IT_IS, ONE_THREAD
from detcoll.quantities import format_rate, parse_rate_bytes_per_s
from detcoll.topology import Topology

SCHEMA = "detcoll.fast-lines/1"
SITES = 2
DEVICE = "fast0"
ONE_WAY_NS = 50_000
"""What the topology states: about what a veth pair and two wake-ups take."""

MASTER_PORT, RENDEZVOUS_PORT = 29500, 29400
_GRACE_NS = 2 * 10**9


def address(site: int) -> str:
    """Return the address of a site."""
    return f"10.78.0.{site + 1}"


def processors_mask(processors: Collection[int]) -> str:
    """Return a set of processors as the kernel writes it: hexadecimal, a comma after each 32 of them."""
    mask = sum(1 << number for number in processors)
    words = [mask >> 32 * at & 0xFFFFFFFF for at in range(max(mask.bit_length() - 1, 0) // 32 + 1)]
    return ",".join(f"{word:08x}" for word in reversed(words))


def _bring_up(site: int, mtu_bytes: int, *, keeps_order: bool) -> None:
    """Give the device of this thread's namespace its address."""
    import pyroute2

    with pyroute2.IPRoute() as netlink:
        index = netlink.link_lookup(ifname=DEVICE)[0]
        netlink.link("set", index=index, mtu=mtu_bytes)
        netlink.addr("add", index=index, address=address(site), prefixlen=24)
        netlink.link("set", index=index, state="up")
        netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")
    if keeps_order:
        _steer()


def _steer() -> None:
    """Let all packets of a connection be handled on one processor."""
    steering = Path(f"/sys/class/net/{DEVICE}/queues/rx-0/rps_cpus")
    try:
        steering.write_text(processors_mask(os.sched_getaffinity(0)), encoding="ascii")
    except OSError as error:
        sys.exit(f"packets cannot be kept in order, since {steering} cannot be written ({error}); try --order any")


def _join(other: Namespace) -> None:
    """Make the pair, one end of it in this thread's namespace."""
    import pyroute2

    with pyroute2.IPRoute() as netlink:
        netlink.link("add", ifname=DEVICE, kind="veth", peer={"ifname": DEVICE, "net_ns_fd": other.network})


@contextmanager
def joined_sites(mtu_bytes: int, *, keeps_order: bool) -> Iterator[list[Namespace]]:
    """Make a namespace for each site and a veth pair between them; nothing of it is left afterwards."""
    with ExitStack() as stack:
        sites = []
        for _ in range(SITES):
            namespace, _ = new_namespace(lambda: None)
            stack.callback(namespace.close)
            sites.append(namespace)
        stack.callback(end_processes, [site.network for site in sites], _GRACE_NS)
        run_inside(sites[0], partial(_join, sites[1]))
        for number, site in enumerate(sites):
            run_inside(site, partial(_bring_up, number, mtu_bytes, keeps_order=keeps_order))
        yield sites


def environments(topology: Topology, topology_path: Path) -> list[dict[str, str]]:
    """Return the variables that tell each rank who and where it is."""
    found = []
    for rank in range(topology.size):
        site = topology.sites[topology.site_of(rank)]
        numbers = rank_numbers(rank, topology.size, site.ranks.index(rank), len(site.ranks), prefixes=("",))
        found.append(without_place(os.environ) | ONE_THREAD | AS_IT_IS | numbers | {
            "MASTER_ADDR": address(0), "MASTER_PORT": str(MASTER_PORT), "DETCOLL_TOPOLOGY": str(topology_path),
            "DETCOLL_RENDEZVOUS": f"{address(0)}:{RENDEZVOUS_PORT}", "DETCOLL_SITE": site.name,
            "DETCOLL_INSECURE": "1", "GLOO_SOCKET_IFNAME": DEVICE, "TORCH_CPP_LOG_LEVEL": "ERROR",
        })  # fmt: skip
    return found


def start_in(site: Namespace, argv: Sequence[str], env: dict[str, str], outputs: Outputs) -> subprocess.Popen[bytes]:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv, env={**env, **outputs.variables}, stdin=subprocess.DEVNULL, stdout=outputs.stdout,
            stderr=outputs.stderr, pass_fds=outputs.inherited, start_new_session=True,
        )  # fmt: skip

    return run_inside(site, start)


def measure(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run the ranks, and return the rows that they wrote."""
    rate_bytes_per_s = parse_rate_bytes_per_s(given.rate, "rate")
    topology = Topology.uniform(SITES, given.ranks_per_site, rate_bytes_per_s, ONE_WAY_NS)
    topology_path, rows_path = folder / "topology.toml", folder / "rows.json"
    topology_path.write_text(topology.to_toml(), encoding="utf-8")
    in_turn = ",".join([given.transports] * given.rounds)
    argv = [
        sys.executable, "-m", "detcoll", "bench", "--topology", str(topology_path), "--transport", in_turn, "--bytes",
        given.bytes, "--iterations", str(given.iterations), "--warmup", str(given.warmup), "--json", str(rows_path),
    ]  # fmt: skip
    with joined_sites(topology.mtu_bytes, keeps_order=given.order == "kept") as sites:
        starts = [
            partial(start_in, sites[topology.site_of(rank)], argv, own)
            for rank, own in enumerate(environments(topology, topology_path))
        ]
        code = run_crew(starts, logs=folder, deadline_s=given.deadline)
    if code or not rows_path.exists():
        sys.exit(f"the ranks ended with exit code {code}")
    rows: list[dict[str, Any]] = json.loads(rows_path.read_bytes())["rows"]
    return rows


def summary(rows: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Return a line a size and transport: medians over all calls, and over rounds what a round tells once.

    ``speed`` and ``processor`` are those of ``baseline`` over this one's and this one's over it, by round.
    """
    found = []
    for nbytes in sorted({row["bytes"] for row in rows}):
        of_size = [row for row in rows if row["bytes"] == nbytes]
        bases = [row for row in of_size if row["transport"] == baseline]
        for name in dict.fromkeys(row["transport"] for row in of_size):
            own = [row for row in of_size if row["transport"] == name]
            median_s = statistics.median(sample for row in own for sample in row["samples_s"])
            line = {
                "transport": name, "bytes": nbytes, "calls": sum(row["iterations"] for row in own),
                "median_s": median_s, "bits_per_s": 8 * nbytes / median_s,
                "cpu_s_per_gb": statistics.median(row["cpu_s_per_gb"] for row in own),
                "retransmits": [row["retransmits"] for row in own],
            }  # fmt: skip
            if bases:
                pairs = list(zip(own, bases, strict=True))
                line["speed"] = statistics.median(base["median_s"] / row["median_s"] for row, base in pairs)
                line["processor"] = statistics.median(row["cpu_s_per_gb"] / base["cpu_s_per_gb"] for row, base in pairs)
            found.append(line)
    return found


def table(lines: Sequence[dict[str, Any]], baseline: str) -> str:
    """Return the lines as Markdown."""
    shown = [
        f"| transport | bytes | median | rate | processor time | speed / {baseline} | processor time / {baseline} | "
        "segments sent again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        ratios, again = "- | -", "-" if None in line["retransmits"] else f"{sum(line['retransmits']):,}"
        with suppress(KeyError):
            ratios = f"{line['speed']:.2f} | {line['processor']:.2f}"
        shown.append(
            f"| {line['transport']} | {line['bytes']:,} | {line['median_s'] * 1e3:.1f} ms | "
            f"{line['bits_per_s'] / 1e9:.1f} Gbit/s | {line['cpu_s_per_gb']:.2f} s/GB | {ratios} | "
            f"{again} |"
        )
    return "\n".join(shown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="40 Gbit/s", help="what the topology states of each site's line")
    parser.add_argument("--ranks-per-site", type=int, default=1)
    parser.add_argument("--transports", default="slotted,gloo", help="separated by commas")
    parser.add_argument("--baseline", default="gloo", help="the transport that others are compared with")
    parser.add_argument("--order", choices=["kept", "any"], default="kept", help="of a connection's packets")
    parser.add_argument("--bytes", default="64MiB,256MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10, help="timed calls each size and round")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=600, help="seconds that all of it may take")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, write the file."""
    given = _arguments()
    if (reason := obtain()) is not None:
        sys.exit(f"the lab cannot be opened: {reason}")
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="detcoll-fast-lines-") as name:
        rows = measure(given, Path(name))
    lines, host = summary(rows, given.baseline), host_facts()
    print(table(lines, given.baseline))
    print(", ".join(f"{name} {value}" for name, value in host.items() if value is not None))
    if given.json is not None:
        topology = {"rate": format_rate(parse_rate_bytes_per_s(given.rate, "rate")), "one_way_ns": ONE_WAY_NS,
                    "sites": SITES, "ranks_per_site": given.ranks_per_site, "order": given.order}  # fmt: skip
        wrote = {"schema": SCHEMA, "host": host, "topology": topology, "lines": lines, "rows": rows}
        given.json.write_text(json.dumps(wrote, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
