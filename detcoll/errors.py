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
        +-- DeviceError                  a call of a device's driver failed
        +-- DeadlineMissed (TimeoutError)    a wait reached its deadline
        +-- Closed                       used after close or abort

Messages name the argument or the rank, the value, and what was expected. Every docstring ends with the state that the
caller is left in. Where a group has ended, its later calls raise Closed, and other groups of the job go on; only Gloo's
own collectives end all groups when they fail.
"""

from __future__ import annotations


class DetcollError(Exception):
    """Anything that detcoll raises on purpose.

    State after: given by the subclass.
    """


class UsageError(DetcollError, ValueError):
    """An argument that cannot be used.

    State after: nothing moved, and the communicator can be used. A collective that one rank refuses ends on all members
    of the group, which raise this as well, unless the transport does it by itself: then the others wait for a proper
    call.
    """


class PlanError(DetcollError):
    """A plan or calendar that breaks a rule which the checker proves.

    State after: nothing moved; the plan must not be run.
    """


class PlanMismatch(PlanError):
    """Ranks called collectives that do not fit together; the message shows both descriptors in full.

    State after: the group has ended on all its members; arrays of its calls under way hold unspecified values.
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
    """A rank died, went away without saying goodbye, or was out of reach for longer than is tolerated.

    Also raised where a rank gave up a collective that MPI does by itself; the message says why it did.

    State after: every group with that rank has ended; arrays of its calls under way hold unspecified values.
    """


class FrameError(TransportError):
    """Bytes arrived that do not fit the protocol or the receive they belong to.

    State after: the receive failed; where it was part of a collective, the group has ended on all its members.
    """


class DeviceError(TransportError):
    """A call of a device's driver failed; the message names the call and gives the driver's own words.

    Parameters
    ----------
    call : str
        The function of the driver.
    code : int
        What it returned.
    name, text : str
        The driver's name for that, and its description.

    State after: the collective that uses the device failed, and its group has ended on all its members. If `is_sticky`,
    this process cannot use the device any more.
    """

    # The device faulted (memory or links beyond repair, or a kernel that broke a rule), or its context is gone. CUDA
    # answers all later calls in the same way.
    _STICKY = frozenset({4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721})

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        super().__init__(call, code, name, text)
        self.call, self.code, self.name, self.text = call, code, name, text

    def __str__(self) -> str:
        return f"{self.call} failed with {self.name} ({self.code}): {self.text}"

    @property
    def is_sticky(self) -> bool:
        """Whether every later call on the device fails too. Copies under way have ended, with unspecified results."""
        return self.code in self._STICKY


class DeadlineMissed(TransportError, TimeoutError):
    """A call made no progress for its timeout, or a wait reached its deadline; the message names whom it waits for.

    State after: the group has ended on all its members; arrays of its calls under way hold unspecified values. Where
    `Work.wait` was given a timeout that passed, the call goes on and may be waited for again.
    """


class Closed(TransportError):
    """Use of something that was closed or aborted, or has failed; the cause is chained where there is one.

    State after: still closed.
    """
