"""``detcoll plan``: a topology's calendar, a collective's plan on it, and what to reserve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from cyclopts import Parameter

from detcoll.cli.lines import LINES_GROUP, SiteOptions
from detcoll.cli.plan_tables import print_calendar, print_needed, print_reservation
from detcoll.cli.quantity import Quantity, Whole
from detcoll.cli.terminal import progress_bars
from detcoll.cli.training import ITERATION_GROUP, IterationOptions
from detcoll.draw import cycle_of_calendar, cycle_picture, svg_text
from detcoll.errors import UsageError
from detcoll.job.settings import check_slotting
from detcoll.outputs import require_writable, write_file
from detcoll.plan import Calendar, Collective, SiteReservation, Slotting, reserve
from detcoll.plan.summary import Summary, summarise
from detcoll.quantities import parse_duration_ns, parse_size_bytes
from detcoll.scenarios import Scenario, changed, load, shipped
from detcoll.scenarios.buckets import default_calendar, require_few_sites
from detcoll.scenarios.scenario import from_topology, is_scenario, with_rate
from detcoll.scenarios.study import Needed, need
from detcoll.scenarios.workload import Workload
from detcoll.signature import signature_of
from detcoll.topology import Topology
from detcoll.types import accumulation_dtype, parse_dtype

SCHEMA = "detcoll.plan-report/1"
SVG_WIDTH = 920


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The file of `detcoll plan --json`."""

    schema: str
    topology: Topology
    calendar: Calendar
    plan: Summary
    needed: Needed | None = None
    reservation: tuple[SiteReservation, ...] = ()


@Parameter(name="*", group=LINES_GROUP)
@dataclass(frozen=True, kw_only=True)
class PlannedOptions(SiteOptions):
    """Sites of equal size with lines between, or those of a file, which may say more than that."""

    topology: Path | None = None
    """A topology file, a scenario file, or the name of a shipped scenario, instead of the four that follow."""


@Parameter(name="*", group="The collective")
@dataclass(frozen=True, kw_only=True)
class CollectiveOptions:
    """The collective to plan."""

    collective: str = "all_reduce"
    """What to plan: a collective such as all_reduce or all_to_all."""

    bytes: Quantity = "64MiB"
    """Its size."""

    dtype: str = "float32"
    """Element type."""


@Parameter(name="*", group=ITERATION_GROUP)
@dataclass(frozen=True, kw_only=True)
class PlannedIteration(IterationOptions):
    """An iteration of the training that is to reach an efficiency."""

    compute: Quantity | None = None
    """Computing time of one iteration, such as "16 s"."""


_ANY, _COLLECTIVE, _ITERATION = PlannedOptions(), CollectiveOptions(), PlannedIteration()


def plan(
    *,
    lines: PlannedOptions = _ANY,
    what: CollectiveOptions = _COLLECTIVE,
    slotting: Literal["calendar", "turns", "share", "off"] | None = None,
    efficiency: float | None = None,
    parameters: Whole | None = None,
    precision: str | None = None,
    iteration: PlannedIteration = _ITERATION,
    reservation: bool = False,
    base_time: Quantity | None = None,
    json: Path | None = None,
    svg: Path | None = None,
) -> int:
    """Show the calendar of a topology and a collective's plan on it: steps, bytes, rates and the predicted time.

    With --efficiency: what every site must reserve for a training to keep to that share of a single cluster's speed.
    With --reservation: that, or the lines as they are, in the form in which to ask a carrier for it.

    Parameters
    ----------
    slotting
        How flows share lines; what jobs do unless given.
    efficiency
        A share of the single cluster's speed, such as 0.98.
    parameters
        Parameters of the model, for --efficiency. A scenario says it unless given, and the five that follow too.
    precision
        Element type of gradients.
    reservation
        Print traffic specifications (RFC 9016) and gate lists (802.1Qbv).
    base_time
        With --reservation: when a cycle of the gates begins, by the clock that the sites share; "0 ns" unless given.
    json
        File for all of it.
    svg
        File for a picture of the calendar.
    """
    require_writable(json, "json")
    require_writable(svg, "svg")
    base_time_ns = _base_time_ns(base_time, reservation)
    mode = None if slotting is None else Slotting.parse(slotting)
    found = _found(lines)
    topology = found.reserved if isinstance(found, Scenario) else found
    asked = _collective(what, topology.size)
    check_slotting(mode, topology)
    require_few_sites(topology)
    work = {"parameters": parameters, "precision": precision, **iteration.values()}
    answer = _needed(found, efficiency, mode, work, str(lines.topology or "topology"))
    calendar = default_calendar(topology, mode)
    report = PlanReport(
        SCHEMA, topology, calendar, summarise(asked, topology, calendar), answer,
        _reservation(topology, mode, answer, base_time_ns) if reservation else (),
    )  # fmt: skip
    _write(report, json, svg)
    _show(report)
    return 0 if answer is None or answer.line_bit_per_s is not None else 1


