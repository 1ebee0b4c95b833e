"""The workloads and the sweep on a crew of threads: values, buckets, marks, resuming, bits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detcoll.bench.consumption import Meter
from detcoll.bench.start import Starter, combine
from detcoll.bench.sweep import Sweep, run_sweep
from detcoll.bench.verification import (
    BLOCK_ELEMS,
    LARGEST_MODULUS,
    expected_all_reduce,
    fill,
    given,
    modulus,
    require_equal,
)
from detcoll.errors import TransportError, UsageError
from detcoll.measure.records import WorkerConfig, read_config, read_record, write_json
from detcoll.measure.worker import make_workload, measure_rank
from detcoll.topology import Topology
from detcoll.types import DTYPES, is_complex
from detcoll.workloads.buckets import Buckets, bucket_ends
from detcoll.workloads.compute import ComputeKind
from detcoll.workloads.digits import PARAMETERS, Digits
from detcoll.workloads.synthetic import Synthetic
from detcoll.workloads.workload import WorkloadSpec

KiB = 1024
SYNTHETIC = WorkloadSpec("synthetic", bucket_bytes=KiB, compute_ns=600_000, gradient_bytes=10 * KiB)

_FOLDS: dict[str, Callable[[list[Any]], Any]] = {
    "sum": lambda parts: sum(parts[1:], start=parts[0]),
    "avg": lambda parts: (sum(parts[1:], start=parts[0]) / len(parts)).astype(parts[0].dtype),
    "max": lambda parts: np.maximum.reduce(parts),
    "min": lambda parts: np.minimum.reduce(parts),
    "bxor": lambda parts: np.bitwise_xor.reduce(parts),
}


class _Done:
    def wait(self) -> None: ...


class _Board:
    """What the threads of a crew share; ``spoil`` changes a result before ranks take it."""

    def __init__(self, size: int, spoil: Callable[[Any], Any] = lambda result: result) -> None:
        self.parts: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=10)
        self.spoil = spoil


class _Member:
    """A rank of the crew: the communicator's surface over shared memory of one process."""

    transport = "crew"

    def __init__(self, board: _Board, rank: int) -> None:
        self.rank, self.size, self._board = rank, len(board.parts), board
        self.topology = Topology.single_site(self.size)
        self.reduced_bytes: list[int] = []
        self.asked = 0

    def _meet(self, mine: Any) -> list[Any]:
        self._board.parts[self.rank] = mine
        self._board.barrier.wait()
        parts = list(self._board.parts)
        self._board.barrier.wait()
        return parts

    def all_reduce(self, x: Any, op: str = "sum", async_op: bool = False) -> _Done:
        self.reduced_bytes.append(x.nbytes)
        x[:] = self._board.spoil(_FOLDS[op](self._meet(x.copy())))
        return _Done()

    def broadcast(self, x: Any, root: int = 0) -> None:
        x[:] = self._meet(x.copy())[root]

    def barrier(self) -> None:
        self._meet(None)

    def predict(
        self, kind: str, nbytes: int, dtype: str = "float32", called_ns: int | None = None, *, on_device: bool = False
    ) -> float | None:
        return 2e-3

    def bound(self, kind: str, nbytes: int) -> float | None:
        return 1e-3

    def algorithm(self, kind: str, nbytes: int, dtype: str = "float32") -> str:
        return "crew"

    def counters(self) -> dict[str, int]:
        self.asked += 1
        late = self.rank + self.asked - 1
        return {"slot_misses": late, "slot_trims": 2 * late}


class _Clocked:
    """A rank that notes when the first array was reduced."""

    def __init__(self, comm: Any) -> None:
        self.rank, self.size, self._comm = comm.rank, comm.size, comm
        self.first_call_ns = 0

    def all_reduce(self, x: Any, op: Any = "sum", async_op: bool = False) -> Any:
        self.first_call_ns = self.first_call_ns or time.monotonic_ns()
        return self._comm.all_reduce(x, op, async_op)

    def barrier(self) -> None:
        self._comm.barrier()


