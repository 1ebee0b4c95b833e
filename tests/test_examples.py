"""The examples run under every launcher that is installed, and what trains gives one loss curve under all of them."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from forked import TORCH, launch_forked

from detcoll.emulation.lab import Lab, why_unavailable
from detcoll.launch.mpiexec import find_mpiexec
from detcoll.topology import Topology
from detcoll.workloads.digits import save_digits

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TIMEOUT_S = 180
RANKS = "2"
BIN = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
MPIEXEC, TORCHRUN = find_mpiexec(), shutil.which("torchrun", path=BIN)

LINES = ["--rate", "1 Gbit/s", "--round-trip", "4 ms"]
LAUNCHERS = {
    "detcoll run": [sys.executable, "-m", "detcoll", "run", "-n", RANKS],
    "mpiexec": [*(MPIEXEC.command(RANKS) if MPIEXEC else []), sys.executable],
    "torchrun": [TORCHRUN or "torchrun", "--nproc-per-node", RANKS],
}
WHY_NOT = {
    "mpiexec": None if MPIEXEC and find_spec("mpi4py") else "MPI is not installed",
    "torchrun": None if TORCHRUN else "torchrun is not installed",
}
IS_BACKEND = any(point.name == "detcoll" for point in entry_points(group="torch.backends"))
WHY_NOT_TORCH = (
    None
    if find_spec("torch") and IS_BACKEND
    else "torch is not installed, or detcoll is not, so torch does not know it"
)
HAS_DIGITS = find_spec("sklearn") is not None
STAND_IN = """
import numpy as np

def load_digits(return_X_y):
    with np.load({path!r}) as data:
        return data["pixels"] * 16, data["labels"]
