"""The clock of this host: which processes share it, and whether the host was suspended."""

from __future__ import annotations

import subprocess
import sys
import time

from detcoll.clock import SuspendDetector, clock_domain

S = 10**9


def test_a_suspend_is_noticed_and_a_lost_processor_is_not():
    detector = SuspendDetector()
    boot_ahead = 5 * S  # suspended before we began
    assert detector.update(0, 50 + boot_ahead, 100) == 0, "the first reading is loose"
    assert detector.update(100, 100 + boot_ahead, 100) == 0
    assert detector.update(150, 170 + boot_ahead, 150) == 20, "less than the first reading was loose"
    boot_ahead += 20
    assert detector.update(200, 200 + boot_ahead, 200 + 3 * S) == 0, "lost the processor after the boot-time clock"
    assert detector.update(4 * S, 4 * S + 9 + boot_ahead, 4 * S + 20) == 0
    assert detector.update(5 * S, 5 * S + 2 * S + boot_ahead, 5 * S) == 2 * S
    assert detector.update(6 * S, 6 * S + 2 * S + boot_ahead, 6 * S) == 0, "told once"
    assert detector.update(7 * S, 7 * S + 3 * S + boot_ahead, 7 * S) == S


def test_the_real_clocks_of_this_host_show_no_suspend():
    detector = SuspendDetector()
    for _ in range(100):
        before_ns = time.monotonic_ns()
        boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        assert detector.update(before_ns, boottime_ns, time.monotonic_ns()) == 0


def fake_proc(tmp_path, offsets: str | None = "monotonic 3 4\nboottime 0 0\n", children: str = "time:[1]"):
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("b00t\n")
    (tmp_path / "self/ns").mkdir(parents=True)
    if offsets is not None:
        (tmp_path / "self/ns/time").symlink_to("time:[1]")
        (tmp_path / "self/ns/time_for_children").symlink_to(children)
        (tmp_path / "self/timens_offsets").write_text(offsets)
    return tmp_path


def test_a_clock_domain_is_boot_and_offset(tmp_path):
    assert clock_domain(fake_proc(tmp_path)) == "b00t 3 4"


def test_a_clock_domain_without_time_namespaces_is_the_boot(tmp_path):
    assert clock_domain(fake_proc(tmp_path, offsets=None)) == "b00t 0 0"


def test_offsets_of_children_to_come_are_not_this_process_own(tmp_path):
    assert clock_domain(fake_proc(tmp_path, children="time:[2]")) == "b00t time:[1]"


def test_an_unknown_boot_equals_no_other(tmp_path):
    assert clock_domain(tmp_path) != clock_domain(tmp_path)


def test_processes_of_one_host_share_a_clock_domain():
    code = "from detcoll.clock import clock_domain; print(clock_domain())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == clock_domain() == clock_domain()
