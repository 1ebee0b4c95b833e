"""Flight records: what a rank writes when its group fails, on a signal, and when `detcoll doctor --job` asks.

A record is a JSON file (schema ``detcoll.record/1``): where this rank stands in each group, and the last events that
`detcoll.runtime.recorder` kept. `detcoll report` compares the records of all ranks.

Files go to ``DETCOLL_RECORD/JOB/recordRANK.json``; without that variable to ``$XDG_STATE_HOME/detcoll/records``, where
the folders of the last `LARGEST_KEPT_JOBS` jobs are kept; ``DETCOLL_RECORD=off`` writes none. A process also listens on
an abstract Unix socket, which leaves no file behind, and gives its record to whoever is the same user.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detcoll.rendezvous.server import peer_uid
from detcoll.runtime.recorder import RECORD_SCHEMA

log = logging.getLogger("detcoll")

LARGEST_KEPT_JOBS = 16
SIGNAL = signal.SIGUSR2
_OFF = ("0", "off", "no")
_PATIENCE_S = 5.0
_JOIN_S = 1.0


def socket_prefix() -> str:
    """Return what the names of this user's sockets begin with; the process id follows."""
    return f"detcoll-job-{os.getuid()}-"


class Flight:
    """Writes and gives away the record of one rank.

    Parameters
    ----------
    name : str
        Of the job, the same on all its ranks: the folder of its records.
    rank : int
        Of this process.
    describe : callable
        Returns the record as plain data; may be called from any thread.
    setting : str, optional
        What DETCOLL_RECORD says.
    """

    def __init__(self, name: str, rank: int, describe: Callable[[], dict[str, Any]], setting: str | None) -> None:
        self.name, self._rank, self._describe, self._pid = name, rank, describe, os.getpid()
        self._is_own = not setting
        folder = Path(setting) if setting else _default_folder()
        self._is_off = (setting or "").lower() in _OFF or folder is None
        self._folder = (folder or Path()) / name
        self._thread: threading.Thread | None = None
        self._listener = self._listen()
        self._signal_before: Any = None
        self._has_signal = self._catch_signal()

    def write(self, reason: str) -> Path | None:
        """Write the record and return its path; None where it is switched off or cannot be written.

        A forked child writes none: what it would describe is its parent's past.
        """
        if self._is_off or os.getpid() != self._pid:
            return None
        path = self._folder / f"record{self._rank}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(self.told(reason)), encoding="utf-8")
            draft.replace(path)
        except Exception as error:  # whatever it is, callers still have to hear of the failure that led here
            log.debug("rank %d: no record was written: %r", self._rank, error)
            return None
        if self._is_own:
            with contextlib.suppress(OSError):
                _forget_old(self._folder.parent)
        return path

    def told(self, reason: str) -> dict[str, Any]:
        """Return the record as plain data."""
        head = {"schema": RECORD_SCHEMA, "job": self.name, "reason": reason, "pid": os.getpid(), "at": time.time()}
        return head | self._describe()

    def close(self) -> None:
        """Give the socket and the signal back. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
            if self._thread is not None and self._pid == os.getpid():
                self._thread.join(_JOIN_S)
            listener.close()
        if self._has_signal and threading.current_thread() is threading.main_thread():
            self._has_signal = False
            if signal.getsignal(SIGNAL) == self._signalled:
                signal.signal(SIGNAL, self._signal_before)

    def _catch_signal(self) -> bool:
        """Write the record on `SIGNAL`, unless the program does something else with it."""
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(SIGNAL) != signal.SIG_DFL:
            return False
        self._signal_before = signal.signal(SIGNAL, self._signalled)
        return True

    def _signalled(self, number: int, frame: object) -> None:
        threading.Thread(target=self.write, args=("signal",), name="detcoll-record", daemon=True).start()

    def _listen(self) -> socket.socket | None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(f"\0{socket_prefix()}{os.getpid()}-{self._rank}")
            listener.listen(4)
        except OSError as error:
            log.debug("rank %d: doctor --job will not find this process: %s", self._rank, error)
            listener.close()
            return None
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="detcoll-record", daemon=True)
        self._thread.start()
        return listener

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_PATIENCE_S)
                if peer_uid(connection) in (os.getuid(), 0):
                    self.write("asked")
                    connection.sendall(json.dumps(self.told("asked")).encode())


def running() -> list[str]:
    """Return the names of the sockets of this user's ranks on this host, in this network namespace."""
    names = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(encoding="ascii", errors="replace").splitlines()[1:]:
            name = line.rsplit(" ", 1)[-1]
            if name.startswith("@" + socket_prefix()):
                names.add(name[1:])
    return sorted(names)


def ask(name: str) -> dict[str, Any] | None:
    """Return the record of the rank behind a socket of `running`, or None where it is gone or gives none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE_S)
        try:
            connection.connect("\0" + name)
            told = b"".join(iter(lambda: connection.recv(2**20), b""))
            record: dict[str, Any] = json.loads(told)
        except (OSError, ValueError):
            return None
    return record


def _default_folder() -> Path | None:
    """Return where records go unless somebody says so, or None for a user without a home, as in some containers."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        base = Path(state) if state else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "detcoll" / "records"


def _forget_old(folder: Path) -> None:
    """Remove the folders of all but the last jobs."""
    jobs = sorted((job for job in folder.iterdir() if job.is_dir()), key=lambda job: job.stat().st_mtime)
    for job in jobs[:-LARGEST_KEPT_JOBS]:
        shutil.rmtree(job, ignore_errors=True)
