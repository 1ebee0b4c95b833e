"""Runs torch's own suite for distributed calls on Gloo and on detcoll, and compares test by test.

    python tests/torch_suite.py --out suite                     # all: 2, 3 and 4 ranks on both
    python tests/torch_suite.py --out suite --ranks 2 --only 'all_reduce|barrier'
    python tests/torch_suite.py --out suite --again failed      # what has failed so far, once more

Every test that Gloo passes has to pass on detcoll, apart from those in `CANNOT`; the exit code is 1 where one does not,
or where one of `CANNOT` passes. Results are kept in ``--out`` as they come, and what is there is not run again, so that
a run that was ended goes on: `results.jsonl` has a line a test, `results.json` and `table.md` are written at the end.

Tests are those of `DistributedTest` in the installed torch, on tensors of the host. Needs ``pip install expecttest``.
`programs/suite_ranks.py` says how their ranks are started.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detcoll.measure.host import host_facts

SERVER = Path(__file__).parent / "programs" / "suite_ranks.py"
BACKENDS = ("gloo", "detcoll")
GUARD_S = 60.0
"""What a server gets beyond a test's deadline, and for its own start, before it is killed."""

CANNOT: dict[str, str] = dict.fromkeys(
    ("test_monitored_barrier_failure_order", "test_monitored_barrier_gloo", "test_monitored_barrier_gloo_subgroup",
     "test_monitored_barrier_wait_all_ranks"),
    "torch.distributed.monitored_barrier refuses every backend whose name is not gloo",
)  # fmt: skip
"""Tests that pass on Gloo and cannot pass on detcoll, and why."""


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """One test on one backend."""

    ranks: int
    backend: str
    test: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a case ended."""

    outcome: str
    """"passed", "failed" or "skipped"."""
    reason: str
    seconds: float
    ranks: dict[str, Any] = field(default_factory=dict)
    """Of a failure: exit code, tracebacks and the end of the output of each rank."""


Results = dict[Case, Ended]


class Server:
    """A process that has imported the suite for one backend and number of ranks, and forks the ranks of its tests."""

    def __init__(self, backend: str, ranks: int, folder: Path) -> None:
        self.of = backend, ranks
        self._folder = folder
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._output = Path(tempfile.mkdtemp(dir=folder)) / "output"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(SERVER), backend, str(ranks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=output, text=True, start_new_session=True,
                env=os.environ | threads | {"XDG_STATE_HOME": str(folder)},
            )  # fmt: skip
        self.tests: list[str] = self._answer(GUARD_S)["tests"]

    def run(self, test: str, deadline_s: float) -> Ended:
        """Run one test."""
        place = tempfile.mkdtemp(dir=self._folder)
        try:
            assert self._process.stdin is not None
            request = json.dumps({"test": test, "folder": place, "deadline_s": deadline_s})
            print(request, file=self._process.stdin, flush=True)
            return Ended(**self._answer(deadline_s + GUARD_S))
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _answer(self, within_s: float) -> dict[str, Any]:
        """Return the next answer; a server that gives none in time is killed."""
        assert self._process.stdout is not None
        guard = threading.Timer(within_s, self._process.kill)
        guard.start()
        try:
            line = self._process.stdout.readline()
        finally:
            guard.cancel()
        if not line:
            self.close()
            raise ServerLost(f"the server of {self.of} ended without an answer: {self._output.read_text()[-2000:]}")
        return dict(json.loads(line))

    def kill(self) -> None:
        """Kill the process; the kernel kills its ranks with it."""
        self._process.kill()

    def close(self) -> None:
        """Kill the process, and wait for its end."""
        self._process.kill()
        self._process.communicate()


class ServerLost(Exception):
    """A server ended without an answer; says what it wrote last."""


class Worker:
    """Runs one case after another, in a server that it keeps while backend and number of ranks stay."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: Server | None = None
        self._killed = False

    def run(self, case: Case, deadline_s: float) -> Ended:
        """Run a case; raises ServerLost where not even a server starts."""
        if self._server is None or self._server.of != (case.backend, case.ranks):
            self.close()
            self._server = Server(case.backend, case.ranks, self._folder)
        if self._killed:
            self._server.kill()
        try:
            return self._server.run(case.test, deadline_s)
        except ServerLost as error:
            self._server = None
            return Ended("failed", str(error), 0.0)

    def kill(self) -> None:
        """End what runs, from another thread."""
        self._killed = True
        if (server := self._server) is not None:
            server.kill()

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
            self._server = None


def list_tests() -> list[str]:
    """Return the names of the suite's tests."""
    with tempfile.TemporaryDirectory(prefix="suite-") as folder:
        server = Server(BACKENDS[0], 2, Path(folder))
        server.close()
        return server.tests


