"""The ``detcoll`` command.

Commands are imported when they are asked for, so that each starts as fast as what it needs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from detcoll.cli.invocation import carrying_out
from detcoll.cli.splitting import keep_script_options
from detcoll.cli.terminal import PlainConsole, give_up_output, watched_output
from detcoll.errors import DetcollError, UsageError
from detcoll.outputs import OutputLost
from detcoll.version import VERSION

USAGE, FAILURE, INTERRUPTED = 2, 1, 130

app = App(
    name="detcoll",
    help="Collective communication for training that spans sites.",
    version=VERSION,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    console=PlainConsole(),
    error_console=PlainConsole(stderr=True),
)
app.command("detcoll.cli.run:run", name="run", help="Start the ranks of a program on this host.")
app.command("detcoll.cli.lab:lab", name="lab", help="Run any command in an emulated wide-area network.")
app.command("detcoll.cli.measure:measure", name="measure", help="Compare training across sites with one cluster.")
app.command("detcoll.cli.bench:bench", name="bench", help="Time collectives.")
app.command("detcoll.cli.plan:plan", name="plan", help="Show a topology's calendar, and what to reserve for it.")
app.command("detcoll.cli.simulate:simulate", name="simulate", help="Simulate training across many sites.")
app.command("detcoll.cli.report:report", name="report", help="Draw results and traces.")
app.command("detcoll.cli.doctor:doctor", name="doctor", help="Say what this host lacks.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names (the process's own arguments unless given) and return its exit code.

    An error that detcoll raises on purpose is shown as one line, with code 2 where the arguments are at fault and 1
    otherwise; with ``DETCOLL_LOG=debug`` the traceback comes before it. Where standard output is closed or full the
    code is never 0; see `detcoll.cli.terminal`.
    """
    try:
        with watched_output():
            return _carry_out(sys.argv[1:] if argv is None else argv)
    except OutputLost as error:
        return give_up_output(error)


def _carry_out(given: Sequence[str]) -> int:
    try:
        with carrying_out(given):
            result = app(keep_script_options(given), exit_on_error=False)
    except CycloptsError:  # cyclopts has shown it
        return USAGE
    except DetcollError as error:
        if os.environ.get("DETCOLL_LOG", "").lower() == "debug":
            traceback.print_exc()
        print(f"detcoll: {error}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILURE
    except KeyboardInterrupt:
        print("detcoll: interrupted", file=sys.stderr)
        return INTERRUPTED
    return result if isinstance(result, int) else 0
