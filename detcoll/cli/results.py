"""Options of the files that commands write their results to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cyclopts import Parameter

from detcoll.outputs import require_folder, require_writable

RESULTS_GROUP = "Results"
"""Heading in the help of commands."""


@Parameter(name="*", group=RESULTS_GROUP)
@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """A file for the results, and a directory for a report of them."""

    json: Path | None = None
    """File for the results."""

    report: Path | None = None
    """Directory for report.html and its results.json."""

    def require_writable(self) -> None:
        """Refuse what cannot be written, before anything is run.

        Raises
        ------
        UsageError
            Naming the option.
        """
        require_writable(self.json, "json")
        require_folder(self.report, "report")


NO_RESULTS = ResultOptions()
"""Nothing given."""
