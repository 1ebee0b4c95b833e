"""Finds transports by the name that users type: the entry points of group ``detcoll.transports``.

`register` adds one in-process, for a transport that is not installed (an example, a test).
"""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.util import find_spec

from detcoll.errors import DetcollError, TransportUnavailable, UsageError
from detcoll.installation import install_command
from detcoll.launch.mpiexec import find_mpiexec
from detcoll.transport import Transport

GROUP = "detcoll.transports"

SLOTTED = "slotted"
"""The transport that commands measure, and reports are about, where it is among others."""

PLAIN = "tcp"
"""The transport that has the plans of `SLOTTED` without its slots."""

_NEEDS = {
    "gloo": ("torch", "gloo"),
    "mpi": ("mpi4py", "mpi"),
}
"""Packages that transports import where they are opened, and the extras that bring them."""

_TITLES = {PLAIN: "same plans, plain TCP"}
"""What results call a transport whose name does not say what it is compared for."""

_registered: dict[str, type[Transport]] = {}


def register(transport: type[Transport]) -> type[Transport]:
    """Make ``transport`` known under its name in this process; returns it, so it serves as a decorator.

    Raises
    ------
    UsageError
        If it is no `Transport`, or its name is taken by another.
    """
    if not (isinstance(transport, type) and issubclass(transport, Transport)):
        raise UsageError(f"transport={transport!r} must be a subclass of detcoll.transport.Transport")
    known = _registered.setdefault(transport.name, transport)
    if known is not transport:
        raise UsageError(f"transport name {transport.name!r} is already taken by {known!r}")
    return transport


def names() -> list[str]:
    """Return the names of all transports that can be asked for, sorted."""
    return sorted({entry.name for entry in entry_points(group=GROUP)} | set(_registered))


def title_of(name: str) -> str:
    """Return what results call a transport, which mostly is its name."""
    return _TITLES.get(name, name)


def require_known(name: str) -> None:
    """Refuse a name that no transport has.

    Raises
    ------
    UsageError
        If ``name`` is not one of `names`; lists them.
    """
    if name not in names():
        raise UsageError(f"transport={name!r} is not known; expected auto or one of {', '.join(names())}")


def load(name: str) -> Transport:
    """Return the transport that ``name`` means.

    Raises
    ------
    UsageError
        If no transport has that name.
    TransportUnavailable
        If its package does not import here.
    """
    if name in _registered:
        return _registered[name]()
    require_known(name)
    try:
        kind = next(entry for entry in entry_points(group=GROUP) if entry.name == name).load()
    except ImportError as error:
        raise TransportUnavailable(f"transport {name!r} does not import: {error}") from error
    transport = kind()
    if not isinstance(transport, Transport):
        raise UsageError(f"entry point {name!r} gives {kind!r}, which is no detcoll.transport.Transport")
    return transport


def why_missing(transport: str) -> str | None:
    """Return why ``transport`` cannot be used here, None where nothing is known to be missing."""
    package, extra = _NEEDS.get(transport, (None, ""))
    if package is not None and find_spec(package) is None:
        return f"{package} is not installed; install it with: {install_command(extra)}"
    if transport == "mpi" and find_mpiexec() is None:
        return f"there is no mpiexec; install one with: {install_command(extra)}"
    try:
        load(transport)
    except DetcollError as error:
        return str(error)
    return None
