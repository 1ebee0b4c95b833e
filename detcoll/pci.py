"""Where devices of this host are attached: NUMA nodes, and which network cards are near a device.

The kernel shows each PCI device under ``/sys/bus/pci/devices`` as a link into ``/sys/devices``, whose folders are the
bridges on the way: ``pci0000:3a/0000:3a:00.0/0000:3b:00.0``. Devices that share a bridge reach each other without the
processor. ``numa_node`` is -1 where the kernel does not know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class _Distance(IntEnum):
    BRIDGE = 0
    ROOT = 1
    NODE = 2
    UNKNOWN = 3
    FAR = 4


_HOW = {
    _Distance.BRIDGE: "under one PCI bridge with",
    _Distance.ROOT: "on one PCI root with",
    _Distance.NODE: "on one NUMA node with",
    _Distance.UNKNOWN: "on one host with",
    _Distance.FAR: "on another NUMA node than",
}


@dataclass(frozen=True, slots=True)
class Near:
    """The network cards that are nearest to a device, and how near, in words; ``is_far`` : on another NUMA node."""

    cards: tuple[str, ...]
    how: str
    is_far: bool


def nearest(root: Path, place: str) -> Near | None:
    """Return the network cards nearest to a PCI device, or None if the host has none on PCI.

    Parameters
    ----------
    root : Path
        Where ``/sys`` hangs.
    place : str
        The device, such as ``"0000:3b:00.0"``.
    """
    found: dict[_Distance, list[str]] = {}
    for card in sorted((root / "sys/class/net").glob("*")):
        own = (card / "device").resolve()
        if own.exists() and any(part.startswith("pci") for part in own.parts):
            found.setdefault(_distance(_device(root, place), own), []).append(card.name)
    if not found:
        return None
    least = min(found)
    return Near(tuple(found[least]), _HOW[least], least is _Distance.FAR)


def numa_node(root: Path, place: str) -> int | None:
    """Return the NUMA node of a PCI device, or None where the kernel does not know it."""
    return _node(_device(root, place))


def text(path: Path) -> str | None:
    """Return a file's text without white space at its ends, or None where it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _device(root: Path, place: str) -> Path:
    return (root / "sys/bus/pci/devices" / place).resolve()


def _node(device: Path) -> int | None:
    told = text(device / "numa_node")
    return int(told) if told is not None and told.isdecimal() else None


def _distance(device: Path, card: Path) -> _Distance:
    bridges, others = (_bridges(each) for each in (device, card))
    shared = sum(1 for one, other in zip(bridges, others, strict=False) if one == other)
    if shared:
        return _Distance.BRIDGE if shared > 1 else _Distance.ROOT
    nodes = _node(device), _node(card)
    if None in nodes:
        return _Distance.UNKNOWN
    return _Distance.NODE if nodes[0] == nodes[1] else _Distance.FAR


def _bridges(device: Path) -> tuple[str, ...]:
    """Return the PCI root and the bridges on the way to a device, without itself."""
    parts = device.parts
    first = next((number for number, part in enumerate(parts) if part.startswith("pci")), len(parts))
    return parts[first:-1]
