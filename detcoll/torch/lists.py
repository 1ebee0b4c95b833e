"""The lists of tensors that torch passes to a collective, taken apart, and checked against each other.

torch wraps most tensors in a list, and most lists in another one, though a process has one of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from detcoll.errors import UsageError
from detcoll.torch.tensors import name_of


def as_list(tensors: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Return a tensor or several as a list."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def only(tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the only tensor; raise UsageError if there are more, or none."""
    listed = as_list(tensors)
    if len(listed) != 1:
        raise UsageError(f"{len(listed)} tensors; expected one for each process")
    return listed[0]


def flat(lists: Any) -> list[Tensor]:
    """Return the tensors of a list, or of a list of lists."""
    return [each for row in lists or () for each in as_list(row)]


def inner(lists: Any) -> list[Tensor]:
    """Return the only list of a list of lists; torch also passes it bare, or nothing."""
    if lists and not isinstance(lists[0], Tensor):
        if len(lists) != 1:
            raise UsageError(f"{len(lists)} lists of tensors; expected one for each process")
        return list(lists[0])
    return list(lists or ())


def type_name(tensors: Sequence[Tensor]) -> str:
    """Return how a call names the type of its first tensor."""
    return name_of(tensors[0].dtype) if tensors else ""


LARGEST_SHAPE_NAME = 48


def shape_name(tensors: Sequence[Tensor]) -> str:
    """Return how a call names the shapes of its tensors: by one where they are all alike.

    Ranks compare it where torch asks for equal tensors, as its own checks do (TORCH_DISTRIBUTED_DEBUG=DETAIL): equal
    numbers of elements in other shapes are added up, or put together, in the wrong places.
    """
    first: tuple[int, ...] = tensors[0].shape
    if len(tensors) == 1 or are_alike(tensors):
        return _shortened(first)
    return _shortened(*[each.shape for each in tensors])


@lru_cache(1024)
def _shortened(*shapes: tuple[int, ...]) -> str:
    text = " ".join(str(tuple(each)) for each in shapes)
    if len(text) <= LARGEST_SHAPE_NAME:
        return text
    return f"{text[:32]}...~{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors have one shape."""
    return all(each.shape == tensors[0].shape for each in tensors)


def by_type(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors of each type, in the order of their first ones."""
    alike: dict[object, list[Tensor]] = {}
    for each in tensors:
        alike.setdefault(each.dtype, []).append(each)
    return list(alike.values()) or [[]]


def pairs_by_type(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return outputs and inputs by the type of the inputs; outputs without an input come with the first ones."""
    alike: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for index, given in enumerate(inputs):
        pair = alike.setdefault(given.dtype, ([], []))
        pair[0].extend(outputs[index : index + 1])
        pair[1].append(given)
    pairs = list(alike.values()) or [([], [])]
    pairs[0][0].extend(outputs[len(inputs) :])
    return pairs


def check_pairs(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Raise UsageError if there is not an output of the same type for each input."""
    if len(outputs) != len(inputs) or not inputs:
        raise UsageError(f"{len(outputs)} outputs for {len(inputs)} inputs; expected as many, and at least one")
    for index, (output, given) in enumerate(zip(outputs, inputs, strict=True)):
        at = f"[{index}]" if len(inputs) > 1 else ""
        check_types(output, given, f"output{at}", f"input{at}")


def check_sizes(tensors: Sequence[Tensor], expected: Sequence[int], name: str, as_what: str) -> None:
    """Raise UsageError where an entry of a list has another number of elements than expected."""
    for index, (each, count) in enumerate(zip(tensors, expected, strict=True)):
        if each.numel() != count:
            raise UsageError(f"{name}[{index}] has {each.numel()} elements; expected {count}, as {as_what}")


def check_types(output: Tensor, given: Tensor, name: str, given_name: str) -> None:
    """Raise UsageError if an output is not of the type of the input."""
    if output.dtype != given.dtype:
        raise UsageError(f"{name} has dtype {output.dtype}, {given_name} {given.dtype}; expected one type")


def uneven(tensors: Sequence[Tensor]) -> list[int] | None:
    """Return the sizes of tensors, or None if they are all the same."""
    counts = [each.numel() for each in tensors]
    return counts if len(set(counts)) > 1 else None
