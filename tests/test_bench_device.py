"""``detcoll bench --device``: sweeps over arrays of devices, on the strict double of CUDA, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ranks import run_ranks

from detcoll.bench import runs, sweep
from detcoll.bench.sweep import Sweep, run_sweep
from detcoll.cli import main
from detcoll.cli.terminal import output_console
from detcoll.communicator import Communicator
from detcoll.device import CopyRates, cuda, now
from detcoll.errors import TransportError
from detcoll.measure.results import BENCH_SCHEMA, BenchResult, Row
from detcoll.measure.tables import bench_table
from detcoll.testing.device import StrictDevice
from detcoll.types import BFLOAT16
from detcoll.workloads import arrays
from detcoll.workloads.arrays import Arrays, HostArrays, place_on_host

KINDS = ("all_reduce", "reduce", "all_gather", "barrier")


class DoubleArrays(Arrays):
    """Arrays of the double, which hold other values than the host's until they are uploaded."""

    device = "cuda"

    def __init__(self, strict: StrictDevice) -> None:
        self._strict = strict

    def array(self, host: NDArray[Any]) -> Any:
        return self._strict.array(np.full_like(host, 99))

    def upload(self, host: NDArray[Any], array: Any) -> None:
        self._strict.poke(array, host)
        host[:] = 98

    def download(self, array: Any, host: NDArray[Any]) -> None:
        host[:] = self._strict.peek(array)

    def settle(self) -> None: ...


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictDevice]:
    strict = StrictDevice()
    strict.seeded(5)
    monkeypatch.setattr(cuda, "_driver", strict)
    monkeypatch.setattr(sweep, "require_device", lambda device, dtype: None)
    now._shared.forget()
    yield strict
    now._shared.forget()
    assert not strict.misuses


def both(strict: StrictDevice) -> Any:
    return lambda name, comm: DoubleArrays(strict) if name == "cuda" else HostArrays()


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_sweep_on_devices_is_checked_and_says_where_arrays_were(device: StrictDevice, transport: str) -> None:
    asked = Sweep(KINDS, (40_000,), "float32", 2, 1, devices=("cpu", "cuda"))
    first, second = run_ranks(2, lambda comm: run_sweep(comm, asked, None, both(device)), transport=transport)
    assert [(row.device, row.collective) for row in first] == [(name, kind) for name in asked.devices for kind in KINDS]
    assert first == second


