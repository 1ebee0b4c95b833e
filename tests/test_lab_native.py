"""The router's loop in C, held bit by bit against the one in Python."""

from __future__ import annotations

import ctypes
import math
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import await_gone
from routers import LIBRARY, needs_compiler

from detcoll.emulation.lab import Conditions, Failure, Lab, Service, why_unavailable
from detcoll.emulation.lab.cotenants import Bursts
from detcoll.emulation.lab.line import WideArea
from detcoll.emulation.lab.log import ArrivalLog
from detcoll.emulation.lab.native import library
from detcoll.emulation.lab.native.area import NativeArea
from detcoll.emulation.lab.native.library import NotCompiled
from detcoll.emulation.lab.router import RouterConfig, _NativeRouter, _Router
from detcoll.emulation.lab.unit import NEEDS_CSUM, TCP, UDP, VNET_HEADER
from detcoll.errors import DetcollError
from detcoll.testing.traffic import blast
from detcoll.topology import Topology

MS = 10**6


def unit_of(draw: random.Random, sites: int) -> bytes:
    """Return a unit, of which some are such as no kernel makes."""
    source, destination = draw.randrange(sites), draw.randrange(sites + 1)
    ends = socket.inet_aton(f"10.77.{source}.1")
    ends += socket.inet_aton(f"10.77.{destination}.{draw.choice((1,) * 12 + (2, 3, 9))}")
    protocol = draw.choice((TCP, TCP, TCP, TCP, UDP, 1))
    payload = draw.choice((0, draw.randrange(1, 1449), 1448, 2896, draw.randrange(1, 65_000)))
    gso_size = draw.choice((0, 1, 48, 1448)) if payload < 3000 else 1448
    fragment = draw.choice((0x4000,) * 9 + (0x2000, 0x20B9))
    length_byte = draw.choice((0x45,) * 20 + (0x46, 0x4F, 0x40))
    tos = draw.choice((0, 46 << 2, draw.randrange(256)))
    ip = struct.pack("!BBHHHBBH", length_byte, tos, 52 + payload & 0xFFFF, draw.randrange(1 << 16), fragment, 64,
                     protocol, 0)  # fmt: skip
    offset = draw.choice((8,) * 20 + (0, 4, 5, 15))
    flags, sequence = draw.randrange(256), draw.randrange(1 << 32)
    tcp = struct.pack("!HHIIBBHHH", 4000, 5000, sequence, 7, offset << 4, flags, 500, 0, 0) + bytes(12)
    gso_type = draw.choice((1, 0x81)) if gso_size else 0
    unit = VNET_HEADER.pack(NEEDS_CSUM, gso_type, 52, gso_size, 20, 16) + ip + ends + tcp + draw.randbytes(payload)
    return unit[: draw.randrange(len(unit))] if draw.random() < 0.02 else unit


def unit_to(site: int) -> bytes:
    """Return a small unit of site 0."""
    ends = socket.inet_aton("10.77.0.1") + socket.inet_aton(f"10.77.{site}.1")
    return (
        VNET_HEADER.pack(0, 0, 0, 0, 0, 0) + struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, UDP, 0) + ends + bytes(8)
    )


def topology_of(draw: random.Random) -> Topology:
    sites = draw.randint(2, 4)
    plain = Topology.uniform(sites, 1, 1e7, draw.choice((0, 1, 3)) * MS)
    rates = [(draw.choice((4e6, 1e7, 2e8)), draw.choice((4e6, 1e7, 2e8))) for _ in range(sites)]
    links = tuple(
        (ends, replace(link, reserved_bytes_per_s=draw.choice((None, 4e5, 1e6)))) for ends, link in plain.links
    )
    named = tuple(
        replace(site, uplink_bytes_per_s=up, downlink_bytes_per_s=down)
        for site, (up, down) in zip(plain.sites, rates, strict=True)
    )
    return replace(plain, sites=named, links=links if draw.random() < 0.7 else plain.links)


def conditions_of(draw: random.Random, topology: Topology) -> Conditions:
    is_reserved = all(link.reserved_bytes_per_s is not None for _, link in topology.links)
    services = [None, Service.BEST_EFFORT, *([Service.DETERMINISTIC] if is_reserved else [])]
    failures = (Failure(20 * MS, 25 * MS), Failure(5 * MS, 9 * MS, (0, 1)), Failure(12 * MS, 13 * MS, (1, 0)))
    return Conditions(
        queue_bytes=draw.choice((3_000, 100_000, 2_500_000)),
        loss=draw.choice((0.0, 0.0, 0.01, 0.4, 0.4, 1.0)),
        jitter_ns=draw.choice((0, 0, 2 * MS)),
        seed=draw.randrange(100),
        service=draw.choice(services),
        burst_bytes=draw.choice((None, 1_500, 20_000)),
        cross_traffic=draw.choice((0.0, 0.5, 2.0)),
        failures=failures[: draw.randint(0, 3)],
        probe_gap_ns=draw.choice((0, MS)),
    )


