"""Compiles the router's inner loop with the system's C compiler, once a machine, and loads it.

The library lies under ``$XDG_CACHE_HOME/detcoll/router`` by a digest of what it was made of. It needs neither Python's
headers nor a wheel for each system. A file there that others could have written is not loaded. Only a folder of this
user's own is written to: root with the home of another user, and who has no number in a user namespace, keep nothing.

The compiler has a process group of its own, in which a shell waits for a pipe to close. However this process ends, the
kernel closes it; then the shell ends the compiler and removes the folder in which that works.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_double, c_int, c_int64, c_uint, c_void_p
from pathlib import Path

_FOLDER = Path(__file__).parent
_OVERFLOW_USER = Path("/proc/sys/kernel/overflowuid")
_SOURCES = ("line.c", "interface.c", "router.c")
_HEADERS = ("unit.h", "port.h", "line.h")
# No contraction: a product and a sum that are rounded once together would give other bits than Python does.
_FLAGS = ("-std=gnu11", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden")
_PATIENCE_S = 12.0
"""For one of two: the lab waits 30 s for its router."""

# Standard input is the pipe, $0 the folder. A job in the background has no standard input, hence descriptor 3.
_GUARDED = """
exec 3<&0 </dev/null
(trap '' TERM; read -r _ <&3; kill -TERM 0; rm -rf -- "$0"; kill -KILL 0) >/dev/null 2>&1 &
"$@" 3<&-
code=$?
{ kill -KILL $!; wait $!; } 2>/dev/null
exit $code
"""

Draw = CFUNCTYPE(c_int, c_int, c_int, POINTER(c_double), c_int)
Log = CFUNCTYPE(c_int, c_void_p, c_int)
Clock = CFUNCTYPE(c_int64)

_INTERFACE = {
    "area_new": (c_void_p, c_int, c_double, c_double, c_int, c_char_p, Draw, Log),
    "area_port": (None, c_void_p, c_int, c_double, c_double, c_double, c_double),
    "area_path": (None, c_void_p, c_int, c_int64, c_double, c_double),
    "area_reserve": (None, c_void_p, c_int, c_double, c_double),
    "area_bursts": (None, c_void_p, c_int, c_double, c_double),
    "area_probes": (None, c_void_p, c_double),
    "area_failure": (None, c_void_p, c_double, c_double, c_int, c_int),
    "area_take": (None, c_void_p, c_int, c_char_p, c_int, c_int64, c_int),
    "area_advance": (None, c_void_p, c_int64),
    "area_arrival": (c_int, c_void_p, c_uint, POINTER(c_double), POINTER(c_int), c_void_p),
    "area_write_log": (None, c_void_p),
    "area_next": (c_double, c_void_p),
    "area_urgent": (c_int, c_void_p),
    "area_awaited": (c_int, c_void_p),
    "area_under_way": (c_int, c_void_p),
    "area_unroutable": (c_int64, c_void_p),
    "area_asleep": (POINTER(c_double), c_void_p),
    "area_peaks": (None, c_void_p, c_int, c_void_p),
    "area_counts": (None, c_void_p, c_int, c_void_p),
    "area_delays": (c_int, c_void_p, c_int, POINTER(c_double), c_void_p, c_void_p),
    "area_burst_counts": (None, c_void_p, c_int, c_void_p),
    "area_probes_seen": (c_int, c_void_p, POINTER(c_int64), c_void_p),
    "area_free": (None, c_void_p),
    "router_new": (c_void_p, c_void_p, c_void_p, c_int, c_int, Clock),
    "router_look": (None, c_void_p, c_int64, c_double),
    "router_next": (c_double, c_void_p, POINTER(c_double)),
    "router_read": (c_int, c_void_p, c_int),
    "router_forward": (c_int, c_void_p),
    "router_counts": (None, c_void_p, c_void_p, c_void_p),
    "router_free": (None, c_void_p),
}  # fmt: skip
"""What each function returns, and takes."""


_KEPT = 4
"""How many compiled libraries the cache keeps."""


class NotCompiled(Exception):
    """The router's inner loop cannot be compiled or loaded here; says why."""


