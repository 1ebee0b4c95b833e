"""The blocks of pages that say what to type: Python is typed, commands run and print what the page says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from forked import TORCH, launch_forked
from jobs import environment, free_port
from pages import ROOT, Block, blocks_of

import detcoll
from detcoll.emulation.lab import why_unavailable
from detcoll.launch.mpiexec import find_mpiexec

DOCS = ROOT / "docs"
PAGES = [
    page for page in (ROOT / "README.md", DOCS / "report.md", *sorted((DOCS / "guides").glob("*.md"))) if page.exists()
]
TIMEOUT_S = 300
PACKAGES = Path(detcoll.__file__).parent.parent
MPIEXEC = find_mpiexec() if find_spec("mpi4py") else None
PACKAGED = ("lightning", "accelerate", "transformers", "torchft")
MISSING = {
    "lab": why_unavailable(),
    "mpi": None if MPIEXEC else "MPI is not installed",
    **{
        name: None if find_spec(module) else f"{name} is not installed"
        for name, module in {"torch": "torch", "digits": "sklearn", **{name: name for name in PACKAGED}}.items()
    },
    "backend": None if entry_points(group="torch.backends", name="detcoll") else "torch cannot find this detcoll",
}
"""Why what blocks need is not here, or None."""

MYPY = """
[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,lightning.*,accelerate.*,transformers.*,ray.*,torchft.*]
follow_imports = skip
ignore_missing_imports = True
"""

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="the pages are not installed"),
    pytest.mark.timeout(2 * TIMEOUT_S),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Reader:
    """Carries out the blocks of a page in a folder, as a reader would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, ""
        own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOST": "127.0.0.1"}
        mpi = {**MPIEXEC.environment, **MPIEXEC.files_in(str(folder))} if MPIEXEC else {}
        self.environ = environment({**own, **mpi, "DETCOLL_RECORD": str(folder / "records")})
        self.port = str(free_port())

    def start(self, block: Block) -> subprocess.Popen[str]:
        text = block.text.rstrip("\n").replace("29500", self.port)
        command = "\n".join(["set -e -o pipefail", f"{text} {block.said.get('test adds', '')}"])
        return subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def carry_out(self, blocks: list[Block]) -> None:
        """Run blocks at the same time, and keep what they print."""
        started = [self.start(block) for block in blocks]
        try:
            outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for block, process, output in zip(blocks, started, outputs, strict=True):
            assert process.returncode == 0, f"{block.text}\nended with {process.returncode}:\n{output}"
        self.output = "\n".join(outputs)

    def fork(self, block: Block) -> None:
        """Carry out a `detcoll run` on forked ranks, and keep what they print."""
        told = re.fullmatch(r"detcoll run -n (\d)(?: --sites (\d))? (\S+\.py)(.*)\n", block.text)
        assert told, f"ranks of this cannot be forked:\n{block.text}"
        sites = {"DETCOLL_SITES": told[2]} if told[2] else {}
        ended = launch_forked(
            int(told[1]), str(self.folder / told[3]), *told[4].split(), modules=TORCH,
            environ=self.environ | sites, timeout_s=TIMEOUT_S,
        )  # fmt: skip
        self.output = ended.out + ended.err
        assert ended.code == 0, f"{block.text}\nended with {ended.code}:\n{self.output}"

    def take(self, block: Block) -> None:
        """Write a file, compare an output, or run the block."""
        if "file" in block.said:
            (self.folder / block.said["file"]).write_text(block.text, encoding="utf-8")
        elif "prints" in block.said:
            seen = str.strip if block.said["prints"] == "exactly" else masked
            printed = [seen(line) for line in self.output.splitlines()]
            for line in filter(str.strip, block.text.splitlines()):
                assert seen(line) in printed, f"{line!r} is not printed; this is:\n{self.output}"
        elif "forked" in block.said:
            self.fork(block)
        else:
            assert block.language in {"sh", "python"}, f"say how this is tested:\n{block.text}"
            if block.language == "python":
                (self.folder / "block.py").write_text(block.text, encoding="utf-8")
                block = Block("sh", "python block.py")
            self.carry_out([block])


def masked(line: str) -> str:
    """Return a line without its figures, and without the spaces that align them."""
    return re.sub(r"[\s-]+", " ", re.sub(r"[\d.,]*\d", "#", line)).strip()


@each_page
def test_what_a_page_tells_to_do_can_be_done(page: Path, tmp_path: Path) -> None:
    reader, left_out, beside = Reader(tmp_path), set[str](), list[Block]()
    omitted = False
    for block in [*blocks_of(page), Block("", "", {"not run": "the end of the page"})]:
        if beside and block.said.get("host") in {None, *(one.said["host"] for one in beside)}:
            reader.carry_out(beside)
            beside.clear()
        if block.said.keys() & {"run by", "quote", "not run"}:
            continue
        missing = {reason for name in block.needs if (reason := MISSING[name])}
        if missing or (omitted and "prints" in block.said):
            left_out |= missing
            omitted = True
            continue
        omitted = False
        if "host" in block.said:
            beside.append(block)
        else:
            reader.take(block)
    if left_out:
        pytest.skip(f"blocks were left out: {'; '.join(sorted(left_out))}")


@each_page
def test_what_other_files_hold_is_there(page: Path) -> None:
    for block in blocks_of(page):
        if "quote" in block.said:
            assert block.text in (ROOT / block.said["quote"]).read_text(encoding="utf-8"), block.text
        if "run by" in block.said and (ROOT / block.said["run by"]).exists():
            command = block.text.rpartition("activate && ")[2].strip()
            script = (ROOT / block.said["run by"]).read_text(encoding="utf-8")
            assert command in script.replace(" -q", "").replace(" --no-compile", ""), command
        if "not run" in block.said:
            assert len(block.said["not run"]) > 10, f"say why this is not run:\n{block.text}"


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_python_satisfies_a_strict_type_checker(tmp_path: Path) -> None:
    written = []
    for page in PAGES:
        for number, block in enumerate(blocks_of(page)):
            if block.language == "python" and "quote" not in block.said:
                written.append(f"{page.stem.replace('-', '_').lower()}_{number}.py")
                (tmp_path / written[-1]).write_text(block.text, encoding="utf-8")
    assert len(written) >= 4, "the pages have lost their Python, or it is not found any more"
    # mypy finds what is installed by itself, and refuses to be told where that is.
    where = {} if PACKAGES.name == "site-packages" else {"MYPYPATH": str(PACKAGES)}
    (tmp_path / "mypy.ini").write_text(MYPY, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", *written],
        cwd=tmp_path, env=environment(where), timeout=TIMEOUT_S, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
