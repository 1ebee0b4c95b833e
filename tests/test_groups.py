"""Groups of ranks: parts of the world that have calls of their own, over real transports."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from forked import launch_forked
from ranks import attempt, grouped, lines, run_ranks, written

from detcoll.buffers import bind
from detcoll.communicator import Communicator
from detcoll.errors import Closed, ConnectError, DeadlineMissed, PlanMismatch, TransportError, UsageError
from detcoll.fold import reference
from detcoll.types import ReduceOp

PLACES = {"slotted": lines(2, 2), "slotted one site": None, "shm": None, "shm two groups": grouped(2, 2)}


def values(ranks: tuple[int, ...], elems: int, seed: int) -> list[np.ndarray]:
    return [np.random.default_rng([seed, rank]).standard_normal(elems).astype(np.float32) for rank in ranks]


def check_sum(comm: Communicator, elems: int, seed: int = 0) -> None:
    """All-reduce values that name their rank and hold the result against the promised fold, bit for bit."""
    given = values(comm.ranks, elems, seed)
    mine = given[comm.rank].copy()
    comm.all_reduce(mine)
    groups = [site.ranks for site in comm.topology.sites]
    assert mine.tobytes() == reference(ReduceOp.SUM, given, groups, np.dtype(np.float32)).tobytes()


def everywhere(function):
    """Run a test on all places."""
    return pytest.mark.parametrize("place", PLACES)(function)


def run(place: str, size: int, function, **settings) -> list:
    return run_ranks(size, function, transport=place.split()[0], topology=PLACES[place], **settings)


@everywhere
def test_split_parts_the_world(place: str) -> None:
    def program(comm):
        part = comm.split(comm.rank % 2, key=-comm.rank)
        assert part.ranks == ((2, 0) if comm.rank % 2 == 0 else (3, 1))
        assert part.ranks[part.rank] == comm.rank
        for elems in (1, 1000, 70_000):
            check_sum(part, elems)
            check_sum(comm, elems)
        x = np.full(5, comm.rank, np.float32)
        part.broadcast(x, root=1)
        assert (x == part.ranks[1]).all()
        part.barrier()
        part.close()
        with pytest.raises(Closed):
            part.barrier()
        check_sum(comm, 10)

    run(place, 4, program)


@everywhere
def test_who_gives_no_color_is_in_no_part(place: str) -> None:
    def program(comm):
        part = comm.split(None if comm.rank == 1 else 7)
        if comm.rank == 1:
            assert part is None
        else:
            assert part.ranks == (0, 2, 3)
            check_sum(part, 3000)
        comm.barrier()

    run(place, 4, program)


@everywhere
def test_local_and_across(place: str) -> None:
    def program(comm):
        is_two = len(comm.topology.sites) == 2
        assert comm.local.ranks == ((0, 1) if comm.rank < 2 else (2, 3)) if is_two else (0, 1, 2, 3)
        assert comm.across.ranks == ((0, 2) if comm.rank % 2 == 0 else (1, 3)) if is_two else (comm.rank,)
        check_sum(comm.local, 5000)
        check_sum(comm.across, 5000)
        assert comm.local is comm.local
        assert comm.across.bound("all_reduce", 2**20) == (
            pytest.approx(comm.bound("all_reduce", 2**21), rel=0.01) if comm.topology.is_wide else None
        )

    run(place, 4, program)


@everywhere
def test_groups_overlap_and_nest_and_are_made_by_their_members_alone(place: str) -> None:
    def program(comm):
        groups = [comm.group(ranks) for ranks in ((0, 1, 2), (1, 2, 3), (3, 0), (2,)) if comm.rank in ranks]
        first = groups[0]
        if comm.rank in (1, 2):
            groups.append(first.group([first.ranks.index(2), first.ranks.index(1)], name="nested"))
            assert groups[-1].ranks == (2, 1)
        for group in groups:
            check_sum(group, 1 + 1000 * sum(group.ranks), group.size)
        works = []
        for group in sorted(groups, key=lambda each: -sum(each.ranks)):
            x = np.full(20_000, group.rank, np.float32)
            works.append((group.all_reduce(x, op="max", async_op=True), x, group.size - 1))
        for work, x, largest in works:
            work.wait()
            assert (x == largest).all()

    run(place, 4, program)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], "at least one"), ([0, 0], "each rank once"), ([1], "lacks rank 0"), ([0, 4], "must be ranks from 0 to 3"),
        ([0, True], "must be ranks"), ([0, 1.0], "must be ranks"), ("01", "must be ranks"),
        (5, "must be ranks"), (None, "must be ranks"),
    ],
)  # fmt: skip
def test_ranks_that_make_no_group(ranks: object, text: str) -> None:
    def program(comm):
        if comm.rank == 0:
            with pytest.raises(UsageError, match=text):
                comm.group(ranks)
        comm.barrier()

    run("shm", 4, program)


def test_a_name_may_be_used_again() -> None:
    def program(comm):
        if comm.rank == 2:
            return
        pairs = [comm.group([0, 1], name="pair") for _ in range(2)]
        for pair in pairs:
            check_sum(pair, 100)
        pairs[0].close()
        again = comm.group([0, 1], name="pair")
        check_sum(again, 100)
        check_sum(pairs[1], 100)

    run("slotted one site", 3, program)


def test_a_member_that_does_not_come_is_named() -> None:
    def program(comm):
        if comm.rank == 0:
            comm.group([0, 2])

    answers = attempt(3, program, transport="slotted", timeout=1.5)
    assert isinstance(answers[0], ConnectError)
    assert "group of ranks 0, 2 was not made" in str(answers[0])
    assert "rank 2" in str(answers[0])


def test_members_that_give_the_ranks_in_different_order_see_both() -> None:
    def program(comm):
        comm.group([0, 1] if comm.rank == 0 else [1, 0], "pair")

    orders = ["0, 1", "1, 0"]
    for rank, answer in enumerate(attempt(2, program, transport="slotted", timeout=1.5, stay=True)):
        assert isinstance(answer, ConnectError)
        own, other = orders[rank], orders[1 - rank]
        assert f"exchange \"group with ranks in the order {own} and the name 'pair'" in str(answer)
        assert f"came to \"group with ranks in the order {other} and the name 'pair'" in str(answer)
        assert "the same ranks in the same order and the same name" in str(answer)


@everywhere
def test_three_groups_from_three_threads(place: str) -> None:
    def program(comm):
        here = comm.local if len(comm.topology.sites) == 2 else comm.group([0, 1] if comm.rank < 2 else [2, 3])
        there = comm.split(comm.rank % 2)
        pair = comm.group([0, 3]) if comm.rank in (0, 3) else None
        problems: list[BaseException] = []

        def work(group: Communicator, seed: int) -> None:
            try:
                for number in range(25):
                    check_sum(group, 1 + 997 * number % 8000, seed + number)
            except BaseException as error:
                problems.append(error)

        chosen = [group for group in (here, there, pair) if group is not None]
        threads = [threading.Thread(target=work, args=(group, 100 * at)) for at, group in enumerate(chosen)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]

    run(place, 4, program)


@pytest.mark.parametrize("transport", ["slotted", "shm"])
def test_random_calls_of_three_groups_from_three_threads(tmp_path, transport: str) -> None:
    topology = written(lines(2, 2, rate_bytes_per_s=1e9), tmp_path)
    environ = {"DETCOLL_TOPOLOGY": topology, "DETCOLL_TRANSPORT": transport}
    ended = launch_forked(4, "random_groups.py", 90, 3, 10_000, environ=environ)
    assert ended.code == 0, ended.err
    assert ended.out.split() == [transport, "90"]


@pytest.mark.parametrize("place", ["slotted", "shm"])
def test_what_ends_a_group_ends_no_other(place: str) -> None:
    def program(comm):
        part = comm.split(comm.rank // 2)
        if comm.rank < 2:
            with pytest.raises(PlanMismatch):
                part.all_reduce(np.ones(5 + comm.rank, np.float32))
            with pytest.raises(Closed) as closed:
                part.barrier()
            assert isinstance(closed.value.__cause__, PlanMismatch)
        else:
            check_sum(part, 1000)
        check_sum(comm, 1000)
        again = comm.split(comm.rank // 2)
        check_sum(again, 1000)

    run(place, 4, program)


@pytest.mark.parametrize("place", ["slotted", "shm"])
def test_a_member_that_never_calls_ends_its_group_only(place: str) -> None:
    given_up = threading.Event()

    def program(comm):
        part = comm.split(comm.rank // 2)
        if comm.rank == 1:
            assert given_up.wait(20)
        elif comm.rank == 0:
            with pytest.raises(DeadlineMissed, match="waits for rank 1, which has not"):
                part.all_reduce(np.ones(1000, np.float32), timeout=0.5)
            given_up.set()
        else:
            check_sum(part, 1000)
        check_sum(comm, 1000)

    run(place, 4, program)


def test_a_call_that_one_rank_refuses_ends_on_all_and_the_next_works() -> None:
    def program(comm):
        comm.barrier()
        with pytest.raises(UsageError, match=r"op='median'|rank 2 refused the call: op='median'"):
            comm.all_reduce(np.ones(70_000, np.float32), op="median" if comm.rank == 2 else "sum")
        check_sum(comm, 70_000)

    run("slotted", 4, program)


def test_equal_calls_in_another_order_are_told_apart_by_name() -> None:
    def program(comm):
        first = "weights" if comm.rank == 0 else "biases"
        with pytest.raises(PlanMismatch, match=r"float32, sum \(weights\)"):
            comm.all_reduce(np.ones(10, np.float32), name=first)

    run("slotted one site", 2, program)


@pytest.mark.parametrize("place", ["slotted one site", "shm"])
def test_lists_that_are_cut_differently_are_told_apart(place: str) -> None:
    def program(comm):
        first = 5 if comm.rank else 3
        with pytest.raises(PlanMismatch, match="they differ in the sizes of the arrays in their lists"):
            comm.all_reduce([np.ones(first, np.float32), np.ones(8 - first, np.float32)])

    run(place, 2, program)


def test_calls_that_only_read_the_same_memory_go_beside_each_other() -> None:
    """The first waits for rank 2, which waits until the second has ended on the other two; a third writes there."""
    is_done = threading.Event()

    def program(comm):
        pair = comm.group([0, 1]) if comm.rank < 2 else None
        x = np.full(1000, comm.rank, np.float32)
        if pair is None:
            assert is_done.wait(20)
            first, third = comm.all_gather(x, async_op=True), None
        else:
            first = comm.all_gather(x, async_op=True)
            assert (pair.all_gather(x).reshape(2, -1) == [[0], [1]]).all()
            third = pair.all_reduce(x, async_op=True)
            is_done.set()
        assert (first.wait().reshape(3, -1) == [[0], [1], [2]]).all()
        if third is not None:
            third.wait()
            assert (x == 1).all()

    run("slotted one site", 3, program)


@everywhere
def test_calls_on_the_same_memory_keep_their_order(place: str) -> None:
    def program(comm):
        part = comm.split(0)
        for elems in (10, 5000, 200_000):
            x = np.ones(elems, np.float32)
            works = [comm.all_reduce(x, async_op=True), part.all_reduce(x[elems // 2 :], async_op=True)]
            works += [comm.all_reduce([x[: elems // 2], x[elems // 2 :]], async_op=True)]
            for work in works:
                work.wait()
            assert (x[: elems // 2] == 16).all()
            assert (x[elems // 2 :] == 64).all()

    run(place, 4, program)


def test_a_native_call_made_before_there_was_another_group_is_waited_for_on_the_same_memory() -> None:
    """Where the world's calls go to the transport itself, and those of other groups do not."""
    looked = threading.Event()

    def program(comm):
        x = np.ones(1000, np.float32)
        if comm.rank == 0:
            work = comm.all_reduce(x, async_op=True)  # rank 1 calls it later
        part = comm.split(0)
        if comm.rank == 0:
            spans = bind(x).spans
            ahead = comm._job.ahead
            runner = comm._job.natives.of(comm._job.world)
            is_awaited = ahead.of(spans, None) == [work]
            assert ahead.of(bind(x.copy()).spans, None) == ahead.of(spans, runner) == []
            looked.set()
            assert is_awaited
        else:
            assert looked.wait(20)
            work = comm.all_reduce(x, async_op=True)
        part.all_reduce(x)
        work.wait()
        assert (x == 4).all()

    run("shm", 2, program)