def _base_time_ns(base_time: str | None, reservation: bool) -> int:
    if base_time is not None and not reservation:
        raise UsageError(f"base_time={base_time!r} is of no use without --reservation")
    return parse_duration_ns("0 ns" if base_time is None else base_time, "base_time")


def _write(report: PlanReport, json: Path | None, svg: Path | None) -> None:
    if json is not None:
        write_file(json, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if svg is not None:
        picture = cycle_picture(cycle_of_calendar(report.calendar, report.topology), SVG_WIDTH)
        write_file(svg, svg_text(picture).encode())


def _show(report: PlanReport) -> None:
    if report.needed is not None:
        print_needed(report.needed, report.topology)
    elif not report.reservation:
        print_calendar(report.topology, report.calendar, report.plan)
    if report.reservation:
        print_reservation(report.reservation)


def _found(options: PlannedOptions) -> Scenario | Topology:
    """Return what the options name: a scenario, or lines alone."""
    name = None if options.topology is None else str(options.topology)
    if name is None or not (name in shipped() or _says_what_is_trained(name)):
        return options.wide_topology()
    options.require_one_way()
    return load(name)


def _says_what_is_trained(path: str) -> bool:
    try:
        return is_scenario(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False  # reading it as a topology says what is wrong


def _needed(
    found: Scenario | Topology, efficiency: float | None, mode: Slotting | None, work: dict[str, Any], name: str
) -> Needed | None:
    if efficiency is None:
        if useless := [key for key, value in work.items() if value is not None]:
            names = ", ".join("--" + key.removesuffix("_ns") for key in useless)
            raise UsageError(f"{names}: of no use without --efficiency")
        return None
    if isinstance(found, Topology):
        if missing := [key for key in ("parameters", "compute_ns") if work[key] is None]:
            names = ", ".join("--" + key.removesuffix("_ns") for key in missing)
            raise UsageError(f"efficiency={efficiency} needs {names} as well; expected such as --compute '16 s'")
        given = {key: value for key, value in work.items() if value is not None}
        scenario = from_topology(found, Workload(**({"precision": "bfloat16"} | given)), name)
    else:
        scenario = changed(found, **work)
    with progress_bars() as say:
        return need(scenario, efficiency, mode, say)


def _reservation(
    lines: Topology, mode: Slotting | None, answer: Needed | None, base_time_ns: int
) -> tuple[SiteReservation, ...]:
    """Return what to ask for: the lines found for the efficiency, where one was, else the lines as they are."""
    if answer is not None:
        if answer.line_bit_per_s is None:
            return ()
        lines = with_rate(lines, answer.line_bit_per_s / 8)
    return reserve(lines, default_calendar(lines, mode), base_time_ns)


def _collective(options: CollectiveOptions, size: int) -> Collective:
    kind, nbytes, name = options.collective, parse_size_bytes(options.bytes, "bytes"), options.dtype
    dtype = parse_dtype(name)
    if nbytes % dtype.itemsize or nbytes == 0:
        raise UsageError(f"bytes={nbytes} must be a positive multiple of the {dtype.itemsize} bytes of {name}")
    signature, count = signature_of(kind), nbytes // dtype.itemsize
    if not signature.has_array:
        return Collective(kind, 1, 1, 1)
    if signature.has_counts:  # equal blocks
        count = -(-count // size) * size
    return Collective(kind, count, dtype.itemsize, accumulation_dtype(dtype).itemsize)
