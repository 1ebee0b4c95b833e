"""The arrival log: one record for every unit that reaches an uplink, in a .npy file.

Records are appended as bytes and written in small pieces, so that a long run costs neither memory nor a stall; the
header, which holds the count, is completed when the log is closed. Times are CLOCK_MONOTONIC, the clock that
`time.monotonic_ns` reads in every process of the machine.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from detcoll.errors import UsageError

RECORD = np.dtype(
    [
        ("time_ns", "<i8"),
        ("source_site", "<u2"),
        ("destination_site", "<u2"),
        ("source_address", "<u4"),
        ("destination_address", "<u4"),
        ("source_port", "<u2"),
        ("destination_port", "<u2"),
        ("protocol", "u1"),
        ("dropped", "?"),
        ("segments", "<u2"),
        ("dropped_segments", "<u2"),
        ("payload_bytes", "<u4"),
        ("wire_bytes", "<u4"),
        ("queue_bytes", "<u4"),
    ]
)
"""One unit at the moment it reaches the uplink of its site.

Addresses are numbers (10.77.0.1 is 0x0A4D0001). ``payload_bytes`` (TCP or UDP), ``wire_bytes`` and ``segments`` count
the whole unit, as it came; ``dropped_segments`` of them, the last ones, found the queue full, and ``dropped`` says
that there were any. ``queue_bytes`` is the uplink's backlog in wire bytes with what was taken of this unit, the part
of a unit that is still leaving included.
"""

RANKS_HOST = 1
"""The last byte of a site's address."""

_PACK = struct.Struct("<qHHIIHHB?HHIII")
_PIECE_BYTES = 1 << 16


class ArrivalLog:
    """Writes records to ``path``; the file is a whole .npy once it is closed."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._pending = bytearray()
        self._count = 0
        self._write_header()

    def append(
        self, time_ns: int, source_site: int, destination_site: int, flow: tuple[int, int, int, int], protocol: int,
        segments: int, dropped_segments: int, payload_bytes: int, wire_bytes: int, queue_bytes: int,
    ) -> None:  # fmt: skip
        """Add one record; its fields are those of `RECORD`."""
        source, destination, source_port, destination_port = flow
        self._pending += _PACK.pack(
            time_ns, source_site, destination_site, source, destination, source_port, destination_port, protocol,
            dropped_segments > 0, segments, dropped_segments, payload_bytes, wire_bytes, queue_bytes,
        )  # fmt: skip
        self._count += 1
        if len(self._pending) >= _PIECE_BYTES:
            self._flush()

    def extend(self, records: bytes) -> None:
        """Add whole records as they are in the file."""
        self._pending += records
        self._count += len(records) // _PACK.size
        if len(self._pending) >= _PIECE_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is pending and complete the header. Idempotent."""
        if self._file.closed:
            return
        self._flush()
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def __enter__(self) -> ArrivalLog:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close."""
        self.close()

    def _flush(self) -> None:
        self._file.write(self._pending)
        self._pending.clear()

    def _write_header(self) -> None:
        # The format pads its header so that the first axis can grow in place (numpy.lib.format, version 1.0).
        shape = {"descr": npy.dtype_to_descr(RECORD), "fortran_order": False, "shape": (self._count,)}
        npy.write_array_header_1_0(self._file, shape)


def read_log(path: str | Path) -> NDArray[Any]:
    """Return the records of an arrival log, in order of arrival at each uplink.

    Returns
    -------
    records : (n,) structured array of `RECORD`

    Raises
    ------
    UsageError
        If the file cannot be read or is no arrival log.
    """
    try:
        records: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"log={str(path)!r} cannot be read: {error}") from error
    if records.dtype != RECORD:
        raise UsageError(f"log={str(path)!r} is no arrival log: its records are {records.dtype}")
    return records


def of_ranks(records: NDArray[Any]) -> NDArray[Any]:
    """Return what the sites themselves sent: not others' flows and probes, whose addresses end differently."""
    mine: NDArray[Any] = records[records["source_address"] & 0xFF == RANKS_HOST]
    return mine