@pytest.mark.parametrize("place", ["slotted", "slotted one site"])
def test_a_call_that_is_interrupted_before_it_is_handed_over_ends_on_all_by_name(place: str) -> None:
    def program(comm):
        comm.barrier()
        if comm.rank == 1:
            loop = comm._job.loop
            submit = loop.submit

            def interrupted(operation) -> None:
                loop.submit = submit
                raise KeyboardInterrupt

            loop.submit = interrupted
            with pytest.raises(KeyboardInterrupt):
                comm.all_reduce(np.ones(100, np.float32))
        else:
            with pytest.raises(
                TransportError, match=r"rank 1 gave up: KeyboardInterrupt\(\) while it called all_reduce"
            ):
                comm.all_reduce(np.ones(100, np.float32))
        check_sum(comm, 1000)

    run(place, 4, program)


def test_threads_that_ask_for_the_local_group_at_once_get_the_same() -> None:
    def program(comm):
        made: list[Communicator] = []
        together = threading.Barrier(2)

        def ask() -> None:
            together.wait(20)
            made.append(comm.local)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert made[0] is made[1]

    run("shm", 2, program)


def test_a_group_of_a_job_that_has_failed_can_be_closed_and_aborted() -> None:
    def program(comm):
        parts = [comm.split(0), comm.split(0)]
        comm._job.loop.fail(TransportError("the progress thread failed"))
        parts[0].close()
        parts[1].abort("because of that")

    run_ranks(2, program, transport="slotted")


@pytest.mark.parametrize("place", ["slotted", "shm"])
def test_a_group_is_closed_in_time_though_a_member_is_in_a_call(place: str) -> None:
    closed = threading.Event()

    def program(comm):
        part = comm.split(0)
        if comm.rank:
            assert closed.wait(20)
            check_sum(comm, 1000)
            return
        work = part.all_reduce(np.ones(1000, np.float32), async_op=True, timeout=100.0)
        with pytest.raises(DeadlineMissed, match="still under way after"):
            part.close(0.2)
        closed.set()
        with pytest.raises(DeadlineMissed, match="closing"):
            work.wait()
        check_sum(comm, 1000)

    run(place, 4, program)


def test_communicators_and_works_say_what_they_are() -> None:
    def program(comm):
        pair = comm.group([0, 1], name="pair")
        assert repr(comm) == f"<Communicator world: rank {comm.rank} of 2, slotted>"
        assert repr(pair) == f"<Communicator 'pair': rank {pair.rank} of 2, slotted>"
        work = pair.barrier(async_op=True)
        work.wait()
        assert repr(work) == "<Work barrier number 0: ended>"

    run("slotted one site", 2, program)
