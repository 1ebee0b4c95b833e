"""A job: everything that one process shares over all its groups.

It owns the session with the other ranks, the endpoints, the calendar and its slots, the clock, and the one progress
thread. Groups only say who takes part: all of them send through the same slots, so what crosses a line keeps to the
reserved rate whatever group it is of.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detcoll.errors import Closed, ConnectError, DeadlineMissed, DetcollError, PlanMismatch, TransportError, UsageError
from detcoll.job.ahead import Ahead
from detcoll.job.assembly import Assembled, deadline_after
from detcoll.job.flight import Flight
from detcoll.job.rest import Rest
from detcoll.job.settings import Facts, Settings
from detcoll.machine import Slots
from detcoll.plan import Calendar, Collective, Planner, Slotting
from detcoll.plan.headroom import Express
from detcoll.plan.layout import LARGEST_FRAME_BYTES
from detcoll.plan.predict import Costs
from detcoll.plan.promise import calendar_facts
from detcoll.rendezvous import Session
from detcoll.runtime import Engine, Group, Loop, Timekeeper
from detcoll.runtime.control import JOB_ID, WHOLE_GROUP, Cause
from detcoll.runtime.engine import Wide
from detcoll.runtime.group import WORLD_ID, world
from detcoll.runtime.native import NativeRunner
from detcoll.runtime.recorder import Recorder
from detcoll.runtime.snapshot import snapshot
from detcoll.topology import Topology
from detcoll.trace import Call, Trace

log = logging.getLogger("detcoll")

_PARTING_AFTER_FAILURE_S = 2.0
_CLOSING_AFTER_FAILURE_S = 0.5
"""How long endpoints go on sending after a failure, so that its cause reaches those that this rank told."""

TRACED_PHASES = 256
"""Predictions in a trace tell so many moments of a cycle apart."""


class Job:
    """One process's part of a job; see the module. It has many fields since it is what all groups share.

    ``native`` : runs the transport's own collectives of the world, where it has some.  ``costs`` : what hosts cost.
    ``ahead`` : keeps calls on the same memory in order, where there are native ones.
    """

    def __init__(
        self, session: Session, settings: Settings, topology: Topology, assembled: Assembled, calendar: Calendar,
        facts: Sequence[Facts], timekeeper: Timekeeper,
    ) -> None:  # fmt: skip
        self.session, self.settings, self.topology, self.assembled = session, settings, topology, assembled
        self.calendar, self.costs, self.pid = calendar, _costs(facts), os.getpid()
        self.world = world([topology.site_of(rank) for rank in range(topology.size)])
        self.rest = Rest(session)
        here = topology.site_of(session.rank)
        self.trace = Trace(
            session.rank, here, settings.trace is not None, time.monotonic_ns(),
            calendar_facts(calendar, topology.granted, session.rank),
        )  # fmt: skip
        self._timekeeper = timekeeper
        self.recorder = Recorder()
        self.flight = Flight(facts[0].job, session.rank, self.describe, settings.record)
        self._lock = threading.Lock()
        self._loop: Loop | None = None
        self._finalized = False
        self._planners: dict[int, Planner] = {}
        self.ahead = Ahead()
        try:
            self.native = self._make_native()
            if self.native is None:
                self.loop  # noqa: B018 - started at once: peers need it to answer
        except BaseException:
            if self._loop is not None:
                self._loop.close()
            self.flight.close()
            raise

    def _make_native(self) -> NativeRunner | None:
        native = self.assembled.native
        if native is None:
            return None
        capabilities, rank = self.assembled.transport.capabilities, self.session.rank
        return NativeRunner(
            native, capabilities, rank, self.trace, self._native_failed, self._explain_native, self.recorder
        )

    def _native_failed(self, error: Exception, is_ours: bool) -> None:
        self._note_failure(str(error))
        if is_ours:
            self.rest.announce(Cause.of(WORLD_ID, WHOLE_GROUP, error, self.session.rank))

    def _explain_native(self) -> DetcollError | None:
        told = self.rest.explanation(WORLD_ID)
        loop = self._loop
        if loop is not None:  # what was heard here did not wake it up
            with contextlib.suppress(Closed):
                loop.post(lambda now_ns: self.rest.tell(loop.engine, now_ns))
        return told

    @property
    def loop(self) -> Loop:
        """The progress thread, started when it is needed first."""
        with self._lock:
            if self._loop is None:
                loop = self._loop = self._make_loop()
                loop.start()
                loop.ask(lambda now_ns: loop.engine.join(self.world, now_ns))
            return self._loop

    def _make_loop(self) -> Loop:
        rank, routes = self.session.rank, self.assembled.routes
        capabilities = self.assembled.transport.capabilities
        slots: Slots[Wide] = Slots(
            self.calendar, self.topology.site_of(rank), rank, frame_bytes=LARGEST_FRAME_BYTES,
            ahead=capabilities.timed, splits=capabilities.splits,
        )  # fmt: skip
        express = Express.of(self.topology, rank) if self.calendar.mode is not Slotting.OFF else None
        engine = Engine(rank, routes.site_of, routes.wide, slots, express, self.recorder)
        return Loop(engine, routes, self._timekeeper, self.rest, self.trace, self._note_failure)

    def describe(self) -> dict[str, Any]:
        """Return where this rank stands, as plain data for its flight record."""
        groups = snapshot(self._loop.engine) if self._loop is not None else []
        if self.native is not None:
            groups = [self.native.standing(self.world), *(group for group in groups if group["id"] != "world")]
        return {
            "rank": self.session.rank, "size": self.session.size, "transport": self.assembled.transport.name,
            "site": self.topology.site_of(self.session.rank), "groups": groups, "events": self.recorder.rows(),
        }  # fmt: skip

    def _note_failure(self, reason: str) -> None:
        path = self.flight.write(reason)
        if path is not None:
            log.info("rank %d: what led to it is in %s", self.session.rank, path)

    def keep_planner(self, group: Group, planner: Planner) -> None:
        """Remember what predicts the calls of a group, where there is a trace."""
        if self.trace.recording:
            self._planners[group.number] = planner

    @property
    def usable(self) -> bool:
        """Whether calls may be made: opened by this process and not finalized."""
        return not self._finalized and os.getpid() == self.pid

    def check_usable(self) -> None:
        """Refuse a call where none may be made.

        Raises
        ------
        UsageError
            In a process that was forked from the one that opened the job.
        Closed
            After `finalize` or `abort`.
        """
        if os.getpid() != self.pid:
            raise UsageError("this communicator was made before a fork; call detcoll.init() in the new process")
        if self._finalized:
            raise Closed("the communicator was finalized")

    def open_group(self, group: Group) -> None:
        """Take part in a group; all members call it.

        Raises
        ------
        UsageError
            If on some member a group of its id or number is open.
        ConnectError
            If not all members called it in time; names those that did not.
        PeerLost
            If a member is lost.
        """
        engine, problem = self.loop.engine, ""
        try:
            try:
                self.loop.ask(lambda now_ns: engine.join(group, now_ns))
            except UsageError as error:
                problem = f"rank {self.session.rank}: {error}"
            deadline_ns = deadline_after(self.settings.timeout_s)
            told = self.session.exchange(f"group {group.id:016x}", problem.encode(), deadline_ns, group.ranks)
        except BaseException as error:
            if not problem:
                with contextlib.suppress(Closed):
                    self.loop.post(lambda now_ns: engine.leave(group))
            if not isinstance(error, ConnectError):
                raise
            raise ConnectError(
                f"group {group.title} was not made: {error}; all of its ranks must make it, with the same ranks in the "
                "same order and the same name"
            ) from error
        problems = [answer.decode() for answer in told if answer]
        if problems:
            if not problem:
                self.loop.post(lambda now_ns: engine.leave(group))
            raise UsageError(problems[0])

    def close_group(self, group: Group, timeout: float) -> None:
        """Finish what is under way in a group, meet its members, and take no part in it any more.

        Raises
        ------
        DeadlineMissed
            If calls are still under way at the deadline; the group has failed then, on all members.
        """
        loop, deadline_ns = self.loop, deadline_after(timeout)
        with contextlib.suppress(Closed):  # all groups have ended then, and there is nothing to leave
            if not loop.drain_group(group, deadline_ns):
                title = group.title
                error = DeadlineMissed(f"closing group {title}: collectives were still under way after {timeout:g} s")
                loop.ask(lambda now_ns: loop.engine.fail_group(group, error, now_ns))
                loop.post(lambda now_ns: loop.engine.leave(group))
                raise error
            if self.failure(group) is None:
                try:
                    self.session.exchange(f"close {group.id:016x}", b"", deadline_ns, group.ranks)
                except TransportError as error:
                    log.warning("rank %d: others did not close group %s: %s", self.session.rank, group.title, error)
            loop.post(lambda now_ns: loop.engine.leave(group))

    @property
    def has_loop(self) -> bool:
        """Whether there is a progress thread."""
        return self._loop is not None

    def was_told(self, group: Group) -> bool:
        """Whether a caller was shown the failure of a group."""
        membership = self._loop.engine.groups.get(group.id) if self._loop is not None else None
        return membership is None or membership.told

    def failure(self, group: Group) -> Exception | None:
        """Return what ended a group, or None."""
        if group.id == WORLD_ID and self.native is not None and self.native.failure is not None:
            return self.native.failure
        loop = self._loop
        if loop is None:
            return None
        return loop.failure or loop.group_failure(group)

    def await_clock(self, deadline_ns: int) -> None:
        """Return once this rank knows the time of its site.

        Raises
        ------
        DeadlineMissed
            If it does not by the deadline.
        DetcollError
            If something goes wrong meanwhile.
        """
        loop = self._loop
        if loop is None:
            return
        while not loop.synchronised.wait(0.05):
            failure = self.failure(self.world)
            if failure is not None:
                raise failure
            if time.monotonic_ns() >= deadline_ns:
                raise DeadlineMissed(f"rank {self.session.rank} does not agree with its site about the time")
        if loop.failure is not None:
            raise loop.failure

    def site_offset_ns(self) -> int:
        """Return what the site's clock adds to this rank's."""
        return self._loop.engine.slots.offset_ns if self._loop is not None else 0

    def phase_ns(self, at_ns: int) -> int:
        """Return where in the calendar's cycle a time of this rank falls."""
        cycle_ns = self.calendar.sites[self.topology.site_of(self.session.rank)].cycle_ns
        return (at_ns + self.site_offset_ns()) % cycle_ns

    def counters(self) -> dict[str, int]:
        """Return what transports and the calendar counted so far, by name."""
        counted: dict[str, int] = {}
        for endpoint in self.assembled.endpoints:
            for name, value in endpoint.counters().items():
                counted[name] = counted.get(name, 0) + value
        if self._loop is not None and self.calendar.mode in (Slotting.CALENDAR, Slotting.TURNS):
            slots = self._loop.engine.slots
            counted["slot_misses"], counted["slot_trims"] = slots.misses, slots.trimmed
        return counted

    def finalize(self, timeout: float) -> None:
        """Finish what is under way in all groups, meet all ranks once more, and give everything back. Idempotent.

        Raises
        ------
        TransportError
            If calls were still under way at the deadline, or something ended them meanwhile.
        PlanMismatch
            If this rank is through with a call that others called differently, and was not told yet.
        """
        if not self.usable:
            return
        self._finalized = True
        deadline_ns = deadline_after(timeout)
        trouble: Exception | None = None
        try:
            trouble = self._drain(deadline_ns)
            if self._failed() is None:
                self._part(deadline_ns)
        finally:
            failure = self._failed()
            trouble = trouble or self._untold_mismatch(failure)
            self._give_back(deadline_ns, failure)
        if trouble is not None:
            raise trouble

    def _failed(self) -> Exception | None:
        return self.failure(self.world)

    def _drain(self, deadline_ns: int) -> Exception | None:
        """Finish what is under way; return what ended it, where no caller was told."""
        had_failed = self._failed() is not None
        is_drained = self.native is None or self.native.drain(deadline_ns)
        loop = self._loop
        if loop is not None and not loop.drain(deadline_ns):
            is_drained = False
            error = DeadlineMissed("closing: collectives were still under way at the deadline")
            self.rest.announce(Cause.of(JOB_ID, WHOLE_GROUP, error, self.session.rank))
            loop.fail(error)
        failure = self._failed()
        if not is_drained and not had_failed:
            return failure
        if loop is not None and failure is not None and not had_failed:
            membership = loop.engine.groups.get(WORLD_ID)
            if membership is not None and not membership.told and not isinstance(failure, Closed):
                return failure
        return None

    def _untold_mismatch(self, failure: Exception | None) -> PlanMismatch | None:
        if failure is None:
            failure = self.rest.failure(WORLD_ID)
        else:
            membership = self._loop.engine.groups.get(WORLD_ID) if self._loop is not None else None
            if membership is None or membership.told:
                return None
        return failure if isinstance(failure, PlanMismatch) else None

    def _give_back(self, deadline_ns: int, failure: Exception | None) -> None:
        """Close everything; after a failure without waiting long, since a frozen rank would not answer."""
        if self.native is not None:
            self.native.close()
        if self._loop is not None:
            self._loop.close()
        self._complete_trace()
        if failure is not None:
            deadline_ns = min(deadline_ns, deadline_after(_PARTING_AFTER_FAILURE_S))
        _forget_frames(failure)
        for endpoint in self.assembled.endpoints:
            if failure is None:
                endpoint.close(deadline_ns)
            elif self.native is not None:
                endpoint.abort()
            else:
                endpoint.close(min(deadline_ns, deadline_after(_CLOSING_AFTER_FAILURE_S)))
        self.session.close(deadline_ns)
        self.flight.close()
        self._write_trace()

    def abort(self, reason: str) -> None:
        """Give up: every call under way fails on all ranks, with ``reason`` shown to them. Idempotent."""
        if not self.usable:
            return
        self._finalized = True
        error = TransportError(f"rank {self.session.rank} aborted: {reason}")
        cause = Cause(JOB_ID, WHOLE_GROUP, "TransportError", reason, self.session.rank)
        loop = self._loop
        if loop is not None:  # first, so that what it has to tell goes before this
            with contextlib.suppress(Closed):
                loop.ask(lambda now_ns: loop.engine.told(cause, now_ns))
        self.rest.announce(cause)
        if self.native is not None:
            self.native.fail(error)
            self.native.close()
        if loop is not None:
            loop.fail(error)
            loop.close()
        for endpoint in self.assembled.endpoints:
            if self.native is not None:
                endpoint.abort()
            else:
                endpoint.close(deadline_after(_CLOSING_AFTER_FAILURE_S))
        self.session.close(deadline_after(_CLOSING_AFTER_FAILURE_S))
        self.flight.close()

    def _part(self, deadline_ns: int) -> None:
        """Meet once more, so that nobody closes while another still needs an answer."""
        try:
            self.session.exchange("finalize", b"", deadline_ns)
        except TransportError as error:
            log.warning("rank %d: others did not finalize: %s", self.session.rank, error)

    def _complete_trace(self) -> None:
        """Note what is known at the end only."""
        if self.trace.calendar is not None and self._loop is not None:
            self.trace.calendar["offset_ns"] = self.site_offset_ns()
            self.trace.misses = list(self._loop.engine.slots.missed_windows)
        self.trace.counts = self.counters()
        for endpoint in self.assembled.endpoints:
            self.trace.connections.extend(endpoint.connections())

    def _predict_call(self, call: Call, called_ns: int) -> int | None:
        """Return the predicted time of a call in the trace; phases are rounded, so that few have to be computed."""
        planner = self._planners.get(call.group)
        if planner is None or not isinstance(call.subject, Collective):
            return None
        phase_ns = None
        if planner.calendar.has_windows:
            cycle_ns = planner.calendar.sites[self.topology.site_of(self.session.rank)].cycle_ns
            step_ns = max(cycle_ns // TRACED_PHASES, 1)
            phase_ns = self.phase_ns(called_ns) // step_ns * step_ns
        return planner.predict_ns(call.subject, phase_ns=phase_ns)

    def _write_trace(self) -> None:
        if self.settings.trace is None:
            return
        folder = Path(self.settings.trace)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{self.session.rank}.json").write_text(
                json.dumps(self.trace.to_json(self._predict_call)), encoding="utf-8"
            )
        except OSError as error:
            log.warning("trace of rank %d was not written: %s", self.session.rank, error)


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold: views of a transport's memory, which would keep it mapped."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _costs(facts: Sequence[Facts]) -> Costs:
    """Return what hosts cost, which is the same on all ranks: the most crowded host sets the pace of a call."""
    ranks_on = Counter(fact.host for fact in facts)
    cores_of = {host: set[int]().union(*(fact.cores for fact in facts if fact.host == host)) for host in ranks_on}
    return max(
        (Costs.on_host(count, len(cores_of[host])) for host, count in ranks_on.items()), key=lambda costs: costs.call_ns
    )
