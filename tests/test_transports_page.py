"""The page about writing a transport quotes files as they are, and states sizes that are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from detcoll.mailbox import BEHIND, HELD_BYTES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "transports.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
QUOTES = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the docs are not installed")


def test_every_snippet_is_a_quote() -> None:
    assert len(QUOTES) >= 10
    assert len(QUOTES) == TEXT.count("```") // 2
    for path, quote in QUOTES:
        assert quote in (ROOT / path).read_text(encoding="utf-8"), f"{path} does not hold\n{quote}"


def test_figures_are_true() -> None:
    text = " ".join(TEXT.split())
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "transports" / "detcoll_tcp").glob("*.py"))
    assert lines < 150
    assert f"in {lines} lines" in text
    assert f"holds {HELD_BYTES // 2**20} MiB of each" in text
    assert f"up to {BEHIND} times as much" in text
    assert f"more than {BEHIND * HELD_BYTES // 2**30} GiB pile up" in text
