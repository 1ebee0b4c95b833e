"""Which transport ``auto`` takes, what it falls back to, and what it never falls back from."""

from __future__ import annotations

import socket
import threading
from typing import Any

import numpy as np
import pytest
from jobs import free_port
from ranks import attempt, launch, lines, run_ranks

from detcoll import registry
from detcoll.communicator import Communicator
from detcoll.errors import TransportUnavailable, UsageError
from detcoll.job.assembly import choose
from detcoll.job.settings import Facts, read_settings
from detcoll.topology import Topology
from detcoll_shm import ShmEndpoint, ShmTransport
from detcoll_slotted import SlottedTransport


@pytest.fixture
def taken_port():
    """A range of ports in which nothing can be bound."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        yield f"{port}-{port}"


def elsewhere() -> str:
    """Return an address for the meeting itself, which would take a port of the range too."""
    return f"127.0.0.1:{free_port()}"


def facts(host: str = "here", launcher: str = "detcoll run") -> Facts:
    return Facts("0.1", "auto", "digest", False, "", "cubic", "", host, "clock", launcher, (0, 1))


@pytest.mark.parametrize(
    ("topology", "ranks", "expected"),
    [
        (lines(1, 1), [facts(), facts()], "slotted"),
        (lines(1, 1), [facts(launcher="mpich"), facts(launcher="mpich")], "slotted"),
        (lines(1, 1).as_single_cluster(), [facts(), facts()], "shm"),
        (None, [facts(launcher="mpich"), facts(launcher="mpich")], "shm"),
        (None, [facts("a", "mpich"), facts("b", "mpich")], "mpi"),
        (None, [facts("a", "openmpi"), facts("b", "detcoll run")], "slotted"),
        (None, [facts("a"), facts("b")], "slotted"),
    ],
)
def test_the_automatic_choice(topology: Topology | None, ranks: list[Facts], expected: str) -> None:
    settings = read_settings({}, 2, "auto", topology, 10.0, None)
    choice = choose(settings, ranks, settings.topology)
    assert (choice.name, choice.automatic) == (expected, True)
    assert choice.reason
    settings = read_settings({"DETCOLL_TRANSPORT": "gloo"}, 2, "shm", topology, 10.0, None)
    asked = choose(settings, ranks, settings.topology)
    assert (asked.name, asked.automatic) == ("gloo", False)


def test_mpi_takes_over_where_slotted_cannot_bind(tmp_path, taken_port: str, mpiexec: list[str]) -> None:
    ended = launch(
        2, "calls.py", "small", topology=lines(1, 1), folder=tmp_path, launcher=[*mpiexec, "-n", "2"],
        environ={"DETCOLL_PORTS": taken_port, "DETCOLL_RENDEZVOUS": elsewhere(), "DETCOLL_LOG": "warning"},
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.said == {rank: [["mpi", "mpi-native", 3.0]] for rank in range(2)}
    assert ended.err.count("falling back to mpi") == 1
    assert f"slotted cannot bind a port from {taken_port.replace('-', ' to ')}" in ended.err


def test_without_mpi_both_reasons_are_told(taken_port: str) -> None:
    answers = attempt(2, lambda comm: None, topology=lines(1, 1), environ={"DETCOLL_PORTS": taken_port})
    for answer in answers:
        assert isinstance(answer, TransportUnavailable)
        assert "could not open slotted: slotted cannot bind a port from" in str(answer)
        assert "cannot fall back to mpi, because MPI did not start all ranks (use mpiexec)" in str(answer)


def test_what_was_asked_for_is_never_replaced(tmp_path, taken_port: str, mpiexec: list[str]) -> None:
    ended = launch(
        2, "calls.py", "open_only", "slotted", topology=lines(1, 1), folder=tmp_path, launcher=[*mpiexec, "-n", "2"],
        environ={"DETCOLL_PORTS": taken_port, "DETCOLL_RENDEZVOUS": elsewhere()},
    )  # fmt: skip
    assert sorted(ended.said) == [0, 1]
    for (said,) in ended.said.values():
        assert said[0] == "TransportUnavailable"
        assert "cannot bind" in said[1]


def test_a_refused_address_is_no_reason_to_fall_back(monkeypatch) -> None:
    opened = SlottedTransport.open

    def open_elsewhere(self, rank, size, rendezvous, clock, options):
        class Elsewhere:
            host = listen_host = "192.0.2.7" if rank == 1 else "127.0.0.1"
            exchange = rendezvous.exchange

        return opened(self, rank, size, Elsewhere(), clock, options)

    monkeypatch.setattr(SlottedTransport, "open", open_elsewhere)
    monkeypatch.setattr("detcoll.job.assembly._started_by_mpi", lambda facts: True)
    for answer in attempt(2, lambda comm: None, topology=lines(1, 1)):
        assert isinstance(answer, UsageError), answer
        assert "rank 1 could not open slotted: slotted would open 192.0.2.7" in str(answer)


@pytest.mark.parametrize(
    ("rate", "one_way_ns", "expected"),
    [(1.25e9, 50_000, (False, True)), (5e9, 50_000, (True, False)), (5e9, 5_000_000, (False, False))],
)
def test_lines_that_are_faster_than_hosts_are_paced_by_them_where_they_are_short(
    rate: float, one_way_ns: int, expected: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, seen = SlottedTransport.open, []

    def watched(self, rank, size, rendezvous, clock, options):
        seen.append(options)
        return opened(self, rank, size, rendezvous, clock, options | {"warm_up_bytes": 0})

    monkeypatch.setattr(SlottedTransport, "open", watched)
    topology = lines(1, 1, rate_bytes_per_s=rate, one_way_ns=one_way_ns)
    run_ranks(2, lambda comm: None, topology=topology)
    assert [(options["host_paced"], options["prompt"]) for options in seen] == [expected] * 2
    assert [options["acknowledge_delay_ns"] < 1_000_000 for options in seen] == [not expected[1]] * 2
    if expected[0]:
        bursts_s = [options["warm_up_bytes"] / options["warm_up_bytes_per_s"] for options in seen]
        assert max(bursts_s) <= 0.004, "what is not paced fits a policer's bucket"


def test_what_one_rank_lacks_all_ranks_lack(monkeypatch) -> None:
    load = registry.load

    def load_on_some(name: str):
        if threading.current_thread().name == "test rank 1":
            raise TransportUnavailable(f"{name} is not installed")
        return load(name)

    monkeypatch.setattr(registry, "load", load_on_some)
    for answer in attempt(3, lambda comm: None, transport="shm"):
        assert isinstance(answer, TransportUnavailable)
        assert str(answer) == "rank 1 could not load shm: shm is not installed"


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 finds that it cannot share memory with rank 0, which finds nothing."""
    monkeypatch.setattr(ShmEndpoint, "apart", lambda self, peers: {0: "no"} if self._rank == 1 and 0 in peers else {})


