"""What threads ask of the scheduler, and that they get what they had before."""

from __future__ import annotations

import os
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

    asked, kind, nice = in_a_thread(ask)
    assert isinstance(asked, bool)
    assert (kind, nice) == (os.SCHED_OTHER, 3)


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
