"""Benchmarks of collectives, transport by transport.

They run on the ranks of whatever launcher starts pytest, every rank the same tests in the same order; rank 0 reports::

    detcoll run -n 4 -m pytest benchmarks
    mpirun -n 4 python -m pytest benchmarks
    python -m pytest benchmarks                  # one rank: the cost of a call that moves nothing

``--transports`` and ``--sizes`` choose what is compared, ``--rounds`` how often each call is timed. A transport that
cannot be used is skipped with the reason. Every result is checked. Times are rank 0's, from a barrier; for the
slowest rank's time, bounds and predictions use ``detcoll bench``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

import detcoll
from detcoll.errors import TransportUnavailable
from detcoll.launch.launchers import read_environment
from detcoll.quantities import parse_size_bytes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("detcoll")
    group.addoption("--transports", default="shm,slotted,mpi,gloo", help="separated by commas")
    group.addoption("--sizes", default="8B,4KiB,256KiB,4MiB,16MiB", help="separated by commas")
    group.addoption("--rounds", type=int, default=20, help="timed calls each")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep all ranks but the first quiet; what fails there still shows."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if read_environment(os.environ).rank and reporter is not None:
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    rank = read_environment(os.environ).rank
    if report.failed and rank:
        print(f"rank {rank}: {report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comm" in metafunc.fixturenames:
        metafunc.parametrize("comm", metafunc.config.getoption("transports").split(","), indirect=True, scope="session")
    if "nbytes" in metafunc.fixturenames:
        sizes = metafunc.config.getoption("sizes").split(",")
        metafunc.parametrize("nbytes", [parse_size_bytes(size, "sizes") for size in sizes], ids=sizes)


@pytest.fixture(scope="session")
def comm(request: pytest.FixtureRequest) -> Iterator[detcoll.Communicator]:
    """All ranks over one transport; after a failure nobody is waited for."""
    try:
        opened = detcoll.init(transport=request.param)
    except TransportUnavailable as error:
        pytest.skip(f"{request.param}: {error}")
    yield opened
    if request.session.testsfailed:
        opened.abort("a benchmark failed")
    detcoll.finalize()


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """The same on all ranks, so that every call has its counterparts."""
    return int(request.config.getoption("rounds"))
