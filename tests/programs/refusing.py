"""Becomes a program to which user namespaces are forbidden: ``python refusing.py filter|limit PROGRAM ARGUMENTS ...``.

``filter`` : a seccomp filter refuses the call, as in a container.
``limit`` : the parameter ``user.max_user_namespaces`` is 0, in a user namespace of the program's own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import struct
import sys
from pathlib import Path

_UNSHARE = {"x86_64": 272, "aarch64": 97}[platform.machine()]
_CLONE_NEWUSER = 0x10000000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_LOAD, _IS_EQUAL, _HAS_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _FIRST_ARGUMENT_AT = 0, 16
_EPERM, _ALLOW = 0x00050001, 0x7FFF0000


def _filter() -> None:
    steps = [
        (_LOAD, 0, 0, _NUMBER_AT), (_IS_EQUAL, 0, 3, _UNSHARE), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_HAS_BIT, 0, 1, _CLONE_NEWUSER), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))
    library = ctypes.CDLL(None, use_errno=True)
    assert library.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0) == 0
    assert library.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), program) == 0, os.strerror(ctypes.get_errno())


def _limit() -> None:
    entering = Path(__file__).parents[2] / "detcoll/emulation/lab/user_namespace.py"
    runpy.run_path(str(entering))["enter"]()
    Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="ascii")


if __name__ == "__main__":
    {"filter": _filter, "limit": _limit}[sys.argv[1]]()
    os.execv(sys.argv[2], sys.argv[2:])
