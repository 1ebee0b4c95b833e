"""The page of a report: one self-contained HTML file for wide and narrow screens, light and dark mode, and print.

It has no script and loads nothing: the content security policy in its head forbids both.
"""

from __future__ import annotations

import re
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
.page{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
.brand{margin:0;color:var(--muted);font-size:.875rem;letter-spacing:.04em}
h1{margin:.35rem 0 .6rem;font-size:clamp(1.55rem,1.1rem + 2.2vw,2.35rem);line-height:1.18;letter-spacing:-.015em;
text-wrap:balance}
h2{margin:0 0 .25rem;font-size:1.2rem;line-height:1.3}
h3{margin:1.4rem 0 .4rem;font-size:1rem}
.part{margin-top:3rem}
.part>h2{font-size:1.45rem}
.part section>h3{margin:0 0 .25rem;font-size:1.2rem}
h4{margin:1.4rem 0 .4rem;font-size:1rem}
.of{color:var(--muted);font-weight:400}
a{color:var(--s1)}
nav{margin-top:1.25rem;font-size:.9375rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.3rem;margin:0 0 .5rem;padding:0;list-style:none}
nav p{margin:.6rem 0 .1rem;font-weight:600}
nav a{display:inline-block;padding:.15rem 0}
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
table{border-collapse:collapse;font-size:.8125rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;color:var(--muted);padding-bottom:.4rem}
th,td{padding:.42rem 0 .42rem .8rem;text-align:right;border-bottom:1px solid var(--rule);font-weight:400}
thead th{color:var(--muted);vertical-align:bottom}
tbody th{font-weight:600}
tbody th:not(.last){white-space:nowrap}
tbody th,thead .name{text-align:left}
th:first-child,td:first-child{padding-left:0}
details{margin-top:.8rem;font-size:.9375rem}
summary{cursor:pointer;color:var(--s1)}
.notes{margin:.9rem 0 0;padding-left:1.1rem;font-size:.9375rem}
code{display:block;overflow-x:auto;padding:.7rem .9rem;background:var(--page);border:1px solid var(--rule);
border-radius:6px;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
.word{display:inline-block;max-width:100%}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.25rem;margin:.9rem 0 0;font-size:.9375rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
@media (max-width:740px){.page{padding:1.5rem .75rem 3rem}section{padding:1.1rem 1rem}.wide{display:none}
.narrow{display:block}.tiles{grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.5rem}
.tiles li{padding:.7rem .8rem}.tiles .figure{font-size:1.45rem}
nav ul{display:block}nav a{padding:.3rem 0}
table,caption,tbody{display:block}thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
tbody tr{display:flex;flex-wrap:wrap;gap:.35rem .5rem;padding:.7rem 0;border-bottom:1px solid var(--rule)}
tbody th,tbody td{display:block;padding:0;border:0;text-align:left;overflow-wrap:anywhere}
tbody th:not(.last)::after{content:","}
tbody tr::before{content:"";flex:0 0 100%;order:1;margin-bottom:-.35rem}
tbody td{flex:0 0 calc((100% - 1rem)/3);order:2}
tbody td::before{content:attr(data-heading);display:block;color:var(--muted);font-size:.75rem;line-height:1.35}}
@media print{body{background:none}.page{padding:0;max-width:none}section,.tiles li{break-inside:avoid}
.wide{display:block}.narrow{display:none}a{color:inherit}}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, lede: str, tiles: Sequence[Element], content: Sequence[Element]) -> Element:
    """Return the whole page, with a list of its sections.

    Parameters
    ----------
    title : str
        The main finding, in a sentence.
    lede : str
        What was measured.
    tiles : sequence of Element
        Key figures, from `tile`.
    content : sequence of Element
        From `part`, and then from `section`.
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
        element("p", {"class": "lede"}, _unbroken(lede)),
    )  # fmt: skip
    body = element(
        "body", None, element("main", {"class": "page"}, header, _tile_list(tiles), _contents(content), *content)
    )
    return element("html", {"lang": "en"}, head, body)


def _tile_list(tiles: Sequence[Element]) -> Element | None:
    return element("ul", {"class": "tiles"}, *tiles) if tiles else None


def _contents(content: Sequence[Element]) -> Element:
    """Return links to all sections, and give these the names that links need."""
    nodes: list[Element | None] = []
    single = element("ul")
    for index, node in enumerate(content, 1):
        if node.tag == "section":
            single.append(_link(node, f"{index}"))
            continue
        links = [_link(each, f"{index}-{at}") for at, each in enumerate(node.iter("section"), 1)]
        nodes += [element("p", None, _heading_text(node)), element("ul", None, *links)]
    if len(single):
        nodes += [element("p", None, "Traces, sites and files") if nodes else None, single]
    return element("nav", {"aria-label": "Contents"}, *nodes)


def _link(node: Element, number: str) -> Element:
    """Name a section by its place and heading, and return the entry that leads to it."""
    text = _heading_text(node)
    slug = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
    node.set("id", f"s{number}-{slug}"[:60].rstrip("-"))
    node[0].set("id", f"{node.get('id')}-heading")
    node.set("aria-labelledby", f"{node.get('id')}-heading")
    return element("li", None, element("a", {"href": f"#{node.get('id')}"}, text))


def _heading_text(node: Element) -> str:
    return node[0].text or ""


def tile(figure: str, what: str) -> Element:
    """Return one key figure with its description."""
    return element(
        "li", None, element("span", {"class": "figure"}, figure), element("span", {"class": "what"}, _unbroken(what))
    )  # fmt: skip


def _unbroken(text: str) -> str:
    """Return ``text`` with sizes and rates that do not break between figure and unit."""
    return re.sub(r"(?<=\d) (?=([KMGT]i?)?(B|bit/s)\b)", "\N{NO-BREAK SPACE}", text)


def section(heading: str, told: str, *content: Element | None) -> Element:
    """Return a section; ``told`` explains how to read it."""
    return element("section", None, element("h2", None, heading), element("p", None, told), *content)


def part(name: str, kind: str, told: Sequence[str], tiles: Sequence[Element], sections: Sequence[Element]) -> Element:
    """Return one of several results: its sections one level further down, each heading with the result's name.

    Parameters
    ----------
    name, kind : str
        Of the result: where it comes from, and what it is.
    told : sequence of str
        Its finding and its setup.
    tiles, sections : sequence of Element
        From `tile` and `section`.
    """
    for node in (node for each in sections for node in each.iter() if node.tag in _LOWER):
        node.tag = _LOWER[node.tag]
        node.append(element("span", {"class": "of"}, f" of {name}"))
    title = element("h2", None, f"{kind}: {name}")
    paragraphs = [element("p", None, _unbroken(text)) for text in told]
    return element("div", {"class": "part"}, title, *paragraphs, _tile_list(tiles), *sections)


_LOWER = {"h2": "h3", "h3": "h4"}


def figure(draw: Draw) -> Element:
    """Return a picture in a wide and a narrow version."""
    made = element("figure", None)
    for width, kind in ((WIDE, "wide"), (NARROW, "narrow")):
        drawn = draw(width)
        drawn.set("class", f"{drawn.get('class', '')} {kind}")
        made.append(drawn)
    return made


def table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> Element:
    """Return a table whose first ``names`` columns name the row; it scrolls where a word is wider than the page.

    On a phone each row stands as a block: its names, then every cell below its heading. Explicit roles keep it a table
    for screen readers there.
    """
    titles = [
        element("th", {"scope": "col", "role": "columnheader", "class": "name" if at < names else None}, text)
        for at, text in enumerate(headings)
    ]
    head = element("thead", {"role": "rowgroup"}, element("tr", {"role": "row"}, *titles))
    body = element("tbody", {"role": "rowgroup"}, *(_table_row(headings, row, names) for row in rows))
    made = element("table", {"role": "table"}, element("caption", None, caption), head, body)
    return element("div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption}, made)


def _table_row(headings: Sequence[str], row: Sequence[str], names: int) -> Element:
    cells: list[Element] = []
    for at, (heading, text) in enumerate(zip(headings, row, strict=True)):
        if at < names:
            last = "last" if at == names - 1 else None
            cells.append(element("th", {"role": "rowheader", "scope": "row", "class": last}, _unbroken(text)))
        else:
            cells.append(element("td", {"role": "cell", "data-heading": heading}, _unbroken(text)))
    return element("tr", {"role": "row"}, *cells)


def folded(summary: str, content: Element) -> Element:
    """Return ``content`` behind a line that opens it, without a script."""
    return element("details", None, element("summary", None, summary), content)


def notes(lines: Sequence[str]) -> Element | None:
    """Return a list of remarks, None if there are none."""
    return element("ul", {"class": "notes"}, *(element("li", None, text) for text in lines)) if lines else None


def facts(pairs: Sequence[tuple[str, str]]) -> Element:
    """Return a list of names and values, one pair on each line."""
    nodes: list[Element] = []
    for name, value in pairs:
        nodes += [element("dt", None, name), element("dd", None, value)]
    return element("dl", None, *nodes)


def command(text: str) -> Element:
    """Return a command line whose options are not broken at their hyphens."""
    made = element("code", None)
    for word in text.split(" "):
        if len(made):
            made[-1].tail = " "
        made.append(element("span", {"class": "word"}, word))
    return made


def heading(text: str) -> Element:
    """Return a subheading of a section."""
    return element("h3", None, text)
