"""The calls of CUDA's driver library, against a library in C that notes their names and arguments."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compiled import COMPILER, compiled

from detcoll.device import Cuda, MemoryType
from detcoll.device import cuda as room
from detcoll.errors import DeviceError, TransportUnavailable

SOURCE = Path(__file__).with_name("fake_cuda.c")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler for the fake libcuda")

# All of them need more than 32 bits, and the device's address more than 63.
HOST, DEVICE, STREAM, EVENT = 0x7F12_3456_7890, 0xDEAD_BEEF_0000_1234, 0x5000_0000_0010, 0x6000_0000_0020
NBYTES = 2**33 + 5

ENTER = ["cuCtxPushCurrent_v2(0x700000001029)", "cuThreadExchangeStreamCaptureMode(1)"]
LEAVE = ["cuThreadExchangeStreamCaptureMode(0)", "cuCtxPopCurrent_v2()"]


class Fake:
    """The library of C, as the test sees it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.fake_log.restype = ctypes.c_char_p
        self.clear()
        self.set("depth", 0)

    def lines(self) -> list[str]:
        """What was called since `clear`; with "locked" where Python's lock was kept."""
        return self._library.fake_log().decode().splitlines()

    def calls(self) -> list[str]:
        return [line.removeprefix("locked ") for line in self.lines()]

    def clear(self) -> None:
        self._library.fake_clear()

    def fail(self, name: str, code: int) -> None:
        self._library.fake_fail(name.encode(), code)

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self._library, f"fake_{name}").value = value

    def get(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._library, f"fake_{name}").value


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(SOURCE, tmp_path_factory.mktemp("fake") / "libcuda.so.1")


@pytest.fixture
def fake(path: Path) -> Iterator[Fake]:
    fake = Fake(path)
    for name, value in (("active", 1), ("status", 0), ("mode", 0), ("pointer", 0)):
        fake.set(name, value)
    yield fake
    assert fake.get("depth") == 0, "a context is still current"
    assert fake.get("mode") == 0, "the mode of captures is not what it was"


@pytest.fixture
def cuda(fake: Fake) -> Cuda:
    cuda = Cuda(fake.path)
    with cuda.on(1):
        pass
    fake.clear()
    return cuda


CALLS: list[tuple[Callable[[Cuda], object], str]] = [
    (lambda cuda: cuda.destroy_stream(STREAM), "cuStreamDestroy_v2(0x500000000010)"),
    (lambda cuda: cuda.capturing(STREAM), "cuStreamIsCapturing(0x500000000010)"),
    (lambda cuda: cuda.capturing(0), "cuStreamIsCapturing((nil))"),
    (lambda cuda: cuda.capturing(2), "cuStreamIsCapturing(0x2)"),
    (lambda cuda: cuda.is_idle(STREAM), "cuStreamQuery(0x500000000010)"),
    (lambda cuda: cuda.destroy_event(EVENT), "cuEventDestroy_v2(0x600000000020)"),
    (lambda cuda: cuda.record(EVENT, STREAM), "cuEventRecord(0x600000000020, 0x500000000010)"),
    (lambda cuda: cuda.is_past(EVENT), "cuEventQuery(0x600000000020)"),
    (lambda cuda: cuda.wait_for(EVENT), "cuEventSynchronize(0x600000000020)"),
    (lambda cuda: cuda.order(STREAM, EVENT), "cuStreamWaitEvent(0x500000000010, 0x600000000020, 0)"),
    (
        lambda cuda: cuda.to_host(HOST, DEVICE, NBYTES, STREAM),
        "cuMemcpyDtoHAsync_v2(0x7f1234567890, 0xdeadbeef00001234, 8589934597, 0x500000000010)",
    ),
    (
        lambda cuda: cuda.to_device(DEVICE, HOST, NBYTES, STREAM),
        "cuMemcpyHtoDAsync_v2(0xdeadbeef00001234, 0x7f1234567890, 8589934597, 0x500000000010)",
    ),
    (
        lambda cuda: cuda.to_device(DEVICE, HOST, 16384, STREAM),
        "cuMemcpy2DAsync_v2(1 0x7f1234567890 8192 to 2 0xdeadbeef00001234 8192: 8192 x 2, 0x500000000010)",
    ),
    (
        lambda cuda: cuda.to_device(DEVICE, HOST, 65535, STREAM),
        "cuMemcpyHtoDAsync_v2(0xdeadbeef00001234, 0x7f1234567890, 65535, 0x500000000010)",
    ),
    (
        lambda cuda: cuda.to_device(DEVICE, HOST, 65536, STREAM),
        "cuMemcpyHtoDAsync_v2(0xdeadbeef00001234, 0x7f1234567890, 65536, 0x500000000010)",
    ),
    (lambda cuda: cuda.register(HOST, NBYTES), "cuMemHostRegister_v2(0x7f1234567890, 8589934597, 1)"),
    (lambda cuda: cuda.unregister(HOST), "cuMemHostUnregister(0x7f1234567890)"),
    (lambda cuda: cuda.device_of(DEVICE), "cuPointerGetAttribute(9, 0xdeadbeef00001234)"),
    (lambda cuda: cuda.memory_type(DEVICE), "cuPointerGetAttribute(2, 0xdeadbeef00001234)"),
]


