"""The report in a real browser, where there is one: a silent console, and no phone has to scroll sideways."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pictures import call, send, trace
from test_report import MAP, measurement, put, row, sweep

from detcoll.cli import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for path in map(shutil.which, BROWSERS) if path is not None), None)
TIMEOUT_S = 60

pytestmark = pytest.mark.skipif(FOUND is None, reason=f"there is no browser: none of {', '.join(BROWSERS)}")

PROBE = """<script>
const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
const covered = (svg) => {
  const texts = [...svg.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
  return texts.flatMap(([text, box], at) =>
    texts.slice(at + 1).filter(([, other]) => overlap(box, other)).map(([other]) => `${text} / ${other}`));
};
const leaving = (svg) => {
  const room = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.left < room.left - 1 || box.right > room.right + 1 || box.bottom > room.bottom + 1;
  }).map((one) => one.textContent);
};
addEventListener("load", () => {
  const shown = (kind) => [...document.querySelectorAll("svg." + kind)].filter((one) => one.clientWidth > 0);
  const all = [...shown("wide"), ...shown("narrow")];
  const scrolling = [...document.querySelectorAll("div, code, table")]
    .filter((one) => one.scrollWidth > one.clientWidth + 1);
  parent.document.body.dataset.seen = JSON.stringify({
    width: innerWidth, beyond: document.documentElement.scrollWidth - innerWidth,
    wide: shown("wide").length, narrow: shown("narrow").length,
    least: Math.min(...all.map((one) => one.clientWidth / one.viewBox.baseVal.width)),
    covered: all.flatMap(covered), leaving: all.flatMap(leaving),
    scrolling: scrolling.map((one) => one.textContent.slice(0, 60)),
    colour: getComputedStyle(document.body).backgroundColor,
  });
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of picture."""
    folder = tmp_path_factory.mktemp("report")
    for rank in range(2):
        told = trace(rank, rank, collectives=[call(0, 50)], sends=[send(5, 10, 1 - rank)])
        put(folder / "traces" / f"rank{rank}.json", told)
    paths = [put(folder / "m.json", measurement()), put(folder / "b.json", sweep(row(4), row(4096))), folder / "traces"]
    (folder / "map.toml").write_text(MAP)
    assert main(["report", *map(str, paths), str(folder / "map.toml"), "--out", str(folder)]) == 0
    return folder / "report.html"


def browse(page: Path, width: int, profile: Path, *flags: str) -> tuple[str, str]:
    """Load a page; returns what it became, and what the console said."""
    assert FOUND is not None
    argv = [
        FOUND, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        f"--window-size={width},900",
        "--enable-logging=stderr", "--log-level=0", "--disable-background-networking", "--virtual-time-budget=2000",
        *flags, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    env = dict(os.environ) | {"HOME": str(profile)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=env)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_the_console_stays_silent(page: Path, tmp_path: Path) -> None:
    became, console = browse(page, 1200, tmp_path)
    assert "<svg" in became
    assert console == ""
    noisy = page.with_name("noisy.html")
    noisy.write_text(page.read_text(encoding="utf-8").replace("</body>", "<script>1</script></body>"), encoding="utf-8")
    assert "Content Security Policy" in browse(noisy, 1200, tmp_path)[1], "the console is heard"


def probed(page: Path, width: int, profile: Path, *flags: str) -> dict[str, Any]:
    """Return what the page looks like in a frame of a width, since no window of a browser is as narrow as a phone."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    inner = html.escape(text.replace("</body>", f"{PROBE}</body>"))
    frame = page.with_name(f"frame{width}.html")
    frame.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<body><iframe width="{width}" height="900" style="border:0" srcdoc="{inner}"></iframe></body>',
        encoding="utf-8",
    )
    became, _ = browse(frame, max(width + 40, 600), profile, *flags)
    found = re.search(r'<body data-seen="([^"]*)"', became)
    assert found is not None
    return json.loads(html.unescape(found.group(1)))


@pytest.mark.parametrize(("width", "kind"), [(1280, "wide"), (760, "wide"), (390, "narrow")])
def test_the_page_fits_the_screen(page: Path, tmp_path: Path, width: int, kind: str) -> None:
    seen = probed(page, width, tmp_path)
    assert abs(seen["width"] - width) <= 20
    assert seen["beyond"] <= 0, "the page is wider than the screen"
    assert (seen["wide"] > 0, seen["narrow"] > 0) == (kind == "wide", kind == "narrow")
    assert seen["covered"] == []
    assert seen["leaving"] == []
    if width != 760:
        assert seen["scrolling"] == [], "nothing has to be scrolled sideways"
        assert seen["least"] >= 0.9, "labels shrink too far to be read"


def test_the_page_follows_the_readers_setting(page: Path, tmp_path: Path) -> None:
    assert probed(page, 390, tmp_path)["colour"] == "rgb(245, 246, 248)"
    dark = probed(page, 390, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert dark["colour"] == "rgb(13, 17, 22)"
