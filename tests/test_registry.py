"""Transports are found by name: ours, one that is registered here, and none that is not one."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from detcoll import registry
from detcoll.errors import TransportUnavailable, UsageError
from detcoll.testing import MemoryTransport
from detcoll.transport import Transport


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Entry points that look installed: name to value."""
    values: dict[str, str] = {}

    def entry_points(group: str) -> list[EntryPoint]:
        return [EntryPoint(name, value, group) for name, value in values.items()]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return values


@pytest.mark.parametrize("name", ["slotted", "shm", "mpi", "gloo"])
def test_ours_are_found(name: str) -> None:
    assert name in registry.names()
    transport = registry.load(name)
    assert isinstance(transport, Transport)
    assert transport.name == name


def test_a_registered_one_is_found() -> None:
    assert registry.register(MemoryTransport) is MemoryTransport
    assert registry.register(MemoryTransport) is MemoryTransport
    assert "memory" in registry.names()
    assert isinstance(registry.load("memory"), MemoryTransport)


def test_a_taken_name_is_refused() -> None:
    registry.register(MemoryTransport)

    class Another(MemoryTransport):
        pass

    with pytest.raises(UsageError, match="'memory' is already taken"):
        registry.register(Another)


@pytest.mark.parametrize("value", [object, MemoryTransport(), "memory"])
def test_what_is_no_transport_is_not_registered(value: object) -> None:
    with pytest.raises(UsageError, match="must be a subclass"):
        registry.register(value)


def test_unknown_name_shows_the_known_ones(installed: dict[str, str]) -> None:
    installed["pigeon"] = "detcoll.testing:MemoryTransport"
    with pytest.raises(UsageError, match=r"transport='dove' is not known.*pigeon"):
        registry.load("dove")


def test_installed_one_is_loaded(installed: dict[str, str]) -> None:
    installed["pigeon"] = "detcoll.testing:MemoryTransport"
    assert registry.names() == ["pigeon"]
    assert isinstance(registry.load("pigeon"), MemoryTransport)


def test_what_does_not_import_is_unavailable(installed: dict[str, str]) -> None:
    installed["pigeon"] = "no_such_package:Pigeon"
    with pytest.raises(TransportUnavailable, match="no_such_package"):
        registry.load("pigeon")


def test_what_is_no_transport_is_refused(installed: dict[str, str]) -> None:
    installed["pigeon"] = "builtins:dict"
    with pytest.raises(UsageError, match=r"no detcoll\.transport\.Transport"):
        registry.load("pigeon")
