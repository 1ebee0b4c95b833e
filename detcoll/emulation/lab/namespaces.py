"""Network namespaces without names.

A namespace lives as long as a descriptor or a process holds it. Those of a lab are held by descriptors and by the
processes that run in them, so that nothing is left to sweep however the lab ends: there is no file under /run/netns.
A thread has a network namespace of its own, and a child inherits that of the thread which started it; so everything
that must happen inside a namespace runs in a short-lived thread that enters it.

With the network goes a mount namespace in which /sys shows the devices of that network: UCX, and so MPICH, looks for
its devices there. Where mounting is refused, the site does without.

Who is in a namespace is read from /proc. That finds every process of a lab, also those that left their process group
or whose parent is gone.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_CLONE_FS, _CLONE_NEWNS, _CLONE_NEWNET = 0x00000200, 0x00020000, 0x40000000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
_KILL_PATIENCE_NS = 5 * 10**9
_LOOK_AGAIN_NS = 10**8


@dataclass(frozen=True, slots=True)
class Namespace:
    """Descriptors of a network namespace and of the mount namespace that shows it; None where mounting is refused."""

    network: int
    mounts: int | None

    def close(self) -> None:
        """Let go of both; they end once no process is in them."""
        os.close(self.network)
        if self.mounts is not None:
            os.close(self.mounts)


def _call(function: str, *arguments: int | bytes | None) -> None:
    """Call a function of the C library that returns 0 or sets errno (os.setns and os.unshare came with Python 3.12)."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own and return what it returns, or raise what it raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="detcoll-lab-namespace", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def new_namespace(prepare: Callable[[], T]) -> tuple[Namespace, T]:
    """Make a network namespace, run ``prepare`` inside it, and return the namespace and what ``prepare`` returned."""

    def work() -> tuple[Namespace, T]:
        _call("unshare", _CLONE_NEWNET)
        network = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            made = Namespace(network, _mounts())
        except BaseException:
            os.close(network)
            raise
        try:
            return made, prepare()
        except BaseException:
            made.close()
            raise

    return _in_thread(work)


def _mounts() -> int | None:
    """Give the calling thread mounts of its own, with /sys of its network, and return their descriptor."""
    try:
        _call("unshare", _CLONE_NEWNS)
        # What others mount later is still to be seen here, and nothing of ours outside.
        _call("mount", b"none", b"/", None, _MS_SLAVE | _MS_REC, None)
        groups = os.open("/sys/fs/cgroup", os.O_PATH | os.O_CLOEXEC) if os.path.isdir("/sys/fs/cgroup") else None
        try:
            _call("mount", b"none", b"/sys", b"sysfs", 0, None)
            if groups is not None:
                source = f"/proc/thread-self/fd/{groups}".encode()
                with suppress(OSError):
                    _call("mount", source, b"/sys/fs/cgroup", None, _MS_BIND | _MS_REC, None)
        finally:
            if groups is not None:
                os.close(groups)
    except OSError:
        return None
    return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def run_inside(namespace: Namespace, work: Callable[[], T]) -> T:
    """Run ``work`` in the namespace; processes that it starts stay there. Its working directory is the caller's."""
    directory = os.getcwd()

    def enter_and_work() -> T:
        # A thread that shares its working directory with others may not change its mounts.
        _call("unshare", _CLONE_FS)
        _call("setns", namespace.network, _CLONE_NEWNET)
        if namespace.mounts is not None:
            _call("setns", namespace.mounts, _CLONE_NEWNS)
            os.chdir(directory)
        return work()

    return _in_thread(enter_and_work)


def processes_in(namespaces: Collection[int]) -> list[int]:
    """Return the processes, other than this one, that run in any of the namespaces (descriptors of their networks)."""
    wanted = _identities(namespaces)
    everyone = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in everyone if pid != os.getpid() and _is_in(pid, wanted)]


def _identities(namespaces: Collection[int]) -> set[tuple[int, int]]:
    return {(status.st_dev, status.st_ino) for status in map(os.fstat, namespaces)}


def _is_in(pid: int, wanted: set[tuple[int, int]]) -> bool:
    """Tell whether the process runs in one of these namespaces; False for one that has ended."""
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return False
    return (status.st_dev, status.st_ino) in wanted


def end_processes(namespaces: Collection[int], grace_ns: int) -> bool:
    """End every process in the namespaces: SIGTERM, and after ``grace_ns`` SIGKILL; False if some outlived even that.

    Processes that appear meanwhile are ended too.
    """
    now_ns = time.monotonic_ns()
    kill_ns, give_up_ns = now_ns + grace_ns, now_ns + grace_ns + _KILL_PATIENCE_NS
    told: dict[int, signal.Signals] = {}
    while (now_ns := time.monotonic_ns()) < give_up_ns:
        wanted = signal.SIGKILL if now_ns >= kill_ns else signal.SIGTERM
        running = processes_in(namespaces)
        if not running:
            return True
        handles = _handles(running, namespaces)
        try:
            for pid, handle in handles.items():
                if told.get(pid) is not wanted:
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(handle, wanted)
                    told[pid] = wanted
            # Short enough to notice what was forked meanwhile.
            edge_ns = min(kill_ns if wanted is signal.SIGTERM else give_up_ns, now_ns + _LOOK_AGAIN_NS)
            _await_exits(handles.values(), edge_ns)
        finally:
            for handle in handles.values():
                os.close(handle)
    return not processes_in(namespaces)


def _handles(pids: Collection[int], namespaces: Collection[int]) -> dict[int, int]:
    """Return descriptors of those processes that still are in one of the namespaces, by process number."""
    wanted = _identities(namespaces)
    handles = {}
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            continue
        # The number may have gone to another process since it was read; from here on the descriptor pins it.
        if _is_in(pid, wanted):
            handles[pid] = handle
        else:
            os.close(handle)
    return handles


def _await_exits(handles: Collection[int], deadline_ns: int) -> None:
    """Wait until all processes have ended or the deadline passes."""
    waiting = select.poll()
    for handle in handles:
        waiting.register(handle, select.POLLIN)
    left = len(handles)
    while left and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
        for handle, _ in waiting.poll(-(-left_ns // 10**6)):
            waiting.unregister(handle)
            left -= 1
