"""The report in a real browser, where there is one: a silent console, and no phone has to scroll sideways."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pictures import call, send, trace
from test_report import MAP, measurement, put, row, sweep

from detcoll.cli import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for path in map(shutil.which, BROWSERS) if path is not None), None)
TIMEOUT_S = 60

pytestmark = pytest.mark.skipif(FOUND is None, reason=f"there is no browser: none of {', '.join(BROWSERS)}")

PROBE = """<script>
addEventListener("load", () => {
  const shown = (kind) => [...document.querySelectorAll("svg." + kind)].filter((one) => one.clientWidth > 0);
  const sizes = [...shown("wide"), ...shown("narrow")].map((one) => one.clientWidth / one.viewBox.baseVal.width);
  document.body.dataset.seen = [
    document.documentElement.scrollWidth - innerWidth, shown("wide").length, shown("narrow").length,
    Math.min(...sizes).toFixed(2), getComputedStyle(document.body).backgroundColor,
  ].join("|");
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


def browse(page: Path, width: int, profile: Path) -> tuple[str, str]:
    """Load a page; returns what it became, and what the console said."""
    assert FOUND is not None
    argv = [
        FOUND, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        f"--window-size={width},900",
        "--enable-logging=stderr", "--log-level=0", "--disable-background-networking", "--virtual-time-budget=2000",
        "--dump-dom", page.as_uri(),
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


@pytest.mark.parametrize(("width", "kind"), [(1200, "wide"), (540, "narrow")])
def test_the_page_fits_the_screen(page: Path, tmp_path: Path, width: int, kind: str) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    probed = page.with_name(f"probed{width}.html")
    probed.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    became, _ = browse(probed, width, tmp_path)
    found = re.search(r'data-seen="([^"]*)"', became)
    assert found is not None
    beyond, wide, narrow, least, colour = found.group(1).split("|")
    assert int(beyond) <= 0, "the page is wider than the screen"
    assert (int(wide) > 0, int(narrow) > 0) == (kind == "wide", kind == "narrow")
    assert float(least) >= 0.85, "labels shrink too far to be read"
    assert colour == "rgb(245, 246, 248)"
