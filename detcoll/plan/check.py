"""The checker: proves a plan before anything moves.

It looks at the parts of all ranks together and proves, or raises with the rank, step and peer that break it:

(a) every SEND has exactly one RECV, of the same size and type, and the other way round
(b) no step waits on itself, across ranks too, even where nothing is buffered: a SEND may have to wait until its RECV
    has begun
(c) every rank ends with every contribution exactly once, in the promised fold order, and every input of a fold states
    how many contributions it holds
(d) inside a rank, steps that touch the same memory, one of them writing, are ordered by ``after``; what a RECV lends is
    read by exactly one FOLD, after it arrived; scratch is large enough; only copies touch a device
(e) with a calendar: no line carries more than it may, and no message is larger than a window

(c) runs symbolic contributions through the steps (`detcoll.plan.execution`). Work is about linear in the number of
elements and steps of all ranks, memory quadratic in the steps of one, so use small counts: a plan's shape does not
depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from detcoll.errors import PlanError
from detcoll.plan.calendar import Calendar, check_calendar
from detcoll.plan.collectives import declaration_of
from detcoll.plan.execution import Execution, describe, run
from detcoll.plan.ir import LARGEST_PLAN_TAG, Buffer, Collective, Kind, Plan
from detcoll.plan.layout import LARGEST_FRAME_BYTES, uses_window
from detcoll.topology import Topology

_DEVICES = {Buffer.DEVICE_OUT, Buffer.DEVICE_IN}
_COPIES = ({Buffer.DEVICE_OUT, Buffer.OUT}, {Buffer.DEVICE_IN, Buffer.IN})
"""What a copy between a device and the host touches."""

Place = tuple[int, int]
"""A rank and one of its steps."""


def check(plans: Sequence[Plan], topology: Topology, calendar: Calendar | None = None) -> None:
    """Prove the parts of all ranks.

    Parameters
    ----------
    plans : sequence of Plan
        One part for each rank, in any order.
    topology : Topology
        What they were compiled for.
    calendar : Calendar, optional
        Whose windows and rates they will use.

    Raises
    ------
    PlanError
        At the first rule that is broken.
    """
    by_rank = _by_rank(plans, topology)
    for plan in by_rank:
        _check_rows(plan, topology)
        _check_memory(plan)
    partners = _matched(by_rank)
    events = _in_order(by_rank, partners)
    execution = Execution(by_rank, topology)
    run(execution, events, partners)
    execution.check_result()
    if calendar is not None:
        check_calendar(calendar, topology)
        for plan in by_rank:
            _check_windows(plan, topology, calendar)


def _by_rank(plans: Sequence[Plan], topology: Topology) -> list[Plan]:
    ordered = sorted(plans, key=lambda plan: plan.rank)
    if [plan.rank for plan in ordered] != list(range(topology.size)):
        raise PlanError(f"parts are of ranks {[plan.rank for plan in ordered]}; expected one each of {topology.size}")
    first = ordered[0]
    for plan in ordered:
        own, others = (_shared_part(each.collective) for each in (plan, first))
        if (own, plan.algorithm, plan.size) != (others, first.algorithm, topology.size):
            raise PlanError(
                f"rank {plan.rank} has {plan.algorithm} of {plan.collective} for {plan.size} ranks; rank 0 has "
                f"{first.algorithm} of {first.collective} for {first.size}, the topology {topology.size}"
            )
    return ordered


def _shared_part(collective: Collective) -> Collective:
    """Return what must be equal on all ranks."""
    if collective.counts and declaration_of(collective.kind).is_pairwise:
        return replace(collective, count=0, counts=(), out_counts=())
    return collective


def _check_rows(plan: Plan, topology: Topology) -> None:
    """Check that every row means something by itself."""
    home = topology.site_of(plan.rank)
    for step, row in enumerate(plan.steps):
        where = describe(plan, step)
        earlier = plan.after_of(step)
        if earlier and not (min(earlier) >= 0 and max(earlier) < step):
            raise PlanError(f"{where} comes after {earlier}; only earlier steps may stand there")
        _check_span(plan, where, int(row["buffer"]), int(row["offset"]), int(row["length"]))
        if row["kind"] == Kind.FOLD:
            _check_fold(plan, step, where)
            continue
        peer = int(row["peer"])
        if not 0 <= peer < plan.size or peer == plan.rank:
            raise PlanError(f"{where}: its peer must be another of {plan.size} ranks")
        if int(row["tag"]) > LARGEST_PLAN_TAG:
            raise PlanError(f"{where}: tags go up to {LARGEST_PLAN_TAG}")
        if bool(row["wide"]) != (topology.site_of(peer) != home):
            raise PlanError(f"{where}: wide={int(row['wide'])}, but that is not where its peer is")
        if row["kind"] == Kind.SEND and row["buffer"] in (Buffer.LENT, *_DEVICES):
            raise PlanError(f"{where} sends {Buffer(row['buffer']).name}, which no message is made of")
        if row["kind"] == Kind.RECV and row["buffer"] in (Buffer.IN, *_DEVICES):
            raise PlanError(f"{where} writes {Buffer(row['buffer']).name}")
        if row["buffer"] != Buffer.LENT and bool(row["accumulated"]) != (row["buffer"] == Buffer.ACCUMULATOR):
            raise PlanError(f"{where}: accumulated={int(row['accumulated'])}, but its buffer has the other type")


def _check_span(plan: Plan, where: str, buffer: int, offset: int, length: int) -> None:
    sizes = {
        Buffer.OUT: plan.out_elems,
        Buffer.IN: plan.in_elems,
        Buffer.PARTIAL: plan.partial_elems,
        Buffer.ACCUMULATOR: plan.accumulator_elems,
        Buffer.DEVICE_OUT: plan.out_elems if plan.device_out else 0,
        Buffer.DEVICE_IN: plan.in_elems if plan.device_in else 0,
    }
    if length < 1:
        raise PlanError(f"{where}: length {length} must be at least 1")
    if buffer != Buffer.LENT and not 0 <= offset <= offset + length <= sizes[Buffer(buffer)]:
        held = sizes[Buffer(buffer)]
        raise PlanError(f"{where}: [{offset}, {offset + length}) leaves {Buffer(buffer).name}, which holds {held}")


def _check_fold(plan: Plan, step: int, where: str) -> None:
    row = plan.steps[step]
    inputs = plan.inputs_of(step)
    if not inputs or row["buffer"] in (Buffer.LENT, Buffer.DEVICE_IN):
        raise PlanError(f"{where} needs inputs and a buffer to write")
    sources = [buffer for buffer, _ in inputs]
    touched = {int(row["buffer"]), *sources}
    if row["buffer"] == Buffer.IN and not (plan.device_in and sources == [Buffer.DEVICE_IN]):
        raise PlanError(f"{where} writes the input")
    if touched & _DEVICES and (len(inputs) > 1 or row["final"] or touched not in _COPIES):
        names = ", ".join(sorted(Buffer(buffer).name for buffer in touched))
        raise PlanError(f"{where} touches {names}; a device's array and its copy on the host are only copied")
    for buffer, offset in inputs:
        if buffer != Buffer.LENT:
            _check_span(plan, where, buffer, offset, int(row["length"]))
            if buffer == row["buffer"] and 0 < abs(offset - int(row["offset"])) < int(row["length"]):
                raise PlanError(f"{where}: its target overlaps an input in part")
            continue
        lender = plan.steps[offset] if 0 <= offset < step else None
        if lender is None or lender["kind"] != Kind.RECV or lender["buffer"] != Buffer.LENT:
            raise PlanError(f"{where} reads what step {offset} lends, but that lends nothing")
        if lender["length"] != row["length"]:
            raise PlanError(f"{where} folds {int(row['length'])} elements; step {offset} lends {int(lender['length'])}")


def _check_memory(plan: Plan) -> None:
    """Check that steps which share memory are ordered, and that what is lent is read once, in time."""
    before = _ancestors(plan)
    collective = plan.collective
    common = declaration_of(collective.kind).in_place(collective, plan.size, plan.rank)
    accesses: dict[int, list[tuple[int, int, int, bool]]] = {}
    readers: dict[int, list[int]] = {step: [] for step in range(len(plan.steps)) if _lends(plan, step)}
    for step in range(len(plan.steps)):
        touched = list(_touches(plan, step))
        if common is not None:  # the caller may pass input and output in one array, where they lie like this
            touched = _in_one_array(plan, touched, *common)
        for buffer, begin, end, writes in touched:
            if buffer == Buffer.LENT:
                readers[begin].append(step)
            else:
                accesses.setdefault(buffer, []).append((begin, end, step, writes))
    for lender, folds in readers.items():
        if len(folds) != 1:
            raise PlanError(f"{describe(plan, lender)}: what it lends is read by {len(folds)} steps; expected 1")
        if not before[folds[0]] >> lender & 1:
            raise PlanError(f"{describe(plan, folds[0])} reads what step {lender} lends, but does not come after it")
    for buffer, touched in accesses.items():
        for one, other in _racing(touched, before):
            raise PlanError(
                f"{describe(plan, one)} and step {other} touch the same elements of {Buffer(buffer).name}, one writes, "
                "and neither comes after the other"
            )


def _in_one_array(
    plan: Plan, touched: list[tuple[int, int, int, bool]], in_at: int, out_at: int
) -> list[tuple[int, int, int, bool]]:
    """Return what a step touches if the caller's input and output begin at these places of one array.

    If only one of them is on a device they are two arrays.
    """
    if plan.device_in != plan.device_out:
        return touched
    given, result = (Buffer.DEVICE_IN, Buffer.DEVICE_OUT) if plan.device_in else (Buffer.IN, Buffer.OUT)
    at = {int(given): in_at, int(result): out_at}
    moved = [
        (int(result), begin + at[buffer], end + at[buffer], writes) if buffer in at else (buffer, begin, end, writes)
        for buffer, begin, end, writes in touched
    ]
    if len(moved) == 2 and moved[0][:3] == moved[1][:3]:  # a copy onto itself writes nothing new
        return [moved[1]]
    return moved


def _lends(plan: Plan, step: int) -> bool:
    row = plan.steps[step]
    return bool(row["kind"] == Kind.RECV and row["buffer"] == Buffer.LENT)


def _ancestors(plan: Plan) -> list[int]:
    """Return for each step a number whose bit s is set where it comes after step s, through others too."""
    before: list[int] = []
    for step in range(len(plan.steps)):
        bits = 0
        for earlier in plan.after_of(step):
            bits |= before[earlier] | 1 << earlier
        before.append(bits)
    return before


def _touches(plan: Plan, step: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield buffer, begin, end and whether it writes for all memory that ``step`` touches."""
    row = plan.steps[step]
    length, begin = int(row["length"]), int(row["offset"])
    if not _lends(plan, step):
        yield int(row["buffer"]), begin, begin + length, row["kind"] != Kind.SEND
    if row["kind"] == Kind.FOLD:
        for buffer, offset in plan.inputs_of(step):
            yield buffer, offset, offset + length, False


