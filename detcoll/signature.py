"""What a call of each collective takes, and which collectives there are.

The files of `detcoll.plan.collectives` declare the kinds when detcoll is imported. What must not know plans, such as
descriptors and transports, asks here what a call of a kind takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from detcoll.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a call of a collective takes.

    ``name`` : the name of the kind, and of its method of `Communicator`.  ``has_array`` : the call takes an array.
    ``has_op`` : it takes a reduction operator.  ``has_root`` : it takes a root rank.
    ``has_out`` : input and output are different arrays.  ``has_counts`` : blocks of ranks may differ in size.
    ``is_pairwise`` : then each rank states its own sizes, for what it sends to and gets from every other.
    """

    name: str
    has_array: bool = True
    has_op: bool = False
    has_root: bool = False
    has_out: bool = False
    has_counts: bool = False
    is_pairwise: bool = False


DECLARED: dict[str, Signature] = {}
"""Every kind by its name, in the order in which they were declared."""


def declare(signature: Signature) -> None:
    """Make a kind known.

    Raises
    ------
    UsageError
        If there is one of that name.
    """
    if signature.name in DECLARED:
        raise UsageError(f"kind={signature.name!r} is declared already")
    DECLARED[signature.name] = signature


def signature_of(kind: str) -> Signature:
    """Return what a call of ``kind`` takes.

    Raises
    ------
    UsageError
        If no collective has that name.
    """
    known = DECLARED.get(kind)
    if known is None:
        raise UsageError(f"kind={kind!r} is not a collective known here; expected one of {', '.join(DECLARED)}")
    return known
