"""What threads ask of the scheduler, and that they get what they had before."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from detcoll.priority import make_prompt, prompt_threads, shorten_turns

Result = TypeVar("Result")


def in_a_thread(action: Callable[[], Result]) -> Result:
    """Run ``action`` in a thread of its own, whose priority is nobody else's."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    thread.join()
    return results[0]


def test_short_turns_leave_class_and_niceness_alone() -> None:
    def ask() -> tuple[bool, int, int]:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)
        asked = shorten_turns()
        return asked, os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    _, kind, nice = in_a_thread(ask)
    assert (kind, nice) == (os.SCHED_OTHER, 3)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of sched_getattr is that of x86-64")
def test_short_turns_are_what_the_kernel_was_asked_for() -> None:
    def ask() -> tuple[bool, int]:
        asked = shorten_turns()
        told = ctypes.create_string_buffer(56)
        ctypes.CDLL(None).syscall(315, 0, told, len(told), 0)
        return asked, struct.unpack_from("Q", told, 24)[0]

    asked, slice_ns = in_a_thread(ask)
    if not asked:
        pytest.skip("this kernel takes no time slice")
    assert slice_ns in (0, 100_000)  # 0: a kernel before 6.12, which takes the call and ignores the slice


def test_another_class_is_kept() -> None:
    def ask() -> tuple[bool, int]:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return shorten_turns(), os.sched_getscheduler(0)

    assert in_a_thread(ask) == (False, os.SCHED_BATCH)


def test_nothing_is_asked_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETCOLL_REALTIME", "0")
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