@pytest.mark.parametrize(("call", "noted"), CALLS, ids=[noted for _, noted in CALLS])
def test_a_call_arrives_with_all_bits_of_its_arguments(
    fake: Fake, cuda: Cuda, call: Callable[[Cuda], object], noted: str
) -> None:
    with cuda.on(1):
        fake.clear()
        call(cuda)
        assert fake.lines() == [noted], "a call that may take long must not keep Python's lock"


@pytest.mark.parametrize(("call", "noted"), CALLS, ids=[noted for _, noted in CALLS])
def test_a_call_that_fails_raises_what_the_driver_says(
    fake: Fake, cuda: Cuda, call: Callable[[Cuda], object], noted: str
) -> None:
    name = noted.partition("(")[0]
    with cuda.on(1):
        fake.fail(name, 400)
        with pytest.raises(DeviceError) as raised:
            call(cuda)
    error = raised.value
    assert (error.call, error.code, error.name, error.text) == (name, 400, "CUDA_ERROR_FAKE", "as the test asked")
    assert str(error) == f"{name} failed with CUDA_ERROR_FAKE (400): as the test asked"


def test_streams_and_events_are_made_on_their_device(fake: Fake, cuda: Cuda) -> None:
    assert cuda.stream(1) == 0x7000_0000_2000
    assert fake.calls() == [*ENTER, "cuStreamCreate(1)", *LEAVE]
    fake.clear()
    assert cuda.event(1) == 0x7000_0000_3000
    assert fake.calls() == [*ENTER, "cuEventCreate(2)", *LEAVE]


def test_memory_is_allocated_on_its_device(fake: Fake, cuda: Cuda) -> None:
    assert cuda.allocate(1, NBYTES) == 0xDEAD_BEEF_0000_5678
    assert fake.calls() == [*ENTER, f"cuMemAlloc_v2({NBYTES})", *LEAVE]


def test_events_that_are_given_back_are_used_again(fake: Fake, cuda: Cuda) -> None:
    event = cuda.take_event(1)
    cuda.give_event(1, event)
    fake.clear()
    assert cuda.take_event(1) == event
    assert fake.calls() == []
    assert "cuEventCreate(2)" in (cuda.take_event(1), fake.calls())[1]


