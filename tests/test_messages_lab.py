"""Messages over the lab's line keep to what is reserved for their rank, together with collectives."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import launch_forked

from detcoll.emulation.lab import Lab, audit, read_log, read_traces, why_unavailable
from detcoll.topology import Topology

UNAVAILABLE = why_unavailable()
pytestmark = [
    pytest.mark.lab, pytest.mark.timeout(90), pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE)),
]  # fmt: skip


@pytest.mark.parametrize(("slotting", "program"), [("share", "across"), ("turns", "across"), ("share", "flood")])
def test_messages_and_collectives_share_what_is_reserved(tmp_path: Path, slotting: str, program: str) -> None:
    topology, log = Topology.uniform(2, 2, 12.5e6, 5_000_000), tmp_path / "arrivals.npy"
    environ = {"DETCOLL_SLOTTING": slotting, "DETCOLL_TRACE": str(tmp_path)}
    with Lab(topology, log_path=log) as lab:
        done = launch_forked(4, "messages.py", program, environ=environ, timeout_s=60.0, lab=lab)
        late_ns = lab.statistics().late_peak_ns
    assert done.code == 0, done.err
    traces = read_traces([tmp_path / f"rank{rank}.json" for rank in range(4)])
    seen = audit(read_log(log), traces, topology, late_ns)
    assert seen.mode == slotting
    assert seen.bulk_bytes > 4 * 2_000_000
    if slotting == "turns":  # on a busy host a rank may stand still at the end of its window, with a chunk under way
        assert seen.windows_disjoint, seen
        assert seen.kept_share > 0.95, seen
    else:
        assert seen.is_slotted, seen
    assert seen.queues_within_windows, seen