class Pair:
    """The same lines twice; whatever is done to both has to give the same."""

    def __init__(self, topology: Topology, conditions: Conditions, folder: Path, opened_ns: int) -> None:
        self.logs = [ArrivalLog(folder / "python.npy"), ArrivalLog(folder / "c.npy")]
        self.python = WideArea(topology, conditions, self.logs[0], opened_ns)
        self.c = NativeArea(LIBRARY, topology, conditions, self.logs[1], opened_ns)
        self.folder = folder

    def same(self, ask: Callable[[Any], Any]) -> Any:
        expected = ask(self.python)
        assert ask(self.c) == expected
        return expected

    def arrive(self, source: int, unit: bytes, now_ns: int, is_tenant: bool, asleep_ns: float) -> None:
        for wide in (self.python, self.c):
            wide.asleep_ns = asleep_ns
            wide.arrive(source, unit, now_ns, is_tenant)

    def due(self, now_ns: int) -> int:
        found = self.same(lambda wide: wide.due(now_ns))
        self.same(lambda wide: (wide.next_ns, wide.under_way, wide.is_urgent, wide.is_awaited))
        return len(found)

    def close(self) -> None:
        """Compare all that was counted and logged."""
        self.c.flush()
        for log in self.logs:
            log.close()
        self.same(lambda wide: [asdict(entry) for entry in wide.directions()])
        self.same(lambda wide: [wide.peaks(service) for service in Service])
        self.same(lambda wide: (wide.bursts(), wide.probe(), wide.unroutable))
        assert (self.folder / "c.npy").read_bytes() == (self.folder / "python.npy").read_bytes()


def walk(pair: Pair, draw: random.Random, sites: int, steps: int, opened_ns: int) -> int:
    """Let units arrive and be due at random times, and return how many came out."""
    now_ns, count = opened_ns, 0
    for _ in range(steps):
        for _ in range(draw.choice((0, 1, 1, 2, 9))):
            source, is_tenant = draw.randrange(sites), draw.random() < 0.1
            pair.arrive(source, unit_of(draw, sites), now_ns, is_tenant, draw.choice((0, 0.0, 1e5, 3.5e6)))
        now_ns += draw.choice((0, 1, 10_000, 300_000, 2 * MS))
        if draw.random() < 0.3 and pair.python.next_ns < math.inf:
            now_ns = max(now_ns, math.ceil(pair.python.next_ns))
        count += pair.due(now_ns)
    return count + pair.due(now_ns + 1_000 * MS)


