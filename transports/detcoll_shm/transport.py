"""The shared-memory transport as users ask for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from detcoll.errors import TransportUnavailable, UsageError
from detcoll.quantities import parse_duration_ns, parse_size_bytes
from detcoll.transport import Capabilities, Clock, Rendezvous, Scope, Transport
from detcoll.types import DTYPES, ReduceOp
from detcoll_shm.endpoint import ShmEndpoint
from detcoll_shm.layout import LINE_BYTES, SMALLEST_RING_BYTES
from detcoll_shm.settings import Settings

LARGEST_OPTION = 2**32
LARGEST_STAGES_BYTES = 64 * 2**20
"""What the stages of all ranks may take together: each rank with a device pins them all, and so for each group."""


class ShmTransport(Transport):
    """Joins ranks of one host through shared memory.

    Options are the fields of `Settings`, as whole numbers or as quantities such as ``"4 MiB"`` and ``"20 us"``.
    """

    name = "shm"
    capabilities = Capabilities(
        scope=Scope.HOST,
        native=frozenset({"all_reduce", "broadcast", "barrier"}),
        native_dtypes=frozenset(DTYPES),
        native_ops=frozenset(ReduceOp),
        native_groups=True,
        native_devices=True,
        ordered=True,
    )

    def open(
        self, rank: int, size: int, rendezvous: Rendezvous, clock: Clock, options: Mapping[str, Any]
    ) -> ShmEndpoint:
        """Open this rank's memory and doorbell.

        Raises
        ------
        UsageError
            If the rank is not one of the world, or an option is unknown or out of range.
        TransportUnavailable
            If the system or processor lacks what this transport needs.
        """
        if not 0 <= rank < size:
            raise UsageError(f"rank={rank} must be from 0 to {size - 1}")
        settings = _settings(options)
        _check_platform()
        most = LARGEST_STAGES_BYTES // (4 * size) // LINE_BYTES * LINE_BYTES
        if settings.device_chunk_bytes > most:
            settings = replace(settings, device_chunk_bytes=max(most, LINE_BYTES))
        return ShmEndpoint(rank, size, clock, settings, self.capabilities.largest_message_bytes)


def _check_platform() -> None:
    missing = [name for name in ("memfd_create", "pidfd_open") if not hasattr(os, name)]
    if missing:
        raise TransportUnavailable(f"transport 'shm' needs Linux; this system has no {' and no '.join(missing)}")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise TransportUnavailable(
            f"transport 'shm' relies on the memory order of x86-64; this is {platform.machine()}"
        )
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        raise TransportUnavailable(
            f"transport 'shm' cannot watch processes here: pidfd_open says {error.strerror}; it needs Linux 5.3"
        ) from error


def _settings(options: Mapping[str, Any]) -> Settings:
    known: dict[str, int] = asdict(Settings())
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(f"transport 'shm' has no option {', '.join(unknown)}; expected some of {', '.join(known)}")
    values = known | {name: _whole(name, value) for name, value in options.items()}
    lowest = {
        "ring_bytes": SMALLEST_RING_BYTES, "slots": 2, "fragment_bytes": 64, "chunk_bytes": LINE_BYTES,
        "device_chunk_bytes": LINE_BYTES,
    }  # fmt: skip
    for name, value in values.items():
        low = lowest.get(name, 0)
        if not low <= value <= LARGEST_OPTION:
            raise UsageError(f"{name}={value} must be from {low} to {LARGEST_OPTION}")
    if values["slots"] & (values["slots"] - 1):
        raise UsageError(f"slots={values['slots']} must be a power of two")
    for name in ("chunk_bytes", "device_chunk_bytes"):
        if values[name] % LINE_BYTES:
            raise UsageError(f"{name}={values[name]} must be a multiple of {LINE_BYTES}")
    return Settings(**values)


def _whole(name: str, value: object) -> int:
    is_time = name.endswith("_ns")
    if isinstance(value, str):
        return parse_duration_ns(value, name) if is_time else parse_size_bytes(value, name)
    if isinstance(value, bool) or not isinstance(value, int):
        example = "a time such as '20 us'" if is_time else "a size such as '4 MiB'"
        raise UsageError(f"{name}={value!r} must be a whole number or {example}")
    return value