def run_cases(cases: Iterable[Case], jobs: int, deadline_s: float = 300.0) -> Iterator[tuple[Case, Ended]]:
    """Run cases, ``jobs`` of them at a time; yields each as it ends."""
    with tempfile.TemporaryDirectory(prefix="suite-") as folder, contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        workers = [Worker(Path(folder)) for _ in range(jobs)]
        for worker in workers:
            stack.callback(worker.close)
            idle.put(worker)

        def run(case: Case) -> Ended:
            worker = idle.get()
            try:
                return worker.run(case, deadline_s)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                of = {pool.submit(run, case): case for case in sorted(cases)}
                for future in as_completed(of):
                    yield of[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.kill()
                raise


@dataclass(frozen=True, slots=True)
class Verdict:
    """What does not pass on detcoll although it does on Gloo."""

    new: list[Case]
    known: list[Case]
    stale: list[Case]
    """Named in `CANNOT`, and passed."""

    @property
    def good(self) -> bool:
        """Whether everything is as the repository says."""
        return not self.new and not self.stale


def judge(results: Results) -> Verdict:
    """Compare the backends test by test, where there are results of both."""
    ours = [case for case in sorted(results) if case.backend == "detcoll"]
    lost = [
        case
        for case in ours
        if results[case].outcome != "passed"
        and (beside := results.get(Case(case.ranks, "gloo", case.test))) is not None
        and beside.outcome == "passed"
    ]
    return Verdict(
        [case for case in lost if case.test not in CANNOT],
        [case for case in lost if case.test in CANNOT],
        [case for case in ours if case.test in CANNOT and results[case].outcome == "passed"],
    )


def table(results: Results) -> str:
    """Return counts, and all that differs or failed, as Markdown."""
    lines = ["| ranks | backend | passed | failed | skipped | seconds |", "|---|---|---|---|---|---|"]
    for ranks, backend in sorted({(case.ranks, case.backend) for case in results}):
        here = [ended for case, ended in results.items() if (case.ranks, case.backend) == (ranks, backend)]
        count = Counter(ended.outcome for ended in here)
        seconds = sum(ended.seconds for ended in here)
        lines.append(
            f"| {ranks} | {backend} | {count['passed']} | {count['failed']} | {count['skipped']} | {seconds:.0f} |"
        )
    verdict = judge(results)
    parts = (
        ("Passes on Gloo, not on detcoll", verdict.new),
        ("The same, and known", verdict.known),
        ("Said to be impossible, and passes", verdict.stale),
        ("Failed on Gloo", [c for c in sorted(results) if c.backend == "gloo" and results[c].outcome == "failed"]),
    )
    for title, cases in parts:
        if cases:
            lines += ["", f"{title}: {len(cases)}", "", "| test | ranks | outcome | why |", "|---|---|---|---|"]
            for case in cases:
                ended = results[case]
                why = CANNOT.get(case.test) if case in verdict.known else ended.reason.replace("|", "/")
                lines.append(f"| {case.test} | {case.ranks} | {ended.outcome} | {why} |")
    return "\n".join(lines) + "\n"


def load(path: Path) -> Results:
    """Read results as they were kept, the last of each case."""
    results: Results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        case = Case(**record.pop("case"))
        results[case] = Ended(**record)
    return results


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results; needed unless --list is given")
    parser.add_argument("--list", action="store_true", help="name the tests, and run none")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--only", default="", metavar="PATTERN", help="tests whose name contains this expression")
    parser.add_argument("--again", choices=("failed", "skipped", "passed", "all"), help="run what ended so once more")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at the same time")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds for a test, then its ranks are killed")
    given = parser.parse_args(argv)
    if given.out is None and not given.list:
        parser.error("--out is missing: a folder for results")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is chosen and has no result yet; returns the exit code."""
    given = _arguments(argv)
    names = [name for name in list_tests() if re.search(given.only, name)]
    if given.list:
        print("\n".join(names))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    journal = given.out / "results.jsonl"
    results = load(journal)
    wanted = [Case(ranks, backend, test) for ranks in given.ranks for backend in given.backends for test in names]
    cases = [
        case for case in wanted
        if case not in results or given.again in ("all", results[case].outcome)
    ]  # fmt: skip
    began_s = time.monotonic()

    with journal.open("a", buffering=1) as kept:
        for case, ended in run_cases(cases, given.jobs, given.deadline):
            results[case] = ended
            kept.write(json.dumps({"case": asdict(case), **asdict(ended)}) + "\n")
            print(f"{case.backend} {case.ranks} {case.test}: {ended.outcome} {ended.seconds} s {ended.reason}"[:300])
    took_s = time.monotonic() - began_s
    shown = {case: results[case] for case in wanted}
    verdict = judge(shown)
    facts = {
        "host": host_facts(), "seconds": round(took_s, 1), "run": len(cases), "good": verdict.good,
        "results": [{**asdict(case), **asdict(ended)} for case, ended in sorted(shown.items())],
    }  # fmt: skip
    (given.out / "results.json").write_text(json.dumps(facts, indent=1))
    text = table(shown)
    (given.out / "table.md").write_text(text)
    print(f"\n{text}\n{len(cases)} tests in {took_s:.0f} s")
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