@needs_compiler
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
@example(seed=405)  # a rounding here kept a port from ever being done
def test_c_and_python_agree_in_every_bit(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    draw = random.Random(seed)
    topology, opened_ns = topology_of(draw), draw.choice((0, 123_456_789))
    pair = Pair(topology, conditions_of(draw, topology), tmp_path_factory.mktemp("logs"), opened_ns)
    walk(pair, draw, len(topology.sites), 100, opened_ns)
    pair.close()


@needs_compiler
def test_they_agree_for_longer_than_what_is_drawn_and_logged_at_a_time(tmp_path: Path) -> None:
    draw = random.Random(7)
    topology = Topology.uniform(3, 1, 2e7, 3 * MS)
    conditions = Conditions(loss=0.2, jitter_ns=MS, cross_traffic=1.0, probe_gap_ns=MS // 4)
    pair = Pair(topology, conditions, tmp_path, 0)
    assert walk(pair, draw, 3, 2500, 0) > 4000
    pair.close()
    lost = sum(entry.lost_segments for entry in pair.c.directions())
    sent = sum(burst.offered_bytes for burst in pair.c.bursts()) / topology.mtu_bytes / 4
    assert min(lost, pair.c.probe().sent) > 3 * 512
    assert sent > 3 * 4096
    assert (tmp_path / "c.npy").stat().st_size > 2 * 65536


@needs_compiler
def test_what_goes_wrong_in_python_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(Topology.uniform(2, 1, 1e8, MS), Conditions(cross_traffic=1.0), tmp_path, 0)

    def full(self: ArrivalLog, records: bytes) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(ArrivalLog, "extend", full)
    pair.c.arrive(0, unit_of(random.Random(1), 2), 0)
    for number in range(3):
        pair.c.arrive(0, VNET_HEADER.pack(0, 0, 0, 0, 0, 0) + bytes(12) + b"\x0a\x4d\0\1\x0a\x4d\1\1" * 2, number)
    with pytest.raises(OSError, match="no space"):
        pair.c.flush()
    for log in pair.logs:
        log.close()


class TestLoop:
    """The parts of the loop, with a clock that the test sets."""

    @pytest.fixture
    def parts(self) -> Iterator[tuple[_NativeRouter, NativeArea, socket.socket, list[int]]]:
        ticks = [0]
        topology = Topology.uniform(2, 1, 1e6, 1)
        area = NativeArea(LIBRARY, topology, Conditions())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        theirs.setblocking(False)
        with ours, socket.socket() as control:
            config = RouterConfig(topology, Conditions(), None, (theirs.detach(),), (), (), 1)

            def clock() -> int:
                return ticks.pop(0) if len(ticks) > 1 else ticks[0]

            router = _NativeRouter(config, area, control, control.fileno(), LIBRARY, clock)
            yield router, area, ours, ticks
            for tun in router._tuns:
                os.close(tun)

    @needs_compiler
    def test_it_knows_for_how_long_it_did_not_look(self, parts: Any) -> None:
        router, area, ours, ticks = parts

        def look(began_ns: int, now_ns: int, due_ns: float, units: int = 0) -> float:
            for _ in range(units):
                ours.send(b"unit")
            ticks[:] = [now_ns]
            LIBRARY.router_look(router.handle, began_ns, due_ns)
            assert LIBRARY.router_read(router.handle, 0) == 0
            asleep_ns: float = area._c_asleep_ns[0]
            return asleep_ns

        assert look(0, 100, math.inf) == 0  # it slept because nothing came
        assert look(100, 150, 120) == 30  # past the time to wake up
        assert look(170, 180, math.inf) == 20  # it was at work
        assert look(180, 300, 200, units=20) == 100
        assert look(300, 301, math.inf) == 100  # a batch, and more is left from then
        assert look(301, 302, math.inf) == 100
        assert look(302, 303, math.inf) == 0
        area.directions()
        assert area.unroutable == 20

    @needs_compiler
    def test_a_stall_between_two_units_counts_for_the_second(self, parts: Any) -> None:
        router, area, ours, ticks = parts
        ours.send(b"one")
        ours.send(b"two")
        ticks[:] = [1, 3, 900]
        LIBRARY.router_look(router.handle, 0, math.inf)
        LIBRARY.router_read(router.handle, 0)
        assert area._c_asleep_ns[0] == 899

    @pytest.mark.parametrize("asked", ["python", pytest.param("c", marks=needs_compiler)])
    def test_one_look_serves_many_probes_until_a_kernel_waits(self, asked: str) -> None:
        """At three sites a probe is due every 0.1 ms or so, and there and back takes it 200 ms."""
        topology, conditions = Topology.uniform(3, 1, 1e8, 100 * MS), Conditions(probe_gap_ns=MS // 4)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            config = RouterConfig(topology, conditions, None, (), (), (), 1)
            area: Any = (WideArea if asked == "python" else partial(NativeArea, LIBRARY))(topology, conditions)
            made = partial(_Router, config, area) if asked == "python" else partial(_NativeRouter, config, area)
            router = made(theirs, theirs.fileno(), *(() if asked == "python" else (LIBRARY,)))
            for _ in range(3):
                before_ns = area.next_ns
                due_ns, wake_ns = router.next_look()
                assert due_ns == wake_ns == before_ns + MS
                area.due(math.ceil(due_ns))
                assert area.next_ns > before_ns
            area.arrive(0, unit_to(1), math.ceil(due_ns))
            assert router.next_look() == (area.next_ns, area.next_ns)

    @needs_compiler
    def test_it_ends_with_what_was_raised_in_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: Bursts) -> list[tuple[float, int]]:
            raise OSError(5, "no numbers")

        monkeypatch.setattr(Bursts, "draw", broken)
        topology, conditions = Topology.uniform(2, 1, 1e6, 1), Conditions(cross_traffic=1.0)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            config = RouterConfig(topology, conditions, None, (), (), (), 1)
            area = NativeArea(LIBRARY, topology, conditions)
            with pytest.raises(OSError, match="no numbers"):
                _NativeRouter(config, area, theirs, theirs.fileno(), LIBRARY).forward()

    @needs_compiler
    def test_an_error_of_the_device_is_told(self, parts: Any) -> None:
        router, *_ = parts
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, router._tuns[0])
        os.close(devnull)
        assert os.strerror(LIBRARY.router_read(router.handle, 0)) == "Bad file descriptor"


BOUNDS = """
import sys
from detcoll.emulation.lab import Conditions
from detcoll.emulation.lab.native import area, library
from detcoll.topology import Topology
c = library.load()
wide = area.NativeArea(c, Topology.uniform(2, 1, 1e6, 1), Conditions())
exec(sys.argv[1])
"""


@needs_compiler
class TestBounds:
    """What would spoil memory ends the process."""

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ("wide.arrive(2, bytes(60), 0)", "no such site"),
            ("wide.arrive(0, bytes(65601), 0)", "a unit is too large"),
            ("c.area_port(wide.handle, 4, 1.0, 1.0, 1.0, 1.0)", "no such port"),
            ("c.area_path(wide.handle, 8, 1, 0.0, 0.0)", "no such path"),
            ("c.area_bursts(wide.handle, -1, 1.0, 1.0)", "no such site"),
            ("c.area_burst_counts(wide.handle, 0, None)", "no bursts of such a site"),
            ("c.router_new(wide.handle, None, 2, 1, library.Clock())", "not a device of others for each site"),
        ],
    )
    def test_c_holds_them_by_itself(self, wrong: str, said: str) -> None:
        ended = subprocess.run([sys.executable, "-c", BOUNDS, wrong], capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGABRT, ended.stderr
        assert f"the lab's router: {said}\n" in ended.stderr

    def test_no_more_is_drawn_than_there_is_room_for(self) -> None:
        conditions = Conditions(cross_traffic=1.0)
        area = NativeArea(LIBRARY, Topology.uniform(2, 1, 1e6, 1), conditions)
        values = (ctypes.c_double * 4)()
        assert area._draw(3, 0, values, 4) == 0
        with pytest.raises(ValueError, match="random numbers do not fit where 4 do"):
            area.check()


def slow_compiler(folder: Path) -> Path:
    """Return a compiler that tells its process group in ``held`` and then works for ever, with a child."""
    os.mkfifo(folder / "held")
    path = folder / "slow-cc"
    path.write_text(
        f"#!/bin/sh\nexec 9>{folder}/held\n: > \"$TMPDIR/cc.s\"\nsleep 600 &\ncut -d ' ' -f 5 /proc/$$/stat >&9\nwait\n"
    )
    path.chmod(0o755)
    return path


def processes_of_group(group: int) -> list[int]:
    """Return the processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                found.append(int(path.name))
    return found


@needs_compiler
class TestCompiling:
    @pytest.fixture(autouse=True)
    def _cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        hasty = tuple(flag for flag in library._FLAGS if not flag.startswith("-O"))
        monkeypatch.setattr(library, "_FLAGS", hasty)  # what is compiled does not run here

    def test_it_is_done_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert isinstance(library.load(), ctypes.CDLL)
        [kept] = (tmp_path / "detcoll" / "router").iterdir()
        assert kept.suffix == ".so"
        monkeypatch.setattr(library.subprocess, "Popen", None)
        assert isinstance(library.load(), ctypes.CDLL)

    def test_the_oldest_are_forgotten(self, tmp_path: Path) -> None:
        folder = tmp_path / "detcoll" / "router"
        folder.mkdir(parents=True)
        for age in range(6):
            (folder / f"{age}.so").touch()
            os.utime(folder / f"{age}.so", (1000 - age, 1000 - age))
        assert isinstance(library.load(), ctypes.CDLL)
        kept = {path.name for path in folder.iterdir()}
        assert {"0.so", "1.so", "2.so"} < kept
        assert len(kept) == 4

    def test_another_compiler_makes_its_own(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        library.load()
        monkeypatch.setenv("CC", "cc -O1")
        library.load()
        assert len(list((tmp_path / "detcoll" / "router").iterdir())) == 2

    def test_it_is_kept_whatever_others_may_do_with_new_files(self, tmp_path: Path) -> None:
        before = os.umask(0o002)
        try:
            assert isinstance(library.load(), ctypes.CDLL)
        finally:
            os.umask(before)
        [kept] = (tmp_path / "detcoll" / "router").iterdir()
        assert kept.stat().st_mode & 0o077 == 0

    def test_what_others_may_write_is_made_anew(self, tmp_path: Path) -> None:
        library.load()
        [kept] = (tmp_path / "detcoll" / "router").iterdir()
        kept.write_bytes(b"something else")
        kept.chmod(0o666)
        assert isinstance(library.load(), ctypes.CDLL)
        assert kept.read_bytes()[:4] == b"\x7fELF"

    def test_a_cache_that_cannot_be_used_is_done_without(self, tmp_path: Path) -> None:
        (tmp_path / "detcoll").write_text("a file where the folder would be")
        assert isinstance(library.load(), ctypes.CDLL)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can use another user's home as its own")
    def test_another_users_cache_is_left_alone(self, tmp_path: Path) -> None:
        os.chown(tmp_path, 54321, 54321)
        assert isinstance(library.load(), ctypes.CDLL)
        assert list(tmp_path.iterdir()) == []

    def test_who_may_be_anybody_keeps_and_takes_nothing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        library.load()
        [kept] = (tmp_path / "detcoll" / "router").iterdir()
        kept.write_bytes(b"of somebody else without a number here")
        overflow = tmp_path / "overflowuid"
        overflow.write_text(f"{os.geteuid()}\n")
        monkeypatch.setattr(library, "_OVERFLOW_USER", overflow)
        assert isinstance(library.load(), ctypes.CDLL)
        assert kept.read_bytes().startswith(b"of somebody")

    def test_a_compiler_that_takes_too_long_ends(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CC", str(slow_compiler(tmp_path)))
        monkeypatch.setattr(library, "_PATIENCE_S", 0.01)
        started: list[int] = []

        def popen(*given: Any, **named: Any) -> Any:
            made = subprocess.Popen(*given, **named)
            started.append(made.pid)
            return made

        monkeypatch.setattr(library, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
        with pytest.raises(NotCompiled, match="took more than 0 s"):
            library.load()
        await_gone(processes_of_group(started[0]))
        assert list((tmp_path / "detcoll" / "router").iterdir()) == []

    def test_killed_while_it_compiles_it_leaves_nothing(self, tmp_path: Path) -> None:
        loading = "from detcoll.emulation.lab.native import library; library.load()"
        environ = os.environ | {"CC": str(slow_compiler(tmp_path)), "XDG_CACHE_HOME": str(tmp_path)}
        process = subprocess.Popen([sys.executable, "-c", loading], env=environ)
        with open(tmp_path / "held") as held:
            group = int(held.readline())
            [made] = (tmp_path / "detcoll" / "router").iterdir()
            assert [path.name for path in made.iterdir()] == ["cc.s"]
            running = processes_of_group(group)
            process.kill()
            process.wait()
            assert held.read() == "", "the last that holds it open has ended"
        await_gone(running)
        assert len(running) >= 4, "the guard, who started it, the compiler and its child"
        assert list((tmp_path / "detcoll" / "router").iterdir()) == []

    @pytest.mark.parametrize(
        ("compiler", "reason"),
        [
            ("no-compiler -O3", "there is no C compiler 'no-compiler -O3'"),
            (" ", "there is no C compiler ' '"),
            ("'cc", "no command"),
            ("false", "^false .*failed"),
        ],
    )
    def test_without_a_compiler_it_says_so(self, compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(NotCompiled, match=reason):
            library.load()


@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
class TestLab:
    @pytest.mark.parametrize(
        ("asked", "is_compiled"), [("python", False), pytest.param("compiled", True, marks=needs_compiler)]
    )
    def test_either_router_carries_a_stream(
        self, asked: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DETCOLL_ROUTER", asked)
        with Lab(Topology.uniform(2, 1, 12.5e6, MS), Conditions(loss=0.001, seed=3)) as lab:
            seen = blast(lab, 20, 3_000_000)
        assert (seen["checksum_errors"], seen["header_errors"]) == (0, 0)
        assert seen["seen"][-1][1] >= 3_000_000
        told = lab.statistics()
        assert told.is_compiled is is_compiled
        assert told.refused == 0
        assert told.direction(0, 1).payload_bytes >= 3_000_000
        assert told.direction(0, 1).lost_segments > 0

    @needs_compiler
    def test_without_a_compiler_python_does_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CC", "no-compiler")
        with Lab(Topology.uniform(2, 1, 12.5e6, MS)) as lab:
            assert lab.statistics().is_compiled is False
        monkeypatch.setenv("DETCOLL_ROUTER", "compiled")
        with pytest.raises(DetcollError, match="DETCOLL_ROUTER=compiled is not possible here: there is no C compiler"):
            Lab(Topology.uniform(2, 1, 12.5e6, MS))

    def test_a_router_that_nobody_knows_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DETCOLL_ROUTER", "fast")
        with pytest.raises(DetcollError, match="DETCOLL_ROUTER='fast' must be compiled or python"):
            Lab(Topology.uniform(2, 1, 12.5e6, MS))
