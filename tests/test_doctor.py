"""What the doctor says of hosts that are made up, and that it can look at this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detcoll import doctor
from detcoll.cli import main
from detcoll.doctor import Finding, System, Verdict, examine
from detcoll.topology import Topology

GOOD = {
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
    monkeypatch.setattr("detcoll.registry._NEEDS", {"gloo": ("no_such_package", "pip install it")})
    found = look(tmp_path)
    assert found["transport slotted"].value == "installed"
    assert (found["transport gloo"].value, found["transport gloo"].verdict) == ("not installed", Verdict.NOTE)
    assert found["transport gloo"].advice == "no_such_package is not installed; install it with: pip install it"


def test_what_to_install_is_shown_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    why = "torch is missing; install it with: pip install 'detcoll[gloo]' [bold] :cat:"
    monkeypatch.setattr("detcoll.doctor.registry.why_missing", lambda name: why if name == "gloo" else None)
    assert main(["doctor"]) in (0, 1)
    assert f"transport gloo: {why}\n" in capsys.readouterr().out
