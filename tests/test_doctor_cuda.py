"""What the doctor says of CUDA, on hosts that are made up and over a driver that is made up."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from detcoll import doctor
from detcoll.doctor import Finding, System, Verdict
from detcoll.errors import DeviceError, TransportUnavailable

GPU = "0000:3b:00.0"


class Driver:
    """A driver that knows where its devices are."""

    def __init__(self, *places: str, apart: Collection[tuple[int, int]] = ()) -> None:
        self._places, self._apart = places, apart

    def version(self) -> tuple[int, int]:
        return 12, 4

    def count(self) -> int:
        return len(self._places)

    def pci_bus_id(self, device: int) -> str:
        return self._places[device]

    def reaches(self, device: int, other: int) -> bool:
        assert device != other
        return (device, other) not in self._apart


class Host:
    """The folders of the kernel, under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def device(self, way: str, node: int, card: str | None = None) -> None:
        """Attach a device below its bridges; with ``card`` it is a network card of that name."""
        folder = self.root / "sys/devices" / way
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
        links = [self.root / "sys/bus/pci/devices" / folder.name]
        if card is not None:
            links.append(self.root / "sys/class/net" / card / "device")
        for link in links:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    made.device("pci0000:3a/0000:3a:00.0/0000:3a:01.0/" + GPU, 0)
    monkeypatch.setattr(doctor, "driver", lambda: Driver(GPU))
    return made


def look(root: Path) -> dict[str, Finding]:
    return {found.name: found for found in doctor._cuda(System(root))}


def test_a_host_without_a_driver_gets_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise TransportUnavailable("arrays on CUDA devices need the driver library")

    monkeypatch.setattr(doctor, "driver", missing)
    [found] = look(tmp_path).values()
    assert (found.value, found.verdict, found.advice) == ("no driver of NVIDIA on this host", Verdict.NOTE, "")


