"""Colours and styles, light and dark; no colour carries a meaning that a label, a dash or a pattern does not carry too.

Text and series colours keep a contrast of at least 4.5 to the surface they stand on (WCAG 2.2, 1.4.3), which a test
computes from these tables.
"""

from __future__ import annotations

LIGHT = {
    "page": "#f5f6f8", "surface": "#ffffff", "text": "#17202b", "muted": "#566270", "rule": "#dfe3e8",
    "s0": "#5b6673", "s1": "#0a5fbf", "s2": "#b0480a", "s3": "#0b7558", "s4": "#8438b4", "s5": "#a3234f",
}  # fmt: skip

DARK = {
    "page": "#0d1116", "surface": "#151b22", "text": "#e7ebf0", "muted": "#9daab8", "rule": "#2b343f",
    "s0": "#a9b4c0", "s1": "#6fb3ff", "s2": "#ffa364", "s3": "#55d0a8", "s4": "#d3a1ff", "s5": "#ff93b4",
}  # fmt: skip

SERIES = 6
"""Colours that tell series apart; the first is the grey of what all others are compared with."""


def series_class(index: int) -> str:
    """Return the class that gives its colour to series ``index``; the grey is never given twice."""
    return f"s{index if index < SERIES else 1 + (index - 1) % (SERIES - 1)}"


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_SERIES_RULES = "".join(f".s{index}{{--c:var(--s{index})}}" for index in range(SERIES))

STYLE = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    + _SERIES_RULES
    + """
.picture{display:block;width:100%;height:auto;font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.picture text{fill:var(--text)}
.picture .muted{fill:var(--muted)}
.picture .small{font-size:11.5px}
.picture .strong{font-weight:600}
.picture .number{font-variant-numeric:tabular-nums}
.picture text.halo{paint-order:stroke;stroke:var(--surface);stroke-width:4px;stroke-linejoin:round}
.picture .inside{fill:var(--surface);font-size:11.5px;font-weight:600}
.ground{fill:var(--surface)}
.rule{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--muted);stroke-width:1}
.mark{stroke:var(--text);stroke-width:1.5}
.dashed{stroke-dasharray:5 4}
.dotted{stroke-dasharray:2 3}
line.halo{stroke:var(--surface);stroke-width:4}
.whisker{stroke:var(--text);stroke-width:1.5}
.track{fill:var(--rule);opacity:.45}
.lane{fill:var(--rule);opacity:.3}
.fill{fill:var(--c)}
.edge{stroke:var(--surface);stroke-width:.75}
.range{fill:var(--c);opacity:.18}
.wedge{fill:var(--c);opacity:.13}
.curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.hollow{fill:var(--surface);stroke:var(--c);stroke-width:1.5}
.planned{fill:none;stroke:var(--c);stroke-width:1.25}
.hatch{stroke:var(--surface);stroke-width:2}
.guard{stroke:var(--muted);stroke-width:1}
.cross{stroke:var(--text);stroke-width:2;fill:none}
.link{stroke:var(--s1);fill:none}
.site{fill:var(--s1);stroke:var(--surface);stroke-width:1.5}
"""
)
