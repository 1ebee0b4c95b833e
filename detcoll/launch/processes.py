"""Start processes that never outlive their launcher, and supervise them together.

Three mechanisms together ensure that no process is left behind, whichever dies first:

- Each process leads its own process group, so that its children are ended with it.
- It asks the kernel to kill it when the launcher dies (``PR_SET_PDEATHSIG``). A small wrapper program sets that and
  then executes the real one, because running Python between fork and exec is not safe in a process with threads.
- A guard process reads a pipe from the launcher. If the pipe ends without a goodbye, the launcher was killed, and the
  guard kills all process groups, including grandchildren.

`supervise` reaps a process only after it has ended its group: the pid of a zombie is not reused, so a signal to the
group cannot reach an unrelated process.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import IO, Any

from detcoll.errors import DetcollError

TIMED_OUT = 124
"""The exit code of `supervise` at its deadline, the same as that of timeout(1)."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_EXEC = """
import ctypes, os, sys
parent, program = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)
if os.getppid() != parent:
    os._exit(137)
try:
    os.execvp(program[0], program)
except OSError as error:
    sys.stderr.write("detcoll: cannot run %s: %s\\n" % (program[0], error.strerror))
    sys.stderr.flush()
    os._exit(126 if isinstance(error, PermissionError) else 127)
"""

_GUARD = """
import os, sys
groups = []
for line in sys.stdin:
    if line == "done\\n":
        os._exit(0)
    groups.append(int(line))
for group in groups:
    try:
        os.killpg(group, 9)
    except OSError:
        pass
"""


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``argv`` in its own process group; the kernel kills it when this process dies.

    The kernel kills it when the calling *thread* ends, so call this from a thread that lasts as long as the process.

    Parameters
    ----------
    argv : sequence of str
        Program and arguments; the program is searched in PATH. If it cannot be run, the process exits with 126 or 127.
    env, cwd, pass_fds, stdin, stdout, stderr
        As for `subprocess.Popen`, but standard input is empty by default.
    """
    wrapper = [sys.executable, "-I", "-S", "-c", _EXEC, str(os.getpid())]
    return subprocess.Popen(
        [*wrapper, *argv],
        env=env, cwd=cwd, pass_fds=pass_fds, stdin=stdin, stdout=stdout, stderr=stderr, process_group=0,
    )  # fmt: skip


class Guard:
    """Context manager with a process that kills all watched process groups if this process dies.

    On a normal exit of the context the guard ends and processes that still run are left alone; on an exception it kills
    them.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, text=True,
        )  # fmt: skip

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Watch the process group that ``process`` leads."""
        self._tell(str(process.pid))

    def close(self) -> None:
        """End the guard without killing anything. Idempotent."""
        self._end(goodbye=True)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end(goodbye=error is None)

    def _end(self, *, goodbye: bool) -> None:
        if self._process.returncode is None:
            if goodbye:
                self._tell("done")
            with contextlib.suppress(OSError):
                self._stdin.close()
            self._process.wait()

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the guard was killed; PR_SET_PDEATHSIG still works
            self._stdin.write(f"{line}\n")
            self._stdin.flush()


SETTLE_S = 3.0
"""Time for the other ranks after a failure: a rank that loses a peer waits up to a second for the reason, and then
writes its flight record."""


