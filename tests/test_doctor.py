"""What the doctor says of hosts that are made up, and that it can look at this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from detcoll import doctor
from detcoll.cli import main
from detcoll.doctor import Finding, System, Verdict, examine
from detcoll.errors import ConnectError
from detcoll.installation import install_command
from detcoll.path_mtu import PathMtu, probe
from detcoll.topology import Topology

GOOD = {
    "proc/sys/net/ipv4/tcp_mtu_probing": "1",
    "proc/sys/net/ipv4/tcp_wmem": "4096 16384 67108864",
    "proc/sys/net/ipv4/tcp_rmem": "4096 131072 67108864",
    "proc/sys/net/ipv4/tcp_slow_start_after_idle": "0",
    "proc/sys/net/ipv4/tcp_congestion_control": "bbr",
    "proc/sys/net/ipv4/tcp_available_congestion_control": "reno bbr cubic",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "kvm-clock",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure this host."""
    monkeypatch.setattr(doctor, "late_ns", lambda: [50_000] * 100)
    monkeypatch.setattr(doctor, "_adjtimex", lambda: (250_000, 0))
    monkeypatch.setattr(doctor, "make_prompt", lambda: True)
    monkeypatch.delenv("DETCOLL_CONGESTION", raising=False)


def look(root: Path, topology: Topology | None = None, kernel: str = "6.1.0-x", **changes: str) -> dict[str, Finding]:
    for path, text in (
        GOOD | {path: changes.get(path.rpartition("/")[2], text) for path, text in GOOD.items()}
    ).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n", encoding="ascii")
    return {found.name: found for found in examine(topology, System(root, kernel, 2))}


@pytest.mark.usefixtures("quick")
def test_nothing_is_wrong_with_a_good_host(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert not [one for one in found.values() if one.verdict is Verdict.CHANGE]
    assert found["congestion control"].value == "slotted uses cubic; the kernel's default is bbr"
    assert found["clock discipline"].value == "the kernel bounds the error at 0.250 ms"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "change", "advice"),
    [
        ("tcp_wmem", {"tcp_wmem": "4096 16384 4194304"}, "4096 16384 5000000"),
        ("tcp_rmem", {"tcp_rmem": "4096 131072 4999999"}, "tcp_rmem='4096 131072 5000000'"),
        ("slow start after idle", {"tcp_slow_start_after_idle": "1"}, "tcp_slow_start_after_idle=0"),
        ("congestion control", {"tcp_available_congestion_control": "reno bbr"}, "modprobe tcp_cubic"),
        ("clock source", {"current_clocksource": "hpet"}, "prefer tsc"),
        ("kernel", {"kernel": "4.19.0-12"}, "Linux 5.1"),
    ],
)
def test_what_should_change_is_said(tmp_path: Path, name: str, change: dict[str, str], advice: str) -> None:
    found = look(tmp_path, **change)
    assert {one.name for one in found.values() if one.verdict is Verdict.CHANGE} == {name}
    assert advice in found[name].advice


@pytest.mark.usefixtures("quick")
def test_the_lines_of_a_topology_decide_what_buffers_must_hold(tmp_path: Path) -> None:
    fast = Topology.uniform(2, 3, 1.25e9, 30_000_000)
    found = look(tmp_path, fast)
    assert found["tcp_wmem"].verdict is Verdict.CHANGE
    assert "150000000" in found["tcp_wmem"].advice
    assert "3 ranks" in found["cores"].advice


@pytest.mark.usefixtures("quick")
def test_a_host_that_wakes_up_late_or_grants_no_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "late_ns", lambda: [50_000] * 98 + [3_000_000] * 2)
    monkeypatch.setattr(doctor, "make_prompt", lambda: False)
    monkeypatch.setattr(doctor, "_adjtimex", lambda: (16_000_000_000, 0x40))
    found = look(tmp_path)
    assert found["waking up"].verdict is Verdict.CHANGE
    assert "3.00 ms one time in a hundred" in found["waking up"].value
    assert found["real-time priority"].verdict is Verdict.CHANGE
    assert found["clock discipline"].value == "none"


