"""``detcoll simulate`` and ``detcoll plan``: options, tables, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from detcoll.cli import main
from detcoll.topology import Topology

UNEQUAL = """
[[site]]
name = "north"
ranks = 2
uplink = "1 Gbit/s"
[[site]]
name = "south"
ranks = 4
uplink = "2 Gbit/s"
[[link]]
between = ["north", "south"]
one_way = "10 ms"
"""
QUICK = ["--parameters", "50_000_000", "--buckets", "4"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    found = main(list(arguments))
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out + captured.err


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_simulate_writes_its_tables_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.json"
    report = tmp_path / "report"
    shown = run(capsys, "simulate", "two-cities", *QUICK, "--json", str(path), "--report", str(report))
    assert (report / "results.json").read_text() == path.read_text()
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "in simulation" in page
    assert "Map: two-cities" in page
    for word in (
        "single-cluster",
        "deterministic",
        "ordinary",
        "What it depends on",
        "nothing beside the backward pass",
    ):
        assert word in shown
    data = read(path)
    assert data["schema"] == "detcoll.simulate/1"
    assert data["scenario"]["parameters"] == 50_000_000
    assert [entry["setting"] for entry in data["runs"]] == ["single-cluster", "deterministic", "ordinary"]
    assert data["runs"][0]["line_bit_per_s"] is None
    assert data["runs"][1]["line_bit_per_s"] == 100e9
    assert len(data["needed"]) == 3
    assert {point["changed"] for point in data["sensitivity"]} == {"reserved_bit_per_s", "loss", "cross_traffic"}


def test_simulate_takes_what_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.json"
    options = ["--uplink", "40 Gbit/s", "--reserved", "10 Gbit/s", "--loss", "0.001", "--cross-traffic", "0.25",
               "--connections", "2", "--compute", "100 ms", "--backward", "0.5", "--overlap", "0.5",
               "--slotting", "share", "--no-variants"]  # fmt: skip
    shown = run(capsys, "simulate", "two-cities", *QUICK, *options, "--json", str(path))
    assert "What it depends on" not in shown
    facts = read(path)["scenario"]
    told = {key: facts[key] for key in ("line_bit_per_s", "reserved_bit_per_s", "loss", "cross_traffic", "connections",
                                        "compute_s", "backward", "overlap", "buckets")}  # fmt: skip
    assert list(told.values()) == [40e9, 10e9, 0.001, 0.25, 2, 0.1, 0.5, 0.5, 4]


def test_plan_draws_its_calendar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calendar.svg"
    run(capsys, "plan", "--sites", "3", "--slotting", "calendar", "--svg", str(path))
    words = [node.text for node in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert {"site0", "to site1", "leaves on the uplink", "arrives on the downlink"} <= set(words)


def test_simulate_names_what_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "simulate", "--list")
    assert "forty-cities: 40 cities" in shown
    assert "two-cities: Guiyang" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "atlantis"], "scenario='atlantis'"),
        (["simulate", "two-cities", "--efficiency", "1.5"], "efficiency=1.5"),
        (["simulate", "two-cities", "--reserved", "1 Tbit/s"], "must not exceed the line"),
        (["simulate", "two-cities", "--loss", "2"], "loss=2"),
        (["simulate", "two-cities", "--compute", "15"], "compute='15'"),
        (["simulate", "two-cities", "--json", "/no/such/x.json"], "no directory"),
        (["plan", "--topology", "/no/such/file.toml"], "cannot be read"),
        (["plan", "--topology", "two-cities", "--sites", "3"], "already says what sites would"),
        (["plan", "--efficiency", "0.98"], "needs --parameters, --compute"),
        (["plan", "--parameters", "1000"], "--parameters: of no use without --efficiency"),
        (["plan", "--slotting", "off", "--reservation"], "slotting='off'"),
        (["plan", "--bytes", "3B"], "bytes=3 must be a positive multiple"),
        (["plan", "--dtype", "complex256"], "complex256"),
        (["plan", "--base-time", "7", "--reservation"], "base_time='7'"),
        (["plan", "--base-time", "7 ms"], "base_time='7 ms' is of no use without --reservation"),
        (["plan", "--slotting", "turns", "--sites", "3"], "slotting='turns' is for two sites, and the topology has 3"),
        (["plan", "--sites", "101"], "sites=101 must be at most 100"),
        (["simulate", "forty-cities", "--slotting", "turns"], "slotting='turns' is for two sites"),
        (["simulate", "two-cities", "--buckets", "100_000_000"], "buckets=100000000 must be at most 100000"),
        (["simulate", "two-cities", "--efficiency", "0.9", "--no-variants"], "efficiency=0.9 is of no use with"),
        (["plan", "--sites", "1"], "sites=1"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in run(capsys, *arguments, code=2)


def test_plan_shows_the_calendar_and_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = tmp_path / "topology.toml", tmp_path / "plan.json"
    file.write_text(UNEQUAL)
    shown = run(capsys, "plan", "--topology", str(file), "--bytes", "8MiB", "--json", str(path))
    for word in ("north", "south", "exchange", "predicted", "of the floor", "10 ms", "every 12 ms", "never closes"):
        assert word in shown
    data = read(path)
    assert data["schema"] == "detcoll.plan-report/1"
    assert data["plan"]["bytes"] == 2**23
    assert data["plan"]["predicted_s"] > data["plan"]["bound_s"] > 0.07
    # Each of two ranks sends its half over the line, each of four its quarter.
    assert [part["wide_bytes"] for part in data["plan"]["parts"]] == [2**22, 2**21]
    assert (data["needed"], data["reservation"]) == (None, [])
    assert data["calendar"]["mode"] == "calendar"


def test_plan_shows_windows(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "plan", "--sites", "3", "--ranks-per-site", "1", "--slotting", "calendar")
    assert "99.6%" in shown
    assert "guards of 100 us" in shown


def test_plan_prints_what_to_ask_of_the_carrier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    options = ["--slotting", "turns", "--ranks-per-site", "8", "--reservation", "--base-time", "5 ms"]
    shown = run(capsys, "plan", *options, "--json", str(path))
    for word in ("MaxPacketsPerInterval", "MaxPayloadSize", "cycle-time", "96,000,000 ns", "0x60 11,900,000 ns",
                 "and 10 more"):  # fmt: skip
        assert word in shown
    first, second = read(path)["reservation"]
    assert first["gates"]["base_time_ns"] == 5_000_000
    assert first["gates"] == second["gates"]
    assert len(first["gates"]["entries"]) == 16
    assert first["specification"] == {
        "interval_ns": 96_000_000, "max_packets_per_interval": 8000, "max_payload_size_bytes": 1480,
    }  # fmt: skip


def test_plan_says_what_an_efficiency_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = tmp_path / "topology.toml", tmp_path / "plan.json"
    file.write_text(UNEQUAL)
    asked = ["--efficiency", "0.98", "--parameters", "10_000_000", "--compute", "1 s", "--reservation"]
    shown = run(capsys, "plan", "--topology", str(file), *asked, "--json", str(path))
    assert "To reserve for 98.0%" in shown
    assert "enough" in shown
    data = read(path)
    rate = data["needed"]["line_bit_per_s"]
    assert 0.98 <= data["needed"]["efficiency"] < 0.981
    for site in data["reservation"]:
        assert site["line_bytes_per_s"] == pytest.approx(rate / 8)
        carried = site["specification"]["max_packets_per_interval"] * 1500 * 8 / 0.012
        assert carried == pytest.approx(rate, rel=0.01)


def test_plan_of_a_scenario_knows_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert "guiyang" in run(capsys, "plan", "--topology", "two-cities")
    shown = run(capsys, "plan", "--topology", "two-cities", "--efficiency", "0.5", *QUICK)
    assert "To reserve for 50.0%" in shown


def test_plan_says_that_no_line_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "far.toml"
    file.write_text(Topology.uniform(2, 1, 1e9, 10**9).to_toml())
    asked = ["--efficiency", "0.98", "--parameters", "1000", "--compute", "1 s"]
    assert "No line is fast enough" in run(capsys, "plan", "--topology", str(file), *asked, code=1)


def test_names_of_sites_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites = "".join(f'[[site]]\nname = "{name}"\nranks = 1\nuplink = "1 Gbit/s"\n' for name in ("[red]a", "b :cat:"))
    path = tmp_path / "t.toml"
    path.write_text(f'{sites}[[link]]\nbetween = ["[red]a", "b :cat:"]\none_way = "1 ms"\n', encoding="utf-8")
    for options in ([], ["--reservation"]):
        assert main(["plan", "--topology", str(path), *options]) == 0
        shown = capsys.readouterr().out
        assert "[red]a" in shown
        assert "b :cat:" in shown