def name_and_sum(comm: Communicator) -> tuple[str, float]:
    x = np.ones(1000, np.float32)
    comm.all_reduce(x)
    return comm.transport, float(x[0])


@pytest.mark.usefixtures("apart")
def test_ranks_that_cannot_share_memory_use_the_network(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "detcoll"):
        assert run_ranks(3, name_and_sum) == [("slotted", 3.0)] * 3
    assert "ranks 0 and 1 cannot share memory: no; falling back to slotted" in caplog.text


@pytest.mark.usefixtures("apart")
def test_across_sites_only_those_use_the_network_that_have_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    near: dict[int, list[int]] = {}
    connect = ShmEndpoint.connect

    def watched(self: ShmEndpoint, addresses: dict[int, str], *rest: Any) -> None:
        near[self._rank] = sorted(addresses)
        connect(self, addresses, *rest)

    monkeypatch.setattr(ShmEndpoint, "connect", watched)
    with caplog.at_level("INFO", "detcoll"):
        assert run_ranks(4, name_and_sum, topology=lines(3, 1)) == [("slotted", 4.0)] * 4
    assert near == {0: [0, 2], 1: [1, 2], 2: [0, 1, 2], 3: [3]}
    assert caplog.text.count("ranks 0 and 1 of one host use the network: no") == 1


@pytest.mark.usefixtures("apart")
def test_shared_memory_that_was_asked_for_is_not_replaced() -> None:
    for answer in attempt(3, lambda comm: None, transport="shm"):
        assert isinstance(answer, TransportUnavailable)
        assert str(answer) == "ranks 0 and 1 cannot share memory: no"


def test_a_user_may_say_which_ranks_are_on_one_host() -> None:
    environ = [{"DETCOLL_HOST": "a"}, {"DETCOLL_HOST": "a"}, {"DETCOLL_HOST": "b"}]
    assert run_ranks(2, name_and_sum, environ=environ[:2]) == [("shm", 2.0)] * 2
    assert run_ranks(3, name_and_sum, environ=environ) == [("slotted", 3.0)] * 3


def test_without_shared_memory_the_ranks_of_a_site_use_the_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: ShmTransport, rank: int, *rest: Any) -> ShmEndpoint:
        if rank == 1:
            raise TransportUnavailable("no shared memory")
        return opened(self, rank, *rest)

    opened = ShmTransport.open
    monkeypatch.setattr(ShmTransport, "open", refuse)
    with caplog.at_level("WARNING", "detcoll"):
        assert run_ranks(3, name_and_sum, topology=lines(2, 1)) == [("slotted", 3.0)] * 3
    assert "ranks of one host use the network: rank 1 could not open shm: no shared memory" in caplog.text


def test_packets_are_marked_where_rates_are_reserved() -> None:
    lines = Topology.uniform(2, 1, 1e8, 10**6)

    def mark(topology: Topology, **environ: str) -> object:
        return read_settings(environ, 2, "auto", topology, 10.0, None).options["dscp"]

    assert mark(lines) == 0
    assert mark(lines.with_reserved(5e7)) == 46
    assert mark(lines.with_reserved(5e7), DETCOLL_DSCP="0") == 0
    assert mark(lines, DETCOLL_DSCP="34") == 34
