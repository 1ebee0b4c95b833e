"""Whether there are file descriptors enough. ZeroMQ's threads have no way to say that they lack one: they wait."""

from __future__ import annotations

import errno
import os
import resource

import zmq

_LACKING = {errno.EMFILE, errno.ENFILE}


def shortage(needed: int) -> str:
    """Return what to tell a user where ``needed`` more descriptors exceed the limit, or nothing where they do not."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        is_open = len(os.listdir("/proc/self/fd")) - 1
    except OSError as error:  # not one is left to look with
        if error.errno not in _LACKING:
            return ""
        is_open = limit
    if limit == resource.RLIM_INFINITY or is_open + needed <= limit:
        return ""
    return (
        f"this process needs about {is_open + needed} file descriptors, the limit is {limit}; raise it with ulimit -n"
    )


def is_shortage(error: OSError | zmq.ZMQError) -> bool:
    """Tell whether an error says that there are no descriptors left."""
    return error.errno in _LACKING
