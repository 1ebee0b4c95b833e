"""The page about writing a transport quotes each step, and states sizes that are true; `test_pages` compares."""

from __future__ import annotations

import pytest
from pages import ROOT, blocks_of

from detcoll.mailbox import BEHIND, HELD_BYTES

PAGE = ROOT / "docs" / "guides" / "transports.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the docs are not installed")


def test_it_quotes_each_step() -> None:
    assert sum("quote" in block.said for block in blocks_of(PAGE)) >= 10


def test_figures_are_true() -> None:
    text = " ".join(TEXT.split())
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "transports" / "detcoll_tcp").glob("*.py"))
    assert lines < 160
    assert f"in {lines} lines" in text
    assert f"holds {HELD_BYTES // 2**20} MiB of each" in text
    assert f"up to {BEHIND} times as much" in text
    assert f"more than {BEHIND * HELD_BYTES // 2**30} GiB pile up" in text