def test_a_context_is_retained_once_and_popped_whatever_happens(fake: Fake) -> None:
    cuda = Cuda(fake.path)
    fake.clear()
    with cuda.on(1):
        assert fake.get("mode") == 1, "graphs that other threads capture would forbid calls"
        fake.clear()
        with pytest.raises(ZeroDivisionError), cuda.on(2):
            raise ZeroDivisionError
        assert fake.calls() == [
            "cuDeviceGet(2)", "cuDevicePrimaryCtxGetState(42)", "cuDevicePrimaryCtxRetain(42)",
            "cuCtxPushCurrent_v2(0x70000000102a)", "cuThreadExchangeStreamCaptureMode(1)",
            "cuThreadExchangeStreamCaptureMode(1)", "cuCtxPopCurrent_v2()",
        ]  # fmt: skip
        fake.clear()
    assert fake.lines() == [f"locked {call}" for call in LEAVE]
    fake.clear()
    with cuda.on(1):
        assert fake.lines() == [f"locked {call}" for call in ENTER]


def test_a_device_that_is_current_is_not_made_so_again(fake: Fake, cuda: Cuda) -> None:
    with cuda.on(1):
        fake.clear()
        with cuda.on(1):
            pass
        thread = threading.Thread(target=lambda: cuda.on(1).__enter__())
        thread.start()
        thread.join(30)
        assert fake.calls() == [*ENTER[:1], "cuThreadExchangeStreamCaptureMode(1)"], "another thread"
        fake.set("depth", 1)
        fake.set("mode", 1)
        with cuda.on(2), cuda.on(1):
            fake.clear()
        assert fake.calls() == ["cuThreadExchangeStreamCaptureMode(1)", "cuCtxPopCurrent_v2()"] * 2
        fake.clear()
        with cuda.on(1):
            assert fake.calls() == []


def test_threads_that_come_together_retain_a_context_once(fake: Fake) -> None:
    cuda = Cuda(fake.path)
    assert cuda._retain(1) is cuda._retain(1), "both found that the context was not retained yet"
    assert fake.calls().count("cuDevicePrimaryCtxRetain(41)") == 1


def test_no_context_is_made_by_accident(fake: Fake) -> None:
    cuda = Cuda(fake.path)
    fake.set("active", 0)
    with pytest.raises(DeviceError, match=r"\(201\): this process does not use cuda:1 yet"), cuda.on(1):
        pass
    assert not any("Retain" in call or "Push" in call for call in fake.calls())
    fake.set("active", 1)
    with cuda.on(1):
        pass


@pytest.mark.parametrize("name", ["cuCtxPushCurrent_v2", "cuThreadExchangeStreamCaptureMode"])
def test_a_device_that_cannot_be_entered_is_left(fake: Fake, cuda: Cuda, name: str) -> None:
    fake.fail(name, 709)
    with pytest.raises(DeviceError, match=name), cuda.on(1):
        pytest.fail("entered")


def test_what_is_expected_is_no_error(fake: Fake, cuda: Cuda) -> None:
    with cuda.on(1):
        assert cuda.is_past(EVENT)
        fake.fail("cuEventQuery", 600)
        assert not cuda.is_past(EVENT)
        assert cuda.is_idle(STREAM)
        fake.fail("cuStreamQuery", 600)
        assert not cuda.is_idle(STREAM)
        assert not cuda.capturing(STREAM)
        fake.fail("cuStreamIsCapturing", 906)
        assert cuda.capturing(0)
        for status in (1, 2):
            fake.set("status", status)
            assert cuda.capturing(STREAM)
        fake.fail("cuPointerGetAttribute", 1)
        assert cuda.memory_type(HOST) is MemoryType.UNKNOWN
    for code in (3, 4, 201, 709):
        with cuda.on(1):
            for release, name in (
                (cuda.destroy_stream, "cuStreamDestroy_v2"),
                (cuda.destroy_event, "cuEventDestroy_v2"),
                (cuda.unregister, "cuMemHostUnregister"),
            ):
                fake.fail(name, code)
                release(HOST)
            fake.fail("cuCtxPopCurrent_v2", code)
        fake.set("depth", 0)