def on_crew(size: int, program: Callable[[Any], Any], spoil: Callable[[Any], Any] = lambda result: result) -> list[Any]:
    board = _Board(size, spoil)

    def rank_main(rank: int) -> Any:
        try:
            return program(_Member(board, rank))
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank_main, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Blobs in the shape of the digits: ten classes of 64 pixels."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    generator = np.random.default_rng(5)
    labels = np.arange(600) % 10
    centres = generator.random((10, 64), dtype=np.float32)
    pixels = centres[labels] + generator.random((600, 64), dtype=np.float32) / 4
    np.savez(path, pixels=pixels, labels=labels)
    return str(path)


def _config(workload: WorkloadSpec, path: Path, iterations: int = 4, **more: Any) -> WorkerConfig:
    return WorkerConfig(workload, "crew", Topology.single_site(2), iterations, 1, 30.0, str(path), **more)


def test_buckets_start_as_soon_as_they_are_full() -> None:
    def program(comm: Any) -> list[int]:
        gradient = np.ones(10, np.float32)
        buckets = Buckets(comm, gradient, 16, "sum")
        started = []
        for prefix in (3, 4, 9):
            buckets.ready(prefix)
            started.append(len(comm.reduced_bytes))
        buckets.wait()
        assert (gradient == 2).all()
        buckets.wait()
        return [*started, *comm.reduced_bytes]

    assert on_crew(2, program) == [[0, 1, 2, 16, 16, 8, 16, 16, 8]] * 2


def test_buckets_without_overlap_start_once_all_are_full() -> None:
    def program(comm: Any) -> list[int]:
        buckets = Buckets(comm, np.ones(10, np.float32), 16, "sum", overlap=False)
        buckets.ready(10)
        started = len(comm.reduced_bytes)
        buckets.wait()
        return [started, *comm.reduced_bytes]

    assert on_crew(2, program) == [[0, 16, 16, 8]] * 2


@pytest.mark.parametrize("workload", ["synthetic", "digits"])
def test_workloads_overlap_unless_told_otherwise(workload: str, digits_file: str) -> None:
    spec = SYNTHETIC if workload == "synthetic" else WorkloadSpec("digits", 16 * KiB, data_path=digits_file)

    def starts_early(comm: Any, overlap: bool) -> bool:
        seen = _Clocked(comm)
        stamps = make_workload(seen, replace(spec, overlap=overlap)).iterate(0)
        return seen.first_call_ns < stamps.backward_end_ns

    assert on_crew(2, lambda comm: [starts_early(comm, overlap) for overlap in (True, False)]) == [[True, False]] * 2


@pytest.mark.parametrize("kind", ["python", "numpy"])
def test_busy_compute_takes_processor_time(kind: ComputeKind) -> None:
    def program(comm: Any) -> int:
        workload = Synthetic(comm, replace(SYNTHETIC, compute_kind=kind))
        before_ns = time.thread_time_ns()
        workload.iterate(0)
        return time.thread_time_ns() - before_ns

    assert min(on_crew(2, program)) >= SYNTHETIC.compute_ns


@pytest.mark.parametrize("bucket_bytes", [0, 2, 6])
def test_bucket_of_no_whole_elements_is_refused(bucket_bytes: int) -> None:
    with pytest.raises(UsageError, match=f"bucket_bytes={bucket_bytes}"):
        bucket_ends(10, 4, bucket_bytes)


def test_synthetic_measures_every_iteration(tmp_path: Path) -> None:
    records = on_crew(2, lambda comm: measure_rank(comm, _config(SYNTHETIC, tmp_path)))
    for record in records:
        assert len(record.stamps) == 4
        previous_ns = record.start_ns
        for stamp in record.stamps:
            assert stamp.backward_begin_ns >= previous_ns + 200_000
            assert stamp.backward_end_ns >= stamp.backward_begin_ns + 400_000
            assert stamp.end_ns >= stamp.reduced_ns >= stamp.backward_end_ns
            previous_ns = stamp.end_ns
    assert records[0].digest == records[1].digest
    assert [(record.slot_misses, record.slot_trims) for record in records] == [(0, 0), (1, 2)]


def test_record_survives_its_file(tmp_path: Path) -> None:
    config = _config(SYNTHETIC, tmp_path)
    write_json(tmp_path / "config.json", config)
    assert read_config(tmp_path / "config.json") == config
    [record] = on_crew(1, lambda comm: measure_rank(comm, config))
    write_json(config.record_path(0), record)
    assert read_record(config.record_path(0)) == record


