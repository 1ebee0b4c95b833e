"""How ranks agree on a calendar, and what is kept on disk."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from detcoll.errors import PlanError
from detcoll.job import calendars
from detcoll.job.calendars import LARGEST_ARRIVAL_ERROR_NS, agree_on_calendar, aligns_arrivals
from detcoll.plan import Calendar, Slotting, build_calendar
from detcoll.testing.plans import sites_of
from detcoll.topology import Topology

THREE = sites_of([1, 1, 1])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "detcoll" / "calendars"


def agreed(
    topology: Topology = THREE,
    mode: Slotting | None = Slotting.CALENDAR,
    clocks: str = "",
    arrivals_ns: int | None = None,
) -> tuple[Calendar, list[bytes]]:
    """Return what rank 0 gets, and what it told."""
    told: list[bytes] = []

    def exchange(payload: bytes) -> list[bytes]:
        told.append(payload)
        return [payload]

    clocks = clocks or "a" * topology.size
    return agree_on_calendar(topology, mode, 100_000, clocks, 0, exchange, arrivals_ns), told


def test_others_take_what_rank_0_decides_and_check_it(cache: Path) -> None:
    calendar, told = agreed()
    assert calendar == build_calendar(THREE)
    files = list(cache.iterdir())
    theirs = agree_on_calendar(THREE, Slotting.CALENDAR, 100_000, "aaa", 1, lambda payload: [told[0], payload])
    assert theirs == calendar
    assert list(cache.iterdir()) == files
    further = sites_of([1, 1, 1], 1e7)
    with pytest.raises(PlanError, match="uplink"):
        agree_on_calendar(further, Slotting.CALENDAR, 100_000, "aaa", 1, lambda payload: [told[0], payload])


def test_what_was_kept_is_used_and_what_is_broken_is_not(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calendar, _ = agreed()
    (file,) = cache.iterdir()
    built: list[Slotting] = []

    def counted(topology: Topology, mode: Slotting, **more: int) -> Calendar:
        built.append(mode)
        return build_calendar(topology, mode, **more)

    monkeypatch.setattr(calendars, "build_calendar", counted)
    assert agreed()[0] == calendar
    assert Slotting.CALENDAR not in built
    for content in (b"", file.read_bytes()[:-3], b"\xc1" * 9):
        file.write_bytes(content)
        assert agreed()[0] == calendar
    assert built.count(Slotting.CALENDAR) == 3


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert agreed()[0].has_windows


@pytest.mark.parametrize(
    ("topology", "clocks", "said"),
    [
        (THREE, "aab", "sites do not share a clock"),
        (sites_of([1, 2, 1]), "aaaa", "sites have unequal numbers of ranks"),
    ],
)
def test_flows_share_where_windows_cannot_be_kept(
    topology: Topology, clocks: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "detcoll"):
        calendar, told = agreed(topology, clocks=clocks)
    assert (calendar.mode, told) == (Slotting.SHARE, [])
    assert said in caplog.text


def test_where_no_calendar_is_found_flows_share(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(topology: Topology, mode: Slotting, **more: int) -> Calendar:
        if mode is Slotting.CALENDAR:
            raise PlanError("no luck")
        return build_calendar(topology, mode, **more)

    monkeypatch.setattr(calendars, "build_calendar", refuse)
    with caplog.at_level(logging.WARNING, "detcoll"):
        assert agreed()[0].mode is Slotting.SHARE
    assert "no luck" in caplog.text


def test_nothing_is_exchanged_where_nothing_has_to_be_agreed() -> None:
    for topology, mode in (
        (THREE, Slotting.SHARE),
        (THREE, None),
        (sites_of([2, 2]), None),
        (THREE.as_single_cluster(), None),
    ):
        assert agreed(topology, mode)[1] == []


def test_unasked_more_than_two_sites_share() -> None:
    calendar, told = agreed(mode=None)
    assert (calendar.mode, told) == (Slotting.SHARE, [])
    assert agreed(sites_of([2, 2]), mode=None)[0].mode is Slotting.CALENDAR


def test_what_is_reserved_between_two_sites_is_not_lent(caplog: pytest.LogCaptureFixture) -> None:
    reserved = THREE.with_reserved(2e7)
    with caplog.at_level(logging.WARNING, "detcoll"):
        calendar, _ = agreed(reserved.granted)
    assert calendar.mode is Slotting.SHARE
    assert "rates are reserved between pairs of sites" in caplog.text
    for i, j in ((0, 1), (1, 2), (2, 0)):
        assert calendar.rate_bytes_per_s(i, j) <= 0.99 * 2e7 * THREE.payload_share * (1 + 1e-9)


@pytest.mark.parametrize(("arrivals_ns", "guard_ns"), [(0, 100_000), (1, 150_000), (120_000, 250_000)])
def test_guards_cover_what_sites_without_a_common_clock_could_not_mend(arrivals_ns: int, guard_ns: int) -> None:
    calendar, _ = agreed(clocks="abc", arrivals_ns=arrivals_ns)
    assert calendar == build_calendar(THREE, Slotting.CALENDAR, error_ns=guard_ns)


def test_arrivals_that_stay_too_far_apart_get_no_windows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "detcoll"):
        calendar, told = agreed(clocks="abc", arrivals_ns=LARGEST_ARRIVAL_ERROR_NS + 1)
    assert (calendar.mode, told) == (Slotting.SHARE, [])
    assert "stay misaligned by 1000.001 us, more than 1000 us; check the delays in the topology" in caplog.text


def test_arrivals_are_aligned_where_windows_are_asked_for_and_clocks_differ() -> None:
    assert aligns_arrivals(THREE, Slotting.CALENDAR, "aab")
    assert not aligns_arrivals(THREE, Slotting.CALENDAR, "aaa")
    assert not aligns_arrivals(THREE, None, "aab")
    assert not aligns_arrivals(sites_of([2, 2]), Slotting.CALENDAR, "aabb")
    assert not aligns_arrivals(sites_of([1, 2, 1]), Slotting.CALENDAR, "aabc")
    assert not aligns_arrivals(THREE.as_single_cluster(), Slotting.CALENDAR, "abc")
