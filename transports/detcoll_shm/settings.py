"""What can be chosen about the transport."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of the transport, in bytes and nanoseconds.

    ``ring_bytes`` : room for what one peer sends and this rank has not taken.  ``slots`` : how many messages of one
    peer may be under way.  ``fragment_bytes`` : parts of messages larger than a quarter of a ring.
    ``unexpected_bytes`` : bound on messages copied out because they came before their receive was posted.
    ``pool_bytes`` : bound on used buffers that are kept.  ``spin_ns`` : how long to look again before each sleep.
    ``chunk_bytes`` : parts of arrays in collectives, equal on all ranks.  ``device_chunk_bytes`` : the same where the
    array of a rank is on a device; less where there are many ranks.  ``direct_bytes`` : where all other ranks' arrays
    have no more than this together, every rank folds them whole, which saves a round of waiting.  ``wait_ns`` : what
    ``spin_ns`` is, in collectives: all ranks are about to come, and waking one that sleeps takes longer than most of
    them last.  ``read_bytes`` : arrays from this size are read from each other's processes where the system allows it,
    which saves a copy.
    """

    ring_bytes: int = 4 * 2**20
    slots: int = 1024
    fragment_bytes: int = 256 * 2**10
    unexpected_bytes: int = 256 * 2**20
    pool_bytes: int = 64 * 2**20
    spin_ns: int = 20_000
    chunk_bytes: int = 512 * 2**10
    device_chunk_bytes: int = 4 * 2**20
    direct_bytes: int = 256 * 2**10
    wait_ns: int = 200_000
    read_bytes: int = 4 * 2**20
