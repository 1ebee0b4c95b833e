"""``detcoll measure --device``: workloads on the strict double of CUDA and by torch, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ranks import run_ranks

from detcoll.cli import main
from detcoll.cli.terminal import output_console
from detcoll.emulation.lab import why_unavailable
from detcoll.measure import experiment, host
from detcoll.measure.host import host_facts
from detcoll.measure.records import RankRecord, WorkerConfig
from detcoll.measure.results import MEASURE_SCHEMA, Measurement, Run
from detcoll.measure.statistics import summarize
from detcoll.measure.tables import measurement_table
from detcoll.measure.worker import measure_rank
from detcoll.testing.device import StrictDevice, in_place_of_cuda
from detcoll.topology import Topology
from detcoll.workloads import arrays
from detcoll.workloads.arrays import Arrays, HostArrays, TorchArrays
from detcoll.workloads.workload import WorkloadSpec

KIB = 1024
LINES = ["--rate", "200 Mbit/s", "--round-trip", "4 ms", "--against", "none", "--ranks-per-site", "1"]


class Elements:
    """Elements of an array of the double, which can be cut into others."""

    dtype, itemsize = np.dtype(np.float32), 4

    def __init__(self, whole: Any, begin: int, end: int) -> None:
        self.whole, self.shape, self.nbytes, self.device = whole, (end - begin,), 4 * (end - begin), whole.device
        self._begin, self.address = begin, whole.address + 4 * begin
        self.__cuda_array_interface__ = whole.__cuda_array_interface__ | {
            "shape": self.shape, "data": (self.address, False)
        }  # fmt: skip

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, some: slice) -> Elements:
        return Elements(self.whole, self._begin + some.start, self._begin + some.stop)


class DoubleArrays(Arrays):
    """Arrays of the double, which add up."""

    device = "cuda"

    def __init__(self, strict: StrictDevice) -> None:
        self._strict = strict
        self.functions = SimpleNamespace(add=lambda a, b, out: strict.poke(out, strict.peek(a) + np.float32(b)))

    def array(self, host: NDArray[Any]) -> Any:
        return Elements(self._strict.array(np.full_like(host, 99)), 0, host.size)

    def upload(self, host: NDArray[Any], array: Any) -> None:
        self._strict.poke(array, host)

    def download(self, array: Any, host: NDArray[Any]) -> None:
        host[:] = self._strict.peek(array)

    def settle(self) -> None: ...


class TorchOnHost(TorchArrays):
    """Tensors of the host, for which torch has the same functions."""

    def __init__(self) -> None:
        self.functions = self._torch = pytest.importorskip("torch")
        self._device = self._torch.device("cpu")

    def settle(self) -> None: ...


@pytest.fixture
def device() -> Iterator[StrictDevice]:
    with in_place_of_cuda() as strict:
        strict.seeded(3)
        yield strict


def measured(workload: WorkloadSpec, path: Path, *each: Arrays, iterations: int = 3) -> list[list[RankRecord]]:
    """Measure on two ranks with each kind of arrays."""
    config = WorkerConfig(workload, "tcp", Topology.single_site(2), iterations, 1, 30.0, str(path))
    return [run_ranks(2, partial(measure_rank, config=config, arrays=made), transport="tcp") for made in each]


def test_a_gradient_on_a_device_gives_the_same_bits(device: StrictDevice, tmp_path: Path) -> None:
    spec = WorkloadSpec("synthetic", bucket_bytes=4 * KIB, compute_ns=600_000, gradient_bytes=10 * KIB)
    on_host, on_device = measured(spec, tmp_path, HostArrays(), DoubleArrays(device))
    assert len({record.digest for record in (*on_host, *on_device)}) == 1


def test_digits_learn_by_torch_as_by_numpy(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    labels = np.arange(600) % 10
    pixels = generator.random((10, 64), dtype=np.float32)[labels] + generator.random((600, 64), dtype=np.float32) / 4
    np.savez(tmp_path / "digits.npz", pixels=pixels, labels=labels)
    spec = WorkloadSpec("digits", bucket_bytes=512 * KIB, data_path=str(tmp_path / "digits.npz"), batches=2)
    by_torch, by_numpy = measured(spec, tmp_path, TorchOnHost(), HostArrays(), iterations=4)
    assert by_torch[0].digest == by_torch[1].digest
    for one, other in zip(by_torch, by_numpy, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
    assert by_torch[0].accuracy == pytest.approx(by_numpy[0].accuracy, abs=0.02)


@pytest.mark.parametrize("of", [TorchOnHost, HostArrays])
def test_arrays_come_back_as_they_went(of: type[Arrays]) -> None:
    made, host = of(), np.array([[-1.5, 0.0, 3.25], [np.inf, -0.0, 1e-40]], np.float32)
    array = made.put(host)
    assert made.get(array).tobytes() == host.tobytes()
    assert made.total(array.reshape(-1)) == int(host.view(np.uint32).sum(dtype=np.uint64))


@pytest.mark.parametrize("relay", [[], ["--relay"]])
def test_a_missing_device_is_told_before_anything_starts(
    relay: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arrays, "find_spec", lambda name: None)
    monkeypatch.setattr(experiment, "save_digits", lambda path: pytest.fail("something started"))
    monkeypatch.setattr("detcoll.cli.measure.must_relay", lambda **_: False)
    assert main(["measure", "--device", "cuda", *relay]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "device='cuda' needs torch or CuPy with a CUDA device: torch is not installed; CuPy is not" in told


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_a_library_that_cannot_be_imported_is_told(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"{name} needs libcudart.so")

    monkeypatch.setattr(arrays, "find_spec", lambda name: name)
    monkeypatch.setattr(arrays, "import_module", broken)
    why = arrays.torch_lacks() if library == "torch" else arrays.cupy_lacks()
    assert why is not None
    assert why.endswith(f" cannot be used: {library} needs libcudart.so")


def test_a_script_chooses_its_device_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--device", "cuda", "--", str(tmp_path / "train.py")]) == 2
    assert "device='cuda': of no use to a script, which has its own" in " ".join(capsys.readouterr().err.split())


def test_the_table_says_where_training_was(capsys: pytest.CaptureFixture[str]) -> None:
    for device, said in (("cpu", "Training across"), ("cuda", "Training on cuda across")):
        runs = (Run("single cluster", iteration_s=summarize([0.1])),)
        output_console().print(measurement_table(Measurement(MEASURE_SCHEMA, {}, {"device": device}, runs, (), None)))
        assert said in capsys.readouterr().out


def test_host_facts_name_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_GPUS", tmp_path)
    assert host_facts()["gpu"] is None
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text(f"Model: \t\t NVIDIA H20{number}\nIRQ:   \t\t 0\n")
    assert host_facts()["gpu"] == "NVIDIA H200, NVIDIA H201"


@pytest.mark.gpu
@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_training_on_a_real_device_gives_the_bits_of_one_cluster(tmp_path: Path) -> None:
    if (no_torch := arrays.torch_lacks()) and (no_cupy := arrays.cupy_lacks()):
        pytest.skip(f"{no_torch}; {no_cupy}")
    pytest.importorskip("sklearn")
    written = tmp_path / "m.json"
    lengths = ["--iterations", "4", "--rounds", "1", "--warmup", "1", "--json", str(written)]
    assert main(["measure", "--device", "cuda", *LINES, *lengths]) == 0
    data = json.loads(written.read_bytes())
    assert (data["digests_equal"], data["workload"]["device"]) == (True, "cuda")
