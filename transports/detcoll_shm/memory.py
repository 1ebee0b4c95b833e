"""Shared memory without a name: made by its owner, opened by peers through the owner's ``/proc`` entry.

Nothing is ever put under ``/dev/shm``, so nothing can be left behind, however a process ends.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from detcoll.errors import ConnectError, TransportUnavailable
from detcoll.transport import host_identity
from detcoll_shm.layout import KEY_BYTES, VERSION, Address, Geometry


class Ring:
    """One ring mapped into this process, as words, as bytes, and as bytes that can be lent."""

    __slots__ = ("data", "lendable", "memory", "words")

    def __init__(self, fd: int, geometry: Geometry, source: int) -> None:
        self.memory = mmap.mmap(fd, geometry.stride_bytes, offset=geometry.ring_at(source))
        self.data = memoryview(self.memory)
        self.lendable = self.data.toreadonly()
        self.words = self.data.cast("q")

    def unmap(self) -> None:
        """Give the mapping back; where views are still lent, the last of them does."""
        for view in (self.words, self.lendable, self.data):
            view.release()
        try:
            self.memory.close()
        except BufferError:
            del self.memory


def pid_namespace() -> str:
    """Return a name for the PID namespace of this process."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "unknown"


def create(ranks: int, geometry: Geometry, bell_fd: int) -> tuple[int, Address]:
    """Make this rank's memory, with one ring for each of ``ranks`` sources; it takes no room until it is used.

    Raises
    ------
    TransportUnavailable
        If the system refuses.
    """
    fd = -1
    try:
        fd = os.memfd_create("detcoll", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, geometry.stage_at(ranks) + geometry.stage_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        address = Address(
            version=VERSION,
            host=host_identity(),
            pid_namespace=pid_namespace(),
            pid=os.getpid(),
            memory_fd=fd,
            bell_fd=bell_fd,
            ranks=ranks,
            ring_bytes=geometry.ring_bytes,
            slots=geometry.slots,
            chunk_bytes=geometry.chunk_bytes,
            device_chunk_bytes=geometry.device_chunk_bytes,
            key=os.urandom(KEY_BYTES).hex(),
        )
        os.pwrite(fd, address.header(), 0)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise TransportUnavailable(f"transport 'shm' cannot make shared memory for {ranks} ranks: {error}") from error
    return fd, address


def check_reachable(rank: int, address: Address) -> None:
    """Make sure that this process can see the one of ``rank``.

    Raises
    ------
    ConnectError
        If it is on another host or in another PID namespace.
    """
    if address.host != host_identity():
        raise ConnectError(
            f"rank {rank} is on another host ({address.host}, this is {host_identity()}); "
            "transport 'shm' joins ranks of one host only"
        )
    if address.pid_namespace != pid_namespace():
        raise ConnectError(
            f"rank {rank} is in another PID namespace ({address.pid_namespace}, this is {pid_namespace()}); "
            "transport 'shm' joins containers only if they share one (docker run --pid)"
        )


def try_memory(rank: int, address: Address) -> None:
    """Open what connecting to ``rank`` needs, and close it again.

    Raises
    ------
    ConnectError
        If this process cannot share memory with that one.
    """
    check_reachable(rank, address)
    os.close(open_memory(rank, address))
    os.close(open_descriptor(rank, address, address.bell_fd, os.O_WRONLY | os.O_NONBLOCK))


def open_memory(rank: int, address: Address) -> int:
    """Open the memory of ``rank`` and make sure that it is the memory meant.

    Raises
    ------
    ConnectError
        If it is gone, not permitted, or something else.
    """
    fd = open_descriptor(rank, address, address.memory_fd, os.O_RDWR)
    header = address.header()
    try:
        found = os.pread(fd, len(header), 0)
    except OSError:
        found = b""
    if found != header:
        os.close(fd)
        raise ConnectError(
            f"descriptor {address.memory_fd} of process {address.pid} is not the memory of rank {rank}; "
            "its process has ended"
        )
    return fd


def open_descriptor(rank: int, address: Address, fd: int, flags: int) -> int:
    """Open descriptor ``fd`` of the process of ``rank``.

    Raises
    ------
    ConnectError
        If that process is gone or does not let this one in.
    """
    path = f"/proc/{address.pid}/fd/{fd}"
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except PermissionError as error:
        raise ConnectError(
            f"opening {path} of rank {rank} is not permitted; ranks that share memory must run as one user"
        ) from error
    except OSError as error:
        raise ConnectError(
            f"rank {rank} cannot be reached through {path}: {error.strerror}; its process has ended"
        ) from error
