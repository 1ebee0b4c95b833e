"""Makes `detcoll bench`, `detcoll measure` and the benchmarks built on them fork their ranks in tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from forked import PLAIN, launch_forked

from detcoll.cli import main
from detcoll.emulation.lab import Lab
from detcoll.measure.aggregate import Setting
from detcoll.measure.runner import Runner


def fork_ranks_of_runs(patch: pytest.MonkeyPatch, modules: tuple[str, ...] = PLAIN) -> None:
    """Make each `Runner` in this process fork its ranks, on this host and in the lab; mpiexec still starts its own."""
    as_users_do = Runner._run_apart

    def launched(runner: Runner, argv: Sequence[str], env: Mapping[str, str], logs: Path, lab: Lab | None) -> int:
        program, *arguments = argv[1:]
        if program == "-m":
            name, *arguments = arguments
            spec = find_spec(name)
            assert spec is not None
            program = str(spec.origin)
        done = launch_forked(
            runner._topology.size, program, *arguments, modules=modules, environ=env, timeout_s=runner._deadline_s,
            lab=lab,
        )  # fmt: skip
        (logs / "ranks.out").write_text(done.out)
        sys.stderr.write(done.err)
        return done.code

    def apart(
        runner: Runner, lab: Lab, setting: Setting, argv: Sequence[str], env: Mapping[str, str], logs: Path
    ) -> int:
        if setting.transport == "mpi":
            return as_users_do(runner, lab, setting, argv, env, logs)
        return launched(runner, argv, env, logs, lab)

    def together(
        runner: Runner, argv: Sequence[str], env: Mapping[str, str], logs: Path, told: Sequence[Mapping[str, str]]
    ) -> int:
        assert not any(told), "those of a relay are started"
        return launched(runner, argv, env, logs, None)

    patch.setattr(Runner, "_run_apart", apart)
    patch.setattr(Runner, "_run_together", together)


def command_here(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of detcoll in this process, and answer as `subprocess.run`; `lab` gets a process of its own."""
    assert list(argv[1:3]) == ["-m", "detcoll"]
    if argv[3] == "lab":
        return subprocess.run(argv, **options)
    environ = mock.patch.dict(os.environ, options.get("env") or {})
    with environ, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(list(argv[3:]))
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
