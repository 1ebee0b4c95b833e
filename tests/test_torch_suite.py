"""A part of torch's own suite on detcoll, and how `torch_suite.py` tells what ended how.

All of it, beside Gloo and on more ranks, is one command: `python tests/torch_suite.py --out suite`.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch_suite
from torch_suite import Case, Ended

for needed in ("torch", "expecttest"):
    if find_spec(needed) is None:
        pytest.skip(f"torch's suite needs {needed}; pip install {needed}", allow_module_level=True)

PART = (
    "Backend_enum_class", "DistributedDataParallelCPU",
    "accumulate_gradients_no_sync_allreduce_with_then_hook", "all_gather",
    "all_gather_object_subgroup", "all_reduce_coalesced_full_group_max",
    "all_reduce_sum_async", "all_reduce_sum_complex", "all_to_all", "all_to_all_single_unequal_split_complex",
    "barrier_timeout_global", "batch_isend_irecv_gloo_tags",
    "broadcast", "gather_full_group", "get_future",
    "isend_torch_profiler", "monitored_barrier_gloo_rank_0_timeout", "reduce_full_group_product", "scatter_complex",
    "scatter_object_list", "send_recv_any_source_autograd_profiler", "send_recv_with_tag", "sparse_all_reduce_sum",
    "static_graph_api_cpu",
)  # fmt: skip
"""Of each kind of call one or two tests, which end within a second or two."""

PASSED, FAILED, SKIPPED = (Ended(outcome, "", 1.0) for outcome in ("passed", "failed", "skipped"))


@pytest.mark.timeout(300)
def test_a_part_passes():
    cases = [Case(2, "detcoll", f"test_{name}") for name in PART]
    needs_gpu = Case(2, "detcoll", "test_all_reduce_sum_cuda")
    ended = dict(torch_suite.run_cases([*cases, needs_gpu], jobs=1, deadline_s=60))
    left_out = ended.pop(needs_gpu)
    assert (left_out.outcome, left_out.reason) == ("skipped", "CUDA is not available.")
    assert ended.keys() == set(cases)
    assert {case.test: seen.reason for case, seen in ended.items() if seen.outcome != "passed"} == {}


@pytest.mark.timeout(200)
def test_what_does_not_end_is_killed():
    endless = Case(2, "gloo", "test_barrier")
    ended = dict(torch_suite.run_cases([endless], jobs=1, deadline_s=0.01))
    assert ended[endless].outcome == "failed"
    assert ended[endless].reason == "time was up; ranks still there: [0, 1]"
    assert [each["code"] for each in ended[endless].ranks.values()] == [-9, -9]


def test_the_verdict_names_what_passes_on_gloo_alone(monkeypatch):
    monkeypatch.setattr(torch_suite, "CANNOT", {"known": "because", "stale": "because"})
    both = {
        "same": (PASSED, PASSED), "worse": (PASSED, FAILED), "left out": (PASSED, SKIPPED), "better": (FAILED, PASSED),
        "broken": (FAILED, FAILED), "known": (PASSED, FAILED), "stale": (PASSED, PASSED),
    }  # fmt: skip
    results = {Case(2, "gloo", name): gloo for name, (gloo, _) in both.items()}
    results |= {Case(2, "detcoll", name): ours for name, (_, ours) in both.items()}
    results[Case(2, "detcoll", "alone")] = FAILED
    verdict = torch_suite.judge(results)
    assert [case.test for case in verdict.new] == ["left out", "worse"]
    assert [case.test for case in verdict.known] == ["known"]
    assert [case.test for case in verdict.stale] == ["stale"]
    assert not verdict.good
    assert torch_suite.judge({case: PASSED for case in results if case.test == "same"}).good
    table = torch_suite.table(results)
    assert "| 2 | gloo | 5 | 2 | 0 | 7 |" in table
    assert "| known | 2 | failed | because |" in table