@pytest.mark.usefixtures("quick")
def test_what_a_system_does_not_tell_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_adjtimex", lambda: None)
    found = {one.name: one for one in examine(None, System(tmp_path, "6.1", 2))}
    assert {found[name].value for name in ("tcp_wmem", "slow start after idle", "clock source")} == {"unknown"}


def test_the_command_looks_at_this_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    assert main(["doctor", "--json", str(path)]) in (0, 1)
    names = [one["name"] for one in json.loads(path.read_bytes())["findings"]]
    assert {"waking up", "transport slotted", "clock source"} <= set(names)
    assert "waking up" in capsys.readouterr().out
    assert main(["doctor", "--topology", str(tmp_path / "missing.toml")]) == 2


@pytest.mark.usefixtures("quick")
def test_a_transport_whose_package_is_missing_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detcoll.registry._NEEDS", {"gloo": ("no_such_package", "gloo")})
    found = look(tmp_path)
    assert found["transport slotted"].value == "installed"
    assert (found["transport gloo"].value, found["transport gloo"].verdict) == ("not installed", Verdict.NOTE)
    assert (
        found["transport gloo"].advice
        == f"no_such_package is not installed; install it with: {install_command('gloo')}"
    )


def test_what_to_install_is_shown_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    why = "torch is missing; install it with: pip install 'detcoll[gloo]' [bold] :cat:"
    monkeypatch.setattr("detcoll.doctor.registry.why_missing", lambda name: why if name == "gloo" else None)
    assert main(["doctor"]) in (0, 1)
    assert f"transport gloo: {why}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "verdict", "told"),
    [
        (PathMtu(1500, 1500), Verdict.GOOD, "up to 1,500 bytes"),
        (PathMtu(1500, 1400, is_told=True), Verdict.GOOD, "a router refuses larger ones"),
        (PathMtu(1500, 1400), Verdict.CHANGE, "up to 1,400 bytes; larger ones vanish without a word"),
        (PathMtu(1500, 0), Verdict.NOTE, "no probe was answered"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_packets_that_vanish_are_a_thing_to_change(
    found: PathMtu, verdict: Verdict, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "probe", lambda host: found)
    look(tmp_path)
    (one,) = [one for one in examine(None, System(tmp_path), ["far"]) if one.name == "packets to far"]
    assert one.verdict is verdict
    assert told in one.value
    assert ("tcp_mtu_probing=1" in one.advice) == (verdict is Verdict.CHANGE)


NETWORK = """
set -e
mount -t tmpfs none /run
mkdir /run/netns
for name in near router far; do ip netns add $name; done
ip link add in netns router type veth peer name out netns near
ip link add on netns router type veth peer name end netns far
ip -n near address add 10.0.1.1/24 dev out
ip -n router address add 10.0.1.2/24 dev in
ip -n router address add 10.0.2.2/24 dev on
ip -n far address add 10.0.2.1/24 dev end
ip -n near link set dev out up
ip -n router link set dev in up
ip -n router link set dev on up mtu 1400
ip -n far link set dev end up
ip -n near route add default via 10.0.1.2
ip -n far route add default via 10.0.2.2
ip netns exec router sysctl -qw net.ipv4.ip_forward=1
[ $1 = told ] || ip -n router rule add iif lo to 10.0.1.1 pref 1 blackhole
shift
exec ip netns exec near "$@"
"""
"""Two hosts and a router between them whose second link takes 1400 bytes; it says so, or cannot."""


@pytest.mark.parametrize("kind", ["told", "silent"])
def test_a_small_path_mtu_is_found(kind: str) -> None:
    program = "from detcoll.path_mtu import probe; found = probe('10.0.2.1'); print(found.passed_bytes, found.is_told)"
    command = ["unshare", "-nm", "bash", "-c", NETWORK, "bash", kind, sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    if done.returncode and "Operation not permitted" in done.stderr:
        pytest.skip("network namespaces need root")
    assert (done.stdout, done.stderr) == (f"1400 {kind == 'told'}\n", "")


def test_the_whole_packet_passes_on_loopback_and_a_name_that_leads_nowhere_is_told() -> None:
    found = probe("127.0.0.1")
    assert found.passed_bytes == found.device_bytes
    with pytest.raises(ConnectError, match=r"no packet can be sent to 'a\.\.b'"):
        probe("a..b")
