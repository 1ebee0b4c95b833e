"""The calls of NCCL's library, against one in C that notes their names and arguments."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from compiled import COMPILER, compiled

from detcoll.device import DeviceBuffer, Segment, nccl, shares
from detcoll.device.nccl import Nccl, Part
from detcoll.errors import TransportError, TransportUnavailable, UsageError

SOURCE = Path(__file__).with_name("fake_nccl.c")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler for the fake libnccl")

# All of them need more than 32 bits, and the device's addresses more than 63.
SOURCE_AT, TARGET_AT, STREAM, COMM = 0xDEAD_BEEF_0000_1000, 0xDEAD_BEEF_0000_2000, 0x5000_0000_0010, "0x700000001234"
ELEMS = 2**33 + 5
WHERE = f"{SOURCE_AT:#x}, {TARGET_AT:#x}, {ELEMS}"
BEHIND = f"{COMM}, {STREAM:#x}"


class Fake:
    """The library of C, as the test sees it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.fake_log.restype = ctypes.c_char_p

    def calls(self) -> list[str]:
        """What was called since the last look."""
        said: list[str] = self._library.fake_log().decode().splitlines()
        self._library.fake_clear()
        return said

    def fail(self, name: str, code: int) -> None:
        self._library.fake_fail(name.encode(), code)

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self._library, f"fake_{name}").value = value


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(SOURCE, tmp_path_factory.mktemp("fake") / "libnccl.so.2")


@pytest.fixture
def fake(path: Path) -> Fake:
    fake = Fake(path)
    fake.set("version", 22809)
    fake.set("state", 0)
    fake.fail("", 0)
    fake.calls()
    return fake


@needs_compiler
@pytest.mark.parametrize(
    ("part", "said"),
    [
        (("reduce_scatter", "bfloat16", "sum"), f"ncclReduceScatter({WHERE}, type 9, op 0, {BEHIND})"),
        (("all_reduce", "uint64", "min"), f"ncclAllReduce({WHERE}, type 5, op 3, {BEHIND})"),
        (("reduce", "int8", "max"), f"ncclReduce({WHERE}, type 0, op 2, root 0, {BEHIND})"),
        (("all_gather", "float64", "prod"), f"ncclAllGather({WHERE}, type 8, {BEHIND})"),
        (("broadcast", "float16", "prod"), f"ncclBroadcast({WHERE}, type 6, root 0, {BEHIND})"),
    ],
)
def test_calls_reach_the_library_with_their_arguments(fake: Fake, part: tuple[str, str, str], said: str) -> None:
    call, dtype, op = part
    library = Nccl(fake.path)
    assert library.version == 22809
    clique = library.join(library.unique_id(), 3, 2, 0)
    assert fake.calls()[1:] == ["ncclGetUniqueId()", "ncclCommInitRankConfig(3, x0x, 2, 24 cafebeef 21400 0)"]
    clique.start([Part(call, SOURCE_AT, TARGET_AT, ELEMS, dtype, op)] * 2, STREAM)
    assert fake.calls() == ["ncclGroupStart()", said, said, "ncclGroupEnd()"]
    fake.set("state", 7)
    assert not clique.is_settled()
    fake.set("state", 0)
    assert clique.is_settled()
    clique.abort()
    assert fake.calls()[-1] == f"ncclCommAbort({COMM})"


@needs_compiler
def test_what_is_in_progress_is_no_failure(fake: Fake) -> None:
    for name in ("ncclCommInitRankConfig", "ncclGroupEnd", "ncclCommAbort"):
        fake.fail(name, 7)
        library = Nccl(fake.path)
        clique = library.join(library.unique_id(), 2, 0, 0)
        clique.start([Part("all_reduce", SOURCE_AT, SOURCE_AT, 3, "int8")], STREAM)
        clique.abort()


@needs_compiler
def test_errors_are_told_in_the_words_of_nccl(fake: Fake) -> None:
    library = Nccl(fake.path)
    clique = library.join(library.unique_id(), 2, 0, 0)
    fake.set("state", 6)
    with pytest.raises(TransportError, match=r"NCCL failed with remote error \(6\): as the test asked"):
        clique.is_settled()
    fake.fail("ncclAllReduce", 3)
    fake.calls()
    with pytest.raises(TransportError, match=r"ncclAllReduce failed with no description \(3\)$"):
        clique.start([Part("all_reduce", SOURCE_AT, SOURCE_AT, 3, "int8")], STREAM)
    assert fake.calls()[-1] == "ncclGroupEnd()", "the group stays open for the thread's next calls"


@needs_compiler
def test_what_cannot_be_used_is_said(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(TransportUnavailable, match="nothing there"):
        Nccl(str(tmp_path / "nothing there"))
    fake.set("version", 21306)
    with pytest.raises(TransportUnavailable, match="is NCCL 21306; expected 21400 or newer"):
        Nccl(fake.path)


def test_the_library_that_is_loaded_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "nvidia" / "nccl" / "lib" / nccl.LIBRARY
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    maps = "7f00-7f10 r-xp 0000 00:00 1  /usr/lib/libc.so.6\n7f20-7f30 r-xp 0 00:00 2 /opt/a b/libnccl.so.2.28.9\n"
    assert list(nccl._places(maps)) == ["/opt/a b/libnccl.so.2.28.9", str(wheel), nccl.LIBRARY]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_apart_and_together_are_all(size: int) -> None:
    buffer = DeviceBuffer((Segment(0, 11, 1000), Segment(11, 1, 5000), Segment(12, 30, 7000)), 0, None, 8)
    parts = [shares.share_of(buffer, size, place) for place in range(size)]
    held = sorted(
        segment.address + at * 8 for part in parts for segment in part.segments for at in range(segment.elems)
    )
    assert held == sorted(segment.address + at * 8 for segment in buffer.segments for at in range(segment.elems))
    for part in parts:
        assert [segment.first for segment in part.segments] == [
            sum(segment.elems for segment in part.segments[:at]) for at in range(len(part.segments))
        ]
        assert part.elems == sum(segment.elems for segment in part.segments)


def test_launches_in_the_order_of_the_program_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    with pytest.raises(UsageError, match="NCCL_LAUNCH_ORDER_IMPLICIT='1' with DETCOLL_NCCL: expected 0 or none"):
        nccl.load()
