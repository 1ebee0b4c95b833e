"""Whether this process may make the networks of a lab, how an ordinary user comes to, and what forbids it.

Nobody is asked for a user number: what a site takes is tried, in a thread that lives for a millisecond. Where this
process may not, a child tries it in a user namespace (`detcoll.emulation.lab.user_namespace`). Where that works, this
process starts its program anew in such a namespace, as the same process with the same number, so that signals, exit
codes and the terminal need nobody in between. What the kernel refuses is told by the rule that forbids it, as far as
the kernel shows its rules.
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from detcoll.emulation.lab import user_namespace
from detcoll.emulation.lab.tun import pyroute2
from detcoll.emulation.lab.user_namespace import (
    FAILED,
    NETWORK,
    SYSCTL,
    SYSCTL_PATH,
    TUN,
    TUN_PATH,
    USER,
    Refused,
)
from detcoll.errors import TransportUnavailable

ENTERED_VARIABLE = "DETCOLL_IN_USER_NAMESPACE"
"""The id of the process, set while its program starts anew, so that it does so once."""


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


_FOLDER = _current_folder()
"""Where the program starts anew, since its arguments may be relative: it may have changed its folder since."""

_WITHOUT_NAMESPACES = (errno.EINVAL, errno.ENOSYS)
_FORBIDDEN = (errno.EPERM, errno.EACCES)
_LIMITED = {"network": "net", "user": "user"}
_FULL = (errno.ENOSPC, errno.EUSERS)
_TRIAL_TIMEOUT_S = 30.0
_OFFER = "--relay gives rate and delay alone without it"


def why_unavailable() -> str | None:
    """Return why this process, as it is, can open no lab and what could be instead; None where it can."""
    try:
        _require_installed()
    except TransportUnavailable as error:
        return str(error)
    refused = refused_here()
    return None if refused is None else f"{explain_here(refused)}; {_OFFER}"


def _require_installed() -> None:
    """Refuse where something is missing that no privilege gives."""
    try:
        if platform.system() != "Linux":
            raise TransportUnavailable(f"the lab needs Linux, this is {platform.system()}")
        pyroute2()
    except TransportUnavailable as error:
        raise TransportUnavailable(f"{error}; {_OFFER}") from error


def refused_here() -> Refused | None:
    """Return what the kernel refuses this process of what a site takes; None where a lab can be opened."""
    try:
        user_namespace.try_site()
    except Refused as error:
        return error
    return None


def refused_in_namespace() -> Refused | None:
    """Return what the kernel refuses a user namespace of this user; None where a lab can be opened in one.

    Raises
    ------
    TransportUnavailable
        If the trial had no result, so that nobody knows; says what became of it.
    """
    try:
        tried = subprocess.run(
            _in_namespace(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _no_result(f"did not end within {_TRIAL_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise _no_result(f"cannot be started: {error}") from error
    if tried.returncode == 0:
        return None
    if tried.returncode == -signal.SIGSYS:  # some filters kill who calls what they refuse
        return Refused(USER, errno.EPERM)
    step, _, number = tried.stdout.strip().partition(" ")
    if tried.returncode != FAILED or not number.isdecimal():
        told = tried.stderr.strip().rpartition("\n")[2]
        raise _no_result(f"ended with exit code {tried.returncode}{f': {told}' if told else ''}")
    return Refused(step, int(number))


def _no_result(what: str) -> TransportUnavailable:
    """Return the error for a trial that had no result: that is no refusal, so nobody goes on with the relay."""
    return TransportUnavailable(
        f"nobody knows whether this user may open a lab: the trial of a user namespace {what}; try again, or give "
        "--relay, which has rate and delay alone"
    )


def obtain(*, may_restart: bool = True) -> str | None:
    """Make this process one that may open labs.

    Where it may not yet, and a user namespace helps, the program of this process starts anew inside one, from its first
    line, with the same arguments and in the folder in which it imported this module; the call does not return then.

    Parameters
    ----------
    may_restart : bool
        Whether it may: what was done so far can be done again, and the arguments say all that is to be done. A program
        that comes from standard input, is typed, or is not found from that folder never starts anew.

    Returns
    -------
    str or None
        What forbids it; None where a lab can be opened.

    Raises
    ------
    TransportUnavailable
        If something is missing that no privilege gives, such as Linux, or the trial of a user namespace had no result;
        says what.
    """
    _require_installed()
    has_entered = os.environ.pop(ENTERED_VARIABLE, None) == str(os.getpid())
    refused = refused_here()
    if refused is None:
        return None
    if has_entered or not (may_restart and sys.executable and _is_found_again()) or _is_read_from_input():
        return explain_here(refused)
    refused = refused_in_namespace()
    if refused is None:
        _start_anew()
    return explain(refused)


def _is_read_from_input() -> bool:
    """Return whether the program comes from standard input, which is read by now, or is typed."""
    is_file = hasattr(sys.modules["__main__"], "__file__")
    return bool(sys.flags.interactive or hasattr(sys, "ps1")) or not (is_file or "-c" in sys.orig_argv)


def _is_found_again() -> bool:
    """Return whether the arguments of this process lead from `_FOLDER` to the program that it runs."""
    program = sys.modules["__main__"]
    path = getattr(program, "__file__", None)
    if _FOLDER is None or not Path(_FOLDER).is_dir():
        return False
    is_module = getattr(program, "__spec__", None) is not None
    return is_module or path is None or any(_is_same(_FOLDER, word, path) for word in sys.orig_argv[1:])


def _is_same(folder: str, word: str, path: str) -> bool:
    return os.path.normpath(os.path.join(folder, word)) == os.path.normpath(os.path.join(folder, path))


def _start_anew() -> NoReturn:
    assert _FOLDER is not None
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os.chdir(_FOLDER)
    program = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, _in_namespace(*program), os.environ | {ENTERED_VARIABLE: str(os.getpid())})


def _in_namespace(*command: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(Path(user_namespace.__file__)), *command]


def explain_here(refused: Refused) -> str:
    """Return, in words, what was refused this process."""
    if refused.step == NETWORK and refused.number in _FORBIDDEN:
        return (
            f"user {os.geteuid()} may not make networks in this process, but may in a user namespace, where detcoll's "
            "commands go by themselves and others under: unshare -Urn"
        )
    return explain(refused)


def explain(refused: Refused, root: Path = Path("/")) -> str:
    """Return, in words, what was refused and by which rule; ``root`` is where ``/proc`` hangs."""
    if refused.step == TUN:
        return f"{TUN_PATH} cannot be used: {os.strerror(refused.number)}"
    if refused.step == SYSCTL:
        return f"{SYSCTL_PATH} cannot be set: {os.strerror(refused.number)}"
    kind = "network" if refused.step == NETWORK else "user"
    if refused.number in _WITHOUT_NAMESPACES:
        return f"this kernel has no {kind} namespaces"
    return f"{_rule(refused, kind, root)} {kind} namespaces to user {os.geteuid()}"


def _rule(refused: Refused, kind: str, root: Path) -> str:
    """Return which rule of the kernel refuses namespaces of this kind, with its verb."""
    limit = f"user.max_{_LIMITED[kind]}_namespaces"
    if refused.number in _FULL:
        most = _sysctl(root, limit)
        return f"sysctl {limit}={most or 'unknown'} refuses {'any' if most == '0' else 'more'}"
    if refused.number not in _FORBIDDEN:
        return f"the kernel ({os.strerror(refused.number)}) refuses"
    if _sysctl(root, "kernel.unprivileged_userns_clone") == "0":
        return "sysctl kernel.unprivileged_userns_clone=0 refuses"
    # AppArmor grants the namespace and takes what a process could do in it; a filter refuses the call itself.
    if refused.step == USER and _has_filter(root):
        return "a seccomp filter, as containers have, refuses"
    if _sysctl(root, "kernel.apparmor_restrict_unprivileged_userns") == "1":
        return "AppArmor (sysctl kernel.apparmor_restrict_unprivileged_userns=1) refuses"
    if _has_filter(root):
        return "a seccomp filter, as containers have, or a missing capability refuses"
    return f"the kernel ({os.strerror(refused.number)}) refuses"


def _sysctl(root: Path, name: str) -> str | None:
    """Return a kernel parameter, or None where there is none."""
    try:
        return (root / "proc/sys" / name.replace(".", "/")).read_text(encoding="ascii").strip()
    except OSError:
        return None


def _has_filter(root: Path) -> bool:
    """Tell whether system calls of this process are filtered."""
    try:
        lines = (root / "proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.split() == ["Seccomp:", "2"] for line in lines)
