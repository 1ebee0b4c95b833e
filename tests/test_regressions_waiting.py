"""Calls that once hung, or blamed ranks that had done nothing wrong; each test runs programs as users write them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from forked import Rank, launch_forked
from jobs import PROGRAM, free_port, run
from paths import NetworkPath

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A named pipe, by which ranks tell each other to go on."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def two_sites(folder: Path, rate: str) -> str:
    """Write a topology of two sites of one rank, and return its path."""
    sites = "".join(f'[[site]]\nname = "{name}"\nranks = 1\nuplink = "{rate}"\n' for name in "ab")
    path = folder / "two.toml"
    path.write_text(sites + '[[link]]\nbetween = ["a", "b"]\none_way = "1 ms"\n')
    return str(path)


@contextmanager
def pair(timeout_s: float, ports: tuple[int, int], **environ: str) -> Iterator[list[Rank]]:
    """Two ranks that have made a call, and make another one when they may go on."""
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(Rank(rank, 2, port, "two_calls", timeout_s, environ=environ))
            for rank, port in enumerate(ports)
        ]
        assert [rank.hears() for rank in ranks] == [2000.0, 2000.0]
        yield ranks


def second_call(ranks: list[Rank]) -> list[object]:
    """Let ranks make their second call, and return what they say of it."""
    for rank in ranks:
        rank.go_on()
    return [rank.hears() for rank in ranks]


def across(folder: Path, path: NetworkPath) -> dict[str, str]:
    """Return the environment of ranks whose data goes through ``path``."""
    return {"DETCOLL_TOPOLOGY": two_sites(folder, "100 MB/s"), "DETCOLL_PROXY": f"127.0.0.1:{path.port}"}


def test_connections_that_were_forgotten_on_the_way_are_replaced(tmp_path: Path) -> None:
    """A firewall that forgot a connection swallows what comes over it; new connections work."""
    port = free_port()
    with NetworkPath() as path, pair(6, (port, port), **across(tmp_path, path), DETCOLL_TOLERANCE="4") as ranks:
        path.forget()
        assert second_call(ranks) == [2000.0, 2000.0]


def test_a_control_connection_that_was_reset_is_made_again() -> None:
    """Its end says nothing about the process at the other end, which lives."""
    port = free_port()
    with NetworkPath(port) as path, pair(10, (port, path.port)) as ranks:
        path.reset()
        assert second_call(ranks) == [2000.0, 2000.0]


def test_a_cut_is_borne_for_longer_than_three_seconds(tmp_path: Path) -> None:
    """As long as the timeout allows; the path resets so many new connections that they take longer."""
    port = free_port()
    with NetworkPath() as path, pair(20, (port, port), **across(tmp_path, path)) as ranks:
        path.reset(new_ones=40)
        assert second_call(ranks) == [2000.0, 2000.0]


def test_nobody_is_said_not_to_have_called_where_the_path_is_dead(tmp_path: Path) -> None:
    """Both ranks call and hear nothing of each other, so neither knows what the other did."""
    port = free_port()
    with NetworkPath() as path, pair(1.5, (port, port), **across(tmp_path, path), DETCOLL_TOLERANCE="20") as ranks:
        path.go_dark()
        ends = [str(said) for said in second_call(ranks)]
    assert all(end.startswith("DeadlineMissed") for end in ends), ends
    assert not any("has not called it" in end for end in ends), ends
    assert any("has not confirmed that it made this call" in end for end in ends), ends


def test_calls_may_queue_for_longer_than_their_timeout_while_all_make_progress(tmp_path: Path) -> None:
    """Ten calls of half a megabyte over 2 MB/s take 2.5 s."""
    environ = {"DETCOLL_TOPOLOGY": two_sites(tmp_path, "2 MB/s")}
    ended = launch_forked(2, PROGRAM, "many_calls", "slotted", 1.5, 10, 125_000, environ=environ)
    assert ended.said == {0: [["done"]], 1: [["done"]]}, ended.err


def test_a_rank_that_freezes_is_named_by_all() -> None:
    """Ranks that only wait for others which wait for rank 0 must not blame those."""
    port = free_port()
    with ExitStack() as stack:
        environ = {"DETCOLL_SITES": "2", "DETCOLL_TOLERANCE": "20"}
        ranks = [stack.enter_context(Rank(rank, 4, port, "frozen", "slotted", environ=environ)) for rank in range(4)]
        assert [rank.hears() for rank in ranks] == ["ready"] * 4
        for rank in ranks:
            rank.go_on()
        for end in [rank.hears() for rank in ranks[1:]]:
            assert "it waits for rank 0, which has not" in end


def test_ranks_that_do_not_come_are_named_under_mpi(mpiexec: list[str], fifo: Path) -> None:
    ended = run(3, "missing_in_mpi", fifo, launcher=[*mpiexec, "-n", "3"])
    assert sorted(ended.said) == [0, 2]
    for [end] in ended.said.values():
        assert end.startswith("DeadlineMissed")
        assert "it waits for rank 1" in end


def test_an_interrupted_call_leaves_nothing_for_which_others_wait(fifo: Path) -> None:
    """No rank runs into its timeout, gets a wrong partner, or blames another one."""
    ended = launch_forked(2, PROGRAM, "interrupted", fifo)
    assert ended.said[0][0] == "interrupted", ended.err
    ends = ended.said[0][1:] + ended.said[1]
    assert len(ends) == 4
    assert not any("DeadlineMissed" in end for end in ends), ends


def test_jobs_wait_ten_minutes_unless_told_otherwise() -> None:
    """Longer than it takes to write a checkpoint, for which others wait."""
    assert launch_forked(1, PROGRAM, "default_timeout").said == {0: [600.0]}


def test_the_environment_sets_the_timeout() -> None:
    ended = launch_forked(2, PROGRAM, "come_alone", environ={"DETCOLL_TIMEOUT": "1 s"})
    [end] = ended.said.get(0, ["nothing in time"])
    assert end.startswith("ConnectError")
    assert "rank 1 never came" in end or "did not say in time which ranks are missing" in end


def test_a_call_may_have_a_timeout_of_its_own(fifo: Path) -> None:
    [end] = launch_forked(2, PROGRAM, "timeout_of_a_call", fifo).said[0]
    assert end.startswith("DeadlineMissed")
    assert "was not finished after 0.5 s" in end
