"""The one error tree of detcoll.

::

    DetcollError
    +-- UsageError (ValueError)          the caller's argument, before anything moved
    +-- PlanError                        a plan that does not prove itself
    |   +-- PlanMismatch                 ranks called different collectives
    +-- TransportUnavailable (ImportError)   what a transport needs is not here
    +-- TransportError
        +-- ConnectError                 ranks did not find each other in time
        +-- PeerLost                     a rank is gone
        +-- FrameError                   bytes that break the protocol
        +-- DeadlineMissed (TimeoutError)    a wait reached its deadline
        +-- Closed                       used after close or abort

Messages name the argument or the rank, the value, and what was expected. Every docstring ends with the state that the
caller is left in.
"""

from __future__ import annotations


class DetcollError(Exception):
    """Anything that detcoll raises on purpose.

    State after: given by the subclass.
    """


class UsageError(DetcollError, ValueError):
    """An argument that cannot be used.

    State after: nothing moved; the communicator is as before.
    """


class PlanError(DetcollError):
    """A plan or calendar that breaks a rule which the checker proves.

    State after: nothing moved; the plan must not be run.
    """


class PlanMismatch(PlanError):
    """Ranks called collectives that do not fit together; the message shows both descriptors in full.

    State after: the collective failed on every rank, buffers hold unspecified values, the communicator is closed.
    """


class TransportUnavailable(DetcollError, ImportError):
    """A transport cannot be used here; the message says what is missing and how to install it.

    State after: nothing was opened.
    """


class TransportError(DetcollError):
    """Something went wrong between ranks.

    State after: given by the subclass.
    """


class ConnectError(TransportError):
    """Ranks did not find each other before the deadline; the message names those that never came.

    State after: everything opened so far is closed again.
    """


class PeerLost(TransportError):
    """A rank died or went away without saying goodbye.

    State after: collectives under way failed on every rank, the communicator is closed.
    """


class FrameError(TransportError):
    """Bytes arrived that do not fit the protocol or the receive they belong to.

    State after: the receive failed; the endpoint is closed.
    """


class DeadlineMissed(TransportError, TimeoutError):
    """A wait reached its deadline; the message names the step and the peers waited for.

    State after: the collective failed, buffers hold unspecified values, the communicator is closed.
    """


class Closed(TransportError):
    """Use of something that was closed or aborted; the cause is chained where there is one.

    State after: still closed.
    """
