"""What each mean gains: what is switched off, on which network, and what ranks are told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from detcoll.emulation.lab import Conditions
from detcoll.errors import UsageError
from detcoll.measure.experiment import Experiment, digests_equal
from detcoll.measure.gains import MEANS, flattened, require_removable
from detcoll.measure.networks import parse_networks
from detcoll.measure.results import Run
from detcoll.measure.statistics import summarize
from detcoll.plan import Slotting, build_calendar
from detcoll.plan.calendar import laid_out
from detcoll.topology import Topology
from detcoll.workloads.workload import WorkloadSpec

LINES = Topology.uniform(2, 2, 1e8, 10**7).with_reserved(8e7)
SYNTHETIC = WorkloadSpec("synthetic", bucket_bytes=4096, compute_ns=10**6, gradient_bytes=8192)
RESERVED = parse_networks(("deterministic",), ("1.0",))


def test_flat_flows_that_share_a_line_add_up_to_its_reservation() -> None:
    for lines, least in ((LINES, 8e7), (Topology.uniform(3, 4, 1e8, 10**6).with_reserved(4e7), 8e7)):
        flat = flattened(lines)
        assert [site.ranks for site in flat.sites] == [(rank,) for rank in range(lines.size)]
        ranks = len(lines.sites[0].ranks)
        crossing = ranks * (lines.size - ranks)
        flow = build_calendar(flat.granted, Slotting.SHARE).rate_bytes_per_s(0, lines.size - 1)
        given = least * lines.payload_share
        assert crossing * flow == pytest.approx(given * laid_out(flat, given / crossing))
        assert {flat.one_way_ns(0, other) for other in range(1, lines.size)} == {lines.one_way_ns(0, 1)}
    assert not flattened(LINES.with_reserved(None)).has_reservations


def test_flat_lines_without_reservation_add_up_to_the_line() -> None:
    flat = flattened(LINES.with_reserved(None))
    flow = build_calendar(flat, Slotting.SHARE).rate_bytes_per_s(0, 3)
    given = 1e8 * LINES.payload_share
    assert 4 * flow == pytest.approx(given * laid_out(flat, given / 4))


def test_each_mean_has_a_run_of_its_own() -> None:
    networks = parse_networks(("best-effort", "deterministic"), ("0", "1.0"))
    experiment = Experiment(LINES, SYNTHETIC, (), 4, 1, (), (), Conditions(), networks, without=MEANS)
    experiment.validate()
    added = [setting for setting in experiment.settings() if setting.without]
    assert [(one.name, one.network.service.value, one.network.cross_traffic) for one in added] == [
        (f"slotted without {mean}", "best-effort" if mean == "reservation" else "deterministic", share)
        for mean in MEANS
        for share in (0.0, 1.0)
    ]
    assert {one.transport for one in added} == {"slotted"}


@pytest.mark.parametrize(
    ("without", "lines", "services", "is_script", "message"),
    [
        (("magic",), LINES, "deterministic", False, "without='magic': expected some of topology, slots"),
        (("slots", "slots"), LINES, "deterministic", False, "each once"),
        (("slots",), LINES, "best-effort", False, "needs service=deterministic"),
        (("overlap",), LINES, "deterministic", True, "needs a built-in workload"),
        (("topology",), Topology.uniform(2, 1, 1e8, 10**7), "deterministic", False, "a site of several ranks"),
    ],
)
def test_what_cannot_be_switched_off_is_refused(
    without: tuple[str, ...], lines: Topology, services: str, is_script: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        require_removable(without, lines, parse_networks((services,), ("0",)), is_script)


def test_bits_without_topology_are_not_held_against_the_cluster() -> None:
    def run(transport: str, digest: str, without: str | None = None) -> Run:
        times = summarize([1.0])
        return Run(
            transport, transport, "wide-area", "deterministic", iteration_s=times, result_digest=digest, without=without
        )

    cluster, slotted = run("shm", "same"), run("slotted", "same")
    assert digests_equal([cluster, slotted, run("slotted", "other", "topology")]) is True
    assert digests_equal([cluster, slotted, run("slotted", "other", "overlap")]) is False


def test_warm_up_of_none_is_refused() -> None:
    experiment = Experiment(LINES, SYNTHETIC, (), 4, 1, (), (), Conditions(), RESERVED)
    with pytest.raises(UsageError, match="warmup=0"):
        replace(experiment, warmup=0).validate()