def _racing(touched: list[tuple[int, int, int, bool]], before: list[int]) -> Iterator[Place]:
    touched.sort()
    under_way: list[tuple[int, int, bool]] = []
    for begin, end, step, writes in touched:
        under_way = [item for item in under_way if item[0] > begin]
        for _, other, other_writes in under_way:
            ordered = before[step] >> other & 1 or before[other] >> step & 1 or step == other
            if (writes or other_writes) and not ordered:
                yield step, other
        under_way.append((end, step, writes))


def _matched(plans: list[Plan]) -> dict[Place, Place]:
    """Return for every SEND its RECV, and the other way round."""
    sends: dict[tuple[int, int, int], Place] = {}
    recvs: dict[tuple[int, int, int], Place] = {}
    for plan in plans:
        for step, row in enumerate(plan.steps):
            if row["kind"] == Kind.FOLD:
                continue
            peer, tag = int(row["peer"]), int(row["tag"])
            found, key = (
                (sends, (plan.rank, peer, tag)) if row["kind"] == Kind.SEND else (recvs, (peer, plan.rank, tag))
            )
            if key in found:
                raise PlanError(f"{describe(plan, step)} has the same peer and tag as step {found[key][1]}")
            found[key] = (plan.rank, step)
    for key in sends.keys() ^ recvs.keys():
        rank, step = sends.get(key) or recvs[key]
        raise PlanError(f"{describe(plans[rank], step)} has no {'RECV' if key in sends else 'SEND'} at its peer")
    partners = {}
    for key, sender in sends.items():
        _check_equal(plans, sender, recvs[key])
        partners[sender], partners[recvs[key]] = recvs[key], sender
    return partners


