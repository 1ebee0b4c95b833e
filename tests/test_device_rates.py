"""How fast copies are is measured once a process and device, and predictions use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import pytest
from devices import assert_nothing_left
from ranks import lines, run_ranks

from detcoll.communicator import Communicator
from detcoll.device import CopyRates, copy_rates, cuda, rates
from detcoll.testing.device import StrictDevice, in_place_of_cuda

NBYTES = 4_000_000
ROOM = import_module("detcoll.communicator")


@pytest.fixture
def device() -> Iterator[StrictDevice]:
    rates._known.forget()
    with in_place_of_cuda() as strict:
        strict.seeded(7)
        yield strict
    rates._known.forget()


def test_rates_are_measured_once(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    found = copy_rates()
    assert found is not None
    assert found.bytes_per_s > 0 < found.latency_ns
    assert not device.unpinned
    monkeypatch.setattr(rates, "_measured", lambda device: pytest.fail("it is known"))
    assert copy_rates() is found
    assert_nothing_left(device)


def test_the_slower_direction_counts_and_latency_is_apart(
    device: StrictDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_ns = iter(range(0, 900_000_000, 1_000_000))  # the first of each kind is the quickest, and counts

    def timed_ns(copies: Any, buffer: Any, parts: Sequence[Any], to_device: bool) -> int:
        nbytes, known = sum(part.nbytes for part in parts), (to_device, len(parts), parts[0].nbytes)
        late = 0 if known not in seen else next(late_ns)
        seen.add(known)
        return round(9_000 + nbytes / (10e9 if to_device else 40e9) * 1e9) + late

    seen: set[tuple[bool, int, int]] = set()
    monkeypatch.setattr(rates, "_timed_ns", timed_ns)
    found = copy_rates()
    assert found is not None
    assert found.bytes_per_s == pytest.approx(10e9, rel=1e-4)
    assert found.latency_ns == pytest.approx(9_000, rel=0.1)


@pytest.mark.parametrize("call", ["allocate", "to_host", "to_device", "event"])
def test_a_device_that_refuses_leaves_predictions_as_they_were(device: StrictDevice, call: str) -> None:
    device.fail(call, 2)
    assert copy_rates() is None
    assert copy_rates() is None
    assert_nothing_left(device)


def test_memory_that_is_not_pinned_says_nothing(device: StrictDevice) -> None:
    device.fail("register", 2)
    assert copy_rates() is None
    assert not device.unpinned


def test_without_a_device_in_use_nothing_is_measured(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_driver", StrictDevice(used=()))
    assert copy_rates() is None
    monkeypatch.setattr(cuda, "_driver", device)
    assert copy_rates() is not None, "a device that came into use later"
    monkeypatch.setattr(cuda, "_driver", None)
    monkeypatch.setattr(cuda, "LIBRARY", "libno-cuda.so")
    assert copy_rates() is None


def test_a_device_that_does_nothing_is_given_up(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    device._random = None
    monkeypatch.setattr(rates, "LONGEST_NS", 0)
    assert copy_rates() is None


def test_predictions_on_devices_use_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(rates_of: Callable[[], CopyRates | None]) -> float:
        monkeypatch.setattr(ROOM, "copy_rates", rates_of)

        def program(comm: Communicator) -> float:
            found = comm.predict("all_reduce", NBYTES, on_device=True)
            assert found is not None
            return found

        return run_ranks(2, program, transport="tcp", topology=lines(1, 1))[0]

    usual_s = predicted(lambda: None)
    assert predicted(lambda: CopyRates(20e9, 20_000)) == usual_s
    assert predicted(lambda: CopyRates(20e9, 1_020_000)) == pytest.approx(usual_s + 2e-3, rel=0.02)
    assert predicted(lambda: CopyRates(NBYTES / 2.0, 0)) > 2

    def on_host(comm: Communicator) -> None:
        assert comm.predict("all_reduce", NBYTES)

    monkeypatch.setattr(ROOM, "copy_rates", lambda: pytest.fail("nothing is on a device"))
    run_ranks(2, on_host, transport="tcp", topology=lines(1, 1))
