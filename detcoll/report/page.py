"""The page of a report: one self-contained HTML file for wide and narrow screens, light and dark mode, and print.

It has no script and loads nothing: the content security policy in its head forbids both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from detcoll.draw import element
from detcoll.draw.style import STYLE

WIDE, NARROW = 920.0, 340.0
"""Widths in pixels. Each picture is drawn in both, and the width of the screen selects one: labels stay readable on a
phone."""

Draw = Callable[[float], Element]
"""Draws a picture of a given width."""

_PAGE_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.page{max-width:1000px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
.brand{margin:0;color:var(--muted);font-size:.875rem;letter-spacing:.04em}
h1{margin:.35rem 0 .6rem;font-size:clamp(1.55rem,1.1rem + 2.2vw,2.35rem);line-height:1.18;letter-spacing:-.015em;
text-wrap:balance}
h2{margin:0 0 .25rem;font-size:1.2rem;line-height:1.3}
h3{margin:1.4rem 0 .4rem;font-size:1rem}
p{margin:0 0 .8rem;max-width:46rem}
.lede{color:var(--muted);font-size:1.05rem}
section{margin-top:1.25rem;padding:1.4rem 1.5rem 1.5rem;background:var(--surface);border:1px solid var(--rule);
border-radius:10px}
section>p{color:var(--muted);font-size:.9375rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:.75rem;margin:1.5rem 0 0;padding:0;
list-style:none}
.tiles li{padding:.9rem 1.1rem;background:var(--surface);border:1px solid var(--rule);border-radius:10px}
.tiles .figure{display:block;font-size:1.75rem;font-weight:650;line-height:1.2;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tiles .what{display:block;color:var(--muted);font-size:.875rem;line-height:1.4}
figure{margin:1rem 0 0}
.narrow{display:none;max-width:520px}
.scroll{overflow-x:auto;margin-top:.8rem}
.scroll:focus-visible{outline:2px solid var(--s1);outline-offset:2px}
table{border-collapse:collapse;font-size:.8125rem;font-variant-numeric:tabular-nums;min-width:100%}
caption{text-align:left;color:var(--muted);padding-bottom:.4rem}
th,td{padding:.42rem 0 .42rem 1rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule);
font-weight:400}
thead th{color:var(--muted);vertical-align:bottom;white-space:normal}
th:first-child,td:first-child{text-align:left;padding-left:0}
tbody th{font-weight:600}
.notes{margin:.9rem 0 0;padding-left:1.1rem;font-size:.9375rem}
code{display:block;overflow-x:auto;padding:.7rem .9rem;background:var(--page);border:1px solid var(--rule);
border-radius:6px;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.25rem;margin:.9rem 0 0;font-size:.9375rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
@media (max-width:740px){.page{padding:1.5rem .75rem 3rem}section{padding:1.1rem 1rem}.wide{display:none}
.narrow{display:block}}
@media print{body{background:none}.page{padding:0;max-width:none}section,.tiles li{break-inside:avoid}
.wide{display:block}.narrow{display:none}}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, lede: str, tiles: Sequence[Element], sections: Sequence[Element]) -> Element:
    """Return the whole page.

    Parameters
    ----------
    title : str
        The main finding, in a sentence.
    lede : str
        What was measured.
    tiles : sequence of Element
        Key figures, from `tile`.
    sections : sequence of Element
        From `section`.
    """
    head = element(
        "head", None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, f"{title} - detcoll report"),
        element("style", None, STYLE + _PAGE_STYLE),
    )  # fmt: skip
    header = element(
        "header", None,
        element("p", {"class": "brand"}, "detcoll report"),
        element("h1", None, title),
        element("p", {"class": "lede"}, lede),
    )  # fmt: skip
    shown = element("ul", {"class": "tiles"}, *tiles) if tiles else None
    body = element("body", None, element("main", {"class": "page"}, header, shown, *sections))
    return element("html", {"lang": "en"}, head, body)


def tile(figure: str, what: str) -> Element:
    """Return one key figure with its description."""
    return element(
        "li", None, element("span", {"class": "figure"}, figure), element("span", {"class": "what"}, what)
    )  # fmt: skip


def section(heading: str, told: str, *content: Element | None) -> Element:
    """Return a section; ``told`` explains how to read it."""
    return element("section", None, element("h2", None, heading), element("p", None, told), *content)


def figure(draw: Draw) -> Element:
    """Return a picture in a wide and a narrow version."""
    made = element("figure", None)
    for width, kind in ((WIDE, "wide"), (NARROW, "narrow")):
        drawn = draw(width)
        drawn.set("class", f"{drawn.get('class', '')} {kind}")
        made.append(drawn)
    return made


def table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Element:
    """Return a table whose first column holds the row headings; it scrolls on narrow screens."""
    head = element("thead", None, element("tr", None, *(element("th", {"scope": "col"}, text) for text in headings)))
    lines = [
        element("tr", None, element("th", {"scope": "row"}, row[0]), *(element("td", None, text) for text in row[1:]))
        for row in rows
    ]
    made = element("table", None, element("caption", None, caption), head, element("tbody", None, *lines))
    return element("div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption}, made)


def notes(lines: Sequence[str]) -> Element | None:
    """Return a list of remarks, None if there are none."""
    return element("ul", {"class": "notes"}, *(element("li", None, text) for text in lines)) if lines else None


def facts(pairs: Sequence[tuple[str, str]]) -> Element:
    """Return a list of names and values, one pair on each line."""
    nodes: list[Element] = []
    for name, value in pairs:
        nodes += [element("dt", None, name), element("dd", None, value)]
    return element("dl", None, *nodes)


def heading(text: str) -> Element:
    """Return a subheading of a section."""
    return element("h3", None, text)
