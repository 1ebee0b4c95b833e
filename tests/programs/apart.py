"""Runs the ranks of a world, each on a network of its own, all joined by a switch; tells what they wrote.

Usage: apart.py, with one line of JSON on standard input:

- ``command`` : what each rank runs. It gets two more arguments, by which it can unplug its network: the descriptor of a
  socket in the network of the switch, and the name of its port there, to be set down.
- ``environments`` : the variables of each rank.
- ``networks`` : for each rank the number of its network; ranks of one number share it, and are unplugged together.
- ``folder`` : where to keep files.
- ``are_hosts`` : whether each network shows an identity of its own in the place of the kernel's, so that its ranks take
  those of others for ranks of other hosts, which share no memory with them.

It makes network namespaces, for which it needs to be root, if only of a user namespace. Nothing of them is left when it
and the ranks have ended. It prints a line of JSON: output and errors of each rank.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import pyroute2

from detcoll.emulation.lab.namespaces import Namespace, new_namespace, run_inside

ADDRESS = "10.77.0.{}"
_IDENTITY = "/proc/sys/kernel/random/boot_id"


def make_switch() -> socket.socket:
    """Make a switch without ports, and a socket by which its ports can be set up and down."""
    with pyroute2.IPRoute() as netlink:
        netlink.link("add", ifname="switch", kind="bridge")
        netlink.link("set", index=netlink.link_lookup(ifname="switch")[0], state="up")
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def take_identity(path: Path) -> None:
    """Let programs of this namespace read another identity of the host."""
    path.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
    subprocess.run(["mount", "--bind", str(path), _IDENTITY], check=True)


def port(number: int) -> str:
    """Return the name of a network's port of the switch."""
    return f"port{number}"


def plug_in(number: int, network: Namespace) -> None:
    """Join a network with the switch, in whose network this is called."""
    with pyroute2.IPRoute() as netlink:
        there = {"ifname": "eth0", "net_ns_fd": network.network}
        netlink.link("add", ifname=port(number), kind="veth", peer=there)
        index = netlink.link_lookup(ifname=port(number))[0]
        netlink.link("set", index=index, master=netlink.link_lookup(ifname="switch")[0], state="up")


def take_address(number: int) -> None:
    """Set the devices of this network up."""
    with pyroute2.IPRoute() as netlink:
        index = netlink.link_lookup(ifname="eth0")[0]
        netlink.addr("add", index=index, address=ADDRESS.format(number + 1), prefixlen=24)
        for name in ("lo", "eth0"):
            netlink.link("set", index=netlink.link_lookup(ifname=name)[0], state="up")


def start(command: list[str], environment: dict[str, str], plug: int, number: int) -> subprocess.Popen[str]:
    """Start a rank in the network of the calling thread."""
    return subprocess.Popen(
        [*command, str(plug), port(number)], env=environment, pass_fds=[plug], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def main() -> None:
    """Run them."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    switch, plug = new_namespace(make_switch)
    networks: dict[int, Namespace] = {}
    for number in sorted(set(job["networks"])):
        identity = partial(take_identity, Path(job["folder"], f"identity{number}"))
        networks[number], _ = new_namespace(identity if job["are_hosts"] else lambda: None)
        if job["are_hosts"] and networks[number].mounts is None:
            sys.exit("mounting is refused, so a network cannot show another identity")
        run_inside(switch, partial(plug_in, number, networks[number]))
        run_inside(networks[number], partial(take_address, number))
    started = []
    for number, environment in zip(job["networks"], job["environments"], strict=True):
        begin = partial(start, job["command"], environment, plug.fileno(), number)
        started.append(run_inside(networks[number], begin))
    try:
        said = [process.communicate() for process in started]
    finally:
        for process in started:
            process.kill()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
