"""A communication hook for DDP over another backend."""

# DDP refuses a hook whose annotations are text, so this module does not postpone their evaluation.

import torch
from torch.distributed import GradBucket

import detcoll
from detcoll import Communicator, Work
from detcoll.errors import UsageError
from detcoll.torch import devices


def comm_hook(comm: Communicator | None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients of a bucket over the ranks of a communicator, for ``register_comm_hook`` of DDP.

    DDP then uses its own process group, of any backend, only for what it does at the start. Buckets are reduced while
    the backward pass computes further ones::

        detcoll.init()
        model = DistributedDataParallel(module)
        model.register_comm_hook(None, detcoll.torch.comm_hook)

    Parameters
    ----------
    comm : Communicator, optional
        The ranks whose gradients are averaged; the world of `detcoll.init` if None.
    bucket : torch.distributed.GradBucket
        Its buffer is averaged in place, with ``op="avg"`` of `Communicator.all_reduce`.

    Returns
    -------
    torch.futures.Future
        Completes with the buffer, or with the error that ended the call.

    Raises
    ------
    UsageError
        If ``comm`` is not a communicator, or the gradients have a type or layout that collectives cannot take.
    """
    tensor = bucket.buffer()
    work = communicator_of(comm).all_reduce(tensor, "avg", async_op=True, name=f"bucket {bucket.index()}")
    on = devices.of([tensor])
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=list(on))

    def end(work: Work) -> None:
        error = work.exception()
        with devices.streams(on):
            if error is None:
                future.set_result(tensor)
            else:
                future.set_exception(error)

    work.add_done_callback(end)
    return future.then(lambda ended: ended.wait())  # an error that a callback raises reaches DDP as one, with its text


def communicator_of(comm: Communicator | None) -> Communicator:
    """Return ``comm``, or the world of `detcoll.init` for None."""
    if comm is None:
        return detcoll.communicator()
    if not isinstance(comm, Communicator):
        raise UsageError(f"comm={comm!r} is a {type(comm).__name__}; expected a Communicator, or None for the world")
    return comm
