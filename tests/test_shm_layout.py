"""Options of the shared-memory transport, the layout of its memory, and where records are placed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcoll import registry
from detcoll.clock import MonotonicClock
from detcoll.errors import FrameError, PeerLost, TransportUnavailable, UsageError
from detcoll.testing.fabric import LocalMeeting, ThreadFabric
from detcoll_shm import ShmEndpoint, ShmTransport
from detcoll_shm.area import Area, NoRoom
from detcoll_shm.layout import (
    DESCRIPTOR,
    HEAD,
    PAGE_BYTES,
    SLEEPING,
    STATE,
    TAIL,
    WANTS_ROOM,
    Address,
    Geometry,
    Kind,
    Record,
    record_bytes,
)
from detcoll_shm.memory import Ring, open_memory

S = 10**9
MIB = 2**20


def soon_ns() -> int:
    return time.monotonic_ns() + 20 * S


def opened(rank: int, size: int, **options: Any) -> ShmEndpoint:
    return ShmTransport().open(rank, size, LocalMeeting(size).member(rank), MonotonicClock(), options)


def pair(options: Mapping[str, Any]) -> ThreadFabric:
    return ThreadFabric(ShmTransport(), 2, options)


def sides(fabric: ThreadFabric) -> tuple[ShmEndpoint, ShmEndpoint]:
    """The two endpoints, to be driven from this thread in turn."""
    first, second = fabric[0], fabric[1]
    assert isinstance(first, ShmEndpoint)
    assert isinstance(second, ShmEndpoint)
    return first, second


def test_is_found_by_its_name() -> None:
    assert isinstance(registry.load("shm"), ShmTransport)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ring": 1}, "no option ring"),
        ({"ring_bytes": 100}, "ring_bytes=100"),
        ({"ring_bytes": "4 parsecs"}, "ring_bytes='4 parsecs'"),
        ({"ring_bytes": 1.5}, r"ring_bytes=1\.5"),
        ({"slots": 3}, "slots=3 must be a power of two"),
        ({"spin_ns": "1 MiB"}, "spin_ns='1 MiB'"),
        ({"unexpected_bytes": -1}, "unexpected_bytes=-1"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        opened(0, 1, **options)


def test_options_as_quantities() -> None:
    endpoint = opened(0, 1, ring_bytes="1 MiB", spin_ns="5 us")
    assert Address.decode(0, endpoint.address).ring_bytes == MIB
    endpoint.close(soon_ns())


def test_other_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(TransportUnavailable, match="x86-64; this is aarch64"):
        opened(0, 1)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(TransportUnavailable, match="memfd_create"):
        opened(0, 1)


@given(ring_bytes=st.integers(4096, 2**26), slots=st.sampled_from([2, 64, 1024]))
def test_rings_do_not_overlap(ring_bytes: int, slots: int) -> None:
    geometry = Geometry(ring_bytes, slots)
    assert PAGE_BYTES + slots * 128 <= geometry.area_at
    assert geometry.area_at + geometry.area_bytes <= geometry.stride_bytes
    assert geometry.ring_at(0) == PAGE_BYTES
    assert geometry.ring_at(1) - geometry.ring_at(0) == geometry.stride_bytes
    assert geometry.stride_bytes % PAGE_BYTES == 0
    assert 4 * record_bytes(geometry.whole_bytes) <= geometry.area_bytes
    assert 2 * record_bytes(geometry.whole_bytes) <= geometry.lent_bytes


def test_words_of_two_writers_share_no_cache_line() -> None:
    lines = [word // 8 for word in (HEAD, TAIL, WANTS_ROOM, SLEEPING, STATE)]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize(
    "descriptor",
    [
        (1, Kind.WHOLE, 1, 100, 0, 100),
        (0, 9, 1, 100, 0, 100),
        (0, Kind.WHOLE, 1, -100, 0, -100),
        (0, Kind.WHOLE, 1, 100, 0, 99),
        (0, Kind.WHOLE, 1, 100, 10**7, 100),
        (0, Kind.WHOLE, 1, 100, 8, 100),
        (0, Kind.FIRST, 1, 100, -64, 64),
        (0, Kind.MORE, 1, 100, 0, 64),
        (0, Kind.INLINE, 1, 100, 0, 100),
    ],
)
def test_nonsense_in_the_ring_is_refused(descriptor: tuple[int, ...]) -> None:
    with pair({}) as fabric:
        here, there = sides(fabric)
        address = Address.decode(0, here.address)
        fd = open_memory(0, address)
        ring = Ring(fd, address.geometry, 1)
        os.close(fd)
        DESCRIPTOR.pack_into(ring.data, PAGE_BYTES, *descriptor)
        ring.words[HEAD] = 1
        ring.unmap()
        ticket = here.recv(1, 1, 100)
        assert list(here.poll(0)) == [ticket]
        assert isinstance(ticket.error, FrameError)
        assert "rank 1 wrote descriptor 0" in str(ticket.error)
        with pytest.raises(PeerLost, match="nothing can be sent"):
            here.send(1, 1, memoryview(b"x"))
        assert not there.poll(0)


@st.composite
def _area_steps(draw: st.DrawFn) -> list[tuple[str, int]]:
    step = st.one_of(
        st.tuples(st.just("place"), st.integers(1, 16)),
        st.tuples(st.sampled_from(["free", "lend"]), st.integers(0, 63)),
    )
    return draw(st.lists(step, max_size=80))


def _largest_gap(in_use: dict[int, int], size: int) -> int:
    edges = [0, *(edge for start in sorted(in_use) for edge in (start, start + in_use[start])), size]
    return max(end - start for start, end in zip(edges[::2], edges[1::2], strict=True))


@settings(max_examples=300)
@given(_area_steps())
def test_records_never_overlap(steps: list[tuple[str, int]]) -> None:
    size, at = 2048, 128
    words = memoryview(bytearray(at + size)).cast("q")
    area = Area(words, at, size)
    in_use: dict[int, int] = {}
    for what, amount in steps:
        if what == "place":
            nbytes = 64 * amount
            place = area.place(nbytes)
            if isinstance(place, NoRoom):
                states = {words[(at + start) // 8] for start in in_use}
                if place is NoRoom.FULL:
                    assert Record.FULL in states
                else:
                    assert _largest_gap(in_use, size) < nbytes
                continue
            assert 0 <= place <= size - nbytes
            assert all(place + nbytes <= start or start + used <= place for start, used in in_use.items())
            words[(at + place) // 8] = Record.FULL
            in_use[place] = nbytes
        elif in_use:
            start = sorted(in_use)[amount % len(in_use)]
            words[(at + start) // 8] = Record.LENT if what == "lend" else Record.FREE
            if what == "free":
                del in_use[start]
