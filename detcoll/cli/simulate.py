"""``detcoll simulate``: what an iteration takes in a scenario, in virtual time."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.text import Text

from detcoll.cli.invocation import command_line
from detcoll.cli.quantity import Quantity, Whole
from detcoll.cli.results import NO_RESULTS, ResultOptions
from detcoll.cli.terminal import output_console, progress_bars
from detcoll.cli.training import ANY_ITERATION, IterationOptions
from detcoll.errors import UsageError
from detcoll.job.settings import check_slotting
from detcoll.measure.results import write_result
from detcoll.measure.sheet import NONE, Column, Sheet
from detcoll.plan import Slotting
from detcoll.quantities import format_bytes, format_count, format_duration, format_rate, parse_rate_bytes_per_s
from detcoll.report import gather, write_report
from detcoll.report.inputs import RESULTS
from detcoll.scenarios import Study, changed, load, shipped, study
from detcoll.scenarios.buckets import require_few_sites
from detcoll.scenarios.study import Needed, Point, SettingResult

LINE_CHARACTERS = 110
_EFFICIENCY = 0.98
_CHANGED = {"reserved_bit_per_s": "reserved", "loss": "loss", "cross_traffic": "taken by others"}


@Parameter(name="*", group="Lines and networks")
@dataclass(frozen=True, kw_only=True)
class ChangedNetwork:
    """What replaces the lines and the ordinary network of a scenario."""

    uplink: Quantity | None = None
    """Every site's line, such as "800 Gbit/s"."""

    reserved: Quantity | None = None
    """What is reserved of it."""

    loss: float | None = None
    """Share of packets lost on the ordinary network."""

    cross_traffic: float | None = None
    """Share of every line that others take from it."""

    connections: Whole | None = None
    """TCP connections of each pair of ranks on it."""

    def values(self) -> dict[str, Any]:
        """Return the values by the names of `detcoll.scenarios.changed`; None where not given."""
        line_bytes_per_s = None if self.uplink is None else parse_rate_bytes_per_s(self.uplink, "uplink")
        reserved_bytes_per_s = None if self.reserved is None else parse_rate_bytes_per_s(self.reserved, "reserved")
        return {
            "line_bytes_per_s": line_bytes_per_s, "reserved_bytes_per_s": reserved_bytes_per_s, "loss": self.loss,
            "cross_traffic": self.cross_traffic, "connections": self.connections,
        }  # fmt: skip


_UNCHANGED = ChangedNetwork()


def simulate(
    scenario: str = "forty-cities",
    *,
    efficiency: float | None = None,
    network: ChangedNetwork = _UNCHANGED,
    parameters: Whole | None = None,
    iteration: IterationOptions = ANY_ITERATION,
    slotting: Literal["calendar", "turns", "share"] | None = None,
    variants: bool = True,
    list: bool = False,
    results: ResultOptions = NO_RESULTS,
) -> int:
    """Simulate training over a scenario's sites: one cluster, a deterministic network, an ordinary one.

    Runs the library's own plans and calendars in virtual time. Options replace what the scenario says.

    Parameters
    ----------
    scenario
        The name of a shipped scenario, or a scenario file.
    efficiency
        Also tell which line every site needs for this efficiency; 0.98 unless given.
    parameters
        Parameters of the model.
    slotting
        How flows share lines on the deterministic network; what jobs do unless given.
    variants
        Look at sensitivities, and at what the efficiency needs.
    list
        Name the shipped scenarios and end.
    """
    if list:
        for name in shipped():
            print(f"{name}: {load(name).description}")
        return 0
    if efficiency is not None and not variants:
        raise UsageError(f"efficiency={efficiency} is of no use with --no-variants, which leaves out what it needs")
    results.require_writable()
    chosen = changed(load(scenario), **network.values(), parameters=parameters, **iteration.values())
    mode = None if slotting is None else Slotting.parse(slotting)
    check_slotting(mode, chosen.reserved)
    require_few_sites(chosen.reserved)
    with progress_bars() as say:
        made = study(chosen, _EFFICIENCY if efficiency is None else efficiency, mode, variants=variants, say=say)
    result = replace(made, command=command_line())
    if results.json is not None:
        write_result(results.json, result)
    output_console().print(study_table(result))
    if results.report is not None:
        _write_report(result, results.report, scenario)
    return 0


def _write_report(result: Study, report: Path, scenario: str) -> None:
    write_result(report / RESULTS, result)
    own = () if scenario in shipped() else (Path(scenario),)
    print(f"report: {write_report(report, gather((report, *own)))}")


