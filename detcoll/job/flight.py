"""Flight records: a rank writes one when its group fails, on a signal, and on request of `detcoll doctor --job`.

A record is a JSON file (schema ``detcoll.record/1``) with the state of this rank in each group and the last events of
`detcoll.runtime.recorder`. `detcoll report` compares the records of all ranks.

Files go to ``$DETCOLL_RECORD/JOB/recordRANK.json``. Without that variable the folder is
``$XDG_STATE_HOME/detcoll/records``, which keeps the last `LARGEST_KEPT_JOBS` jobs. The words of a switch
(`detcoll.quantities`) are no folders: ``DETCOLL_RECORD=off`` disables records, and ``on`` means the usual folder.

Each process also listens on an abstract Unix socket, which leaves no file behind, and sends its record to processes of
the same user or of root.
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

from detcoll.quantities import read_flag
from detcoll.rendezvous.server import peer_uid
from detcoll.runtime.recorder import RECORD_SCHEMA

log = logging.getLogger("detcoll")

LARGEST_KEPT_JOBS = 16
SIGNAL = signal.SIGUSR2
_PATIENCE_S = 5.0
_JOIN_S = 1.0


def socket_prefix() -> str:
    """Return the prefix of the names of this user's sockets; the process id and the rank follow."""
    return f"detcoll-job-{os.getuid()}-"


class Flight:
    """Writes the record of one rank to disk, and sends it on request.

    Parameters
    ----------
    name : str
        The name of the job, the same on all ranks; also the name of the folder of its records.
    rank : int
        The rank of this process.
    describe : callable
        Returns the state of the rank as plain data; called from any thread.
    setting : str, optional
        The value of DETCOLL_RECORD.
    """

    def __init__(self, name: str, rank: int, describe: Callable[[], dict[str, Any]], setting: str | None) -> None:
        self.name, self._rank, self._describe, self._pid = name, rank, describe, os.getpid()
        flag = read_flag(setting or "")
        self._is_own = not setting or flag is True
        folder = _default_folder() if self._is_own else Path(setting or "")
        self._is_off = flag is False or folder is None
        self._folder = (folder or Path()) / name
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._listener = self._listen()
        self._signal_before: Any = None
        self._has_signal = self._catch_signal()

    def write(self, reason: str) -> Path | None:
        """Write the record and return its path, or None if records are disabled or it cannot be written.

        A forked child writes none, because its copy of the state is that of its parent at the fork.
        """
        if self._is_off or os.getpid() != self._pid:
            return None
        path = self._folder / f"record{self._rank}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._writing:  # several groups may fail at once, and all write the same draft
                draft = path.with_suffix(".draft")
                draft.write_text(json.dumps(self.told(reason)), encoding="utf-8")
                draft.replace(path)
        except Exception as error:  # must not hide the failure that the record is about
            level = logging.DEBUG if self._is_own else logging.WARNING  # DETCOLL_RECORD names the folder
            log.log(level, "rank %d: no flight record was written to %s: %r", self._rank, path, error)
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
        """Close the socket and restore the signal handler. Idempotent."""
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
        """Write the record on `SIGNAL`, unless the program has a handler of its own."""
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
    """Return the socket names of this user's ranks on this host and in this network namespace."""
    names = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(encoding="ascii", errors="replace").splitlines()[1:]:
            name = line.rsplit(" ", 1)[-1]
            if name.startswith("@" + socket_prefix()):
                names.add(name[1:])
    return sorted(names)


def ask(name: str) -> dict[str, Any] | None:
    """Request the record of the rank with this socket name; None if the rank is gone or does not answer."""
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
    """Return the default folder of records, or None for a user without a home, as in some containers."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        base = Path(state) if state else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "detcoll" / "records"


def _forget_old(folder: Path) -> None:
    """Remove the folders of all but the last `LARGEST_KEPT_JOBS` jobs."""
    jobs = sorted((job for job in folder.iterdir() if job.is_dir()), key=lambda job: job.stat().st_mtime)
    for job in jobs[:-LARGEST_KEPT_JOBS]:
        shutil.rmtree(job, ignore_errors=True)
