"""The site: every public name has an entry, every variable a row, and messages are those of the code."""

from __future__ import annotations

import re
from importlib import import_module
from types import ModuleType

import pytest
from pages import ROOT

import detcoll
import detcoll.testing

DOCS = ROOT / "docs"
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
SOURCES = [path for folder in ("detcoll", "transports") for path in (ROOT / folder).rglob("*.py")]
OF_AUTHORS = ("errors", "topology", "transport", "mailbox", "endpoint", "stream", "discarding", "registry")
"""Modules for authors of transports, all public names of which are public."""

OWN = {
    f"DETCOLL_{name}"
    for name in ("JOB", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RENDEZVOUS_FD", "REPORTS", "SITES",
                 "MARKS", "TESTING_ORDER", "TESTING_WORLD", "IN_USER_NAMESPACE")
}  # fmt: skip
"""Variables by which detcoll tells processes something that it started itself."""

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the docs are not installed")


def entries(module: ModuleType) -> set[str]:
    """Return the names of a module that the reference describes."""
    name = re.escape(module.__name__)
    whole = re.search(rf"^\.\. automodule:: {name}\n((?:   .*\n)*)", REFERENCE, re.MULTILINE)
    single = set(re.findall(rf"^\.\. auto(?:function|class|data):: (?:{name}\.)?(\w+)$", REFERENCE, re.MULTILINE))
    if whole is None or ":members:" not in whole[1]:
        return single
    of_it = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return single | (set(module.__all__) if ":imported-members:" in whole[1] else of_it)


def test_every_public_name_has_an_entry() -> None:
    assert set(detcoll.__all__) - entries(detcoll) == {"DetcollError", "errors"}  # which have a page
    assert "DetcollError" in entries(detcoll.errors)
    assert set(detcoll.testing.__all__) <= entries(detcoll.testing)


def test_every_public_name_for_torch_has_an_entry() -> None:
    pytest.importorskip("torch")
    module = import_module("detcoll.torch")
    assert set(module.__all__) <= entries(module)


def test_every_module_that_guides_import_has_an_entry() -> None:
    guides = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "guides").glob("*.md")))
    imported = set(re.findall(r"^ *from (detcoll[\w.]*) import", guides, re.MULTILINE))
    assert len(imported) > 2
    assert {name for name in imported if not re.search(rf":: {re.escape(name)}(?:\.\w+)?$", REFERENCE, re.M)} == set()


@pytest.mark.parametrize("name", OF_AUTHORS)
def test_modules_of_authors_are_described(name: str) -> None:
    module = import_module(f"detcoll.{name}")
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert public
    assert public <= entries(module)


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in detcoll.__all__ if not getattr(detcoll, name).__doc__] == []


def test_every_variable_has_a_row() -> None:
    page = (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(DETCOLL_\w+)`", page))
    named = {name for path in SOURCES for name in re.findall(r"\bDETCOLL_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    assert told <= named
    assert named - told == OWN


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    page = (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    code = "".join(re.sub(r'"\s*\n?\s*f?"', "", path.read_text(encoding="utf-8")) for path in SOURCES)
    assert len(messages) > 15
    assert [message for message in messages if message not in code] == []


def test_no_page_links_to_nowhere() -> None:
    """Sphinx checks the pages of the site; nobody else checks the README, and headings that it links to."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^):]+)\)", readme)
    assert len(links) > 8
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}, (
            link
        )
