"""Pictures of plans and traces as SVG, and traces for Perfetto. Pure: figures in, text out; no clock, no network.

Pictures take their width in pixels, so that a page can hold one for desks and one for phones.
"""

from __future__ import annotations

from detcoll.draw.charts import Axis, Bar, Curve, bar_chart, curve_chart
from detcoll.draw.cycle import Cycle, cycle_of_calendar, cycle_of_traces, cycle_picture
from detcoll.draw.map import Place, site_map
from detcoll.draw.markup import element, html_text, svg_text
from detcoll.draw.perfetto import chrome_trace
from detcoll.draw.timespace import Span, time_space, typical_call
from detcoll.draw.traces import RankTrace, read_rank_traces

__all__ = [
    "Axis",
    "Bar",
    "Curve",
    "Cycle",
    "Place",
    "RankTrace",
    "Span",
    "bar_chart",
    "chrome_trace",
    "curve_chart",
    "cycle_of_calendar",
    "cycle_of_traces",
    "cycle_picture",
    "element",
    "html_text",
    "read_rank_traces",
    "site_map",
    "svg_text",
    "time_space",
    "typical_call",
]