@pytest.mark.parametrize("element", [0, 1500, 2559])
def test_synthetic_notices_one_wrong_element(element: int) -> None:
    def spoil(result: Any) -> Any:
        if result.size == 2560:
            result[element] += 1
        return result

    whole = WorkloadSpec("synthetic", bucket_bytes=10 * KiB, compute_ns=1000, gradient_bytes=10 * KiB)
    with pytest.raises(TransportError, match=f"element {element} of the reduced gradient"):
        on_crew(2, lambda comm: Synthetic(comm, whole).rehearse(), spoil)


def test_synthetic_notices_a_stale_result() -> None:
    def program(comm: Any) -> None:
        workload = Synthetic(comm, SYNTHETIC)
        workload.rehearse()
        comm.all_reduce = lambda *args, **kwargs: _Done()
        workload.rehearse()

    with pytest.raises(TransportError, match="iteration 0"):
        on_crew(2, program)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_digits_learn_the_same_on_all_ranks(digits_file: str, tmp_path: Path, size: int) -> None:
    spec = WorkloadSpec("digits", bucket_bytes=256 * KiB, data_path=digits_file)
    records = on_crew(size, lambda comm: measure_rank(comm, _config(spec, tmp_path, 6)))
    assert len({record.digest for record in records}) == 1
    assert records[0].losses[-1] < records[0].losses[0] / 2
    assert records[0].accuracy is not None
    assert all(record.accuracy is None for record in records[1:])


def test_digits_go_on_where_they_stopped(digits_file: str, tmp_path: Path) -> None:
    spec = WorkloadSpec("digits", bucket_bytes=PARAMETERS * 4, data_path=digits_file)
    state = str(tmp_path / "state.npz")
    whole = on_crew(2, lambda comm: measure_rank(comm, _config(spec, tmp_path, 4)))
    first = on_crew(2, lambda comm: measure_rank(comm, _config(spec, tmp_path, 2, checkpoint_path=state)))
    rest = on_crew(2, lambda comm: measure_rank(comm, _config(spec, tmp_path, 2, first_iteration=2, resume_path=state)))
    assert rest[0].digest == whole[0].digest != first[0].digest
    assert first[0].losses + rest[0].losses == whole[0].losses


