"""Gives ZeroMQ memory to send from, with neither a copy nor a call when it is through.

ZeroMQ takes a message as constant where nothing is named that would free it (``zmq_msg_init_data(3)``): it reads the
memory as it sends, and forgets it. pyzmq has no such message; its own way without a copy wakes up a thread of Python
for each, which costs more than copying. So the C library is called as it lies beneath pyzmq.

Whoever sends keeps the memory until the receiver has acknowledged the message, or the context has ended.
"""

from __future__ import annotations

import ctypes

import numpy as np
import zmq
from zmq.backend.cython import _zmq

_MESSAGE_BYTES = 64  # zmq_msg_t of zmq.h


class _Message(ctypes.Structure):
    _fields_ = (("_", ctypes.c_void_p * (_MESSAGE_BYTES // ctypes.sizeof(ctypes.c_void_p))),)


def _library() -> ctypes.CDLL | None:
    """Return what holds libzmq's functions, or None where pyzmq hides them."""
    try:
        library = ctypes.CDLL(_zmq.__file__)
        library.zmq_msg_init_data.argtypes = (
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
        library.zmq_msg_send.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    except (AttributeError, OSError):
        return None
    return library


_LIBRARY = _library()


def send_constant(socket: zmq.Socket[bytes], view: memoryview) -> None:
    """Send ``view`` as the last part of a message that has begun, without waiting.

    Parameters
    ----------
    socket : zmq.Socket
        Which has taken the parts before.
    view : memoryview, contiguous bytes, borrowed until the message is acknowledged
        Copied where the C library cannot be reached.

    Raises
    ------
    zmq.ZMQError
        What ZeroMQ said.
    """
    if _LIBRARY is None:
        socket.send(view, zmq.DONTWAIT)
        return
    message = _Message()
    address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    _LIBRARY.zmq_msg_init_data(ctypes.byref(message), address, view.nbytes, None, None)
    if _LIBRARY.zmq_msg_send(ctypes.byref(message), socket.underlying, zmq.DONTWAIT) < 0:
        raise zmq.ZMQError(_LIBRARY.zmq_errno())