def test_pointers_and_devices_tell_about_themselves(fake: Fake, cuda: Cuda) -> None:
    fake.set("pointer", 2)
    assert cuda.device_of(DEVICE) == 2
    assert cuda.memory_type(DEVICE) is MemoryType.DEVICE
    assert (cuda.version(), cuda.count()) == ((12, 4), 3)
    fake.clear()
    assert cuda.pci_bus_id(1) == "0096:85:86.0"
    assert fake.calls()[1::2] == [f"cuDeviceGetAttribute({number}, 41)" for number in (50, 33, 34)]
    assert cuda.copy_engines(2) == 140
    assert fake.calls()[-1] == "cuDeviceGetAttribute(40, 42)"


def test_devices_tell_whose_memory_they_reach(fake: Fake, cuda: Cuda) -> None:
    assert (cuda.reaches(0, 2), cuda.reaches(2, 0)) == (True, False)
    assert fake.calls()[-1] == "cuDeviceCanAccessPeer(42, 40)"


def test_a_code_that_the_driver_does_not_know_is_told(fake: Fake, cuda: Cuda) -> None:
    fake.fail("cuDriverGetVersion", 999)
    with pytest.raises(DeviceError, match=r"an unknown error \(999\): no description"):
        cuda.version()


def test_errors_say_whether_the_device_is_of_use_and_can_be_pickled() -> None:
    for code, is_sticky in ((700, True), (719, True), (4, True), (1, False), (2, False), (600, False)):
        error = DeviceError("cuEventQuery", code, "A", "b")
        assert error.is_sticky is is_sticky
        assert str(pickle.loads(pickle.dumps(error))) == f"cuEventQuery failed with A ({code}): b"


def test_a_driver_that_is_not_there_or_too_old_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "libcuda.so.1")
    with pytest.raises(TransportUnavailable, match=rf"driver library {re.escape(missing)}"):
        Cuda(missing)
    old = tmp_path / "libold.so"
    source = tmp_path / "old.c"
    source.write_text("int cuInit(unsigned flags) { return 0; }")
    assert COMPILER is not None
    subprocess.run([COMPILER, "-fPIC", "-shared", "-o", old, source], check=True)
    with pytest.raises(TransportUnavailable, match=r"of CUDA 11 or newer: .*undefined symbol: cu"):
        Cuda(str(old))


def test_a_forked_process_is_told_where_another_library_used_cuda_before(fake: Fake) -> None:
    fake.fail("cuInit", 3)
    with pytest.raises(DeviceError, match="CUDA cannot be used in a forked process"):
        Cuda(fake.path)
    fake.fail("cuInit", 100)
    with pytest.raises(DeviceError, match=r"cuInit failed with CUDA_ERROR_FAKE \(100\)"):
        Cuda(fake.path)


FORKING = """
import os, sys
from detcoll.device import cuda as room
from detcoll.errors import DeviceError

room.LIBRARY = sys.argv[1]
cuda = room.driver()
assert room.driver() is cuda
with cuda.on(1):
    pass
room._making.acquire()
cuda._retaining.acquire()
child = os.fork()
if child == 0:
    assert room.driver() is cuda
    for device in (1, 2):
        try:
            with cuda.on(device):
                print("entered")
        except DeviceError as error:
            print(error.code, error.text)
    cuda.destroy_stream(8)
    cuda.unregister(8)
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
room._making.release()
cuda._retaining.release()
with cuda.on(2):
    print("the parent goes on")
"""


def run(program: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_forked_child_raises_and_its_parent_goes_on(path: Path) -> None:
    said = "3 CUDA cannot be used in a forked process; start processes by spawn"
    assert run(FORKING, str(path)) == [said, said, "the parent goes on"]


IMPORTING = """
import ctypes, sys

class Noting(ctypes.CDLL):
    def __init__(self, name, *arguments, **options):
        print(name)
        super().__init__(name, *arguments, **options)

ctypes.CDLL = ctypes.PyDLL = Noting
import detcoll, detcoll.device
print(*{"torch", "cupy"} & set(sys.modules))
"""


def test_an_import_loads_nothing_of_cuda() -> None:
    assert not [line for line in run(IMPORTING) if re.search("cu(da|py)|torch", line)]
    assert room._driver is None
