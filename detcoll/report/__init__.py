"""The report of `detcoll measure --report` and `detcoll report`: result files and traces as one HTML page.

It is made from files only, so that it can be made again later, and on another machine.
"""

from __future__ import annotations

from detcoll.report.assembly import report, write_report
from detcoll.report.inputs import ReportInputs, TracedRun, forget_traces, gather

__all__ = ["ReportInputs", "TracedRun", "forget_traces", "gather", "report", "write_report"]
