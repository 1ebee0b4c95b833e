"""Flight records in the form of PyTorch's flight recorder, read by PyTorch's own analyzer."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import attempt

from detcoll.cli import main
from detcoll.errors import PlanMismatch
from detcoll.report.flight_recorder import PREFIX


def every_kind(comm: Any) -> None:
    """Make calls of every kind, of the world and a group."""
    size = comm.size
    comm.all_reduce(np.ones(10, np.float32))
    comm.all_gather(np.ones(4, np.float32))
    comm.reduce_scatter(np.ones(2 * size, np.int64))
    comm.broadcast(np.ones(4), root=1)
    comm.reduce(np.ones(4), root=2)
    comm.gather(np.ones(3), root=1)
    comm.scatter(np.ones(2 * size) if comm.rank == 1 else None, root=1, out=np.empty(2))
    comm.all_to_all(np.ones(size))
    comm.barrier()
    if comm.rank < 2:
        comm.group([0, 1], name="pair").all_reduce(np.ones(3))


def records(folder: Path, transport: str, wrong: int) -> Path:
    """Return the records of three ranks of which one makes another last call if it is ``wrong``."""

    def program(comm: Any) -> None:
        every_kind(comm)
        comm.all_reduce(np.ones(100 + (comm.rank == wrong), np.float32), name="gradients")
        assert comm._job.flight.write("test") is not None

    answers = attempt(3, program, transport=transport, environ={"DETCOLL_RECORD": str(folder)}, stay=True)
    assert wrong < 0 or all(isinstance(answer, PlanMismatch) for answer in answers)
    (job,) = folder.iterdir()
    return job


@pytest.fixture
def analysis(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[[Path], str]:
    """What PyTorch's analyzer says of dumps."""
    analyzer = pytest.importorskip(
        "torch.distributed.flight_recorder.fr_trace", reason="this torch has no analyzer, or none is installed"
    )

    def analysed(folder: Path) -> str:
        try:
            analyzer.main([str(folder)])
        finally:
            gc.enable()  # it disables the collector, as a program may that ends soon
        printed = capsys.readouterr()
        return printed.out + printed.err + caplog.text

    return analysed


@pytest.mark.parametrize("transport", ["shm", "slotted"])
def test_the_analyzer_finds_the_rank_that_called_something_else(
    tmp_path: Path, analysis: Callable[[Path], str], transport: str
) -> None:
    job = records(tmp_path / "records", transport, wrong=2)
    assert main(["report", str(job), "--torch", str(tmp_path / "dumps")]) == 0
    said = analysis(tmp_path / "dumps")
    assert said.count("collective: gloo:all_reduce") == 1, "other calls look wrong too"
    # A rank that hears of it before its own call has no such call.
    assert "SIZE_OR_SYNTAX_MISMATCH" in said or "missing ranks" in said
    assert ("[[100]]" in said) == ("[[101]]" in said) or "missing ranks" in said


def test_every_kind_is_one_that_the_analyzer_knows_and_finds_right(
    tmp_path: Path, analysis: Callable[[Path], str]
) -> None:
    job = records(tmp_path / "records", "slotted", wrong=-1)
    assert main(["report", str(job), "--torch", str(tmp_path / "dumps")]) == 0
    dump = pickle.loads((tmp_path / "dumps" / f"{PREFIX}0").read_bytes())
    assert [entry["profiling_name"] for entry in dump["entries"]] == [
        f"gloo:{kind}"
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "gather", "scatter",
                     "all_to_all", "barrier", "all_reduce", "all_reduce")
    ]  # fmt: skip
    assert {entry["state"] for entry in dump["entries"]} == {"completed"}
    assert dump["entries"][1]["input_sizes"] == [[4]]
    assert dump["entries"][1]["output_sizes"] == [[12]]
    assert [config["ranks"] for config in dump["pg_config"].values()] == ["[0, 1, 2]", "[0, 1]"]
    said = analysis(tmp_path / "dumps")
    assert "has errors" not in said
    assert "Not all ranks" not in said


def test_only_records_can_be_written_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert main(["report", str(tmp_path / "other.json"), "--torch", str(tmp_path / "dumps")]) == 2
    assert "takes one folder of flight records" in capsys.readouterr().err
    assert not (tmp_path / "dumps").exists()
