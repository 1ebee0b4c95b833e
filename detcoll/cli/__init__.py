"""The ``detcoll`` command.

Commands are imported when they are asked for, so that each starts as fast as what it needs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cyclopts import App, CycloptsError

from detcoll.cli.examples import epilogue
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
COMMANDS = {
    "run": "Start the ranks of a program on this host.",
    "lab": "Run any command in an emulated wide-area network.",
    "measure": "Compare training across sites with one cluster.",
    "bench": "Time collectives.",
    "plan": "Show a topology's calendar, and what to reserve for it.",
    "simulate": "Simulate training across many sites.",
    "report": "Draw results and traces.",
    "doctor": "Say what this host lacks.",
}
for _name, _summary in COMMANDS.items():
    app.command(f"detcoll.cli.{_name}:{_name}", name=_name, help=_summary, help_epilogue=epilogue(_name))
app.register_install_completion_command(help="Install completion of commands and options for your shell.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names (the process's own arguments unless given) and return its exit code.

    An error that detcoll raises on purpose is shown as one line, with code 2 where the arguments are at fault and 1
    otherwise; with ``DETCOLL_LOG=debug`` the traceback comes before it. Where standard output is closed or full the
    code is never 0; see `detcoll.cli.terminal`.
    """
    try:
        with watched_output():
            return _carry_out(sys.argv[1:] if argv is None else argv, is_all=argv is None and _is_program())
    except OutputLost as error:
        return give_up_output(error)


def _is_program() -> bool:
    """Return whether this process runs the ``detcoll`` command, not a program that calls `main`."""
    program = sys.modules["__main__"]
    spec = getattr(program, "__spec__", None)
    name = Path(getattr(program, "__file__", None) or "").name if spec is None else spec.name
    return name in ("detcoll", "detcoll.__main__")


def _carry_out(given: Sequence[str], *, is_all: bool) -> int:
    try:
        with carrying_out(given, is_all=is_all):
            result = _call(given)
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


def _call(given: Sequence[str]) -> object:
    with _described_whole(given):
        return app(keep_script_options(given), exit_on_error=False)


@contextmanager
def _described_whole(given: Sequence[str]) -> Iterator[None]:
    """Let the help of the command that is called begin with its whole description, not with what lists say of it."""
    if not given or given[0] not in COMMANDS:
        yield
        return
    called = app[given[0]]
    called.help = None
    try:
        yield
    finally:
        called.help = COMMANDS[given[0]]
