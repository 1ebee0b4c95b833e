"""The process group of torch: how groups begin and end, several at once, callbacks, and what ranks hear of errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from forked import TORCH, launch_forked
from jobs import environment
from ranks import PROGRAMS

pytest.importorskip("torch")

pytestmark = pytest.mark.timeout(200)
GUARD_S = 100.0


def test_groups_begin_work_and_end(tmp_path: Path) -> None:
    environ = {"TEST_WHOLE_END": "1"}
    ended = launch_forked(
        3, "torch_groups.py", "works", tmp_path, 200, modules=TORCH, environ=environ, timeout_s=GUARD_S
    )
    assert ended.code == 0, ended.err
    for said in ended.said.values():
        *done, left, late, last = said
        assert (*done, late, last) == ("done",) * 5
        assert left["threads"] < 20, "threads are left over"
        assert left["open"] < 200, "descriptors are left over"
    assert not ended.err, "ranks that end without destroying their group are silent"


def test_callbacks_make_collectives_in_an_order_of_their_own() -> None:
    ended = launch_forked(3, "torch_callbacks.py", 12, modules=TORCH, timeout_s=GUARD_S)
    assert ended.said == {rank: ["done"] for rank in range(3)}, ended.err


def test_ddp_trains_as_over_gloo() -> None:
    ended = launch_forked(2, "torch_training.py", modules=TORCH, timeout_s=GUARD_S)
    assert ended.said == {0: [19, 19]}, ended.err


def test_ddp_gives_one_clusters_bits_across_sites_of_the_same_grouping() -> None:
    ended = launch_forked(3, "torch_training.py", "grouped", modules=TORCH, timeout_s=GUARD_S)
    assert ended.code == 0, ended.err
    told = ended.said[0]
    assert len(told) == 3, "every rank tells"
    for each in told:
        (sites, losses, *wide), (cluster, _, *near) = each["sites"], each["cluster"]
        assert (wide, near) == (["slotted"], ["shm"])
        assert sites == cluster == told[0]["sites"][0]
        assert each["ungrouped"][0] != sites, "these weights do not show in which order gradients were added"
        assert losses == pytest.approx(each["gloo"][1], rel=1e-5)


def both_called(heard: Any, rank: int, odd: int) -> str:
    """Return the text of a mismatch, in which both ranks say what they called."""
    kind, text, _ = heard
    assert kind == "PlanMismatch", heard
    assert f"rank {odd} called" in text, text
    assert text.count(" called ") == 2 or "ranks called different" in text, text
    return str(text)


def test_calls_that_differ_end_on_every_rank() -> None:
    ended = launch_forked(3, "torch_groups.py", "mismatches", modules=TORCH, timeout_s=GUARD_S)
    assert (ended.code, sorted(ended.said)) == (0, [0, 1, 2]), ended.err
    expected = {
        "kind": ("all_reduce", "broadcast"), "size": ("of 4", "of 5"),
        "shape": ("shape (2, 3), sum", "shape (3, 2), sum"), "shapes": ("shape (4,) (6, 1)", "shape (4,) (1, 6)"),
        "gathered": ("shape (2, 3)", "shape (6,)"), "dtype": ("float32", "int32"),
        "half": ("bfloat16", "float16"), "bytes": ("float8_e5m2", "float8_e4m3fn"), "op": ("sum", "max"),
        "average": ("(4,), sum", "sum (avg)"), "root": ("root 0", "root 1"), "async": ("of 4", "of 5"),
        "message": ("send to rank 2 of 2 float32", "recv from rank 0 of 3 float32"),
        "message type": ("send to rank 2 of 2 float32", "recv from rank 0 of 2 int32"),
        "long message": ("send to rank 2 of 9998 float32", "recv from rank 0 of 9999 float32"),
    }  # fmt: skip
    for rank, [heard] in ended.said.items():
        for name, (one, other) in expected.items():
            text = both_called(heard[name], rank, 2)
            assert one in text, text
            assert other in text, text
        refused = {name: text for name, (kind, text, _) in heard.items() if name not in expected and kind}
        assert all(kind == "UsageError" for name, (kind, _, _) in heard.items() if name in refused), heard
        assert "use tensor.cpu()" in refused["device"]
        assert "rank 2" in refused["split"]
        assert "expanded" in refused["one rank"]


def test_survivors_name_a_killed_rank() -> None:
    ended = launch_forked(3, "torch_groups.py", "lost", modules=TORCH, timeout_s=GUARD_S)
    assert sorted(ended.said) == [0, 1], ended.err
    for [heard] in ended.said.values():
        for name, (kind, text) in heard.items():
            assert "rank 2" in text, (name, text)
            if name == "backward":  # torch makes it a RuntimeError, unless the loss was known before the pass
                assert kind in {"RuntimeError", "PeerLost"}, (kind, text)
            else:
                assert kind == ("Closed" if name == "later" else "PeerLost"), (name, kind, text)


def test_a_future_that_failed_tells_why_wherever_torch_looks() -> None:
    import torch

    from detcoll.errors import PeerLost
    from detcoll.torch.work import Future, _Failure

    error = PeerLost("rank 2 is lost")
    future = Future(None)
    future.set_exception(error)
    for look in (future.wait, future.value, lambda: future.then(lambda ended: ended.wait()).wait()):
        with pytest.raises(PeerLost, match="rank 2 is lost"):
            look()
    seen = _Failure(error)  # what torch's C++ code sees
    assert "rank 2 is lost" in repr(seen)
    with pytest.raises(PeerLost, match="rank 2 is lost"):
        torch._jit_internal._extract_tensors(seen)


def test_a_future_of_several_calls_needs_no_thread_until_they_have_ended() -> None:
    from detcoll.errors import PeerLost
    from detcoll.runtime import Work as Call
    from detcoll.torch.work import Work, all_of

    calls = [Call("a call") for _ in range(100)]
    followed: list[int] = []
    threads = threading.active_count()
    works = [
        all_of([Work(calls[at : at + 1], [], None), Work(calls[at + 1 : at + 2], [], None)], lambda: followed.append(0))
        for at in range(0, 100, 2)
    ]
    futures = [work.get_future() for work in works]
    assert threading.active_count() == threads
    for call in calls[:50]:
        call.finish()
    assert [future.wait() for future in futures[:25]] == [[]] * 25
    assert [work.wait() for work in works[:25]] == [True] * 25
    assert len(followed) == 25, "what follows is done once"
    assert [work.is_completed() for work in works] == [True] * 25 + [False] * 25
    calls[51].finish(PeerLost("rank 1 is lost"))
    assert not works[25].is_completed(), "the other call has not ended"
    calls[50].finish()
    with pytest.raises(PeerLost, match="rank 1 is lost"):
        futures[25].wait()
    assert works[25].is_completed()
    assert not works[25].is_success()


def test_a_group_that_is_closed_waits_for_progress_alone() -> None:
    from detcoll.torch.jobs import settle

    def waited_s(standing: Callable[[float], object], longest: float = 1000.0) -> float:
        clock = [0.0]
        has_ended = settle(
            lambda: standing(clock[0]), 10.0, longest, lambda: clock[0], lambda s: clock.append(clock.pop() + s)
        )
        assert has_ended == (standing(clock[0]) is None)
        return clock[0]

    assert waited_s(lambda now_s: None) == 0
    assert waited_s(lambda now_s: now_s // 9 if now_s < 100 else None) == pytest.approx(100, abs=1)
    assert waited_s(lambda now_s: min(now_s // 9, 5)) == pytest.approx(55, abs=1), "10 s after the last progress"
    assert waited_s(lambda now_s: now_s) == pytest.approx(1000, abs=1)


def test_ranks_of_several_jobs_open_another_one(caplog: pytest.LogCaptureFixture) -> None:
    from detcoll.torch.jobs import _are_all_in, _Introduction

    def told(*opened: str) -> list[_Introduction]:
        return [_Introduction("host", "network", "", "job", each) for each in opened]

    assert _are_all_in("a", told("a", "a"))
    assert not caplog.records
    assert not _are_all_in("a", told("a", "", "b"))
    assert "a second job beside that of detcoll.init(), which ranks [1, 2] of the group are not in" in caplog.text


def test_who_loses_the_store_is_not_told_that_a_rank_was_late() -> None:
    import torch.distributed as dist

    from detcoll.errors import ConnectError
    from detcoll.torch.jobs import _introduce, _Introduction

    class Lost(dist.HashStore):  # type: ignore[misc]
        def get(self, key: str) -> bytes:
            raise dist.DistNetworkError("connection reset")

    own = _Introduction("host", "network", "", "job")
    with pytest.raises(ConnectError, match="the store was lost while this rank waited for rank 0"):
        _introduce(own, 0, 2, Lost())
    silent = dist.HashStore()
    silent.set_timeout(timedelta(milliseconds=1))
    with pytest.raises(ConnectError, match="rank 1 did not make this process group in time"):
        _introduce(own, 0, 2, silent)


def test_who_waits_for_a_rank_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from detcoll.torch import jobs

    said, texts, told, store = threading.Event(), list[str](), list[Any](), dist.HashStore()

    def note(text: str, *values: object) -> None:
        texts.append(text % values)
        said.set()

    monkeypatch.setattr(jobs, "HINT_S", 0.01)
    monkeypatch.setattr(jobs.log, "warning", note)
    own = jobs._Introduction("host", "network", "", "job")
    waits = threading.Thread(target=lambda: told.extend(jobs._introduce(own, 0, 2, store)))
    waits.start()
    assert said.wait(GUARD_S)
    jobs._introduce(own, 1, 2, store)
    waits.join()
    assert told == [own, own]
    assert texts[0] == "rank 0 waits for rank 1, which has not yet made this process group with the backend 'detcoll'"


REGISTERED = "import torch.distributed as dist; assert 'detcoll' in dist.Backend.backend_list"


def test_torch_finds_the_backend_and_loads_nothing_for_it() -> None:
    from importlib.metadata import entry_points

    if not entry_points(group="torch.backends", name="detcoll"):
        pytest.skip("the installed detcoll has no entry point for torch; install this tree with pip")
    program = f"{REGISTERED}; import sys; assert 'detcoll' not in sys.modules, 'import torch loads all of detcoll'"
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True, timeout=GUARD_S)


def test_torch_can_be_imported_where_detcoll_is_broken(tmp_path: Path) -> None:
    """Neither a package that is missing nor a torch that refuses the backend may make ``import torch`` fail."""
    (tmp_path / "msgspec.py").write_text("raise ImportError('broken')\n", encoding="utf-8")
    program = (
        "import detcoll_registration as it, torch.distributed as dist\n"
        "it.register()\n"
        f"{REGISTERED}\n"
        "try:\n    dist.init_process_group('detcoll', store=dist.HashStore(), rank=0, world_size=1)\n"
        "except ImportError as error:\n    assert 'broken' in str(error), error\n"
        "else:\n    raise AssertionError('made a group without msgspec')\n"
        "dist.Backend.register_backend = lambda *_, **__: 1 / 0\n"
        "it.register()\n"
    )
    paths = f"{tmp_path}{os.pathsep}{PROGRAMS.parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment({"PYTHONPATH": paths}), check=False, timeout=GUARD_S,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "torch.distributed does not know the backend 'detcoll'" in ended.stderr