def study_table(result: Study) -> RenderableType:
    """Return the tables of a study, with what they rest on above."""
    parts: list[RenderableType] = [*_heading(result), _settings(result)]
    if result.sensitivity:
        parts.append(_points(result.sensitivity))
    if result.needed:
        parts.append(_needs(result.needed))
        note = f"ranks of a site taken together, which here differs by {result.together_error:+.2%} from every rank"
        parts.append(Text(f"The last two tables: {note}.", style="dim"))
    return Group(*parts)


def _heading(result: Study) -> list[Text]:
    facts = result.scenario
    told = (
        f"{facts['sites']} sites, {facts['ranks']} ranks, at most {facts['longest_km']:,.0f} km and "
        f"{format_duration(facts['longest_one_way_s'] * 1e9)} apart; {facts['parameters']:,} parameters, "
        f"{format_bytes(facts['gradient_bytes'])} of {facts['precision']} gradients in "
        f"{format_count(facts['buckets'], 'bucket')}; "
        f"{facts['compute_s']:g} s of computing, of which gradients become final in the last {facts['backward']:.1%}, "
        f"and {facts['overlap']:.0%} of them are summed meanwhile. Algorithm: {result.algorithm}. Ordinary network: "
        f"{facts['cross_traffic']:.0%} taken by others, loss {facts['loss']:g}, TCP {facts['control']}, "
        f"{format_count(facts['connections'], 'connection')} a pair of ranks."
    )
    title = Text(f"{facts['name']}: {facts['description']}", style="bold")
    return [title, *(Text(line) for line in textwrap.wrap(told, LINE_CHARACTERS))]


def _settings(result: Study) -> Sheet:
    def column(heading: str, cell: Callable[[SettingResult], str], *, is_label: bool = False) -> Column:
        return Column(heading, tuple(cell(run) for run in result.runs), is_label)

    return Sheet(
        "An iteration",
        [
            column("network", lambda run: run.setting, is_label=True),
            column("line", lambda run: _line(run.line_bit_per_s)),
            column("iteration", lambda run: _time(run.iteration_s)),
            column("efficiency", lambda run: f"{run.efficiency:.1%}"),
            column("beyond computing", lambda run: _time(run.exposed_s)),
            column("all buckets", lambda run: _time(run.sync_s)),
            column("first bucket", lambda run: _time(run.bucket_s)),
            column("its floor", lambda run: _time(run.bound_s)),
            column("each more", lambda run: _time(run.interval_s)),
        ],
    )


def _points(points: tuple[Point, ...]) -> Sheet:
    def column(heading: str, cell: Callable[[Point], str], *, is_label: bool = False) -> Column:
        return Column(heading, tuple(cell(point) for point in points), is_label)

    return Sheet(
        "What it depends on",
        [
            column("network", lambda point: point.setting, is_label=True),
            column("changed", lambda point: _CHANGED[point.changed], is_label=True),
            column("to", _value),
            column("iteration", lambda point: _time(point.iteration_s)),
            column("efficiency", lambda point: f"{point.efficiency:.1%}"),
        ],
    )


def _value(point: Point) -> str:
    return format_rate(point.value / 8) if point.changed == "reserved_bit_per_s" else f"{point.value:g}"


def _needs(needs: tuple[Needed, ...]) -> Sheet:
    def column(heading: str, cell: Callable[[Needed], str], *, is_label: bool = False) -> Column:
        return Column(heading, tuple(cell(need) for need in needs), is_label)

    return Sheet(
        f"The line that every site needs for {needs[0].target:.1%}",
        [
            column("if", lambda need: need.condition, is_label=True),
            column(
                "line", lambda need: "none is enough" if need.line_bit_per_s is None else _line(need.line_bit_per_s)
            ),
            column("iteration", lambda need: _time(need.iteration_s)),
            column("efficiency", lambda need: f"{need.efficiency:.1%}"),
            column("ordinary on it", lambda need: _time(need.ordinary_iteration_s)),
            column(
                "its efficiency",
                lambda need: NONE if need.ordinary_efficiency is None else f"{need.ordinary_efficiency:.1%}",
            ),
        ],
    )


def _line(bit_per_s: float | None) -> str:
    return NONE if bit_per_s is None else format_rate(bit_per_s / 8)


def _time(seconds: float | None) -> str:
    return NONE if seconds is None else format_duration(seconds * 1e9)