def test_batches_of_an_iteration_are_averaged_and_reduced_once(
    digits_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detcoll.workloads.digits.BATCH", 25)

    def program(comm: Any, batches: int) -> tuple[Any, int]:
        digits = Digits(comm, WorkloadSpec("digits", 256 * KiB, data_path=digits_file, batches=batches))
        gradients = []
        for index in range(8 // batches):
            digits._gradient_of(index)
            gradients.append(digits._gradient.copy())
        return np.mean(gradients, axis=0), len(comm.reduced_bytes)

    [(apart, apart_calls), _] = on_crew(2, lambda comm: program(comm, 1))
    [(together, calls), _] = on_crew(2, lambda comm: program(comm, 4))
    assert apart_calls == 4 * calls
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-6)


def test_a_backward_pass_of_several_batches_begins_with_the_first(digits_file: str) -> None:
    def begins_first(comm: Any, batches: int) -> bool:
        digits = Digits(comm, WorkloadSpec("digits", 256 * KiB, data_path=digits_file, batches=batches))
        ahead, times_ns = digits._ahead, []

        def noted(batch: int) -> Any:
            times_ns.append(time.monotonic_ns())
            return ahead(batch)

        digits._ahead = noted  # type: ignore[method-assign]
        return digits.iterate(0).backward_begin_ns <= times_ns[0]

    assert on_crew(1, lambda comm: [begins_first(comm, batches) for batches in (1, 3)]) == [[False, True]]


def test_digits_depend_on_what_was_reduced(digits_file: str, tmp_path: Path) -> None:
    spec = WorkloadSpec("digits", bucket_bytes=256 * KiB, data_path=digits_file)

    def spoil(result: Any) -> Any:
        result[0] = np.nextafter(result[0], np.float32(1), dtype=result.dtype)
        return result

    right = on_crew(2, lambda comm: measure_rank(comm, _config(spec, tmp_path, 2)))
    wrong = on_crew(2, lambda comm: measure_rank(comm, _config(spec, tmp_path, 2)), spoil)
    assert right[0].digest != wrong[0].digest


def test_digits_refuse_more_ranks_than_samples(digits_file: str) -> None:
    class Many:
        rank, size = 0, 241

    with pytest.raises(UsageError, match="size=241"):
        Digits(Many(), WorkloadSpec("digits", 4, data_path=digits_file))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_expected_sums_are_exact(dtype: str, size: int) -> None:
    kind = DTYPES[dtype]
    size = 300 if size == 64 and kind.itemsize <= 2 else size  # more than the numbers up to which some are exact
    arrays = [np.zeros(600, kind) for _ in range(size)]
    for rank, array in enumerate(arrays):
        fill(array, rank, size)
    expected = expected_all_reduce(600, kind, size)
    if kind.kind == "b":
        assert np.array_equal(expected, np.logical_xor.reduce(arrays))
        return
    exact = np.sum([array.astype(np.complex128 if is_complex(kind) else np.int64) for array in arrays], axis=0)
    if kind.kind not in "iu":
        assert (expected.astype(exact.dtype) == exact).all()
    require_equal(expected, exact.astype(kind), "sum")
    assert modulus(kind, 1) > 100


def test_chunks_of_bool_name_themselves() -> None:
    expected, kind = expected_all_reduce(20_000, DTYPES["bool"], 4), DTYPES["bool"]
    assert 0.4 < expected.mean() < 0.6
    for shift in range(1, 100):
        assert 0.3 < (expected[shift:] != expected[:-shift]).mean() < 0.7
    arrays = [np.zeros(20_000, kind) for _ in range(4)]
    for rank, array in enumerate(arrays):
        fill(array, rank, 4)
        assert 0.3 < array.mean() < 0.7  # one that is missing, or comes twice, turns so many elements
    with pytest.raises(TransportError, match="here: element"):
        require_equal(np.logical_xor.reduce(arrays[1:]), expected, "here")


def test_a_wrong_imaginary_part_is_named() -> None:
    expected = expected_all_reduce(600, DTYPES["complex128"], 3)
    wrong = expected.copy()
    wrong[7] += 1j
    with pytest.raises(TransportError, match=r"here: element 7 is \(22-21j\), expected \(22-22j\)"):
        require_equal(wrong, expected, "here")


def test_wrong_value_is_named() -> None:
    with pytest.raises(TransportError, match=r"here: element 2 is 7\.0, expected 2\.0"):
        require_equal(np.array([0, 1, 7], np.float32), np.array([0, 1, 2], np.float32), "here")


def test_values_that_repeat_are_held_once_and_compared_to_the_end() -> None:
    array = np.zeros(3 * BLOCK_ELEMS + 5, np.float32)
    values = given(array.dtype, 1, 2)
    values.write(array)
    assert values.block.size <= BLOCK_ELEMS
    assert (array == np.arange(array.size) % LARGEST_MODULUS + 1).all()
    values.require(array, "here")
    array[-1] = -1
    with pytest.raises(TransportError, match=rf"here: element {array.size - 1} is -1\.0, expected"):
        values.require(array, "here")


MEMORY_OF_CALLS = """
import numpy as np
from detcoll.bench.consumption import Meter

meter = Meter()
for nbytes in (2**24, 2**26, 2**20):
    meter.prepare()
    meter.enter(timed=True)
    np.ones(nbytes, np.uint8)
    meter.leave()
    np.ones(2**27, np.uint8)
print(meter.extra_bytes())
"""


def test_memory_of_a_call_counts_even_if_it_is_given_back() -> None:
    # In a process of its own: what earlier tests left would be given back in the middle.
    done = subprocess.run([sys.executable, "-c", MEMORY_OF_CALLS], capture_output=True, text=True, check=True)
    assert 2**26 * 0.95 < int(done.stdout) < 2**26 * 1.2


def test_processor_time_counts_other_threads_and_not_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"process": 1.0, "thread": 1.0}
    monkeypatch.setattr("time.process_time", lambda: now["process"])
    monkeypatch.setattr("time.thread_time", lambda: now["thread"])

    def spend(own_s: float, others_s: float) -> None:
        now["process"] += own_s + others_s
        now["thread"] += own_s

    meter = Meter()
    for timed in (False, True, True):
        meter.prepare()
        spend(100, 0)
        meter.enter(timed=timed)
        spend(1, 2)
        meter.leave()
        spend(50, 0.25)
    assert meter.processor_s() == pytest.approx(2 * 3.25)