"""

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not installed"),
    pytest.mark.timeout(200),
]


def run(launcher: str, script: str, *arguments: str, more: Mapping[str, str] | None = None) -> str:
    """Run an example and return what it prints; where ``script`` begins with a dash, the launcher is told the rest."""
    if (reason := WHY_NOT.get(launcher)) is not None:
        pytest.skip(reason)
    argv = [*LAUNCHERS[launcher], script if script.startswith("-") else str(EXAMPLES / script), *arguments]
    environ = os.environ | (MPIEXEC.environment if MPIEXEC else {}) | dict(more or {})
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_forked(ranks: int, script: str, *arguments: str, more: Mapping[str, str], lab: Lab | None = None) -> list[str]:
    """Run an example of torch where it proves nothing how ranks start, and return the lines that it prints."""
    done = launch_forked(
        ranks, str(EXAMPLES / script), *arguments, modules=TORCH, environ=more, timeout_s=TIMEOUT_S, lab=lab
    )
    # Threads of Gloo that still free objects of Python when that ends abort the process, after all was printed.
    aborted = "gloo" in arguments and "terminate called without an active exception" in done.err
    assert done.code == 0 or aborted, done.out + done.err
    return done.out.splitlines()


def what_is_needed(script: str) -> list[str]:
    """The extras that the text of an example says it needs, those of its variants included."""
    text = ast.get_docstring(ast.parse((EXAMPLES / script).read_text())) or ""
    said = text.partition("Needs: ")[2]
    assert said.startswith("``pip install -e "), f"{script} does not say what it needs"
    return [extra for listed in re.findall(r"\.\[([\w,]+)\]", said) for extra in listed.split(",")]


@cache
def makers_of_modules() -> Mapping[str, list[str]]:
    """Which projects are installed that bring a module; looking through them takes a while."""
    return packages_distributions()


@pytest.mark.parametrize(
    ("scripts", "extras"),
    [
        *(([f"examples/{path.name}"], None) for path in sorted(EXAMPLES.glob("*.py"))),
        ([f"benchmarks/{name}" for name in ("conftest.py", "bench_all_reduce.py", "bench_broadcast.py")], ["bench"]),
    ],
)
def test_what_is_needed_brings_what_is_imported(scripts: list[str], extras: list[str] | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = what_is_needed(Path(scripts[0]).name) if extras is None else extras
    brought = [*project["dependencies"], *(line for one in needed for line in project["optional-dependencies"][one])]
    projects = {"detcoll", *(re.match(r"[\w.-]+", line)[0].lower() for line in brought)}
    for script in scripts:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"detcoll"}:
                makers = {name.lower() for name in makers_of_modules()[module]}
                assert makers & projects, f"{script} imports {module}, which {needed or 'nothing'} does not bring"


of_torch = pytest.mark.skipif(WHY_NOT_TORCH is not None, reason=str(WHY_NOT_TORCH))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What gives examples the same digits without scikit-learn, whose import takes longer than they learn."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "sklearn").mkdir()
    save_digits(folder / "digits.npz")
    (folder / "sklearn" / "__init__.py").touch()
    (folder / "sklearn" / "datasets.py").write_text(STAND_IN.format(path=str(folder / "digits.npz")))
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture(scope="module")
def curve() -> list[str]:
    if not HAS_DIGITS:
        pytest.skip("scikit-learn is not installed")
    return run("detcoll run", "02_digits.py", "--iterations", "21").splitlines()


@pytest.mark.parametrize("launcher", ["detcoll run", "mpiexec"])
def test_all_reduce(launcher: str) -> None:
    assert run(launcher, "01_all_reduce.py").count("every element is 3") == 1


def test_digits_learn(curve: list[str]) -> None:
    losses = [float(line.split()[-1]) for line in curve if line.startswith("iteration")]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 2
    assert float(curve[-1].split()[-1]) > 0.7


@pytest.fixture(scope="module")
def under_torchrun(digits: dict[str, str]) -> list[str]:
    """What the examples of NumPy and of DDP print in one job of torchrun, which takes long to start."""
    scripts = ["02_digits.py"] if WHY_NOT_TORCH else ["02_digits.py", "05_ddp.py"]
    commands = [shlex.join([sys.executable, str(EXAMPLES / name), "--iterations", "21"]) for name in scripts]
    return run("torchrun", "--no-python", "sh", "-c", " && ".join(commands), more=digits).splitlines()


def test_digits_have_one_loss_curve_under_torchrun(curve: list[str], under_torchrun: list[str]) -> None:
    assert under_torchrun[: len(curve)] == curve


def test_digits_have_one_loss_curve_under_mpiexec(curve: list[str], digits: dict[str, str]) -> None:
    assert run("mpiexec", "02_digits.py", "--iterations", "21", more=digits).splitlines() == curve


def test_digits_over_mpi_have_the_same_loss_curve(curve: list[str], digits: dict[str, str]) -> None:
    assert run("mpiexec", "03_digits_mpi.py", "--iterations", "21", more=digits).splitlines() == curve


def test_own_transport_serves_the_facade() -> None:
    assert "2 ranks over unix: every element is 3" in run("detcoll run", "04_own_transport.py")


def test_own_transport_passes_the_contract() -> None:
    argv = [sys.executable, "-m", "pytest", "-q", str(EXAMPLES / "04_own_transport.py")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def losses(printed: list[str]) -> list[str]:
    """What an example of torch prints of its losses, to the last digit."""
    return [line for line in printed if line.startswith("iteration")]


@of_torch
def test_a_ddp_script_changes_its_backend_by_one_word(under_torchrun: list[str], digits: dict[str, str]) -> None:
    over_gloo = run_forked(2, "05_ddp.py", "--iterations", "21", "--backend", "gloo", more=digits)
    assert len(over_gloo) == 4
    assert under_torchrun[-4:] == over_gloo  # with two ranks a sum has one order
    assert float(over_gloo[-1].removeprefix("accuracy ")) > 0.6


@of_torch
@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_hybrid_sharding_has_one_loss_curve_wherever_and_whatever_carries_the_sites(digits: dict[str, str]) -> None:
    if tuple(map(int, re.findall(r"\d+", version("torch"))[:2])) < (2, 10):
        pytest.skip("torch is older than 2.10")
    mixed, apart = ["--iterations", "11", "--backend", "gloo"], ["--iterations", "11"]
    together = run_forked(4, "07_hsdp.py", *mixed, more=digits | {"DETCOLL_SITES": "2"})
    with Lab(Topology.uniform(2, 2, 125e6, 2_000_000)) as lab:
        across = run_forked(4, "07_hsdp.py", *apart, more=digits, lab=lab)
    assert len(losses(across)) == 2
    assert together == across  # two ranks a site, so Gloo adds in the same order


@of_torch
@pytest.mark.lab
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_measure_times_an_unmodified_script_with_one_loss_curve_in_one_cluster_and_in_two_sites(tmp_path: Path) -> None:
    result, program = tmp_path / "measured.json", tmp_path / "program"
    script = shlex.join([sys.executable, str(EXAMPLES / "06_transformer.py")])
    program.write_text(f'#!/bin/sh\nexec {script} "$@" >> "{tmp_path}/$DETCOLL_TRANSPORT"\n')  # what it prints is kept
    program.chmod(0o755)
    argv = [
        sys.executable, "-m", "detcoll", "measure", "--rounds", "1", "--against", "none", "--ranks-per-site", "1",
        *LINES, "--json", str(result), "--", str(program), "--iterations", "4",
    ]  # fmt: skip
    environ = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads(result.read_bytes())["runs"]
    assert [len(one["iteration_s"]["samples"]) for one in runs] == [3, 3]
    assert "in one cluster and" in done.stdout
    together, apart = (losses((tmp_path / transport).read_text().splitlines()) for transport in ("shm", "slotted"))
    assert len(together) == 2
    assert together == apart
