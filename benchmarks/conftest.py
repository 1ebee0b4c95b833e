"""Benchmarks of collectives, transport by transport.

They run on the ranks of whatever launcher starts pytest, every rank the same tests in the same order; rank 0 reports::

    detcoll run -n 4 -m pytest benchmarks
    mpirun -n 4 python -m pytest benchmarks
    detcoll lab --mpi -- python -m pytest benchmarks      # across emulated sites
    python -m pytest benchmarks                           # one rank: the cost of a call that moves nothing

``--transports`` and ``--sizes`` choose what is compared, ``--rounds`` how often each call is timed. A transport that
cannot be used is skipped with the reason. Every result is checked.

A time is that of the slowest rank: from the last rank's entry to the last rank's exit where all ranks share a clock,
else the greatest of the ranks' own (see `detcoll.bench.start`). Where the topology has lines, a time below the physical
floor is an error. Rank 0 alone saves, compares and draws.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import detcoll
from detcoll.bench.start import Starter, combine
from detcoll.errors import DetcollError, TransportUnavailable
from detcoll.launch.launchers import read_environment
from detcoll.quantities import format_bytes, format_count, format_duration, parse_size_bytes
from detcoll.registry import load, names
from detcoll.transport import Scope

ITEM_BYTES = 4  # of float32, which all benchmarks reduce
WARMUP_ROUNDS = 2
ATTEMPTS = 5
FOR_RANK_0 = ("save", "autosave", "json", "compare", "compare_fail", "histogram", "cprofile")
"""Options of pytest-benchmark that write files or need those of earlier runs."""


@dataclass(frozen=True, slots=True)
class Calls:
    """One collective at one size: what is timed, and what is done before and after each call."""

    kind: str
    nbytes: int
    call: Callable[[], None]
    prepare: Callable[[], None] = lambda: None
    verify: Callable[[], None] = lambda: None


class Replay:
    """The clock of pytest-benchmark, whose own would show what rank 0 saw: it goes on by times already taken."""

    __name__ = "slowest_rank"

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def run(self, benchmark: Any, times_s: list[float]) -> None:
        """Give a benchmark these times."""
        left = iter(times_s)

        def reset() -> None:
            self._now_s = 0.0

        def call() -> None:
            self._now_s = next(left, 0.0)

        benchmark.pedantic(call, setup=reset, rounds=len(times_s))


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("detcoll")
    group.addoption("--transports", default="shm,slotted,tcp,mpi,gloo", help="separated by commas")
    group.addoption("--sizes", default="8B,4KiB,256KiB,4MiB,16MiB", help="separated by commas")
    group.addoption("--rounds", type=int, default=20, help="timed calls each")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that cannot be used, and leave files and tables to rank 0, before pytest-benchmark reads them."""
    _sizes(config)
    for name in _transports(config):
        if name not in names():
            raise pytest.UsageError(f"--transports: {name!r} is not known; expected some of {', '.join(names())}")
    if config.getoption("rounds") < 1:
        raise pytest.UsageError(f"--rounds {config.getoption('rounds')} must be at least 1")
    if read_environment(os.environ).rank:
        for name in FOR_RANK_0:
            setattr(config.option, f"benchmark_{name}", None)
        config.option.benchmark_quiet, config.option.xmlpath = True, None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keep all ranks but the first quiet; what fails there still shows."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if read_environment(os.environ).rank and reporter is not None:
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    rank = read_environment(os.environ).rank
    if report.failed and rank:
        print(f"rank {rank}: {report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "nbytes" in metafunc.fixturenames and metafunc.definition.get_closest_marker("parametrize") is None:
        metafunc.parametrize("nbytes", _sizes(metafunc.config), indirect=True)
    if "transport" in metafunc.fixturenames:
        metafunc.parametrize("transport", _transports(metafunc.config), scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def _transports(config: pytest.Config) -> list[str]:
    return [name.strip() for name in str(config.getoption("transports")).split(",")]


def _sizes(config: pytest.Config) -> list[str]:
    """Return the sizes as they are written in names of tests, in files and in tables."""
    sizes = []
    for text in str(config.getoption("sizes")).split(","):
        try:
            nbytes = parse_size_bytes(text, "--sizes")
        except DetcollError as error:
            raise pytest.UsageError(str(error)) from error
        if nbytes < ITEM_BYTES or nbytes % ITEM_BYTES:
            raise pytest.UsageError(f"--sizes: {text} must be a positive multiple of {ITEM_BYTES} bytes (float32)")
        sizes.append(_written(nbytes))
    return sizes


def _written(nbytes: int) -> str:
    """Return a size with the largest unit that does not round it."""
    text = format_bytes(nbytes)
    return text if parse_size_bytes(text) == nbytes else f"{nbytes} B"


@pytest.fixture
def nbytes(request: pytest.FixtureRequest) -> int:
    return parse_size_bytes(request.param)


@pytest.fixture(scope="session")
def comm(request: pytest.FixtureRequest, transport: str) -> Iterator[detcoll.Communicator]:
    """All ranks over one transport; after a failure nobody is waited for."""
    try:
        opened = detcoll.init(transport=transport)
    except TransportUnavailable as error:
        pytest.skip(f"{transport}: {error}")
    if opened.topology.is_wide and load(transport).capabilities.scope is Scope.HOST:
        detcoll.finalize()
        pytest.skip(f"{transport}: joins ranks of one host only; it cannot cross the lines")
    yield opened
    if request.session.testsfailed:
        opened.abort("a benchmark failed")
    detcoll.finalize()


@pytest.fixture(scope="session")
def start(comm: detcoll.Communicator) -> Starter:
    """Lets all ranks begin a call together."""
    return Starter(comm)


@pytest.fixture
def time_calls(
    request: pytest.FixtureRequest, benchmark: Any, comm: detcoll.Communicator, start: Starter
) -> Callable[..., None]:
    """Time calls on all ranks, and give the benchmark the slowest rank's times; takes what `Calls` does."""
    rounds = int(request.config.getoption("rounds"))

    def time_calls(*what: Any) -> None:
        calls = Calls(*what)
        title = request.function.__name__.removeprefix("bench_")
        size = f" of {_written(calls.nbytes)}" if calls.nbytes else ""
        benchmark.group = f"{title}{size}, {format_count(comm.size, 'rank')}"
        floor_s = comm.bound(calls.kind, calls.nbytes)
        benchmark.extra_info.update(bytes=calls.nbytes, ranks=comm.size, start=start.kind, floor_s=floor_s)
        if calls.nbytes:
            benchmark.extra_info["algorithm"] = comm.algorithm(calls.kind, calls.nbytes)
        for _ in range(WARMUP_ROUNDS):
            _stamps(calls, start)
        REPLAY.run(benchmark, _slowest_rank_s(comm, start, calls, rounds, floor_s or 0.0))

    return time_calls


def _stamps(calls: Calls, start: Starter) -> tuple[int, int]:
    """Make one call, and return when this rank entered and left it."""
    calls.prepare()
    start()
    entered_ns = time.monotonic_ns()
    calls.call()
    left_ns = time.monotonic_ns()
    calls.verify()
    return entered_ns, left_ns


def _slowest_rank_s(
    comm: detcoll.Communicator, start: Starter, calls: Calls, rounds: int, floor_s: float
) -> list[float]:
    """Return the slowest rank's times, equal on all ranks; where clocks are shared, none is below the floor.

    Ranks that enter early may send before the last one enters, so that a call may seem shorter than the floor, by as
    much as entries lay apart. Such a round says nothing, and is taken again. One that is shorter still is impossible.
    """
    times_s: list[float] = []
    for _ in range(ATTEMPTS):
        stamps = np.array([_stamps(calls, start) for _ in range(rounds - len(times_s))], np.int64)
        taken = combine(comm, start.kind, stamps[:, 0].copy(), stamps[:, 1].copy())
        if taken.skew_s is None:  # no common clock, so nobody knows how far entries lay apart
            return list(taken.calls_s)
        for call_s, skew_s in zip(taken.calls_s, taken.skew_s, strict=True):
            if call_s + skew_s < floor_s:
                pytest.fail(_impossible(comm, calls, call_s + skew_s, floor_s), pytrace=False)
        times_s += [call_s for call_s in taken.calls_s if call_s >= floor_s]
        if len(times_s) == rounds:
            return times_s
    pytest.fail(f"ranks do not begin together: only {len(times_s)} of {rounds} rounds took the floor's time or more")


def _impossible(comm: detcoll.Communicator, calls: Calls, took_s: float, floor_s: float) -> str:
    took, floor = format_duration(took_s * 1e9), format_duration(floor_s * 1e9)
    return (
        f"{calls.kind} of {_written(calls.nbytes)} over {comm.transport} took {took}, below the physical floor of "
        f"{floor}: data did not go over the lines of the topology"
    )