def _check_equal(plans: list[Plan], sender: Place, receiver: Place) -> None:
    sent, taken = (plans[rank].steps[step] for rank, step in (sender, receiver))
    if sent["length"] != taken["length"] or sent["accumulated"] != taken["accumulated"]:
        names = {0: "", 1: " in the accumulation type"}
        raise PlanError(
            f"{describe(plans[sender[0]], sender[1])} sends {int(sent['length'])} elements"
            f"{names[int(sent['accumulated'])]}; step {receiver[1]} there expects {int(taken['length'])}"
            f"{names[int(taken['accumulated'])]}"
        )


def _in_order(plans: list[Plan], partners: dict[Place, Place]) -> list[Place]:
    """Return all steps in an order in which they can run, each where it takes effect.

    A SEND takes effect when it begins, a RECV and a FOLD when they end. Every step is two nodes, its begin and its
    end, and a SEND and its RECV each end after the other has begun.
    """
    waits: dict[tuple[int, int, bool], list[tuple[int, int, bool]]] = {}
    for plan in plans:
        for step in range(len(plan.steps)):
            waits[plan.rank, step, False] = [(plan.rank, earlier, True) for earlier in plan.after_of(step)]
            waits[plan.rank, step, True] = [(plan.rank, step, False)]
            if (plan.rank, step) in partners:
                waits[plan.rank, step, True].append((*partners[plan.rank, step], False))
    try:
        nodes = list(TopologicalSorter(waits).static_order())
    except CycleError as error:
        places = dict.fromkeys((rank, step) for rank, step, _ in error.args[1])
        names = ", ".join(describe(plans[rank], step) for rank, step in places)
        raise PlanError(f"steps wait for one another: {names}") from error
    return [(rank, step) for rank, step, ended in nodes if ended != (plans[rank].steps["kind"][step] == Kind.SEND)]


def _check_windows(plan: Plan, topology: Topology, calendar: Calendar) -> None:
    """Check that every wide message fits into each window of its sender, frame included."""
    site = topology.site_of(plan.rank)
    if not calendar.windows_of(site, plan.rank) or not uses_window(calendar, plan.collective.nbytes):
        return
    for step, row in enumerate(plan.steps):
        if row["kind"] != Kind.SEND or not row["wide"]:
            continue
        destination = topology.site_of(int(row["peer"]))
        windows = calendar.windows_to(site, plan.rank, destination)
        shortest_ns = min((window.end_ns - window.start_ns for window in windows), default=0)
        rate = calendar.rate_bytes_per_s(site, destination)
        nbytes = plan.message_bytes(step) + LARGEST_FRAME_BYTES
        if nbytes / rate * 1e9 > shortest_ns:
            raise PlanError(
                f"{describe(plan, step)}: {nbytes} bytes take {nbytes / rate * 1e9:.0f} ns, a window {shortest_ns} ns"
            )
