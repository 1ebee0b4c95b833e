"""The clock filter in virtual time: the stated bound holds, skew is found, steps are noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detcoll.clock import ClockFilter, Exchange, SyncState, Verdict
from detcoll.errors import UsageError
from detcoll.testing.fake_clock import FakeClock, FakePath, VirtualTime

US, MS, S = 10**3, 10**6, 10**9


def run(path: FakePath, clock_filter: ClockFilter, count: int, every_ns: int = S) -> list[Verdict]:
    verdicts = []
    for _ in range(count):
        verdicts.append(clock_filter.add(path.exchange()))
        path.time.advance(every_ns)
    return verdicts


def error_ns(path: FakePath, clock_filter: ClockFilter) -> int:
    return abs(clock_filter.offset_ns(path.local.now_ns()) - path.offset_ns)


def bound_ns(path: FakePath, clock_filter: ClockFilter) -> int:
    return clock_filter.bound_ns(path.local.now_ns())


def test_fake_clocks_move_only_when_told():
    true = VirtualTime()
    ahead, fast = FakeClock(true, offset_ns=5), FakeClock(true, drift_ppm=100)
    true.advance(S)
    assert (ahead.now_ns(), fast.now_ns()) == (S + 5, S + 100 * US)
    fast.set_drift(-100)
    fast.step(-7)
    true.advance_to(2 * S)
    assert fast.now_ns() == 2 * S - 7
    assert fast.when_ns(3 * S) > 3 * S
    true.advance_to(fast.when_ns(3 * S))
    assert fast.now_ns() == 3 * S
    with pytest.raises(ValueError, match="does not go back"):
        true.advance(-1)


def test_one_exchange_gives_half_the_round_trip():
    path, clock_filter = FakePath(offset_ns=-5 * S), ClockFilter()
    assert clock_filter.add(path.exchange()) is Verdict.ACCEPTED
    assert error_ns(path, clock_filter) <= 100 * US
    assert 10 * MS <= bound_ns(path, clock_filter) <= 10 * MS + 20 * US


@given(
    offset_ns=st.integers(-(10**17), 10**17),
    drift_ppm=st.floats(-199, 199),
    there_ns=st.integers(0, 30 * MS),
    back_ns=st.integers(0, 30 * MS),
    jitter_ns=st.sampled_from([0, 10 * US, 5 * MS]),
    every_ns=st.sampled_from([2 * MS, S]),
    seed=st.integers(0, 2**16),
)
def test_the_error_is_always_within_the_bound(offset_ns, drift_ppm, there_ns, back_ns, jitter_ns, every_ns, seed):
    path = FakePath(
        offset_ns=offset_ns, drift_ppm=drift_ppm, there_ns=there_ns, back_ns=back_ns, jitter_ns=jitter_ns, seed=seed
    )
    clock_filter = ClockFilter(window=16)
    for _ in range(24):
        assert clock_filter.add(path.exchange()) is Verdict.ACCEPTED
        for wait_ns in (0, every_ns):
            path.time.advance(wait_ns)
            assert error_ns(path, clock_filter) <= bound_ns(path, clock_filter)
    path.time.advance(100 * S)
    assert error_ns(path, clock_filter) <= bound_ns(path, clock_filter)
    assert clock_filter.steps == 0


@pytest.mark.parametrize("drift_ppm", [-199.0, 199.0])
@pytest.mark.parametrize(("there_ns", "back_ns"), [(30 * MS, 0), (0, 30 * MS)])
def test_the_bound_covers_what_the_clocks_drift_apart_during_an_exchange(drift_ppm, there_ns, back_ns):
    path, clock_filter = FakePath(drift_ppm=drift_ppm, there_ns=there_ns, back_ns=back_ns), ClockFilter()
    clock_filter.add(path.exchange())
    assert error_ns(path, clock_filter) <= bound_ns(path, clock_filter)


def test_exchanges_leave_the_window():
    path, clock_filter = FakePath(there_ns=MS, back_ns=MS), ClockFilter(window=8)
    run(path, clock_filter, 1, 10 * MS)
    path.there_ns = path.back_ns = 10 * MS
    run(path, clock_filter, 7, 10 * MS)
    assert bound_ns(path, clock_filter) < 2 * MS
    run(path, clock_filter, 1, 10 * MS)
    assert bound_ns(path, clock_filter) >= 10 * MS


def test_the_bound_grows_with_age_and_shrinks_with_the_least_delay():
    path, clock_filter = FakePath(jitter_ns=5 * MS, seed=3), ClockFilter()
    run(path, clock_filter, 1)
    first_ns = bound_ns(path, clock_filter)
    run(path, clock_filter, 30)
    later_ns = bound_ns(path, clock_filter)
    assert later_ns < first_ns
    path.time.advance(10 * S)
    assert bound_ns(path, clock_filter) > later_ns


def test_queueing_one_way_does_not_move_the_estimate():
    path, clock_filter = FakePath(offset_ns=3 * S), ClockFilter()
    run(path, clock_filter, 1)
    path.there_ns += 40 * MS  # a queue that stays; halving the round trip would be 20 ms off
    run(path, clock_filter, 20, 10 * MS)
    assert error_ns(path, clock_filter) <= 200 * US
    assert bound_ns(path, clock_filter) <= 11 * MS


@pytest.mark.parametrize("drift_ppm", [-80.0, 0.0, 35.5, 150.0])
def test_skew_is_recovered(drift_ppm):
    path = FakePath(offset_ns=7 * S, drift_ppm=drift_ppm, jitter_ns=100 * US, seed=5)
    clock_filter = ClockFilter()
    run(path, clock_filter, 64)
    assert clock_filter.skew_ppm == pytest.approx(drift_ppm, abs=1.0)
    path.time.advance(60 * S)  # without a fit, 80 ppm would be 4.8 ms by now
    assert error_ns(path, clock_filter) <= 200 * US


def test_queueing_hardly_disturbs_the_skew():
    errors_ppm = []
    for seed in range(20):
        path, clock_filter = FakePath(drift_ppm=40.0, jitter_ns=5 * MS, seed=seed), ClockFilter()
        run(path, clock_filter, 64)
        errors_ppm.append(abs(clock_filter.skew_ppm - 40.0))
    assert np.median(errors_ppm) <= 9, "a line through all exchanges alike is 18 ppm off"


def test_skew_narrows_the_growth_where_the_round_trip_is_short():
    path = FakePath(drift_ppm=90.0, there_ns=50 * US, back_ns=50 * US)
    clock_filter = ClockFilter()
    run(path, clock_filter, 64)
    path.time.advance(10 * S)
    assert error_ns(path, clock_filter) <= bound_ns(path, clock_filter) <= 150 * US  # 200 ppm would be 2 ms


def test_a_burst_is_too_short_to_fit_a_rate():
    path, clock_filter = FakePath(jitter_ns=5 * MS), ClockFilter()
    run(path, clock_filter, 20, 2 * MS)
    assert clock_filter.skew_ppm == 0


def test_known_least_delays_see_through_asymmetry():
    shape = {"offset_ns": S, "there_ns": 14 * MS, "back_ns": 6 * MS, "jitter_ns": 100 * US}
    blind, knowing = ClockFilter(), ClockFilter(least_there_ns=14 * MS, least_back_ns=6 * MS)
    for clock_filter in (blind, knowing):
        path = FakePath(**shape)
        run(path, clock_filter, 30, 10 * MS)
        assert error_ns(path, clock_filter) <= bound_ns(path, clock_filter)
    assert error_ns(path, blind) >= 3 * MS
    assert bound_ns(path, knowing) <= 200 * US


def test_exchanges_that_contradict_themselves_are_refused():
    clock_filter = ClockFilter()
    assert clock_filter.add(Exchange(100, 0, 0, 50)) is Verdict.REFUSED, "returned before it was sent"
    assert clock_filter.add(Exchange(0, 60, 50, 100)) is Verdict.REFUSED, "answered before it arrived"
    assert clock_filter.add(Exchange(0, 0, 200, 100)) is Verdict.REFUSED, "held longer than it was away"
    too_sure = ClockFilter(least_there_ns=60, least_back_ns=60)
    assert too_sure.add(Exchange(0, 50, 50, 100)) is Verdict.REFUSED, "faster than the least delays"
    assert (clock_filter.refused, too_sure.refused) == (3, 1)
    assert clock_filter.state is too_sure.state is SyncState.EMPTY


@pytest.mark.parametrize("step_ns", [-3600 * S, -25 * MS, 25 * MS, 10 * S])
def test_a_step_is_noticed_at_once_and_old_exchanges_are_dropped(step_ns):
    path, clock_filter = FakePath(offset_ns=S, drift_ppm=20, jitter_ns=200 * US), ClockFilter()
    run(path, clock_filter, 30)
    path.remote.step(step_ns)
    assert run(path, clock_filter, 5) == [Verdict.STEP] + [Verdict.ACCEPTED] * 4
    assert clock_filter.steps == 1
    assert clock_filter.last_step_ns == pytest.approx(step_ns, abs=2 * MS)
    assert error_ns(path, clock_filter) <= min(bound_ns(path, clock_filter), MS)


def test_it_takes_some_exchanges_to_be_synchronised():
    path, clock_filter = FakePath(), ClockFilter(settle=3)
    states = [clock_filter.state]
    for _ in range(3):
        run(path, clock_filter, 1)
        states.append(clock_filter.state)
    assert states == [SyncState.EMPTY, SyncState.RESYNCHRONISING, SyncState.RESYNCHRONISING, SyncState.SYNCHRONISED]
    path.remote.step(S)
    run(path, clock_filter, 1)
    assert clock_filter.state is SyncState.RESYNCHRONISING
    run(path, clock_filter, 2)
    assert clock_filter.state is SyncState.SYNCHRONISED


@pytest.mark.parametrize("drift_ppm", [-100.0, 70.0, 95.0])
def test_a_new_rate_is_followed_when_the_old_exchanges_no_longer_fit(drift_ppm):
    path = FakePath(there_ns=50 * US, back_ns=50 * US, drift_ppm=100)
    clock_filter = ClockFilter()
    run(path, clock_filter, 64)
    path.remote.set_drift(drift_ppm)
    run(path, clock_filter, 40)
    assert clock_filter.skew_ppm == pytest.approx(drift_ppm, abs=4)
    assert error_ns(path, clock_filter) <= bound_ns(path, clock_filter)


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(-2000, 2000), st.integers(0, 2000), st.integers(0, 2000)),
        min_size=1, max_size=30,
    )
)  # fmt: skip
def test_whatever_exchanges_say_the_bound_is_one(exchanges):
    """Clocks that keep to no rate at all: nothing can be promised, but it must not contradict itself."""
    clock_filter = ClockFilter()
    for at, offset_ns, there_ns, back_ns in exchanges:
        t0_ns = at * 10 * MS
        t1_ns = t0_ns + there_ns + offset_ns
        clock_filter.add(Exchange(t0_ns, t1_ns, t1_ns, t1_ns + back_ns - offset_ns))
        solution = clock_filter._solution
        assert solution.low_ns <= solution.high_ns
        assert solution.skew_low <= solution.skew_high
        for now_ns in (0, S):
            assert clock_filter.bound_ns(now_ns) >= 0


def test_late_answers_may_come_in_any_order():
    path = FakePath(drift_ppm=50, jitter_ns=MS)
    clock_filter, shuffled = ClockFilter(window=10), ClockFilter(window=10)
    exchanges = []
    for _ in range(20):
        exchanges.append(path.exchange())
        path.time.advance(S)
    for exchange in exchanges:
        clock_filter.add(exchange)
    for exchange in exchanges[1::2] + exchanges[::2]:
        assert shuffled.add(exchange) is Verdict.ACCEPTED
    now_ns = path.local.now_ns()
    assert shuffled.offset_ns(now_ns) == clock_filter.offset_ns(now_ns)
    assert shuffled.bound_ns(now_ns) == clock_filter.bound_ns(now_ns)


def test_a_filter_that_knows_nothing_says_so():
    clock_filter = ClockFilter()
    for ask in (lambda: clock_filter.offset_ns(0), lambda: clock_filter.bound_ns(0), lambda: clock_filter.skew_ppm):
        with pytest.raises(UsageError, match="no exchange yet"):
            ask()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settle": 0}, "settle=0"),
        ({"window": 3, "settle": 4}, "window=3"),
        ({"skew_limit_ppm": 0}, "skew_limit_ppm=0"),
        ({"wander_ppm": -1}, "wander_ppm=-1"),
        ({"least_back_ns": -1}, "least_back_ns=-1"),
    ],
)
def test_filter_arguments_are_checked(arguments, words):
    with pytest.raises(UsageError, match=words):
        ClockFilter(**arguments)