def test_without_a_peak_there_is_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("detcoll.bench.consumption._CLEAR", tmp_path / "no" / "file")
    meter = Meter()
    meter.prepare()
    meter.enter(timed=True)
    meter.leave()
    assert meter.extra_bytes() is None


def test_sweep_gives_a_row_for_every_point() -> None:
    sweep = Sweep(("all_reduce", "broadcast", "barrier"), (4, 4096), "float32", iterations=3, warmup=1)
    first, second = on_crew(2, lambda comm: run_sweep(comm, sweep))
    assert first == second
    assert [(row.collective, row.bytes) for row in first] == sweep.points()
    row = first[0]
    assert row.min_s <= row.median_s <= row.p99_s <= row.max_s
    assert row.fraction_of_bound == pytest.approx(1e-3 / row.median_s)
    assert row.prediction_error == pytest.approx(2e-3 / row.median_s - 1)
    assert (row.algorithm, row.ranks, row.sites, row.start) == ("crew", 2, 1, "instant")
    assert first[-1].bound_s is None
    assert (min(row.samples_s), max(row.samples_s), row.iterations) == (row.min_s, row.max_s, 3)
    assert list(row.began_s) == sorted(row.began_s)


def test_sweep_ends_when_its_time_is_over() -> None:
    sweep = Sweep(("all_reduce",), (4, 8), "float32", iterations=3, warmup=1, time_limit_s=1e-9)
    first, second = on_crew(2, lambda comm: run_sweep(comm, sweep))
    assert first == second
    assert [(row.iterations, len(row.samples_s), len(row.began_s)) for row in first] == [(1, 1, 1)] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float64", "bool", "complex128"])
def test_sweep_notices_a_wrong_element(dtype: str) -> None:
    def spoil(result: Any) -> Any:
        if result.nbytes == 4096:
            result[-1] = result[-1] + 1 if dtype != "bool" else not result[-1]
        return result

    sweep = Sweep(("all_reduce",), (4096,), dtype, iterations=1, warmup=0)
    with pytest.raises(TransportError, match="all_reduce of 4096 bytes"):
        on_crew(2, lambda comm: run_sweep(comm, sweep), spoil)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"collectives": ("shuffle",)}, "collective='shuffle'"),
        ({"sizes_bytes": (10,)}, "bytes=10"),
        ({"sizes_bytes": (0,)}, "bytes=0"),
        ({"sizes_bytes": ()}, "at least one"),
        ({"dtype": "complex256"}, "dtype=complex256"),
        ({"iterations": 0}, "iterations=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"time_limit_s": 0.0}, "time_limit_s=0"),
    ],
)
def test_sweep_refuses_what_it_cannot_run(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "collectives": ("all_reduce",), "sizes_bytes": (4,), "dtype": "float32", "iterations": 1, "warmup": 0,
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        Sweep(**(given | change)).validate()


def test_call_times_run_from_last_entry_to_last_exit() -> None:
    entered, left = [(100, 1000), (400, 1000)], [(900, 1500), (800, 2000)]

    def program(comm: Any) -> Any:
        starter = Starter(comm)
        return combine(comm, starter.kind, np.array(entered[comm.rank]), np.array(left[comm.rank]))

    for times in on_crew(2, program):
        assert times.calls_s == pytest.approx((500e-9, 1000e-9))
        assert times.skew_s == pytest.approx((300e-9, 0.0))


def test_ranks_of_two_hosts_start_from_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["one", "two"])
    monkeypatch.setattr("detcoll.workloads.arrays.host_identity", lambda: next(names))

    def program(comm: Any) -> Any:
        starter = Starter(comm)
        assert starter.kind == "barrier"
        return combine(comm, starter.kind, np.array([100, 0]), np.array([[900, 500], [800, 2000]][comm.rank]))

    for times in on_crew(2, program):
        assert times.calls_s == pytest.approx((800e-9, 2000e-9))
        assert times.skew_s is None
