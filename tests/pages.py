"""The blocks of a page in Markdown, and what the comment before each says of how it is tested.

A comment stands on the line before a fence, and holds some of these, separated by semicolons::

    <!-- file: train.py -->          the block is written to this file, which later blocks of the page use
    <!-- needs: lab, torch -->       it is left out where one of these is not here
    <!-- test adds: --rounds 1 -->   arguments that keep the last command of the block short
    <!-- prints -->                  some output of the commands before; figures may differ
    <!-- prints: exactly -->         the same, with these figures
    <!-- host: a -->                 blocks of several hosts, one after another on the page, which run at the same time;
                                     a host that comes again begins anew
    <!-- forked -->                 ranks of `detcoll run` are forked from a process that has imported torch, which is
                                     cheap; other blocks and tests show that the command starts them
    <!-- run by: .ci/run -->         that file carries the commands out
    <!-- quote: PATH -->             that file holds the block
    <!-- not run: WHY -->            it cannot be run
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(
    r"(?:^<!-- (?P<said>[^\n]*) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_KEYS = {"file", "needs", "test adds", "prints", "host", "forked", "run by", "quote", "not run"}


@dataclass(frozen=True)
class Block:
    """A fenced block, its language, and what is said of it."""

    language: str
    text: str
    said: dict[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> set[str]:
        """What has to be here."""
        return set(filter(None, self.said.get("needs", "").split(", ")))


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page, but for directives of the site."""
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["language"].startswith("{"):
            continue
        parts = [part.partition(":") for part in (match["said"] or "").split(";") if part.strip()]
        said = {key.strip(): value.strip() for key, _, value in parts}
        assert said.keys() <= _KEYS, f"{page.name}: {match['said']!r} says something else than {sorted(_KEYS)}"
        found.append(Block(match["language"], match["text"], said))
    return found