def supervise(
    processes: Sequence[subprocess.Popen[bytes]],
    *,
    names: Sequence[str] | None = None,
    deadline_s: float | None = None,
    settle_s: float = SETTLE_S,
    grace_s: float = 5.0,
    announce: Callable[[str], None] | None = None,
    announce_exit: Callable[[str, int], None] | None = None,
    on_interrupt: int = signal.SIGINT,
    essential: Mapping[int, str] | None = None,
) -> int:
    """Wait for ``processes``; when one fails, end the others.

    In the main thread, it forwards the first SIGINT, SIGTERM or SIGHUP of this process to all of them, also while they
    are being ended; a second signal kills them. When it returns or raises, no process of their groups is left.

    Parameters
    ----------
    processes : sequence of Popen
        Preferably from `start`: if a process leads a process group, its whole group is signalled.
    names : sequence of str, optional
        Their names in messages; by default ``rank 0``, ``rank 1``, ...
    deadline_s : float, optional
        End all processes after this many seconds.
    settle_s : float
        Seconds from a failure to SIGTERM, in which the other processes may detect and report it.
    grace_s : float
        Seconds from SIGTERM, or a forwarded signal, to SIGKILL; the earlier of the two counts.
    announce : callable, optional
        Called with each message; by default messages go to standard error.
    announce_exit : callable, optional
        Called instead of ``announce`` where a process exited with code 1, as Python does; also gets its number.
    on_interrupt : int
        The signal to forward for SIGINT. SIGTERM ends Python programs without a traceback.
    essential : mapping, optional
        Pids of other processes that these depend on, each with the text of the error to raise when it ends.

    Returns
    -------
    int
        0 if all succeeded, else what came first: `exit_code` of a process that failed, 128 + n for a forwarded signal
        n, or `TIMED_OUT` for the deadline.

    Raises
    ------
    DetcollError
        If an essential process has ended.
    """
    crew = _Crew(processes, names or [f"rank {i}" for i in range(len(processes))], announce or _say)
    crew.on_interrupt, crew.announce_exit = on_interrupt, announce_exit or crew.announce_exit
    crew.settle_ns, crew.grace_ns = round(settle_s * 1e9), round(grace_s * 1e9)
    if deadline_s is not None:
        crew.deadline_ns = time.monotonic_ns() + round(deadline_s * 1e9)
    try:
        with _signals() as received:
            crew.watch(received, essential or {})
    finally:
        crew.clear()
    return crew.code or 0


def exit_code(returncode: int) -> int:
    """Return a Popen return code as the exit code of a shell: 128 + n if signal n ended the process."""
    return 128 - returncode if returncode < 0 else returncode


def describe_exit(returncode: int) -> str:
    """Return a phrase that says how a process ended."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was ended by {name}"


def _say(message: str) -> None:
    print(f"detcoll: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that context managers end their processes and clean up."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    with _handled(leave, (signal.SIGTERM, signal.SIGHUP)):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Install ``handler`` for these signals inside the context."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """Yield a pipe descriptor from which the numbers of received signals can be read, one byte each."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def receive(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writing, bytes([number]))

    handled = _FORWARDED if threading.current_thread() is threading.main_thread() else ()
    try:
        with _handled(receive, handled):
            yield reading
    finally:
        os.close(reading)
        os.close(writing)


