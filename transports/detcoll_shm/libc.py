"""What shared memory calls of the C library that Python does not offer."""

from __future__ import annotations

import ctypes
from functools import lru_cache


class Span(ctypes.Structure):
    """``struct iovec`` of POSIX."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@lru_cache(1)
def libc() -> ctypes.CDLL:
    """Return the C library; not at import, since other systems lack what Linux has, and are told so when they open."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    span = ctypes.POINTER(Span)
    library.process_vm_readv.restype = ctypes.c_ssize_t
    library.process_vm_readv.argtypes = (ctypes.c_int, span, ctypes.c_ulong, span, ctypes.c_ulong, ctypes.c_ulong)
    return library