def load() -> ctypes.CDLL:
    """Return the library, compiled if need be.

    Raises
    ------
    NotCompiled
        If there is no C compiler, it fails, or this is no little-endian machine of 64 bits.
    """
    if sys.maxsize < 2**32 or sys.byteorder != "little":
        raise NotCompiled("it is written for little-endian machines of 64 bits")
    with suppress(OSError, RuntimeError):
        return _cached()
    # Nothing can be kept in the cache, or nothing there can be loaded.
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _loaded(_compiled(Path(folder)))
    except OSError as error:
        raise NotCompiled(f"no compiled library can be made and loaded: {error}") from error


def _cached() -> ctypes.CDLL:
    """Return the library from the cache, or put it there."""
    texts = b"".join((_FOLDER / name).read_bytes() for name in (*_HEADERS, *_SOURCES))
    facts = f"{os.environ.get('CC')} {_FLAGS} {platform.machine()} {platform.libc_ver()} ".encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detcoll" / "router"
    _require_own(folder)
    path = folder / f"{hashlib.blake2b(facts + texts, digest_size=16).hexdigest()}.so"
    with suppress(OSError):
        return _loaded(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as made:
        os.replace(_compiled(Path(made)), path)
    _forget_old(folder)
    return _loaded(path)


def _forget_old(folder: Path) -> None:
    """Remove all but the latest libraries: each version of detcoll and each compiler leaves one."""
    with suppress(OSError):  # another process does the same
        for path in sorted(folder.glob("*.so"), key=lambda each: each.stat().st_mtime_ns)[:-_KEPT]:
            path.unlink(missing_ok=True)


def _require_own(folder: Path) -> None:
    """Raise PermissionError unless the folder, or that in which it would be made, is this user's own."""
    user = os.geteuid()
    # In a user namespace whoever has no number there is this one: its files may be anybody's.
    if user == int(_OVERFLOW_USER.read_text("ascii")):
        raise PermissionError(f"user {user} may be anybody")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if nearest.stat().st_uid != user:
        raise PermissionError(f"{nearest} is another user's")


def _compiled(folder: Path) -> Path:
    """Compile into ``folder`` and return the library."""
    asked = os.environ.get("CC") or "cc"
    try:
        compiler = shlex.split(asked)
    except ValueError as error:
        raise NotCompiled(f"CC={asked!r} is no command: {error}") from error
    if not compiler or shutil.which(compiler[0]) is None:
        raise NotCompiled(f"there is no C compiler {asked!r}")
    path = folder / "router.so"
    sources = [str(_FOLDER / name) for name in _SOURCES]
    command = [*compiler, *_FLAGS, "-o", str(path), *sources, "-lm"]
    code, told = _run_guarded(command, folder)
    if code:
        raise NotCompiled(f"{shlex.join(command)} failed: {told.strip() or f'exit code {code}'}")
    path.chmod(0o700)  # whatever the umask says of what others may do with it
    return path


def _run_guarded(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a compiler that works in ``folder`` and ends with this process; return its exit code and what it says."""
    guard, ours = os.pipe()
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDED, str(folder), *command], stdin=guard, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(folder)}, start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                _, told = process.communicate(timeout=_PATIENCE_S)
            except subprocess.TimeoutExpired as error:
                raise NotCompiled(f"{shlex.join(command)} took more than {_PATIENCE_S:.0f} s") from error
            finally:
                os.close(ours)  # which ends what has not ended
    finally:
        os.close(guard)
    return process.returncode, told.decode(errors="replace")


def _loaded(path: Path) -> ctypes.CDLL:
    """Load a library that nobody else can have written; through its descriptor, so it is the one that was looked at."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{path} may be written by others")
        library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    for name, (result, *arguments) in _INTERFACE.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