class _Crew:
    """The state of one call of `supervise`."""

    def __init__(
        self, processes: Sequence[subprocess.Popen[bytes]], names: Sequence[str], announce: Callable[[str], None]
    ) -> None:
        self.processes, self.names, self.announce = list(processes), list(names), announce
        self.announce_exit: Callable[[str, int], None] = lambda message, _: announce(message)
        self.running = set(range(len(self.processes)))
        self.code: int | None = None
        self.is_signalled = self.is_settling = False
        self.kill_ns = 2**63
        self.settle_ns = self.grace_ns = 0
        self.on_interrupt: int = signal.SIGINT
        self.deadline_ns: int | None = None
        self.ahead: deque[tuple[int, int | None]] = deque()  # (time, signal to send); None as the signal: stop waiting

    def watch(self, received: int, essential: Mapping[int, str]) -> None:
        """Wait until no process is running; end them after a failure, a signal or the deadline."""
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as opened:
            selector.register(received, selectors.EVENT_READ, None)
            for pid, why in essential.items():
                descriptor = os.pidfd_open(pid)
                opened.callback(os.close, descriptor)
                selector.register(descriptor, selectors.EVENT_READ, why)
            for index, process in enumerate(self.processes):
                if process.returncode is None:
                    descriptor = os.pidfd_open(process.pid)
                    opened.callback(os.close, descriptor)
                    selector.register(descriptor, selectors.EVENT_READ, index)
                else:
                    self._ended([(index, process.returncode)])
            while self.running:
                keys = [key for key, _ in selector.select(self._wait_s())]
                if missing := [key.data for key in keys if isinstance(key.data, str)]:
                    raise DetcollError(missing[0])
                self._on_signals(received, [key for key in keys if key.data is None])
                gone = [key for key in keys if key.data is not None]
                for key in gone:
                    selector.unregister(key.fileobj)
                self._ended([(key.data, _peek(self.processes[key.data])) for key in gone])
                self._on_time(time.monotonic_ns())

    def clear(self) -> None:
        """Kill the remaining members of every group, then reap."""
        for process in self.processes:
            _signal_group(process, signal.SIGKILL)
        for index, process in enumerate(self.processes):
            try:
                process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                self.announce(f"{self.names[index]} (pid {process.pid}) did not end within 2 s of SIGKILL")

    def _wait_s(self) -> float | None:
        times = [at_ns for at_ns, _ in list(self.ahead)[:1]]
        if self.deadline_ns is not None:
            times.append(self.deadline_ns)
        return max(0.0, (min(times) - time.monotonic_ns()) / 1e9) if times else None

    def _on_signals(self, received: int, keys: Sequence[selectors.SelectorKey]) -> None:
        for number in os.read(received, 64) if keys else b"":
            self.is_settling = False
            if not self.is_signalled:
                self.is_signalled = True
                forwarded = self.on_interrupt if number == signal.SIGINT else number
                what = "forwarding it" if forwarded == number else f"ending {', '.join(self._still_running())}"
                self.announce(f"{signal.Signals(number).name} received, {what}")
                self.code = self.code or 128 + number
                self._end_with(forwarded, 0)
            else:
                self._end_with(signal.SIGKILL, 0)

    def _ended(self, exits: Sequence[tuple[int, int]]) -> None:
        """Process ended processes; the first failure determines the exit code."""
        self.running -= {index for index, _ in exits}
        # Of several failures seen together, one by a signal is the likelier cause: the others report a lost peer.
        failed = sorted((code > 0, index, code) for index, code in exits if code != 0)
        if failed and self.code is None:
            _, index, returncode = failed[0]
            self.code = exit_code(returncode)
            failure = f"first failure seen: {self.names[index]} {describe_exit(returncode)}"
            if returncode == 1:
                self.announce_exit(failure, index)
            else:
                self.announce(failure)
            self.is_settling = True
            self._end_with(signal.SIGTERM, self.settle_ns)

    def _on_time(self, now_ns: int) -> None:
        if self.deadline_ns is not None and now_ns >= self.deadline_ns:
            self.deadline_ns = None
            if self.code is None and self.running:
                self.announce(f"deadline reached; ending {', '.join(self._still_running())}")
                self.code = TIMED_OUT
                self._end_with(signal.SIGTERM, 0)
        while self.ahead and now_ns >= self.ahead[0][0]:
            _, number = self.ahead.popleft()
            if self.is_settling and self.running:
                self.announce(f"ending {', '.join(self._still_running())}")
            self.is_settling = False
            if number is None:
                self.running.clear()
            for index in self.running:
                _signal_group(self.processes[index], number)

    def _still_running(self) -> list[str]:
        return [self.names[index] for index in sorted(self.running)]

    def _end_with(self, number: int, after_ns: int) -> None:
        """Schedule the end: signal ``number`` after ``after_ns``, SIGKILL after the grace period, then stop waiting.

        A SIGKILL that was scheduled before is not postponed.
        """
        first_ns = time.monotonic_ns() + after_ns
        self.kill_ns = min(self.kill_ns, first_ns + (0 if number == signal.SIGKILL else self.grace_ns))
        ends = [(first_ns, number), (self.kill_ns, signal.SIGKILL), (self.kill_ns + 2 * 10**9, None)]
        self.ahead = deque(sorted(ends, key=lambda end: end[0]))


def _peek(process: subprocess.Popen[bytes]) -> int:
    """Return the return code of an ended process without reaping it."""
    try:
        seen = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:  # already reaped elsewhere
        return process.poll() or 0
    assert seen is not None
    return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status


def _signal_group(process: subprocess.Popen[bytes], number: int | None) -> None:
    """Signal the group that ``process`` leads, or the process alone if it leads none; do nothing once it is reaped."""
    if number is None or process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
