"""The report: well-formed, complete where results are, silent where they are not, and never fooled by names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pictures import MS, call, check_labels, parsed, send, trace

from detcoll.cli import main
from detcoll.cli.invocation import carrying_out, command_line
from detcoll.draw import html_text
from detcoll.errors import UsageError
from detcoll.report import forget_traces, gather, report
from detcoll.report.inputs import ReportInputs
from detcoll.report.reported import parse_result
from detcoll.topology import Topology

HOSTILE = "</style></title><script>alert(1)</script><img src=http://x.example/ onerror=alert(1)>\"'&\x00"


def times(median_s: float, count: int = 5) -> dict[str, Any]:
    return {"median": median_s, "p01": median_s * 0.9, "p99": median_s * 1.2, "samples": [median_s] * count}


def run(name: str, median_s: float, efficiency: float, **changes: Any) -> dict[str, Any]:
    made = {
        "name": name, "transport": name, "setting": "wide-area", "service": "best-effort", "cross_traffic": 0.0,
        "iteration_s": times(median_s), "sync_s": times(median_s / 4), "efficiency": efficiency,
        "efficiency_spread": [efficiency * 0.8, efficiency * 1.1], "wire_busy_fraction": 0.75, "algorithm": "exchange",
        "result_digest": "b2958e72a4098f46", "retransmits": 0, "slot_misses": 0, "accuracy": 0.975,
    }  # fmt: skip
    return made | changes


def measurement(*runs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    cluster = run("single cluster", 0.03, 1.0, transport="shm", setting="single-cluster")
    made: dict[str, Any] = {
        "schema": "detcoll.measure/1", "host": {"cpu": "AMD EPYC", "cores": 2, "kernel": "6.18", "torch": None},
        "workload": {"name": "digits", "iterations": 5, "rounds": 1, "sites": 2, "ranks_per_site": 2,
                     "uplink_bytes_per_s": [125e6, 125e6], "round_trip_s": [0.02], "gradient_bytes": 2254888},
        "runs": [cluster, *(runs or [run("slotted", 0.06, 0.5), run("gloo", 0.3, 0.1)])],
        "left_out": [], "digests_equal": True, "command": "detcoll measure --json r.json",
    }  # fmt: skip
    return made | changes


def row(nbytes: int, **changes: Any) -> dict[str, Any]:
    made = {
        "collective": "all_reduce", "transport": "slotted", "algorithm": "exchange", "ranks": 4, "sites": 2,
        "dtype": "float32", "bytes": nbytes, "median_s": 0.05, "min_s": 0.048, "max_s": 0.06, "p99_s": 0.06,
        "bound_s": 0.04, "predicted_s": 0.049, "fraction_of_bound": 0.8, "prediction_error": -0.02, "iterations": 9,
        "start": "instant", "skew_s": None, "service": "best-effort", "cross_traffic": 0.0,
    }  # fmt: skip
    return made | changes


def sweep(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"schema": "detcoll.bench/1", "host": {"cpu": "EPYC"}, "rows": list(rows), "left_out": []} | changes


def page_of(*results: dict[str, Any]) -> str:
    """Return the report on results, after it was found well-formed and to fetch nothing."""
    made = report(ReportInputs(tuple(parse_result(json.dumps(each).encode(), "x.json") for each in results)))
    text = html_text(made)
    check(text)
    return text


def check(text: str) -> None:
    page = parsed(text)
    assert page.tags[:2] == ["html", "head"]
    assert page.tags.count("h1") == page.tags.count("main") == 1
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name in ("src", "style") or name.startswith("on")]
    ids = [value for _, name, value in page.attributes if name == "id"]
    links = [value or "" for _, name, value in page.attributes if name == "href"]
    assert len(set(ids)) == len(ids)
    assert links, "there is a list of contents"
    assert {link.removeprefix("#") for link in links} == {
        each for each in ids if each and not each.endswith("-heading")
    }
    assert len(set(every_heading(text))) == len(every_heading(text)), "no two sections are called the same"
    assert "-0.0" not in shown(text)
    assert not re.search(r"@import|url\(", text)
    assert ("html", "lang", "en") in page.attributes
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    for svg in pictures(text):
        assert svg.findtext("title")
        assert svg.find("desc") is not None
        assert float(svg.attrib["viewBox"].split()[2]) > 0
        assert not re.search(r"\bnan\b", ElementTree.tostring(svg, encoding="unicode").lower())
        check_labels(svg)


def pictures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg .*?</svg>", text, re.DOTALL)]


def headings(text: str) -> list[str]:
    """Return the headings of the sections, without the name of their result."""
    return [re.sub("<span.*", "", found) for found in re.findall(r"<section.*?><h[23].*?>(.*?)</h[23]>", text)]


def every_heading(text: str) -> list[str]:
    return [re.sub("<.*?>", "", found) for found in re.findall(r"<h[1234].*?>(.*?)</h[1234]>", text)]


def shown(text: str) -> str:
    """Return a page without its styles and coordinates."""
    return re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL)


def test_a_measurement_says_what_it_found_and_what_made_it() -> None:
    text = page_of(measurement())
    assert "Across 2 sites, slotted trains at 50\N{NO-BREAK SPACE}% of one cluster" in text
    assert headings(text) == [
        "Efficiency",
        "Iteration time over the run",
        "All figures of training",
        "Command and machine",
    ]
    assert "detcoll measure --json r.json" in re.sub("<.*?>", "", text)
    for said in (
        "AMD EPYC",
        "bit for bit",
        "75.0\N{NO-BREAK SPACE}%",
        "b2958e72",
        "20.0",
    ):
        assert said in text, said
    assert "prefers-color-scheme:dark" in text


def test_every_picture_is_drawn_for_desks_and_for_phones() -> None:
    kinds = [svg.attrib["class"].split()[-1] for svg in pictures(page_of(measurement()))]
    assert kinds == ["wide", "narrow"] * 2


def test_bars_of_a_measurement_are_in_proportion_to_efficiency() -> None:
    wide = pictures(page_of(measurement()))[0]
    bars = [float(node.attrib["width"]) for node in wide.iter("rect") if "fill" in node.attrib["class"].split()]
    assert bars[1] / bars[0] == pytest.approx(0.5, abs=1e-3)
    assert bars[2] / bars[0] == pytest.approx(0.1, abs=1e-3)


def test_several_networks_give_curves_and_a_co_tenants_round_trip() -> None:
    line = {"co_tenant": {"median_s": 0.02, "p99_s": 0.0345, "answered": 9, "sent": 9}}
    runs = [
        run("slotted", 0.06, 0.5 if service == "deterministic" else 0.5 - 0.3 * share, service=service,
            cross_traffic=share, line=line)
        for service in ("best-effort", "deterministic")
        for share in (0.0, 1.0)
    ]  # fmt: skip
    text = page_of(measurement(*runs))
    assert {"Under cross traffic", "A co-tenant's round trip"} <= set(headings(text))
    assert "slotted trains at 20 to 50\N{NO-BREAK SPACE}%" in text, "the worst is not left out of the headline"
    assert "34.5\N{NO-BREAK SPACE}ms" in text
    curves = next(svg for svg in pictures(text) if svg.findtext("title") == "Efficiency against others' traffic")
    lines = [node for node in curves.iter("polyline") if (node.find("title")) is not None]
    assert [node.findtext("title") for node in lines] == ["slotted, best-effort", "slotted, deterministic"]
    falls, holds = ([float(pair.split(",")[1]) for pair in node.attrib["points"].split()] for node in lines)
    assert falls[0] == holds[0] == holds[1] < falls[1]


def tables(text: str) -> list[tuple[list[str], list[list[tuple[str | None, str]]]]]:
    """Return the headings of each table, and its rows of cells: what stands before each on a phone, and its text."""
    found = []
    for table in (ElementTree.fromstring(each) for each in re.findall(r"<table.*?</table>", text, re.DOTALL)):
        rows = [[(cell.get("data-heading"), cell.text or "") for cell in row] for row in table.iterfind("tbody/tr")]
        found.append(([cell.text or "" for cell in table.iterfind("thead/tr/th")], rows))
        assert table.findtext("caption")
        assert {cell.get("scope") for cell in table.iter("th")} == {"row", "col"}
    return found


def test_every_figure_stands_in_a_table_with_its_heading() -> None:
    text = page_of(measurement(), sweep(row(4 << 20), row(8 << 20, prediction_error=-0.0001)), study())
    runs, calls, *_ = tables(text)
    for headings_of, rows in tables(text):
        for cells in rows:
            assert len(cells) == len(headings_of)
            named = [heading for heading, _ in cells]
            assert all(heading in (None, title) for heading, title in zip(named, headings_of, strict=True))
            assert named == sorted(named, key=lambda each: each is not None or -1), "names first, then figures"
            assert all(cell for _, cell in cells)
    assert [cells[0][1] for cells in runs[1]] == ["single cluster", "slotted", "gloo"]
    assert dict(runs[1][1])["p01 \N{EN DASH} p99"] == "54.0\N{NO-BREAK SPACE}\N{EN DASH} 72.0\N{NO-BREAK SPACE}ms"
    assert [cell for heading, cell in calls[1][0] if heading is None] == [
        "all-reduce",
        "4\N{NO-BREAK SPACE}MiB",
        "slotted",
    ]
    assert [dict(cells)["came"] for cells in calls[1]] == ["2.0\N{NO-BREAK SPACE}% late", "on time"]


def test_several_results_are_told_apart(tmp_path: Path) -> None:
    paths = [put(tmp_path / name, measurement(host={"cpu": name})) for name in ("old/m.json", "new/m.json")]
    paths.append(put(tmp_path / "b.json", sweep(row(4))))
    text = html_text(report(gather(paths)))
    check(text)
    assert [found for found in every_heading(text) if found.startswith(("Training", "Collectives"))] == [
        "Training: old/m.json", "Training: new/m.json", "Collectives: b.json"
    ]  # fmt: skip
    assert {"Efficiency of old/m.json", "Efficiency of new/m.json"} <= set(every_heading(text))
    contents = re.search("<nav.*?</nav>", text)
    assert contents is not None
    assert contents.group().count(">Efficiency</a>") == 2


def test_a_file_that_is_given_twice_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = put(tmp_path / "run" / "results.json", measurement())
    put_traces(tmp_path / "run" / "traces")
    copied = put(tmp_path / "m.json", measurement())
    argv = ["report", str(run.parent), str(run), str(copied), str(run.parent / "traces"), "--out", str(tmp_path)]
    assert main(argv) == 0
    said = capsys.readouterr().err
    for name in (str(run), f"{copied} (as {run})", "rank0.json", "rank1.json"):
        assert name in said
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    check(text)
    assert headings(text).count("Efficiency") == headings(text).count("Planned and actual sends") == 1
    assert "Given twice, and shown once" in text
    twice = gather([run] * 7 + [copied])
    assert len(twice.results) == 1
    assert "and 3 more" in twice.remarks[0]
    assert gather([run]).remarks == ()


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put_traces(tmp_path / name / "traces")
        (tmp_path / name / "cities.toml").write_text(MAP.replace("2.5", "2.5" if name == "a" else "3.5"))
    given = [tmp_path / name / file for name in ("a", "b") for file in ("traces", "cities.toml")]
    text = html_text(report(gather(given)))
    check(text)
    assert {"Planned and actual sends: a/traces", "Map: a/cities", "Map: b/cities"} <= set(headings(text))


def test_a_topology_is_shown_without_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_traces(tmp_path / "traces")
    lines = tmp_path / "lines.toml"
    lines.write_text(Topology.uniform(2, 1, 125e6, 7 * MS).to_toml().replace("site1", "wuhan"))
    assert main(["report", str(tmp_path / "traces"), str(lines), "--out", str(tmp_path)]) == 0
    assert "lines.toml is a topology: its sites have no latitude and longitude" in capsys.readouterr().err
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    check(text)
    assert headings(text) == [
        "Planned and actual sends", "The calendar of a cycle", "Topology: lines.toml", "Files"
    ]  # fmt: skip
    assert "so there is a table and no map" in text
    sites, links = tables(text)
    assert [[cell for _, cell in cells] for cells in sites[1]] == [
        [name, "1", "1\N{NO-BREAK SPACE}Gbit/s", "1\N{NO-BREAK SPACE}Gbit/s"] for name in ("site0", "wuhan")
    ]
    assert dict(links[1][0])["one way"] == "7.00\N{NO-BREAK SPACE}ms"
    assert "wuhan" in (pictures(text)[0].findtext("title") or ""), "it names the sites of the traces"
    alone = html_text(report(gather([lines])))
    check(alone)
    assert "From a topology file." in alone


def test_a_map_lists_its_sites(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(MAP)
    text = html_text(report(gather([tmp_path / "m.toml"])))
    assert [[cell for _, cell in cells] for cells in tables(text)[0][1]] == [
        ["a", "1\N{DEGREE SIGN}", "2.5\N{DEGREE SIGN}"], ["b", "3\N{DEGREE SIGN}", "4\N{DEGREE SIGN}"]
    ]  # fmt: skip


def test_one_network_gives_no_curves() -> None:
    assert "Under cross traffic" not in headings(page_of(measurement()))


def test_names_from_files_stay_text() -> None:
    hostile = measurement(
        run(HOSTILE, 0.06, 0.5, transport=HOSTILE, algorithm=HOSTILE, result_digest=HOSTILE, service=HOSTILE),
        host={"cpu": HOSTILE, "cores": HOSTILE},
        left_out=[{"transport": HOSTILE, "why": HOSTILE, "network": HOSTILE}],
        command=HOSTILE,
    )
    hostile["workload"]["name"] = HOSTILE
    text = page_of(hostile, sweep(row(4, transport=HOSTILE, collective=HOSTILE), row(9, transport=HOSTILE)))
    assert "<script" not in text
    assert "\x00" not in text
    assert "alert(1)" in text


def test_empty_and_partial_results_make_a_page() -> None:
    text = page_of(measurement(runs=[], left_out=[{"transport": "gloo", "why": "torch is not installed"}]))
    assert "Nothing was measured" in text
    assert "torch is not installed" in text
    bare = {"name": "slotted", "iteration_s": times(0.1, 0)}
    assert "All figures of training" in headings(page_of({"schema": "detcoll.measure/1", "runs": [bare]}))
    assert "Nothing was measured" in page_of(sweep())
    alone = row(
        4, bound_s=None, fraction_of_bound=None, predicted_s=None, prediction_error=None, ranks=None, sites=None
    )
    assert headings(page_of(sweep(alone))) == ["All figures of the collectives", "Command and machine"]
    assert "not kept in this file" in re.sub("<.*?>", "", page_of(sweep(alone)))
    script = measurement(run("slotted", 1.0, 1.0, sync_s=None, wire_busy_fraction=None), digests_equal=None)
    assert "bit for bit" not in page_of(script)
    assert "did not give the same bits" in page_of(measurement(digests_equal=False))


def test_a_doubtful_baseline_is_said_to_be_one() -> None:
    slow = run("single cluster", 0.03, 1.0, setting="single-cluster", arithmetic_ratio=1.2)
    assert "20.0 % above its own arithmetic" in page_of(measurement(runs=[slow, run("slotted", 0.06, 0.5)]))
    assert "doubtful" not in page_of(measurement())


def test_a_sweep_says_how_near_it_comes_to_the_floor() -> None:
    audit = {"slotting": "calendar", "passed": False, "inside_share": 0.5}
    rows = [
        row(4 << 20),
        row(64 << 20, fraction_of_bound=0.97),
        row(64 << 20, transport="gloo", fraction_of_bound=0.99),
    ]
    text = page_of(sweep(*rows, audit=audit))
    assert "All_reduce" not in text
    assert "All-reduce of 64 MiB over slotted reaches 97\N{NO-BREAK SPACE}% of the floor, at best" in text
    assert "did NOT keep to its calendar" in text
    assert headings(text)[:2] == ["Share of the floor", "Time over size"]


def test_a_sweep_under_cross_traffic_gives_curves() -> None:
    rows = [row(4, cross_traffic=share, fraction_of_bound=1 - share / 2) for share in (1.0, 0.0)]
    assert "Under cross traffic" in headings(page_of(sweep(*rows)))


def test_a_sweep_over_devices_says_where_arrays_were() -> None:
    rows = [row(4 << 20, device=device, fraction_of_bound=share) for device, share in (("cpu", 0.8), ("cuda", 0.9))]
    text = page_of(sweep(*rows))
    assert "All-reduce of 4 MiB on cuda over slotted reaches 90" in text
    assert "arrays on cpu and cuda" in text
    for place in ("th", "text"):
        assert re.search(rf"<{place}[^>]*>(<[^>]*>)?slotted, cuda<", text), place
    assert "cuda" not in page_of(sweep(*rows[:1]))
    workload = {"name": "digits", "device": "cuda", "iterations": 8, "batches": 300}
    assert "8 iterations, 300 batches in each, arrays on cuda." in page_of(measurement(workload=workload))


def study(**changes: Any) -> dict[str, Any]:
    runs = [
        {"setting": "single-cluster", "line_bit_per_s": None, "iteration_s": 2.0, "efficiency": 1.0, "exposed_s": 0.01},
        {"setting": "ordinary", "line_bit_per_s": 1e11, "iteration_s": 4.0, "efficiency": 0.5, "exposed_s": 2.0},
        {"setting": "deterministic", "line_bit_per_s": 1e11, "iteration_s": 2.5, "efficiency": 0.8, "exposed_s": 0.5},
    ]
    points = [
        {"setting": "ordinary", "changed": "loss", "value": 10.0**-power, "iteration_s": 4.0, "efficiency": power / 10}
        for power in (4, 5, 6)
    ]
    need = {"condition": HOSTILE, "target": 0.98, "line_bit_per_s": None, "efficiency": 0.9, "iteration_s": 2.2}
    facts = {"name": "two-cities", "sites": 2, "ranks": 8, "parameters": 7 * 10**9}
    made = {
        "schema": "detcoll.simulate/1", "scenario": facts, "algorithm": "exchange", "runs": runs,
        "sensitivity": points, "needed": [need], "command": "detcoll simulate x",
    }  # fmt: skip
    return made | changes


def test_a_simulation_says_that_it_is_one() -> None:
    text = page_of(study())
    assert "the deterministic network trains at 80.0\N{NO-BREAK SPACE}% of one cluster" in text
    assert "in simulation</h1>" in text
    wanted = [
        "Efficiency, simulated",
        "What it depends on",
        "All figures of the simulation",
        "The line that 98.0\N{NO-BREAK SPACE}% needs",
    ]
    assert headings(text) == [*wanted, "Command"]
    assert "none is enough" in text
    curve = next(svg for svg in pictures(text) if svg.findtext("title") == "Efficiency against packets lost on the way")
    points = next(node for node in curve.iter("polyline") if node.find("title") is not None).attrib["points"].split()
    xs = [float(point.split(",")[0]) for point in points]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.02), "powers of ten are equally far apart"
    assert "Nothing was measured" in page_of(study(runs=[], sensitivity=[], needed=[], scenario={}))


def test_a_simulated_scenario_brings_its_map(tmp_path: Path) -> None:
    shipped = put(tmp_path / "s.json", study())
    assert [(each.name, len(each.places), each.links) for each in gather([shipped]).maps] == [
        ("two-cities", 2, ((0, 1),))
    ]
    own = put(tmp_path / "o.json", study(scenario={"name": "own"}))
    assert gather([own]).maps == ()
    mine = tmp_path / "two-cities.toml"
    mine.write_text(MAP)
    assert [each.places[0].name for each in gather([shipped, mine]).maps] == ["a"], "one that is given goes first"


def put(path: Path, told: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


def put_traces(folder: Path) -> None:
    for rank in range(2):
        told = trace(rank, rank, collectives=[call(0, 50)], sends=[send(5, 10, 1 - rank)])
        put(folder / f"rank{rank}.json", told)


MAP = """
[[site]]
name = "a"
latitude = 1
longitude = 2.5
ranks = 4
[[site]]
name = "b"
latitude = 3
longitude = 4
"""


def test_the_command_draws_all_that_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "run" / "results.json", measurement())
    put_traces(tmp_path / "run" / "traces" / "wide-area-slotted-1")
    lines = Topology.uniform(2, 1, 125e6, 7 * MS)
    (tmp_path / "run" / "topology.toml").write_text(lines.to_toml())
    (tmp_path / "cities.toml").write_text(MAP)
    out = tmp_path / "deep" / "out"
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "cities.toml"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    text = (out / "report.html").read_text(encoding="utf-8")
    check(text)
    for wanted in ("Planned and actual sends", "The calendar of a cycle", "Map: cities"):
        assert wanted in headings(text)
    assert "site0" in text, "the topology beside the results names the sites"
    assert not (tmp_path / "deep" / "report.html").exists()


def test_pictures_are_written_as_files_of_their_own_on_request(tmp_path: Path) -> None:
    path = put(tmp_path / "m.json", measurement())
    assert main(["report", str(path), "--out", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.svg")) == []
    assert main(["report", str(path), "--out", str(tmp_path), "--svg"]) == 0
    files = sorted(tmp_path.glob("*.svg"))
    assert [file.name for file in files] == ["01-efficiency-of-each-run.svg", "02-time-of-each-iteration.svg"]
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.attrib["width"] == "952"


def test_runs_that_keep_one_calendar_show_it_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put_traces(tmp_path / name)
    shown = headings(html_text(report(gather([tmp_path / "a", tmp_path / "b"]))))
    assert shown == ["Planned and actual sends: a", "The calendar of a cycle", "Planned and actual sends: b"]


def test_the_command_writes_for_perfetto_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_traces(tmp_path / "traces")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "traces/rank0.json", "traces/rank1.json", "--perfetto", "p.json"]) == 0
    assert {event["ph"] for event in json.loads(Path("p.json").read_text())["traceEvents"]} == {"M", "X", "i"}
    assert not Path("report").exists()
    assert main(["report", "traces"]) == 0
    assert Path("report/report.html").is_file()


def test_bench_and_measure_keep_their_command_line() -> None:
    with carrying_out(["measure", "--rate", "1 Gbit/s"]):
        assert command_line() == "detcoll measure --rate '1 Gbit/s'"
    assert command_line() == "detcoll"


def test_bench_files_name_their_command(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    argv = ["bench", "--bytes", "1KiB", "--iterations", "1", "--warmup", "0", "--transport", "shm", "--json", str(path)]
    assert main(argv) == 0
    assert json.loads(path.read_text())["command"] == f"detcoll {' '.join(argv)}"
    assert main(["report", str(path), "--out", str(tmp_path)]) == 0
    check((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", "{", "not a JSON object"),
        ("a.json", "[]", "not a JSON object"),
        ("a.json", '{"schema": "other"}', "schema='other'; a report takes files of measure, bench and simulate --json"),
        ("a.json", '{"schema": "detcoll.measure/1", "runs": [{}]}', "is not a valid result"),
        ("a.toml", "[[site]]\nname = 'a'\n", "no map, since not every site has .*, and it is no topology: .*ranks"),
        ("a.toml", "[[site]]\nname = 'a'\nlatitude = 1\n", "no map"),
        ("a.toml", "[", "no map"),
        ("a.toml", MAP + '[[link]]\nbetween = ["a", "x"]\n', "'x'"),
    ],
)
def test_files_that_cannot_be_drawn_are_named(tmp_path: Path, name: str, content: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=told) as caught:
        gather([path])
    assert name in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, told in (
        ([str(tmp_path)], "neither results.json nor rank"),
        ([str(tmp_path / "absent.json")], "absent.json"),
        ([str(tmp_path / "absent.toml")], "absent.toml"),
        ([], "FILES are missing"),
        ([str(put(tmp_path / "m.json", measurement())), "--perfetto", str(tmp_path / "p.json")], "found none"),
    ):
        assert main(["report", *wrong]) == 2
        assert told in capsys.readouterr().err


def test_links_of_a_map_are_taken_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(MAP + '[[site]]\nname = "c"\nlatitude = 0\nlongitude = 0\n')
    assert gather([path]).maps[0].links == ((0, 1), (0, 2), (1, 2))
    path.write_text(path.read_text() + '[[link]]\nbetween = ["c", "a"]\none_way = "1 ms"\n')
    assert gather([path]).maps[0].links == ((2, 0),)


def test_delays_come_from_the_topology_or_from_equal_round_trips(tmp_path: Path) -> None:
    result = put(tmp_path / "m.json", measurement())
    assert gather([result]).one_way_ns()(0, 1) == 10 * MS  # type: ignore[misc]
    lines = tmp_path / "t.toml"
    lines.write_text(Topology.uniform(2, 1, 125e6, 7 * MS).to_toml())
    assert gather([result], lines).one_way_ns()(0, 1) == 7 * MS  # type: ignore[misc]
    unequal = measurement()
    unequal["workload"]["round_trip_s"] = [0.01, 0.02, 0.03]
    assert gather([put(tmp_path / "u.json", unequal)]).one_way_ns() is None


def test_only_the_traces_of_an_earlier_report_are_forgotten(tmp_path: Path) -> None:
    put_traces(tmp_path / "traces" / "wide-area-slotted-1")
    kept = put(tmp_path / "traces" / "wide-area-slotted-1" / "mine.json", {})
    forget_traces(tmp_path)
    assert [path for path in (tmp_path / "traces").rglob("*") if path.is_file()] == [kept]


def test_files_of_other_versions_are_read_as_far_as_they_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"median": 0.1, "p01": 0.09, "p99": 0.12, "samples": [0.1], "later": 1}
    run = {"name": "slotted", "iteration_s": times, "line": {"policed_segments": 3}, "later": {}}
    row = {"collective": "all_reduce", "transport": "slotted", "bytes": 4096, "median_s": 0.1, "later": []}
    audit = {"slotting": "calendar", "passed": True, "inside_share": 1.0}
    setting = {"setting": "deterministic", "iteration_s": 1.5, "efficiency": 0.9}
    need = {"condition": "none", "target": 0.9, "line_bit_per_s": 1e9, "efficiency": 0.9, "iteration_s": 1.0}
    for name, data in (
        ("measure", {"schema": "detcoll.measure/1", "runs": [run]}),
        ("bench", {"schema": "detcoll.bench/1", "rows": [row], "audit": audit, "later": 1}),
        ("simulate", {"schema": "detcoll.simulate/1", "runs": [setting], "needed": [need]}),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        assert main(["report", str(path), "--out", str(tmp_path / name)]) == 0, capsys.readouterr().err
        assert (tmp_path / name / "report.html").is_file()
    for lacking, field in (({"name": "slotted"}, "iteration_s"), ({"iteration_s": times}, "name")):
        path.write_text(json.dumps({"schema": "detcoll.measure/1", "runs": [lacking]}))
        assert main(["report", str(path)]) == 2
        assert f"missing required field `{field}`" in capsys.readouterr().err