@pytest.mark.parametrize(("code", "verdict"), [(100, Verdict.NOTE), (802, Verdict.CHANGE)])
def test_a_driver_that_cannot_be_used_is_told(
    code: int, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise DeviceError("cuInit", code, "CUDA_ERROR_X", "not today")

    monkeypatch.setattr(doctor, "driver", refuse)
    [found] = look(tmp_path).values()
    assert found.verdict is verdict
    assert "not today" in found.value
    assert "nvidia-smi" in found.advice


def test_a_driver_without_devices_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver", Driver)
    [found] = look(tmp_path).values()
    assert (found.value, found.verdict) == ("the driver carries out CUDA 12.4; 0 devices", Verdict.NOTE)


@pytest.mark.parametrize(
    ("cards", "said", "verdict"),
    [
        ([], "PCI 0000:3b:00.0, NUMA node 0; no network card is known", Verdict.GOOD),
        (
            [("pci0000:3a/0000:3a:00.0/0000:3a:02.0/0000:3c:00.0", 0, "ib0"), ("pci0000:3a/0000:3a:09.0", 0, "eth0")],
            "under one PCI bridge with ib0",
            Verdict.GOOD,
        ),
        ([("pci0000:3a/0000:3a:09.0", 0, "eth0")], "on one PCI root with eth0", Verdict.GOOD),
        (
            [("pci0000:00/0000:00:09.0", 0, "eth0"), ("pci0000:00/0000:00:0a.0", 0, "eth1")],
            "on one NUMA node with eth0, eth1",
            Verdict.GOOD,
        ),
        ([("pci0000:00/0000:00:09.0", -1, "eth0")], "on one host with eth0", Verdict.GOOD),
        ([("pci0000:80/0000:80:09.0", 1, "eth0")], "on another NUMA node than eth0", Verdict.NOTE),
        ([("virtual/net", 0, "veth0")], "no network card is known", Verdict.GOOD),
    ],
)
def test_the_nearest_network_card_is_named(
    cards: list[tuple[str, int, str]], said: str, verdict: Verdict, host: Host
) -> None:
    for way, node, name in cards:
        host.device(way, node, name)
    found = look(host.root)
    assert said in found["cuda:0"].value
    assert found["cuda:0"].verdict is verdict
    assert found["CUDA"].value == "the driver carries out CUDA 12.4; 1 device"


def test_a_device_whose_node_is_not_known(host: Host) -> None:
    (host.root / "sys/bus/pci/devices" / GPU / "numa_node").write_text("-1\n")
    assert look(host.root)["cuda:0"].value == "PCI 0000:3b:00.0; no network card is known"


@pytest.mark.parametrize(
    ("path", "limit", "verdict"),
    [
        ("memory.max", "max", Verdict.GOOD),
        ("memory.max", str(2**29), Verdict.GOOD),
        ("memory.max", str(2**28), Verdict.CHANGE),
        ("memory/memory.limit_in_bytes", str(2**28), Verdict.CHANGE),
        ("memory/memory.limit_in_bytes", str(2**63 - 4096), Verdict.GOOD),
    ],
)
def test_a_container_must_leave_room_for_pinned_memory(path: str, limit: str, verdict: Verdict, host: Host) -> None:
    file = host.root / "sys/fs/cgroup" / path
    file.parent.mkdir(parents=True)
    file.write_text(limit)
    found = look(host.root)["pinned memory"]
    assert found.verdict is verdict
    assert ("256 MiB together" in found.advice) == (verdict is Verdict.CHANGE)
    assert ("this container may use" in found.value) == (limit in (str(2**28), str(2**29)))


@pytest.mark.parametrize(
    ("torch", "packages", "arrays", "verdict"),
    [
        ("cuda: Optional[str] = '12.8'", {"nvidia-nccl-cu12": "2.27"}, "torch for CUDA 12.8", Verdict.GOOD),
        ("cuda = '12.8'", {"cupy-cuda12x": "13.4"}, "torch for CUDA 12.8, cupy-cuda12x 13.4", Verdict.GOOD),
        ("cuda = None", {}, "this torch is a build without CUDA", Verdict.CHANGE),
        ("cuda = None", {"cupy": "13.4"}, "cupy 13.4", Verdict.GOOD),
        (None, {}, "neither torch nor CuPy is installed", Verdict.NOTE),
    ],
)
def test_what_makes_arrays_is_found_without_importing_it(
    torch: str | None,
    packages: dict[str, str],
    arrays: str,
    verdict: Verdict,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name not in packages:
            raise doctor.PackageNotFoundError(name)
        return packages[name]

    spec = None if torch is None else type("Spec", (), {"origin": str(host.root / "__init__.py")})
    (host.root / "version.py").write_text(f"__version__ = '9.9'\n{torch}\ncuda_note = 'none'\n")
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
    found = look(host.root)
    assert (found["arrays on devices"].value, found["arrays on devices"].verdict) == (arrays, verdict)
    has_nccl = "nvidia-nccl-cu12" in packages
    assert found["NCCL"].value == ("nvidia-nccl-cu12 2.27" if has_nccl else "no package of it is installed")


@pytest.mark.parametrize(
    ("apart", "verdict", "said"),
    [
        ([], Verdict.GOOD, "all 3 devices reach each other's memory"),
        ([(2, 0)], Verdict.NOTE, "cuda:2 does not reach cuda:0"),
        ([(0, 1), (1, 0), (2, 1)], Verdict.NOTE, "cuda:0 does not reach cuda:1 and 2 more pairs"),
    ],
)
def test_devices_that_do_not_reach_each_other_are_named(
    apart: list[tuple[int, int]], verdict: Verdict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "driver", lambda: Driver(GPU, GPU, GPU, apart=apart))
    found = look(tmp_path)["peer access"]
    assert (found.verdict, found.value) == (verdict, said)
    assert ("nvidia-smi topo -m" in found.advice) == bool(apart)
    monkeypatch.setattr(doctor, "driver", lambda: Driver(GPU))
    assert "peer access" not in look(tmp_path)
