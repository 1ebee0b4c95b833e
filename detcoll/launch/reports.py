"""Error reports of ranks: sent to their launcher, which tells once what several ranks report.

A rank whose program ends with an exception sends the text that it would print to its launcher, as one message over a
socket that all ranks share. A message arrives whole or not at all, and those of several processes never mix. Whatever
else a rank prints goes its usual way: it is neither held nor compared.

The launcher writes the first report of its kind at once. Equal reports of other ranks are counted, and one line at the
end names these ranks. Two reports are equal if their texts are, or if they differ only in that each names its own rank:
"rank 1 is behind" of rank 1 and "rank 2 is behind" of rank 2. Reports that differ in anything else are all written, and
so is each that a rank repeats.

A rank sends nothing, and prints its report, if the launcher is gone, if the report is longer than `LARGEST_BYTES`, or
if its standard error leads elsewhere than its launcher made it, such as to a file of its own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

VARIABLE = "DETCOLL_REPORTS"
"""The variable that tells a rank its number and the descriptor of the socket, and how to recognise socket and standard
error."""

LARGEST_BYTES = 65536


def address(descriptor: int, rank: int, stderr: int) -> dict[str, str]:
    """Return the variables by which a process that inherits ``descriptor`` and ``stderr`` reports as ``rank``."""
    return {VARIABLE: ":".join(map(str, (rank, descriptor, *_identity(descriptor), *_identity(stderr))))}


def may_send(environ: Mapping[str, str]) -> bool:
    """Return whether `send` has a launcher to send to. From here on, programs that are started do not inherit it."""
    found = _find(environ)
    if found is not None:
        os.set_inheritable(found[1], False)
    return found is not None


def send(environ: Mapping[str, str], text: bytes) -> bool:
    """Send a report to the launcher, and return whether it took it; otherwise it has to be printed."""
    found = _find(environ)
    if found is None:
        return False
    rank, descriptor = found
    message = b"%d %b" % (rank, text)
    if len(message) > LARGEST_BYTES:
        return False
    try:
        return os.write(descriptor, message) == len(message)
    except OSError:
        return False


def parse(message: bytes, size: int) -> tuple[int, bytes]:
    """Return the rank, below ``size``, and the text of a message that `send` wrote.

    Of any other message, which a program wrote to a descriptor that is not its own, return rank 0 and all of it.
    """
    found = re.match(rb"([0-9]{1,9}) ", message)
    if found is None or int(found[1]) >= size:
        return 0, message
    return int(found[1]), message[found.end() :]


def _find(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the rank and the descriptor, if it is still the launcher's socket and standard error is the launcher's.

    A program that a rank starts has the variable too, and may have another file with this number.
    """
    try:
        rank, descriptor, *expected = map(int, environ[VARIABLE].split(":"))
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        is_same = [*_identity(descriptor), *_identity(2)] == expected
    except (KeyError, ValueError, OverflowError, OSError):
        return None
    return (rank, descriptor) if is_socket and is_same else None


def _identity(descriptor: int) -> tuple[int, int]:
    state = os.fstat(descriptor)
    return state.st_dev, state.st_ino


@dataclass(slots=True)
class _Group:
    """A report that was written, and the ranks that reported the same; ``own``: with their own number in it."""

    first: int
    same: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)

    @property
    def ranks(self) -> set[int]:
        return {self.first, *self.same, *self.own}


class Reports:
    """Decides which reports of a job of ``size`` ranks are written; without sockets."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._groups: list[_Group] = []
        self._by_text: dict[bytes, _Group] = {}
        self._by_own: dict[bytes, _Group] = {}

    def take(self, rank: int, text: bytes, *, is_tagged: bool = False) -> bytes | None:
        """Take a report and return what to write of it: the text with the rank before it; None if it is only counted.

        ``is_tagged`` : each line will begin with the rank anyway, so that the text stays as it is.
        """
        own = re.sub(rb"\brank %d\b" % rank, b"rank *", text)
        names_itself = own != text
        group = self._by_text.get(text)
        if group is not None and rank not in group.ranks:
            group.same.append(rank)
            return None
        group = self._by_own.get(own) if names_itself else None
        if group is not None and rank not in group.ranks:
            group.own.append(rank)
            return None
        self._groups.append(_Group(rank))
        self._by_text[text] = self._groups[-1]
        if names_itself:
            self._by_own[own] = self._groups[-1]
        return text if is_tagged else _named(rank, text)

    def has_of(self, rank: int) -> bool:
        """Return whether ``rank`` reported anything."""
        return any(rank in group.ranks for group in self._groups)

    def closing(self) -> str | None:
        """Return the line that names the ranks whose reports were only counted; None if there are none."""
        groups = [group for group in self._groups if group.same or group.own]
        if not groups:
            return None
        if len(groups) == 1 and len(groups[0].ranks) == self._size and not (groups[0].same and groups[0].own):
            said = f"all {self._size} ranks reported the same error{_OWN if groups[0].own else ''}"
        else:
            said = "; ".join(
                f"{_list(ranks)} reported the same as rank {group.first}{more}"
                for group in groups
                for ranks, more in ((group.same, ""), (group.own, _OWN))
                if ranks
            )
        return f"{said}; DETCOLL_LOG=debug shows each report"


_OWN = ", each with its own number"
_PREFIX = b"detcoll: "


def _named(rank: int, text: bytes) -> bytes:
    if text.startswith(_PREFIX):
        return b"%brank %d: %b" % (_PREFIX, rank, text.removeprefix(_PREFIX))
    return b"%brank %d:\n%b" % (_PREFIX, rank, text)


def _list(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))
