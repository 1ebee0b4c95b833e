"""The report of `detcoll measure --report` and `detcoll report`: what result files and traces say, as one page.

It is made from files alone, so that it can be made again, and elsewhere, from what a run has left.
"""

from __future__ import annotations

from detcoll.report.assembly import report, write_report
from detcoll.report.inputs import ReportInputs, TracedRun, forget_traces, gather

__all__ = ["ReportInputs", "TracedRun", "forget_traces", "gather", "report", "write_report"]