def test_all_ranks_tell_the_prediction_of_rank_0(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    found = count(1)
    monkeypatch.setattr(
        import_module("detcoll.communicator"), "copy_rates", lambda: CopyRates(next(found) * 1e9, 20_000)
    )
    asked = Sweep(("all_reduce",), (40_000,), "float32", 1, 0, devices=("cuda",))
    first, second = run_ranks(2, lambda comm: run_sweep(comm, asked, None, both(device)), transport="tcp")
    assert first[0].predicted_s == second[0].predicted_s is not None


def test_a_wrong_result_on_a_device_is_an_error(device: StrictDevice) -> None:
    class Spoiling(DoubleArrays):
        def download(self, array: Any, host: NDArray[Any]) -> None:
            device.poke(array, 7)
            super().download(array, host)

    asked = Sweep(("all_reduce",), (4096,), "float32", 1, 0, devices=("cuda",))

    def program(comm: Communicator) -> None:
        with pytest.raises(TransportError, match=r"element 0 is 7\.0"):
            run_sweep(comm, asked, None, lambda *_: Spoiling(device))

    run_ranks(1, program, transport="tcp")


def test_ranks_of_a_host_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(3, place_on_host, transport="tcp") == [0, 1, 2]
    asked = iter([5, 6, 5])  # whichever rank asks first

    def numbered(comm: Communicator) -> tuple[int, int]:
        monkeypatch.setattr(arrays, "host_number", lambda: next(asked))
        return place_on_host(comm), 0

    assert sorted(run_ranks(3, numbered, transport="tcp")) == [(0, 0), (0, 0), (1, 0)]


class FakeTorch:
    """As much of torch as is asked before anything starts."""

    __version__ = "9.9"

    def __init__(self, built: str | None, available: bool) -> None:
        self.version = type("Version", (), {"cuda": built, "hip": None})
        self.cuda = type("Cuda", (), {"is_available": staticmethod(lambda: available)})


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is installed, by name."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(arrays, "find_spec", lambda name: found.get(name))
    monkeypatch.setattr(arrays, "import_module", lambda name: found[name])
    return found


@pytest.mark.parametrize(
    ("torch", "why"),
    [
        (None, "torch is not installed"),
        (FakeTorch(None, False), "torch 9.9 is a build without CUDA"),
        (FakeTorch("12.8", False), "torch 9.9 finds no CUDA device"),
    ],
)
@pytest.mark.parametrize("where", [[], ["--lab"], ["--relay"]])
def test_a_missing_device_is_told_before_anything_starts(
    torch: FakeTorch | None,
    why: str,
    where: list[str],
    libraries: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    libraries["torch"] = torch
    for room, name in ((runs.detcoll, "init"), (runs, "Lab"), (runs, "Relay")):
        monkeypatch.setattr(room, name, lambda *_, **__: pytest.fail("something started"))
    assert main(["bench", "--device", "cuda", *where]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"device='cuda' needs torch or CuPy with a CUDA device: {why}; CuPy is not installed" in told
    assert "[cuda12]" in told


def test_torch_is_taken_before_cupy_and_cupy_where_torch_has_no_device(libraries: dict[str, Any]) -> None:
    libraries["cupy"] = type("Cupy", (), {"cuda": FakeTorch("", True).cuda})
    arrays.require_device("cuda", np.dtype("float32"))
    with pytest.raises(Exception, match="bfloat16' needs torch, since CuPy lacks the type: torch is not installed"):
        arrays.require_device("cuda", BFLOAT16)
    libraries["torch"] = FakeTorch("12.8", True)
    arrays.require_device("cuda", BFLOAT16)
    assert arrays.torch_lacks() is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--device", "tpu"], "device='tpu' is not known; expected cpu or cuda"),
        (["--device", "cuda", "--empty"], "empty=True is for arrays of the host"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *given]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_tables_name_the_device_where_one_is_not_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("all_reduce", "tcp", bytes=8, median_s=0.1, device=device) for device in ("cpu", "cuda")]
    for shown, is_told in ((rows[:1], False), (rows, True)):
        output_console().print(bench_table(BenchResult(BENCH_SCHEMA, {}, tuple(shown))))
        told = capsys.readouterr().out
        assert ("device" in told, "cuda" in told) == (is_told, is_told)


@pytest.mark.gpu
def test_real_devices_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if arrays.torch_lacks() and (why := arrays.cupy_lacks()):
        pytest.skip(f"{arrays.torch_lacks()}; {why}")
    written = tmp_path / "rows.json"
    code = main([
        "run", "-n", "2", "-m", "detcoll", "bench", "--device", "cpu,cuda", "--bytes", "64KiB", "--json", str(written),
        "--collective", "all_reduce,all_gather,barrier", "--iterations", "2",
    ])  # fmt: skip
    assert code == 0
    assert [row["device"] for row in json.loads(written.read_bytes())["rows"]] == ["cpu"] * 3 + ["cuda"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "bool", "complex64"])
def test_values_reach_real_devices_and_come_back(library: str, dtype: str) -> None:
    lacks, made = {"torch": (arrays.torch_lacks, arrays.TorchArrays), "cupy": (arrays.cupy_lacks, arrays.CupyArrays)}[
        library
    ]
    if why := lacks():
        pytest.skip(why)
    maker, host = made(3), np.arange(1000).astype(dtype)
    array, back = maker.array(host), np.zeros_like(host)
    maker.upload(host, array)
    maker.download(array, back)
    assert (back == host).all()
