"""What threads ask of the scheduler, and that they get what they had before."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from detcoll.errors import DeadlineMissed
from detcoll.priority import (
    SWITCH_INTERVAL_S,
    make_prompt,
    prompt_threads,
    quick_switches,
    short_turns,
    shorten_turns,
)  # fmt: skip
from detcoll.runtime import work

Result = TypeVar("Result")


def in_a_thread(action: Callable[[], Result]) -> Result:
    """Run ``action`` in a thread of its own, whose priority is nobody else's."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    thread.join()
    return results[0]


def slice_of_this_thread() -> int:
    told = ctypes.create_string_buffer(56)
    ctypes.CDLL(None).syscall(315, 0, told, len(told), 0)
    slice_ns: int = struct.unpack_from("Q", told, 24)[0]
    return slice_ns


def test_short_turns_leave_class_and_niceness_alone() -> None:
    def ask() -> tuple[bool, int, int]:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)
        asked = shorten_turns()
        return asked, os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    _, kind, nice = in_a_thread(ask)
    assert (kind, nice) == (os.SCHED_OTHER, 3)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of sched_getattr is that of x86-64")
def test_short_turns_are_what_the_kernel_was_asked_for() -> None:
    asked, slice_ns = in_a_thread(lambda: (shorten_turns(), slice_of_this_thread()))
    if not asked:
        pytest.skip("this kernel takes no time slice")
    assert slice_ns in (0, 100_000)  # 0: a kernel before 6.12, which takes the call and ignores the slice


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of sched_getattr is that of x86-64")
def test_short_turns_end() -> None:
    def ask() -> tuple[int, int, int]:
        before = slice_of_this_thread()
        with short_turns():
            within = slice_of_this_thread()
        return before, within, slice_of_this_thread()

    before, within, after = in_a_thread(ask)
    assert (after, within != before) == (before, before != 0), "0: a kernel that tells no slice"


def test_who_waits_for_a_result_has_short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    monkeypatch.setattr(work, "short_turns", noted)
    under_way, ended = work.Work("ended"), work.Work("ended")
    ended.finish()
    ended.wait()
    assert not inside
    with pytest.raises(DeadlineMissed):
        under_way.wait(0.0)
    assert inside == [True, False]


def test_another_class_is_kept() -> None:
    def ask() -> tuple[bool, int]:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return shorten_turns(), os.sched_getscheduler(0)

    assert in_a_thread(ask) == (False, os.SCHED_BATCH)


@pytest.mark.parametrize("word", ["0", "off", "false", "No"])
def test_nothing_is_asked_where_that_is_not_wanted(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETCOLL_REALTIME", word)
    assert in_a_thread(lambda: (shorten_turns(), make_prompt(), os.sched_getscheduler(0))) == (
        False, False, os.SCHED_OTHER,
    )  # fmt: skip


def test_only_threads_started_inside_are_prompt() -> None:
    def start() -> tuple[int, int]:
        with prompt_threads():
            inner = in_a_thread(lambda: os.sched_getscheduler(0))
        return inner, os.sched_getscheduler(0)

    inner, outer = in_a_thread(start)
    assert outer == os.SCHED_OTHER
    assert inner == (os.SCHED_RR if in_a_thread(make_prompt) else os.SCHED_OTHER)


@pytest.mark.parametrize("usual_s", [0.005, 0.0001])
def test_the_interpreter_switches_quickly_as_long_as_anybody_wants_it(usual_s: float) -> None:
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(usual_s)
    try:
        with quick_switches():
            with quick_switches():
                pass
            assert sys.getswitchinterval() == pytest.approx(min(usual_s, SWITCH_INTERVAL_S), rel=0.02)
        assert sys.getswitchinterval() == pytest.approx(usual_s, rel=0.02)
    finally:
        sys.setswitchinterval(before_s)


def test_the_interpreter_stays_as_it_is_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETCOLL_REALTIME", "0")
    before_s = sys.getswitchinterval()
    with quick_switches():
        assert sys.getswitchinterval() == before_s
